"""The starts of a run: what each one trains with, and what it changes of the config that it resumes."""

import logging
import math

import jax
import numpy as np

from bipe_jax import collectives, provenance
from bipe_jax.config import Config, differences, to_json
from bipe_jax.training.observing import Observer
from bipe_jax.training.optimizer import learning_rate
from bipe_jax.workdir import Workdir, files

_LOG = logging.getLogger(__name__)

_JUMP = 0.01  # relative change of the learning rate that is told


class Start:
    """A start of a run: WORKDIR/starts/N.json, with its config and provenance.

    All processes make one; the first one writes.

    Args:
      step: the one it resumes from, or 0. before: of the start that made that checkpoint, or None.

    Attributes:
      origin: what the checkpoints of this start say of it: its number, `step` and the provenance.
    """

    def __init__(self, config: Config, workdir: str, step: int, before: dict | None):
        self._config, self._directory = config, Workdir(workdir)
        self._recorded = jax.process_index() != 0

        def make() -> dict:
            number = 1 + max(self._directory.last_start(), before["number"] if before else 0)
            return {"number": number, "step": step, "provenance": provenance.record()}

        self.origin: dict = collectives.of_first_process(make)

    def record(self) -> None:
        """Writes starts/N.json and config.json, once. To be called when a step is complete.

        A start that trains nothing, since all is trained or since it fails before, rewrites nothing.

        Raises:
          OSError: they cannot be written.
        """
        if self._recorded:
            return
        config = to_json(self._config)
        files.set_aside_unless_directory(self._directory.starts)
        files.make_directory(self._directory.starts)
        path = self._directory.start(self.origin["number"])
        files.write_json(path, self.origin | {"config": config})
        files.write_json(self._directory.config, config)
        self._recorded = True


def report_changes(
    before: Config, config: Config, step: int, skipped: int, observer: Observer
) -> None:
    """Logs each field that changes at a resume, with an event, and a jump of the learning rate.

    Args:
      before: of the checkpoint. step: of the checkpoint.
      skipped: updates that were skipped as spikes so far; the schedule does not count them.
    """
    changed = list(differences(before, config))
    for field, old, new in changed:
        _LOG.info(f"config.{field.name}={new!r} from step {step + 1} on; it was {old!r}")
        observer.event("changed", field=field.name, old=old, new=new)
    if not changed:
        return
    updates = step - skipped
    last, expected, now = (
        np.asarray(learning_rate(of)(count)).item()
        for of, count in ((before, updates - 1), (before, updates), (config, updates))
    )
    if not math.isclose(now, expected, rel_tol=_JUMP):
        _LOG.info(
            f"The learning rate was {last:.3g} at step {step}, and is {now:.3g} at step {step + 1}, since "
            "the config has changed"
        )
