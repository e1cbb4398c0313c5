# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Attention by flash kernels: splash attention on TPUs, cuDNN on NVIDIA GPUs.

Neither takes a bias without holding L x L of it, and neither needs one: a bias that is linear in the
keys' coordinate is folded into q.k as a few more columns (`columns.linear_columns`), which
come first, so that large terms cancel before the content is added.

Shape letters: B batch, L query length, S key length, N query heads, K key/value heads, H head width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from bipe_jax.attention import scoring
from bipe_jax.attention.chunked import RESIDUAL
from bipe_jax.attention.columns import linear_columns
from bipe_jax.attention.scoring import Scoring, Side

TILE = 128  # lengths are padded to a multiple of it
# Queries or keys that splash attention works on at a time, of blocks of at least so many tokens: larger ones
# take fewer steps, and compute more above the diagonal.
_BLOCKS = {1024: 4096, 512: 0, 256: 0}
_BLOCK_BYTES = 512 * 1024  # of such a block of one head: more do not fit into a core's memory

# The slope, a document, that keeps documents apart in cuDNN: exp(-512) is 0 in float32.
_DOCUMENT_SLOPE = 512.0


def _with_columns(
    q: jax.Array, k: jax.Array, query_columns: list[jax.Array], key_columns: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Puts the columns (B, L, N, C) and (B, S, C) or (B, S, K, C) before those of q and k."""
    K = k.shape[2]
    key_columns = [jnp.repeat(c[:, :, None], K, axis=2) if c.ndim == 3 else c for c in key_columns]
    q = jnp.concatenate([*(c.astype(q.dtype) for c in query_columns), q], axis=-1)
    k = jnp.concatenate([*(c.astype(k.dtype) for c in key_columns), k], axis=-1)
    return q, k


def _fold(
    q: jax.Array,
    k: jax.Array,
    query: Side,
    key: Side,
    encodings: Sequence[Scoring],
    heads: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """q and k with the columns of all biases prepended; `scale` multiplies q.k later."""
    q, k = scoring.multiplied(q, k, query, key, encodings)
    columns = [
        encoding.columns(of_query, of_key, heads, scale)
        for encoding, of_query, of_key in zip(encodings, query.features, key.features, strict=True)
        if "columns" in encoding.acts
    ]
    return _with_columns(q, k, [c[0] for c in columns], [c[1] for c in columns])


def _pad(x: jax.Array, length: int) -> jax.Array:
    """x with zeros appended along axis 1."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: Side,
    key: Side,
    encodings: Sequence[Scoring],
    heads: jax.Array,
    shard: tuple[jax.Array | int, int] = (0, 1),
    interpret: bool = False,
) -> jax.Array:
    """Splash attention, with the arguments of `chunked.reference` and two more.

    Args:
      shard: (which, of how many) parts of the block the queries are; S is that many times L.
      interpret: run the kernel's program without a TPU, slowly, for tests.
    """
    which, shards = shard
    L, N, H = q.shape[1:]
    largest = _largest(k.shape[1], H * k.dtype.itemsize)
    block = min(largest, -(-L // TILE) * TILE) if shards == 1 else _divisor(L, largest)
    padded = -(-L // block) * block
    whole = padded * shards
    q, k = _fold((q * H**-0.5).astype(q.dtype), k, query, key, encodings, heads, 1.0)
    q, k, v = _pad(q, padded), _pad(k, whole), _pad(v, whole)
    documents = None
    if query.document_ids is not None and key.document_ids is not None:
        documents = SegmentIds(_pad(query.document_ids, padded), _pad(key.document_ids, whole))

    sizes = BlockSizes(*[block] * 8)  # pyright: ignore[reportArgumentType]  (the eight sizes come first)
    mask = MultiHeadMask([CausalMask((whole, whole))] * N)
    kernel = make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=RESIDUAL,
        interpret=interpret,
    )
    if shards > 1:
        kernel = _part(kernel, which, shards)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    mixed: Any = jax.vmap(kernel)(q, k, v, documents)
    return jnp.swapaxes(mixed, 1, 2)[:, :L]


def _largest(length: int, row: int) -> int:
    """The largest block of splash attention over so many keys, of which one of a head has so many bytes."""
    fitting = (
        block for block, least in _BLOCKS.items() if length >= least and block * row <= _BLOCK_BYTES
    )
    return next(fitting, min(_BLOCKS))


def _divisor(length: int, largest: int) -> int:
    """The largest block that divides a length, which is a multiple of TILE."""
    return next(block for block in range(largest, 0, -TILE) if length % block == 0)


def _part(kernel: Any, which: jax.Array | int, shards: int) -> Any:
    """The kernel for one part of the queries: its tables of blocks are cut along the queries.

    As `SplashAttentionKernel.manual_sharding_spec` cuts them, from inside a shard_map.
    """

    def cut(x: jax.Array, axis: int) -> jax.Array:
        size = x.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(x, which * size, size, axis)

    def part(info: Any) -> Any:
        tables = {"data_next": 1, "mask_next": 1, "block_mask": 1, "q_sequence": 0}
        tables = {name: axis for name, axis in tables.items() if getattr(info, name) is not None}
        return info._replace(**{n: cut(getattr(info, n), axis) for n, axis in tables.items()})

    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return type(kernel)(*map(part, infos), **kernel.kwargs)


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: Side,
    key: Side,
    encodings: Sequence[Scoring],
    heads: jax.Array,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> jax.Array:
    """cuDNN's flash attention; arguments as `chunked.reference`, where query and key are the same.

    Documents, each one run of tokens, are kept apart by a steep linear bias on their number in the
    block: causal attention only ever looks back, where documents have smaller numbers. Coordinates
    that restart at documents run on here, or an earlier document's large ones would be a reward that
    outweighs the bias; within a document only differences count.

    Args:
      implementation: "xla" computes the same without cuDNN, for tests.
    """
    L, N, H = q.shape[1:]
    scale = H**-0.5
    starts = None
    if query.document_ids is not None:
        starts = query.document_ids[:, 1:] != query.document_ids[:, :-1]
        running = [
            encoding.across_documents(features, starts)
            for encoding, features in zip(encodings, query.features, strict=True)
        ]
        query = key = query._replace(features=running)
    q, k = _fold(q, k, query, key, encodings, heads, scale)
    if starts is not None:
        number = jnp.pad(jnp.cumsum(starts, axis=1), ((0, 0), (1, 0)))
        slopes = np.full(N, _DOCUMENT_SLOPE)
        columns = linear_columns(slopes, number, number, jnp.arange(N), scale)
        q, k = _with_columns(q, k, [columns[0]], [columns[1]])
    width = v.shape[-1]
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, q.shape[-1] - width)])  # it must be as wide as k
    length = -(-L // TILE) * TILE
    q, k, v = (_pad(x, length) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, scale=scale, implementation=implementation
    )
    return mixed[:, :L, :, :width]
