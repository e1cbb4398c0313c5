"""The lock of a run's directory: one trainer at a time, on this machine and on others.

WORKDIR/trainer.lock is locked with flock while a trainer runs, and names it. The system ends that lock
with the process. On some network disks flock does nothing, or holds on one machine only, so that the trainer
also renews the file's time: if a trainer of another machine has not ended the file, a new one watches it,
and starts once it was not renewed for a while. No clocks are compared.

Of several that would start in the same moment, since they see the same in the file, only one can make the
directory that is called by what they see: making a directory is atomic on network disks too.

In a bucket the lock is the object of that name, see `bucket_lock`.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Generator
from typing import Any

from bipe_jax.errors import Transient
from bipe_jax.workdir import Workdir, bucket, bucket_lock, files, lock_owner, opening
from bipe_jax.workdir.files import Path

RENEWAL = 5.0  # seconds between renewals of the file's time
STALE = 20.0  # seconds without one after which a trainer of another machine is dead
_POLL = 0.5
_CLAIM = ".claim"
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
    with _in_bucket(workdir) if bucket.holds(workdir) else _on_disk(workdir):
        yield


def check(workdir: Path) -> None:
    """Raises Transient if this process is in `locked(workdir)`, and has lost the lock.

    A trainer on a disk does not find that out.
    """
    bucket_lock.check(Workdir(workdir).trainer_lock)


def _in_bucket(workdir: Path) -> contextlib.AbstractContextManager[None]:
    return bucket_lock.locked(
        Workdir(workdir).trainer_lock,
        lambda owner: Transient(lock_owner.refusal(workdir, owner)),
    )


@contextlib.contextmanager
def _on_disk(workdir: Path) -> Generator[None]:
    path = Workdir(workdir).trainer_lock
    files.set_aside_unless_file(path)
    descriptor = opening.not_through_a_link(path, os.O_RDWR | os.O_CREAT)
    _descriptors.add(descriptor)
    try:
        local = True  # whether a dead trainer of this machine has lost the lock
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Transient(lock_owner.refusal(workdir, _wait_for_name(path))) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            local = False
        seen = _state(path)[0]
        owner = lock_owner.parse(seen)
        ended = owner is None or (local and owner.get("machine") == lock_owner.machine())
        if not ended and _is_renewed(path):
            raise Transient(lock_owner.refusal(workdir, owner))
        claim = _claim(path, seen)
        if claim is None:
            raise Transient(lock_owner.refusal(workdir, _wait_for_name(path)))
        _write(descriptor)
        _remove_other_claims(path, claim)
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
            with contextlib.suppress(OSError):
                os.rmdir(claim)
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


def _claim(path: Path, seen: bytes) -> str | None:
    """Makes a directory that one alone can make of those who have seen the same content of the file.

    Returns:
      Its path; None if another trainer was quicker.
    """
    digest = hashlib.sha256(seen).hexdigest()[:16]
    for number in itertools.count():
        claim = f"{os.fspath(path)}.{digest}-{number}{_CLAIM}"
        try:
            os.mkdir(claim)
        except FileExistsError:
            if _state(path)[0] != seen or _is_renewed(path):
                return None
            continue  # who made it died before it wrote its name
        except OSError:  # of a full disk: as without claims
            return claim
        if _state(path)[0] == seen:
            return claim
        with contextlib.suppress(OSError):
            os.rmdir(claim)
        return None
    raise AssertionError


def _remove_other_claims(path: Path, mine: str) -> None:
    """Those of trainers that were killed."""
    directory, name = os.path.split(path)
    with contextlib.suppress(OSError):
        for entry in os.listdir(directory):
            claim = os.path.join(directory, entry)
            if entry.startswith(name) and entry.endswith(_CLAIM) and claim != mine:
                with contextlib.suppress(OSError):
                    os.rmdir(claim)


def _write(descriptor: int) -> None:
    """Names this process. A full disk does not keep a trainer from starting: the lock has no name then."""
    text = json.dumps(lock_owner.this_process(lock_owner.machine())).encode()
    with contextlib.suppress(OSError):
        os.pwrite(descriptor, text, 0)  # it is never empty meanwhile, as if nobody trained
        os.ftruncate(descriptor, len(text))
        os.fsync(descriptor)


def _wait_for_name(path: Path) -> dict[str, Any] | None:
    end = time.monotonic() + _NAMED
    while not (owner := lock_owner.parse(_state(path)[0])) and time.monotonic() < end:
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
