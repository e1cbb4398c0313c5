"""Fine-tuning: a new run that starts from the parameters of another run's checkpoint."""

import logging

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from bipe_jax import checkpoint, model, sharding
from bipe_jax.config import check_startable
from bipe_jax.errors import UserError

_LOG = logging.getLogger(__name__)


def source(config) -> checkpoint.Meta | None:
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


def start(config, step: int, mesh, drawn: dict) -> dict:
    """The parameters that a new run starts with: the checkpoint's, as far as the model has them.

    Args:
      config: names the checkpoint. step: which of its steps. mesh: the mesh of the run.
      drawn: freshly drawn parameters of the model, on `mesh`; those that the checkpoint does
        not have stay as they are. Parameters that the model does not have are left out.
    """
    path = config.initial_checkpoint
    _, shapes = checkpoint.describe(path, step)
    abstract = jax.tree.map(
        lambda name, leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.float32,
            sharding=NamedSharding(mesh, sharding.parameter_spec(name)),
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
    """The leaves of a tree by their names, as in {"embed/table": leaf, ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def _check_shapes(config, saved: dict, wanted: dict) -> None:
    """Raises UserError if shapes differ. Tables of absolute encodings alone may be missing on a side."""
    checkpoint_name = f"config.initial_checkpoint={config.initial_checkpoint}"
    for name in sorted(saved.keys() | wanted.keys()):
        before, now = (leaves[name].shape if name in leaves else None for leaves in (saved, wanted))
        of_encoding = name.startswith("absolute/")
        if before == now or (of_encoding and None in (before, now)):
            continue
        if not of_encoding:
            raise UserError(
                f"{checkpoint_name} does not hold what its own config says: {name} has the shape {before} "
                f"in it, the model's is {now}"
            )
        rows, coordinate = before[0], name.removeprefix("absolute/learned_").removesuffix("/table")
        if coordinate == "position" and rows < config.sequence_length:
            advice = f"set config.sequence_length to at most {rows}, or leave that table out"
        else:
            advice = f"give that entry ('size', {rows})"
        raise UserError(
            f"config.position.absolute: the learned table of {coordinate} has {now[0]} rows (by "
            f"default config.sequence_length), but {rows} in {checkpoint_name}: {advice}"
        )
