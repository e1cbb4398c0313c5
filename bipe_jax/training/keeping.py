"""Which checkpoints of a run are kept besides the latest: one every so many steps, and the best."""

import math
from collections.abc import Iterable

from bipe_jax.config import Config
from bipe_jax.evaluation import periodic
from bipe_jax.workdir import metrics


class Keeping:
    """Chooses them among the checkpoints that there are.

    The best has the lowest held-out loss at the training length, the mean over the sets; an earlier start
    of the run has left it in metrics.jsonl.
    """

    def __init__(self, config: Config, workdir: str):
        self._every, self._best = config.checkpoint.keep_every, config.checkpoint.keep_best
        self._ending = f"/{config.sequence_length}/loss"
        self._losses: dict[int, float] = {}
        if self._best:
            for values in metrics.evaluations(workdir):
                self._add(values["step"], values)

    def evaluated(self, step: int, rows: list[dict]) -> None:
        """Takes the evaluation after a step, as `evaluation.periodic` gives it."""
        self._add(step, periodic.metrics(rows))

    def _add(self, step: int, values: dict) -> None:
        losses = [
            value
            for name, value in values.items()
            if name.startswith("evaluation/") and name.endswith(self._ending)
        ]
        finite = [loss for loss in losses if isinstance(loss, int | float) and math.isfinite(loss)]
        if finite and len(finite) == len(losses):
            self._losses[step] = sum(finite) / len(finite)
        else:
            self._losses.pop(step, None)

    def __call__(self, steps: Iterable[int]) -> set[int]:
        """The steps of those that are kept; of equally good ones the first."""
        steps = sorted(steps)
        kept = {step for step in steps if self._every and step % self._every == 0}
        known = [step for step in steps if step in self._losses]
        if self._best and known:
            kept.add(min(known, key=self._losses.__getitem__))
        return kept
