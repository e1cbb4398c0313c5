"""Traces of some steps for TensorBoard's profiler and Perfetto: --profile=10:15."""

import contextlib
import logging
import os
import re

import jax

from bipe_jax.errors import UserError
from bipe_jax.workdir import Workdir, bucket

_LOG = logging.getLogger(__name__)


def parse(text: str | None, last: int) -> tuple[int, int] | None:
    """The numbers of the first and last step of --profile=FIRST:LAST; None for None.

    Args:
      last: the last step of the run.

    Raises:
      UserError: the text is malformed, or a step is beyond the run.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise UserError(f"--profile={text} must be FIRST:LAST, two numbers of steps such as 10:15")
    steps = int(match[1]), int(match[2])
    if not 1 <= steps[0] <= steps[1]:
        raise UserError(f"--profile={text} must go from a step, 1 or later, to the same or a later")
    if steps[1] > last:
        raise UserError(f"--profile={text} reaches beyond the last step, {last}")
    return steps


class Trace:
    """Traces steps into WORKDIR/profile; each process traces its own devices.

    A failure is logged, and the training continues.

    Args:
      steps: see `parse`. Those that were trained before are skipped.

    Raises:
      UserError: the workdir is in a bucket, where JAX writes no traces.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: str):
        if steps and bucket.holds(workdir):
            raise UserError(f"--profile needs a local --workdir, which {workdir} is not")
        self._steps, self._running = steps, False
        self._directory = os.path.join(Workdir(workdir).profile, f"process_{jax.process_index()}")

    def before(self, number: int) -> None:
        """Starts the trace before step `number` is dispatched, if it is due."""
        if self._steps and not self._running and self._steps[0] <= number <= self._steps[1]:
            with self._failures_logged():
                jax.profiler.start_trace(self._directory)
                self._running = True

    def after(self, number: int) -> None:
        """Ends the trace after step `number` is complete, if it is due."""
        if self._running and self._steps and number >= self._steps[1]:
            self.close()
            _LOG.info(f"The trace of the steps until {number} is in {self._directory}")

    def close(self) -> None:
        if self._running:
            self._running, self._steps = False, None
            with self._failures_logged():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _failures_logged(self):
        try:
            yield
        except Exception as error:  # of the profiler or the file system
            self._steps = None
            _LOG.info(
                f"--profile: {' '.join(str(error).split())[:300]}; continuing without a trace"
            )
