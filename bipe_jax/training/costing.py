"""The time of a step by the compiled program's own account.

A TPU runs a program's instructions one after the other. Each is costed by itself:

- matrix products, alone or fused, by the cycles that the compiler estimates;
- attention kernels by the bundles of their code, see `bundles`;
- all of these by the bytes that they move, if that takes longer, and everything else by that alone;
- collectives by the links of their devices, see `links`. An asynchronous one is hidden as far as other work
  runs between its start and its end, and exposed beyond that. So are copies between HBM and the core's
  memory, but for the time in which the work moves bytes itself;
- a loop by its turns, of branches the dearest.

It is static: nothing of it was measured on a chip.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bipe_jax.training import bundles
from bipe_jax.training.account import (
    ATTENTION,
    COPIES,
    ELEMENTWISE,
    EXPOSED,
    HIDDEN,
    PRODUCTS,
    UNKNOWN,
    Account,
    Collective,
    Line,
)
from bipe_jax.training.hlo import HBM, VMEM, Instruction, Program, groups
from bipe_jax.training.links import Network
from bipe_jax.training.traffic import Moved, moved

# Of HBM's nominal bandwidth, what large copies reach; the core's own memory has some 20 times that ("How to
# Scale Your Model", Austin et al. 2025, jax-ml.github.io/scaling-book/tpus).
HBM_EFFICIENCY = 0.9
_VMEM_SPEED = 20

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
_MOVES = {
    "copy", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "pad", "concatenate",
    "broadcast", "gather", "scatter", "iota",
}  # fmt: skip


class _Time(NamedTuple):
    """Seconds, and those of them in which HBM and the links are in use."""

    seconds: float
    hbm: float = 0.0
    links: float = 0.0


@dataclasses.dataclass
class _Pending:
    """An asynchronous operation between its start and its end. left: seconds that nothing covers yet."""

    kind: str
    opcode: str
    origin: str
    left: float
    covered: float = 0.0


def cost(program: Program, network: Network, kernels: Mapping[str, bundles.Kernel]) -> Account:
    """The account of a program.

    Args:
      kernels: by the names of the instructions that call them, see `bundles.read`.
    """
    costing = _Costing(program, network, kernels)
    costing.run(program.entry, 1)
    return Account(tuple(costing.lines), tuple(costing.collectives))


class _Costing:
    def __init__(
        self, program: Program, network: Network, kernels: Mapping[str, bundles.Kernel]
    ) -> None:
        self.program, self.network, self.kernels = program, network, kernels
        self.chip = network.chip
        # Of equal kernels libtpu writes the code once.
        calls = [line for lines in program.computations.values() for line in lines]
        self.by_body = {line.body: kernels[line.name] for line in calls if line.name in kernels}
        self.lines: list[Line] = []
        self.collectives: list[Collective] = []

    def run(self, computation: str, times: int) -> _Time:
        """The time of one turn of a computation; the lines of so many are added."""
        lines = self.program.computations[computation]
        defined = {line.name: line for line in lines}
        pending: dict[str, _Pending] = {}
        seconds = hbm = links = 0.0
        for line in lines:
            if started := self._start(line, defined, times):
                pending[self._key(line)] = started
                continue
            if self._ends(line):
                done = pending.pop(self._key(line), None)
                time = self._finish(done, times) if done else _Time(0.0)
            else:
                time = self._one(line, defined, times)
            for other in pending.values():
                busy = time.hbm if other.kind == COPIES else time.links
                step = min(other.left, max(time.seconds - busy, 0.0))
                other.left, other.covered = other.left - step, other.covered + step
            seconds, hbm, links = seconds + time.seconds, hbm + time.hbm, links + time.links
        for left in pending.values():
            time = self._finish(left, times)
            seconds += time.seconds
        return _Time(seconds, hbm, links)

    def _one(self, line: Instruction, defined: Mapping[str, Instruction], times: int) -> _Time:
        """The time of an instruction that is not asynchronous."""
        if line.opcode == "while":
            turns = self.program.trips(line)
            body = line.attribute(r"body=%([\w.-]+)") or ""
            return _Time(*(turns * part for part in self.run(body, times * turns)))
        if line.opcode == "call":
            return self.run(line.called[0], times)
        if line.opcode == "conditional":
            return self._dearest(line.called, times)
        if line.opcode in _FREE:
            return _Time(0.0)
        if collective := self._collective(line, defined):
            kind, size, seconds = collective
            self.collectives.append(Collective(kind, size, times))
            return self._add(EXPOSED, kind, line, _Time(seconds, 0.0, seconds), times)
        bytes_ = moved(self.program, line, defined)
        hbm, traffic = self._traffic(bytes_)
        if line.opcode == "custom-call":
            if line.target != "tpu_custom_call":
                return _Time(0.0)
            return self._kernel(line, defined, times, hbm)
        if self._is_product(line):
            if line.cycles is None:
                return self._add(UNKNOWN, line.opcode, line, _Time(hbm, hbm), times)
            seconds = max(line.cycles / self.chip.clock, traffic)
            return self._add(PRODUCTS, line.opcode, line, _Time(seconds, hbm), times)
        inner = {one.opcode for one in self.program.within(line)} - _FREE or {line.opcode}
        kind = COPIES if inner <= _MOVES | {"fusion"} else ELEMENTWISE
        return self._add(kind, line.opcode, line, _Time(traffic, hbm), times)

    def _add(self, kind: str, opcode: str, line: Instruction, time: _Time, times: int) -> _Time:
        origin = line.op_name or line.name
        self.lines.append(Line(kind, opcode, origin, time.seconds * times, times))
        return time

    def _dearest(self, branches: Sequence[str], times: int) -> _Time:
        tries = []
        for branch in branches:
            one = _Costing(self.program, self.network, self.kernels)
            tries.append((one.run(branch, times), one))
        time, dearest = max(tries, key=lambda attempt: attempt[0].seconds)
        self.lines += dearest.lines
        self.collectives += dearest.collectives
        return time

    def _traffic(self, bytes_: Moved) -> tuple[float, float]:
        """Seconds that HBM works, and that moving takes."""
        rate = HBM_EFFICIENCY * self.chip.hbm_bandwidth
        hbm = bytes_[HBM] / rate
        return hbm, max(hbm, bytes_[VMEM] / (_VMEM_SPEED * rate))

    def _is_product(self, line: Instruction) -> bool:
        products = ("convolution", "dot")
        inner = self.program.within(line)
        return line.opcode in products or any(one.opcode in products for one in inner)

    def _kernel(
        self, line: Instruction, defined: Mapping[str, Instruction], times: int, hbm: float
    ) -> _Time:
        kernel = self.by_body.get(line.body)
        if kernel is None:
            return self._add(UNKNOWN, line.opcode, line, _Time(hbm, hbm), times)
        operands = [defined[name].results[0] for name in line.operands]
        cycles = kernel.cycles(bundles.grid(line, operands))
        time = _Time(max(cycles / self.chip.clock, hbm), hbm)
        return self._add(ATTENTION, line.opcode, line, time, times)

    def _collective(
        self, line: Instruction, defined: Mapping[str, Instruction]
    ) -> tuple[str, float, float] | None:
        """The kind, bytes of the results and seconds of a collective, alone or as a call; or None."""
        inner, names = line, defined
        if not line.is_collective:
            if line.opcode not in ("fusion", "async-start"):
                return None
            for called in line.called:
                names = {one.name: one for one in self.program.computations[called]}
                collectives = [one for one in names.values() if one.is_collective]
                if collectives and not self._is_product(line):
                    inner = collectives[0]
                    break
            else:
                return None
        kind = inner.opcode.removesuffix("-start")
        scattered = kind == "all-reduce" and "all-reduce-scatter" in " ".join(line.called)
        kind = "reduce-scatter" if scattered else kind
        size = sum(array.padded for name in inner.operands for array in names[name].results)
        among = groups(inner)
        count = len(among[0]) if among else len(self.network.places)
        whole = size * count if kind == "all-gather" else size
        if kind == "collective-permute":
            seconds = max((self.network.seconds(kind, size, pair) for pair in among), default=0.0)
        else:
            seconds = self.network.seconds(kind, whole, among[0] if among else ())
        return kind, whole / count if kind == "reduce-scatter" else whole, seconds

    def _targets(self, line: Instruction) -> set[str | None]:
        if line.opcode != "fusion":
            return set()
        return {one.target for one in self.program.within(line) if one.opcode == "custom-call"}

    def _start(
        self, line: Instruction, defined: Mapping[str, Instruction], times: int
    ) -> _Pending | None:
        """What an instruction starts without waiting for it, if it does."""
        if not (line.opcode.endswith("-start") or "AsyncCollectiveStart" in self._targets(line)):
            return None
        origin = line.op_name
        if collective := self._collective(line, defined):
            kind, size, seconds = collective
            self.collectives.append(Collective(kind, size, times))
            if not origin:
                origin = next(
                    (i.op_name for i in self.program.within(line) if i.op_name), line.name
                )
            return _Pending(EXPOSED, kind, origin, seconds)
        source, to = defined[line.operands[0]].results[0], line.results
        target = to[0] if line.opcode == "copy-start" else to[1]
        size = min(source.padded, target.padded) * ((source.space, target.space).count(HBM))
        rate = HBM_EFFICIENCY * self.chip.hbm_bandwidth
        return _Pending(
            COPIES, line.opcode.removesuffix("-start"), origin or line.name, size / rate
        )

    def _ends(self, line: Instruction) -> bool:
        return line.opcode.endswith("-done") or "AsyncCollectiveDone" in self._targets(line)

    def _key(self, line: Instruction) -> str:
        """The same of the start and of the end of an asynchronous operation."""
        if line.opcode == "fusion":
            channels = (one.attribute(r"channel_id=(\d+)") for one in self.program.within(line))
            return "channel " + next((channel for channel in channels if channel), line.name)
        return line.operands[0] if line.opcode.endswith("-done") else line.name

    def _finish(self, done: _Pending, times: int) -> _Time:
        """Waits for an asynchronous operation: the time that nothing covers."""
        if done.kind == EXPOSED:
            self.lines.append(Line(HIDDEN, done.opcode, done.origin, done.covered * times, times))
        self.lines.append(Line(done.kind, done.opcode, done.origin, done.left * times, times))
        is_copy = done.kind == COPIES
        return _Time(done.left, done.left if is_copy else 0.0, 0.0 if is_copy else done.left)
