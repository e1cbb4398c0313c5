"""The lock of a workdir, for all processes of a run."""

import contextlib
from collections.abc import Generator

import jax

from bipe_jax import collectives
from bipe_jax.errors import Transient
from bipe_jax.workdir import Workdir, files, trainer_lock


@contextlib.contextmanager
def locked(workdir: str) -> Generator[None]:
    """A context in which this run is the only trainer of a workdir. All processes of the run enter it.

    The first process takes the lock, and removes the record of an earlier failure.

    Raises:
      Transient: in all processes: another trainer is alive there, or the lock cannot be made.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(trainer_lock.locked(workdir))
                with contextlib.suppress(OSError):
                    Workdir(workdir).forget_failure()
            except Transient as error:
                refusal = str(error)
            except OSError as error:
                path = Workdir(workdir).trainer_lock
                refusal = f"{path}: {error.strerror}: {files.ADVICE}"
        if refusal := collectives.of_all_processes(refusal)[0]:
            raise Transient(refusal)
        yield
