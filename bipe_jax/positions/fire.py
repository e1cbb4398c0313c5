# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""FIRE: a learned function of the distance relative to how far the query is."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions import perceptron
from bipe_jax.positions.kind import Relative
from bipe_jax.sharding import parameter

_EPSILON = 1e-6


class Fire(Relative):
    """FIRE (Li et al. 2024, equations 8 and 9): f(psi(distance) / psi(max(query coordinate, L))).

    psi(t) = ln(|c| t + 1), L = |threshold_scale * threshold|, and f is a perceptron 1 -> `hidden` (ReLU) ->
    heads. `threshold` is in units of the coordinate: 512 is meant for tokens. Start: c = 0.1,
    threshold_scale = 1, and f as PyTorch draws linear layers.
    """

    offsets_refused = "has no value for distances below 0"
    options = {"hidden": int, "threshold": float}
    shared = False

    def __init__(
        self,
        config: Config,
        coordinate: str,
        key: jax.Array,
        *,
        hidden: int = 32,
        threshold: float = 512.0,
    ):
        keys, N = jax.random.split(key, 4), config.model.heads
        initial = perceptron.initial
        self.first_kernel = parameter(initial(keys[0], (1, hidden), 1), P(None, None))
        self.first_bias = parameter(initial(keys[1], (hidden,), 1), P(None))
        self.second_kernel = parameter(initial(keys[2], (hidden, N), hidden), P(None, "tensor"))
        self.second_bias = parameter(initial(keys[3], (N,), hidden), P("tensor"))
        self.c = parameter(jnp.full((), 0.1), P())
        self.threshold_scale = parameter(jnp.ones(()), P())
        self.threshold = threshold

    @staticmethod
    def check(
        config: Config, coordinate: str, *, hidden: int = 32, threshold: float = 512.0
    ) -> None:
        if hidden < 1:
            raise UserError(f"position.relative: fire hidden={hidden} must be at least 1")
        if threshold <= 0:
            raise UserError(f"position.relative: fire threshold={threshold:g} must be above 0")

    def bias(self, query: jax.Array, key: jax.Array, heads: jax.Array) -> jax.Array:
        """Coordinates (B, L) and (B, S) -> (B, N, L, S) float32."""
        distance = jnp.maximum(query[:, None, :, None] - key[:, None, None, :], 0)
        longest = jnp.maximum(
            query.astype(float), jnp.abs(self.threshold_scale[...] * self.threshold)
        )

        def psi(t: jax.Array) -> jax.Array:
            return jnp.log1p(jnp.abs(self.c[...]) * t)

        ratio = psi(distance.astype(float)) / (psi(longest)[:, None, :, None] + _EPSILON)
        first = self.first_kernel[...], self.first_bias[...]
        second = self.second_kernel[...], self.second_bias[...]
        return perceptron.apply(ratio, first, second, jax.nn.relu)
