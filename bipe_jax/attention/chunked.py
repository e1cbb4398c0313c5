"""Attention by plain XLA: of all keys at once, or in chunks of queries with linear memory.

Shape letters: B batch, L query length, S key length, N query heads, K key/value heads, H head width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# A chunk of queries sees all keys before its end; its logits are B x N x CHUNK x keys.
CHUNK = 256
# The block is cut into at most BANDS bands, unrolled; a chunk sees the keys up to its band's end, so
# that at most (BANDS + 1) / (2 BANDS) of the square is computed while compile time stays bounded.
BANDS = 8


class Side(NamedTuple):
    """What masks and biases know of the queries, or of the keys."""

    index: jax.Array  # (1, L), place in the block
    document_ids: jax.Array | None  # (B, L)
    features: list[Any]  # for each bias, what its encoding prepared: trees of (B, L, ...)


def attend(q, k, v, visible, bias):
    """Plain attention of some queries to some keys.

    Args:
      q: (B, L, N, H). k, v: (B, S, K, H), with N a multiple of K.
      visible: boolean, broadcastable to (B, 1, L, S).
      bias: float32, broadcastable to (B, N, L, S), added to the scaled logits.

    Returns:
      (B, L, N, H) in q's dtype. Logits and softmax are float32.
    """
    B, L, N, H = q.shape
    S, K = k.shape[1:3]
    # One product of (N / K) L queries with S keys for each of the K heads: the quickest form on a CPU.
    q = jnp.moveaxis(q.reshape(B, L, K, N // K, H), 1, 3).reshape(B, K, N // K * L, H)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    logits = jnp.einsum("bkmh,bksh->bkms", q, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(B, N, L, S) * H**-0.5 + bias
    logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(B, K, -1, S)
    mixed = jnp.einsum("bkms,bksh->bkmh", weights, v).reshape(B, K, N // K, L, H)
    return jnp.moveaxis(mixed, 3, 1).reshape(B, L, N, H)


def reference(q, k, v, query: Side, key: Side, encodings, heads):
    """Attention of all queries to all keys at once: the logits are B x N x L x S.

    Args:
      q: (B, L, N, H). k, v: (B, S, K, H), with N a multiple of K.
      query, key: the two sides. encodings: those whose `bias` is added; they go with the features.
      heads: (N,) which of the model's query heads these are.

    Returns:
      (B, L, N, H) in q's dtype.
    """
    visible = query.index[:, None, :, None] >= key.index[:, None, None, :]
    if query.document_ids is not None:
        visible &= query.document_ids[:, None, :, None] == key.document_ids[:, None, None, :]
    terms = [
        encoding.bias(of_query, of_key, heads)
        for encoding, of_query, of_key in zip(encodings, query.features, key.features, strict=True)
    ]
    return attend(q, k, v, visible, sum(terms, jnp.float32(0)))


def chunked(q, k, v, query: Side, key: Side, encodings, heads, aligned: bool):
    """As `reference`, in chunks of queries: memory grows linearly with the length.

    Args:
      aligned: the queries and the keys are the same tokens, so that chunks skip the keys after them.
    """
    L = q.shape[1]

    def chunk(q, k, v, query, key):
        return reference(q, k, v, query, key, encodings, heads)

    if L > CHUNK:  # keep no chunk's logits for the backward pass
        chunk = jax.checkpoint(chunk)

    def cut(start, stop, x):
        return jax.tree.map(lambda leaf: leaf[:, start:stop], x)

    band = -(-L // BANDS)
    band = -(-band // CHUNK) * CHUNK if aligned else L
    outputs = []
    for start in range(0, L, band):
        stop = min(start + band, L)
        seen = (k, v, key)
        run = functools.partial(_each_chunk, chunk, *(cut(0, stop, seen) if aligned else seen))
        outputs.append(run(cut(start, stop, q), cut(start, stop, query)))
    return jnp.concatenate(outputs, axis=1)


def _each_chunk(chunk, k, v, key, q, query):
    """Runs `chunk` over CHUNK queries at a time, one after the other."""
    L = q.shape[1]
    whole = L // CHUNK * CHUNK

    def split(x):
        x = x[:, :whole]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]), 1, 0)

    def run(piece):
        return chunk(piece[0], k, v, piece[1], key)

    outputs = []
    if whole > CHUNK:
        mapped = jax.lax.map(run, jax.tree.map(split, (q, query)))
        outputs.append(jnp.moveaxis(mapped, 0, 1).reshape(q.shape[0], whole, *q.shape[2:]))
    elif whole:
        outputs.append(run(jax.tree.map(lambda x: x[:, :whole], (q, query))))
    if whole < L:
        outputs.append(run(jax.tree.map(lambda x: x[:, whole:], (q, query))))
    return jnp.concatenate(outputs, axis=1)
