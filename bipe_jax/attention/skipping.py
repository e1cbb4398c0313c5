# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Which blocks of keys add nothing in float32 to what some queries get, proved before they are computed.

A query sees itself, with a logit z. The logits to the keys of a block are at most

    b = (upper bound of the bias) + |q| max|k| / sqrt(H).

If b < z - (ln S + MARGIN), the keys of all such blocks have together exp(-MARGIN) = 1.4e-11 or less of the
row's weights: float32 rounds their sum, and the mean of the values, by 6e-8. Blocks that no query sees are
left out whatever their logits. Kinds say what their bias is at most (`bias_bound`), and what their masks hide
(`visible_bound`).

Shape letters: B batch, L query length, S key length, N query heads, K key/value heads, H head width; I and J,
blocks of queries and of keys.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bipe_jax.attention.scoring import Extent, Scoring, Side

MARGIN = 25.0


class Blocks(NamedTuple):
    """What is known of blocks of tokens, of queries or of keys.

    Attributes:
      indices, document_ids: of the tokens, (B or 1, blocks) and (B, blocks); None without documents.
      features: of each encoding that acts on logits.
      norms: the largest length of a query or a key, (B, blocks, N).
    """

    indices: Extent
    document_ids: Extent | None
    features: list[Extent]
    norms: jax.Array


def bounds_bias(encodings: Sequence[Scoring]) -> bool:
    """Whether the logits fall with distance, as far as the encodings can tell."""
    acts = [encoding.acts for encoding in encodings]
    biases = [act for act in acts if "bias" in act]
    bounded = bool(biases) and all("bias_bound" in act for act in biases)
    return bounded and not any(act & {"logits", "factors"} for act in acts)


def possible(encodings: Sequence[Scoring], documents: bool) -> bool:
    """Whether blocks may be skipped; not where an encoding needs whole rows of logits."""
    acts = [encoding.acts for encoding in encodings]
    if any("logits" in act for act in acts):
        return False
    return documents or any("visible_bound" in act for act in acts) or bounds_bias(encodings)


def extent(tree: Any, size: int) -> Extent:
    """The extents of arrays (B, L, ...) in blocks of `size`, which divides L: (B, L / size, ...)."""

    def blocks(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1, size, *x.shape[2:])

    return Extent(
        jax.tree.map(lambda x: blocks(x).min(axis=2), tree),
        jax.tree.map(lambda x: blocks(x).max(axis=2), tree),
    )


def lengths(x: jax.Array) -> jax.Array:
    """The Euclidean lengths of vectors (..., H), in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.sqrt(jnp.square(x).sum(axis=-1))


def blocks_of(x: jax.Array, side: Side, heads: int, size: int) -> Blocks:
    """The blocks of `size` of queries or keys x (B, L, N or K, H) of so many query heads."""
    norms = extent(lengths(x), size).greatest
    ids = None if side.document_ids is None else extent(side.document_ids, size)
    features = [extent(of_tokens, size) for of_tokens in side.features]
    norms = jnp.repeat(norms, heads // x.shape[2], axis=2)
    return Blocks(extent(side.indices, size), ids, features, norms)


def own_logits(
    q: jax.Array, k: jax.Array, side: Side, encodings: Sequence[Scoring], heads: jax.Array
) -> jax.Array:
    """The logits (B, N, L) of tokens to themselves, from q (B, L, N, H) and k (B, L, K, H)."""
    B, L, N, H = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    k = jnp.repeat(k, N // k.shape[2], axis=2).astype(dtype)
    logits = jnp.moveaxis((q.astype(dtype) * k).sum(axis=-1), 2, 1) * H**-0.5
    for encoding, of_tokens in zip(encodings, side.features, strict=True):
        if "bias" in encoding.acts:
            alone = jax.tree.map(lambda x: x.reshape(B * L, 1, *x.shape[2:]), of_tokens)
            bias = encoding.bias(alone, alone, heads)
            logits += jnp.moveaxis(bias.reshape(B, L, N), 2, 1).astype(dtype)
    return logits


def upper_bound(
    query: Blocks, key: Blocks, encodings: Sequence[Scoring], heads: jax.Array, width: int
) -> jax.Array:
    """A number (B, N, I, J) that no logit between the tokens of two blocks exceeds.

    Args:
      width: H.
    """
    of_query, of_key = (jnp.moveaxis(side.norms, 2, 1) for side in (query, key))
    bound = of_query[..., :, None] * of_key[..., None, :] * width**-0.5
    for encoding, q, k in zip(encodings, query.features, key.features, strict=True):
        if "bias" in encoding.acts:
            bound += encoding.bias_bound(q, k, heads).astype(bound.dtype)
    return bound


def needed(
    query: Blocks,
    key: Blocks,
    floor: jax.Array,
    encodings: Sequence[Scoring],
    heads: jax.Array,
    width: int,
    keys: jax.Array | int,
) -> jax.Array:
    """Whether the queries of a block need the keys of another, (B, N, I, J) booleans.

    Args:
      floor: (B, N, I) a logit that each query of the block has, or exceeds. width: H. keys: S.
    """

    def meet(a: Extent, b: Extent) -> jax.Array:
        return (a.least[:, None, :, None] <= b.greatest[:, None, None, :]) & (
            b.least[:, None, None, :] <= a.greatest[:, None, :, None]
        )

    seen = key.indices.least[:, None, None, :] <= query.indices.greatest[:, None, :, None]
    if query.document_ids is not None and key.document_ids is not None:
        seen &= meet(query.document_ids, key.document_ids)
    for encoding, q, k in zip(encodings, query.features, key.features, strict=True):
        if "visible_bound" in encoding.acts:
            seen &= encoding.visible_bound(q, k)
    if bounds_bias(encodings):
        bound = upper_bound(query, key, encodings, heads, width)
        # What is no number proves nothing.
        seen &= ~(bound - floor[..., None] < -(jnp.log(jnp.maximum(keys, 1)) + MARGIN))
    return seen
