"""A slice in the words of gcloud: accelerator types, which count cores or chips, and runtime versions."""

import dataclasses
import math

from bipe_jax.errors import UserError
from launch.slices import Slice


@dataclasses.dataclass(frozen=True)
class _Generation:
    type: str
    cores: int  # of a chip, as its accelerator types count
    runtime: str  # cloud.google.com/tpu/docs/runtimes


_GENERATIONS = {
    "v4": _Generation("v4", 2, "tpu-ubuntu2204-base"),
    "v5e": _Generation("v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": _Generation("v5p", 2, "v2-alpha-tpuv5"),
    "v6e": _Generation("v6e", 1, "v2-alpha-tpuv6e"),
}


def check(wanted: Slice) -> None:
    """Raises UserError if such slices are not rented out as TPU VMs."""
    if wanted.generation not in _GENERATIONS:
        raise UserError(
            f"--slice={wanted.name}: {wanted.generation} is in GKE alone: use launch.gke"
        )


def name(wanted: Slice) -> str:
    """The accelerator type: v5litepod-256 or, counting TensorCores, v4-512."""
    generation = _GENERATIONS[wanted.generation]
    return f"{generation.type}-{wanted.chips * generation.cores}"


def runtime(wanted: Slice) -> str:
    """The default runtime version."""
    return _GENERATIONS[wanted.generation].runtime


def flags(wanted: Slice) -> list[str]:
    """Of `gcloud compute tpus queued-resources create`.

    An accelerator type stands for the most even grid of its size; other grids are named.
    """
    sides = sorted(map(int, wanted.grid.split("x")))
    if sides == _even(wanted.chips, len(sides)):
        return [f"--accelerator-type={name(wanted)}"]
    return [f"--type={_GENERATIONS[wanted.generation].type}", f"--topology={wanted.grid}"]


def track(wanted: Slice) -> list[str]:
    """gcloud's release track: the --type of the general one knows no generation after v4."""
    named = flags(wanted)[0].startswith("--type")
    return ["alpha"] if named and wanted.generation != "v4" else []


def _even(chips: int, axes: int) -> list[int]:
    """The most even grid of powers of two, smallest side first; of other numbers of chips, none."""
    sides = [1] * axes
    while math.prod(sides) < chips:
        sides[0] *= 2
        sides.sort()
    return sides if math.prod(sides) == chips else []
