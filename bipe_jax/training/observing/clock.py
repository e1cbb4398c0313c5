"""Wall time of a process by phase: every second since its start belongs to one phase.

A second in which a step was running on the devices is `step`, whatever the host did meanwhile: a wait
for data during a step costs nothing. Any other second belongs to the phase of the host. Until the first
step, which compiles, is complete, every second is `starting`.
"""

import math
from collections import deque

# starting: imports, restoring, compiling, the first step. data: the devices waited for a batch.
# saving: the blocking part of a save. evaluating: during training, and at the end.
# other: writing metrics and traces.
PHASES: tuple[str, ...] = ("starting", "step", "data", "saving", "evaluating", "other")

# What the host does before its first step is complete. import: until the training is called, joining the
# other processes included. restore: or initialising. compile: the call of the first step.
STARTING: tuple[str, ...] = ("import", "tokenizer", "data", "restore", "compile")


class Clock:
    """Seconds by phase. Callers pass the times, in seconds and in order."""

    def __init__(self, since: float):
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._starting = dict.fromkeys(STARTING, 0.0)
        self._until = since  # time before is counted in `_seconds`
        self._entered = deque([("import", since)])  # phases of the host, from `_until` on
        self._dispatched = deque()  # when the steps in flight were dispatched
        self.started = False  # whether the first step is complete

    def enter(self, phase: str, now: float) -> None:
        """Records that the host enters a phase."""
        # A run without steps to train evaluates too; its start ends here.
        if phase == "evaluating" and not self._dispatched:
            self._account(now)
            self.started = True
        self._entered.append((phase, now))

    def dispatched(self, now: float) -> None:
        """Records that a step was dispatched, which runs as soon as the previous one is complete."""
        self._dispatched.append(now)

    def completed(self, at: float) -> None:
        """Records the time at which the oldest step in flight was complete."""
        self._account(self._dispatched.popleft())
        self._add("step", at)
        self.started = True

    def starting(self) -> dict[str, float]:
        """Seconds of "starting" by what the host did; the rest of it is the first step, and anything else."""
        return {name: round(spent, 6) for name, spent in self._starting.items()}

    @property
    def running(self) -> int:
        """The number of steps in flight."""
        return len(self._dispatched)

    def accounted(self) -> dict[str, float]:
        """Seconds by phase until the last step was complete."""
        return dict(self._seconds)

    def seconds(self, now: float) -> dict[str, float]:
        """Seconds by phase, whose sum is the time since the start. A step in flight counts as `step`."""
        copy = Clock(0.0)
        copy._seconds, copy._until = dict(self._seconds), self._until
        copy._entered, copy.started = deque(self._entered), self.started
        if self._dispatched:
            copy._account(self._dispatched[0])
            copy._add("step", now)
        copy._account(now)
        return {phase: round(spent, 6) for phase, spent in copy._seconds.items()}

    def _account(self, until: float) -> None:
        """Adds the time until `until` to the phases of the host."""
        while self._until < until:
            phase = self._entered[0][0]
            ends = self._entered[1][1] if len(self._entered) > 1 else math.inf
            if ends <= self._until:
                self._entered.popleft()
            else:
                self._add(phase, min(ends, until))

    def _add(self, phase: str, until: float) -> None:
        if until > self._until:
            self._seconds[phase if self.started else "starting"] += until - self._until
            if not self.started and phase in self._starting:
                self._starting[phase] += until - self._until
            self._until = until
