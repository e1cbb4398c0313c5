"""The actions of `python -m launch.tpu_vm`, all of which can be repeated."""

import logging
import os
import shlex
import subprocess
import tempfile
import time
from argparse import Namespace

from bipe_jax.config import file
from bipe_jax.errors import UserError
from launch import jobs, machines
from launch.tpu_vm.gcloud import ABSENT, Final, Resource

_LOG = logging.getLogger(__name__)

_LOST = ("SUSPENDED", "FAILED")  # states that only a deletion ends; SUSPENDED is a preemption
_PENDING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
_POLL = 30.0  # seconds
_DONE = "done"
_MOST = 10  # failures in a row after which `watch` ends
_WORKER = "cd bipe_jax/source && ../venv/bin/python -m launch.tpu_vm.worker"
_IF_BOOTSTRAPPED = (
    "if [ -e bipe_jax/commit ]; "
    f"then {_WORKER} %s; "
    'else echo "bipe_jax $(hostname) nothing not bootstrapped"; fi'
)


def create(resource: Resource, args: Namespace) -> None:
    """Requests the slice, unless it exists."""
    _ready(resource, args)
    _create(resource, args, resource.state())


def _create(resource: Resource, args: Namespace, state: str) -> None:
    if state in _LOST:
        raise UserError(
            f"{resource.name} is {state} and will not recover: delete it, then create it again"
        )
    if state != ABSENT:
        _LOG.info(f"{resource.name} exists already: {state}")
        return
    tier = ["--spot"] * args.spot + ["--reserved"] * args.reserved
    resource.create(tier, args.runtime_version, args.extra)


def bootstrap(resource: Resource, args: Namespace) -> None:
    """Waits for the slice, and installs the working commit on all its VMs."""
    commit = _commit()
    _wait_until_active(resource)
    _bootstrap(resource, args, commit)


def _bootstrap(resource: Resource, args: Namespace, commit: str) -> None:
    archive = os.path.join(tempfile.gettempdir(), f"bipe_jax-{commit}.tar.gz")
    jobs.execute(
        ["git", "archive", "--format=tar.gz", f"--output={archive}", commit], resource.dry_run
    )
    resource.copy([archive, os.path.join(os.path.dirname(__file__), "bootstrap.sh")])
    if not resource.dry_run:
        os.remove(archive)
    words = ["bash", "bootstrap.sh", commit, *([args.nfs] if args.nfs else [])]
    resource.ask(shlex.join(words), verbose=True)


def run(resource: Resource, args: Namespace) -> None:
    """Starts the supervisor on all VMs where it does not run."""
    commit = _commit(args.job.config)
    job = _ready(resource, args)
    _wait_until_active(resource)
    _run(resource, args, job, commit)


def _run(resource: Resource, args: Namespace, job: jobs.Job, commit: str) -> None:
    hosts = resource.slice.hosts * resource.slice.slices
    words = ["start", f"--workdir={job.workdir}", f"--commit={commit}", f"--hosts={hosts}"]
    words += ["--shared"] if hosts > 1 or args.spot or args.delete else []
    line = shlex.join([*words, "--", *job.arguments()])
    resource.ask(f"{_WORKER} {line}", verbose=True)


def watch(resource: Resource, args: Namespace) -> None:
    """Creates, bootstraps and runs, again after each preemption, until the run is done.

    Raises:
      UserError: the run failed, or too many attempts failed in a row.
    """
    commit = _commit(args.job.config)
    job = _ready(resource, args)
    failures, known = 0, None
    while True:
        try:
            now = _advance(resource, args, job, commit)
            failures = 0
        except Final:
            raise
        except UserError as error:  # a VM may be restarting, the network down
            failures += 1
            if failures == _MOST:
                raise
            now = f"{error}; trying again"
        if now != known:
            _LOG.info(f"{time.strftime('%F %T')} {resource.name}: {now}")
            known = now
        if now == _DONE or resource.dry_run:
            break
        time.sleep(_POLL)
    if args.delete:
        resource.delete()
    elif not resource.dry_run:
        _LOG.info(
            f"{resource.name} still exists, and costs money: delete it when you have its logs"
        )


def _advance(resource: Resource, args: Namespace, job: jobs.Job, commit: str) -> str:
    """Does the next thing that the state of the slice needs. Returns the state."""
    state = resource.state()
    if state == "FAILED":
        raise Final(f"{resource.name} is FAILED: see gcloud's describe, and delete it")
    if state == "SUSPENDED":
        resource.delete()
    if state in (ABSENT, "SUSPENDED"):
        _create(resource, args, ABSENT)
        state = "requested"
    if state != "ACTIVE" and not resource.dry_run:
        return state
    states = {state for _, state, _ in resource.ask(_IF_BOOTSTRAPPED % "status")}
    if states == {_DONE}:
        return _DONE
    if "failed" in states and "running" not in states:
        raise Final(
            f"the run on {resource.name} ended and is not to be restarted: see {job.workdir}/failed and "
            "the logs; the slice still exists, and costs money"
        )
    # A run that is done on some hosts will soon be done on the others.
    if "running" in states and not states & {"nothing", "stopped"}:
        return "running"
    _bootstrap(resource, args, commit)
    _run(resource, args, job, commit)
    return "started"


def status(resource: Resource, args: Namespace) -> None:
    """Shows the queued resource's state and, if it is active, the run's state on each VM."""
    state = resource.state()
    if not resource.dry_run:
        _LOG.info(f"{resource.name}: {state}")
    if state == "ACTIVE" or resource.dry_run:
        resource.ask(_IF_BOOTSTRAPPED % "status", verbose=True)


def logs(resource: Resource, args: Namespace) -> None:
    """Shows the journal of the service on one VM, or all."""
    follow = " --follow" if args.follow else ""
    command = f"sudo journalctl --unit=bipe_jax --no-pager --lines=200 --output=cat{follow}"
    resource.ssh(command, resource.nodes()[args.node], args.worker)


def stop(resource: Resource, args: Namespace) -> None:
    """Makes the trainer save and end, on all VMs; the slice remains."""
    resource.ask(_IF_BOOTSTRAPPED % "stop", verbose=True)


def delete(resource: Resource, args: Namespace) -> None:
    """Deletes the slice with the disks of its VMs, if it exists."""
    if resource.state() == ABSENT and not resource.dry_run:
        _LOG.info(f"{resource.name} does not exist")
        return
    resource.delete()


ALL = {
    action.__name__: action
    for action in (create, bootstrap, run, watch, status, logs, stop, delete)
}
OF_A_JOB = ("create", "run", "watch")


def _ready(resource: Resource, args: Namespace) -> jobs.Job:
    """The checked job. Raises UserError if it is wrong, or does not fit the slice."""
    workdir = args.job.workdir
    if "://" in workdir or not workdir.startswith("/"):
        raise UserError(
            f"--workdir={workdir} must be an absolute path on the VMs, such as /mnt/bipe/x of a file "
            "system that all share: an object store cannot be a workdir"
        )
    return machines.ready([args.job], machines.Machines(resource.slice), args.skip_preflight)[0]


def _commit(config: str = "") -> str:
    """The working commit.

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
    path = config and file.find(config)[0]
    if path and not git("ls-files", path):
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
