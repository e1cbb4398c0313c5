"""The lock of a run's directory: one trainer at a time, on this machine and on others.

WORKDIR/trainer.lock is locked with flock while a trainer runs, and names it. The system ends that lock
with the process. On some network disks flock does nothing, or holds on one machine only, so that the trainer
also renews the file's time: if a trainer of another machine has not ended the file, a new one watches it,
and starts once it was not renewed for a while. No clocks are compared.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Generator
from typing import Any, cast

from bipe_jax.errors import Transient
from bipe_jax.workdir import Workdir, files, json_files
from bipe_jax.workdir.files import Path

RENEWAL = 5.0  # seconds between renewals of the file's time
STALE = 20.0  # seconds without one after which a trainer of another machine is dead
_POLL = 0.5
_NAMED = 2.0  # seconds in which a trainer that has just locked the file writes its name
_descriptors: set[int] = set()


def _close_in_fork() -> None:
    """A child process must not hold a lock for longer than its trainer lives."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_in_fork)


@contextlib.contextmanager
def locked(workdir: Path) -> Generator[None]:
    """A context in which no other trainer runs in a workdir, which exists.

    It waits up to STALE seconds where a trainer of another machine has left the file behind.

    Raises:
      Transient: another trainer is alive there. Nothing is changed.
      OSError: the file cannot be made.
    """
    path = Workdir(workdir).trainer_lock
    files.set_aside_unless_file(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    _descriptors.add(descriptor)
    try:
        local = True  # whether a dead trainer of this machine has lost the lock
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Transient(_refusal(workdir, _wait_for_name(path))) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            local = False
        owner = _owner(path)
        ended = owner is None or (local and owner.get("machine") == _machine())
        if not ended and _is_renewed(path):
            raise Transient(_refusal(workdir, owner))
        _write(
            descriptor, {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine()}
        )
        closed = threading.Event()
        thread = threading.Thread(
            target=_renew, args=(descriptor, closed), daemon=True, name="trainer lock"
        )
        thread.start()
        try:
            yield
        finally:
            closed.set()
            thread.join()
            with contextlib.suppress(OSError):  # a full disk; it is stale in a while
                os.ftruncate(descriptor, 0)
    finally:
        if descriptor in _descriptors:
            _descriptors.remove(descriptor)
            os.close(descriptor)


def _renew(descriptor: int, closed: threading.Event) -> None:
    while not closed.wait(RENEWAL):
        with contextlib.suppress(OSError):  # of the disk; the next one may succeed
            os.utime(descriptor)


def _write(descriptor: int, owner: dict[str, Any]) -> None:
    """Names the owner. A full disk does not keep a trainer from starting: the lock has no name then."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        os.fsync(descriptor)


def _owner(path: Path) -> dict[str, Any] | None:
    """What a trainer has written that has not ended the file; None if there is none."""
    try:
        with open(path, "rb") as file:
            text = file.read(1 << 12)
    except OSError:
        return None
    if not text:
        return None
    try:
        value = json_files.parse(text)
    except ValueError:  # half of it
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _wait_for_name(path: Path) -> dict[str, Any] | None:
    end = time.monotonic() + _NAMED
    while not (owner := _owner(path)) and time.monotonic() < end:
        time.sleep(_POLL / 10)
    return owner


def _is_renewed(path: Path) -> bool:
    """Watches a file for STALE seconds. Returns whether it was renewed, or written by another trainer."""
    # Opening a file makes a network disk read its time anew.
    first, end = _state(path), time.monotonic() + STALE
    while time.monotonic() < end:
        time.sleep(_POLL)
        if _state(path) != first:
            return True
    return False


def _state(path: Path) -> tuple[bytes, int]:
    with open(path, "rb") as file:
        return file.read(1 << 12), os.fstat(file.fileno()).st_mtime_ns


def _machine() -> str:
    """What tells this machine, since it was booted, from others: containers may share a host's name."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


def _refusal(workdir: Path, owner: dict[str, Any] | None) -> str:
    pid, host = (owner or {}).get("pid"), (owner or {}).get("host")
    by = f"process {pid} on {host}" if pid and host else "another process"
    return (
        f"{os.fspath(workdir)} is being trained by {by}: wait for it, or stop it, or use another "
        "--workdir"
    )
