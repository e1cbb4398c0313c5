"""The bytes that an instruction of a compiled program moves, by memory.

A fusion that takes a slice of an array reads the slice alone, and one that puts a slice into an array in
place writes the slice alone: so loops over stacked layers work.
"""

import collections
from collections.abc import Iterable, Mapping

from bipe_jax.training.hlo import HBM, VMEM, Array, Instruction, Program

Moved = collections.Counter[int]  # {HBM or VMEM: bytes}

_SLICES = {"dynamic-slice", "slice", "gather"}
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is put in


def moved(program: Program, instruction: Instruction, defined: Mapping[str, Instruction]) -> Moved:
    """The bytes read and written.

    Args:
      defined: the instructions of the same computation by name.
    """
    operands = [defined[name].results for name in instruction.operands if name in defined]
    opcode = instruction.opcode
    if opcode == "fusion":
        name = instruction.called[0]
        reads = [
            (array, _read(program, name, place))
            for place, arrays in enumerate(operands)
            for array in arrays
        ]
        return _sum([*_writes(program, name, instruction.results), *_limited(reads)])
    if opcode in _SLICES:
        size = sum(array.padded for array in instruction.results)
        return _sum([(a, size) for a in [*operands[0][:1], *instruction.results[:1]]])
    if opcode in _IN_PLACE:
        update = operands[_IN_PLACE[opcode]][0]
        return _sum([(update, update.padded), (instruction.results[0], update.padded)])
    arrays = [*instruction.results, *(array for of_one in operands for array in of_one)]
    return _sum((array, array.padded) for array in arrays)


def _sum(parts: Iterable[tuple[Array, float]]) -> Moved:
    sums: Moved = collections.Counter()
    for array, size in parts:
        if array.space in (HBM, VMEM):
            sums[array.space] += size  # pyright: ignore[reportArgumentType]  (counts may be floats)
    return sums


def _limited(reads: Iterable[tuple[Array, float | None]]) -> Iterable[tuple[Array, float]]:
    for array, elements in reads:
        share = array.padded / array.size if array.size else 1
        yield array, array.padded if elements is None else min(elements * share, array.padded)


def _read(program: Program, computation: str, place: int) -> float | None:
    """Bytes without padding that a fused computation reads of a parameter; None: all of it."""
    lines = program.computations[computation]
    parameter = next((i for i in lines if i.opcode == "parameter" and i.number == place), None)
    return _used(program, lines, parameter.name) if parameter else 0.0


def _used(program: Program, lines: list[Instruction], name: str) -> float | None:
    total = 0.0
    for user in lines:
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.opcode == "bitcast":
            part = _used(program, lines, user.name)
        elif user.opcode in _SLICES and first:
            part = sum(array.size for array in user.results)
        elif (user.opcode in _IN_PLACE and first) or user.opcode == "tuple":
            part = 0.0
        elif user.opcode == "fusion":
            parts = [
                _read(program, user.called[0], place)
                for place, operand in enumerate(user.operands)
                if operand == name
            ]
            part = None if None in parts else sum(p for p in parts if p is not None)
        elif user.is_collective or user.opcode == "custom-call":
            part = 0.0  # an asynchronous collective passes through
        else:
            part = None
        if part is None:
            return None
        total += part
    return total


def _writes(program: Program, computation: str, results: list[Array]) -> list[tuple[Array, float]]:
    lines = program.computations[computation]
    by_name = {line.name: line for line in lines}
    root = lines[-1]
    written = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(written) != len(results):
        return [(array, array.padded) for array in results]
    return [
        (array, _written(by_name, line, array))
        for line, array in zip(written, results, strict=True)
    ]


def _written(by_name: Mapping[str, Instruction], line: Instruction, array: Array) -> float:
    while line.opcode == "bitcast" and line.operands[0] in by_name:
        line = by_name[line.operands[0]]
    if line.opcode in _IN_PLACE:
        update = by_name[line.operands[_IN_PLACE[line.opcode]]].results[0]
        return update.size * (array.padded / array.size if array.size else 1)
    if line.opcode == "parameter" or line.is_collective or line.opcode == "custom-call":
        return 0.0
    return array.padded
