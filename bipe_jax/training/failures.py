"""Records why a run ends, for supervisors (launch/restart.py has the rule)."""

import contextlib
import logging
import os

import jax

from bipe_jax import processes
from bipe_jax.errors import LOST, Transient, UserError
from bipe_jax.workdir import Workdir, files, trainer_lock

_LOG = logging.getLogger(__name__)


def _record(workdir: str, line: str) -> None:
    # One of several processes belongs to a run that has the lock, or has yet to take it.
    with contextlib.suppress(OSError, Transient), contextlib.ExitStack() as stack:
        if not processes.name():
            stack.enter_context(trainer_lock.locked(workdir))
        Workdir(workdir).write_failure(line)


@contextlib.contextmanager
def recorded(workdir: str):
    """A context that records why a run ends.

    A UserError, which a restart would only repeat, is written to WORKDIR/failed by the process that raises
    it, unless another run is training there. A disk error becomes a Transient. If another process was lost,
    this one exits with status LOST.

    Args:
      workdir: "" if it is unknown: nothing is written.
    """
    try:
        yield
    except Transient:
        raise
    except UserError as error:
        if workdir:
            _record(workdir, str(error))
        raise
    except OSError as error:
        within = workdir and os.path.abspath(error.filename or "").startswith(
            os.path.abspath(workdir)
        )
        if not within and error.errno not in files.DISK_ERRORS:
            raise
        where = error.filename or workdir or "a disk"
        raise Transient(f"{where}: {error.strerror}: {files.ADVICE}") from None
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = " ".join(str(error).split())[:300]
        _LOG.warning(
            f"error: the run's processes cannot continue together ({reason}): one was lost"
        )
        os._exit(LOST)
