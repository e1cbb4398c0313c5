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

It answers at once, since it needs no JAX. What it counts is in WORKDIR/restarts.json; if that cannot be
written, the answer is no. Where each host of a run decides for itself, its count is in a
WORKDIR/restarts-HOST.json (--host), or one death that all hosts see would count as many. A run that is given
up is counted anew: who starts it again has mended something. A run whose workdir is not known (--workdir=)
is not started again.
"""

import argparse
import os
import sys

from bipe_jax.errors import DONE, PREEMPTED, USER_ERROR
from bipe_jax.workdir import Workdir, files

_MOST = 3  # crashes at one step


def decide(workdir: str, code: int, host: str = "") -> tuple[bool, str]:
    """(start again?, why), of a run, or of a host's part of it, that ended with a code.

    Counts crashes in WORKDIR/restarts.json, or WORKDIR/restarts-HOST.json.
    """
    run = Workdir(workdir)
    if code == DONE:
        return False, "all steps are done"
    if not workdir:
        return False, f"it ended with code {code}, and its workdir is not known"
    if failure := run.read_failure():
        return False, f"a wrong input: {failure}"
    if code == USER_ERROR and not os.path.isdir(workdir):
        return (
            False,
            f"{workdir} is not there: see the run's last line, or whether a disk is missing",
        )
    step = run.latest_step()
    resuming = f"resuming from step {step or 0}"
    if code == PREEMPTED:
        return True, f"preempted; {resuming}"
    path = run.restarts(host)
    crashes = _crashes(path, step) + 1
    why = f"it died with code {code}"
    try:
        if crashes > _MOST:
            os.remove(path)
            return False, f"{why}, {crashes} times since the checkpoint of step {step or 0}"
        os.makedirs(workdir, exist_ok=True)
        files.write_json(path, {"step": step, "crashes": crashes})
    except OSError as error:
        return False, f"{why}, and {path} cannot be written: {error.strerror}"
    return True, f"{why}; {resuming}"


def _crashes(path: str, step: int | None) -> int:
    """Counted so far at a step."""
    counted = files.read_json(path) or {}
    crashes = counted.get("crashes")
    return crashes if counted.get("step") == step and isinstance(crashes, int) else 0


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
