"""Axes of charts: where numbers stand, and which are labelled."""

import dataclasses
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


def places_axis(name: str, values: Iterable[int], scale=math.log2) -> Axis:
    """An axis of few whole numbers, with a tick at each where there is room.

    Args:
      scale: the logarithm, for numbers above 0, or math.log1p, which has room for 0.
    """
    values = sorted(set(values))
    low, high = values[0], values[-1]
    if low == high:
        low, high = (low / 2, high * 2) if low else (0, 1)
    axis = Axis(name, low, high, scale, [])
    ticks: list = []
    taken = -1.0  # by the last label
    for value in values:
        half = 0.0095 * len(short(value)) + 0.012
        if axis.at(value) - half >= taken:
            ticks.append((value, short(value)))
            taken = axis.at(value) + half
    return dataclasses.replace(axis, ticks=ticks)


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
