# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""What attention asks of an encoding that acts on logits. `positions.kind.Relative` is the base of all.

Shape letters: B batch, L query length, S key length, N query heads, H head width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx

Features = Any  # what an encoding knows of each token: a tree of arrays (B, L, ...)


class Extent(NamedTuple):
    """The least and the greatest features of the tokens of each block: trees of arrays (B, blocks, ...)."""

    least: Features
    greatest: Features


class Scoring(Protocol):
    """An encoding, as attention sees it.

    Attributes:
      acts: which of the methods below the encoding has.
      width: columns that `columns` adds to queries and keys.
      longest_in_kernels: the largest number of tokens for which `factors` of a whole row are finite.
    """

    @property
    def width(self) -> int: ...

    @property
    def longest_in_kernels(self) -> int: ...

    @property
    def acts(self) -> frozenset[str]: ...

    def bias(self, query: Features, key: Features, heads: jax.Array) -> jax.Array: ...

    def columns(
        self, query: Features, key: Features, heads: jax.Array, scale: float
    ) -> tuple[jax.Array, jax.Array]: ...

    def factors(self, query: Features, key: Features) -> tuple[jax.Array, jax.Array]: ...

    def across_documents(self, features: Features, starts: jax.Array) -> Features: ...

    def visible(self, query: Features, key: Features) -> jax.Array: ...

    def bias_bound(self, query: Extent, key: Extent, heads: jax.Array) -> jax.Array: ...

    def visible_bound(self, query: Extent, key: Extent) -> jax.Array: ...

    def logits(
        self,
        logits: jax.Array,
        q: jax.Array,
        query: Features,
        key: Features,
        visible: jax.Array,
        heads: jax.Array,
    ) -> jax.Array: ...


class Side(NamedTuple):
    """What masks and biases know of the queries, or of the keys.

    Attributes:
      indices: (B or 1, L), of the tokens in the block.
      document_ids: (B, L), or None where documents are not kept apart.
      features: of each encoding that acts on logits.
    """

    indices: jax.Array
    document_ids: jax.Array | None
    features: list[Features]


def split(encodings: list[Scoring]) -> tuple[list[Any], list[Any], list[Any]]:
    """Encodings apart from their parameters, for functions that take arrays as arguments alone.

    Returns:
      What `join` needs, the parameters, and the mesh axes of each parameter: one list for each encoding.
    """
    structures, params, axes = [], [], []
    for encoding in encodings:
        graph, state = nnx.split(encoding)
        leaves, structure = jax.tree.flatten(state)
        variables = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        structures.append((graph, structure))
        params.append(leaves)
        axes.append([variable.get_metadata()["axes"] for variable in variables])
    return structures, params, axes


def join(structures: list[Any], params: list[Any]) -> list[Scoring]:
    """The encodings that `split` took apart."""
    return [
        nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        for (graph, structure), leaves in zip(structures, params, strict=True)
    ]


def multiplied(
    q: jax.Array,
    k: jax.Array,
    query: Side,
    key: Side,
    encodings: Sequence[Scoring],
) -> tuple[jax.Array, jax.Array]:
    """Queries (B, L, N, H) and keys (B, S, K, H) times the `factors` of the encodings that have them."""
    for encoding, of_query, of_key in zip(encodings, query.features, key.features, strict=True):
        if "factors" in encoding.acts:
            for_q, for_k = encoding.factors(of_query, of_key)
            q, k = (q * for_q).astype(q.dtype), (k * for_k).astype(k.dtype)
    return q, k
