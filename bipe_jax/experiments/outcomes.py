"""The values of an experiment over arms and seeds: means, intervals, and differences paired by seed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bipe_jax.report import statistics
from bipe_jax.report.statistics import Difference


class Key(NamedTuple):
    """What a value is of, see `experiment.Cell`."""

    measure: str
    condition: str
    x: float


class Row(NamedTuple):
    """The values of an arm at a key.

    Attributes:
      values: of each seed. mean: with its interval over seeds, or over examples if there is one seed.
      difference: from the baseline, paired by seed; p is corrected for all that are compared at the measure
        and condition.
    """

    arm: str
    key: Key
    values: dict[int, float]
    mean: Difference
    difference: Difference | None


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """All values of an experiment.

    Attributes:
      arms: names, the baseline first; only those of which a seed is finished have values.
      values: arm -> key -> seed -> (right, total).
    """

    arms: Sequence[str]
    values: Mapping[str, Mapping[Key, Mapping[int, tuple[float, float]]]]

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
        if len(values) > 1:
            return statistics.mean_of(list(values.values()))
        ((right, total),) = self.values[arm][key].values()
        (value,) = values.values()
        whole = right == int(right) and total == int(total) and 0 <= right <= total
        low, high = statistics.proportion(int(right), int(total)) if whole else (None, None)
        return Difference(value, low, high, None)

    def rows(self) -> list[Row]:
        """The values of all arms at all keys, with differences from the first arm."""
        keys = self.keys
        rows: list[Row] = []
        for measure, condition in dict.fromkeys((key.measure, key.condition) for key in keys):
            of_group: list[Row] = []
            for key in (k for k in keys if (k.measure, k.condition) == (measure, condition)):
                first = self.of_seeds(self.arms[0], key)
                for arm in self.arms:
                    mean, values = self.mean(arm, *key), self.of_seeds(arm, key)
                    if mean is None:
                        continue
                    shared = [seed for seed in values if seed in first]
                    pairs = [values[seed] - first[seed] for seed in shared]
                    difference = (
                        statistics.mean_of(pairs) if pairs and arm != self.arms[0] else None
                    )
                    of_group.append(Row(arm, key, values, mean, difference))
            corrected = statistics.holm([row.difference and row.difference.p for row in of_group])
            rows += [
                row._replace(difference=row.difference and row.difference._replace(p=p))
                for row, p in zip(of_group, corrected, strict=True)
            ]
        return rows


def shown(mean: Difference | None) -> str:
    """A mean with its interval, as text, in percent."""
    if mean is None:
        return "–"
    if mean.low is None or mean.high is None:
        return f"{mean.mean:.1%}"
    return f"{mean.mean:.1%} [{mean.low:.1%}, {mean.high:.1%}]"
