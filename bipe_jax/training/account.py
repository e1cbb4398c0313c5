"""The costs of a compiled step: instruction by instruction, and summed by kind."""

import dataclasses

PRODUCTS = "products"
ATTENTION = "attention kernels"
ELEMENTWISE = "elementwise"
COPIES = "copies"
EXPOSED = "collectives"
HIDDEN = "hidden collectives"  # which other work covers: no part of the step's time
UNKNOWN = "not costed"
KINDS = (PRODUCTS, ATTENTION, ELEMENTWISE, COPIES, EXPOSED, HIDDEN, UNKNOWN)


@dataclasses.dataclass(frozen=True)
class Line:
    """What an instruction costs in a step.

    Attributes:
      kind: of KINDS. opcode: of HLO. origin: the scopes and the operation of JAX that it comes from, or its
        name.
      seconds: of all turns together. times: how often it runs.
    """

    kind: str
    opcode: str
    origin: str
    seconds: float
    times: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a step. bytes: of its results. times: how often it runs."""

    opcode: str
    bytes: float
    times: int


@dataclasses.dataclass(frozen=True)
class Account:
    """The costs of a step."""

    lines: tuple[Line, ...]
    collectives: tuple[Collective, ...]

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(line.seconds for line in self.lines if line.kind != HIDDEN)

    def by_kind(self) -> dict[str, float]:
        """{kind: seconds}, in the order of KINDS."""
        sums: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        for line in self.lines:
            sums[line.kind] += line.seconds
        return sums

    def traffic(self) -> dict[str, tuple[int, float]]:
        """{collective: (count, bytes of the results)}."""
        sums: dict[str, tuple[int, float]] = {}
        for one in self.collectives:
            count, size = sums.get(one.opcode, (0, 0.0))
            sums[one.opcode] = (count + one.times, size + one.times * one.bytes)
        return sums

    def dearest(self, count: int) -> list[Line]:
        """The lines that cost most, those of one kind, operation and origin summed."""
        sums: dict[tuple[str, str, str], Line] = {}
        for line in self.lines:
            key = (line.kind, line.opcode, line.origin)
            before = sums.get(key)
            sums[key] = line if before is None else dataclasses.replace(
                line, seconds=before.seconds + line.seconds, times=before.times + line.times
            )  # fmt: skip
        return sorted(sums.values(), key=lambda line: -line.seconds)[:count]
