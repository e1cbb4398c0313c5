"""Opening files of a directory that may have come from elsewhere: anything may be in their place."""

import errno
import io
import os
import stat
from collections.abc import Iterator
from typing import IO

from bipe_jax.workdir import bucket

_CHUNK = 1 << 20  # bytes


def to_read(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a regular file. Raises OSError, also of anything else: opening a FIFO would wait for ever.

    An object of a bucket is read into memory.
    """
    if bucket.holds(path):
        return io.BytesIO(bucket.read(path))
    file = open(path, "rb", opener=_at_once)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return file


def chunks(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The content of a regular file in parts, for a large one. Raises as `to_read`."""
    if bucket.holds(path):
        yield from bucket.chunks(path)
        return
    with to_read(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def not_through_a_link(path: str, flags: int) -> int:
    """An opener, see `open`, that raises OSError if the file itself is a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
