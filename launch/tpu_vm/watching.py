"""`watch` creates, bootstraps and runs, again after each preemption; `smoke` does it once, and deletes."""

import contextlib
import logging
import time
from argparse import Namespace

from bipe_jax.errors import UserError
from launch import environment
from launch.tpu_vm import actions, money
from launch.tpu_vm.gcloud import ABSENT, Final, Resource

_LOG = logging.getLogger(__name__)

_POLL = 30.0  # seconds
_MOST = 10  # failures in a row after which `watch` ends
DONE = "done"

# What `smoke` trains: a checkpoint each step, so that there is time to restart it.
SMOKE = ("--config=configs/smoke.py", "--config.steps=20", "--config.checkpoint.every=1")
_RESTARTED = 5  # steps before the restart
_WANTED = "step 20 in 2 starts"


class Ended(Final):
    """The run, or the slice, has ended without being done."""


def watch(resource: Resource, args: Namespace) -> None:
    """Creates, bootstraps and runs, again after each preemption, until the run is done.

    Raises:
      UserError: the run failed, or too many attempts failed in a row.
    """
    Watch(resource, args).run()


class Watch:
    """One run on a slice that is created again when it is preempted.

    Attributes:
      made: whether this watch has requested the slice.
      rented: seconds since the slice was first seen to be active; 0 before.
    """

    def __init__(self, resource: Resource, args: Namespace):
        self._resource, self._args = resource, args
        self._commit = actions.commit_of(args.job.config)
        self._variables = environment.of(args)
        self._job, self._needs = actions.ready(resource, args, self._variables)
        self.made = self._ran = False  # by this watch
        self._active: float | None = None
        money.confirm(resource.slice, args)

    @property
    def rented(self) -> float:
        return 0.0 if self._active is None else time.monotonic() - self._active

    def run(self) -> None:
        """Returns when the run is done. Raises UserError if it fails; see --delete for the slice."""
        try:
            self.until_done()
        except UserError as error:
            if self._args.delete == "always" and (
                isinstance(error, Ended) or (self.made and not self._ran)
            ):
                _LOG.info(f"--delete=always: deleting {self._resource.name}")
                self._resource.delete()
            raise
        if self._args.delete != "never":
            self._resource.delete()
        elif not self._resource.dry_run:
            _LOG.info(
                f"{self._resource.name} still exists, and costs money: delete it (its logs are in "
                f"{self._job.workdir})"
            )

    def until_done(self) -> None:
        """Returns when the run is done, whatever becomes of the slice. Raises UserError if it fails."""
        failures, known = 0, None
        while True:
            try:
                now = self.advance()
                failures = 0
            except Final:
                raise
            except UserError as error:  # a VM may be restarting, the network down
                failures += 1
                if failures == _MOST:
                    raise
                now = f"{error}; trying again"
            if now != known:
                _LOG.info(f"{time.strftime('%F %T')} {self._resource.name}: {now}")
                known = now
            if now == DONE or self._resource.dry_run:
                return
            time.sleep(_POLL)

    def advance(self) -> str:
        """Does the next thing that the state of the slice needs. Returns the state."""
        resource = self._resource
        state = resource.state()
        if state == "FAILED":
            raise Ended(f"{resource.name} is FAILED: see gcloud's describe, and delete it")
        if state == "SUSPENDED":
            resource.delete()
        if state in (ABSENT, "SUSPENDED"):
            self._request()
            state = "requested"
        if state != "ACTIVE" and not resource.dry_run:
            return state
        if self._active is None:
            self._active = time.monotonic()
        states = {state for _, state, _ in actions.ask(resource, "status")}
        if states == {DONE}:
            return DONE
        if "failed" in states and "running" not in states:
            raise Ended(
                f"the run on {resource.name} ended and is not to be restarted: see "
                f"{self._job.workdir}/failed and the logs beside it"
                + ("; the slice still exists, and costs money" * (self._args.delete != "always"))
            )
        # A run that is done on some hosts will soon be done on the others.
        if "running" in states and not states & {"nothing", "stopped"}:
            self._ran = True
            return "running"
        actions.install(resource, self._args, self._commit, self._needs.extras)
        actions.start(resource, self._args, self._job, self._commit, self._variables)
        self._ran = True
        return "started"

    def _request(self) -> None:
        hours = self._args.max_hours
        if hours is not None:
            hours -= self.rented / 3600
            if hours <= 0:
                raise Final(
                    f"{self._resource.name} is gone, and --max-hours={self._args.max_hours:g} are over: "
                    f"{self._job.workdir} has the run as it was saved"
                )
        actions.request(self._resource, self._args, hours)
        self.made = True


class Smoke(Watch):
    """A watch that restarts the run once, when it has trained some steps."""

    _restarted = False

    def advance(self) -> str:
        now = super().advance()
        if now in ("started", "running") and not self._restarted:
            actions.ask(self._resource, f"restart --step={_RESTARTED}", verbose=True)
            self._restarted = True
        return now


def smoke(resource: Resource, args: Namespace) -> None:
    """Rents a slice, trains some steps with a restart, deletes the slice, and shows the bill.

    Raises:
      UserError: the slice exists before, the run did not resume, or anything failed.
    """
    if resource.state() != ABSENT:
        raise UserError(
            f"{resource.name} exists: smoke makes a slice and deletes it: use another name"
        )
    args.max_hours = 1.0 if args.max_hours is None else args.max_hours
    test = Smoke(resource, args)
    try:
        test.until_done()
        for host, _, text in actions.ask(resource, "summary", verbose=True):
            if text != _WANTED:
                raise UserError(f"{host}: {text}, and not {_WANTED}: the run did not resume")
    except UserError:
        with contextlib.suppress(UserError):  # its log goes with the slice
            actions.logs(resource, args)
        raise
    finally:
        if test.made:
            resource.delete()
        _LOG.info(f"The bill: {money.bill(resource.slice, args.price, test.rented)}")
