"""WORKDIR/heartbeat.json: when a run last progressed, and in which phase, for a supervisor to watch.

A thread writes it, so that a slow file system does not hold up the steps; but it writes only what the
training hands to it, so that a run that hangs does not seem alive.
"""

import contextlib
import json
import os
import threading

FILE = "heartbeat.json"
_PAUSE = 1.0  # seconds between writes, at least
_LAST = 10.0  # seconds that the last write may take


class Heartbeat:
    """Writes the newest of what `beat` is given, at most once a second. No failure to write is raised."""

    def __init__(self, workdir: str):
        self._path = os.path.join(workdir, FILE)
        self._newest, self._ends = None, False
        self._changed = threading.Condition()
        self._pause = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="heartbeat")
        self._thread.start()

    def beat(self, content: dict) -> None:
        with self._changed:
            self._newest = content
            self._changed.notify()

    def close(self) -> None:
        """Writes the last beat, unless the file system hangs."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._pause.set()
        self._thread.join(_LAST)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest or self._ends)
                content, self._newest = self._newest, None
            if content is None:
                return
            with contextlib.suppress(OSError):  # a full disk; the next beat may fit
                with open(self._path + ".tmp", "w", encoding="utf-8") as file:
                    json.dump(content, file)
                os.replace(self._path + ".tmp", self._path)
            self._pause.wait(_PAUSE)


def read(workdir: str) -> dict | None:
    """The last beat; None if there is none that this program wrote."""
    try:
        with open(os.path.join(workdir, FILE), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return None
    good = isinstance(content, dict) and content.keys() >= {
        "time",
        "step",
        "phase",
        "since",
        "seconds",
    }
    return content if good else None
