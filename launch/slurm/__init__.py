"""SLURM: one run (python -m launch.slurm), or the runs of a sweep as an array (`submit`).

The batch scripts are in this directory; docs/how-to/slurm.md describes their use, also with sbatch alone.
"""

import hashlib
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from bipe_jax import cli
from bipe_jax.errors import UserError
from bipe_jax.workdir import files
from launch import environment, inputs
from launch import jobs as launch_jobs
from launch.jobs import Job

_SCRIPTS = "launch/slurm"


def submit(jobs: list[Job], arguments: list[str], dry_run: bool) -> None:
    """Submits an array with one task for each job.

    Writes the jobs to slurm-jobs-HASH.txt in the parent directory of their workdirs.

    Args:
      jobs: already checked.
      arguments: `--jobs=N`, the number of runs at a time (all), --env and --env-file; the others are flags
        of sbatch.
      dry_run: only print the file and the command.

    Raises:
      UserError: sbatch is missing or fails, or an array for this directory is in the queue.
    """
    parser = cli.Parser("launch.slurm", None)
    environment.add_flags(parser)
    parser.add_argument("--jobs", default=str(len(jobs)))
    args, flags = parser.parse_known_args(arguments)
    if not args.jobs.isdecimal() or int(args.jobs) < 1:
        raise UserError(f"--jobs={args.jobs} must be a number of runs at a time, 1 or more")
    variables = environment.of(args)
    for job in jobs:
        inputs.check(launch_jobs.check(job), inputs.LOCAL, variables, job.workdir)
    directory = os.path.commonpath([Path(job.workdir).absolute().parent for job in jobs])
    text = "".join(shlex.join(job.arguments()) + "\n" for job in jobs)
    # A pending array reads its own file, whatever is submitted after it.
    path = Path(directory, f"slurm-jobs-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt")
    if dry_run:
        print(f"# {path}\n{text}", end="")
    else:
        _check_queue(directory)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)
    array = f"--array=0-{len(jobs) - 1}%{args.jobs}"
    script = ["sweep.sbatch", str(path)]
    _sbatch(directory, [array, *flags], script, "%A_%a", variables, dry_run)


def submit_one(job: Job, flags: list[str], variables: Mapping[str, str], dry_run: bool) -> None:
    """Submits one job, with flags of sbatch and variables for the run. Raises UserError as `submit` does."""
    launch_jobs.check_on_disk("--workdir", job.workdir)
    inputs.check(launch_jobs.check(job), inputs.LOCAL, variables, job.workdir)
    workdir = os.path.abspath(job.workdir)
    flags = [f"--job-name={job.name or os.path.basename(workdir)}", *flags]
    if not dry_run:
        _check_queue(workdir)
        os.makedirs(workdir, exist_ok=True)
    script = ["train.sbatch", *job.arguments()]
    _sbatch(workdir, flags, script, "%j", variables, dry_run)


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
    directory: str,
    flags: list[str],
    script: list[str],
    number: str,
    variables: Mapping[str, str],
    dry_run: bool,
) -> None:
    """Runs sbatch, with logs in the directory and the directory as the job's comment.

    sbatch takes the variables from its own environment, and so does the job, unless --export says otherwise.
    """
    launch_jobs.check_line("--workdir", directory)
    if "\\" in directory:  # after one, SLURM replaces nothing in the name of the log
        raise UserError(f"--workdir: {directory} has a backslash, which SLURM takes as its own")
    settings = [
        f"--comment={directory}",
        f"--output={directory.replace('%', '%%')}/slurm-{number}.out",
    ]
    script = [f"{_SCRIPTS}/{script[0]}", *script[1:]]
    line = ["sbatch", *settings, *flags, *script]
    launch_jobs.execute(line, dry_run, variables=variables)
