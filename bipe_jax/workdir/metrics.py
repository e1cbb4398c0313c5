"""metrics.jsonl as it is read: how far a run is, and the steps of its lines."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any, cast

from bipe_jax.workdir import Workdir, json_files, opening
from bipe_jax.workdir.files import Path

_TAIL = 1 << 18  # bytes that hold the full lines of more than `_MOST` steps
_MOST = 100  # steps whose losses are averaged
_BEGINNING = b'{"step": '
_KINDS = {
    "step": (int,),
    "time": (int, float, type(None)),  # earlier versions did not write it, nor the tokens
    "tokens": (int, type(None)),
    "loss": (int, float, type(None)),
    "tokens_per_second": (int, float, type(None)),
}


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The latest of a run's metrics; None is what it has not written, or was not finite.

    Attributes:
      loss: nats a token, the mean over the last steps that were finite: the last tenth of the run so far,
        100 steps at most. One batch alone says little.
    """

    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None


def latest(workdir: Path) -> Metrics:
    """From the end of metrics.jsonl; a line that is being written, or was cut off, is skipped."""
    try:
        with opening.to_read(Workdir(workdir).metrics) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return Metrics()
    newest_first = filter(None, map(_parse, reversed(lines)))
    if (last := next(newest_first, None)) is None:
        return Metrics()
    step, losses, rate = last["step"], [last.get("loss")], last.get("tokens_per_second")
    first = step - min(max(step // 10, 1), _MOST)  # of which the loss does not count
    for values in newest_first:
        if values["step"] <= first and rate is not None:
            break
        if values["step"] > first:
            losses.append(values.get("loss"))
        if rate is None:
            rate = values.get("tokens_per_second")
    finite = [loss for loss in losses if loss is not None]
    mean = sum(finite) / len(finite) if losses[0] is not None else None
    return Metrics(step, mean, rate)


def evaluations(workdir: Path) -> Iterator[dict[str, Any]]:
    """Yields the values of the lines with an evaluation, in order; none if the file cannot be read."""
    with contextlib.suppress(OSError), opening.to_read(Workdir(workdir).metrics) as file:
        for line in file:
            if b'"evaluation/' in line and (values := _parse(line)):
                yield values


def step_of(line: bytes) -> int | None:
    """The step of a line; None if the line is no step's."""
    values = _parse(line)
    return values["step"] if values else None


def is_cut_off(line: bytes) -> bool:
    """Whether the end of a file, after its last newline, is nothing or the beginning of a step's line."""
    return step_of(line) is None and line[: len(_BEGINNING)] == _BEGINNING[: len(line)]


def _parse(line: bytes) -> dict[str, Any] | None:
    """The values of a step's line; None if it is anything else."""
    try:
        parsed = json_files.parse(line)
    except ValueError:
        return None
    if not isinstance(parsed, dict):
        return None
    values = cast(dict[str, Any], parsed)
    valid = all(type(values.get(name)) in kinds for name, kinds in _KINDS.items())
    return values if valid and values["step"] >= 0 else None
