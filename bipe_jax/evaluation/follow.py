"""Evaluates each checkpoint of a run while another process trains it (`evaluate --follow`).

It only reads the run's checkpoints. Each is evaluated once: OUTPUT/evaluations/STEP.json says that it
was, also to a follower that is started again. Checkpoints may be deleted at any time.
"""

import fcntl
import logging
import os
import time

from bipe_jax import checkpoint, processes
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded
from bipe_jax.evaluation.evaluator import Evaluator, Settings
from bipe_jax.evaluation.files import make_output, write, write_json

_LOG = logging.getLogger(__name__)

_PAUSE = 2.0  # seconds between looks at the directory
_VANISHING = 10.0  # seconds that deleting a checkpoint may take


def follow(path: str, settings: Settings, output: str = "") -> None:
    """Evaluates every complete checkpoint, those of the past too, until the run's last step.

    Checkpoints that are deleted before they are read are named and skipped. evaluation.json,
    extrapolation.png and report.html are of the latest step.

    Args:
      path: the run's workdir, which need not exist yet.
      output: directory for the files; "" takes `path`.

    Raises:
      UserError: a wrong input, several processes, or another follower writes to the same directory.
    """
    if os.path.isdir(os.path.join(path, "params")):
        raise UserError(f"{path} is one checkpoint, not a run: give the run's workdir to follow it")
    if processes.name():
        raise UserError("--follow runs in one process, beside the training: start it by itself")
    output = output or path
    directory = os.path.join(output, "evaluations")
    make_output(directory)
    lock = _lock(directory)
    done = {int(name[:-5]) for name in os.listdir(directory) if name[:-5].isdecimal()}
    name, evaluator, last = os.path.basename(os.path.abspath(output)), None, None
    waiting = False
    if done:
        _LOG.info(
            f"Evaluated already, as {directory} says: steps {', '.join(map(str, sorted(done)))}"
        )
    try:
        while True:
            new = [step for step in checkpoint.steps(path) if step not in done]
            if new:
                waiting = False
                step = new[0]
                loaded_model = _load(path, step)
                done.add(step)
                if loaded_model is None:
                    _LOG.info(f"step {step}: was deleted before it could be read; skipped")
                    continue
                last = loaded_model.config.steps
                if evaluator is None:
                    evaluator = Evaluator(loaded_model, settings)
                _LOG.info(f"step {step}")
                result = evaluator(loaded_model.params, name, step)
                write(result, output)
                write_json(result, os.path.join(directory, f"{step}.json"))  # now it is done
            elif last is None and done and (loaded_model := _load(path, max(done))):
                last = loaded_model.config.steps
            elif last in done:
                break
            else:
                if not waiting:
                    _LOG.info(f"Waiting for a checkpoint in {path}")
                waiting = True
                time.sleep(_PAUSE)
    finally:
        lock.close()
    _LOG.info(f"All checkpoints of {path} to step {last} are evaluated: {directory}")


def _lock(directory: str):
    """The open lock file of a directory: locked until it is closed, or the process ends in any way."""
    file = open(os.path.join(directory, ".lock"), "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"another follower writes to {directory}: stop it, or choose another --output"
        ) from None
    return file


def _load(path: str, step: int) -> loaded.Placed | None:
    """The model of a checkpoint, or None if it is deleted meanwhile."""
    try:
        return loaded.load(path, step=step)
    except Exception:  # any, of a reader whose files vanish
        until = time.monotonic() + _VANISHING
        while step in checkpoint.steps(path):
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
        return None
