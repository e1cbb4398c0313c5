"""The progress bar of a training."""

import logging
import sys

import tqdm

_LOG = logging.getLogger(__name__)

_PAUSE = 10  # seconds between lines of the bar in a file


class ProgressBar:
    """A bar on a terminal; elsewhere, as in the log of a job, a line every 10 seconds.

    Args:
      steps: of the whole run. done: those before this start.
    """

    def __init__(self, steps: int, done: int):
        terminal = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=steps,
            initial=done,
            unit="step",
            file=None if terminal else _Lines(),
            dynamic_ncols=terminal,
            mininterval=1 if terminal else _PAUSE,
        )

    def advance(self) -> None:
        """Counts one more step."""
        self._bar.update(1)

    def show(self, text: str) -> None:
        """Shows a text after the bar from now on."""
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """A file for tqdm that logs each refresh as a line of its own."""

    def write(self, text: str) -> None:
        if text := text.strip():
            _LOG.info(text)

    def flush(self) -> None:
        pass
