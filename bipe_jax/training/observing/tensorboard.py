"""TensorBoard's event files, written with tensorboardX."""

import os
import time

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from bipe_jax.workdir import files


class TensorBoard:
    """Writes scalars to one directory, each at once.

    tensorboardX's own writer has a thread; after the disk has failed that thread once, training would wait
    for it for ever.

    Args:
      directory: made if it is not there.
      purge_step: TensorBoard drops what earlier files of the directory have of this step and later ones.

    Raises:
      Transient: the disk fails, here and in `add`.
    """

    def __init__(self, directory: str, purge_step: int):
        os.makedirs(directory, exist_ok=True)
        self._directory = directory
        self._events = EventsWriter(os.path.join(directory, "events"))
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes the scalars of a step."""
        scalars = [summary.scalar(name, value).value[0] for name, value in values.items()]
        self._write(step=step, summary=Summary(value=scalars))

    def close(self) -> None:
        self._events.close()

    def _write(self, **content) -> None:
        self._events.write_event(Event(wall_time=time.time(), **content))
        files.retry(self._events.flush, self._directory)
