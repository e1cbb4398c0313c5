"""Reading checkpoints, without writing to them."""

import base64
import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from bipe_jax import config as configs
from bipe_jax import plan, plugins, segments
from bipe_jax.config import spec
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir, bucket, complete_steps, files


@dataclasses.dataclass(frozen=True)
class Meta:
    """The data of a checkpoint besides its arrays.

    Attributes:
      start: of the training that saved it: "number", the "step" it began after, and "provenance"; None of
        a converted model, or if an earlier version saved it.
    """

    step: int
    config: Plan
    tokenizer: Tokenizer
    start: dict[str, Any] | None = None


def meta_to_json(config: Plan) -> dict[str, Any]:
    """A checkpoint's item `config`: the config, its segment rule, its shards, and its plug-ins."""
    return {
        "config": configs.to_json(config),
        "rule": segments.to_json(config.segment_rule),
        "shards": shards_to_json(config.shards),
        "plugins": [plugin.to_json() for plugin in config.plugins],
    }


def shards_to_json(shards: tuple[tuple[spec.Shard, ...], ...]) -> list[list[list[Any]]]:
    """[path, size, digest] of each shard of each source."""
    return [[[s.path, s.size, s.digest] for s in of_source] for of_source in shards]


def shards_from_json(saved: list[list[list[Any]]]) -> tuple[tuple[spec.Shard, ...], ...]:
    """The shards that `shards_to_json` gave."""
    return tuple(tuple(spec.Shard(*shard) for shard in of_source) for of_source in saved)


def plan_from_json(saved: dict[str, Any]) -> Plan:
    """The plan of an item `config`, written by this version of the program or an earlier one.

    Raises:
      UserError: it was saved by a later version, is not a config, or needs a plug-in that is not installed.
    """
    try:
        config, rule = saved.get("config", saved), saved.get("rule")
        if rule is None:  # an earlier version saved the separators; before format 1, in the config
            separators = (
                saved["separators"] if "config" in saved else config["segments"]["separators"]
            )
            rule = {"separators": separators}
        rule = segments.from_json(rule)
        if not isinstance(config, dict):
            raise TypeError
        plugins.check_installed(saved.get("plugins", []))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError("it is no config that this program saved") from None
    shards = shards_from_json(saved.get("shards", []))
    return plan.of(
        configs.from_json(config), rule if rule != segments.Rule() else None
    ).with_shards(shards)


def meta_of(manager: ocp.CheckpointManager, directory: epath.Path, step: int) -> Meta:
    """The meta data of a step."""
    restored: Any = manager.restore(
        step,
        args=ocp.args.Composite(config=ocp.args.JsonRestore(), tokenizer=ocp.args.JsonRestore()),
    )
    model = base64.b64decode(restored.tokenizer["model"])
    tokenizer = Tokenizer(model, f"{directory}/{step}/tokenizer")
    try:
        config, start = plan_from_json(restored.config), restored.config.get("start")
    except UserError as error:
        raise UserError(f"checkpoint {directory / str(step)}: {error}") from None
    numbered = isinstance(start, dict) and isinstance(start.get("number"), int)
    return Meta(step, config, tokenizer, start if numbered else None)


def locate(path: files.Path) -> tuple[epath.Path, int | None]:
    """A workdir, its checkpoints directory or one step's directory -> (directory, step or None)."""
    bucket.check(path)
    directory = epath.Path(files.absolute(path))
    if (directory / Workdir.checkpoints).is_dir():
        return directory / Workdir.checkpoints, None
    if directory.name.isdigit() and (directory / "params").is_dir():
        return directory.parent, int(directory.name)
    return directory, None


def steps(path: files.Path) -> list[int]:
    """The steps of the complete checkpoints of a workdir, or of its checkpoints directory, in order.

    [] if there is none, or no such directory. Any of them may be deleted before it is read.
    """
    directory, _ = locate(path)
    return complete_steps(directory)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """A context, or a decorator, without Orbax's warnings of options that are chosen on purpose."""

    def is_shown(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


@contextlib.contextmanager
def _reading(
    path: files.Path, step: int | None
) -> Iterator[tuple[ocp.CheckpointManager, epath.Path, int]]:
    """Opens a complete checkpoint: yields its manager, directory and step."""
    directory, of_path = locate(path)
    step = of_path if step is None else step
    if not directory.is_dir():
        raise UserError(f"checkpoint {path}: no such directory")
    # Orbax would wait for all processes, which may read at different times, and not in the same order.
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, multiprocessing_options=alone
    )
    # Without handlers Orbax does not return shapes.
    handlers = {
        "params": ocp.StandardCheckpointHandler(),
        "optimizer": ocp.StandardCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
        "tokenizer": ocp.JsonCheckpointHandler(),
    }
    manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
    try:
        step = max(complete_steps(directory), default=None) if step is None else step
        if step is None or not (directory / str(step) / "params").is_dir():
            raise UserError(f"checkpoint {path}: no complete checkpoint in {directory}")
        yield manager, directory, step
    except UserError:
        raise
    except Exception as error:  # of many kinds, for missing or damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {path}: step {step} is damaged or was deleted ({reason})"
        ) from error
    finally:
        manager.close()


@_quietly()
def describe(path: files.Path, step: int | None = None) -> tuple[Meta, dict]:
    """A checkpoint's meta data, and the shapes and dtypes of its parameters. See `load`."""
    with _reading(path, step) as (manager, directory, step):
        saved = manager.item_metadata(step).params
        if saved is None:
            raise FileNotFoundError("params has no _METADATA")
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved.tree)
        return meta_of(manager, directory, step), shapes


@_quietly()
def read_params(path: files.Path, step: int | None, abstract: dict) -> dict:
    """A checkpoint's parameters, with the shapes, dtypes and shardings of `abstract`. See `load`."""
    with _reading(path, step) as (manager, _, step):
        restore = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        restored: Any = manager.restore(step, args=restore)
        return restored.params


def _on_one_device(shapes: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
    )


@_quietly()
def check_restorable(path: files.Path, step: int, share: tuple[int, int] = (0, 1)) -> None:
    """Reads the meta data and all arrays of a checkpoint, one at a time, into the host's memory.

    Args:
      share: (which, of how many) parts of the arrays to read: the processes of a run share them.

    Raises:
      UserError: something cannot be read.
    """
    with _reading(path, step) as (manager, directory, step):
        meta_of(manager, directory, step)
        for item in ("params", "optimizer"):
            if (directory / str(step) / item).is_dir():
                _read_each(directory / str(step) / item, *share)


def _read_each(item: epath.Path, which: int, shares: int) -> None:
    handler = ocp.PyTreeCheckpointHandler()
    saved: Any = handler.metadata(item)
    if saved is None:
        raise FileNotFoundError(f"{item.name} has no _METADATA")
    leaves, structure = jax.tree.flatten(saved.tree)
    to_host = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves)
    for number in range(which, len(leaves), shares):
        one = [leaf if i == number else ocp.PLACEHOLDER for i, leaf in enumerate(leaves)]
        handler.restore(
            item,
            args=ocp.args.PyTreeRestore(
                item=jax.tree.unflatten(structure, one),
                restore_args=jax.tree.unflatten(structure, to_host),
            ),
        )


def load(path: files.Path, step: int | None = None) -> tuple[Meta, dict]:
    """Reads a checkpoint's meta data and parameters.

    Args:
      path: a workdir, its checkpoints directory or one step's directory.
      step: of the checkpoint; None: the latest, or that of `path`.

    Raises:
      UserError: there is no complete checkpoint.
    """
    meta, shapes = describe(path, step)
    return meta, read_params(path, meta.step, _on_one_device(shapes))
