"""Runs the points of a sweep on this machine, some at a time, and shows their states.

Where there are several NVIDIA GPUs, runs at the same time have an equal number each, by CUDA_VISIBLE_DEVICES.
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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from bipe_jax.errors import DONE, PREEMPTED, USER_ERROR, UserError
from bipe_jax.workdir import Workdir, files, heartbeat, outputs
from launch import jobs, restart
from launch.points import Checked, finished, record
from launch.table import Table

_LOG = logging.getLogger(__name__)

_PAUSE = 0.2  # seconds between polls of the runs
_CLEARING = 2.0  # seconds


class Run:
    """A point with a state: "waiting", "running", "stopping", "done", "stopped", "failed", "done before".

    Or "elsewhere": another process trains it.

    Attributes:
      devices: that it may use, as CUDA_VISIBLE_DEVICES names them; None: all.
    """

    def __init__(self, point: Checked, variables: Mapping[str, str] | None = None):
        self.name, self.workdir = point.job.name, point.job.workdir
        self.steps = point.config.steps
        self.state = "done before" if finished(self.workdir, point.config) else "waiting"
        self.why = ""  # of a failure or a restart
        self._line = [sys.executable, *jobs.TRAIN[1:], *point.job.arguments()]
        self._variables = variables or {}
        self.devices: str | None = None
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
        refusal = "another process trains it (another sweep?): wait for it, or stop it"
        files.set_aside_unless_file(self.log)
        return files.locked(self.log, refusal)

    def start(self) -> None:
        environment = os.environ | self._variables
        if self.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices
        try:
            with self.locked() as log:
                # In a session of its own Ctrl-C does not reach it; the sweep passes SIGTERM on.
                self._process = subprocess.Popen(
                    self._line,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=environment,
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


def gpus() -> list[str]:
    """The NVIDIA GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them; [] without any."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    try:
        line = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
        done = subprocess.run(line, capture_output=True, text=True)
    except OSError:
        return []
    return done.stdout.split() if done.returncode == 0 else []


def shares(devices: Sequence[str], at_once: int) -> list[str | None]:
    """The devices of each of the runs at a time: equally many, or all for each where there is one or none.

    Raises:
      UserError: there are fewer devices than runs.
    """
    if at_once == 1 or len(devices) < 2:
        return [None] * at_once
    if at_once > len(devices):
        raise UserError(
            f"--jobs={at_once}: there are {len(devices)} GPUs, and a run takes at least one: use at most "
            f"--jobs={len(devices)}"
        )
    size = len(devices) // at_once
    return [",".join(devices[i * size : (i + 1) * size]) for i in range(at_once)]


def run(points: Sequence[Checked], at_once: int, variables: Mapping[str, str]) -> int:
    """Runs unfinished points; a run that fails, or that another process trains, does not stop the others.

    SIGINT, SIGTERM and SIGHUP are passed on as SIGTERM, and the runs save before they end. A second SIGINT
    kills them.

    Args:
      variables: of the environment of the runs, besides this one's.

    Returns:
      The exit status: 0 if all points are done, 1 if some failed or are trained by others, 42 if it was
      stopped.

    Raises:
      UserError: a directory cannot be written, or there are too few devices; nothing was launched.
    """
    free = shares(gpus() if at_once > 1 else [], at_once)
    runs = [Run(point, variables) for point in points]
    for run, point in zip(runs, points, strict=True):
        record(run.workdir, point.config)
        beat = heartbeat.read_alive(run.workdir)
        if beat and beat.get("host") != socket.gethostname():  # the lock may be only of this host
            run.state = "elsewhere"
            run.why = (
                f"it is being trained on {beat.get('host')} ({beat['phase']}); if that process is dead, "
                f"remove {Workdir(run.workdir).heartbeat}"
            )
            continue
        with outputs.writing(run.log):
            try:
                with run.locked():
                    pass
            except UserError as error:
                run.state, run.why = "elsewhere", str(error)
    table = Table(runs)
    interrupts: list[int] = []
    with _handling(interrupts.append):
        try:
            _loop(runs, free, interrupts, table)
        finally:
            for run in runs:
                run.signal(signal.SIGTERM)  # some are alive only after an error here
    return _summarise(runs, stopped=bool(interrupts))


def _loop(
    runs: Sequence[Run], devices: Sequence[str | None], interrupts: list[int], table: Table
) -> None:
    """Runs as many at a time as there are entries of `devices`, each with one of them."""
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
        alive = [run for run in runs if run.alive]
        free = list((Counter(devices) - Counter(run.devices for run in alive)).elements())
        if not interrupts:
            for run, run.devices in zip(waiting, free, strict=False):
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
        if run.state in ("failed", "elsewhere"):
            _LOG.info(f"{run.state}: {run.name}: {run.why} (see {run.log})")
    done = sum(run.state.startswith("done") for run in runs)
    failed = sum(run.state == "failed" for run in runs)
    elsewhere = sum(run.state == "elsewhere" for run in runs)
    left = len(runs) - done - failed
    _LOG.info(f"{done} of {len(runs)} points are done, {failed} failed, {left} are left")
    if failed or left:
        _LOG.info("The same command resumes the points that are not done")
    return PREEMPTED if stopped and left else USER_ERROR if failed or elsewhere else DONE
