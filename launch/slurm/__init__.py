"""SLURM: one run (python -m launch.slurm), or the runs of a sweep as an array (`submit`).

The batch scripts are in this directory; docs/slurm.md describes their use, also with sbatch alone.
"""

import hashlib
import os
import shlex
import subprocess
from pathlib import Path

from bipe_jax.errors import UserError
from launch import jobs as launch_jobs
from launch.jobs import Job

_SCRIPTS = "launch/slurm"


def submit(jobs: list[Job], arguments: list[str], dry_run: bool) -> None:
    """Submits an array with one task for each job.

    Writes the jobs to slurm-jobs-HASH.txt in the parent directory of their workdirs.

    Args:
      jobs: already checked.
      arguments: `--jobs=N`, the number of runs at a time (all); the others are flags of sbatch.
      dry_run: only print the file and the command.

    Raises:
      UserError: sbatch is missing or fails, or an array for this directory is in the queue.
    """
    flags = [flag for flag in arguments if not flag.startswith("--jobs=")]
    limits = [flag.partition("=")[2] for flag in arguments if flag.startswith("--jobs=")]
    at_once = limits[-1] if limits else str(len(jobs))
    if not at_once.isdecimal() or int(at_once) < 1:
        raise UserError(f"--jobs={at_once} must be a number of runs at a time, 1 or more")
    directory = os.path.commonpath([Path(job.workdir).absolute().parent for job in jobs])
    text = "".join(shlex.join(job.arguments()) + "\n" for job in jobs)
    # A pending array reads its own file, whatever is submitted after it.
    path = Path(directory, f"slurm-jobs-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt")
    if dry_run:
        print(f"# {path}\n{text}", end="")
    else:
        _check_queue(directory)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    array = f"--array=0-{len(jobs) - 1}%{at_once}"
    _sbatch(directory, [array, *flags], ["sweep.sbatch", str(path)], "%A_%a", dry_run)


def submit_one(job: Job, flags: list[str], dry_run: bool) -> None:
    """Submits one job, already checked, with flags of sbatch. Raises UserError as `submit` does."""
    workdir = os.path.abspath(job.workdir)
    flags = [f"--job-name={job.name or os.path.basename(workdir)}", *flags]
    if not dry_run:
        _check_queue(workdir)
        os.makedirs(workdir, exist_ok=True)
    _sbatch(workdir, flags, ["train.sbatch", *job.arguments()], "%j", dry_run)


def _check_queue(directory: str) -> None:
    """Raises UserError if a job for this directory is in the queue, since two would conflict."""
    launch_jobs.need("sbatch", "launch.slurm")
    line = ["squeue", "--me", "--noheader", "--format=%F %k"]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"SLURM does not answer ({reason}); nothing was launched")
    for shown in done.stdout.splitlines():
        number, _, comment = shown.strip().partition(" ")
        if comment == directory:
            raise UserError(
                f"job {number} for {directory} is in the queue: wait for it, or scancel {number}; "
                "nothing was launched"
            )


def _sbatch(
    directory: str, flags: list[str], script: list[str], number: str, dry_run: bool
) -> None:
    """Runs sbatch, with logs in the directory and the directory as the job's comment."""
    launch_jobs.check_line("--workdir", directory)
    if "\\" in directory:  # after one, SLURM replaces nothing in the name of the log
        raise UserError(f"--workdir: {directory} has a backslash, which SLURM takes as its own")
    settings = [
        f"--comment={directory}",
        f"--output={directory.replace('%', '%%')}/slurm-{number}.out",
    ]
    script = [f"{_SCRIPTS}/{script[0]}", *script[1:]]
    launch_jobs.execute(["sbatch", *settings, *flags, *script], dry_run)
