"""Runs the trainer on one machine, under a controller that restarts it: a JobSet, a managed job.

python -m launch.worker --config=configs/quickstart.py --workdir=/runs/x   (as bipe_jax.train)

| status | meaning                                               | the controller's action |
|--------|-------------------------------------------------------|-------------------------|
| 0      | all steps are done                                    | none                    |
| 42     | preempted, saved                                      | restart                 |
| 43     | it died, or lost another machine                      | restart                 |
| 44     | a user's error, or it died too often (launch.restart) | give up                 |

The rule is that of launch.restart. Only the run's first machine applies it, at the start of the next attempt:
a machine that vanishes cannot do so at its end, and a crash must be counted once. The file WORKDIR/running
marks an attempt that did not end well, since only a good end removes it.

If PEERS="x-w-{}-{}.x 2 4" is set, it waits until all of these 2 x 4 machines have an address: nodes can
start hours apart, and trainers do not wait so long for each other.

It needs no JAX. SIGTERM and Ctrl-C are passed on to the trainer as SIGTERM, which makes it save.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

from bipe_jax import streams
from bipe_jax.errors import DONE, LOST, PREEMPTED
from bipe_jax.workdir import Workdir, files, workdir_argument
from launch import restart

STOP = 44
_POLL = 5  # seconds between polls for missing machines
_RANKS = ("JOB_GLOBAL_INDEX", "JOB_COMPLETION_INDEX", "SKYPILOT_NODE_RANK")


def first() -> bool:
    """Whether this is the first machine of the run; without ranks there is only one."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def wait_for_peers(peers: str) -> None:
    """Returns when all machines of "PATTERN JOBS PODS" have an address."""
    pattern, jobs, pods = peers.split()
    missing = [pattern.format(i, j) for i in range(int(jobs)) for j in range(int(pods))]
    shown = None
    while missing := [name for name in missing if not _has_address(name)]:
        if len(missing) != shown:
            shown = len(missing)
            _log(f"waiting for {shown} machines, such as {missing[0]}")
        time.sleep(_POLL)


def _has_address(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def run(command: list[str]) -> int:
    """Runs a command, passes SIGTERM and Ctrl-C on to it as SIGTERM, and returns its status."""
    child = None
    stopped = False

    def pass_on(*_):
        nonlocal stopped
        # A terminal sends Ctrl-C to the trainer too, and a second one would end it at once.
        if child and not stopped:
            child.send_signal(signal.SIGTERM)
        stopped = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    child = subprocess.Popen(command)
    if stopped:  # before there was a child
        child.send_signal(signal.SIGTERM)
    return child.wait()


def attempt(workdir: str, command: list[str]) -> int:
    """Runs the command unless the last attempts died too often. Returns a status of the table above.

    Raises:
      OSError: the workdir cannot be written.
    """
    directory = Workdir(workdir)
    if first():
        files.make_directory(workdir)
        files.set_aside_unless_file(directory.running)
        # After a user's error only the user restarts a run, having corrected it.
        if files.exists(directory.running) and not directory.read_failure():
            again, why = restart.decide(workdir, LOST)
            _log(why)
            if not again:
                files.remove(directory.running)
                return STOP
        directory.forget_failure()
        files.write_text(directory.running, "")
    code = run(command)
    if code in (DONE, PREEMPTED):
        status = code
    elif directory.read_failure():
        status = STOP
    else:
        _log(f"the trainer died with code {code}")
        return LOST
    if first():
        with contextlib.suppress(FileNotFoundError):
            files.remove(directory.running)
    return status


def _log(text: str) -> None:
    print(f"launch.worker: {text}", file=sys.stderr, flush=True)


def main() -> int:
    arguments = sys.argv[1:]
    workdir = workdir_argument(arguments)
    if not workdir:
        _log("--workdir=DIR is needed")
        return STOP
    # Process 1 of a container receives no SIGTERM without a handler.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(PREEMPTED))
    if peers := os.environ.get("PEERS"):
        wait_for_peers(peers)
    try:
        return attempt(workdir, [sys.executable, "-m", "bipe_jax.train", *arguments])
    except OSError as error:
        _log(f"error: {workdir}: {error}")
        return STOP


if __name__ == "__main__":
    streams.harden()
    sys.exit(main())
