"""Trains a model and evaluates it.

python -m bipe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Running the same command again resumes from the last checkpoint. At the end the checkpoint is
evaluated at 1 to 16 times its training length. From Python: `bipe_jax.training.trainer.train`.
"""

import logging
import sys

from absl import flags

from bipe_jax import cli, processes, rundir
from bipe_jax.checkpoint import quiet
from bipe_jax.config import validate
from bipe_jax.errors import PREEMPTED, UserError
from bipe_jax.evaluation.evaluator import Settings, evaluate, resolve
from bipe_jax.evaluation.tables import tables
from bipe_jax.training import observing
from bipe_jax.training.compiling import enable_cache
from bipe_jax.training.observing import trace, wandb_board
from bipe_jax.training.trainer import train

_LOG = logging.getLogger("bipe_jax.train")

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, plots")
_STOP_AT = flags.DEFINE_integer(
    "stop_at", None, "Train to this step, save and exit as though preempted", lower_bound=1
)
_PROFILE = flags.DEFINE_string("profile", None, "Steps to trace into WORKDIR/profile, FIRST:LAST")


def main(_):
    config, workdir, stop_at = cli.CONFIG.value, _WORKDIR.value, _STOP_AT.value
    if config is None or workdir is None:
        raise UserError("--config=FILE and --workdir=DIR are needed")
    quiet()
    enable_cache()

    # What would be refused later, at the latest by the evaluation at the end, is refused now.
    validate(config)
    wandb_board.check(config)
    profile = trace.parse(_PROFILE.value, min(config.steps, stop_at or config.steps))
    settings = resolve(Settings(), config)

    processes.start()
    rundir.forget_failure(workdir)
    with observing.Observer(observing.process_start(), profile) as observer:
        try:
            done = train(config, workdir, stop_at, observer)
        except KeyboardInterrupt:  # Ctrl-C, after the save
            done = False
            observer.preempted()
        if done:
            processes.exit_at_signals()
            with observer.phase("evaluating"):
                result = evaluate(workdir, settings)
            if processes.is_first():
                print(tables(result, workdir))
            return
    _LOG.info(f"Stopped and saved: the same command resumes (exit status {PREEMPTED})")
    sys.exit(PREEMPTED)


if __name__ == "__main__":
    # Flags that cannot be read are a failure of the run too.
    cli.run_with_flags(main, rundir.failures(cli.flag("workdir")))
