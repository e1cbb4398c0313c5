# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Rotary encodings: queries and keys are turned by angles that grow with a coordinate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions import scaling as scalings
from bipe_jax.positions.kind import Relative


class Rope(Relative):
    """Rotary position embedding (Su et al. 2021, equation 34), rotate-half convention of Llama.

    The pair (i, i + H/2) of a head is turned by coordinate * theta^(-2i/H). Angles, sines and
    cosines are float32 whatever the model computes in. With `scaling` the frequencies are those of
    one of `scaling.SCALINGS`; `factor` and `original` are explained there.
    """

    options = {"theta": float, "scaling": str, "factor": float, "original": float}

    def __init__(
        self,
        config: Config,
        coordinate: str,
        key: jax.Array,
        *,
        theta: float = 10000.0,
        scaling: str = "",
        factor: float | None = None,
        original: float | None = None,
    ):
        head_width = config.model.width // config.model.heads
        frequencies = np.float64(theta) ** (-np.arange(0, head_width, 2) / head_width)
        self.frequencies = tuple(frequencies.tolist())
        self.scaling, self.factor, self.original = scaling, factor, original

    @staticmethod
    def check(
        config: Config,
        coordinate: str,
        *,
        theta: float = 10000.0,
        scaling: str = "",
        factor: float | None = None,
        original: float | None = None,
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
    def cacheable(self) -> bool:
        """Not with a scaling that depends on how far the text runs."""
        return self.scaling != "dynamic-ntk"

    def features(
        self, coordinate: jax.Array, x: jax.Array | None = None, before: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """(B, L) integers -> cosines and sines, times the magnitude: (B, L, 1, H/2) float32."""
        frequencies, magnitude = np.array(self.frequencies), 1.0
        coordinate = coordinate[..., None, None].astype(float)
        if self.scaling:
            seen = coordinate.max(axis=1, keepdims=True) + 1
            scale = scalings.SCALINGS[self.scaling]
            frequencies, magnitude = scale(frequencies, seen, self.factor, self.original)
        angles = coordinate * jnp.asarray(frequencies, float)
        return magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)

    def queries(self, q: jax.Array, features: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _turn(q, *features)

    def keys(self, k: jax.Array, features: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _turn(k, *features)


def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + H/2) of (B, L, N, H); computed in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
