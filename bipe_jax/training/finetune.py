"""Fine-tuning: a new run that starts from the parameters of another run's checkpoint."""

import logging
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bipe_jax import checkpoint, model, sharding
from bipe_jax.config import check_startable
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan

_LOG = logging.getLogger(__name__)


def source(config: Plan) -> checkpoint.Meta | None:
    """The checkpoint that a new run starts from, or None if it starts from scratch.

    Raises:
      UserError: it cannot be read, or its parameters do not fit the config.
    """
    if not config.initial_checkpoint:
        return None
    meta, shapes = checkpoint.describe(config.initial_checkpoint)
    check_startable(meta.config, config)
    wanted = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    _check_shapes(config, _by_name(shapes), _by_name(wanted))
    return meta


def start(config: Plan, step: int, mesh, drawn: dict) -> dict:
    """The parameters that a new run starts with: the checkpoint's, as far as the model has them.

    Args:
      config: names the checkpoint. step: which of its steps. mesh: what parameters are placed on.
      drawn: freshly drawn parameters of the model, placed on `mesh`; those that the checkpoint does
        not have stay as they are. What the model does not have is left out.
    """
    path = config.initial_checkpoint
    _, shapes = checkpoint.describe(path, step)
    declared = model.declared(config)

    def placement(name):
        axes = declared[name].axes if name in declared else P()  # what is left out in the end
        return NamedSharding(mesh, axes)

    abstract = jax.tree.map(
        lambda name, leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.float32,
            sharding=placement(name),
        ),
        sharding.names(shapes),
        shapes,
    )
    read = _by_name(checkpoint.read_params(path, step, abstract))
    _LOG.info(f"Starting from step {step} of {path}")
    if new := sorted(_by_name(drawn).keys() - read.keys()):
        _LOG.info(f"Drawn, since that checkpoint has none: {', '.join(new)}")
    if unused := sorted(read.keys() - _by_name(drawn).keys()):
        _LOG.info(f"Left out, since this model has none: {', '.join(unused)}")
    return jax.tree.map(lambda name, leaf: read.get(name, leaf), sharding.names(drawn), drawn)


def _by_name(tree) -> dict:
    """{"embed/table": leaf, ...}"""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def _check_shapes(config: Plan, saved: dict, wanted: dict) -> None:
    """Only parameters of encodings may be missing, or be there without need."""
    place = f"config.initial_checkpoint={config.initial_checkpoint}"
    for name in sorted(saved.keys() | wanted.keys()):
        before, now = (leaves[name].shape if name in leaves else None for leaves in (saved, wanted))
        of_encoding = name.startswith(("absolute/", "relative/", "layers/relative/"))
        if before == now or (of_encoding and None in (before, now)):
            continue
        if not of_encoding:
            raise UserError(
                f"{place} does not hold what its own config says: {name} has the shape {before} in it, "
                f"the model's is {now}"
            )
        learned = re.fullmatch(r"absolute/learned_(\w+)/table", name)
        if not learned:
            raise UserError(
                f"config.position: {name} has the shape {now}, but {before} in {place}: give that entry the "
                "options that it had there"
            )
        rows, coordinate = before[0], learned[1]
        if coordinate == "position" and rows < config.sequence_length:
            advice = f"set config.sequence_length to at most {rows}, or leave that table out"
        else:
            advice = f"give that entry ('size', {rows})"
        raise UserError(
            f"config.position.absolute: the learned table of {coordinate} has {now[0]} rows (by "
            f"default config.sequence_length), but {rows} in {place}: {advice}"
        )
