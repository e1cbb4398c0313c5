# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""PoPE: polar coordinates, whose magnitudes are content and whose angles are position."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions.angles import angles
from bipe_jax.positions.clamping import clamped
from bipe_jax.positions.kind import Relative
from bipe_jax.sharding import parameter


class Pope(Relative):
    """Polar coordinate position embedding (Gopalakrishnan et al. 2025, equation 6).

    The logit is H^-1/2 sum over c of softplus(q_c) softplus(k_c) cos(distance * theta^(-c/H) - delta_c),
    c = 0 … H - 1. delta is used clamped to [-2 pi, 0] and starts at 0; each key head has its own. Queries
    and keys become twice as wide: the cosine and the sine of each feature's angle.
    """

    options = {"theta": float}
    shared = False

    def __init__(self, config: Config, coordinate: str, key: jax.Array, *, theta: float = 10000.0):
        H = config.model.width // config.model.heads
        self.delta = parameter(jnp.zeros((config.model.kv_heads, H)), P("tensor", None))
        self.frequencies = tuple((np.float64(theta) ** (-np.arange(H) / H)).tolist())

    @staticmethod
    def check(config: Config, coordinate: str, *, theta: float = 10000.0) -> None:
        if theta <= 1:
            raise UserError(f"position.relative: pope theta={theta} must be above 1")

    @staticmethod
    def turns(config: Config, **options: Any) -> frozenset[int]:
        return frozenset(range(config.model.width // config.model.heads))

    def features(
        self, coordinate: jax.Array, x: jax.Array | None = None, before: Any = None
    ) -> jax.Array:
        """(B, L) integers -> angles (B, L, 1, H) float32."""
        return angles(coordinate[..., None], np.array(self.frequencies))

    def queries(self, q: jax.Array, features: jax.Array) -> jax.Array:
        # Attention divides by the root of the doubled width.
        return _polar(q, features, math.sqrt(2))

    def keys(self, k: jax.Array, features: jax.Array) -> jax.Array:
        return _polar(k, features + clamped(self.delta[...], -2 * math.pi, 0.0), 1.0)


def _polar(x: jax.Array, angle: jax.Array, scale: float) -> jax.Array:
    magnitude = scale * jax.nn.softplus(x.astype(angle.dtype))
    parts = [magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)]
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
