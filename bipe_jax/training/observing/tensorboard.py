"""What TensorBoard shows of a run."""

import logging
from collections.abc import Callable

from bipe_jax.training.observing.event_file import EventFile
from bipe_jax.workdir import files

_LOG = logging.getLogger(__name__)


class TensorBoard:
    """Writes scalars to a new file in one directory.

    If the directory or its file cannot be written, that is logged and the training continues without
    TensorBoard.

    Args:
      directory: made if it does not exist.
      purge_step: TensorBoard drops the records of this step and later ones in earlier files.
    """

    def __init__(self, directory: str, purge_step: int):
        self._directory = directory
        self._events: EventFile | None = None
        files.set_aside_unless_directory(directory)
        try:
            files.make_directory(directory)
            self._events = EventFile(directory)
        except OSError as error:
            self._give_up(error)
        self._write(lambda events: events.start(purge_step))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes the scalars of a step."""
        self._write(lambda events: events.scalars(step, values))

    def close(self) -> None:
        self._write(EventFile.close)
        self._events = None

    def _write(self, write: Callable[[EventFile], None]) -> None:
        if self._events:
            try:
                write(self._events)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._events = None
        _LOG.warning(
            f"{self._directory} cannot be written ({error.strerror}); continuing without TensorBoard "
            "(metrics.jsonl has everything)"
        )
