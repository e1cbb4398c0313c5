"""What a run's directory says of it: its config, how far it is, whether anything is left to do."""

import dataclasses
import json
import os
import socket
import time

from bipe_jax import checkpoint
from bipe_jax.errors import UserError
from bipe_jax.evaluation import evaluator

_POINT = "point.json"  # the config of a point, written when its sweep is launched
_ENDED = ("preempted", "failed", "done")  # phases of a heartbeat
# Seconds that the heartbeat of a living run may be old (docs/observing.md): while it trains, or ten times
# what a step takes; in other phases nothing renews it.
_TRAINING, _OTHERWISE = 60, 3600
_TAIL = 1 << 14  # bytes of metrics.jsonl that hold some steps' full lines


def record(workdir: str, config) -> None:
    """Writes WORKDIR/point.json, by which a point is known before it begins to train."""
    path = os.path.join(workdir, _POINT)
    try:
        os.makedirs(workdir, exist_ok=True)
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(config.to_dict(), file, indent=1)
        os.replace(path + ".tmp", path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def recorded(workdir: str) -> dict | None:
    """The config of the point, or of the run, in a directory; None if there is neither."""
    files = (read_json(os.path.join(workdir, name)) for name in (_POINT, "config.json"))
    return next((held for held in files if held and {"steps", "position"} <= held.keys()), None)


def read_json(path: str) -> dict | None:
    """What a file holds, or None if it is not there or holds no JSON object."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def finished(workdir: str, config) -> bool:
    """Whether nothing is left: the last step's checkpoint is complete, and it is what was evaluated.

    An evaluation at other lengths or on other data than the config's does not count: the trainer, run
    again, makes the evaluation alone.
    """
    last = max(checkpoint.steps(workdir), default=-1)
    found = read_json(os.path.join(workdir, "evaluation.json"))
    if last < config.steps or found is None or found.get("step") != last:
        return False
    wanted = evaluator.resolve(evaluator.Settings(), config)
    rows = found.get("results")
    lengths = {row.get("length") for row in rows} if isinstance(rows, list) else set()
    return found.get("data") == wanted.data and lengths == set(wanted.lengths)


def failure(workdir: str) -> str:
    """The line of the user's error that a run ended with, or ""."""
    try:
        with open(os.path.join(workdir, "failed"), encoding="utf-8") as file:
            return " ".join(file.read().split())
    except OSError:
        return ""


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """What a run that is alive says of itself."""

    phase: str  # "starting", "training" and so on
    pid: int
    host: str


def heartbeat(workdir: str) -> Heartbeat | None:
    """None if the run has ended, or has not been heard of for too long."""
    beat = read_json(os.path.join(workdir, "heartbeat.json")) or {}
    at, phase = beat.get("time"), beat.get("phase")
    if not isinstance(at, (int, float)) or phase in _ENDED:
        return None
    step = beat.get("step_seconds") or 0.0
    if time.time() - at > (max(_TRAINING, 10 * step) if phase == "training" else _OTHERWISE):
        return None
    if beat.get("host") == socket.gethostname() and not _lives(beat.get("pid")):
        return None
    return Heartbeat(str(phase), beat.get("pid"), beat.get("host"))


def _lives(pid) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:  # another user's
        return True
    return True


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The latest of a run's metrics; None is what it has not written, or was not finite."""

    step: int = 0
    loss: float | None = None  # nats a token
    tokens_per_second: float | None = None


def metrics(workdir: str) -> Metrics:
    """From the end of metrics.jsonl."""
    try:
        with open(os.path.join(workdir, "metrics.jsonl"), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return Metrics()
    last = {}
    for line in lines:
        try:
            last |= json.loads(line)
        except (
            ValueError,
            TypeError,
        ):  # a line that is being written, or cut off at the tail's start
            continue
    return Metrics(last.get("step", 0), last.get("loss"), last.get("tokens_per_second"))
