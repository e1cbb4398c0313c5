"""The bookkeeping of the training loop: which step, what is in flight, and what is due after it."""

import collections
import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass
class Step:
    """A step that was dispatched, and whose metrics have not been read.

    Attributes:
      number: from 1. batch: what it was trained on, NumPy arrays (B, L).
      values: its metrics, on the devices.
      evaluation: rows of `evaluation.periodic`, of the parameters after it; None if it had none.
    """

    number: int
    batch: dict
    values: dict
    evaluation: list[dict] | None = None


class Progress:
    """Where a training stands.

    A step is first dispatched and later complete. Its metrics are read after the next step is dispatched,
    so that the devices never wait for the host; but before a save, so that no spike is saved.

    Args:
      config: says what is due when. step: of the state. target: the step to train to.
      rewinds: how often the run has gone back so far.

    Attributes:
      step: of the state: the last step that was dispatched.
      rewinds: how often the run has gone back to a checkpoint after a spike.
      dispatches: steps that this process has dispatched, those before a rewind too.
      stopping: whether the run is to stop after this step, since it was asked to.
    """

    def __init__(self, config, step: int, target: int, rewinds: int = 0):
        self._config, self._target = config, target
        self.step, self.rewinds = step, rewinds
        self.dispatches, self.stopping = 0, False
        self._in_flight: collections.deque[Step] = collections.deque()

    @property
    def ended(self) -> bool:
        """Whether no more step is to be dispatched."""
        return self.step >= self._target or self.stopping

    @property
    def done(self) -> bool:
        """Whether all steps of the config are trained."""
        return self.step == self._config.steps

    @property
    def evaluation_is_due(self) -> bool:
        """After this step; never when the run is asked to stop, since it has little time then."""
        every = self._config.evaluation.every
        return bool(every) and (self.step % every == 0 or self.done) and not self.stopping

    @property
    def save_is_due(self) -> bool:
        """After this step."""
        return self.step % self._config.checkpoint.every == 0 or self.ended

    def log_is_full(self, step: Step) -> bool:
        """Whether the log has all metrics of a step, and not its loss alone."""
        return (
            step.number % self._config.log.every == 0
            or step.number == self._target
            or step.evaluation is not None
        )

    def dispatched(self, batch: dict, values: dict) -> None:
        """The next step was dispatched."""
        self.step += 1
        self.dispatches += 1
        self._in_flight.append(Step(self.step, batch, values))

    def evaluated(self, rows: list[dict]) -> None:
        """The parameters after the step that was dispatched last were evaluated."""
        self._in_flight[-1].evaluation = rows

    def to_read(self, newest: bool) -> Iterator[Step]:
        """Yields the steps whose metrics are to be read now, in order; the newest one if asked."""
        while len(self._in_flight) > (0 if newest else 1):
            yield self._in_flight.popleft()

    def rewound(self, step: int) -> None:
        """The run has gone back to a checkpoint, of that step: those in flight do not count."""
        self.step, self.rewinds = step, self.rewinds + 1
        self._in_flight.clear()
