# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""KERPLE's kernels: biases with learned parameters for each head."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions.kind import Relative
from bipe_jax.sharding import parameter

_LOWEST = 0.01  # of the released code (chijames/KERPLE), which clamps by overwriting the parameter


@jax.custom_jvp
def clamped(parameter: jax.Array) -> jax.Array:
    """max(parameter, 0.01) whose gradient is that of the parameter, as if it were not clamped.

    An ordinary maximum has no gradient below the bound, so that a parameter that fell below it could
    never come back.
    """
    return jnp.maximum(parameter, _LOWEST)


@clamped.defjvp
def _clamped_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return clamped(*primals), tangents[0]


class KerpleLog(Relative):
    """KERPLE's logarithmic kernel (Chi et al. 2022, equation 4): -p ln(1 + a * distance).

    Each head has its own p and a, which are used clamped from below at 0.01. They start at U(0, 2) and
    U(0, 1), as in the released code.
    """

    def __init__(self, config: Config, coordinate: str, key: jax.Array):
        p_key, a_key = jax.random.split(key)
        shape = (config.model.heads,)
        self.p = parameter(jax.random.uniform(p_key, shape, maxval=2.0), P("tensor"))
        self.a = parameter(jax.random.uniform(a_key, shape), P("tensor"))

    @staticmethod
    def check(config: Config, coordinate: str) -> None:
        if coordinate == "offset":
            raise UserError(
                "position.relative: ('kerple-log', 'offset') has no value for distances below 0, and "
                "offsets fall back to 0 at each segment: use 'position' or 'segment'"
            )

    def bias(self, query: jax.Array, key: jax.Array, heads: jax.Array) -> jax.Array:
        """Coordinates (B, L) and (B, S) -> (B, N, L, S) float32."""
        # Keys after the query are masked; their distances are below 0, where there is no logarithm.
        distance = jnp.maximum(query[:, None, :, None] - key[:, None, None, :], 0)
        p, a = (clamped(x[...])[:, None, None] for x in (self.p, self.a))
        return -p * jnp.log1p(a * distance.astype(float))
