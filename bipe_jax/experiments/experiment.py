"""What an experiment is."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bipe_jax.experiments.outcomes import Outcomes
from bipe_jax.positions import NAMED


class Cell(NamedTuple):
    """A value that a trained point was measured at.

    Attributes:
      measure: such as "outer set, all right". condition: such as "4:12 letters"; a figure has one of each.
      x: such as the number of segments.
      right, total: numbers of examples, or a sum and a count; the value is their ratio.
    """

    measure: str
    condition: str
    x: float
    right: float
    total: float


class Arm(NamedTuple):
    """What is compared.

    Attributes:
      name: of the arm. changes: the config's keys that differ from the base config.
      options: of the task, for `Experiment.data`.
    """

    name: str
    changes: Mapping[str, Any]
    options: Mapping[str, Any] = {}


class Prediction(NamedTuple):
    """What was expected before the first run.

    Attributes:
      text: in words. source: the paper's claim with how sure it is, or "ours".
      outcome: what came out, in words with numbers, and whether that is what was predicted; None if it
        cannot be said, such as of points that are not finished.
    """

    text: str
    source: str
    outcome: Callable[[Outcomes], tuple[str, bool | None]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment at three sizes.

    Attributes:
      name: of the command. question: in one sentence. method: how it is asked.
      config: the file of the base config, whose argument is the size.
      x_name: of the figures' x axis. trained: size -> the largest x in training.
      predictions: written before the first run.
      arms: size -> what is compared; the first is the baseline.
      data: (size, seed, options of an arm) -> the config's keys that these set, besides "seed".
      cells: (what the evaluation of a point wrote) -> its values.
      seeds: size -> number of seeds.
      samples: yields samples of the data, of JSON's types.
      costs: size -> the cost as measured, with the machine and the date; sizes without one are not measured.
    """

    name: str
    question: str
    method: str
    config: str
    x_name: str
    trained: Mapping[str, float]
    predictions: Sequence[Prediction]
    arms: Callable[[str], Sequence[Arm]]
    data: Callable[[str, int, Mapping[str, Any]], Mapping[str, Any]]
    cells: Callable[[Mapping[str, Any]], list[Cell]]
    samples: Callable[[], Iterator[dict[str, Any]]]
    seeds: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"quick": 1, "laptop": 3, "paper": 5}
    )
    costs: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def cost(self, size: str) -> str:
        """What a size costs, in words."""
        return self.costs.get(size, "not measured")

    def points(self, size: str, seeds: int) -> list[dict[str, Any]]:
        """The points of the sweep: keys of the config and their values, with a "name"."""
        return [
            {"name": point_name(arm.name, seed), "seed": seed}
            | {**arm.changes, **self.data(size, seed, arm.options)}
            for seed in range(seeds)
            for arm in self.arms(size)
        ]


def point_name(arm: str, seed: int) -> str:
    """The name of a point, in letters, digits, "." and "-"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{arm}-seed{seed}")


def encodings(*names: str) -> list[Arm]:
    """Arms that differ in their encodings, by their names in `positions.NAMED`."""
    return [
        Arm(name, {"position.absolute": NAMED[name][0], "position.relative": NAMED[name][1]})
        for name in names
    ]


def crossed(arms: Sequence[Arm], others: Sequence[Arm]) -> list[Arm]:
    """Each arm with each of the others."""
    return [
        Arm(
            f"{arm.name}, {other.name}",
            {**arm.changes, **other.changes},
            {**arm.options, **other.options},
        )
        for arm in arms
        for other in others
    ]
