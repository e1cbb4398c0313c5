# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""CoPE: positions that are counted by what a query attends to."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions.kind import Relative
from bipe_jax.sharding import parameter


class Cope(Relative):
    """Contextual position encoding (Golovneva et al. 2024, equations 3 to 5).

    A key's position, as a query sees it, is the sum of the gates sigmoid(logit) from the key to the query, at
    most `positions` - 1. The logit gets the product of the query and the vector of that position, which
    lies between two rows of `table`. All heads share the table, which starts at 0.

    Of a coordinate c, the gate of token s counts c_s - c_(s-1) times: once for `position`, which is CoPE, and
    for `segment` at the first token of each segment alone. The first token, and one where the coordinate
    falls, counts once.

    The paper adds the product to logits that are divided by sqrt(H). Its released code divides the product as
    well: `divided`. Biases of other encodings are in the logits that the gates are of.
    """

    offsets_refused = "would count all tokens but the first of each segment"
    options = {"positions": int, "divided": bool}
    shared = False
    running = True

    def __init__(
        self,
        config: Config,
        coordinate: str,
        key: jax.Array,
        *,
        positions: int = 64,
        divided: bool = False,
    ):
        H = config.model.width // config.model.heads
        self.table = parameter(jnp.zeros((positions, H)), P(None, None))
        self.scale = H**-0.5 if divided else 1.0

    @staticmethod
    def check(
        config: Config, coordinate: str, *, positions: int = 64, divided: bool = False
    ) -> None:
        if positions < 2:
            raise UserError(f"position.relative: cope positions={positions} must be at least 2")

    def features(
        self, coordinate: jax.Array, x: jax.Array | None = None, before: Any = None
    ) -> dict[str, jax.Array]:
        """(B, L) integers -> how often each token counts, and the coordinate + 1: (B, L) integers each."""
        following = coordinate + 1  # 0: there is no token before
        previous = jnp.zeros_like(coordinate[:, :1]) if before is None else before["following"]
        before_each = jnp.concatenate([previous, following[:, :-1]], axis=1)
        steps = following - before_each
        begins = (steps < 0) | (before_each == 0)
        return {"step": jnp.where(begins, 1, steps), "following": following}

    def logits(
        self,
        logits: jax.Array,
        q: jax.Array,
        query: Any,
        key: Any,
        visible: jax.Array,
        heads: jax.Array,
    ) -> jax.Array:
        """Whole rows (B, N, L, S) float32 -> the same with the products of queries and positions."""
        gates = jnp.where(visible, jax.nn.sigmoid(logits), 0) * key["step"][:, None, None, :]
        table = self.table[...]
        last = table.shape[0] - 1
        position = jnp.minimum(jax.lax.cumsum(gates, axis=3, reverse=True), last)
        products = self.scale * jnp.einsum(
            "blnh,ph->bnlp", q.astype(table.dtype), table, precision="highest"
        )
        below = jnp.floor(jax.lax.stop_gradient(position)).astype(jnp.int32)
        rest = position - below
        lower, upper = (
            jnp.take_along_axis(products, jnp.minimum(i, last), axis=3) for i in (below, below + 1)
        )
        return logits + (1 - rest) * lower + rest * upper
