"""Runs the points of a sweep on this machine, some at a time, and shows their states.

A run's output goes to WORKDIR/log.txt. The run holds a lock on that file while it lives, so that no other
sweep starts it a second time, even after this program was killed.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from bipe_jax.errors import DONE, PREEMPTED, USER_ERROR, UserError
from bipe_jax.workdir import Workdir, files, heartbeat
from launch import jobs, restart
from launch.points import Checked, finished, record
from launch.table import Table

_LOG = logging.getLogger(__name__)

_PAUSE = 0.2  # seconds between polls of the runs
_CLEARING = 2.0  # seconds


class Run:
    """A point with a state: "waiting", "running", "stopping", "done", "stopped", "failed", "done before"."""

    def __init__(self, point: Checked):
        self.name, self.workdir = point.job.name, point.job.workdir
        self.steps = point.config.steps
        self.state = "done before" if finished(self.workdir, point.config) else "waiting"
        self.why = ""  # of a failure or a restart
        self._line = [sys.executable, *jobs.TRAIN[1:], *point.job.arguments()]
        self._process: subprocess.Popen | None = None
        self._began, self._took = 0.0, 0.0

    @property
    def alive(self) -> bool:
        return self._process is not None

    @property
    def elapsed(self) -> float:
        """Seconds of the run under this program."""
        return self._took + (time.monotonic() - self._began if self.alive else 0)

    @property
    def shown(self) -> str:
        """The state or, with a heartbeat, the phase."""
        beat = heartbeat.read_alive(self.workdir) if self.state == "running" else None
        mine = beat and self._process and beat.get("pid") == self._process.pid
        return beat["phase"] if beat and mine else self.state

    @property
    def log(self) -> str:
        return Workdir(self.workdir).log

    def locked(self) -> contextlib.AbstractContextManager[int]:
        """A context with the run's log locked: its descriptor. Raises UserError if a process holds it."""
        refusal = (
            f"{self.workdir} is being trained by another process (another sweep?): wait for it, or stop "
            "it; nothing was launched"
        )
        return files.locked(self.log, refusal)

    def start(self) -> None:
        try:
            with self.locked() as log:
                # In a session of its own Ctrl-C does not reach it; the sweep passes SIGTERM on.
                self._process = subprocess.Popen(
                    self._line,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except (OSError, UserError) as error:  # of this directory; the other runs continue
            self.state, self.why = "failed", str(error)
            return
        self._began, self.state = time.monotonic(), "running"

    def signal(self, number: int) -> None:
        if self._process:
            self._process.send_signal(number)
            self.state = "stopping"

    def poll(self) -> None:
        """Updates the state if the process has ended, and restarts it by the rule of `restart`."""
        if self._process is None or (code := self._process.poll()) is None:
            return
        _clear(self._process.pid)
        self._took, self._process = self.elapsed, None
        if code == DONE:
            self.state, self.why = "done", ""
        elif self.state == "stopping":
            self.state = "stopped"
        else:
            again, self.why = restart.decide(self.workdir, code)
            if again:
                self.start()
            else:
                self.state = "failed"


def _clear(group: int) -> None:
    """Kills child processes that remain after a process ended, since they would hold the lock."""
    end = time.monotonic() + _CLEARING
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:  # until init has reaped them
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.01)


def run(points: Sequence[Checked], at_once: int) -> int:
    """Runs unfinished points; a run that fails does not stop the others.

    SIGINT, SIGTERM and SIGHUP are passed on as SIGTERM, and the runs save before they end. A second SIGINT
    kills them.

    Returns:
      The exit status: 0 if all points are done, 1 if some failed, 42 if it was stopped.

    Raises:
      UserError: a directory cannot be written, or its run is alive; nothing was launched.
    """
    runs = [Run(point) for point in points]
    for run in runs:
        beat = heartbeat.read_alive(run.workdir)
        if beat and beat.get("host") != socket.gethostname():  # the lock may be only of this host
            raise UserError(
                f"{run.workdir} is being trained on {beat.get('host')} ({beat['phase']}); if that process is "
                "dead, remove its heartbeat.json; nothing was launched"
            )
    for run, point in zip(runs, points, strict=True):
        record(run.workdir, point.config)
        with run.locked():
            pass
    table = Table(runs)
    interrupts: list[int] = []
    with _handling(interrupts.append):
        try:
            _loop(runs, at_once, interrupts, table)
        finally:
            for run in runs:
                run.signal(signal.SIGTERM)  # some are alive only after an error here
    return _summarise(runs, stopped=bool(interrupts))


def _loop(runs: Sequence[Run], at_once: int, interrupts: list[int], table: Table) -> None:
    passed_on = 0
    while True:
        for run in runs:
            run.poll()
        if len(interrupts) > passed_on:
            again = interrupts[-1] == signal.SIGINT and interrupts.count(signal.SIGINT) > 1
            passed_on = len(interrupts)
            for run in runs:
                run.signal(signal.SIGKILL if again else signal.SIGTERM)
            table.note(
                "killing the runs" if again else "waiting for the runs to save; Ctrl-C kills them"
            )
        waiting = [run for run in runs if run.state == "waiting"]
        alive = sum(run.alive for run in runs)
        if not interrupts:
            for run in waiting[: at_once - alive]:
                run.start()
        table.show()
        if not alive and (interrupts or not waiting):
            return
        time.sleep(_PAUSE)


@contextlib.contextmanager
def _handling(handle) -> Iterator[None]:
    """A context that calls handle(number) for signals that end the sweep, unless ignored (nohup)."""
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, lambda number, _: handle(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summarise(runs: Sequence[Run], stopped: bool) -> int:
    """Logs failures and unfinished points, and returns the exit status."""
    for run in runs:
        if run.state == "failed":
            _LOG.info(f"failed: {run.name}: {run.why} (see {run.log})")
    done = sum(run.state.startswith("done") for run in runs)
    failed = sum(run.state == "failed" for run in runs)
    left = len(runs) - done - failed
    _LOG.info(f"{done} of {len(runs)} points are done, {failed} failed, {left} are left")
    if failed or left:
        _LOG.info("The same command resumes the points that are not done")
    return PREEMPTED if stopped and left else USER_ERROR if failed else DONE
