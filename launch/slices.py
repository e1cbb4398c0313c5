"""TPU slices: what "v5e:16x16*2" is, in chips, hosts and devices. No library, no cloud.

| generation       | grids of chips                                         | chips a host      |
|------------------|--------------------------------------------------------|-------------------|
| v5e, v6e         | 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16                   | 4; all 8 of a 2x4 |
| v4, v5p, tpu7x   | 2x2x1, 2x2x2, 2x2x4, 2x4x4, and AxBxC of multiples of  | 4                 |
|                  | 4 with A <= B <= C                                     |                   |

Source: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and the pages on each
generation under https://cloud.google.com/tpu/docs.
"""

import dataclasses
import math
import re

from bipe_jax.errors import UserError

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_MOST = {"v5e": 256, "v6e": 256, "v4": 4096, "v5p": 8960, "tpu7x": 9216}  # chips a slice
_HALVES = ("tpu7x",)  # JAX sees two devices a chip

KNOWN = (
    f"v5e and v6e have {', '.join(_FLAT)}; v4, v5p and tpu7x have {', '.join(_SMALL)} and 4x4x4 and "
    "larger; *N behind it for N slices"
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """One or several equal TPU slices.

    Attributes:
      generation: "v4", "v5e", "v5p", "v6e" or "tpu7x".
      grid: of the chips of one slice, "16x16".
      slices: how many.
      chips: of one slice. hosts: of one slice; one process each. host_chips: of one host.
      devices: that JAX sees in the whole run.
    """

    generation: str
    grid: str
    slices: int
    chips: int
    hosts: int
    host_chips: int
    devices: int

    @property
    def name(self) -> str:
        """As bipe_jax.preflight reads it."""
        return f"{self.generation}:{self.grid}" + (f"*{self.slices}" if self.slices > 1 else "")


def parse(text: str) -> Slice:
    """The slice of a text such as "v5e:16x16" or "v5p:4x4x8*2".

    Raises:
      UserError: there is no such slice.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*){1,2})(?:\*([1-9]\d*))?", text)
    if not found or found[1] not in _MOST or not _exists(found[1], found[2]):
        raise UserError(f"--slice={text} is unknown: {KNOWN}")
    generation, grid, count = found[1], found[2], int(found[3] or 1)
    chips = _chips(grid)
    host_chips = 8 if grid == "2x4" else 4
    devices = count * chips * (2 if generation in _HALVES else 1)
    return Slice(generation, grid, count, chips, chips // host_chips, host_chips, devices)


def _chips(grid: str) -> int:
    return math.prod(map(int, grid.split("x")))


def _exists(generation: str, grid: str) -> bool:
    if generation in ("v5e", "v6e"):
        return grid in _FLAT
    sides = [int(side) for side in grid.split("x")]
    cubes = len(sides) == 3 and sides == sorted(sides) and not any(side % 4 for side in sides)
    return grid in _SMALL or (cubes and _chips(grid) <= _MOST[generation])
