"""A training job, checked before anything is launched, and the commands that launch it."""

import dataclasses
import logging
import os
import shlex
import shutil
import subprocess
import sys

from bipe_jax import cli, plan
from bipe_jax.config import check_resumable, from_json
from bipe_jax.errors import UserError
from bipe_jax.workdir import Workdir

_LOG = logging.getLogger(__name__)

TRAIN = ("python", "-m", "bipe_jax.train")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of bipe_jax.train.

    Attributes:
      config: as on the command line, "configs/quickstart.py" or "configs/quickstart.py:rope".
      workdir: of the run, as the machines that run it see it.
      overrides: pairs of a key, such as "optimizer.learning_rate", and its value.
      name: unique among the jobs that are launched together.
    """

    config: str
    workdir: str
    overrides: tuple[tuple[str, object], ...] = ()
    name: str = ""

    def config_arguments(self) -> list[str]:
        changes = [f"--config.{key}={_text(value)}" for key, value in self.overrides]
        return [f"--config={self.config}", *changes]

    def arguments(self) -> list[str]:
        """What follows `python -m bipe_jax.train`."""
        return [*self.config_arguments(), f"--workdir={self.workdir}"]


def _text(value) -> str:
    return value if isinstance(value, str) else repr(value)


def check(job: Job):
    """The job's config, as the trainer will read it.

    Raises:
      UserError: the config has no such key, a value does not fit, or the workdir is another config's.
    """
    config = plan.make(cli.read_config(job.config_arguments()))
    if (recorded := Workdir(job.workdir).read_config()) is not None:
        check_resumable(from_json(recorded), config, job.workdir)
    return config


def preflight(job: Job, topology: str, skip: bool) -> None:
    """Compiles the job's train step for a TPU slice, in a process of its own.

    Raises:
      UserError: it does not fit, or cannot be compiled here.
    """
    if skip:
        _LOG.info(
            f"--skip-preflight: nobody has checked that {job.config} compiles for {topology} and fits "
            "its memory"
        )
        return
    _LOG.info(f"Preflight: compiling {job.config} for {topology} ...")
    line = [sys.executable, "-m", "bipe_jax.preflight", *job.config_arguments()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*line, f"--topology={topology}"], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(
            f"preflight for {topology}: {reason.removeprefix('error: ')}; nothing was launched "
            "(--skip-preflight launches all the same)"
        )
    _LOG.info(done.stdout.rstrip())


def need(program: str, what: str) -> None:
    """Raises UserError if a program that launches is not on this machine."""
    if shutil.which(program) is None:
        raise UserError(f"{program} is not on this machine: {what} needs it; nothing was launched")


def execute(command: list[str], dry_run: bool, stdin: str | None = None) -> None:
    """Runs a command, or prints it alone.

    Args:
      stdin: its standard input.

    Raises:
      UserError: it failed; what it printed is on the terminal.
    """
    if dry_run:
        print(shlex.join(command), flush=True)
        return
    _LOG.info(f"+ {shlex.join(command)}")
    code = subprocess.run(command, input=stdin, text=True).returncode
    if code:
        raise UserError(f"{command[0]} ended with status {code}: {shlex.join(command)}")
