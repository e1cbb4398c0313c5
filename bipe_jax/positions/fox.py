# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""FoX, the forgetting transformer: a bias by gates that read the layer's input."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bipe_jax.attention.columns import sum_columns, sum_width
from bipe_jax.attention.scoring import Extent
from bipe_jax.config import Config
from bipe_jax.positions.kind import Relative
from bipe_jax.sharding import parameter


class Fox(Relative):
    """Forgetting attention (Lin et al. 2025, equation 5): the bias is the sum of ln f between key and query.

    f_s = sigmoid(x_s . gate_kernel + gate_bias) for each head, with x the input of the layer's attention.
    Of a coordinate c, token s counts c_s - c_(s-1) times: every token once for `position`, which is FoX, and
    the first token of each segment for `segment`. Where a coordinate falls, a document begins and nothing is
    counted. gate_kernel starts at N(0, init_std), gate_bias at 0, as in the released code.

    Features: the sum so far, in whole numbers and a rest in [0, 1), so that differences of large sums are
    exact in float32, and the coordinate.
    """

    offsets_refused = "would count all tokens but the first of each segment"
    shared = False
    reads_input = True
    running = True

    def __init__(self, config: Config, coordinate: str, key: jax.Array):
        D, N = config.model.width, config.model.heads
        kernel = config.model.init_std * jax.random.normal(key, (D, N))
        self.gate_kernel = parameter(kernel, P("fsdp", "tensor"))
        self.gate_bias = parameter(jnp.zeros(N), P("tensor"))
        self.group, self.head_width = N // config.model.kv_heads, D // N
        self.width = sum_width(self.group, self.head_width)

    def features(
        self, coordinate: jax.Array, x: jax.Array | None = None, before: Any = None
    ) -> dict[str, jax.Array]:
        """(B, L) and (B, L, D) -> "whole" and "rest" (B, L, N) float32, "coordinate" (B, L)."""
        assert x is not None
        kernel, bias = self.gate_kernel[...], self.gate_bias[...]
        gates = jnp.einsum("bld,dn->bln", x.astype(kernel.dtype), kernel, precision="highest")
        previous = coordinate[:, :1] if before is None else before["coordinate"]
        steps = jnp.diff(coordinate, axis=1, prepend=previous)
        # Forgetting is counted upwards, so that sums begin at 0 and are above it.
        forgotten = jnp.maximum(steps, 0)[..., None] * jax.nn.softplus(-(gates + bias))
        whole = jnp.floor(jax.lax.stop_gradient(forgotten))
        sums = whole, forgotten - whole
        if before is not None:
            sums = jax.tree.map(
                lambda new, old: jnp.concatenate([old, new], axis=1),
                sums,
                (before["whole"], before["rest"]),
            )
        L = coordinate.shape[1]
        whole, rest = (x[:, -L:] for x in jax.lax.associative_scan(_add, sums, axis=1))
        # What a document's tokens get is the gradient of its own gates alone: rounded sums over a document
        # are not quite 0, and would add up in the documents before it.
        start = jax.lax.cummax(jnp.where(steps < 0, jnp.arange(L), 0), axis=1)
        at_start = jnp.take_along_axis(rest, start[..., None], axis=1)
        rest -= at_start - jax.lax.stop_gradient(at_start)
        return {"whole": whole, "rest": rest, "coordinate": coordinate}

    def bias(self, query: Any, key: Any, heads: jax.Array) -> jax.Array:
        """Features of both sides -> (B, N, L, S) float32."""

        def difference(name: str) -> jax.Array:
            of_query, of_key = (
                jnp.moveaxis(side[name][..., heads], -1, 1) for side in (query, key)
            )
            return of_key[:, :, None, :] - of_query[:, :, :, None]

        return difference("whole") + difference("rest")

    def bias_bound(self, query: Extent, key: Extent, heads: jax.Array) -> jax.Array:
        """Too high by at most 2: the least whole part and the least rest need not be of one token."""
        return self.bias(query.least, key.greatest, heads)

    def columns(
        self, query: Any, key: Any, heads: jax.Array, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        """The same bias for flash kernels, see `sum_columns`.

        Kernels give the gradients of its columns in the dtype of the keys: those of the gates, sums of them,
        are off by some percent in bfloat16.
        """

        def sums(side: Any) -> tuple[jax.Array, jax.Array]:
            return side["whole"][..., heads], side["rest"][..., heads]

        return sum_columns(sums(query), sums(key), self.group, self.head_width, scale)

    def across_documents(self, features: Any, starts: jax.Array) -> Any:
        """The sums run on as they are: what lies further back is never rewarded."""
        return features


def _add(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The sum of two numbers in whole parts and rests."""
    rest = a[1] + b[1]
    carry = jnp.floor(jax.lax.stop_gradient(rest))
    return a[0] + b[0] + carry, rest - carry
