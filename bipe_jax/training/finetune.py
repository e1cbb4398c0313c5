"""Fine-tuning: a new run that starts from the parameters of another run's checkpoint."""

import logging
import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bipe_jax import checkpoint, model, sharding
from bipe_jax.config import check_startable
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan

_LOG = logging.getLogger(__name__)


def source(config: Plan) -> checkpoint.Meta | None:
    """The checkpoint that a new run starts from, or None if it starts from scratch.

    Raises:
      UserError: the checkpoint cannot be read, or its parameters do not fit the config.
    """
    if not config.initial_checkpoint:
        return None
    meta, shapes = checkpoint.describe(config.initial_checkpoint)
    check_startable(meta.config, config)
    required = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    _check_shapes(config, _shapes_by_name(shapes), _shapes_by_name(required))
    return meta


def start(config: Plan, step: int, mesh: Mesh, initial: dict) -> dict:
    """The parameters that a new run starts with: the checkpoint's, as far as the model has them.

    Args:
      config: its `initial_checkpoint` names the checkpoint. step: of the checkpoint.
      mesh: that the parameters are sharded over.
      initial: newly initialised parameters of the model, sharded over `mesh`, for those that the
        checkpoint does not have.
    """
    path = config.initial_checkpoint
    _, shapes = checkpoint.describe(path, step)
    declared = model.declared(config)

    def abstract_leaf(name, leaf):
        axes = declared[name].axes if name in declared else P()  # not used by the model
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=NamedSharding(mesh, axes))

    abstract = jax.tree.map(abstract_leaf, sharding.names(shapes), shapes)
    saved = _by_name(checkpoint.read_params(path, step, abstract))
    _LOG.info(f"Starting from step {step} of {path}")
    if new := sorted(_by_name(initial).keys() - saved.keys()):
        _LOG.info(f"Initialised, since the checkpoint has none: {', '.join(new)}")
    if unused := sorted(saved.keys() - _by_name(initial).keys()):
        _LOG.info(f"Not used, since this model has none: {', '.join(unused)}")
    return jax.tree.map(lambda name, leaf: saved.get(name, leaf), sharding.names(initial), initial)


def _by_name(tree: dict) -> dict:
    """The leaves by name: {"embed/table": leaf, ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def _shapes_by_name(tree: dict) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in _by_name(tree).items()}


def _check_shapes(config: Plan, saved: dict, required: dict) -> None:
    """Only parameters of encodings may be missing or unused. Raises UserError."""
    path = f"config.initial_checkpoint={config.initial_checkpoint}"
    for name in sorted(saved.keys() | required.keys()):
        old, new = saved.get(name), required.get(name)
        of_encoding = name.startswith(("absolute/", "relative/", "layers/relative/"))
        if old == new or (of_encoding and (old is None or new is None)):
            continue
        if not of_encoding:
            raise UserError(
                f"{path} does not match its own config: {name} has the shape {old}, the model's has {new}"
            )
        assert old is not None and new is not None
        learned = re.fullmatch(r"absolute/learned_(\w+)/table", name)
        if not learned:
            raise UserError(
                f"config.position: {name} has the shape {new}, but {old} in {path}: use the options that the "
                "entry has there"
            )
        rows, coordinate = old[0], learned[1]
        if coordinate == "position" and rows < config.sequence_length:
            advice = f"set config.sequence_length to at most {rows}, or leave that table out"
        else:
            advice = f"give that entry ('size', {rows})"
        raise UserError(
            f"config.position.absolute: the learned table of {coordinate} has {new[0]} rows (by "
            f"default config.sequence_length), but {rows} in {path}: {advice}"
        )
