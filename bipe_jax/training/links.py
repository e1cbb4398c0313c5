"""Time of a collective over the links that its devices have.

Along each side of a slice a group has one link in, at the end of a line, or two if the group goes all the way
round a ring; groups that interleave share the links. A gather of S bytes among n devices brings (n - 1) / n S
to each; so does a reduce-scatter, and an all-reduce is both.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from bipe_jax import hardware

# Of the nominal bandwidth of a link: 45 of 50 GB/s of a v5e are what "How to Scale Your Model" (Austin et al.
# 2025, jax-ml.github.io/scaling-book/tpus) reckons with, and 90 of 100 of a v5p; and its latency of one hop.
EFFICIENCY = 0.9
HOP = 1e-6  # seconds

# Collective -> how often the group's bytes pass each device's links, but for its own part.
_PASSES = {
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-reduce": 2.0,
    "all-to-all": 0.5,
    "ragged-all-to-all": 0.5,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a device is: the coordinates of its chip in a slice, and the number of the slice."""

    coordinates: tuple[int, ...]
    slice: int = 0


@dataclasses.dataclass(frozen=True)
class Network:
    """The links of the devices of a program, whose places are in the order of its partitions."""

    chip: hardware.Chip
    sides: tuple[int, ...]
    places: tuple[Place, ...]

    def seconds(self, kind: str, size: float, group: Sequence[int]) -> float:
        """Time of a collective among a group of devices.

        Args:
          kind: in HLO, "all-gather". size: bytes of the whole array, of all parts that are gathered or
            scattered. group: numbers of partitions; empty: all.
        """
        places = [self.places[i] for i in group] or list(self.places)
        if len(places) < 2:
            return 0.0
        slices = len({place.slice for place in places})
        if kind == "collective-permute":
            if slices > 1:
                return size / self.chip.dcn
            rate, hops = self._along(places)
            return size / rate + HOP * min(hops, 1)
        passes = _PASSES[kind]
        one = [place for place in places if place.slice == places[0].slice]
        seconds = 0.0
        if len(one) > 1:
            rate, hops = self._along(one)
            seconds += passes * (size * (1 - 1 / len(one)) / rate + HOP * hops)
        if slices > 1:  # each device brings its part of what its slice has to the other slices
            seconds += passes * (1 - 1 / slices) * size / len(one) / self.chip.dcn
        return seconds

    def _along(self, places: Sequence[Place]) -> tuple[float, float]:
        """Bytes a second into a device of a group at the group's edge, and hops from end to end."""
        rate, hops = 0.0, 0.0
        for axis, side in enumerate(self.sides):
            values = sorted({place.coordinates[axis] for place in places})
            if len(values) < 2:
                continue
            stride = (values[-1] - values[0]) / (len(values) - 1)
            ring = self.chip.wraps(side) and round(stride * len(values)) == side
            rate += self.chip.link * (2 if ring else 1) / stride
            hops += side / 2 if ring else values[-1] - values[0]
        return EFFICIENCY * (rate or self.chip.ici), hops  # no side: devices of one chip


def network(chip: hardware.Chip, grid: str, devices: Sequence[Any]) -> Network:
    """The network of a slice, or of several, whose devices are in the order of the mesh."""
    sides = tuple(int(side) for side in grid.split("x"))
    places = [
        Place(tuple(d.coords[: len(sides)]), getattr(d, "slice_index", 0) or 0) for d in devices
    ]
    assert len(places) % math.prod(sides) == 0
    return Network(chip, sides, tuple(places))
