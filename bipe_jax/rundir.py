"""A run's directory: whose it is, and why the run in it failed."""

import contextlib
import errno
import json
import logging
import os
import time

import jax
from jax.experimental import multihost_utils

from bipe_jax.config import Config, check_resumable, from_json, to_json
from bipe_jax.errors import LOST, Transient, UserError

_LOG = logging.getLogger(__name__)

FAILED, CONFIG = "failed", "config.json"
PAUSES = (1, 5, 15)  # seconds before what a disk has failed is tried again
# What a disk makes of a write; errors of writing do not name the file.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
_MEND = "mend that, then run the same command"


def make(workdir: str) -> None:
    """Makes the directory. Raises UserError if it cannot be written to."""
    probe = os.path.join(workdir, f".writable-{jax.process_index()}")
    try:
        os.makedirs(workdir, exist_ok=True)
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError as error:
        raise UserError(f"--workdir={workdir} is not writable: {error.strerror}") from None


def claim(config: Config, workdir: str) -> None:
    """Raises UserError if the directory belongs to a run that cannot go on with this config."""
    path = os.path.join(workdir, CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            saved = from_json(json.load(file))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): use another --workdir") from None
    check_resumable(saved, config, workdir)


def record(config: Config, workdir: str) -> None:
    """Writes the config of a run that begins, or goes on."""
    if jax.process_index() == 0:
        path = os.path.join(workdir, CONFIG)
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(to_json(config), file, indent=1)
        os.replace(path + ".tmp", path)


def patiently(write, path: str) -> None:
    """Calls `write()`, again after pauses if the disk fails it. Raises Transient when it still does."""
    for pause in (*PAUSES, None):
        try:
            return write()
        except OSError as error:
            if pause is None:
                raise Transient(f"{path}: {error.strerror}: {_MEND}") from None
            _LOG.warning(f"{path}: {error.strerror}; trying again in {pause:g} s")
            time.sleep(pause)


def forget_failure(workdir: str) -> None:
    """Removes why an earlier run failed. All processes call it, as soon as they have found each other.

    Before that, one that starts late would remove what another has just written.
    """
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            os.remove(os.path.join(workdir, FAILED))
    multihost_utils.sync_global_devices("forget_failure")


@contextlib.contextmanager
def failures(workdir: str):
    """Says why a run ends, for those who would start it again (see launch/restart.py).

    A UserError, which another start would meet again, is written to WORKDIR/failed, by whichever
    process has it. If another process was lost, this one ends with status LOST.
    """
    try:
        yield
    except Transient:
        raise
    except UserError as error:
        path = os.path.join(workdir, FAILED)
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            file.write(f"{error}\n")
        raise
    except OSError as error:
        ours = os.path.abspath(error.filename or "").startswith(os.path.abspath(workdir))
        if not ours and error.errno not in _DISK:
            raise
        raise Transient(f"{error.filename or workdir}: {error.strerror}: {_MEND}") from None
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = " ".join(str(error).split())[:300]
        _LOG.warning(f"error: the run's processes cannot go on together ({reason}): one was lost")
        os._exit(LOST)
