"""Making things ahead of their use, in a thread."""

import contextlib
import queue
import threading
from collections.abc import Callable


class Ahead:
    """What `make` returns, call after call, made by a thread while others work.

    Args:
      make: called by the thread alone. What it raises is raised by `next`, in order and from then on.
      count: how many are kept ready.
    """

    def __init__(self, make: Callable, count: int):
        self._make, self._ready = make, queue.Queue(count)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self):
        while not self._stop.is_set():
            try:
                made = (self._make(), None)
            except BaseException as error:
                made = (None, error)
            self._ready.put(made)
            if made[1]:
                return

    def __next__(self):
        made, error = self._ready.get()
        if error:
            self._ready.put((made, error))
            raise error
        return made

    def close(self) -> None:
        """Ends the thread, after what it is at."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)
