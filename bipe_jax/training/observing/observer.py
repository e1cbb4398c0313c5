"""The object to which the trainer reports its progress."""

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable

import jax

from bipe_jax.errors import PREEMPTED
from bipe_jax.training.observing.clock import PHASES, Clock
from bipe_jax.training.observing.heartbeat_writer import HeartbeatWriter
from bipe_jax.training.observing.slow import SlowSteps
from bipe_jax.training.observing.trace import Trace
from bipe_jax.workdir import Workdir, events, files, heartbeat

_LOG = logging.getLogger(__name__)

_BEAT = 2.0  # seconds between heartbeats in one phase, at least
_OF_A_STEP = ("data", "step", "other")  # phases that make up a step's time


def process_start() -> float:
    """The Unix time at which this process started; the current time if the system does not provide it."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])  # since boot
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()
    return time.time() - max(age, 0.0)


class Observer:
    """Writes WORKDIR/events.jsonl, heartbeat.json and profile/, and computes the metrics of time.

    Process 0 writes; the others write only their traces. A file that cannot be written does not end the
    training. A context manager: an exception that leaves it is the reason why the run ended.

    Args:
      since: Unix time at which the process started; None: now.
      profile: first and last step to trace, see `trace.parse`.
    """

    def __init__(self, since: float | None = None, profile: tuple[int, int] | None = None):
        self._offset = time.time() - time.monotonic()
        self._since = self._now() if since is None else since
        self._profile = profile
        self._trace: Trace | None = None
        self._workdir: str | None = None
        self._heart: HeartbeatWriter | None = None
        self._clock, self._phase = Clock(self._since), "other"
        self._completions = _Completions(self._now)
        self._step: int | None = None
        self._end: str | None = None
        self._before = self._reported = dict.fromkeys(PHASES, 0.0)
        self._slow, self._slow_count = SlowSteps(), 0
        self._slowest: dict | None = None
        self._last_beat = ("", 0.0)
        self._enter("other")

    def open(self, workdir: str) -> None:
        """Starts to write into the workdir, which exists."""
        self._trace = Trace(self._profile, workdir)
        if jax.process_index() != 0:
            return
        self._workdir = workdir
        for path in (Workdir(workdir).events, Workdir(workdir).heartbeat):
            files.set_aside_unless_file(path)
        # `before`: the last heartbeat of the previous process, which may have been killed.
        self.event("started", pid=os.getpid(), host=_host(), before=heartbeat.read(workdir))
        self._heart = HeartbeatWriter(workdir)
        self._beat()

    @contextlib.contextmanager
    def phase(self, name: str):
        """A context whose time belongs to a phase, except while a step is running on the devices."""
        outer = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def step(self, number: int, function: Callable, *args):
        """Dispatches a train step: (state, values) = function(*args)."""
        assert self._trace is not None
        if self._step is None:
            self._step = number - 1
            self.event("training")
        self._trace.before(number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            if self._clock.started or self._clock.running:
                self._clock.dispatched(self._now())
                state, values = function(*args)
            else:  # the call compiles
                with self.phase("compile"):
                    state, values = function(*args)
                self._clock.dispatched(self._now())
        self._completions.follow(values)
        return state, values

    def complete(self, number: int, values: dict) -> dict:
        """Waits for the oldest step in flight. Returns its values, on the host."""
        assert self._trace is not None
        values = jax.device_get(values)
        first = not self._clock.started
        self._clock.completed(self._completions.next())
        self._step = number
        seconds = self._clock.accounted()
        if first:
            self.event("first_step", starting=self._clock.starting())
        elif slow := self._slow.judge({p: seconds[p] - self._before[p] for p in _OF_A_STEP}):
            self._slow_count += 1
            if self._slowest is None or slow["took"] > self._slowest["took"]:
                self._slowest = {"step": number} | slow
        self._before = seconds
        self._trace.after(number)
        self._beat()
        return values

    @contextlib.contextmanager
    def saving(self):
        """The phase of a save, and its event: a later start may resume from its step."""
        with self.phase("saving"):
            yield
        self.event("saving")

    def rewound(self, step: int) -> None:
        """Records that the run was rewound to an earlier step."""
        self._drain()
        self.event("rewound", to=step)
        self._step = step

    def preempted(self) -> None:
        """Records that the run ends before its last step, to be resumed."""
        self._end = "preempted"

    def event(self, name: str, **more) -> None:
        """Adds an event to events.jsonl, see `events`."""
        if self._workdir is None:
            return
        now = self._now()
        event = {"event": name, "time": now, "since": self._since, "step": self._step}
        try:
            events.append(self._workdir, event | {"seconds": self._clock.seconds(now)} | more)
        except OSError as error:
            _LOG.info(f"{Workdir(self._workdir).events} cannot be written ({error.strerror})")

    def report(self) -> dict:
        """Metrics for the full lines of metrics.jsonl; docs/reference/observing.md describes each.

        The slowest of the slow steps since the last line becomes an event.
        """
        seconds = self._clock.accounted()
        passed = {phase: seconds[phase] - self._reported[phase] for phase in PHASES}
        total = max(sum(passed.values()), 1e-9)
        values = {"goodput": seconds["step"] / sum(seconds.values())}
        values |= {f"time/{phase}": part / total for phase, part in passed.items()}
        values["slow_steps"] = self._slow_count
        if self._slowest:
            values |= {f"slow/{name}": value for name, value in self._slowest.items()}
            self.event("slow", slow=self._slowest)
        self._reported, self._slowest = seconds, None
        return values | memory(jax.local_devices())

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if self._trace:
            self._trace.close()
        self._completions.close()
        if isinstance(error, SystemExit) and error.code == PREEMPTED:
            self.preempted()
        elif error is not None:
            self._end = "failed"
        self._end = self._end or "done"
        if self._end == "failed":
            self.event("failed", reason=f"{kind.__name__}: {' '.join(str(error).split())[:300]}")
        else:
            self.event(self._end)
        if self._heart:
            self._beat()
            self._heart.close()

    def _now(self) -> float:
        """The Unix time, unmoved by adjustments of the system's clock."""
        return time.monotonic() + self._offset

    def _enter(self, phase: str) -> None:
        self._clock.enter(phase, self._now())
        self._phase = phase
        self._beat()

    def _drain(self) -> None:
        """Waits for the steps in flight, whose values are not read."""
        while self._clock.running:
            self._clock.completed(self._completions.next())

    def _beat(self) -> None:
        if self._heart is None:
            return
        now, (last_phase, last_beat) = self._now(), self._last_beat
        if self._end:
            phase = self._end
        elif not self._clock.started:
            phase = "starting"
        else:
            own = ("starting", "saving", "evaluating")
            phase = self._phase if self._phase in own else "training"
        if phase == last_phase and now < last_beat + _BEAT:
            return
        self._last_beat = (phase, now)
        content = {"time": now, "step": self._step, "phase": phase}
        content |= {"pid": os.getpid(), "host": _host(), "since": self._since}
        content |= {"seconds": self._clock.seconds(now), "step_seconds": self._slow.median()}
        self._heart.beat(content)


class _Completions:
    """A thread that records when steps are complete, whatever the host waits for."""

    def __init__(self, now):
        self._now = now
        self._running, self._times = queue.SimpleQueue(), queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="completions")
        self._thread.start()

    def follow(self, values) -> None:
        self._running.put(values)

    def next(self) -> float:
        """Waits for the oldest step in flight. Returns the Unix time at which it was complete."""
        return self._times.get()

    def close(self) -> None:
        self._running.put(None)
        self._thread.join(1.0)  # the devices may hang

    def _work(self) -> None:
        while (values := self._running.get()) is not None:
            with contextlib.suppress(Exception):  # raised where the values are used
                jax.block_until_ready(values)
            self._times.put(self._now())
            values = None


def memory(devices) -> dict:
    """Bytes in use, at the peak and at most, of the fullest device; {} if the platform counts none."""
    stats = [stats for device in devices if (stats := device.memory_stats())]
    names = {"bytes_in_use": "in_use", "peak_bytes_in_use": "peak", "bytes_limit": "limit"}
    return {
        f"memory/{ours}": max(s[theirs] for s in stats)
        for theirs, ours in names.items()
        if stats and all(theirs in s for s in stats)
    }


def _host() -> str:
    return socket.gethostname()
