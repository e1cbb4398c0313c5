"""Rotary encodings: queries and keys are turned by angles that grow with a coordinate."""

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax.errors import UserError


class Rope:
    """Rotary position embedding (Su et al. 2021, equation 34), rotate-half convention of Llama.

    The pair (i, i + H/2) of a head is turned by coordinate * theta^(-2i/H). Angles, sines and
    cosines are float32 whatever the model computes in.
    """

    options = {"theta": float}
    rotates = True
    steady = True

    def __init__(self, config, coordinate: str, *, theta: float = 10000.0):
        self.head_width = config.model.width // config.model.heads
        self.theta = theta

    @staticmethod
    def check(config, coordinate: str, *, theta: float = 10000.0) -> None:
        if theta <= 1:
            raise UserError(f"position.relative: rope theta={theta} must be above 1")
        head_width = config.model.width // config.model.heads
        if head_width % 2:
            raise UserError(
                f"position.relative: rope turns pairs, but model.width / model.heads = {head_width} "
                "is odd"
            )

    def prepare(self, coordinate: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, L) integers -> cosines and sines, each (B, L, 1, H/2) float32."""
        exponents = -np.arange(0, self.head_width, 2) / self.head_width
        frequencies = jnp.asarray(np.float64(self.theta) ** exponents, jnp.float32)
        angles = coordinate[..., None, None].astype(jnp.float32) * frequencies
        return jnp.cos(angles), jnp.sin(angles)

    def rotate(self, x: jax.Array, prepared: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Turns queries or keys (B, L, N, H); computed in float32, returned in x's dtype."""
        cos, sin = prepared
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)
