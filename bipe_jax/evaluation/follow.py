"""Evaluates each checkpoint of a run while another process trains it: `evaluate --follow`.

It only reads the run's checkpoints. Each is evaluated once, even by a follower that is restarted:
OUTPUT/evaluations/STEP.json records it. Checkpoints may be deleted at any time.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable

from bipe_jax import checkpoint, processes
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded
from bipe_jax.evaluation.evaluator import Evaluator, Settings, check_output, write
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir, bucket, bucket_lock, files, outputs

_LOG = logging.getLogger(__name__)

_PAUSE = 2.0  # seconds between listings of the directory
_DELETION = 10.0  # seconds that deleting a checkpoint may take


def follow(
    path: str,
    settings: Settings,
    output: str = "",
    show: Callable[[Plan, dict], object] = lambda config, result: None,
) -> None:
    """Evaluates every complete checkpoint, existing and new, until the run's last step.

    Checkpoints that are deleted before they are read are logged and skipped. evaluation.json,
    extrapolation.png and report.html are of the latest step.

    Args:
      path: the run's workdir, which may not exist yet.
      output: directory for the files; "" takes `path`.
      show: called with the run's config and each result, after it is written.

    Raises:
      UserError: a wrong input, several processes, or another follower that writes to the directory.
    """
    if files.is_directory(os.path.join(path, "params")):
        raise UserError(f"{path} is one checkpoint, not a run: give the run's workdir to follow it")
    if processes.name():
        raise UserError("--follow runs in one process, beside the training: start it by itself")
    output = output or path
    directory = Workdir(output).evaluations
    check_output(output)
    if os.path.islink(directory):  # of an output that came from elsewhere: it may lead anywhere
        raise UserError(f"{directory} is a symbolic link: remove it, or choose another --output")
    Workdir(directory).make("--output")
    refusal = f"another follower writes to {directory}: stop it, or choose another --output"
    lock = os.path.join(directory, ".lock")
    with contextlib.ExitStack() as stack:
        with outputs.writing(lock):
            if bucket.holds(lock):
                stack.enter_context(bucket_lock.locked(lock, lambda _: UserError(refusal)))
            else:
                stack.enter_context(files.locked(lock, refusal))
        _follow(path, settings, output, directory, show)


def _follow(
    path: str,
    settings: Settings,
    output: str,
    directory: str,
    show: Callable[[Plan, dict], object],
) -> None:
    done = _evaluated(directory)
    name, evaluator, last = os.path.basename(os.path.abspath(output)), None, None
    waiting = False
    if done:
        steps = ", ".join(map(str, sorted(done)))
        _LOG.info(f"Evaluated already, as {directory} says: steps {steps}")
    while True:
        new = [step for step in checkpoint.steps(path) if step not in done]
        if new:
            waiting = False
            step = new[0]
            model = _load(path, step)
            done.add(step)
            if model is None:
                _LOG.info(f"step {step}: was deleted before it could be read; skipped")
                continue
            last = model.config.steps
            if evaluator is None:
                evaluator = Evaluator(model, settings)
            _LOG.info(f"step {step}")
            result = evaluator(model.params, name, step)
            write(result, output)
            record = os.path.join(directory, f"{step}.json")
            outputs.write_json(record, result)
            show(model.config, result)
        elif last is None and done and (model := _load(path, max(done))):
            last = model.config.steps
        elif last in done:
            break
        else:
            if not waiting:
                _LOG.info(f"Waiting for a checkpoint in {path}")
            waiting = True
            time.sleep(_PAUSE)
    _LOG.info(f"All checkpoints of {path} to step {last} are evaluated: {directory}")


def _evaluated(directory: str) -> set[int]:
    """The steps with results in a directory; what is no result is set aside, to be computed again."""
    done: set[int] = set()
    for name in files.names(directory):
        step, suffix = os.path.splitext(name)
        if suffix != ".json" or not step.isdecimal():
            continue
        path = os.path.join(directory, name)
        if files.read_json(path):
            done.add(int(step))
        else:
            files.set_aside(path, "it holds no results")
    return done


def _load(path: str, step: int) -> loaded.LoadedModel | None:
    """The model of a checkpoint, or None if the checkpoint is deleted meanwhile."""
    try:
        return loaded.load(path, step=step)
    except Exception:  # of any kind, if the files are deleted while they are read
        until = time.monotonic() + _DELETION
        while step in checkpoint.steps(path):
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
        return None
