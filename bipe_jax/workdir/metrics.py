"""metrics.jsonl as others read it: how far a run is."""

import dataclasses
import os
from typing import Any, cast

from bipe_jax.workdir import Workdir, json_files
from bipe_jax.workdir.files import Path

_TAIL = 1 << 14  # bytes that hold some steps' full lines
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
        try:
            parsed = json_files.parse(line)
        except ValueError:
            continue
        if isinstance(parsed, dict):
            read = cast(dict[str, Any], parsed)
            if all(isinstance(read.get(name, 0), kinds) for name, kinds in _KINDS.items()):
                values |= read
    return Metrics(values.get("step", 0), values.get("loss"), values.get("tokens_per_second"))
