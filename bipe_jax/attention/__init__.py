"""Causal attention in chunks of queries: memory grows linearly with the length.

Shape letters: B batch, L length, N query heads, K key/value heads, H head width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# A chunk of queries sees all keys before its end; its logits are B x N x CHUNK x keys.
CHUNK = 256
# The block is cut into at most BANDS bands, unrolled; a chunk sees the keys up to its band's end, so
# that at most (BANDS + 1) / (2 BANDS) of the square is computed while compile time stays bounded.
BANDS = 8

# A function (query_prepared, key_prepared) -> (B, N, L, S) float32, and a tree of (B, L, ...) arrays.
Bias = tuple[Callable[[Any, Any], jax.Array], Any]


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


def attention(q, k, v, *, biases: Sequence[Bias] = (), document_ids=None):
    """Causal attention with additive biases and, if asked, document masks.

    Args:
      q: (B, L, N, H). k, v: (B, L, K, H), with N a multiple of K.
      biases: pairs of a bias function and what it takes, see `Bias`; evaluated chunk by chunk.
      document_ids: (B, L) integers; tokens attend only to tokens of equal id. None: to all before.

    Returns:
      (B, L, N, H) in q's dtype.
    """
    L = q.shape[1]
    index = jnp.arange(L)[None]
    prepared = [features for _, features in biases]

    def chunk(q, k, v, query, key):
        """`query` and `key`: (index, document ids, prepared biases) of this chunk and of its keys."""
        query_index, query_documents, query_prepared = query
        key_index, key_documents, key_prepared = key
        visible = query_index[:, None, :, None] >= key_index[:, None, None, :]
        if document_ids is not None:
            visible &= query_documents[:, None, :, None] == key_documents[:, None, None, :]
        terms = [
            bias(query_features, key_features)
            for (bias, _), query_features, key_features in zip(
                biases, query_prepared, key_prepared, strict=True
            )
        ]
        return attend(q, k, v, visible, sum(terms, jnp.float32(0)))

    if L > CHUNK:  # keep no chunk's logits for the backward pass
        chunk = jax.checkpoint(chunk)

    def cut(start, stop, x):
        return jax.tree.map(lambda leaf: leaf[:, start:stop], x)

    tokenwise = (index, document_ids, prepared)
    band = -(-L // BANDS)
    band = -(-band // CHUNK) * CHUNK
    outputs = []
    for start in range(0, L, band):
        stop = min(start + band, L)
        keys = [cut(0, stop, x) for x in (k, v)]
        run = functools.partial(_each_chunk, chunk, *keys, cut(0, stop, tokenwise))
        outputs.append(run(cut(start, stop, q), cut(start, stop, tokenwise)))
    return jnp.concatenate(outputs, axis=1)


def _each_chunk(chunk, k, v, key, q, query):
    """Runs `chunk` over CHUNK queries at a time, one after the other."""
    L = q.shape[1]
    whole = L // CHUNK * CHUNK

    def split(x):
        x = x[:, :whole]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]), 1, 0)

    outputs = []
    if whole > CHUNK:
        pieces = jax.tree.map(split, (q, query))
        mapped = jax.lax.map(lambda piece: chunk(piece[0], k, v, piece[1], key), pieces)
        outputs.append(jnp.moveaxis(mapped, 0, 1).reshape(q.shape[0], whole, *q.shape[2:]))
    elif whole:
        outputs.append(chunk(q[:, :whole], k, v, jax.tree.map(lambda x: x[:, :whole], query), key))
    if whole < L:
        outputs.append(chunk(q[:, whole:], k, v, jax.tree.map(lambda x: x[:, whole:], query), key))
    return jnp.concatenate(outputs, axis=1)
