"""Bias encodings: a term that is added to the attention logits, a function of two coordinates."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax.errors import UserError


def alibi_slopes(heads: int) -> np.ndarray:
    """The slopes of Press et al. 2022 (section 3), (N,) float64.

    2^(-8i/N) for i = 1 … N where N is a power of two; otherwise those of the power of two below,
    completed with every second slope of the power of two above (the released code's rule).
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, below + 1) / below)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - below), 2) / below)
    return np.concatenate([slopes, between])


class Alibi:
    """Attention with linear biases: -slope * slope_scale * (query coordinate - key coordinate).

    BiPE's authors multiply the slopes by 96 for segments, which are rarer than tokens. The bias is
    the product of an exact integer difference and a float32 slope.
    """

    options = {"slope_scale": float}
    rotates = False

    def __init__(self, config, coordinate: str, *, slope_scale: float = 1.0):
        self.slopes = slope_scale * alibi_slopes(config.model.heads)

    @staticmethod
    def check(config, coordinate: str, *, slope_scale: float = 1.0) -> None:
        if slope_scale <= 0:
            raise UserError(f"position.relative: alibi slope_scale={slope_scale} must be above 0")
        if coordinate == "offset":
            raise UserError(
                "position.relative: ('alibi', 'offset') would reward distance, since offsets fall back "
                "to 0 at each segment: use 'position' or 'segment'"
            )

    def prepare(self, coordinate: jax.Array) -> jax.Array:
        """(B, L) integers, as they are."""
        return coordinate

    def bias(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """(B, L) and (B, S) integers -> (B, N, L, S) float32."""
        distance = (query[:, None, :, None] - key[:, None, None, :]).astype(jnp.float32)
        return -jnp.asarray(self.slopes, jnp.float32)[:, None, None] * distance
