"""What each word of `python -m launch.tpu_vm` does. All can be repeated."""

import logging
import os
import shlex
import subprocess
import tempfile
import time

from bipe_jax.config import file
from bipe_jax.errors import UserError
from launch import jobs, machines
from launch.tpu_vm.gcloud import ABSENT, Final, Resource

_LOG = logging.getLogger(__name__)

_GONE = ("SUSPENDED", "FAILED")  # by preemption, or for good: only deleting helps
_ON_ITS_WAY = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
_POLL = 30.0  # seconds
_DONE = "done"
_MOST = 10  # failures in a row that `watch` takes
_WORKER = "cd bipe_jax/source && ../venv/bin/python -m launch.tpu_vm.worker"
_IF_THERE = (
    "if [ -e bipe_jax/commit ]; "
    f"then {_WORKER} %s; "
    'else echo "bipe_jax $(hostname) nothing not bootstrapped"; fi'
)


def create(resource: Resource, args) -> None:
    """Asks for the slice, unless it is there."""
    _ready(resource, args)
    _create(resource, args, resource.state())


def _create(resource: Resource, args, state: str) -> None:
    if state in _GONE:
        raise UserError(
            f"{resource.name} is {state} and does not come back by itself: delete it, then create it "
            "again"
        )
    if state != ABSENT:
        _LOG.info(f"{resource.name} is there already: {state}")
        return
    tier = ["--spot"] * args.spot + ["--reserved"] * args.reserved
    resource.create(tier, args.runtime_version, args.extra)


def bootstrap(resource: Resource, args) -> None:
    """Waits until the slice is there; installs the working commit on all its VMs."""
    commit = _commit()
    _wait_until_active(resource)
    _bootstrap(resource, args, commit)


def _bootstrap(resource: Resource, args, commit: str) -> None:
    archive = os.path.join(tempfile.gettempdir(), f"bipe_jax-{commit}.tar.gz")
    jobs.execute(
        ["git", "archive", "--format=tar.gz", f"--output={archive}", commit], resource.dry_run
    )
    resource.copy([archive, os.path.join(os.path.dirname(__file__), "bootstrap.sh")])
    if not resource.dry_run:
        os.remove(archive)
    words = ["bash", "bootstrap.sh", commit, *([args.nfs] if args.nfs else [])]
    resource.ask(shlex.join(words), tell=True)


def run(resource: Resource, args) -> None:
    """Starts the supervisor on all VMs, unless it runs."""
    commit = _commit(args.job.config)
    job = _ready(resource, args)
    _wait_until_active(resource)
    _run(resource, args, job, commit)


def _run(resource: Resource, args, job: jobs.Job, commit: str) -> None:
    hosts = resource.slice.hosts * resource.slice.slices
    words = ["start", f"--workdir={job.workdir}", f"--commit={commit}", f"--hosts={hosts}"]
    words += ["--shared"] if hosts > 1 or args.spot or args.delete else []
    line = shlex.join([*words, "--", *job.arguments()])
    resource.ask(f"{_WORKER} {line}", tell=True)


def watch(resource: Resource, args) -> None:
    """Creates, bootstraps and runs, and again whenever the slice is lost, until the run is done.

    Raises:
      UserError: the run failed, or one thing failed many times in a row.
    """
    commit = _commit(args.job.config)
    job = _ready(resource, args)
    failures, known = 0, None
    while True:
        try:
            now = _look(resource, args, job, commit)
            failures = 0
        except Final:
            raise
        except UserError as error:  # a VM that is restarting, a network that is away
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
        _LOG.info(f"{resource.name} is still there, and paid for: delete it when you have its logs")


def _look(resource: Resource, args, job: jobs.Job, commit: str) -> str:
    """One look at the slice, and what it asks for: how things stand."""
    state = resource.state()
    if state == "FAILED":
        raise Final(f"{resource.name} is FAILED: gcloud's describe says why; delete it")
    if state == "SUSPENDED":
        resource.delete()
    if state in (ABSENT, "SUSPENDED"):
        _create(resource, args, ABSENT)
        state = "asked for"
    if state != "ACTIVE" and not resource.dry_run:
        return state
    states = {state for _, state, _ in resource.ask(_IF_THERE % "status")}
    if states == {_DONE}:
        return _DONE
    if "failed" in states and "running" not in states:
        raise Final(
            f"the run on {resource.name} ended and is not to be started again: see {job.workdir}/failed "
            "and the logs; the slice is still there, and paid for"
        )
    # Where it runs on some hosts and is done on others, it is about to be done.
    if "running" in states and not states & {"nothing", "stopped"}:
        return "running"
    _bootstrap(resource, args, commit)
    _run(resource, args, job, commit)
    return "started"


def status(resource: Resource, args) -> None:
    """The queued resource's state and, if it is there, of each VM whether the run is running."""
    state = resource.state()
    if not resource.dry_run:
        _LOG.info(f"{resource.name}: {state}")
    if state == "ACTIVE" or resource.dry_run:
        resource.ask(_IF_THERE % "status", tell=True)


def logs(resource: Resource, args) -> None:
    """The journal of the service on one VM, or all."""
    follow = " --follow" if args.follow else ""
    command = f"sudo journalctl --unit=bipe_jax --no-pager --lines=200 --output=cat{follow}"
    resource.ssh(command, resource.nodes()[args.node], args.worker)


def stop(resource: Resource, args) -> None:
    """Has the trainer save and end, on all VMs; the slice stays."""
    resource.ask(_IF_THERE % "stop", tell=True)


def delete(resource: Resource, args) -> None:
    """Deletes the slice with the disks of its VMs, unless it is not there."""
    if resource.state() == ABSENT and not resource.dry_run:
        _LOG.info(f"{resource.name} is not there")
        return
    resource.delete()


ALL = {
    action.__name__: action
    for action in (create, bootstrap, run, watch, status, logs, stop, delete)
}
OF_A_JOB = ("create", "run", "watch")


def _ready(resource: Resource, args) -> jobs.Job:
    """The job as it is to be launched. Raises UserError: it is wrong, or does not fit the slice."""
    workdir = args.job.workdir
    if "://" in workdir or not workdir.startswith("/"):
        raise UserError(
            f"--workdir={workdir} must be an absolute path on the VMs, such as /mnt/bipe/x of a file "
            "system that all share: an object store is no workdir"
        )
    return machines.ready([args.job], machines.Machines(resource.slice), args.skip_preflight)[0]


def _commit(config: str = "") -> str:
    """The working commit, which has all changes and the config file.

    Raises:
      UserError: it has not.
    """

    def git(*words):
        done = subprocess.run(["git", *words], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"git {shlex.join(words)}: {' '.join(done.stderr.split())}")
        return done.stdout

    commit = git("rev-parse", "HEAD").strip()
    if changed := git("status", "--porcelain", "--untracked-files=no").splitlines():
        raise UserError(
            f"{changed[0][3:]} is not committed, and what goes to the VMs is a commit: commit it"
        )
    path = config and file.find(config)[0]
    if path and not git("ls-files", path):
        raise UserError(
            f"--config={config}: {path} is not in the repository, and so not on the VMs"
        )
    return commit


def _wait_until_active(resource: Resource) -> None:
    """Raises UserError: it is not there, and will not be."""
    said = None
    while True:
        state = resource.state()
        if state == "ACTIVE" or resource.dry_run:
            return
        if state not in _ON_ITS_WAY:
            raise UserError(
                f"{resource.name} is {state}: create it first (delete it before, if SUSPENDED)"
            )
        if state != said:
            _LOG.info(f"{resource.name} is {state}: waiting")
            said = state
        time.sleep(_POLL)
