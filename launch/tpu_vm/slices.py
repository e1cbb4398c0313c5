"""A slice in this project's words, v5e:16x16, in those of gcloud; its hosts and devices."""

import dataclasses
import math
import re

from bipe_jax.errors import UserError

KNOWN = "v4 or v5p:2x2x1 and larger, v5e or v6e:1x1 to 16x16, with *N behind for N slices"


@dataclasses.dataclass(frozen=True)
class _Generation:
    type: str  # as gcloud calls it
    cores: int  # TensorCores of a chip, as its accelerator types count
    axes: int
    runtime: str  # cloud.google.com/tpu/docs/runtimes


# tpu7x is not here: it is rented out by GKE alone.
_GENERATIONS = {
    "v4": _Generation("v4", 2, 3, "tpu-ubuntu2204-base"),
    "v5e": _Generation("v5litepod", 1, 2, "v2-alpha-tpuv5-lite"),
    "v5p": _Generation("v5p", 2, 3, "v2-alpha-tpuv5"),
    "v6e": _Generation("v6e", 1, 2, "v2-alpha-tpuv6e"),
}
_SMALL_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_ALL_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


@dataclasses.dataclass(frozen=True)
class Slice:
    """One or more equal slices, such as v5e:16x16*2."""

    topology: str
    generation: str
    grid: str
    count: int

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(map(int, self.grid.split("x")))

    @property
    def devices(self) -> int:
        """Of all slices, as jax counts them: a chip of these generations is one device."""
        return self.chips * self.count

    @property
    def hosts(self) -> int:
        """VMs of one slice. Chips of v5e and v6e are 8 to a VM in a slice of one VM, otherwise 4."""
        one_vm = 8 if _GENERATIONS[self.generation].axes == 2 else 4
        return 1 if self.chips <= one_vm else self.chips // 4

    @property
    def accelerator(self) -> str:
        """gcloud's accelerator type, v5litepod-256 or, counting TensorCores, v4-512."""
        generation = _GENERATIONS[self.generation]
        return f"{generation.type}-{self.chips * generation.cores}"

    @property
    def runtime(self) -> str:
        """The default runtime version."""
        return _GENERATIONS[self.generation].runtime

    def flags(self) -> list[str]:
        """Of `gcloud compute tpus queued-resources create`.

        An accelerator type stands for the most even grid of its size; other grids are named.
        """
        if _even(self.chips, self.grid.count("x") + 1) == sorted(map(int, self.grid.split("x"))):
            return [f"--accelerator-type={self.accelerator}"]
        return [f"--type={_GENERATIONS[self.generation].type}", f"--topology={self.grid}"]

    @property
    def track(self) -> list[str]:
        """gcloud's release track: the --type of the general one knows no generation after v4."""
        named = self.flags()[0].startswith("--type")
        return ["alpha"] if named and self.generation != "v4" else []


def parse(topology: str) -> Slice:
    """Raises UserError: no such slice, or not one of Cloud TPU VMs."""
    name, star, count = topology.partition("*")
    generation, _, grid = name.partition(":")
    if generation == "tpu7x":
        raise UserError(f"--topology={topology}: tpu7x is there in GKE alone: use launch.gke")
    known = _GENERATIONS.get(generation)
    if (
        not known
        or not _is_grid(grid, known.axes)
        or (star and not re.fullmatch("[1-9]\\d*", count))
    ):
        raise UserError(f"--topology={topology} is unknown: use {KNOWN}")
    return Slice(topology, generation, grid, int(count or 1))


def _is_grid(grid: str, axes: int) -> bool:
    if axes == 2:
        return grid in _ALL_2D
    if grid in _SMALL_3D:
        return True
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", grid):
        return False
    sizes = [int(size) for size in grid.split("x")]
    return sizes == sorted(sizes) and all(size % 4 == 0 for size in sizes)


def _even(chips: int, axes: int) -> list[int]:
    """The most even grid of powers of two, smallest axis first; of other numbers, none."""
    grid = [1] * axes
    while math.prod(grid) < chips:
        grid[0] *= 2
        grid.sort()
    return grid if math.prod(grid) == chips else []
