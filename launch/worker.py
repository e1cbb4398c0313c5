"""Runs the trainer on one machine, under a controller that starts it again: a JobSet, a managed job.

python -m launch.worker --config=configs/quickstart.py --workdir=/runs/x   (as bipe_jax.train)

| status | what happened                                   | the controller is to |
|--------|-------------------------------------------------|----------------------|
| 0      | all steps are done                              | be done              |
| 42     | preempted, saved                                | start it again       |
| 43     | it died, or lost another machine                | start it again       |
| 44     | a user's error, or it died too often (launch.restart) | give up        |

launch.restart has the rule. It is asked at the start of the next attempt, and by the run's first
machine alone: a machine that vanishes cannot ask at its end, and a crash is to be counted once. That an
attempt did not end well is known from the file WORKDIR/running, which only a good end removes.

Where PEERS="x-w-{}-{}.x 2 4" is set, it waits until all of these 2 x 4 machines have an address: nodes
can come hours apart, and trainers do not wait for each other so long.

It needs no JAX. SIGTERM is passed on to the trainer, which saves.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

from bipe_jax.errors import DONE, LOST, PREEMPTED
from bipe_jax.workdir import Workdir, workdir_argument
from launch import restart

STOP = 44
_LOOK = 5  # seconds between two looks for machines that are not there yet
_RANKS = ("JOB_GLOBAL_INDEX", "JOB_COMPLETION_INDEX", "SKYPILOT_NODE_RANK")


def first() -> bool:
    """Whether this is the first machine of the run; a controller that sets no rank has one machine."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def wait_for_peers(peers: str) -> None:
    """Returns when all machines of "PATTERN JOBS PODS" have an address."""
    pattern, jobs, pods = peers.split()
    missing = [pattern.format(i, j) for i in range(int(jobs)) for j in range(int(pods))]
    shown = None
    while missing := [name for name in missing if not _has_address(name)]:
        if len(missing) != shown:
            shown = len(missing)
            _say(f"waiting for {shown} machines, such as {missing[0]}")
        time.sleep(_LOOK)


def _has_address(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def run(command: list[str]) -> int:
    """The status of a command that gets the SIGTERM that this process gets."""
    child = None
    stopped = False

    def pass_on(signum, _):
        nonlocal stopped
        stopped = True
        if child:
            child.send_signal(signum)

    signal.signal(signal.SIGTERM, pass_on)
    child = subprocess.Popen(command)
    if stopped:  # before there was a child
        child.send_signal(signal.SIGTERM)
    return child.wait()


def attempt(workdir: str, command: list[str]) -> int:
    """Runs the command unless the last attempts died too often; this module's status.

    Raises:
      OSError: the workdir cannot be written.
    """
    directory = Workdir(workdir)
    if first():
        os.makedirs(workdir, exist_ok=True)
        # Whoever starts a run again after a user's error is the user, who has mended it.
        if os.path.exists(directory.running) and not directory.read_failure():
            again, why = restart.decide(workdir, LOST)
            _say(why)
            if not again:
                os.remove(directory.running)
                return STOP
        directory.forget_failure()
        with open(directory.running, "w", encoding="utf-8"):
            pass
    code = run(command)
    if code in (DONE, PREEMPTED):
        status = code
    elif directory.read_failure():
        status = STOP
    else:
        _say(f"the trainer died with code {code}")
        return LOST
    if first():
        with contextlib.suppress(FileNotFoundError):
            os.remove(directory.running)
    return status


def _say(text: str) -> None:
    print(f"launch.worker: {text}", file=sys.stderr, flush=True)


def main() -> int:
    arguments = sys.argv[1:]
    workdir = workdir_argument(arguments)
    if not workdir:
        _say("--workdir=DIR is needed")
        return STOP
    # As process 1 of a container it would get no SIGTERM without a handler.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(PREEMPTED))
    if peers := os.environ.get("PEERS"):
        wait_for_peers(peers)
    try:
        return attempt(workdir, [sys.executable, "-m", "bipe_jax.train", *arguments])
    except OSError as error:
        _say(f"error: {workdir}: {error}")
        return STOP


if __name__ == "__main__":
    sys.exit(main())
