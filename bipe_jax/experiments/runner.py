"""Runs the points of an experiment through `launch.sweep`, and reads what their evaluations wrote."""

import glob
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from bipe_jax.errors import DONE, PREEMPTED, UserError
from bipe_jax.experiments.experiment import Cell, Experiment, point_name
from bipe_jax.experiments.outcomes import Key, Outcomes
from bipe_jax.workdir import Workdir, json_files, outputs

_LOG = logging.getLogger(__name__)

_SWEEP = "sweep.json"
POINTS = "points"  # the directory of the points' workdirs


def run(
    experiment: Experiment, size: str, seeds: int, output: str, on: str, more: Sequence[str]
) -> int:
    """Trains and evaluates all points that are not finished, with one live table.

    Args:
      on: "local", "slurm", "gke" or "sky". more: further arguments of `launch.sweep`.

    Returns:
      The status of `launch.sweep`: 0 if all points are finished, or launched elsewhere; 42 if it was stopped.

    Raises:
      UserError: the output cannot be written, or `launch` is not here.
    """
    if not os.path.isdir("launch"):
        raise UserError(
            "experiments run through launch.sweep: start them in the root of the repository, where "
            "launch/ is"
        )
    path = os.path.join(output, _SWEEP)
    os.makedirs(output, exist_ok=True)
    outputs.write_json(path, experiment.points(size, seeds))
    line = [
        sys.executable, "-m", "launch.sweep", f"--config={experiment.config}:{size}",
        f"--sweep={path}", f"--output={os.path.join(output, POINTS)}", f"--on={on}", *more,
    ]  # fmt: skip
    code = subprocess.run(line).returncode
    if code not in (DONE, PREEMPTED):
        _LOG.info("Some points failed; the tables have those that are finished")
    return code


def read(experiment: Experiment, size: str, seeds: int, output: str) -> Outcomes:
    """The values of all points that are finished. Raises UserError: a file of results is malformed."""
    arms = [arm.name for arm in experiment.arms(size)]
    values: dict[str, dict[Key, dict[int, tuple[float, float]]]] = {arm: {} for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            for cell in _cells(experiment, os.path.join(output, POINTS), point_name(arm, seed)):
                key = Key(cell.measure, cell.condition, cell.x)
                of_seeds = values[arm].setdefault(key, {})
                right, total = of_seeds.get(seed, (0, 0))
                of_seeds[seed] = right + cell.right, total + cell.total
    return Outcomes(arms, values)


def _cells(experiment: Experiment, points: str, name: str) -> list[Cell]:
    """The values of a point; [] if it is not finished.

    Raises:
      UserError: they cannot be read, or there are several points of the name.
    """
    workdirs = glob.glob(os.path.join(glob.escape(points), f"{name}--*"))
    if len(workdirs) > 1:
        raise UserError(
            f"{points} has {len(workdirs)} points {name}, of different configs: remove those that are not "
            "wanted, or use another --output"
        )
    path = Workdir(workdirs[0]).answers if workdirs else ""
    if not os.path.exists(path):
        return []
    try:
        return experiment.cells(json_files.load(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error!r}): remove it, and run again, which repeats the evaluation"
        ) from None
