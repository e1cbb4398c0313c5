"""Files that a command writes its results to: proved writable first, replaced whole, a line for a failure.

A file is written beside its final path and renamed, so that what was there stays until then, a file that is
read-only is replaced, and a symbolic link is replaced too: nothing is written to where it leads.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Generator
from typing import Any

from bipe_jax.errors import Transient, UserError
from bipe_jax.workdir import Workdir, bucket, files
from bipe_jax.workdir.files import Path


class Unwritten(UserError):
    """A file of results that could not be written."""


class _Probed(Exception):
    """Ends the writing of a file that only proves that it can be written."""


def check(path: Path) -> None:
    """Raises Unwritten unless a file can be written, or replaced. It leaves nothing."""
    if bucket.holds(path):
        probe = f"{os.fspath(path)}.writable"
        with writing(path):
            bucket.write(probe, b"")
            with contextlib.suppress(FileNotFoundError):  # another process of the run was quicker
                bucket.remove(probe)
            return
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise Unwritten(f"{os.fspath(path)} cannot be written: there is no such directory")
    with writing(path):
        if os.path.isdir(path) and not os.path.islink(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _is_anothers(path):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        with contextlib.suppress(_Probed), files.replacing(path):
            raise _Probed


def _is_anothers(path: Path) -> bool:
    """Whether a file is another user's in a sticky directory, such as /tmp: it cannot be replaced."""
    if os.geteuid() == 0 or not os.path.lexists(path):
        return False
    directory = os.stat(os.path.dirname(os.path.abspath(path)))
    owners = {directory.st_uid, os.lstat(path).st_uid}
    return bool(directory.st_mode & stat.S_ISVTX) and os.geteuid() not in owners


def check_directory(directory: Path, *names: str, flag: str = "--output") -> None:
    """Makes a directory of results. Raises UserError unless the files `names` can be written there."""
    Workdir(directory).make(flag)
    for name in names:
        check(os.path.join(directory, name))


def check_new(directory: Path) -> None:
    """Raises UserError unless a local directory can be made, with its parents. It makes nothing."""
    path = os.path.abspath(directory)
    if os.path.isdir(path):
        path = os.path.join(path, "new")
    while not os.path.lexists(os.path.dirname(path)):
        path = os.path.dirname(path)
    check(path)


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """A context that turns an OSError into an Unwritten that names the file; a full disk is Transient."""
    try:
        yield
    except OSError as error:
        kind = Transient if error.errno in files.DISK_ERRORS else Unwritten
        raise kind(f"{os.fspath(path)} cannot be written: {error.strerror}") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Writes all of a file or nothing. Raises UserError."""
    with writing(path), files.replacing(path, "wb") as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Writes all of a JSON value or nothing. Raises UserError, also of numbers that JSON has not."""
    try:
        with writing(path):
            files.write_json(path, value)
    except ValueError as error:
        raise Unwritten(f"{os.fspath(path)} cannot be written: {error}") from None
