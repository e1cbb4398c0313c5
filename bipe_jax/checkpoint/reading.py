"""Reading checkpoints. Nothing of them is touched."""

import base64
import contextlib
import dataclasses
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from bipe_jax import config as configs
from bipe_jax import plan, segments
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir, complete_steps


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says beside its arrays."""

    step: int
    config: Plan
    tokenizer: Tokenizer


def meta_to_json(config: Plan) -> dict[str, Any]:
    """What a checkpoint's item `config` is: the config, and the separators of its segment rule."""
    return {
        "config": configs.to_json(config),
        "separators": list(config.segment_rule.separators),
    }


def plan_from_json(saved: dict[str, Any]) -> Plan:
    """The plan that `meta_to_json` gave, in this version of the program or an earlier one.

    Raises:
      UserError: it was saved by a later version, or is not a config.
    """
    if "config" in saved:
        config, separators = saved["config"], saved["separators"]
    else:  # before format 1 the item was the config, which had the separators
        config, separators = saved, saved["segments"]["separators"]
    rule = segments.Rule(tuple(separators)) if separators else None
    return plan.of(configs.from_json(config), rule)


def meta_of(manager: ocp.CheckpointManager, directory: epath.Path, step: int) -> Meta:
    """The meta data of a step."""
    restored = manager.restore(
        step,
        args=ocp.args.Composite(config=ocp.args.JsonRestore(), tokenizer=ocp.args.JsonRestore()),
    )
    model = base64.b64decode(restored.tokenizer["model"])
    tokenizer = Tokenizer(model, f"{directory}/{step}/tokenizer")
    return Meta(step, plan_from_json(restored.config), tokenizer)


def locate(path) -> tuple[epath.Path, int | None]:
    """A workdir, its checkpoints directory or one step's directory -> (directory, step or None)."""
    path = epath.Path(path).resolve()
    if (path / Workdir.checkpoints).is_dir():
        return path / Workdir.checkpoints, None
    if path.name.isdigit() and (path / "params").is_dir():
        return path.parent, int(path.name)
    return path, None


def steps(path) -> list[int]:
    """The steps of the complete checkpoints of a workdir, or of its checkpoints directory, in order.

    [] where there is none, or no such directory. Any of them may be deleted before it is read.
    """
    directory, _ = locate(path)
    try:
        names = [entry.name for entry in directory.iterdir()]  # unfinished ones have other names
    except (FileNotFoundError, NotADirectoryError):
        return []
    return complete_steps(names)


@contextlib.contextmanager
def _reading(path, step: int | None):
    """The manager, the directory and the step of a complete checkpoint; nothing is touched."""
    directory, of_path = locate(path)
    step = of_path if step is None else step
    if not directory.is_dir():
        raise UserError(f"checkpoint {path}: no such directory")
    options = ocp.CheckpointManagerOptions(read_only=True)
    # Without handlers Orbax would not say what shapes there are.
    handlers = {
        "params": ocp.StandardCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
        "tokenizer": ocp.JsonCheckpointHandler(),
    }
    manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
    try:
        step = manager.latest_step() if step is None else step
        if step is None or not (directory / str(step) / "params").is_dir():
            raise UserError(f"checkpoint {path}: no complete checkpoint in {directory}")
        yield manager, directory, step
    except UserError:
        raise
    except Exception as error:  # whatever missing or damaged files make of Orbax
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {path}: step {step} is damaged or was deleted ({reason})"
        ) from error
    finally:
        manager.close()


def describe(path, step: int | None = None) -> tuple[Meta, dict]:
    """A checkpoint's meta data, and its parameters' shapes and dtypes. See `load`."""
    with _reading(path, step) as (manager, directory, step):
        saved = manager.item_metadata(step).params
        if saved is None:
            raise FileNotFoundError("params has no _METADATA")
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved.tree)
        return meta_of(manager, directory, step), shapes


def read_params(path, step: int | None, abstract: dict) -> dict:
    """A checkpoint's parameters; `abstract` gives shapes, dtypes and shardings. See `load`."""
    with _reading(path, step) as (manager, _, step):
        restore = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return manager.restore(step, args=restore).params


def load(path, step: int | None = None) -> tuple[Meta, dict]:
    """Reads a checkpoint's meta data and parameters, without touching anything.

    Args:
      path: a workdir, its checkpoints directory or one step's directory.
      step: which; None takes the latest, or that of `path`.

    Raises:
      UserError: there is no complete checkpoint.
    """
    meta, shapes = describe(path, step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
    )
    return meta, read_params(path, meta.step, abstract)
