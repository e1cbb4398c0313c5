"""events.jsonl: the few events of a run, over all its starts, one JSON object a line.

Every event has "event", "time" (Unix seconds), "since" (when its process started: this names the
process), "step" (the last complete one) and "seconds" (of this process, by phase). A process may be killed
in the middle of a line: such a line is skipped.
"""

import json
import os
from typing import Any, cast

from bipe_jax.workdir import Workdir, bucket, json_files, opening
from bipe_jax.workdir.files import Path

_KEYS = {"event", "time", "since", "step", "seconds"}


def append(workdir: Path, event: dict[str, Any]) -> None:
    """Adds one event. Raises OSError if it cannot be written."""
    line = json.dumps(event, allow_nan=False).encode() + b"\n"
    path = Workdir(workdir).events
    if bucket.holds(path):  # which holds no half of a line; the trainer alone writes it
        return bucket.write(path, bucket.read_generation(path)[0] + line)
    with open(path, "ab+", opener=opening.not_through_a_link) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # cut off
                line = b"\n" + line
        file.write(line)  # at the end, wherever it has read


def read(workdir: Path) -> list[dict[str, Any]]:
    """All events in the order in which they were written; [] if there are none. Raises OSError."""
    try:
        with opening.to_read(Workdir(workdir).events) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    events: list[dict[str, Any]] = []
    for line in lines:
        try:
            event = json_files.parse(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.keys() >= _KEYS:
            events.append(cast(dict[str, Any], event))
    return events
