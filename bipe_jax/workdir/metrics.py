"""metrics.jsonl as it is read: how far a run is, and the steps of its lines."""

import dataclasses
import os
from typing import Any, cast

from bipe_jax.workdir import Workdir, json_files
from bipe_jax.workdir.files import Path

_TAIL = 1 << 14  # bytes that hold some steps' full lines
_BEGINNING = b'{"step": '
_KINDS = {
    "step": (int,),
    "loss": (int, float, type(None)),
    "tokens_per_second": (int, float, type(None)),
}


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The latest of a run's metrics; None is what it has not written, or was not finite.

    Attributes:
      loss: nats a token.
    """

    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None


def latest(workdir: Path) -> Metrics:
    """From the end of metrics.jsonl; a line that is being written, or was cut off, is skipped."""
    try:
        with open(Workdir(workdir).metrics, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return Metrics()
    values: dict[str, Any] = {}
    for line in lines:
        values |= _parse(line) or {}
    return Metrics(values.get("step", 0), values.get("loss"), values.get("tokens_per_second"))


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
