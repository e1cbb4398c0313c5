"""The values of an experiment over arms and seeds: means, intervals, and differences paired by seed."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bipe_jax.report import statistics
from bipe_jax.report.statistics import Difference


class Key(NamedTuple):
    """What a value is of, see `experiment.Cell`."""

    measure: str
    condition: str
    x: float


class Measure(NamedTuple):
    """How the values of a measure are shown and ranked.

    Attributes:
      unit: "share", shown in percent, or "number". lower_is_better: such as a loss.
      log: whether the axis of its figures is logarithmic.
    """

    unit: str = "share"
    lower_is_better: bool = False
    log: bool = False


SHARE = Measure()


class Row(NamedTuple):
    """The values of an arm at a key.

    Attributes:
      values: of each seed. mean: with its interval over seeds, or over examples if there is one seed.
      difference: from the baseline, paired by seed; p is corrected for all that are compared at the measure
        and condition.
      ranks: the best and the worst rank that the arm may have among all at the key: others count where their
        difference, paired by seed, has p < 0.05, corrected for all pairs of arms at the key.
    """

    arm: str
    key: Key
    values: dict[int, float]
    mean: Difference
    difference: Difference | None
    ranks: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """All values of an experiment.

    Attributes:
      arms: names, the baseline first; only those of which a seed is finished have values.
      values: arm -> key -> seed -> (right, total).
      measures: measure -> what it is; those that are missing are shares.
    """

    arms: Sequence[str]
    values: Mapping[str, Mapping[Key, Mapping[int, tuple[float, float]]]]
    measures: Mapping[str, Measure] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> list[Key]:
        """All keys, in the order of the measures and conditions, and of x."""
        every = list(dict.fromkeys(key for of_arm in self.values.values() for key in of_arm))
        groups = list(dict.fromkeys((key.measure, key.condition) for key in every))
        return sorted(every, key=lambda key: (groups.index((key.measure, key.condition)), key.x))

    def of_seeds(self, arm: str, key: Key) -> dict[int, float]:
        """Seed -> value; {} if there is none."""
        own = self.values.get(arm, {}).get(key, {})
        return {seed: right / total for seed, (right, total) in sorted(own.items()) if total}

    def mean(self, arm: str, measure: str, condition: str, x: float) -> Difference | None:
        """The mean of an arm with its interval; None if there is no value."""
        key = Key(measure, condition, x)
        values = self.of_seeds(arm, key)
        if not values:
            return None
        is_share = self.measure(measure).unit == "share"
        if len(values) > 1:
            made = statistics.mean_of(list(values.values()))
            # Student's interval knows no bounds.
            bounds = [end and min(max(end, 0.0), 1.0) for end in (made.low, made.high)]
            return made._replace(low=bounds[0], high=bounds[1]) if is_share else made
        ((right, total),) = self.values[arm][key].values()
        (value,) = values.values()
        low, high = statistics.proportion(int(right), int(total)) if is_share else (None, None)
        return Difference(value, low, high, None)

    def measure(self, name: str) -> Measure:
        """What a measure is."""
        return self.measures.get(name, SHARE)

    def rows(self) -> list[Row]:
        """The values of all arms at all keys, with differences from the first arm."""
        keys = self.keys
        rows: list[Row] = []
        for measure, condition in dict.fromkeys((key.measure, key.condition) for key in keys):
            of_group: list[Row] = []
            for key in (k for k in keys if (k.measure, k.condition) == (measure, condition)):
                first = self.of_seeds(self.arms[0], key)
                ranks = self._ranks(key)
                for arm in self.arms:
                    mean, values = self.mean(arm, *key), self.of_seeds(arm, key)
                    if mean is None:
                        continue
                    pairs = _pairs(values, first)
                    difference = (
                        statistics.mean_of(pairs) if pairs and arm != self.arms[0] else None
                    )
                    of_group.append(Row(arm, key, values, mean, difference, ranks[arm]))
            corrected = statistics.holm([row.difference and row.difference.p for row in of_group])
            rows += [
                row._replace(difference=row.difference and row.difference._replace(p=p))
                for row, p in zip(of_group, corrected, strict=True)
            ]
        return rows

    def _ranks(self, key: Key) -> dict[str, tuple[int, int]]:
        """Arm -> its best and worst rank, of the arms with a value."""
        values = {arm: of for arm in self.arms if (of := self.of_seeds(arm, key))}
        compared = [
            (one, other, statistics.mean_of(pairs))
            for one, other in itertools.combinations(values, 2)
            if (pairs := _pairs(values[one], values[other]))
        ]
        better, worse = dict.fromkeys(values, 0), dict.fromkeys(values, 0)
        ps = statistics.holm([difference.p for _, _, difference in compared])
        for (one, other, difference), p in zip(compared, ps, strict=True):
            if p is not None and p < 0.05:
                is_first = (difference.mean < 0) == self.measure(key.measure).lower_is_better
                above, below = (one, other) if is_first else (other, one)
                better[below] += 1
                worse[above] += 1
        return {arm: (1 + better[arm], len(values) - worse[arm]) for arm in values}


def _pairs(values: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """The differences of seeds that both have."""
    return [value - others[seed] for seed, value in values.items() if seed in others]


def shown(mean: Difference | None, measure: Measure = SHARE) -> str:
    """A mean with its interval, as text; a share in percent."""
    if mean is None:
        return "–"
    form = "{:.1%}" if measure.unit == "share" else "{:.4g}"
    if mean.low is None or mean.high is None:
        return form.format(mean.mean)
    return f"{form} [{form}, {form}]".format(mean.mean, mean.low, mean.high)
