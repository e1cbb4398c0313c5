"""Training jobs, which are checked before a launch, and the commands that launch them."""

import dataclasses
import logging
import os
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Mapping

from bipe_jax import cli, plan, streams
from bipe_jax.config import check_resumable, from_json
from bipe_jax.errors import UserError
from bipe_jax.workdir import Workdir, bucket

_LOG = logging.getLogger(__name__)

TRAIN = ("python", "-m", "bipe_jax.train")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of bipe_jax.train.

    Attributes:
      config: as on the command line, "configs/quickstart.py" or "configs/quickstart.py:rope".
      workdir: of the run, as a path on the machines that run it.
      overrides: pairs of a key, such as "optimizer.learning_rate", and its value.
      name: unique among jobs that are launched together.
    """

    config: str
    workdir: str
    overrides: tuple[tuple[str, object], ...] = ()
    name: str = ""

    def config_arguments(self) -> list[str]:
        changes = [f"--config.{key}={_text(value)}" for key, value in self.overrides]
        return [f"--config={self.config}", *changes]

    def arguments(self) -> list[str]:
        """The arguments of `python -m bipe_jax.train`."""
        return [*self.config_arguments(), f"--workdir={self.workdir}"]


def _text(value) -> str:
    return value if isinstance(value, str) else repr(value)


def check_line(name: str, text: str, shown: str | None = None) -> None:
    """Raises UserError unless a text is one line without control characters.

    Launchers write it into files of lines, YAML and units, and pass it through shells of other machines.

    Args:
      shown: in the message instead of a text that is secret.
    """
    for character in name + text:
        # Control characters, separators of lines and paragraphs, and bytes that are not UTF-8.
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            whole = streams.escaped(f"{name}={text if shown is None else shown}", keep="")
            raise UserError(
                f"{whole} contains {character!a}: launchers take one line without control characters"
            )


def check_on_disk(flag: str, path: str) -> None:
    """Raises UserError if a directory that a launcher writes to on this machine is none of a disk."""
    bucket.check(path, flag)
    if bucket.holds(path):
        raise UserError(
            f"{flag}={path} must be a local directory here: launch.tpu_vm takes a bucket"
        )


def check(job: Job) -> plan.Plan:
    """The job's config, as the trainer will read it.

    Raises:
      UserError: a key is unknown, a value is wrong or has several lines, or the workdir belongs to another
        config.
    """
    texts = {"--config": job.config, "--workdir": job.workdir, "--name": job.name}
    for name, value in texts.items() | {(f"--config.{k}", _text(v)) for k, v in job.overrides}:
        check_line(name, value)
    bucket.check(job.workdir, "--workdir")
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
            f"--skip-preflight: it is not checked that {job.config} compiles for {topology} and fits its "
            "memory"
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
            "(--skip-preflight launches without this check)"
        )
    _LOG.info(done.stdout.rstrip())


def need(program: str, launcher: str) -> None:
    """Raises UserError if a program that a launcher runs is not on this machine."""
    if shutil.which(program) is None:
        raise UserError(
            f"{program} is not on this machine: {launcher} needs it; nothing was launched"
        )


def execute(
    command: list[str],
    dry_run: bool,
    stdin: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Runs a command, or only prints it.

    Args:
      stdin: its standard input. variables: of its environment, besides this one's.

    Raises:
      UserError: it failed; its output is on the terminal.
    """
    if dry_run:
        print(shlex.join(command), flush=True)
        return
    _LOG.info(f"+ {shlex.join(command)}")
    environment = os.environ | (variables or {})
    code = subprocess.run(command, input=stdin, text=True, env=environment).returncode
    if code:
        raise UserError(f"{command[0]} ended with status {code}: {shlex.join(command)}")
