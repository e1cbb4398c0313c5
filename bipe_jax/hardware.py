"""Chips, TPU slices and GPUs as JAX, Google and SkyPilot name them, and this machine's cores. No JAX.

Slices and their names: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and the pages of
each generation under https://cloud.google.com/tpu/docs. Peaks: the makers' data sheets. v5e's and v6e's
bandwidths are Google's; those of the other TPUs, and v4's memory, have not been checked against a source.
"""

import dataclasses
import math
import os
import re

from bipe_jax.errors import UserError

GIB = 2.0**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs. A device is what JAX takes for one: a chip, or half of it.

    Attributes:
      generation: as in the names of slices, "v5e".
      kinds: beginnings of `device_kind` in JAX.
      peak_flops: of a device, a second; dense, bfloat16.
      products: multiplications that a device's matrix units do in a cycle, see `clock`.
      hbm: bytes of a device that a program can use, as the compiler for it says.
      hbm_bandwidth: of a device, bytes a second.
      ici: bytes a second from a device to the others of the slice, all links, one direction.
      dcn: bytes a second from a device to other slices.
      flat: whether slices have two sides, else three.
      largest: chips of the largest slice.
      gke: value of the node label cloud.google.com/gke-tpu-accelerator.
      type: in accelerator types, "v5litepod" of v5litepod-16; "" if it is rented out in GKE alone.
      runtime: of TPU VMs, by default (cloud.google.com/tpu/docs/runtimes).
      cores: of a chip, as accelerator types count them.
      devices: of a chip.
      price: dollars an hour of a chip on demand, see `PRICES`; None: unknown.
    """

    generation: str
    kinds: tuple[str, ...]
    peak_flops: float
    products: int
    hbm: float
    hbm_bandwidth: float
    ici: float
    dcn: float
    flat: bool
    largest: int
    gke: str
    type: str = ""
    runtime: str = ""
    cores: int = 1
    devices: int = 1
    price: float | None = None

    @property
    def clock(self) -> float:
        """Cycles a second, by which the peak is what the matrix units do without a pause.

        libtpu 0.0.42 estimates a product of two bfloat16 matrices of 4096 x 4096 at 96.8 % (v5e), 96.2 (v5p),
        87.9 (v4), 86.9 (v6e) and 82.9 (tpu7x) of the peak by this clock.
        """
        return self.peak_flops / (2 * self.products)

    def wraps(self, side: int) -> bool:
        """Whether the chips along a side of so many form a ring.

        https://cloud.google.com/tpu/docs/v5e, https://cloud.google.com/tpu/docs/v4#topology-types
        """
        return side == 16 if self.flat else side % 4 == 0

    @property
    def link(self) -> float:
        """Bytes a second of one link between two chips, one direction, for one device."""
        return self.ici / (4 if self.flat else 6)


CHIPS = {
    chip.generation: chip
    for chip in (
        Chip(
            "v4", ("TPU v4",), 275e12, 2**17, 30.75 * GIB, 1228e9, 300e9, 6.2e9, False, 4096,
            gke="tpu-v4-podslice", type="v4", runtime="tpu-ubuntu2204-base", cores=2, price=3.22,
        ),
        Chip(
            "v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 2**16, 15.75 * GIB, 819e9, 200e9, 3.1e9, True, 256,
            gke="tpu-v5-lite-podslice", type="v5litepod", runtime="v2-alpha-tpuv5-lite", price=1.20,
        ),
        Chip(
            "v5p", ("TPU v5", "TPU v5p"), 459e12, 2**17, 95.7 * GIB, 2765e9, 600e9, 6.2e9, False, 8960,
            gke="tpu-v5p-slice", type="v5p", runtime="v2-alpha-tpuv5", cores=2,
        ),
        Chip(
            "v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 2**18, 31.25 * GIB, 1640e9, 400e9, 12.5e9, True, 256,
            gke="tpu-v6e-slice", type="v6e", runtime="v2-alpha-tpuv6e", price=2.70,
        ),
        Chip(
            "tpu7x", ("TPU7x",), 2307e12 / 2, 2**18, 94.75 * GIB, 3690e9, 300e9, 6.2e9, False, 9216,
            gke="tpu7x", devices=2,
        ),
    )
}  # fmt: skip


# As others quote it; not compared with the page.
PRICES = (
    "list price on demand in the US in 2025, second-hand: see https://cloud.google.com/tpu/pricing"
)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU that launchers know.

    Attributes:
      kind: beginning of `device_kind` in JAX.
      peak_flops: a second; dense, bfloat16.
      gke: value of the node label cloud.google.com/gke-accelerator. sky: SkyPilot's name.
    """

    kind: str
    peak_flops: float
    gke: str
    sky: str


GPUS = {
    "l4": Gpu("NVIDIA L4", 121e12, "nvidia-l4", "L4"),
    "a100": Gpu("NVIDIA A100", 312e12, "nvidia-tesla-a100", "A100"),
    "a100-80gb": Gpu("NVIDIA A100", 312e12, "nvidia-a100-80gb", "A100-80GB"),
    "h100": Gpu("NVIDIA H100", 989e12, "nvidia-h100-80gb", "H100"),
    "h100-mega": Gpu("NVIDIA H100", 989e12, "nvidia-h100-mega-80gb", "H100-MEGA"),
    "h200": Gpu("NVIDIA H200", 989e12, "nvidia-h200-141gb", "H200"),
    "b200": Gpu("NVIDIA B200", 2250e12, "nvidia-b200", "B200"),
}

_PEAKS = {
    "TPU v2": 46e12 / 2,
    "TPU v3": 123e12 / 2,
    "Tesla V100": 125e12,
    "NVIDIA H100 PCIe": 756e12,
    **{kind: chip.peak_flops for chip in CHIPS.values() for kind in chip.kinds},
    **{gpu.kind: gpu.peak_flops for gpu in GPUS.values()},
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOPs a second of a device, by JAX's `device_kind`; None of an unknown one."""
    known = [kind for kind in _PEAKS if device_kind.startswith(kind)]
    return _PEAKS[max(known, key=len)] if known else None


SLICES = (
    f"v5e and v6e have {', '.join(_FLAT)}; v4, v5p and tpu7x have {', '.join(_SMALL)} and 4x4x4 and "
    "larger; Google's names, such as v5litepod-16, stand for the default grid; *N after it for N slices"
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """One or several equal TPU slices.

    Attributes:
      grid: of the chips of one slice, "16x16".
      slices: how many.
    """

    chip: Chip
    grid: str
    slices: int = 1

    @property
    def name(self) -> str:
        """As `parse_slice` reads it."""
        several = f"*{self.slices}" if self.slices > 1 else ""
        return f"{self.chip.generation}:{self.grid}{several}"

    @property
    def sides(self) -> list[int]:
        """Chips along each side of one slice, in increasing order."""
        return sorted(map(int, self.grid.split("x")))

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(self.sides)

    @property
    def host_chips(self) -> int:
        """Of one host: the 8 chips of a 2x4 have one host, and so has the chip of a 1x1."""
        return min(self.chips, 8 if self.grid == "2x4" else 4)

    @property
    def hosts(self) -> int:
        """Of one slice; one process each."""
        return self.chips // self.host_chips

    @property
    def devices(self) -> int:
        """That JAX sees in the whole run."""
        return self.slices * self.chips * self.chip.devices

    @property
    def accelerator_type(self) -> str:
        """Google's name of one slice: v5litepod-256 or, counting cores, v4-512. It says no grid."""
        return f"{self.chip.type}-{self.chips * self.chip.cores}"

    @property
    def default_grid(self) -> bool:
        """Whether the accelerator type stands for this grid."""
        return _even_sides(self.chips, len(self.sides)) == self.sides


def _even_sides(chips: int, dimensions: int) -> list[int]:
    """The sides, in increasing order, of the most even grid of powers of two; of at least so many chips."""
    even = [1] * dimensions
    while math.prod(even) < chips:
        even[0] *= 2
        even.sort()
    return even


def split_slice(text: str, flag: str) -> Slice:
    """The slice of a text such as "v5e:16x16" or "v5p:4x4x8*2", whether there is such a grid or not.

    Of Google's names of accelerator types, "v5litepod-256" or "v5p-256*2", it is the one of the default grid.

    Args:
      flag: for the message, "--slice".

    Raises:
      UserError: it is malformed, or of an unknown generation.
    """
    name, _, count = text.partition("*")
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*){1,2})", name)
    found = (CHIPS.get(match[1]), match[2]) if match else _of_type(name)
    if not found or not found[0] or not re.fullmatch(r"(\*[1-9]\d*)?", text[len(name) :]):
        raise UserError(f"{flag}={text} is unknown: {SLICES}")
    return Slice(found[0], found[1], int(count or 1))


def _of_type(name: str) -> tuple[Chip, str] | None:
    """The chip and the grid that an accelerator type of Google stands for, or None."""
    match = re.fullmatch(r"(\w+)-([1-9]\d*)", name)
    chip = next((chip for chip in CHIPS.values() if match and chip.type == match[1]), None)
    if not match or not chip or not chip.type or int(match[2]) % chip.cores:
        return None
    chips = int(match[2]) // chip.cores
    sides = _even_sides(chips, 2 if chip.flat else 3)
    if math.prod(sides) != chips:
        return None
    return chip, "x".join(str(side) for side in sorted(sides, key=lambda side: (side == 1, side)))


def parse_slice(text: str, flag: str = "--slice") -> Slice:
    """As `split_slice`, of a slice that Google rents out.

    Raises:
      UserError: there is no such slice.
    """
    parsed = split_slice(text, flag)
    sides = [int(side) for side in parsed.grid.split("x")]
    cubes = len(sides) == 3 and sides == sorted(sides) and not any(side % 4 for side in sides)
    small = parsed.grid in (_FLAT if parsed.chip.flat else _SMALL)
    if not small and (parsed.chip.flat or not cubes or parsed.chips > parsed.chip.largest):
        raise UserError(f"{flag}={text} is unknown: {SLICES}")
    return parsed


def cores() -> int:
    """CPU cores that this process may use; at least 1."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # on macOS
        return os.cpu_count() or 1
