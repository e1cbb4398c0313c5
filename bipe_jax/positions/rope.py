"""Rotary encodings: queries and keys are turned by angles that grow with a coordinate."""

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax.errors import UserError
from bipe_jax.positions import scaling as scalings


class Rope:
    """Rotary position embedding (Su et al. 2021, equation 34), rotate-half convention of Llama.

    The pair (i, i + H/2) of a head is turned by coordinate * theta^(-2i/H). Angles, sines and
    cosines are float32 whatever the model computes in. With `scaling` the frequencies are those of
    one of `scaling.SCALINGS`; `factor` and `original` are explained there.
    """

    options = {"theta": float, "scaling": str, "factor": float, "original": float}
    rotates = True

    def __init__(
        self,
        config,
        coordinate: str,
        *,
        theta: float = 10000.0,
        scaling: str = "",
        factor: float | None = None,
        original: float | None = None,
    ):
        head_width = config.model.width // config.model.heads
        self.frequencies = np.float64(theta) ** (-np.arange(0, head_width, 2) / head_width)
        self.scaling, self.factor, self.original = scaling, factor, original

    @staticmethod
    def check(
        config, coordinate: str, *, theta=10000.0, scaling="", factor=None, original=None
    ) -> None:
        if theta <= 1:
            raise UserError(f"position.relative: rope theta={theta} must be above 1")
        head_width = config.model.width // config.model.heads
        if head_width % 2:
            raise UserError(
                f"position.relative: rope turns pairs, but model.width / model.heads = {head_width} "
                "is odd"
            )
        scalings.check(scaling, factor, original, head_width)

    @property
    def steady(self) -> bool:
        return self.scaling != "dynamic-ntk"

    def prepare(self, coordinate: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, L) integers -> cosines and sines, times the magnitude: (B, L, 1, H/2) float32."""
        frequencies, magnitude = self.frequencies, 1.0
        coordinate = coordinate[..., None, None].astype(jnp.float32)
        if self.scaling:
            seen = coordinate.max(axis=1, keepdims=True) + 1
            scale = scalings.SCALINGS[self.scaling]
            frequencies, magnitude = scale(frequencies, seen, self.factor, self.original)
        angles = coordinate * jnp.asarray(frequencies, jnp.float32)
        return magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)

    def rotate(self, x: jax.Array, prepared: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Turns queries or keys (B, L, N, H); computed in float32, returned in x's dtype."""
        cos, sin = prepared
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)
