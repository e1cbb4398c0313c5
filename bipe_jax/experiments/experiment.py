"""What an experiment is."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bipe_jax.experiments.outcomes import Measure, Outcomes
from bipe_jax.positions import NAMED

# Stands for the directory that `Experiment.prepare` writes, in configs and in flags of evaluations.
DATA = "OUTPUT/data"


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


class Evaluation(NamedTuple):
    """A command that is run on a trained point: python -m MODULE --checkpoint=... --output=... FLAGS.

    Attributes:
      name: of the directory that it writes into. module: such as "bipe_jax.evaluate".
      flags: further ones.
    """

    name: str
    module: str
    flags: tuple[str, ...] = ()


class Arm(NamedTuple):
    """What is compared.

    Attributes:
      name: of the arm. changes: the config's keys that differ from the base config.
      options: of the task, for `Experiment.data`.
      after: the arm of the same seed whose last checkpoint it starts from; "": from the beginning.
      evaluations: what is run on its checkpoint, besides the evaluation at the end of its training.
      trained: False: it is no training, but its evaluations are run on the checkpoint of `after`.
    """

    name: str
    changes: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}
    after: str = ""
    evaluations: tuple[Evaluation, ...] = ()
    trained: bool = True


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
      x_name: of the figures' x axis. trained: size -> the largest x in training, if x is of the data.
      predictions: written before the first run.
      arms: size -> what is compared; the first is the baseline.
      data: (size, seed, options of an arm) -> the config's keys that these set, besides "seed".
      cells: (files that the evaluations of a point wrote) -> its values. The files are their JSON by name:
        "answers.json" or "evaluation.json" of the training, "NAME/FILE" of an `Evaluation`.
      measures: measure -> how it is shown; those that are missing are shares.
      seeds: size -> number of seeds.
      view: turns the values into those that the tables, figures and predictions are of; None: they stay.
      samples: yields samples of the data, of JSON's types.
      prepare: (size, directory) writes what the points read into a directory, see `DATA`; None: they need
        none. It is called again where it was interrupted.
      extras: module -> the extra that brings it, of what data or evaluations need.
      facts: (size, seeds) -> names and values of what else the page says of the data.
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
    prepare: Callable[[str, str], None] | None = None
    view: Callable[[Outcomes], Outcomes] | None = None
    extras: Mapping[str, str] = dataclasses.field(default_factory=dict)
    measures: Mapping[str, Measure] = dataclasses.field(default_factory=dict)
    seeds: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"quick": 1, "laptop": 3, "paper": 5}
    )
    facts: Callable[[str, Sequence[int]], Sequence[tuple[str, str]]] = lambda size, seeds: ()
    costs: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def runs(self, size: str) -> int:
        """The number of points of a size."""
        return len(self.arms(size)) * self.seeds[size]

    def cost(self, size: str) -> str:
        """What a size costs, in words."""
        return self.costs.get(size, "not measured")


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
