"""The actions of `python -m launch.tpu_vm`, all of which can be repeated."""

import logging
import os
import shlex
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence

from bipe_jax.config import file, needs
from bipe_jax.errors import UserError
from bipe_jax.workdir import bucket
from launch import environment, inputs, jobs, machines
from launch.tpu_vm import money
from launch.tpu_vm.gcloud import ABSENT, Resource

_LOG = logging.getLogger(__name__)

LOST = ("SUSPENDED", "FAILED")  # states that only a deletion ends; SUSPENDED is a preemption
_PENDING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
_POLL = 30.0  # seconds
_WORKER = "cd bipe_jax/source && ../venv/bin/python -m launch.tpu_vm.worker"
_IF_BOOTSTRAPPED = (
    "if [ -e bipe_jax/commit ]; "
    f"then {_WORKER} %s; "
    'else echo "bipe_jax $(hostname) nothing not bootstrapped"; fi'
)
_EXTRAS = {"tpu", "gcs"}  # of every VM
_ENVIRONMENT = "bipe_jax.environment"  # in the home directory of the VMs


def create(resource: Resource, args: Namespace) -> None:
    """Requests the slice, unless it exists."""
    commit_of(args.job.config)
    ready(resource, args, environment.of(args))
    state = resource.state()
    if state in LOST:
        raise UserError(
            f"{resource.name} is {state} and will not recover: delete it, then create it again"
        )
    if state != ABSENT:
        _LOG.info(f"{resource.name} exists already: {state}")
        return
    money.confirm(resource.slice, args)
    request(resource, args, args.max_hours)


def request(resource: Resource, args: Namespace, hours: float | None) -> None:
    """Requests the slice, which must not exist, to be deleted after some hours on it."""
    flags = money.flags(args, resource.name, hours)
    resource.create(args.runtime_version, [*flags, *args.extra])


def bootstrap(resource: Resource, args: Namespace) -> None:
    """Waits for the slice, and installs the working commit on all its VMs."""
    commit = commit_of(args.job.config)
    extras = needs.of(jobs.check(args.job)).extras
    _wait_until_active(resource)
    install(resource, args, commit, extras)


def install(resource: Resource, args: Namespace, commit: str, extras: Sequence[str]) -> None:
    """Installs a commit with extras on all VMs."""
    archive = os.path.join(tempfile.gettempdir(), f"bipe_jax-{commit}.tar.gz")
    jobs.execute(
        ["git", "archive", "--format=tar.gz", f"--output={archive}", commit], resource.dry_run
    )
    resource.copy([archive, os.path.join(os.path.dirname(__file__), "bootstrap.sh")])
    if not resource.dry_run:
        os.remove(archive)
    words = ["bash", "bootstrap.sh", commit, ",".join(sorted(_EXTRAS | {*extras}))]
    resource.ask(shlex.join([*words, *([args.nfs] if args.nfs else [])]), verbose=True)


def run(resource: Resource, args: Namespace) -> None:
    """Starts the supervisor on all VMs where it does not run."""
    commit = commit_of(args.job.config)
    variables = environment.of(args)
    job, _ = ready(resource, args, variables)
    _wait_until_active(resource)
    start(resource, args, job, commit, variables)


def start(
    resource: Resource, args: Namespace, job: jobs.Job, commit: str, variables: Mapping[str, str]
) -> None:
    """Starts the supervisor, with variables for the run, on all VMs where it does not run."""
    hosts = resource.slice.hosts * resource.slice.slices
    words = ["start", f"--workdir={job.workdir}", f"--commit={commit}", f"--hosts={hosts}"]
    goes = args.spot or args.delete != "never" or args.max_hours is not None
    words += ["--shared"] if hosts > 1 or (goes and args.action != "smoke") else []
    if args.max_hours is not None:
        words.append(f"--deadline={resource.name}:{resource.zone}")
    if variables:
        _send(resource, variables)
        words.append("--environment")
    line = shlex.join([*words, "--", *job.arguments()])
    resource.ask(f"{_WORKER} {line}", verbose=True)


def _send(resource: Resource, variables: Mapping[str, str]) -> None:
    """Copies variables to all VMs as a file that systemd reads."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, _ENVIRONMENT)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as opened:
            for name, value in variables.items():
                for character in '\\"$`':
                    value = value.replace(character, f"\\{character}")
                opened.write(f'{name}="{value}"\n')
        resource.copy([path])


def status(resource: Resource, args: Namespace) -> None:
    """Shows the queued resource's state and, if it is active, the run's state on each VM."""
    state = resource.state()
    if not resource.dry_run:
        _LOG.info(f"{resource.name}: {state}")
    if state == "ACTIVE" or resource.dry_run:
        ask(resource, "status", verbose=True)


def ask(resource: Resource, action: str, verbose: bool = False) -> list[tuple[str, str, str]]:
    """(host, state, text) of each VM after an action of launch/tpu_vm/worker.py there."""
    return resource.ask(_IF_BOOTSTRAPPED % action, verbose)


def logs(resource: Resource, args: Namespace) -> None:
    """Shows the run's output on one VM, or all."""
    follow = " --follow" if args.follow else ""
    resource.ssh(f"{_WORKER} logs{follow}", resource.nodes()[args.node], args.worker)


def stop(resource: Resource, args: Namespace) -> None:
    """Makes the trainer save and end, on all VMs; the slice remains."""
    ask(resource, "stop", verbose=True)


def delete(resource: Resource, args: Namespace) -> None:
    """Deletes the slice with the disks of its VMs, if it exists."""
    if resource.state() == ABSENT and not resource.dry_run:
        _LOG.info(f"{resource.name} does not exist")
        return
    resource.delete()


def ready(
    resource: Resource, args: Namespace, variables: Mapping[str, str]
) -> tuple[jobs.Job, needs.Needs]:
    """The checked job, and what it needs.

    Raises:
      UserError: it is wrong, lacks what it needs, or does not fit the slice.
    """
    workdir = args.job.workdir
    if not bucket.holds(workdir) and not workdir.startswith("/"):
        raise UserError(
            f"--workdir={workdir} must be gs://BUCKET/DIRECTORY, or an absolute path on the VMs, such as "
            "/mnt/bipe/x of a file system that all share"
        )
    place = inputs.Place("the commit", inputs.commit())
    wanted = machines.Machines(resource.slice)
    return machines.ready([args.job], wanted, args.skip_preflight, place, variables)[0]


def commit_of(config: str) -> str:
    """The working commit, which must have the config.

    Raises:
      UserError: a change, or the config file, is not in it.
    """

    def git(*words):
        done = subprocess.run(["git", *words], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"git {shlex.join(words)}: {' '.join(done.stderr.split())}")
        return done.stdout

    commit = git("rev-parse", "HEAD").strip()
    if changed := git("status", "--porcelain", "--untracked-files=no").splitlines():
        raise UserError(f"{changed[0][3:]} is not committed, and the VMs get a commit: commit it")
    path = file.find(config)[0]
    if not git("ls-files", path):
        raise UserError(
            f"--config={config}: {path} is not in the repository, and the VMs get a commit: commit it"
        )
    return commit


def _wait_until_active(resource: Resource) -> None:
    """Waits until the slice is active. Raises UserError if it will not be."""
    logged = None
    while True:
        state = resource.state()
        if state == "ACTIVE" or resource.dry_run:
            return
        if state not in _PENDING:
            raise UserError(
                f"{resource.name} is {state}: create it first (delete it before, if SUSPENDED)"
            )
        if state != logged:
            _LOG.info(f"{resource.name} is {state}: waiting")
            logged = state
        time.sleep(_POLL)
