"""Trains a model and evaluates it.

python -m bipe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Running the same command again resumes from the last checkpoint. At the end the checkpoint is
evaluated at 1 to 16 times its training length. From Python: `bipe_jax.train`.
"""

import logging
import sys

from bipe_jax import cli, commands, plan, processes
from bipe_jax.config import needs
from bipe_jax.errors import PREEMPTED, UserError
from bipe_jax.evaluation import ending
from bipe_jax.training import failures, lock, observing
from bipe_jax.training.observing import trace, wandb_board
from bipe_jax.training.trainer import train
from bipe_jax.workdir import workdir_argument

_LOG = logging.getLogger("bipe_jax.train")


def main(arguments: list[str]) -> None:
    args, config = commands.parser("train").parse_with_config(arguments)
    if not args.workdir:
        raise UserError("--workdir=DIR is needed")
    if args.stop_at is not None and args.stop_at < 1:
        raise UserError(f"--stop_at={args.stop_at} must be at least 1")
    cli.quiet()
    cli.cache_programs()

    # All checks come before the training, those of the evaluation at its end too.
    config = plan.make(config)
    wandb_board.check(config, args.workdir)
    needs.check_installed(config)
    profile = trace.parse(args.profile, min(config.steps, args.stop_at or config.steps))
    end = ending.of(config)

    processes.start()
    end.check_output(args.workdir)
    with (
        lock.locked(args.workdir),
        observing.Observer(observing.process_start(), profile) as observer,
    ):
        try:
            done = train(
                config,
                args.workdir,
                args.stop_at,
                observer,
                check=end.check,
            )
        except KeyboardInterrupt:  # after the save
            done = False
            observer.preempted()
        if done:
            processes.exit_at_signals()
            with observer.phase("evaluating"):
                end.evaluate(args.workdir)
            return
    _LOG.info(f"Stopped and saved: the same command resumes (exit status {PREEMPTED})")
    sys.exit(PREEMPTED)


if __name__ == "__main__":
    # Wrong flags are a failure of the run too.
    with cli.user_errors(), failures.recorded(workdir_argument(sys.argv)):
        main(sys.argv[1:])
