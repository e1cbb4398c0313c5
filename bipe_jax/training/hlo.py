"""The text of a compiled program, as XLA prints it for TPUs: computations, instructions, arrays in memory.

https://openxla.org/xla/terminology and https://openxla.org/xla/tiled_layout.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
          "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = ")
_CALLED = re.compile(
    r"(?:calls|called_computation|true_computation|false_computation|to_apply)=%([\w.-]+)"
)
HBM, VMEM = 0, 1  # memory spaces

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
               "collective-permute")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in memory.

    Attributes:
      size: bytes without padding. padded: bytes with its layout's tiles filled up.
      space: HBM, VMEM or another number, of scalars and semaphores.
    """

    dtype: str
    shape: tuple[int, ...]
    padded: float
    space: int = HBM

    @property
    def size(self) -> float:
        return _BYTES.get(self.dtype, 1) * math.prod(self.shape)


def arrays(text: str) -> list[Array]:
    """The arrays of a type, "(f32[8,128]{1,0:T(8,128)S(1)}, bf16[4])"."""
    return [_array(*groups) for groups in _ARRAY.findall(text)]


def _array(dtype: str, dimensions: str, layout: str) -> Array:
    shape = tuple(int(n) for n in dimensions.split(",") if n)
    order, _, rest = layout.partition(":")
    padded = list(shape)
    if tile := re.match(r"T\(([\d,]+)\)", rest):
        minor_to_major = [int(n) for n in order.split(",") if n]
        sizes = [int(n) for n in tile[1].split(",")]
        for axis, size in zip(minor_to_major, reversed(sizes), strict=False):
            padded[axis] = -(-padded[axis] // size) * size
    space = re.search(r"S\((\d+)\)", rest)
    size = _BYTES.get(dtype, 1) * math.prod(padded)
    return Array(dtype, shape, size, int(space[1]) if space else HBM)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      type: of the result, as text. operands: names; a constant has its value, and a parameter its number.
      attributes: what follows the operands.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def results(self) -> list[Array]:
        """The arrays of the result."""
        return arrays(self.type)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs as a part of itself, a loop's apart."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        names = re.findall(r"%([\w.-]+)", branches[1]) if branches else []
        return names + _CALLED.findall(self.attributes)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """Where the instruction comes from: the scopes and the operation in JAX; "" if XLA does not say."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of a product or loop; None if it gives none."""
        cycles = self.attribute(r'"estimated_cycles":"(\d+)"')
        return int(cycles) if cycles else None

    @property
    def is_collective(self) -> bool:
        """Whether it is a collective, or the start of one."""
        return self.opcode.removesuffix("-start") in COLLECTIVES

    @property
    def number(self) -> int:
        """Of a parameter."""
        return int(self.operands[0])

    @property
    def target(self) -> str | None:
        """Of a custom call."""
        return self.attribute(r'custom_call_target="([^"]*)"')

    @property
    def body(self) -> str | None:
        """The program of a Pallas kernel, encoded."""
        return self.attribute(r'"body":"([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: computations, lists of instructions in the order in which they run."""

    computations: dict[str, list[Instruction]]
    entry: str

    def within(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions that a fusion or another call runs, those of nested calls included."""
        for name in instruction.called:
            for inner in self.computations.get(name, ()):
                yield inner
                yield from self.within(inner)

    def trips(self, loop: Instruction) -> int:
        """How often a loop's body runs: a scan compares its counter with a constant."""
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%([\w.-]+)") or ""]
        lines = [*condition, *(inner for line in condition for inner in self.within(line))]
        limits = [line.operands[0] for line in lines if line.opcode == "constant" and line.operands]
        return max((int(limit) for limit in limits if limit.isdigit()), default=1)


def parse(text: str) -> Program:
    """The program of `jax.stages.Compiled.as_text`."""
    computations: dict[str, list[Instruction]] = {}
    entry, name, pieces = "", None, []
    for line in text.splitlines():
        if name and _INSTRUCTION.match(line):
            pieces.append(line)
        elif name and (line == "}" or line.startswith("}, ")):
            computations[name] = [_instruction(piece) for piece in pieces]
            name, pieces = None, []
        elif name and pieces:  # a string with line breaks
            pieces[-1] += line
        elif header := _HEADER.match(line):
            name = header[2]
            entry = name if header[1] else entry
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    assert match
    rest = line[match.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest[len(opcode) :]) + len(opcode)
    operands = rest[len(opcode) + 1 : end - 1]
    literal = opcode in ("constant", "parameter")
    names = (operands,) if literal else tuple(re.findall(r"%([\w.-]+)", operands))
    return Instruction(match[1], opcode, type_, names, rest[end:])


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the one at the start."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place + 1
    raise ValueError(f"no closing parenthesis: {text[:80]}")


def groups(instruction: Instruction) -> list[list[int]]:
    """The groups of partitions among which a collective runs; [] stands for one group of all.

    XLA writes them as lists, {{0,1},{2,3}}; as a grid, [2,2]<=[4] or [2,2]<=[2,2]T(1,0); or as axes of
    a mesh, mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}. Of a permutation they are its pairs.
    """
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return _lists(pairs[1])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return _lists(listed[1])
    grid = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if grid:
        shape = _numbers(grid[1])
        ids = _iota(grid[2])
        return [ids[i : i + shape[1]] for i in range(0, len(ids), shape[1])]
    mesh = re.search(
        r"replica_groups=(?:@?mesh)?\w*\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", text
    )
    if mesh:
        axes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2]) if mesh[2] else list(range(math.prod(axes.values())))
        return _along(axes, ids, re.findall(r"'([^']+)'", mesh[3]))
    return []


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _lists(text: str) -> list[list[int]]:
    return [_numbers(part) for part in text.split("}") if _numbers(part)]


def _iota(text: str) -> list[int]:
    """[2,3]T(1,0) -> 0, 3, 1, 4, 2, 5: counts, in the shape, transposed."""
    shape, _, order = text.partition("T")
    sizes = _numbers(shape)
    axes = _numbers(order) or list(range(len(sizes)))
    steps = [math.prod(sizes[axis + 1 :]) for axis in axes]
    ids = [0]
    for axis, step in zip(axes, steps, strict=True):
        ids = [number + i * step for number in ids for i in range(sizes[axis])]
    return ids


def _along(axes: dict[str, int], ids: Sequence[int], among: Sequence[str]) -> list[list[int]]:
    """Groups of the ids, which fill a mesh of these axes, along some axes."""
    made: dict[tuple[int, ...], list[int]] = {}
    for place, number in enumerate(ids):
        key, rest = [], place
        for axis, size in reversed(axes.items()):
            rest, index = divmod(rest, size)
            if axis not in among:
                key.append(index)
        made.setdefault(tuple(key), []).append(number)
    return list(made.values())
