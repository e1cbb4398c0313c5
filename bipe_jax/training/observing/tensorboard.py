"""TensorBoard's event files, written with tensorboardX."""

import logging
import os
import time
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from bipe_jax.workdir import files

_protos: Any = event_pb2  # generated, without types
_summaries: Any = summary_pb2


_LOG = logging.getLogger(__name__)


class TensorBoard:
    """Writes scalars to one directory, without a thread.

    tensorboardX's own writer has a thread, and after a disk error in that thread training would wait
    for ever. If the directory or its file cannot be written, that is logged and the training continues
    without TensorBoard.

    Args:
      directory: made if it does not exist.
      purge_step: TensorBoard drops the records of this step and later ones in earlier files.
    """

    def __init__(self, directory: str, purge_step: int):
        self._directory = directory
        self._events: EventsWriter | None = None
        if os.path.lexists(directory) and not os.path.isdir(directory):
            files.set_aside(directory, "it is no directory")
        try:
            os.makedirs(directory, exist_ok=True)
            self._events = EventsWriter(os.path.join(directory, "events"))
        except OSError as error:
            self._give_up(error)
        start = _protos.SessionLog(status=_protos.SessionLog.START)
        self._write(step=purge_step, session_log=start)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes the scalars of a step."""
        scalars = [summary.scalar(name, value).value[0] for name, value in values.items()]
        self._write(step=step, summary=_summaries.Summary(value=scalars))

    def close(self) -> None:
        if self._events:
            try:
                self._events.close()
            except OSError as error:
                self._give_up(error)

    def _write(self, **content) -> None:
        if self._events:
            try:
                self._events.write_event(_protos.Event(wall_time=time.time(), **content))
                self._events.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._events = None
        _LOG.warning(
            f"{self._directory} cannot be written ({error.strerror}); continuing without TensorBoard "
            "(metrics.jsonl has everything)"
        )
