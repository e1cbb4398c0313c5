"""Standard output and error that never fail: they escape what they cannot show, and drop what is refused.

A run must not end since the disk of its log is full, its terminal is gone, or a reader of its output has
seen enough. Needs no JAX.
"""

import contextlib
import io
import os
import select
import sys
import unicodedata
from typing import Any


class _Dropping(io.RawIOBase):
    """A raw stream to a descriptor that drops what cannot be written.

    Attributes:
      error: the first failure, or None.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        try:
            return os.write(self._descriptor, view)
        except BlockingIOError:  # another program has made it non-blocking
            select.select([], [self._descriptor], [])
            return 0
        except OSError as error:
            self.error = self.error or error
            return view.nbytes

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


def harden() -> None:
    """Makes sys.stdout and sys.stderr never fail; see the module. It can be called again.

    Streams that are no descriptors, such as those of a test, stay as they are. If the process was started
    without one of the descriptors 0, 1 and 2, it is /dev/null, since another file that is opened would be
    in its place.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # It takes the lowest that is free. Child processes have it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _hardened(sys.stdout), _hardened(sys.stderr)


def _hardened(stream: Any) -> Any:
    if stream is None:  # closed when the process started
        return _text(_Dropping(os.open(os.devnull, os.O_WRONLY)), "utf-8", False)
    if _raw(stream) is not None:
        return stream
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    try:
        raw = _Dropping(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return stream
    return _text(raw, stream.encoding, stream.line_buffering)


def _text(raw: _Dropping, encoding: str, line_buffering: bool) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer, encoding=encoding, errors="backslashreplace", line_buffering=line_buffering
    )


def _raw(stream: Any) -> _Dropping | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Dropping) else None


def failure(stream: Any) -> OSError | None:
    """Why text that was written to a hardened stream was dropped; None if none was."""
    with contextlib.suppress(AttributeError):
        stream.flush()
    raw = _raw(stream)
    return raw.error if raw else None


def escaped(text: str, keep: str = "\n\t") -> str:
    """Text with its control characters escaped, but for those of `keep`."""
    return "".join(
        c if c in keep or unicodedata.category(c)[0] != "C" else c.encode("unicode_escape").decode()
        for c in text
    )
