"""Deleting checkpoints: which ones, and how.

A checkpoint is regular if its step is a multiple of `checkpoint.every`; those of stops mostly are not. It is
proved good by a later step of the training that is no spike. A checkpoint is renamed to STEP.deleted before
it is removed, so that a kill leaves no part of it under its name. In a bucket, which cannot rename, COMMITTED
is removed first: what is left is an unfinished save.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable

import orbax.checkpoint as ocp
from etils import epath

from bipe_jax.checkpoint import checksums
from bipe_jax.workdir import COMMITTED, bucket, complete_steps, files, is_complete

_LOG = logging.getLogger(__name__)

# What a checkpoint consists of.
_ITEMS = {"params", "optimizer", "data", "config", "tokenizer", checksums.NAME}
_ITEMS |= {"_CHECKPOINT_METADATA", COMMITTED}
_SUFFIX = ".deleted"
_ATTEMPTS, _PAUSE = 50, 0.1  # to remove a directory that threads may write into; seconds


def rewinds_to(steps: Iterable[int], every: int) -> int | None:
    """The checkpoint that a rewind goes back to, None: the beginning.

    It is the latest regular one, so that it does not depend on when the run was stopped. If all that the run
    must have saved are gone (`every` was another, a save failed), it is the latest of all.
    """
    steps = sorted(steps)
    if regular := [step for step in steps if step % every == 0]:
        return regular[-1]
    return steps[-1] if steps and steps[-1] >= every else None


def superfluous(
    steps: Iterable[int], proved: int | None, keep: int, every: int, others: Iterable[int] = ()
) -> list[int]:
    """The checkpoints to delete: all but the latest `keep`, the latest proved and the latest regular one.

    Args:
      steps: of the complete checkpoints.
      proved: checkpoints up to this step are proved good; None: it is not known of any.
      others: that are kept for another reason.
    """
    steps = sorted(steps)
    good = [step for step in steps if proved is not None and step <= proved]
    if not good:
        return []
    kept = {*steps[-keep:], good[-1], rewinds_to(steps, every), *others}
    return [step for step in steps if step not in kept]


class Deleter:
    """Deletes checkpoints of a directory; removes their files in a thread, since that may take long."""

    def __init__(self, directory: epath.Path):
        self._directory = directory
        self._thread: threading.Thread | None = None

    def delete(self, steps: Iterable[int]) -> None:
        """Deletes checkpoints: when it returns, they have lost their names. Raises OSError."""
        self.finish()
        deleted = [self._without_name(self._directory / str(step)) for step in steps]
        self._thread = threading.Thread(target=_remove_or_log, args=(self._directory, deleted))
        self._thread.start()

    @staticmethod
    def _without_name(path: epath.Path) -> epath.Path:
        """Takes the name from a checkpoint, unless somebody has removed it. Returns where it is then."""
        if bucket.holds(path):
            with contextlib.suppress(FileNotFoundError):
                bucket.remove(path / COMMITTED)
            return path
        aside = path.with_name(f"{path.name}{_SUFFIX}")
        if aside.exists():
            remove(aside)
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
        return aside

    def finish(self) -> None:
        """Waits until what was deleted is removed."""
        if self._thread:
            self._thread.join()


def remove_deleted(directory: epath.Path) -> None:
    """Removes what an earlier start has deleted. What cannot be removed stays until the next one."""
    names = map(os.path.splitext, files.names(directory))
    deleted = [step + suffix for step, suffix in names if suffix == _SUFFIX and step.isdecimal()]
    _remove_or_log(directory, [directory / name for name in deleted])


def _remove_or_log(directory: epath.Path, paths: Iterable[epath.Path]) -> None:
    try:
        for path in paths:
            remove(path)
    except OSError as error:
        _LOG.warning(f"deleted checkpoints in {directory} cannot be removed: {error.strerror}")


def set_stray_aside(directory: epath.Path, keep: int) -> None:
    """Renames entries that are called as a step but are no checkpoint.

    Orbax would count them as checkpoints. What is left of a checkpoint that an earlier version of the
    program was deleting for `keep` is removed. What is an unfinished save in a bucket stays.
    """
    complete = complete_steps(directory)
    for entry in directory.iterdir():
        if not entry.name.isdecimal() or is_complete(os.fspath(entry)):
            continue
        if bucket.holds(entry) and _has_items_alone(entry):
            continue
        later = [step for step in complete if step > int(entry.name)]
        if entry.is_dir() and len(later) >= keep and _has_items_alone(entry):
            remove(entry)
            continue
        aside = entry.with_name(f"{entry.name}.stray")
        _LOG.info(f"{entry} is no checkpoint: set aside as {aside.name}")
        set_aside(entry, aside)


def _has_items_alone(directory: epath.Path) -> bool:
    names = set(files.names(directory))
    return bool(names) and names <= _ITEMS


def set_aside(path: epath.Path, aside: epath.Path) -> None:
    """Renames a directory or a file; what has the new name is removed. Raises OSError."""
    if aside.exists():
        remove(aside) if aside.is_dir() else aside.unlink()
    if not bucket.holds(path):
        path.rename(aside)
    elif files.is_directory(path):
        bucket.rename_all(path, aside)
    else:
        bucket.rename(path, aside)


def unfinished(directory: epath.Path) -> list[epath.Path]:
    """The saves that are not complete: those in progress, and those that were killed. Raises OSError."""
    if not bucket.holds(directory):
        return [of.get() for of in ocp.utils.tmp_checkpoints(directory)]
    # Orbax would name every directory without COMMITTED.
    steps = [directory / name for name in files.names(directory) if name.isdecimal()]
    return [path for path in steps if _has_items_alone(path) and not is_complete(path)]


def remove_unfinished(directory: epath.Path) -> None:
    """Removes unfinished saves. Orbax's option does it in a thread, which may outlive an early error."""
    for path in unfinished(directory):
        remove(path)


def remove(path: epath.Path) -> None:
    """Removes a directory that threads of a failed save may still be writing into."""
    for attempt in range(_ATTEMPTS):
        try:
            bucket.remove_all(path) if bucket.holds(path) else path.rmtree()
        except FileNotFoundError:
            pass  # removed by a thread
        except OSError:
            if attempt == _ATTEMPTS - 1:
                raise
        time.sleep(_PAUSE)
        if not path.exists():
            return
