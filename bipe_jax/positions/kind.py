# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""What every kind of positional encoding is: the two base classes.

Shape letters: B batch, L query length, S key length, N query heads, K key/value heads, H head width, D
model width.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from bipe_jax.attention.scoring import Extent, Features
from bipe_jax.config import Config

# The methods that attention may call.
_OF_ATTENTION = (
    "bias", "columns", "factors", "across_documents", "visible", "logits", "bias_bound", "visible_bound",
)  # fmt: skip


class Kind(nnx.Module):
    """A kind of encoding, built as `kind(config, coordinate, key, **options)`.

    Parameters are declared by `sharding.parameter`. Other attributes must be static: numbers, texts and
    tuples of them, no arrays.

    Attributes:
      options: name -> type of each option that a config may give.
    """

    options: ClassVar[dict[str, type]] = {}

    def __init__(self, config: Config, coordinate: str, key: jax.Array, **options: Any):
        raise NotImplementedError

    @staticmethod
    def check(*arguments: Any, **options: Any) -> None:
        """`check(config, coordinate, **options)` raises UserError for what makes no sense together."""


class Absolute(Kind):
    """A kind whose vectors are added to the token embedding."""

    def __call__(self, coordinate: jax.Array) -> jax.Array:
        """Integers (B, L) -> vectors (B, L, D) float32."""
        raise NotImplementedError

    @staticmethod
    def longest(*arguments: Any, **options: Any) -> int | None:
        """`longest(config, coordinate, **options)`: the longest text, in tokens; None: any length."""
        return None


class Relative(Kind):
    """A kind that acts inside attention.

    A kind overrides the methods that describe it, and no others. One that only overrides `queries` and
    `keys` runs on every attention backend. One with a `bias` runs on flash kernels if it overrides
    `columns` as well, one with `factors` up to `longest_in_kernels`. One with `visible` or `logits` is
    computed in chunks. With `bias_bound` or `visible_bound` chunks skip keys that cannot count, and
    decoding drops them, see `attention.skipping`.

    Inside attention a mesh may shard the heads over the axis `tensor`. `heads` (N,) then says which of
    the model's query heads are computed, and parameters whose axes name `tensor` hold those alone.

    Attributes:
      offsets_refused: why a coordinate that falls back to 0 within a document, as `offset` does, makes no
        sense; "" if it does.
      shared: whether one set of parameters serves all layers. A config may say otherwise.
      reads_input: whether `features` needs `x`, which makes it a computation of each layer.
      running: whether `features` needs those of the token before.
      width: columns that `columns` adds to queries and keys.
      longest_in_kernels: the largest number of tokens for which `factors` of a whole row are finite.
      cacheable: whether what a token gets does not depend on later tokens, so that decoding may keep
        keys and features.

    Numbers are float32, or float64 where JAX has that enabled: what is said to be float32 below is then
    float64. Attention knows a kind by `acts`, `width` and the methods from `bias` on, see
    `attention.scoring`.
    """

    offsets_refused: ClassVar[str] = ""
    shared: ClassVar[bool] = True
    reads_input: ClassVar[bool] = False
    running: ClassVar[bool] = False
    width: int = 0
    longest_in_kernels: int = 0

    @staticmethod
    def turns(*arguments: Any, **options: Any) -> frozenset[int]:
        """`turns(config, **options)`: the features of a head that the kind turns, which no other may turn."""
        return frozenset()

    @property
    def cacheable(self) -> bool:
        return True

    @property
    def acts(self) -> frozenset[str]:
        """The names of the methods that the kind overrides, of those that attention may call."""
        return frozenset(
            name
            for name in _OF_ATTENTION
            if getattr(type(self), name) is not getattr(Relative, name)
        )

    def features(
        self, coordinate: jax.Array, x: jax.Array | None = None, before: Features = None
    ) -> Features:
        """What the other methods need to know of each token.

        Args:
          coordinate: (B, L).
          x: (B, L, D), what the layer's attention reads; None unless `reads_input`.
          before: if `running`, the features of the token before the first one, (B, 1, ...). None, or zeros,
            where there is none.

        Returns:
          A tree of arrays (B, L, ...).
        """
        return coordinate

    def queries(self, q: jax.Array, features: Features) -> jax.Array:
        """Queries (B, L, N, H) as attention is to have them.

        They may become wider, and keys with them. Logits are the products over the root of that width.
        """
        return q

    def keys(self, k: jax.Array, features: Features) -> jax.Array:
        """Keys (B, L, K, H) as attention is to have them."""
        return k

    def bias(self, query: Features, key: Features, heads: jax.Array) -> jax.Array:
        """A term that is added to the logits: (B, N, L, S) float32."""
        raise NotImplementedError

    def columns(
        self, query: Features, key: Features, heads: jax.Array, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        """The bias as a product: scale * (query column . key column), summed over `width` columns.

        Returns:
          (B, L, N, width) and (B, S, width), or (B, S, K, width) where key heads differ, exact in bfloat16.
        """
        raise NotImplementedError

    def factors(self, query: Features, key: Features) -> tuple[jax.Array, jax.Array]:
        """What queries and keys are multiplied with where they meet: (B, L, 1, H) and (B, S, 1, H) float32.

        For factors that depend on the coordinates of both sides, such as powers relative to a middle.
        """
        raise NotImplementedError

    def across_documents(self, features: Features, starts: jax.Array) -> Features:
        """Features whose coordinates run on where documents start.

        For `factors`, and for kernels that keep documents apart by a steep `columns` bias alone, which
        the large coordinates of an earlier document would outweigh.

        Args:
          starts: (B, L - 1) whether each token but the first begins a document.
        """
        raise NotImplementedError

    def visible(self, query: Features, key: Features) -> jax.Array:
        """Which keys a query may see besides what causality says: (B, 1 or N, L, S) booleans."""
        raise NotImplementedError

    def logits(
        self,
        logits: jax.Array,
        q: jax.Array,
        query: Features,
        key: Features,
        visible: jax.Array,
        heads: jax.Array,
    ) -> jax.Array:
        """Whole rows of logits (B, N, L, S) float32, biases included -> what softmax is to have.

        Args:
          q: (B, L, N, H), as `queries` gave them.
          visible: which logits are not masked, broadcastable to the logits.
        """
        raise NotImplementedError

    def bias_bound(self, query: Extent, key: Extent, heads: jax.Array) -> jax.Array:
        """An upper bound of the bias between the tokens of two blocks, (B, N, I, J) float32.

        It holds for all pairs of a query of a block I and a key of a block J that the query sees. In decoding
        a block of keys is all that were dropped.
        """
        raise NotImplementedError

    def visible_bound(self, query: Extent, key: Extent) -> jax.Array:
        """False where `visible` is false between all tokens of two blocks: (B, 1 or N, I, J) booleans."""
        raise NotImplementedError


def run_on(coordinate: jax.Array, starts: jax.Array) -> jax.Array:
    """A coordinate (B, L) as a running sum of its steps, without those at document starts (B, L - 1)."""
    steps = jnp.where(starts, 0, coordinate[:, 1:] - coordinate[:, :-1])
    return jnp.pad(jnp.cumsum(steps, axis=1), ((0, 0), (1, 0)))
