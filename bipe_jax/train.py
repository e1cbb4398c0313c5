"""Trains a model and evaluates it.

python -m bipe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Running the same command again resumes from the last checkpoint. At the end the checkpoint is
evaluated at 1 to 16 times its training length. From Python: `bipe_jax.train`.
"""

import logging
import sys

from bipe_jax import cli, plan, processes
from bipe_jax.errors import PREEMPTED, UserError
from bipe_jax.evaluation.evaluator import Settings, check_documents, check_output, evaluate, resolve
from bipe_jax.evaluation.tables import tables, written
from bipe_jax.training import failures, lock, observing
from bipe_jax.training.observing import trace, wandb_board
from bipe_jax.training.trainer import train
from bipe_jax.workdir import workdir_argument

_LOG = logging.getLogger("bipe_jax.train")


def main(arguments: list[str]) -> None:
    parser = cli.Parser("bipe_jax.train", __doc__)
    parser.add_argument(
        "--workdir", required=True, help="directory of the run: checkpoints, metrics, plots"
    )
    parser.add_argument(
        "--stop_at", type=int, help="train to this step, save and exit as if preempted"
    )
    parser.add_argument("--profile", help="steps to trace into WORKDIR/profile, FIRST:LAST")
    args, config = parser.parse_with_config(arguments)
    if not args.workdir:
        raise UserError("--workdir=DIR is needed")
    if args.stop_at is not None and args.stop_at < 1:
        raise UserError(f"--stop_at={args.stop_at} must be at least 1")
    cli.quiet()
    cli.cache_programs()

    # All checks come before the training, those of the evaluation at its end too.
    config = plan.make(config)
    wandb_board.check(config)
    profile = trace.parse(args.profile, min(config.steps, args.stop_at or config.steps))
    settings = resolve(Settings(), config)

    processes.start()
    check_output(args.workdir, "--workdir")
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
                check=lambda config, tokens: check_documents(config, tokens, settings),
            )
        except KeyboardInterrupt:  # after the save
            done = False
            observer.preempted()
        if done:
            processes.exit_at_signals()
            with observer.phase("evaluating"):
                evaluate(args.workdir, settings, show=lambda result: print(tables(result)))
            if processes.is_first():
                print(written(args.workdir))
            return
    _LOG.info(f"Stopped and saved: the same command resumes (exit status {PREEMPTED})")
    sys.exit(PREEMPTED)


if __name__ == "__main__":
    # Wrong flags are a failure of the run too.
    with cli.user_errors(), failures.recorded(workdir_argument(sys.argv)):
        main(sys.argv[1:])
