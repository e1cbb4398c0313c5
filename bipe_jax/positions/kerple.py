# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""KERPLE's kernels: biases with learned parameters for each head."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bipe_jax.attention.scoring import Extent
from bipe_jax.config import Config
from bipe_jax.positions.clamping import clamped
from bipe_jax.positions.kind import Relative
from bipe_jax.sharding import parameter

_LOWEST, _LARGEST_POWER = 0.01, 2.0  # of the released code (chijames/KERPLE)


class KerpleLog(Relative):
    """KERPLE's logarithmic kernel (Chi et al. 2022, equation 4): -p ln(1 + a * distance).

    Each head has its own p and a, which are used clamped from below at 0.01. They start at U(0, 2) and
    U(0, 1), as in the released code.
    """

    offsets_refused = "has no value for distances below 0"
    _START = 2.0, 1.0  # p and a are drawn between 0 and these

    def __init__(self, config: Config, coordinate: str, key: jax.Array):
        p_key, a_key = jax.random.split(key)
        shape, (p, a) = (config.model.heads,), self._START
        self.p = parameter(jax.random.uniform(p_key, shape, maxval=p), P("tensor"))
        self.a = parameter(jax.random.uniform(a_key, shape, maxval=a), P("tensor"))

    def bias(self, query: jax.Array, key: jax.Array, heads: jax.Array) -> jax.Array:
        """Coordinates (B, L) and (B, S) -> (B, N, L, S) float32."""
        # Keys after the query are masked; their distances are below 0, where there is no logarithm.
        distance = jnp.maximum(query[:, None, :, None] - key[:, None, None, :], 0).astype(float)
        return self._kernel(distance, self.p[...][:, None, None], self.a[...][:, None, None])

    def bias_bound(self, query: Extent, key: Extent, heads: jax.Array) -> jax.Array:
        return self.bias(query.least, key.greatest, heads)

    @staticmethod
    def _kernel(distance: jax.Array, p: jax.Array, a: jax.Array) -> jax.Array:
        return -clamped(p, _LOWEST) * jnp.log1p(clamped(a, _LOWEST) * distance)


class KerplePower(KerpleLog):
    """KERPLE's power kernel (Chi et al. 2022, equation 4): -p * distance^a.

    Each head has its own p, used clamped from below at 0.01, and a, used clamped to [0.01, 2]. They start
    at U(0, 1) and U(0, 2), as in the released code (where p is called a, and a is called p).
    """

    _START = 1.0, 2.0

    @staticmethod
    def _kernel(distance: jax.Array, p: jax.Array, a: jax.Array) -> jax.Array:
        # At 0 the power is 0 for all a, and so is its gradient; its formula takes a logarithm of 0.
        apart = distance > 0
        power = jnp.where(apart, distance, 1) ** clamped(a, _LOWEST, _LARGEST_POWER)
        return -clamped(p, _LOWEST) * jnp.where(apart, power, 0)
