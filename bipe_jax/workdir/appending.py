"""A growing object of a bucket, which has no appending: the whole object is written again now and then."""

import contextlib
import threading

from bipe_jax.workdir import bucket
from bipe_jax.workdir.files import Path

_PAUSE = 5.0  # seconds between writes, at least
# Bytes a second that rewriting may take on average. A bucket that keeps what was replaced (soft delete) is
# paid for each of them.
_RATE = 100_000


class Growing:
    """An object that a thread writes a while after something was added; with `sync` and `close` at once.

    What could not be written is written the next time.

    Args:
      path: what is there stays.

    Raises:
      OSError: it cannot be read; in `sync` and `close`: it cannot be written.
    """

    def __init__(self, path: Path):
        self._path = path
        self._content = bytearray(bucket.read_generation(path)[0])
        self._written = len(self._content)
        self._changing, self._uploading = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="growing object")
        self._thread.start()

    def write(self, data: bytes | memoryview) -> int:
        """Adds all bytes, and returns their number."""
        with self._changing:
            self._content += data
        return len(data)

    def flush(self) -> None:
        """Leaves it to the thread, as a file leaves it to the system."""

    def sync(self) -> None:
        """Writes what was added so far."""
        with self._uploading:
            with self._changing:
                content = bytes(self._content)
            if len(content) > self._written:
                bucket.write(self._path, content)
                self._written = len(content)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self.sync()

    def _work(self) -> None:
        while not self._closed.wait(max(_PAUSE, len(self._content) / _RATE)):
            with contextlib.suppress(OSError):
                self.sync()
