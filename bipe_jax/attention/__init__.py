# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Causal attention: one function, four backends.

| backend   | where                | encodings that act on logits  | memory      |
|-----------|----------------------|-------------------------------|-------------|
| splash    | TPU                  | those with columns of q and k | linear in L |
| cudnn     | NVIDIA GPU, bfloat16 | those with columns of q and k | linear in L |
| chunked   | anywhere             | any, exact                    | linear in L |
| reference | anywhere             | any, exact                    | L x L       |

Chunks of long rows skip the keys that are proved to add nothing (`skipping`, `pruned`).

On a mesh the batch, the heads (axis `tensor`) and the queries (axis `context`) are cut over the
devices; along `context` each device gathers all keys and values with what belongs to them.

Shape letters: B batch, L length, N query heads, K key/value heads, H head width.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bipe_jax import collectives, sharding
from bipe_jax.attention import kernels, scoring, skipping
from bipe_jax.attention.chunked import chunked, reference
from bipe_jax.attention.columns import COLUMNS
from bipe_jax.attention.pruned import pruned
from bipe_jax.attention.scoring import Features, Scoring, Side
from bipe_jax.config.fields import BACKENDS
from bipe_jax.errors import UserError

# From this length on chunks skip what cannot count, on a CPU; below, finding that out may cost what it saves.
SKIPS_FROM = 2048
# So many times longer elsewhere, where each step of a loop of unknown length waits for the host.
_ELSEWHERE = 8


def choose(
    backend: str,
    platform: str,
    q: jax.Array | jax.ShapeDtypeStruct,
    *,
    encodings: Sequence[Scoring] = (),
    documents: bool = False,
    context: int = 1,
) -> str:
    """The backend to use: the one that is asked for, or with "auto" the first that can do it.

    Args:
      backend: one of BACKENDS, or "auto".
      platform: "tpu", "gpu" or "cpu".
      q: (B, L, N, H), the whole of the queries; its shape and dtype count.
      encodings: those with a bias. documents: whether they are kept apart. context: devices that a
        block is cut over.

    Raises:
      UserError: the one that is asked for cannot do it.
    """
    complaints = {
        "splash": _against_splash(platform, q, encodings, context),
        "cudnn": _against_cudnn(platform, q, encodings, documents, context),
    }
    if backend == "auto":
        return next(b for b in BACKENDS if not complaints.get(b))
    if complaint := complaints.get(backend):
        raise UserError(f"config.model.attention={backend!r} {complaint}: use 'auto' or 'chunked'")
    return backend


def _against_folding(encodings: Sequence[Scoring], length: int) -> str | None:
    for encoding in encodings:
        acts, name = encoding.acts, type(encoding).__name__
        if acts & {"visible", "logits"} or ("bias" in acts and "columns" not in acts):
            return f"has no form of the encoding {name}"
        if "factors" in acts and length > encoding.longest_in_kernels:
            return f"computes the encoding {name} up to {encoding.longest_in_kernels} tokens"
    return None


def _against_splash(
    platform: str,
    q: jax.Array | jax.ShapeDtypeStruct,
    encodings: Sequence[Scoring],
    context: int,
) -> str | None:
    if platform != "tpu":
        return f"runs on TPUs, and this is a {platform}"
    if context > 1 and q.shape[1] % (context * kernels.TILE):
        return (
            f"with mesh.context={context} takes lengths that are a multiple of "
            f"{context * kernels.TILE}, not {q.shape[1]}"
        )
    return _against_folding(encodings, q.shape[1])


def _against_cudnn(
    platform: str,
    q: jax.Array | jax.ShapeDtypeStruct,
    encodings: Sequence[Scoring],
    documents: bool,
    context: int,
) -> str | None:
    if platform != "gpu":
        return f"runs on NVIDIA GPUs, and this is a {platform}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16, not {q.dtype} (config.model.dtype)"
    if context > 1:
        return f"cannot have its queries cut by mesh.context={context}"
    for encoding in encodings:
        if documents and "across_documents" not in encoding.acts:
            return f"cannot keep documents apart under the encoding {type(encoding).__name__}"
    width = q.shape[-1] + sum(encoding.width for encoding in encodings) + COLUMNS * documents
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    widest = 256 if float(capability) >= 9 else 128  # from Hopper on
    if width % 8 or width > widest:
        return f"takes heads of a multiple of 8 up to {widest} wide with their columns, not {width}"
    return _against_folding(encodings, q.shape[1])


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    encodings: Sequence[tuple[Scoring, Features]] = (),
    document_ids: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Causal attention under encodings that act on logits and, if asked, document masks.

    Args:
      q: (B, L, N, H). k, v: (B, L, K, H), with N a multiple of K.
      encodings: those that act on logits, each with its features, a tree of (B, L, ...).
      document_ids: (B, L) integers; tokens attend only to tokens of equal id. A document is one run
        of tokens. None: to all before.
      backend: see `choose`.

    Returns:
      (B, L, N, H) in q's dtype.

    Raises:
      UserError: as `choose`.
    """
    acting = [encoding for encoding, _ in encodings]
    features = [of_tokens for _, of_tokens in encodings]
    context = sharding.context_shards()
    platform = sharding.platform(jax.sharding.get_abstract_mesh())
    documents = document_ids is not None
    name = choose(backend, platform, q, encodings=acting, documents=documents, context=context)
    shortest = SKIPS_FROM * (1 if platform == "cpu" else _ELSEWHERE)
    skips = q.shape[1] >= shortest and skipping.possible(acting, documents)

    structures, params, axes = scoring.split(acting)

    def on_one(
        devices: collectives.Devices,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        tokens: Any,
        params: Any,
    ) -> jax.Array:
        L, N = q.shape[1:3]
        part = devices.index("context")
        query = Side(part * L + jnp.arange(L)[None], *tokens)
        own_k = k
        k, v, key = devices.gather((k, v, query), "context", 1)
        heads = devices.index("tensor") * N + jnp.arange(N)
        sides = (q, k, v, query, key, scoring.join(structures, params), heads)
        match name:
            case "splash":
                return kernels.splash(*sides, shard=(part, context))
            case "cudnn":
                return kernels.cudnn(*sides)
            case "chunked" if skips:
                return pruned(*sides, own_k, groups=_groups(k.shape[2], platform))
            case "chunked":
                return chunked(*sides, aligned=context == 1)
            case _:
                return reference(*sides)

    heads, tokens = sharding.ACTIVATIONS["heads"], sharding.ACTIVATIONS["tokens"]
    run = collectives.on_each(on_one, (heads, heads, heads, tokens, axes), heads)
    return run(q, k, v, (document_ids, features), params)


def _groups(kv_heads: int, platform: str) -> int:
    """Into how many groups heads are cut, each of which skips on its own: on a CPU each key head is one.

    On other platforms they are few, so that a block's products are large.
    """
    return kv_heads if platform == "cpu" else math.gcd(kv_heads, 4)
