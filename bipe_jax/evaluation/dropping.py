"""Keys that a cache drops, and the proof at each token that it does not miss them.

A cache of S slots keeps the last S tokens of each row. Of the others it knows how long their keys are at most
and between which values their features lie, and by that how large their logits are at most. Each query
compares this with its largest logit (`attention.skipping`). Where dropped keys might count, the cache says
so, and the text is read again into a larger one.

Shape letters: B rows, T tokens that are added at a time, S slots, N query heads, K key/value heads, H head
width.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bipe_jax.attention import skipping
from bipe_jax.attention.scoring import Extent, Features, Scoring, Side
from bipe_jax.attention.skipping import Blocks
from bipe_jax.plan import Plan

FIRST = 2048  # tokens of a cache that drops others, until the proof that they add nothing fails

Dropped = dict[str, Any]  # "norms" of keys, and "features": an `Extent` for each name


def possible(config: Plan) -> bool:
    """Whether the encodings of every layer can prove that distant keys add nothing."""
    encodings = config.encodings

    def proves(layer: int) -> bool:
        own = [encodings.abstract[e.name] for e in encodings.relative if layer in e.layers]
        return skipping.possible([kind for kind in own if kind.acts], documents=False)

    return encodings.cacheable and all(proves(layer) for layer in range(encodings.period))


def kept_at_first(config: Plan, length: int) -> int:
    """The tokens that a cache for a text of `length` tokens begins with: all, where none can be dropped."""
    return min(length, FIRST) if possible(config) else length


def none_yet(key: jax.Array, of_layers: Features, prepared: Features) -> tuple[Dropped, Features]:
    """What is known before anything is dropped, in parts for the layers and for all of them.

    Args:
      key: (layers, B, K, S, H). of_layers: features (layers, B, S, ...), by name. prepared: features
        (B, S, ...), by name, which are the same in all layers.

    Returns:
      "norms" (layers, B, 1, K) and "features", extents (layers, B, 1, ...); and extents (B, 1, ...).
    """
    layers, B, K = key.shape[:3]
    norms = jnp.zeros((layers, B, 1, K), jnp.promote_types(key.dtype, jnp.float32))

    def empty(features: Features, token: tuple[slice, ...]) -> dict[str, Extent]:
        return {
            name: _of_nothing(jax.tree.map(lambda x: x[token], of_name))
            for name, of_name in features.items()
        }

    whole, first = slice(None), slice(1)
    of_all = empty(prepared, (whole, first))
    return {"norms": norms, "features": empty(of_layers, (whole, whole, first))}, of_all


def _of_nothing(features: Features) -> Extent:
    """An extent that is within all others."""

    def end(x: jax.Array, name: str) -> jax.Array:
        info = jnp.finfo(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.iinfo(x.dtype)
        return jnp.full_like(x, getattr(info, name))

    return Extent(
        jax.tree.map(lambda x: end(x, "max"), features),
        jax.tree.map(lambda x: end(x, "min"), features),
    )


def widened(extent: Extent, features: Features, counts: jax.Array, axis: int) -> Extent:
    """An extent (..., B, 1, ...) together with the features (..., B, T, ...) of tokens.

    Args:
      counts: (B, T) whether a token counts. axis: of B.
    """

    def combine(old: jax.Array, x: jax.Array, which: str) -> jax.Array:
        where = counts.reshape(*counts.shape, *[1] * (x.ndim - axis - 2))
        (neutral,) = jax.tree.leaves(getattr(_of_nothing(x), which))
        kept = jnp.where(where, x, neutral)
        reduce, join = (jnp.min, jnp.minimum) if which == "least" else (jnp.max, jnp.maximum)
        return join(old, reduce(kept, axis=axis + 1, keepdims=True))

    return Extent(
        jax.tree.map(lambda old, x: combine(old, x, "least"), extent.least, features),
        jax.tree.map(lambda old, x: combine(old, x, "greatest"), extent.greatest, features),
    )


def missed(
    q: jax.Array,
    side: Side,
    norms: jax.Array,
    extents: Sequence[Extent],
    highest: jax.Array | None,
    encodings: Sequence[Scoring],
    heads: jax.Array,
    keys: jax.Array | int,
) -> jax.Array:
    """Whether a query might need a dropped key, (B, T).

    Args:
      q: (B, T, N, H). side: the queries'.
      norms: (B, 1, K) of the dropped keys. extents: of their features, for each encoding.
      highest: (B, N, T) a logit that each query has, or exceeds. keys: no more than these are dropped.
    """
    assert highest is not None  # as `possible` sees to
    N = q.shape[2]
    start = jnp.zeros((1, 1), jnp.int32)
    key = Blocks(
        Extent(start, start), None, list(extents), jnp.repeat(norms, N // norms.shape[-1], axis=2)
    )
    query = skipping.blocks_of(q, side, N, 1)
    needed = skipping.needed(query, key, highest, encodings, heads, q.shape[-1], keys)
    return needed.any(axis=(1, 3))
