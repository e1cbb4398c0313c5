"""WORKDIR/events.jsonl: the few events of a run, over all its starts, one JSON object a line.

Every event has "event", "time" (Unix seconds), "since" (when its process started: this names the
process), "step" (the last complete one) and "seconds" (by phase, of this process, see `clock`). A process
may be killed in the middle of a line: such a line is passed over.
"""

import json
import os

FILE = "events.jsonl"
_NEEDED = {"event", "time", "since", "step", "seconds"}


def append(workdir: str, event: dict) -> None:
    """Adds one event. Raises OSError if it cannot be written."""
    line = json.dumps(event, allow_nan=False).encode() + b"\n"
    with open(os.path.join(workdir, FILE), "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # cut off
                line = b"\n" + line
        file.write(line)  # at the end, wherever was read


def read(workdir: str) -> list[dict]:
    """All events in the order in which they were written; [] if there are none."""
    try:
        with open(os.path.join(workdir, FILE), "rb") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.keys() >= _NEEDED:
            events.append(event)
    return events
