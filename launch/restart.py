"""Whether a run that ended is to be started again: the one rule of all supervisors.

python -m launch.restart --workdir=runs/x --code=137   (status 0: start again; 1: no; 2: a wrong call)

| exit code | meaning                                            | again?                          |
|-----------|----------------------------------------------------|---------------------------------|
| 0         | all steps are done                                 | no                              |
| any       | WORKDIR/failed is there: a user's error, its line  | no                              |
| 1         | WORKDIR is not there: it was never made, or a disk | no                              |
|           | has vanished, in whose place nothing is to be made |                                 |
| 42        | preempted, saved                                   | yes                             |
| other     | died, or lost a peer                               | while checkpoints advance; else |
|           |                                                    | 3 times                         |

Standard library alone, so that it answers at once. What it counts is in WORKDIR/restarts.json; if that
cannot be written, the answer is no. Where each host of a run decides for itself, its count is in a
WORKDIR/restarts-HOST.json (--host), or one death that all hosts see would count as many. A run that is
given up is counted anew: who starts it again has mended something.
"""

import argparse
import contextlib
import json
import os
import sys

PREEMPTED = 42  # as in bipe_jax/errors.py
_MOST = 3  # crashes at one step


def latest_step(workdir: str) -> int:
    """Of the complete checkpoints; -1 if there is none."""
    try:
        names = os.listdir(os.path.join(workdir, "checkpoints"))
    except OSError:
        return -1
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def decide(workdir: str, code: int, host: str = "") -> tuple[bool, str]:
    """(start again?, why), of a run, or of a host's part of it, that ended with a code.

    Counts crashes in WORKDIR/restarts.json, or WORKDIR/restarts-HOST.json.
    """
    path = os.path.join(workdir, f"restarts-{host}.json" if host else "restarts.json")
    if code == 0:
        return False, "all steps are done"
    failed = os.path.join(workdir, "failed")
    with contextlib.suppress(OSError), open(failed, encoding="utf-8", errors="replace") as file:
        return False, f"a wrong input: {file.read().strip()}"
    if code == 1 and not os.path.isdir(workdir):
        return (
            False,
            f"{workdir} is not there: see the run's last line, or whether a disk is missing",
        )
    step = latest_step(workdir)
    if code == PREEMPTED:
        return True, f"preempted; going on from step {max(step, 0)}"
    counted_step, crashes = _read(path)
    crashes = crashes + 1 if counted_step == step else 1
    why = f"it died with code {code}"
    try:
        if crashes > _MOST:
            os.remove(path)
            return False, f"{why}, {crashes} times since the checkpoint of step {step}"
        _write(path, {"step": step, "crashes": crashes})
    except OSError as error:
        return False, f"{why}, and {path} cannot be written: {error.strerror}"
    return True, f"{why}; going on from step {max(step, 0)}"


def _read(path: str) -> tuple[int | None, int]:
    """(step, crashes at it)."""
    try:
        with open(path, encoding="utf-8") as file:
            counted = json.load(file)
        return counted["step"], int(counted["crashes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, 0


def _write(path: str, counted: dict) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(counted, file)
        os.replace(path + ".tmp", path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.restart", description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--code", type=int, required=True, help="with which the run ended")
    parser.add_argument("--host", default="", help="that decides for itself, of several")
    args = parser.parse_args()
    again, why = decide(args.workdir, args.code, args.host)
    print(("starting again: " if again else "not starting again: ") + why, file=sys.stderr)
    return 0 if again else 1


if __name__ == "__main__":
    sys.exit(main())
