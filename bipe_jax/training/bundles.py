"""Cycles of attention kernels, read from the final code that libtpu writes for them.

A TPU's core runs one bundle of operations a cycle. A Pallas kernel is one loop over its grid, whose body
has regions that a branch skips: splash attention clears its sums in the first step of a row of blocks,
computes in the steps whose block is not masked, and stores in the last step of a row.
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from bipe_jax.training.hlo import Array, Instruction

# Of LIBTPU_INIT_ARGS: what makes libtpu write the bundles of every kernel to a folder.
FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=final_bundles"
)

_BUNDLE = re.compile(r"\s*(?:0x([0-9a-f]+)|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s")
_SMALL = 64  # bundles of a region: less is no computation


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Bundles of a kernel's loop.

    Attributes:
      step: run in every step of the grid. row: run once in a row of blocks. block: run for a block that is
        not masked.
      steps: of the grid, or of the part of it that one of a device's cores runs.
    """

    step: int
    row: int
    block: int
    steps: int

    def cycles(self, grid: "Grid") -> float:
        """Of one call, the cores of a device running at the same time."""
        share = self.steps / grid.steps
        return self.steps * self.step + share * (grid.rows * self.row + grid.blocks * self.block)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The steps of a call of splash attention: blocks, in rows, of which some are not masked."""

    steps: int
    rows: int
    blocks: int


def read(folder: Path) -> dict[str, Kernel]:
    """The splash attention kernels whose code is in a folder: {name of the instruction: kernel}."""
    kernels = {}
    for path in sorted(folder.glob("*splash_*-final_bundles.txt")):
        match = re.fullmatch(r"\d+-(splash_.*)-\d+-final_bundles", path.stem)
        if match:
            kernels[match[1]] = parse(path.read_text())
    return kernels


def parse(text: str) -> Kernel:
    """The kernel of a listing of bundles.

    Raises:
      ValueError: it is no loop over a grid.
    """
    address, start, end, steps = 0, None, None, 0
    skipped: dict[str, int] = {}  # region -> where the branch to its end is
    regions: list[tuple[int, int]] = []
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            address = int(match[1] or "0", 16)
            if match[2] == "LB" and start is None:
                start = address
        if exits := re.search(r" (\d+) /\* loop exit test \*/", line):
            steps, end = int(exits[1]), address
        if branch := re.search(r"sbr\.rel \(.*?\) target = \$region(\d+)", line):
            skipped[branch[1]] = address
        for region in re.findall(r"/\*.*?empty region (\d+)", line):
            if region in skipped:
                regions.append((skipped.pop(region), address))
    if start is None or end is None:
        raise ValueError("no loop over a grid")
    large = [r for r in regions if r[1] - r[0] >= _SMALL]
    inner = [r for r in large if not any(r[0] <= s[0] and s[1] <= r[1] and r != s for s in large)]
    sizes = sorted(last - first for first, last in inner)
    if not sizes:
        raise ValueError("no branch in the loop over a grid")
    # The pipeline of copies takes two steps more than the grid has.
    return Kernel(end - start - sum(sizes), sum(sizes[:-1]), sizes[-1], steps - 2)


def grid(call: Instruction, operands: Sequence[Array]) -> Grid:
    """The grid of a call of splash attention with a causal mask.

    Of a device that has a part of the queries it is the last part's, which sees most keys.

    Args:
      operands: tables of blocks, whole numbers, q (B, N, L, H) and k (B, K, S, H), or without B, and others.
    """
    text = call.attribute(r'"xprof_metadata":("(?:[^"\\]|\\.)*")')
    sizes = json.loads(json.loads(text)) if text else {}
    kind = re.sub(r"[.\d]*$", "", call.name).removeprefix("splash_mha_").split("_")[0]
    suffix = {"fwd": "", "dq": "_dq", "dkv": "_dkv"}[kind]
    q, k = [array.shape for array in operands if array.dtype in ("bf16", "f32")][:2]
    L, S, many = q[-2], k[-2], math.prod(q[:-2])
    block_q, block_kv = sizes[f"block_q{suffix}"], sizes[f"block_kv{suffix}"]
    queries, keys = L // block_q, S // block_kv
    first = (S - L + i * block_q for i in range(queries))
    seen = sum(start + block_q > j * block_kv for start in first for j in range(keys))
    rows = keys if kind == "dkv" else queries
    return Grid(many * queries * keys, many * rows, many * seen)
