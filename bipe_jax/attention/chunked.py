# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Attention by plain XLA: of all keys at once, or in chunks of queries with linear memory.

Shape letters: B batch, L query length, S key length, N query heads, K key/value heads, H head width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bipe_jax.attention import scoring
from bipe_jax.attention.scoring import Scoring, Side

Part = tuple[jax.Array, jax.Array, Side]  # keys, values, and what is known of them

RESIDUAL = "attention"  # the checkpoint name of what flash kernels and chunks keep for going back

# A chunk of queries sees all keys before its end; its logits are B x N x CHUNK x keys.
CHUNK = 256
# The block is cut into at most BANDS bands, unrolled; a chunk sees the keys up to its band's end, so
# that at most (BANDS + 1) / (2 BANDS) of the square is computed while compile time stays bounded.
BANDS = 8


def scores(
    q: jax.Array,
    k: jax.Array,
    query: Side,
    key: Side,
    encodings: Sequence[Scoring],
    heads: jax.Array,
) -> jax.Array:
    """Logits of some queries to some keys, under the encodings; the lowest number where masked.

    Args:
      q: (B, L, N, H). k: (B, S, K, H), with N a multiple of K.

    Returns:
      (B, K, N / K * L, S) float32: one product for each of the K heads, the quickest form on a CPU.
    """
    B, L, N, H = q.shape
    S, K = k.shape[1:3]
    q, k = scoring.multiplied(q, k, query, key, encodings)
    unfolded = q
    q = jnp.moveaxis(q.reshape(B, L, K, N // K, H), 1, 3).reshape(B, K, N // K * L, H)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bkmh,bskh->bkms", q, k, preferred_element_type=dtype) * H**-0.5
    logits = logits.reshape(B, N, L, S)
    pairs = list(zip(encodings, query.features, key.features, strict=True))
    for encoding, of_query, of_key in pairs:
        if "bias" in encoding.acts:
            logits += encoding.bias(of_query, of_key, heads).astype(dtype)
    visible = query.indices[:, None, :, None] >= key.indices[:, None, None, :]
    if query.document_ids is not None and key.document_ids is not None:
        visible &= query.document_ids[:, None, :, None] == key.document_ids[:, None, None, :]
    for encoding, of_query, of_key in pairs:
        if "visible" in encoding.acts:
            visible &= encoding.visible(of_query, of_key)
    for encoding, of_query, of_key in pairs:
        if "logits" in encoding.acts:
            logits = encoding.logits(logits, unfolded, of_query, of_key, visible, heads)
    return jnp.where(visible, logits, jnp.finfo(dtype).min).reshape(B, K, -1, S)


def _weigh(logits: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax of (B, K, M, S) float32, times v (B, S, K, H) -> (B, K, M, H) in v's dtype."""
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkms,bskh->bkmh", weights, v)


@jax.custom_vjp
def _weigh_flash(logits: jax.Array, v: jax.Array) -> jax.Array:
    """As `_weigh`, in fewer passes over the logits, going back above all.

    As in FlashAttention-2 (Dao 2023, algorithms 1 and 2): the sum divides the result instead of the
    weights, and what softmax's gradient subtracts is the product of the result and its gradient.
    The result and the logarithm of the sum are named RESIDUAL: with them kept, a recomputation
    ends at the logits.
    """
    return _weigh_flash_forward(logits, v)[0]


def _weigh_flash_forward(
    logits: jax.Array, v: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    highest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - highest)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum(
        "bkms,bskh->bkmh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    mixed = checkpoint_name((mixed / total).astype(v.dtype), RESIDUAL)
    log_total = checkpoint_name(highest + jnp.log(total), RESIDUAL)
    return mixed, (logits, v, mixed, log_total)


def _weigh_flash_backward(
    kept: tuple[jax.Array, jax.Array, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits, v, mixed, log_total = kept
    weights = jnp.exp(logits - log_total)
    shared = jnp.einsum("bkmh,bkmh->bkm", cotangent, mixed, preferred_element_type=jnp.float32)[
        ..., None
    ]
    of_weights = jnp.einsum("bkmh,bskh->bkms", cotangent, v, preferred_element_type=jnp.float32)
    of_v = jnp.einsum("bkms,bkmh->bskh", weights.astype(v.dtype), cotangent)
    return weights * (of_weights - shared), of_v


_weigh_flash.defvjp(_weigh_flash_forward, _weigh_flash_backward)


def _attend(
    weigh: Callable[[jax.Array, jax.Array], jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: Side,
    key: Side,
    encodings: Sequence[Scoring],
    heads: jax.Array,
) -> jax.Array:
    B, L, N, _ = q.shape
    K, H = v.shape[2:]  # queries and keys may be wider
    mixed = weigh(scores(q, k, query, key, encodings, heads), v)
    return jnp.moveaxis(mixed.reshape(B, K, N // K, L, H), 3, 1).reshape(B, L, N, H)


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: Side,
    key: Side,
    encodings: Sequence[Scoring],
    heads: jax.Array,
) -> jax.Array:
    """Attention of all queries to all keys at once: the logits are B x N x L x S.

    Args:
      q: (B, L, N, H). k, v: (B, S, K, H), with N a multiple of K.
      query, key: the two sides. encodings: those that the features of the sides are of.
      heads: (N,) which of the model's query heads these are.

    Returns:
      (B, L, N, H) in q's dtype.
    """
    return _attend(_weigh, q, k, v, query, key, encodings, heads)


def in_parts(
    q: jax.Array,
    parts: Sequence[Part],
    query: Side,
    encodings: Sequence[Scoring],
    heads: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """As `reference`, of keys that lie in several arrays, which are not joined.

    Args:
      q: (B, L, N, H). parts: (k, v, key) each, as `reference` has them; the rest as there.

    Returns:
      (B, L, N, H), and the highest logits (B, N, L); None with encodings that need whole rows of logits.
    """
    B, L, N, _ = q.shape
    if any("logits" in encoding.acts for encoding in encodings):
        k, v, key = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *map(_whole_sides, parts))
        return reference(q, k, v, query, key, encodings, heads), None
    logits = [scores(q, k, query, key, encodings, heads) for k, _, key in parts]
    highest = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in logits])
    weights = [jnp.exp(x - highest) for x in logits]
    total = functools.reduce(jnp.add, [w.sum(axis=-1, keepdims=True) for w in weights])
    products = [
        jnp.einsum("bkms,bskh->bkmh", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, (_, v, _) in zip(weights, parts, strict=True)
    ]
    mixed = functools.reduce(jnp.add, products)
    mixed = (mixed / total).astype(q.dtype).reshape(B, -1, N // mixed.shape[1], L, mixed.shape[-1])
    return jnp.moveaxis(mixed, 3, 1).reshape(B, L, N, -1), highest.reshape(B, N, L)


def _whole_sides(part: Part) -> Part:
    """Keys, values and their side, all with the batch in front."""
    k, v, key = part
    return k, v, key._replace(indices=jnp.broadcast_to(key.indices, k.shape[:2]))


def chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: Side,
    key: Side,
    encodings: Sequence[Scoring],
    heads: jax.Array,
    aligned: bool,
) -> jax.Array:
    """As `reference`, in chunks of queries: memory grows linearly with the length.

    Args:
      aligned: the queries and the keys are the same tokens, so that chunks skip the keys after them.
    """
    L = q.shape[1]

    # Of each chunk the backward pass gets what is named RESIDUAL, and computes the logits again.
    @functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(RESIDUAL)
    )
    def chunk(q: jax.Array, k: jax.Array, v: jax.Array, query: Side, key: Side) -> jax.Array:
        return _attend(_weigh_flash, q, k, v, query, key, encodings, heads)

    def cut(start: int, stop: int, x: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[:, start:stop], x)

    band = -(-L // BANDS)
    band = -(-band // CHUNK) * CHUNK if aligned else L
    outputs: list[jax.Array] = []
    for start in range(0, L, band):
        stop = min(start + band, L)
        seen = (k, v, key)
        run = functools.partial(_each_chunk, chunk, *(cut(0, stop, seen) if aligned else seen))
        outputs.append(run(cut(start, stop, q), cut(start, stop, query)))
    return jnp.concatenate(outputs, axis=1)


def _each_chunk(
    chunk: Callable[..., jax.Array],
    k: jax.Array,
    v: jax.Array,
    key: Side,
    q: jax.Array,
    query: Side,
) -> jax.Array:
    """Runs `chunk` over CHUNK queries at a time, one after the other."""
    L = q.shape[1]
    whole = L // CHUNK * CHUNK

    def split(x: jax.Array) -> jax.Array:
        x = x[:, :whole]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]), 1, 0)

    def run(piece: tuple[jax.Array, Side]) -> jax.Array:
        return chunk(piece[0], k, v, piece[1], key)

    outputs: list[jax.Array] = []
    if whole > CHUNK:
        mapped = jax.lax.map(run, jax.tree.map(split, (q, query)))
        outputs.append(jnp.moveaxis(mapped, 0, 1).reshape(q.shape[0], whole, *q.shape[2:]))
    elif whole:
        outputs.append(run(jax.tree.map(lambda x: x[:, :whole], (q, query))))
    if whole < L:
        outputs.append(run(jax.tree.map(lambda x: x[:, whole:], (q, query))))
    return jnp.concatenate(outputs, axis=1)
