"""The processes of a run: how they find each other, agree to stop, and notice that one has died."""

import os
import signal
import socket

import jax
from jax.experimental import multihost_utils

from bipe_jax.errors import PREEMPTED, Transient, UserError

# A process that has not been heard of for so long is dead, and the others end too.
_HEARTBEAT_TIMEOUT = 30  # seconds
_SHUTDOWN_TIMEOUT = 60  # seconds that the first one to be done waits for the others
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
    """Joins the other processes of the run. To be called once, before JAX touches a device.

    They are those of the environment variables JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, if these are set; else those of what JAX detects: a step of
    SLURM (srun), Open MPI, a TPU pod, GKE. Else this process is alone. From here on SIGTERM does not
    end the process: `preempted` tells of it.

    Raises:
      UserError: the variables are wrong.
      Transient: the other processes could not be reached.
    """
    limits = {
        "heartbeat_timeout_seconds": _HEARTBEAT_TIMEOUT,
        "shutdown_timeout_seconds": _SHUTDOWN_TIMEOUT,
    }
    given = [os.environ.get(name) for name in _VARIABLES]
    try:
        if any(given):
            jax.distributed.initialize(*_read(given), **limits)
            return
        try:
            jax.distributed.initialize(**limits)
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
            # Alone; but what tells of SIGTERM belongs to jax.distributed.
            jax.distributed.initialize(f"127.0.0.1:{_free_port()}", 1, 0, **limits)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Transient(
            f"the processes of the run did not find each other ({reason}): see that all were started, "
            "and that they reach the first one's port"
        ) from None


def _read(given: list) -> tuple[str, int, int]:
    address, count, number = given
    try:
        if ":" not in address or not 0 <= int(number) < int(count):
            raise ValueError
    except (TypeError, ValueError):
        shown = ", ".join(f"{n}={v}" for n, v in zip(_VARIABLES, given, strict=True))
        raise UserError(
            f"{shown}: set all three, such as host:1234, 4 and this process's number from 0 to 3"
        ) from None
    return address, int(count), int(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def preempted(step: int) -> bool:
    """Whether to save and stop behind this step, since any of the processes has got SIGTERM.

    All processes call it for every step, and all get the same answer.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def leave_at_sigterm() -> None:
    """From here on SIGTERM ends the process, since there is nothing left to save."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(PREEMPTED))
