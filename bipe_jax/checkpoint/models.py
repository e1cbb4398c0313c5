"""Saving models alone, without the state of a training; what all checkpoints have of the model."""

import base64

import jax
import orbax.checkpoint as ocp
from etils import epath

from bipe_jax.checkpoint import deleting
from bipe_jax.checkpoint.reading import locate, meta_to_json
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir, files


def check_path(directory: epath.Path) -> None:
    """Raises UserError for a path that Orbax would take for a glob when it reads a checkpoint."""
    if any(character in str(directory) for character in "*?[\\"):
        raise UserError(
            f"checkpoints cannot be saved in {directory}: Orbax would take its * ? [ or \\ for a pattern: "
            "choose another path"
        )


def items(config: Plan, params: dict, tokenizer: Tokenizer) -> dict:
    """The items that every checkpoint has."""
    model = base64.b64encode(tokenizer.model).decode()
    return {
        "params": ocp.args.StandardSave(params),
        "config": ocp.args.JsonSave(meta_to_json(config)),
        "tokenizer": ocp.args.JsonSave({"model": model}),
    }


def check_free(workdir: files.Path) -> None:
    """Raises UserError if `workdir` contains a checkpoint or is a file."""
    path = epath.Path(files.absolute(workdir))
    check_path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{workdir} is a file: name a directory to write the checkpoint to")
    directory, step = locate(path)
    if step is not None or (directory.is_dir() and ocp.utils.checkpoint_steps(directory)):
        raise UserError(f"{workdir} holds a checkpoint already: name another directory")


def save_model(workdir: files.Path, config: Plan, params: dict, tokenizer: Tokenizer) -> None:
    """Writes WORKDIR/checkpoints/0: a model without the state of a training, see `check_free`.

    Args:
      workdir: to write to. config, tokenizer: of the model.
      params: a nested dict of float32 arrays, NumPy's or JAX's.

    Raises:
      UserError: it cannot be written. Incomplete files are removed.
    """
    directory = epath.Path(files.absolute(workdir)) / Workdir.checkpoints
    # Orbax copies NumPy's arrays, but not JAX's, which are immutable.
    parts = items(config, jax.device_put(params), tokenizer)
    made = next((path for path in [*directory.parents[::-1], directory] if not path.exists()), None)
    try:
        with ocp.CheckpointManager(directory) as manager:
            manager.save(0, args=ocp.args.Composite(**parts))
    except BaseException as error:
        if made is None:
            deleting.remove_unfinished(directory)
        else:
            deleting.remove(made)
        if not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"saving a checkpoint to {directory} failed ({reason})") from error
