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

Standard library alone. SIGTERM is passed on to the trainer, which saves.
"""

import contextlib
import os
import signal
import subprocess
import sys

from launch import restart

LOST = 43  # as in bipe_jax/errors.py
STOP = 44
_RANKS = ("JOB_GLOBAL_INDEX", "JOB_COMPLETION_INDEX", "SKYPILOT_NODE_RANK")


def first() -> bool:
    """Whether this is the first machine of the run; a controller that sets no rank has one machine."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


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
    running, failed = (os.path.join(workdir, name) for name in ("running", "failed"))
    if first():
        os.makedirs(workdir, exist_ok=True)
        # Whoever starts a run again after a user's error is the user, who has mended it.
        if os.path.exists(running) and not os.path.exists(failed):
            again, why = restart.decide(workdir, LOST)
            _say(why)
            if not again:
                os.remove(running)
                return STOP
        with open(running, "w", encoding="utf-8"):
            pass
    code = run(command)
    if code == 0 or code == restart.PREEMPTED:
        status = code
    elif os.path.exists(failed):
        status = STOP
    else:
        _say(f"the trainer died with code {code}")
        return LOST
    if first():
        with contextlib.suppress(FileNotFoundError):
            os.remove(running)
    return status


def _say(text: str) -> None:
    print(f"launch.worker: {text}", file=sys.stderr, flush=True)


def main() -> int:
    arguments = sys.argv[1:]
    workdirs = [text.partition("=")[2] for text in arguments if text.startswith("--workdir=")]
    if len(workdirs) != 1:
        _say("--workdir=DIR is needed, once")
        return STOP
    try:
        return attempt(workdirs[0], [sys.executable, "-m", "bipe_jax.train", *arguments])
    except OSError as error:
        _say(f"error: {workdirs[0]}: {error}")
        return STOP


if __name__ == "__main__":
    sys.exit(main())
