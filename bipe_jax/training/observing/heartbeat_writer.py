"""The thread that writes heartbeat.json, so that a slow file system does not delay the steps.

It writes only when the training beats, so that a run that hangs does not seem alive.
"""

import contextlib
import threading

from bipe_jax.workdir import Workdir, files

_PAUSE = 1.0  # seconds between writes, at least
_LAST = 10.0  # seconds that the last write may take


class HeartbeatWriter:
    """Writes the newest beat, at most once a second, and ignores errors of the file system."""

    def __init__(self, workdir: str):
        self._path = Workdir(workdir).heartbeat
        self._newest: dict | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._pause = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="heartbeat")
        self._thread.start()

    def beat(self, content: dict) -> None:
        """Writes the heartbeat soon, unless a newer one replaces it."""
        with self._changed:
            self._newest = content
            self._changed.notify()

    def close(self) -> None:
        """Writes the last beat, unless the file system hangs."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._pause.set()
        self._thread.join(_LAST)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest or self._closed)
                content, self._newest = self._newest, None
            if content is None:
                return
            with contextlib.suppress(OSError):  # a full disk; the next beat may fit
                files.write_json(self._path, content)
            self._pause.wait(_PAUSE)
