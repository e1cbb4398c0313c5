"""The rule of all supervisors: whether a run that ended is restarted.

python -m launch.restart --workdir=runs/x --code=137   (status 0: restart; 1: no; 2: wrong arguments)

| exit code | meaning                                         | restart?                              |
|-----------|-------------------------------------------------|---------------------------------------|
| 0         | all steps are done                              | no                                    |
| any       | WORKDIR/failed exists: a user's error           | no                                    |
| 1         | WORKDIR does not exist: it was never made, or a | no                                    |
|           | disk is missing                                 |                                       |
| 42        | preempted, saved                                | yes                                   |
| other     | died, or lost a peer                            | while checkpoints advance; else 3     |
|           |                                                 | times                                 |

It needs no JAX, and answers at once. WORKDIR/restarts.json has its count of crashes; if that file cannot be
written, the answer is no. If each host of a run decides for itself, its count is in
WORKDIR/restarts-HOST.json (--host), since otherwise one death that all hosts see would count many times. The
count of a run that is given up is reset, since its user restarts it after a repair. A run whose workdir is
not known (--workdir=) is not restarted.
"""

import argparse
import os
import sys

from bipe_jax import streams
from bipe_jax.errors import DONE, PREEMPTED, USER_ERROR
from bipe_jax.workdir import Workdir, files

_MOST = 3  # crashes at the same step


def decide(workdir: str, code: int, host: str = "") -> tuple[bool, str]:
    """Whether to restart a run, or a host's part of it, that ended with a code, and the reason.

    It counts crashes in WORKDIR/restarts.json, or WORKDIR/restarts-HOST.json.
    """
    run = Workdir(workdir)
    if code == DONE:
        return False, "all steps are done"
    if not workdir:
        return False, f"it ended with code {code}, and its workdir is not known"
    if failure := run.read_failure():
        return False, f"a wrong input: {failure}"
    if code == USER_ERROR and not files.is_directory(workdir):
        return (
            False,
            f"{workdir} does not exist: see the run's last line, or whether a disk is missing",
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
            files.remove(path)
            return False, f"{why}, {crashes} times since the checkpoint of step {step or 0}"
        files.make_directory(workdir)
        files.write_json(path, {"step": step, "crashes": crashes})
    except OSError as error:
        return False, f"{why}, and {path} cannot be written: {error.strerror}"
    return True, f"{why}; {resuming}"


def _crashes(path: str, step: int | None) -> int:
    """The count of crashes so far at a step."""
    counted = files.read_json(path) or {}
    crashes = counted.get("crashes")
    if not isinstance(crashes, int) or crashes < 0:
        if os.path.lexists(path):
            files.set_aside(path, "it is no count of crashes")
        return 0
    return crashes if counted.get("step") == step else 0


def parser() -> argparse.ArgumentParser:
    """The parser of its flags."""
    parser = argparse.ArgumentParser(prog="python -m launch.restart", description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--code", type=int, required=True, help="exit status of the run")
    parser.add_argument(
        "--host", default="", help="name of this host, if each host decides for itself"
    )
    return parser


def main() -> int:
    args = parser().parse_args()
    again, why = decide(args.workdir, args.code, args.host)
    print(("restarting: " if again else "not restarting: ") + why, file=sys.stderr)
    return 0 if again else 1


if __name__ == "__main__":
    streams.harden()
    sys.exit(main())
