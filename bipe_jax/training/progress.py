"""The bookkeeping of the training loop: the current step, steps in flight, and what is due."""

import collections
import dataclasses
from collections.abc import Iterator

from bipe_jax.config import Config


@dataclasses.dataclass
class Step:
    """A step in flight: it was dispatched, and its metrics have not been read.

    Attributes:
      number: from 1. batch: its NumPy arrays (B, L).
      values: its metrics, on the devices.
      evaluation: rows of `evaluation.periodic` after the step; None if it was not evaluated.
    """

    number: int
    batch: dict
    values: dict
    evaluation: list[dict] | None = None


class Progress:
    """The progress of a training.

    The metrics of a step are read after the next step is dispatched, so that the devices never wait for
    the host, but before a save, so that no spike is saved.

    Args:
      step: of the state. target: the step to train to. rewinds: so far.

    Attributes:
      step: of the state: the last step that was dispatched.
      rewinds: how often the run was rewound to a checkpoint after a spike.
      dispatches: steps that this process has dispatched, including those before a rewind.
      stopping: whether a signal asked the run to stop after this step.
    """

    def __init__(self, config: Config, step: int, target: int, rewinds: int):
        self._config, self._target = config, target
        self.step, self.rewinds = step, rewinds
        self.dispatches, self.stopping = 0, False
        self._in_flight: collections.deque[Step] = collections.deque()

    @property
    def ended(self) -> bool:
        """Whether no further step is to be dispatched."""
        return self.step >= self._target or self.stopping

    @property
    def done(self) -> bool:
        """Whether all steps of the config are trained."""
        return self.step == self._config.steps

    @property
    def evaluation_is_due(self) -> bool:
        """Whether to evaluate after this step; never while stopping, when there is little time."""
        every = self._config.evaluation.every
        return bool(every) and (self.step % every == 0 or self.done) and not self.stopping

    @property
    def save_is_due(self) -> bool:
        """Whether to save after this step."""
        return self.step % self._config.checkpoint.every == 0 or self.ended

    def log_is_full(self, step: Step) -> bool:
        """Whether to log all metrics of a step, and not only its loss."""
        return (
            step.number % self._config.log.every == 0
            or step.number == self._target
            or step.evaluation is not None
        )

    def dispatched(self, batch: dict, values: dict) -> None:
        """Records that the next step was dispatched."""
        self.step += 1
        self.dispatches += 1
        self._in_flight.append(Step(self.step, batch, values))

    def evaluated(self, rows: list[dict]) -> None:
        """Records the evaluation after the last step that was dispatched."""
        self._in_flight[-1].evaluation = rows

    def to_read(self, newest: bool) -> Iterator[Step]:
        """Yields the steps in flight whose metrics are to be read now, with or without the newest."""
        while len(self._in_flight) > (0 if newest else 1):
            yield self._in_flight.popleft()

    def rewound(self, step: int) -> None:
        """Records that the run was rewound to a step; steps in flight are dropped."""
        self.step, self.rewinds = step, self.rewinds + 1
        self._in_flight.clear()
