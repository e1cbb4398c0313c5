"""Functions of the library for models: load a checkpoint, apply the model."""

import jax
from jax.typing import ArrayLike

from bipe_jax import checkpoint, model, segments
from bipe_jax.plan import Plan


def load(path: str) -> tuple[Plan, dict]:
    """Reads a checkpoint.

    Args:
      path: a run's workdir (its latest checkpoint) or one step's directory.

    Returns:
      (config, params): a `plan.Plan`, with the fields of the config as attributes, and a nested dict of
      float32 arrays.

    Raises:
      bipe_jax.errors.UserError: no complete checkpoint exists.
    """
    meta, params = checkpoint.load(path)
    return meta.config, params


def apply(
    config: Plan, params: dict, tokens: ArrayLike, starts: ArrayLike | None = None
) -> jax.Array:
    """The model's logits, as a pure function: `jax.jit(functools.partial(bipe_jax.apply, config))`.

    Args:
      config: from `load`; its segment rule gives the coordinates of the tokens.
      params: from `load`.
      tokens: (B, L) integers; each row is one block.
      starts: (B, L) integers, where segments begin, if the segment rule reads the text: see
        `segments.coordinates`.

    Returns:
      (B, L, V) float32.
    """
    tokens = jax.numpy.asarray(tokens)
    marks = None if starts is None else jax.numpy.asarray(starts)
    coordinates = segments.coordinates(tokens, config.segment_rule, starts=marks)
    return model.apply(config, params, {"tokens": tokens, **coordinates})
