"""Weights & Biases beside TensorBoard: config.log.wandb names a project; the extra is `wandb`.

WANDB_MODE=offline keeps everything in WORKDIR/wandb, for `wandb sync`. The id of the W&B run is kept in
WORKDIR/wandb_id, so that a training that resumes is the same W&B run.
"""

import logging
import os
import re
import secrets

from bipe_jax.config import Config, flatten, needs, to_dict
from bipe_jax.errors import UserError
from bipe_jax.workdir import Workdir, bucket, files

_LOG = logging.getLogger(__name__)

_LONGEST_ID = 128  # bytes
_ID = re.compile(rb"[\w-]{1,64}")
_FINISH = 30.0  # seconds for the last upload: a preempted run has little time


def check(config: Config, workdir: str) -> None:
    """Raises UserError if the config asks for Weights & Biases, which cannot write to the workdir."""
    if config.log.wandb and bucket.holds(workdir):
        raise UserError(
            f"config.log.wandb={config.log.wandb!r} needs a local --workdir, which {workdir} is not"
        )


class WandbBoard:
    """One W&B run. If W&B cannot be reached, that is logged and the training continues without it.

    Steps may be logged again after a resume or a rewind. W&B's own step counter cannot go back, so the step
    is a metric, over which the others are plotted.

    Args:
      workdir: holds the id, and what is offline. name: of the run; "": that of the directory.

    Raises:
      UserError: W&B is not installed or refuses the project's name, or the user is not logged in.
    """

    def __init__(self, config: Config, workdir: str, name: str = ""):
        check(config, workdir)
        needs.check_installed(config)
        import wandb

        self._run = None
        settings = wandb.Settings(console="off", silent=True, finish_timeout=_FINISH)
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                id=_id(workdir),
                name=name or os.path.basename(os.path.abspath(workdir)),
                dir=workdir,
                config=flatten(to_dict(config)),
                resume="allow",
                settings=settings,
            )
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")
        except wandb.errors.UsageError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"config.log.wandb={config.log.wandb!r}: {reason} (WANDB_MODE=offline needs no login)"
            ) from None
        except Exception as error:
            self._give_up(error)

    def add(self, step: int, values: dict) -> None:
        """Logs the metrics of a step."""
        if self._run is None:
            return
        try:
            self._run.log({"step": step} | {k: v for k, v in values.items() if v is not None})
        except Exception as error:
            self._give_up(error)

    def close(self, failed: bool) -> None:
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = " ".join(str(error).split())[:200]
        _LOG.info(f"Weights & Biases: {reason}; continuing without (metrics.jsonl has everything)")


def _id(workdir: str) -> str:
    path = Workdir(workdir).wandb_id
    files.set_aside_unless_file(path)
    if os.path.exists(path):
        with open(path, "rb") as file:
            text = file.read(_LONGEST_ID).strip()
        if _ID.fullmatch(text):
            return text.decode()
        files.set_aside(path, "it is no id of a run")
    made = secrets.token_hex(6)
    files.write_text(path, made)
    return made
