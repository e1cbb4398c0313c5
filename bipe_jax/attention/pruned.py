# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Attention that visits, of each block of queries and group of heads, the blocks of keys that can count.

Which they are is found at run time (`skipping`). Under a bias that falls with distance their number does not
grow with the length, and neither does the time of a token. Heads with a steep bias see little, and those with
a flat one much: each group visits its own blocks.

Forward and backward passes are those of FlashAttention-2 (Dao 2023, algorithms 1 and 2).

Shape letters: B batch, L query length, S key length, N query heads, K key/value heads, H head width; G groups
of heads, each of n = N / G query heads and k = K / G key heads; I and J, blocks of T queries and of T keys;
M = n / k * T rows of logits of a key head.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bipe_jax.attention import scoring, skipping
from bipe_jax.attention.chunked import RESIDUAL, scores
from bipe_jax.attention.scoring import Scoring, Side
from bipe_jax.attention.skipping import Blocks

BLOCK = 256  # tokens of a block of queries or keys
_NEVER = jnp.iinfo(jnp.int32).max  # the index of padding among the keys: no query comes after it

Params = list[
    list[jax.Array | None]
]  # of each encoding; None in the place of those that are elsewhere


class _Group(NamedTuple):
    """Heads that share what they visit: q (B, L, n, H), k and v (B, S, k, H), and their parameters."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    params: Params


class _Shared(NamedTuple):
    """What all groups have in common, with the parameters that are not of single heads."""

    query: Side
    key: Side
    params: Params


class _Bounds(NamedTuple):
    """What a group skips by: heads (n,), floor (B, n, I) of `skipping.needed`, norms (B, I or J, n)."""

    heads: jax.Array
    floor: jax.Array
    query_norms: jax.Array
    key_norms: jax.Array


class _Static(NamedTuple):
    """What is no array: encodings apart from their parameters, H, and S without padding."""

    structures: list[Any]
    width: int
    keys: int


class _Task(NamedTuple):
    """All that a group's passes need; `extents` of the blocks of queries and of keys."""

    static: _Static
    group: _Group
    bounds: _Bounds
    shared: _Shared
    extents: tuple[Blocks, Blocks]

    def needed(self, number: jax.Array) -> jax.Array:
        """Which blocks of keys a block of queries needs, (J,) booleans."""
        query, key = self.extents
        query = query._replace(norms=self.bounds.query_norms)
        query, floor = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, number, 1, 1),
            (query, jnp.swapaxes(self.bounds.floor, 1, 2)),
        )
        return skipping.needed(
            query,
            key._replace(norms=self.bounds.key_norms),
            jnp.swapaxes(floor, 1, 2),
            _join(self.static, self.group.params, self.shared.params),
            self.bounds.heads,
            self.static.width,
            self.static.keys,
        ).any(axis=(0, 1, 2))

    def visit(self, number: jax.Array, body: Callable[[jax.Array, Any], Any], state: Any) -> Any:
        """The state after `body(J, state)` for each block J of keys that a block of queries needs."""
        needed = self.needed(number)
        count = len(needed)
        numbers = jnp.arange(count)

        def following(block: jax.Array | int) -> jax.Array:
            return jnp.where(needed & (numbers >= block), numbers, count).min()

        def step(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            return following(carry[0] + 1), body(*carry)

        return jax.lax.while_loop(lambda carry: carry[0] < count, step, (following(0), state))[1]


def pruned(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: Side,
    key: Side,
    encodings: Sequence[Scoring],
    heads: jax.Array,
    own_k: jax.Array,
    groups: int,
) -> jax.Array:
    """As `chunked.reference`, without what is proved to add nothing; where `skipping.possible`.

    Args:
      own_k: (B, L, K, H), the keys of the tokens that the queries are of.
      groups: of heads, a divisor of K.
    """
    B, L, N, H = q.shape
    S = k.shape[1]
    floor = jnp.moveaxis(skipping.own_logits(q, own_k, query, encodings, heads), 1, 2)
    q, query, floor = _padded((q, query, floor))
    k, v, key = _padded((k, v, key))
    indices = jnp.where(jnp.arange(k.shape[1]) < S, key.indices, _NEVER)
    key = key._replace(indices=indices)
    blocks = skipping.blocks_of(q, query, N, BLOCK), skipping.blocks_of(k, key, N, BLOCK)
    query_norms, key_norms = (_cut(side.norms, 2, groups) for side in blocks)
    floor = _cut(jnp.swapaxes(skipping.extent(floor, BLOCK).least, 1, 2), 1, groups)
    bounds = _Bounds(heads.reshape(groups, -1), floor, query_norms, key_norms)
    extents = tuple(side._replace(norms=side.norms[:0]) for side in blocks)

    structures, params, axes = scoring.split(list(encodings))
    of_heads, of_all = _split_params(params, axes, groups)
    q, k, v = (_cut(x, 2, groups) for x in (q, k, v))
    group = _Group(q, k, v, of_heads)
    mixed = _run(
        _Static(structures, H, S),
        (group, _Shared(query, key, of_all)),
        jax.lax.stop_gradient((bounds, extents)),
    )
    # (G, I, B, k, M, H) -> (B, I, T, G, k, N / K, H)
    mixed = mixed.reshape(*mixed.shape[:4], -1, BLOCK, mixed.shape[-1])
    return jnp.transpose(mixed, (2, 1, 5, 0, 3, 4, 6)).reshape(B, -1, N, v.shape[-1])[:, :L]


def _run(static: _Static, arrays: tuple[_Group, _Shared], bounds: Any) -> jax.Array:
    """The result (G, I, B, k, M, H), with its gradients; `arrays` and `bounds` are of all groups."""
    floats, others, structure = _parted(arrays)

    def forward(floats: list[jax.Array], rest: Any) -> tuple[jax.Array, jax.Array]:
        group, shared = _joined(structure, floats, rest[0])

        def run(of_group: tuple[_Group, _Bounds]) -> tuple[jax.Array, jax.Array]:
            group, bounds = of_group
            return _forward(_Task(static, group, bounds, shared, rest[1][1]))

        return jax.lax.map(run, (group, rest[1][0]))

    @jax.custom_vjp
    def attend(floats: list[jax.Array], rest: Any) -> jax.Array:
        return forward(floats, rest)[0]

    def attend_forward(floats: list[jax.Array], rest: Any) -> tuple[jax.Array, Any]:
        mixed, log_total = (checkpoint_name(x, RESIDUAL) for x in forward(floats, rest))
        return mixed, (floats, rest, mixed, log_total)

    def attend_backward(kept: Any, cotangent: jax.Array) -> tuple[list[jax.Array], None]:
        floats, (others, (bounds, extents)), mixed, log_total = kept
        group, shared = _joined(structure, floats, others)

        def run(totals: list[jax.Array], of_group: Any) -> tuple[list[jax.Array], _Group]:
            group, bounds, *residuals = of_group
            task = _Task(static, group, bounds, shared, extents)
            of_group, of_shared = _backward(task, *residuals)
            added = [a + b for a, b in zip(totals, _parted(of_shared)[0], strict=True)]
            return added, of_group

        zeros = [jnp.zeros(x.shape, _wide(x)) for x in _parted(shared)[0]]
        totals, of_groups = jax.lax.scan(run, zeros, (group, bounds, mixed, log_total, cotangent))
        grads = [*jax.tree.leaves(of_groups), *totals]
        return [g.astype(x.dtype) for g, x in zip(grads, floats, strict=True)], None

    attend.defvjp(attend_forward, attend_backward)
    return attend(floats, (others, bounds))


def _forward(task: _Task) -> tuple[jax.Array, jax.Array]:
    """The results (I, B, k, M, H) of a group, and the logarithms of the sums of weights (I, B, k, M, 1)."""
    group, shared = task.group, task.shared
    encodings = _join(task.static, group.params, shared.params)
    B, L, n, _ = group.q.shape
    K, H = group.v.shape[2:]
    dtype = _wide(group.q)
    rows = (B, K, n // K * BLOCK)

    def of_queries(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, query = _block((group.q, shared.query), number)

        def visit(block: jax.Array, state: Any) -> Any:
            highest, total, mixed = state
            k, v, key = _block((group.k, group.v, shared.key), block)
            logits = scores(q, k, query, key, encodings, task.bounds.heads)
            higher = jnp.maximum(highest, logits.max(axis=-1, keepdims=True))
            weights, scale = jnp.exp(logits - higher), jnp.exp(highest - higher)
            product = jnp.einsum(
                "bkms,bskh->bkmh", weights.astype(v.dtype), v, preferred_element_type=dtype
            )
            return (
                higher,
                total * scale + weights.sum(axis=-1, keepdims=True),
                mixed * scale + product,
            )

        start = (
            jnp.full((*rows, 1), jnp.finfo(dtype).min, dtype),
            jnp.zeros((*rows, 1), dtype),
            jnp.zeros((*rows, H), dtype),
        )
        highest, total, mixed = task.visit(number, visit, start)
        return (mixed / total).astype(group.v.dtype), highest + jnp.log(total)

    return jax.lax.map(of_queries, jnp.arange(L // BLOCK))


def _backward(
    task: _Task, mixed: jax.Array, log_total: jax.Array, cotangent: jax.Array
) -> tuple[_Group, _Shared]:
    """The gradients of the floating-point numbers of a group, and of what groups share, in float32."""
    group, shared = task.group, task.shared
    dtype = _wide(group.q)
    products = (cotangent.astype(dtype) * mixed.astype(dtype)).sum(axis=-1, keepdims=True)

    def of_queries(totals: Any, of_block: Any) -> tuple[Any, Any]:
        number, log_total, cotangent, products = of_block
        q_side = _block((group.q, shared.query), number)
        q_floats, q_others, q_structure = _parted(q_side)

        def visit(block: jax.Array, state: Any) -> Any:
            of_q, of_k, of_v, of_params = state
            v = _block(group.v, block)
            k_floats, k_others, k_structure = _parted(_block((group.k, shared.key), block))

            def logits_of(
                q_floats: list[jax.Array], k_floats: list[jax.Array], params: tuple[Params, Params]
            ) -> jax.Array:
                q, query = _joined(q_structure, q_floats, q_others)
                k, key = _joined(k_structure, k_floats, k_others)
                encodings = _join(task.static, *params)
                return scores(q, k, query, key, encodings, task.bounds.heads)

            logits, pull = jax.vjp(logits_of, q_floats, k_floats, (group.params, shared.params))
            weights = jnp.exp(logits - log_total)
            of_weights = jnp.einsum("bkmh,bskh->bkms", cotangent, v, preferred_element_type=dtype)
            added_v = jnp.einsum(
                "bkms,bkmh->bskh", weights.astype(v.dtype), cotangent, preferred_element_type=dtype
            )
            added_q, added_k, added_params = pull(weights * (of_weights - products))
            return (
                jax.tree.map(jnp.add, of_q, added_q),
                jax.tree.map(lambda x, y: _add_block(x, y, block), of_k, added_k),
                _add_block(of_v, added_v, block),
                jax.tree.map(jnp.add, of_params, added_params),
            )

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), q_floats)
        of_q, *totals = task.visit(number, visit, (zeros, *totals))
        return totals, of_q

    key_floats, key_others, key_structure = _parted((group.k, shared.key))
    totals = [key_floats, group.v, (group.params, shared.params)]
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), totals)
    count = group.q.shape[1] // BLOCK
    (of_k, of_v, (of_own, of_all)), of_q = jax.lax.scan(
        of_queries, start, (jnp.arange(count), log_total, cotangent, products)
    )
    of_q = [jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in of_q]
    _, q_others, q_structure = _parted((group.q, shared.query))
    of_q, query = _joined(q_structure, of_q, q_others)
    of_k, key = _joined(key_structure, of_k, key_others)
    return _Group(of_q, of_k, of_v, of_own), _Shared(query, key, of_all)


def _wide(x: jax.Array) -> Any:
    """The dtype of sums: float32 at least."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _padded(tree: Any) -> Any:
    """Arrays (B, L, ...) as long as whole blocks; what is added repeats the last token."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % BLOCK)] + [(0, 0)] * (x.ndim - 2), mode="edge")

    return jax.tree.map(pad, tree)


def _block(tree: Any, number: jax.Array) -> Any:
    """A block of arrays (B, L, ...)."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * BLOCK, BLOCK, 1), tree)


def _add_block(x: jax.Array, added: jax.Array, number: jax.Array) -> jax.Array:
    changed = _block(x, number) + added
    return jax.lax.dynamic_update_slice_in_dim(x, changed, number * BLOCK, 1)


def _cut(x: jax.Array, axis: int, groups: int) -> jax.Array:
    """An array cut along an axis into groups, which come first."""
    shape = (*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _split_params(
    params: list[list[jax.Array]], axes: list[Any], groups: int
) -> tuple[Params, Params]:
    """Parameters of single heads, cut into groups, and the others; None in each other's places."""
    of_heads: Params = []
    of_all: Params = []
    for own, own_axes in zip(params, axes, strict=True):
        pairs = [
            (x, list(a).index("tensor") if "tensor" in a else None)
            for x, a in zip(own, own_axes, strict=True)
        ]
        of_heads.append([None if axis is None else _cut(x, axis, groups) for x, axis in pairs])
        of_all.append([x if axis is None else None for x, axis in pairs])
    return of_heads, of_all


def _join(static: _Static, of_heads: Params, of_all: Params) -> list[Scoring]:
    """The encodings with the parameters of a group."""
    params = [
        [b if a is None else a for a, b in zip(*pair, strict=True)]
        for pair in zip(of_heads, of_all, strict=True)
    ]
    return scoring.join(static.structures, params)


def _parted(tree: Any) -> tuple[list[jax.Array], list[jax.Array], Any]:
    """The leaves that have gradients, the other leaves, and what `_joined` needs besides."""
    leaves, structure = jax.tree.flatten(tree)
    inexact = tuple(bool(jnp.issubdtype(x.dtype, jnp.inexact)) for x in leaves)
    floats = [x for x, has in zip(leaves, inexact, strict=True) if has]
    others = [x for x, has in zip(leaves, inexact, strict=True) if not has]
    return floats, others, (structure, inexact)


def _joined(structure: Any, floats: list[jax.Array], others: list[jax.Array]) -> Any:
    """The tree that `_parted` took apart."""
    treedef, inexact = structure
    of_floats, of_others = iter(floats), iter(others)
    return jax.tree.unflatten(treedef, [next(of_floats if has else of_others) for has in inexact])
