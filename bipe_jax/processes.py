"""The processes of a run: how they join, agree to stop, and detect that one has died."""

import contextlib
import os
import signal
import socket
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from bipe_jax.errors import LOST, PREEMPTED, Transient, UserError

_START_TIMEOUT = 300  # seconds to wait for all processes: nodes may still pull images
_HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a process is dead, and all end
_SHUTDOWN_TIMEOUT = 60  # seconds that a process waits at its end for the others
# Processes that were started together, in the order in which JAX asks for them.
_COUNTS = ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_joined = False  # jax.distributed.is_initialized() is true after a failure too


def start() -> None:
    """Joins the other processes of the run. It must be called once, before JAX uses a device.

    The environment variables JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID describe the processes, if set (JAX_NUM_PROCESSES=1: this one is alone); otherwise JAX
    detects them: a step of SLURM (srun), Open MPI, a TPU pod, GKE. Otherwise this process is the only one.
    From then on SIGTERM and Ctrl-C do not end the process, as in `stop_signals`; a second Ctrl-C does, by the
    signal.

    Raises:
      UserError: the variables are wrong.
      Transient: the other processes could not be reached. If some do not join in time, the process exits
        with status LOST.
    """
    _initialize_if_several()
    _listen(at_second=signal.SIG_DFL)


def join() -> None:
    """Joins the other processes as `start`; SIGTERM and Ctrl-C end the process as usual."""
    if _initialize_if_several():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _initialize_if_several() -> bool:
    """Joins the other processes. Returns False if the environment describes none.

    A process that is alone starts no coordination service: that judges heartbeats by the wall clock, and
    would abort the run when the clock jumps.
    """
    variables = [os.environ.get(name) for name in _VARIABLES]
    if any(variables):
        if variables[1] == "1" and variables[2] in (None, "", "0"):
            return False
        _initialize(*_read(variables))
        return True
    if _is_alone():
        return False
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        # The coordinator would clash with that of a program on this machine's TPUs.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        _initialize()
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise
        return False
    return True


def _is_alone() -> bool:
    """Whether the environment describes a single process, which JAX would let coordinate itself."""
    count = next((os.environ[name] for name in _COUNTS if name in os.environ), None)
    if count is not None:
        return count == "1"
    # GKE names the processes, or the hosts, of a TPU slice. JAX asks for them in this order.
    hosts = next((os.environ[name] for name in _HOSTS if name in os.environ), "")
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "1")
    return bool(hosts) and "," not in hosts and slices == "1"


def is_first() -> bool:
    """Whether this process prints and writes: the only one, or the first of several."""
    return not _joined or jax.process_index() == 0


def name() -> str:
    """The name of this process, such as "process 1 of 4"; "" for the only one."""
    if not _joined or jax.process_count() == 1:
        return ""
    return f"process {jax.process_index()} of {jax.process_count()}"


def _initialize(*settings: Any) -> None:
    global _joined
    # After its own timeout, JAX aborts with a C++ stack trace and does not name the cause.
    waiting = threading.Timer(_START_TIMEOUT, _give_up)
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            *settings,
            initialization_timeout=2 * _START_TIMEOUT,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        )
        _joined = True
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        # A host in maintenance may be away for longer than the others wait.
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


def _read(variables: list) -> tuple[str, int, int]:
    address, count, number = variables
    try:
        port = int(address.rpartition(":")[2])
        if ":" not in address or not 0 < port < 1 << 16 or not 0 <= int(number) < int(count):
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        shown = ", ".join(f"{n}={v}" for n, v in zip(_VARIABLES, variables, strict=True))
        raise UserError(
            f"{shown}: set all three, such as host:1234, 4 and this process's number from 0 to 3"
        ) from None
    if int(number) == 0:
        _check_free(port)
    return address, int(count), int(number)


def _check_free(port: int) -> None:
    """Raises Transient if a port is taken, since JAX would crash."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise Transient(
                f"JAX_COORDINATOR_ADDRESS: port {port} of this machine cannot be used "
                f"({error.strerror}): choose another"
            ) from None


# Stopping. A signal handler only sets `_received`, which the trainer polls.
_received: int | None = None  # the signal that asks this process to stop
# Only Python's own handlers are replaced, and not those of an embedding program.
_DEFAULT = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


def preempted(step: int) -> bool:
    """Whether to save and stop after this step, since a process received SIGTERM or Ctrl-C.

    All processes call it once for every step, with numbers that count up from 1, and all get the same
    answer. A single process needs no `jax.distributed` for it.
    """
    if _one_of_several():
        return multihost_utils.reached_preemption_sync_point(step)
    return _received is not None


def interrupted() -> bool:
    """Whether Ctrl-C asked this process to stop."""
    return _received == signal.SIGINT


@contextlib.contextmanager
def stop_signals():
    """A context in which SIGTERM and Ctrl-C do not end the process, but `preempted` reports them.

    A second Ctrl-C raises KeyboardInterrupt at once. Handlers that are not Python's own are kept, as are all
    in threads other than the main one, where Python sets none. All handlers are restored afterwards.
    """
    global _received
    before = _listen(at_second=signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            _received = None


def exit_at_signals() -> None:
    """Makes SIGTERM and Ctrl-C end the process with PREEMPTED, once nothing is left to save."""
    for number in _DEFAULT:
        signal.signal(number, lambda *_: os._exit(PREEMPTED))


def _listen(at_second: Any) -> dict[signal.Signals, Any]:
    """Sets the handlers, and returns the replaced ones by signal.

    Args:
      at_second: the handler of a second Ctrl-C.
    """

    def handle(number, _):
        global _received
        _received = number
        if number == signal.SIGINT:
            signal.signal(number, at_second)
            if _one_of_several():
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX passes on to the others

    if threading.current_thread() is not threading.main_thread():
        return {}
    # With several processes JAX itself handles SIGTERM.
    numbers = [signal.SIGINT] if _one_of_several() else list(_DEFAULT)
    before = {n: _DEFAULT[n] for n in numbers if signal.getsignal(n) == _DEFAULT[n]}
    for number in before:
        signal.signal(number, handle)
    return before


def _one_of_several() -> bool:
    """Whether JAX coordinates this process with others, even if another program initialised it."""
    return _joined or jax.distributed.is_initialized()
