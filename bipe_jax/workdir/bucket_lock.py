"""Locks in a bucket: one process at a time has an object, by its generation.

The process writes its name to the object, and again every RENEWAL seconds, each time only if the object is
still the one that it wrote last. A bucket lets one process alone replace a generation, so that one gets the
lock of those that start in the same moment. Who finds the name of another process watches the object: if it
is not renewed for STALE seconds, that process is dead. No clocks are compared.

A process that was stopped for longer than that, or cut off from the bucket, and has been replaced meanwhile,
finds it out at its next renewal; `check` then raises.
"""

import contextlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

from bipe_jax.errors import Transient, UserError
from bipe_jax.workdir import bucket, files, lock_owner
from bipe_jax.workdir.files import Path

_LOG = logging.getLogger(__name__)

RENEWAL = 5.0  # seconds between renewals
STALE = 20.0  # seconds without one after which a process is dead
_POLL = 1.0
_held: dict[str, "_Lock"] = {}  # by this process, by path


class _Lock:
    """A lock that this process has, and the thread that renews it.

    Raises:
      bucket.Replaced: another process was quicker. OSError.
    """

    def __init__(self, path: str, generation: int):
        self._path, self._numbers = path, itertools.count()
        self._name = lock_owner.this_process(_machine())
        self._generation = bucket.replace(path, self._content(), generation)
        self.lost = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lock")
        self._thread.start()

    def _content(self) -> bytes:
        return json.dumps(self._name | {"renewed": next(self._numbers)}).encode()

    def _renew(self) -> None:
        while not self._closed.wait(RENEWAL):
            try:
                try:
                    self._generation = bucket.replace(
                        self._path, self._content(), self._generation, seconds=RENEWAL
                    )
                except bucket.Replaced:
                    content, self._generation = bucket.read_generation(self._path)
                    # It may have been this thread, whose last renewal was done though it failed.
                    if not self._is_mine(lock_owner.parse(content)):
                        self.lost = True
                        return
            except OSError as error:  # the next one may succeed
                _LOG.warning(f"{self._path} could not be renewed ({error.strerror})")

    def _is_mine(self, owner: dict[str, Any] | None) -> bool:
        return owner is not None and owner.items() >= self._name.items()

    def end(self) -> None:
        """Gives the lock up, unless another process has it."""
        self._closed.set()
        self._thread.join()
        if not self.lost:
            with contextlib.suppress(OSError):
                bucket.replace(self._path, b"", self._generation, seconds=RENEWAL)


@contextlib.contextmanager
def locked(path: Path, refusal: Callable[[dict[str, Any] | None], UserError]) -> Generator[None]:
    """A context in which this process alone has a lock.

    It waits up to STALE seconds where a process of another machine has left the object behind.

    Args:
      path: of the object.
      refusal: returns what to raise if another process has the lock, from its name.

    Raises:
      UserError: of `refusal`. Nothing is changed.
      OSError: the object cannot be written.
    """
    path = os.fspath(path)
    seen, generation = bucket.read_generation(path)
    owner = lock_owner.parse(seen)
    if owner is not None and not _is_dead(owner) and _is_renewed(path, generation):
        raise refusal(owner)
    try:
        lock = _Lock(path, generation)
    except bucket.Replaced:
        raise refusal(lock_owner.parse(bucket.read_generation(path)[0])) from None
    _held[path] = lock
    try:
        yield
    finally:
        del _held[path]
        lock.end()


def check(path: Path) -> None:
    """Raises Transient if this process is in `locked(path)`, and has lost the lock to another one."""
    lock = _held.get(os.fspath(path))
    if lock and lock.lost:
        raise Transient(
            f"{os.fspath(path)} was removed, or taken by another process when this one had not renewed it "
            f"for {STALE:g} s: this one ends without saving"
        )


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether a name is of a process of this machine that is there no longer."""
    pid = owner.get("pid")
    here = owner.get("machine") == _machine()
    return here and isinstance(pid, int) and not files.process_alive(pid)


def _machine() -> str:
    """Of containers on one machine each counts its own processes."""
    with contextlib.suppress(OSError):
        return f"{lock_owner.machine()} {os.readlink('/proc/self/ns/pid')}"
    return f"{lock_owner.machine()} {os.urandom(8).hex()}"


def _is_renewed(path: str, generation: int) -> bool:
    """Watches an object for STALE seconds. Returns whether it was written."""
    end = time.monotonic() + STALE
    while time.monotonic() < end:
        time.sleep(_POLL)
        if bucket.read_generation(path)[1] != generation:
            return True
    return False
