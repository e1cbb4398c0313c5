"""Files that several processes share: atomic writes, locks, and retries of a failed disk.

Paths are local, or gs://BUCKET/NAME, where they are objects, see `bucket`.
"""

import contextlib
import errno
import fcntl
import io
import itertools
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Generator
from typing import IO, Any, cast

from bipe_jax.errors import Transient, UserError
from bipe_jax.workdir import bucket, json_files, opening

_LOG = logging.getLogger(__name__)

Path = str | os.PathLike[str]

PAUSES = (1, 5, 15)  # seconds before each retry of what a disk has failed
# What a disk makes of a write; errors of writing do not name the file.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
ADVICE = "mend that, then run the same command"
_UNFINISHED = re.compile(r"\.(\d+)@(.+)\.[0-9a-f]{8}\.tmp$")  # process id, host
_FORGOTTEN = 86400  # seconds after which an unfinished file of another host is stale


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", newline: str | None = None) -> Generator[IO[Any]]:
    """Opens a new file, which replaces `path` when the block ends without an error.

    Until then, and after an error, `path` is as it was. Processes may write one path at the same time:
    each writes a temporary file of its own beside it, and the last to end wins. For an object of a bucket,
    what is written stays in memory until then.

    Args:
      mode: "w", for text in UTF-8, or "wb". newline: see `open`.

    Raises:
      OSError: the file cannot be written.
    """
    if bucket.holds(path):
        buffer = io.BytesIO()
        text = io.TextIOWrapper(buffer, "utf-8", newline=newline)
        yield buffer if "b" in mode else text
        text.flush()
        return bucket.write(path, buffer.getvalue())
    temporary = f"{os.fspath(path)}.{os.getpid()}@{socket.gethostname()}.{os.urandom(4).hex()}.tmp"
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(temporary, mode.replace("w", "x"), encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine may leave an empty file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    _sync_directory(os.path.dirname(path))


def _sync_directory(directory: Path) -> None:
    """Makes renames in a directory outlast a crash of the machine, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes all of a text or nothing. Raises OSError."""
    with replacing(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Writes all of a JSON value or nothing. Raises OSError; ValueError of numbers that JSON has not."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds, or None if it is not there or holds anything else."""
    try:
        value = json_files.load(path)
    except (OSError, ValueError):
        return None
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def set_aside(path: Path, reason: str) -> None:
    """Renames a file of bookkeeping that cannot be used, or what is in its place, and logs one line.

    Args:
      reason: for the line. If it cannot be renamed, the line says that too.
    """
    path = os.fspath(path)
    candidates = (f"{path}.unreadable-{n}" for n in itertools.count(1))
    there = bucket.exists if bucket.holds(path) else os.path.lexists
    try:
        aside = next(name for name in candidates if not there(name))
        bucket.rename(path, aside) if bucket.holds(path) else os.rename(path, aside)
    except FileNotFoundError:  # another process was quicker
        return
    except OSError as error:
        _LOG.warning(f"{path} cannot be used ({reason}), nor renamed ({error.strerror})")
        return
    _LOG.warning(f"{path} cannot be used ({reason}): set aside as {os.path.basename(aside)}")


def set_aside_unless_file(path: Path) -> None:
    """Renames what is at `path` unless it is a file that can be read, or nothing, see `set_aside`.

    A symbolic link is renamed too: in a directory from elsewhere it may lead to any file of the user. A
    bucket has neither links nor files that cannot be read.
    """
    if bucket.holds(path):
        return None
    if os.path.islink(path):
        return set_aside(path, "it is a symbolic link")
    try:
        opening.to_read(path).close()
    except FileNotFoundError:
        pass
    except OSError as error:
        set_aside(path, error.strerror or "it cannot be opened")


def set_aside_unless_directory(path: Path) -> None:
    """Renames what is at `path` unless it is a directory, or a link to one, or nothing, see `set_aside`."""
    if not bucket.holds(path) and os.path.lexists(path) and not os.path.isdir(path):
        set_aside(path, "it is no directory")


def absolute(path: Path) -> str:
    """A path that does not depend on where this process runs, and does not end with a slash."""
    return os.fspath(path).rstrip("/") if bucket.holds(path) else os.path.abspath(path)


def exists(path: Path) -> bool:
    """Whether a file, or a directory on a disk, exists."""
    return bucket.exists(path) if bucket.holds(path) else os.path.exists(path)


def is_directory(path: Path) -> bool:
    """Whether a directory exists; in a bucket, whether anything is in it."""
    return bucket.is_directory(path) if bucket.holds(path) else os.path.isdir(path)


def make_directory(path: Path) -> None:
    """Makes a directory with its parents, unless it exists. Raises OSError."""
    if not bucket.holds(path):
        os.makedirs(path, exist_ok=True)


def names(directory: Path) -> list[str]:
    """The names in a directory. Raises OSError.

    A directory that does not exist is an error on a disk; in a bucket it has no names.
    """
    return bucket.names(directory) if bucket.holds(directory) else os.listdir(directory)


def below(directory: Path) -> list[str]:
    """The paths of all files below a directory, from it, in order. Raises OSError."""
    if bucket.holds(directory):
        return bucket.below(directory)
    walked = os.walk(directory)
    paths = (os.path.join(folder, name) for folder, _, names in walked for name in names)
    return sorted(os.path.relpath(path, directory) for path in paths)


def remove(path: Path) -> None:
    """Removes a file. Raises OSError."""
    bucket.remove(path) if bucket.holds(path) else os.remove(path)


def remove_unfinished(directory: Path) -> None:
    """Removes the temporary files of writers that were killed. What cannot be removed stays.

    In a bucket there are none.
    """
    if bucket.holds(directory):
        return
    for name in os.listdir(directory):
        if not (writer := _UNFINISHED.search(name)):
            continue
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):
            here = writer[2] == socket.gethostname()
            age = time.time() - os.stat(path).st_mtime
            if not process_alive(int(writer[1])) if here else age > _FORGOTTEN:
                os.remove(path)


def process_alive(pid: int) -> bool:
    """Whether a process of this machine is alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


@contextlib.contextmanager
def locked(path: Path, refusal: str) -> Generator[int]:
    """Locks a file, which is made if it is not there, or a directory.

    The lock ends with the block, or with this process however it ends. A process that inherits the
    descriptor holds the lock too, as long as it lives. On a file system without locks a warning is all.

    Yields:
      The descriptor of the file, open for appending.

    Raises:
      UserError: with `refusal`: another process holds the lock.
      OSError: the file cannot be opened.
    """
    if os.path.isdir(path):
        descriptor = os.open(path, os.O_RDONLY)
    else:
        new = os.O_RDWR | os.O_APPEND | os.O_CREAT
        descriptor = opening.not_through_a_link(os.fspath(path), new)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        except OSError as error:
            _LOG.warning(
                f"{os.fspath(path)} cannot be locked ({error.strerror}): take care that no other process "
                "writes there"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def retry(write: Callable[[], Any], path: Path) -> Any:
    """Calls `write()`, and again after each of PAUSES if the disk fails it.

    Args:
      path: for the messages.

    Raises:
      Transient: it still fails.
    """
    for pause in (*PAUSES, None):
        try:
            return write()
        except OSError as error:
            if pause is None:
                raise Transient(f"{os.fspath(path)}: {error.strerror}: {ADVICE}") from None
            _LOG.warning(f"{os.fspath(path)}: {error.strerror}; trying again in {pause:g} s")
            time.sleep(pause)
