"""Runs the points of an experiment through `launch.sweep`, stage by stage, and keeps their values."""

import glob
import importlib.util
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bipe_jax.errors import DONE, PREEMPTED, UserError
from bipe_jax.experiments import store
from bipe_jax.experiments.experiment import Experiment
from bipe_jax.experiments.outcomes import Key, Outcomes
from bipe_jax.experiments.points import DIRECTORY, Point, data_of, placed
from bipe_jax.workdir import Workdir, heartbeat, json_files, outputs

_LOG = logging.getLogger(__name__)

_SWEEP = "sweep.json"
_EVERY = 5.0  # seconds between looks for points that have ended
_PREPARED = "prepared"  # is in the directory of data that are complete
_OF_TRAINING = (Workdir.answers, Workdir.evaluation)  # what a training may end with


def run(
    experiment: Experiment,
    size: str,
    every: Sequence[Sequence[Point]],
    output: str,
    more: Sequence[str],
) -> int:
    """Trains and evaluates all points that are not finished, with a live table for each stage.

    A point whose values are kept is not trained again, unless another starts from its checkpoint.

    Args:
      every: all points, by stages.
      more: further arguments of `launch.sweep`, for trainings; other evaluations run on this machine.

    Returns:
      0 if all points are finished, or launched elsewhere; 42 if it was stopped; 1 if some failed.

    Raises:
      UserError: the output cannot be written, kept values are of another config, or `launch` or a module is
        not here.
    """
    if not os.path.isdir("launch"):
        raise UserError(
            "experiments run through launch.sweep: start them in the root of the repository, where "
            "launch/ is"
        )
    needed: dict[str, Point] = {}
    for point in (p for stage in reversed(every) for p in stage):
        if point.name in needed or store.read(output, point) is None:
            needed[point.name] = point
            if point.base:
                needed[point.base.name] = point.base
    if needed:
        check_installed(experiment)
        _prepare(experiment, size, output)
    status = DONE
    for stage in every:
        points = [p for p in stage if p.name in needed]
        ready = [p for p in points if p.base is None or p.base.is_trained()]
        trained = [p for p in ready if p.arm.trained]
        if trained:
            status = max(status, _sweep(experiment, size, trained, output, more))
        if status == PREEMPTED:
            return status
        for point in (p for p in ready if p.is_trained()):
            if store.read(output, point) is None:
                _evaluate(point, output, size)
                _keep(experiment, point, output)
        if waiting := len(points) - len(ready):
            _LOG.info(
                f"{waiting} points wait for those that they start from: run the same command later"
            )
    if status != DONE:
        _LOG.info("Some points failed; the tables have those that are finished")
    return status


def check_installed(experiment: Experiment) -> None:
    """Raises UserError if this Python lacks a module that is needed only after the trainings."""
    for module, extra in experiment.extras.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{experiment.name} needs {module}: pip install -e '.[{extra}]'")


def _prepare(experiment: Experiment, size: str, output: str) -> None:
    """Writes the data of an experiment, unless that is done. Raises UserError."""
    directory = data_of(output, size)
    done = os.path.join(directory, _PREPARED)
    if experiment.prepare is None or os.path.exists(done):
        return
    outputs.check_directory(directory, _PREPARED)
    _LOG.info(f"Preparing the data of {experiment.name} in {directory}")
    experiment.prepare(size, directory)
    outputs.write_bytes(done, b"")


def _sweep(
    experiment: Experiment,
    size: str,
    trained: Sequence[Point],
    output: str,
    more: Sequence[str],
) -> int:
    path = os.path.join(output, _SWEEP)
    outputs.write_json(path, [{"name": p.name, **p.overrides} for p in trained])
    line = [
        sys.executable, "-m", "launch.sweep", f"--config={experiment.config}:{size}",
        f"--sweep={path}", f"--output={os.path.join(output, DIRECTORY)}", *more,
    ]  # fmt: skip
    with subprocess.Popen(line) as process:
        while True:
            try:
                return process.wait(_EVERY)
            except subprocess.TimeoutExpired:
                _keep_ended(experiment, trained, output)
            except KeyboardInterrupt:  # the sweep got it too, and stops its trainings
                continue


def _keep_ended(experiment: Experiment, points: Sequence[Point], output: str) -> None:
    """Keeps the values of the points whose trainings have ended, and that need no other evaluation."""
    for point in (p for p in points if not p.arm.evaluations):
        beat = heartbeat.read(point.workdir)
        if beat and beat["phase"] == "done" and store.read(output, point) is None:
            _keep(experiment, point, output)


def _evaluate(point: Point, output: str, size: str) -> None:
    """Runs the evaluations of a trained point that have written nothing yet. Raises UserError."""
    for one in point.arm.evaluations:
        directory = point.directory(one.name, output)
        if not glob.glob(os.path.join(glob.escape(directory), "*.json")):
            line = [
                "-m",
                one.module,
                f"--checkpoint={point.workdir}",
                f"--output={directory}",
                *(placed(flag, output, size) for flag in one.flags),
            ]
            _LOG.info(f"{point.name}: python {shlex.join(line)}")
            os.makedirs(directory, exist_ok=True)
            if subprocess.run([sys.executable, *line], stdout=subprocess.DEVNULL).returncode:
                raise UserError(
                    f"python {shlex.join(line)} failed: mend what it said, and run again"
                )


def _files(point: Point, output: str) -> dict[str, Any]:
    """The files that the evaluations of a trained point wrote, see `Experiment.cells`; {} if it has none yet.

    Raises:
      UserError: one cannot be read.
    """
    paths: dict[str, str] = {}
    if point.arm.trained:
        of_training = {name: os.path.join(point.workdir, name) for name in _OF_TRAINING}
        paths |= {name: path for name, path in of_training.items() if os.path.exists(path)}
        if not paths:
            return {}
    for one in point.arm.evaluations:
        directory = point.directory(one.name, output)
        for path in glob.glob(os.path.join(glob.escape(directory), "*.json")):
            paths[f"{one.name}/{os.path.basename(path)}"] = path
    return {name: json_files.read(path) for name, path in paths.items()}


def _keep(experiment: Experiment, point: Point, output: str) -> None:
    """Keeps the values of a trained point, if it is evaluated. Raises UserError: a file is malformed."""
    files = _files(point, output)
    if not files:
        return
    try:
        store.write(output, point, experiment.cells(files), files)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{point.name}: {' or '.join(files)} of {point.workdir} is malformed ({error!r}): remove it, and "
            "run again, which repeats the evaluation"
        ) from None


def read(
    experiment: Experiment, size: str, every: Sequence[Sequence[Point]], output: str
) -> Outcomes:
    """The values of all points that are finished.

    Raises:
      UserError: they are malformed, or arms of one seed have the losses of other texts.
    """
    values: dict[str, dict[Key, dict[int, tuple[float, float]]]] = {}
    of_seeds: dict[int, dict[str, store.Kept]] = {}
    for point in (p for stage in every for p in stage):
        own = values.setdefault(point.arm.name, {})
        if (kept := store.read(output, point)) is None:
            continue
        of_seeds.setdefault(point.seed, {})[store.path(output, point)] = kept
        for measure, condition, x, right, total in kept.cells:
            own.setdefault(Key(measure, condition, x), {})[point.seed] = right, total
    for of_seed in of_seeds.values():
        store.check_alike(of_seed)
    made = Outcomes([arm.name for arm in experiment.arms(size)], values, experiment.measures)
    return experiment.view(made) if experiment.view else made
