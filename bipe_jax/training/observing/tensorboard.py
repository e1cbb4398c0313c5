"""TensorBoard's event files, written with tensorboardX."""

import os
import time
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from bipe_jax.workdir import files

_protos: Any = event_pb2  # generated, without types
_summaries: Any = summary_pb2


class TensorBoard:
    """Writes scalars to one directory, without a thread.

    tensorboardX's own writer has a thread, and after a disk error in that thread training would wait
    for ever.

    Args:
      directory: made if it does not exist.
      purge_step: TensorBoard drops the records of this step and later ones in earlier files.

    Raises:
      Transient: the disk fails, here and in `add`.
    """

    def __init__(self, directory: str, purge_step: int):
        os.makedirs(directory, exist_ok=True)
        self._directory = directory
        self._events = EventsWriter(os.path.join(directory, "events"))
        start = _protos.SessionLog(status=_protos.SessionLog.START)
        self._write(step=purge_step, session_log=start)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes the scalars of a step."""
        scalars = [summary.scalar(name, value).value[0] for name, value in values.items()]
        self._write(step=step, summary=_summaries.Summary(value=scalars))

    def close(self) -> None:
        self._events.close()

    def _write(self, **content) -> None:
        self._events.write_event(_protos.Event(wall_time=time.time(), **content))
        files.retry(self._events.flush, self._directory)
