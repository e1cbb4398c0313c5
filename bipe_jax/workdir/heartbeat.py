"""heartbeat.json: when a run last progressed, and in which phase (docs/reference/observing.md)."""

import json
import socket
import time
from typing import Any

from bipe_jax.workdir import Workdir, files
from bipe_jax.workdir.files import Path

STARTING, TRAINING, SAVING, EVALUATING = "starting", "training", "saving", "evaluating"
ENDED = ("preempted", "failed", "done")  # phases of a run that has ended, or is about to
_KEYS = {"time", "step", "phase", "since", "seconds"}
# Seconds that the heartbeat of a living run may be old: while it trains, or ten times what a step takes;
# in other phases nothing renews it.
_TRAINING, _OTHERWISE = 60.0, 3600.0


def read(workdir: Path) -> dict[str, Any] | None:
    """The last heartbeat; None if there is none that this program wrote."""
    beat = files.read_json(Workdir(workdir).heartbeat)
    if beat is None or not beat.keys() >= _KEYS:
        return None
    numbers = (beat["time"], beat.get("step_seconds") or 0.0)
    if not all(isinstance(number, (int, float)) for number in numbers):
        return None
    try:
        json.dumps(beat, allow_nan=False)  # it is copied into an event
    except ValueError:
        return None
    return beat


def age(beat: dict[str, Any]) -> float:
    """Seconds since the run last progressed, by this machine's clock."""
    return time.time() - beat["time"]


def alive(beat: dict[str, Any] | None) -> bool:
    """Whether the run of a heartbeat has not ended, and was heard of lately enough for its phase."""
    if beat is None or beat["phase"] in ENDED:
        return False
    step = beat.get("step_seconds") or 0.0
    if age(beat) > (max(_TRAINING, 10 * step) if beat["phase"] == TRAINING else _OTHERWISE):
        return False
    if beat.get("host") != socket.gethostname():
        return True
    return isinstance(beat.get("pid"), int) and files.process_alive(beat["pid"])


def read_alive(workdir: Path) -> dict[str, Any] | None:
    """The last heartbeat of a run that is alive, else None."""
    beat = read(workdir)
    return beat if alive(beat) else None
