"""Axes of charts: where numbers stand, and which are labelled."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable


def short(number: int) -> str:
    """16384 -> "16k", 1000 -> "1,000"."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= size and number % size == 0:
            return f"{number // size}{letter}"
    return f"{number:,}"


@dataclasses.dataclass(frozen=True)
class Axis:
    """Attributes:
    name: with the unit.
    low, high: the ends.
    scale: a growing function that makes distances along the axis even.
    ticks: values and their labels.
    """

    name: str
    low: float
    high: float
    scale: Callable[[float], float]
    ticks: list[tuple[float, str]]

    def at(self, value: float) -> float:
        """0 at the low end, 1 at the high end; values beyond are at the ends."""
        value = min(max(value, self.low), self.high)
        low, high = self.scale(self.low), self.scale(self.high)
        return (self.scale(value) - low) / (high - low)


def places_axis(name: str, values: Iterable[int], scale=math.log2, high: int = 0) -> Axis:
    """An axis of few whole numbers, with a tick at each or, as room goes, at each second and so on.

    Args:
      scale: the logarithm, for numbers above 0, or a function that has room for 0.
      high: the end, if it is beyond the values.
    """
    values = sorted(set(values))
    low, high = values[0], max(values[-1], high)
    if low == high:
        low, high = (low / 2, high * 2) if low else (0, 1)
    axis = Axis(name, low, high, scale, [])

    def fit(ticks):
        half = [0.0095 * len(label) + 0.012 for _, label in ticks]
        ends = [
            (axis.at(value) - h, axis.at(value) + h)
            for (value, _), h in zip(ticks, half, strict=True)
        ]
        return all(left[1] <= right[0] for left, right in itertools.pairwise(ends))

    spaced = ([(v, short(v)) for v in values[::every]] for every in range(1, len(values) + 1))
    return dataclasses.replace(axis, ticks=next(filter(fit, spaced)))


def number_axis(name: str, values: Iterable[float], log=False, zero=False, percent=False) -> Axis:
    """An axis around numbers of 0 and more; those that are not finite are left out.

    Args:
      log: logarithmic, if the numbers span so much that ticks fit.
      zero: begins at 0.
      percent: labels are percentages.
    """
    values = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = (0.0 if zero else min(values)), max(values)
    if not high > low:
        low, high = (0.0, high or 1.0) if zero else (low * 0.95, high * 1.05 or 1.0)
    scale = math.log if log and low > 0 else float
    margin = 0.06 * (scale(high) - scale(low))
    undo = math.exp if scale is math.log else float
    low, high = (low if zero else undo(scale(low) - margin)), undo(scale(high) + margin)
    if percent and zero:
        high = min(high, 1.0) if max(values) <= 1 else high
    if scale is math.log and high / low > 6:
        parts = (1, 3) if high / low > 100 else (1, 2, 5)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ticks = [part * 10.0**power for power in powers for part in parts]
        if len(ticks) > 14:
            ticks = [10.0**power for power in powers][:: -(-len(powers) // 6)]
    else:
        step = (high - low) / 6
        unit = 10.0 ** math.floor(math.log10(step))
        step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= step * 0.999)
        first = math.ceil(low / step - 1e-9)
        ticks = [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]
    label = (lambda tick: f"{tick:.3g}%") if percent else (lambda tick: f"{tick:,.10g}")
    factor = 100 if percent else 1
    labelled = [(tick, label(round(tick * factor, 10))) for tick in ticks if low <= tick <= high]
    return Axis(name, low, high, scale, labelled)
