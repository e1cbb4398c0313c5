"""Traces of some steps for TensorBoard's profiler and Perfetto: --profile=10:15."""

import contextlib
import logging
import os
import re

import jax

from bipe_jax.errors import UserError
from bipe_jax.workdir import Workdir

_LOG = logging.getLogger(__name__)


def parse(text: str | None, last: int) -> tuple[int, int] | None:
    """--profile=FIRST:LAST as the numbers of the first and the last step; None for None.

    Args:
      last: step of the run.

    Raises:
      UserError: it is malformed, or reaches beyond the run.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found:
        raise UserError(f"--profile={text} must be FIRST:LAST, two numbers of steps such as 10:15")
    steps = int(found[1]), int(found[2])
    if not 1 <= steps[0] <= steps[1]:
        raise UserError(f"--profile={text} must go from a step, 1 or later, to the same or a later")
    if steps[1] > last:
        raise UserError(f"--profile={text} reaches beyond the last step, {last}")
    return steps


class Trace:
    """Traces the steps from the first to the last into WORKDIR/profile, each process its own devices.

    What fails is said, and the training goes on.

    Args:
      steps: see `parse`. Those that were made before this process are left out.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: str):
        self._steps, self._running = steps, False
        self._directory = os.path.join(Workdir(workdir).profile, f"process_{jax.process_index()}")

    def before(self, number: int) -> None:
        """Step `number` is about to be dispatched."""
        if self._steps and not self._running and self._steps[0] <= number <= self._steps[1]:
            with self._explained():
                jax.profiler.start_trace(self._directory)
                self._running = True

    def after(self, number: int) -> None:
        """Step `number` is complete."""
        if self._running and number >= self._steps[1]:
            self.close()
            _LOG.info(f"The trace of the steps until {number} is in {self._directory}")

    def close(self) -> None:
        if self._running:
            self._running, self._steps = False, None
            with self._explained():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except Exception as error:  # of the profiler, or the file system below it
            self._steps = None
            _LOG.info(f"--profile: {' '.join(str(error).split())[:300]}; going on without a trace")
