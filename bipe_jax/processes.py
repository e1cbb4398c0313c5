"""The processes of a run: how they find each other, agree to stop, and notice that one has died."""

import os
import signal
import socket
import sys
import threading

import jax
from jax.experimental import multihost_utils

from bipe_jax.errors import LOST, PREEMPTED, Transient, UserError

_START_TIMEOUT = 300  # seconds that the first ones wait for the last: nodes may still pull images
# A process that has not been heard of for so long is dead, and the others end too.
_HEARTBEAT_TIMEOUT = 30  # seconds
_SHUTDOWN_TIMEOUT = 60  # seconds that the first one to be done waits for the others
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")  # processes that were started together
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_joined = False  # jax.distributed.is_initialized() is true after a failure too


def start() -> None:
    """Joins the other processes of the run. To be called once, before JAX touches a device.

    They are those of the environment variables JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, if these are set; else those of what JAX detects: a step of
    SLURM (srun), Open MPI, a TPU pod, GKE. Else this process is alone. From here on SIGTERM does not
    end the process: `preempted` tells of it.

    Raises:
      UserError: the variables are wrong.
      Transient: the other processes could not be reached. If some do not come in time, the process ends
        with status LOST.
    """
    if not _find():
        # Alone; but what tells of SIGTERM belongs to jax.distributed. Devices of one process need no
        # network: with gloo, several CPU devices of one process can wait for each other for ever.
        jax.config.update("jax_cpu_collectives_implementation", None)
        _initialize(f"127.0.0.1:{_free_port()}", 1, 0)


def join() -> None:
    """`start`, for programs that have nothing to save: SIGTERM ends them, and alone they stay alone."""
    if _find():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _find() -> bool:
    """Joins the other processes, and returns True; or False if there is nothing that tells of any."""
    given = [os.environ.get(name) for name in _VARIABLES]
    if any(given):
        _initialize(*_read(given))
        return True
    if any(os.environ.get(name) == "1" for name in _COUNTS):
        return False
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        # Beside what the TPUs of this machine compute, its coordinator would be in the way.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        _initialize()
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise
        return False
    return True


def is_first() -> bool:
    """Whether this is the process that prints and writes: the only one, or the first of several."""
    return not _joined or jax.process_index() == 0


def name() -> str:
    """ "process 1 of 4", or "" for the only one."""
    if not _joined or jax.process_count() == 1:
        return ""
    return f"process {jax.process_index()} of {jax.process_count()}"


def _initialize(*which) -> None:
    global _joined
    # When its own time is up, JAX aborts with C++'s stack and no word of what was waited for.
    waiting = threading.Timer(_START_TIMEOUT, _give_up)
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            *which,
            initialization_timeout=2 * _START_TIMEOUT,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        )
        _joined = True
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        # A host may be away for longer than the others wait, as in maintenance.
        raise Transient(
            f"the processes of the run did not find each other ({reason}): see that all were started, "
            "and that they reach the first one's port"
        ) from None
    finally:
        waiting.cancel()


def _give_up() -> None:
    print(
        f"error: not all processes of the run came within {_START_TIMEOUT:g} s: see that all were "
        "started, and that they reach the first one's port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)


def _read(given: list) -> tuple[str, int, int]:
    address, count, number = given
    try:
        port = int(address.rpartition(":")[2])
        if ":" not in address or not 0 < port < 1 << 16 or not 0 <= int(number) < int(count):
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        shown = ", ".join(f"{n}={v}" for n, v in zip(_VARIABLES, given, strict=True))
        raise UserError(
            f"{shown}: set all three, such as host:1234, 4 and this process's number from 0 to 3"
        ) from None
    if int(number) == 0:
        _check_free(port)
    return address, int(count), int(number)


def _check_free(port: int) -> None:
    """What JAX makes of a port that is taken is a crash. Raises Transient."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise Transient(
                f"JAX_COORDINATOR_ADDRESS: port {port} of this machine cannot be had "
                f"({error.strerror}): choose another"
            ) from None


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
