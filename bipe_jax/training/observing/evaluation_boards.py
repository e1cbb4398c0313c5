"""TensorBoard and Weights & Biases for evaluations beside a training: `evaluate --follow`."""

import logging
import math
import os

from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.evaluation import periodic
from bipe_jax.training.observing.tensorboard import TensorBoard
from bipe_jax.training.observing.wandb_board import WandbBoard
from bipe_jax.workdir import Workdir

_LOG = logging.getLogger(__name__)


class EvaluationBoards:
    """Writes the results of checkpoints, by the names that an evaluation during training has.

    The trainer has files of its own open, and its own W&B run: here are others, in OUTPUT/evaluations. They
    are opened with the first result. A context manager.

    Args:
      output: directory of the results.
    """

    def __init__(self, output: str):
        self._directory = Workdir(output).evaluations
        self._name = f"{os.path.basename(os.path.abspath(output))}-evaluations"
        self._tensorboard: TensorBoard | None = None
        self._wandb: WandbBoard | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.close(failed=kind is not None)

    def add(self, config: Config, result: dict) -> None:
        """Writes the result of one checkpoint.

        Args:
          config: of the run. result: the content of evaluation.json.
        """
        step, rows = result["step"], result["results"]
        if self._tensorboard is None:
            path = os.path.join(self._directory, "tensorboard")
            self._tensorboard = TensorBoard(path, purge_step=step)
            self._wandb = self._open_wandb(config)
        finite = [row for row in rows if row["loss"] is not None and math.isfinite(row["loss"])]
        values = periodic.metrics(finite)
        self._tensorboard.add(step, values)
        if self._wandb:
            self._wandb.add(step, values)

    def _open_wandb(self, config: Config) -> WandbBoard | None:
        if not config.log.wandb:
            return None
        try:
            return WandbBoard(config, self._directory, self._name)
        except UserError as error:  # the results are written all the same
            _LOG.warning(f"{error}; continuing without Weights & Biases")
            return None
