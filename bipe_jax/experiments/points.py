"""The points of an experiment: each arm with each seed, in the order in which they can be made."""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from bipe_jax import flags
from bipe_jax.config import FIELDS, flatten, naming
from bipe_jax.experiments.experiment import DATA, Arm, Experiment
from bipe_jax.workdir import Workdir

DIRECTORY = "points"  # of all workdirs, within an output


@dataclasses.dataclass(frozen=True)
class Point:
    """An arm with a seed.

    Attributes:
      name: in letters, digits, "." and "-".
      overrides: the config's keys and values that it sets; {} of an arm that is no training.
      workdir: of its training, or of the point that it evaluates. steps: of that training.
      identity: a hash of all that its values depend on, but for the code and where the output is.
      base: the point that it starts from, or evaluates.
    """

    arm: Arm
    seed: int
    name: str
    overrides: dict[str, Any]
    workdir: str
    steps: int
    identity: str
    base: "Point | None"

    def is_trained(self) -> bool:
        """Whether the last checkpoint of its training, or of the point that it evaluates, is there."""
        return (Workdir(self.workdir).latest_step() or 0) >= self.steps

    def directory(self, evaluation: str, output: str) -> str:
        """What an evaluation of the point writes into."""
        return os.path.join(output, "evaluations", self.name, evaluation)


def stages(
    experiment: Experiment, size: str, seeds: int, output: str, overrides: Sequence[str] = ()
) -> list[list[Point]]:
    """All points; those of a stage start from points of earlier ones.

    Args:
      overrides: --config.KEY=VALUE of all points.

    Raises:
      UserError: a key is unknown, or a value is wrong.
    """
    arms = {arm.name: arm for arm in experiment.arms(size)}
    known: dict[tuple[str, int], Point] = {}

    def point_of(name: str, seed: int) -> Point:
        if (name, seed) not in known:
            arm = arms[name]
            base = point_of(arm.after, seed) if arm.after else None
            known[name, seed] = _point(experiment, size, arm, seed, output, base, overrides)
        return known[name, seed]

    made: list[list[Point]] = []
    for seed in range(seeds):
        for name in arms:
            point = point_of(name, seed)
            number = sum(1 for _ in _bases(point))
            made += [[]] * (number + 1 - len(made))
            made[number] = [*made[number], point]
    return made


def _bases(point: Point) -> Iterator[Point]:
    while point.base:
        point = point.base
        yield point


def placed(text: str, output: str, size: str) -> str:
    """A text in which `experiment.DATA` stands for the directory of the data, with its path."""
    return text.replace(DATA, data_of(output, size))


def data_of(output: str, size: str) -> str:
    """The directory of the data that an experiment prepares."""
    return os.path.join(output, "data", size)


def point_name(arm: str, seed: int) -> str:
    """The name of a point, in letters, digits, "." and "-"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{arm}-seed{seed}")


def _point(
    experiment: Experiment,
    size: str,
    arm: Arm,
    seed: int,
    output: str,
    base: Point | None,
    shared: Sequence[str],
) -> Point:
    name = point_name(arm.name, seed)
    evaluations = [(one.name, one.module, *one.flags) for one in arm.evaluations]
    inherited = base.identity if base else ""
    if not arm.trained:
        assert base is not None, arm
        identity = naming.identity([inherited, evaluations])
        return Point(arm, seed, name, {}, base.workdir, base.steps, identity, base)
    data = experiment.data(size, seed, arm.options)
    own = {"seed": seed, **arm.changes, **data}
    overrides = {
        key: placed(value, output, size) if isinstance(value, str) else value
        for key, value in own.items()
    }
    if base:
        overrides["initial_checkpoint"] = base.workdir
    texts = [f"--config.{k}={v if isinstance(v, str) else repr(v)}" for k, v in overrides.items()]
    config = flags.read_config([f"--config={experiment.config}:{size}", *shared, *texts])
    flat: dict[str, Any] = flatten(config)
    of_all = [word.removeprefix("--config.").partition("=")[0] for word in shared]
    varied = [*overrides, *of_all, *(field for field in FIELDS if field.startswith("evaluation."))]
    changes = naming.changes(varied, flat | own) | {"initial_checkpoint": inherited}
    identity = naming.identity([changes, evaluations])
    directory = naming.name_of(overrides, config, name)
    workdir = os.path.join(output, DIRECTORY, directory)
    return Point(arm, seed, name, overrides, workdir, int(flat["steps"]), identity, base)
