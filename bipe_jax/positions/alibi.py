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


# The columns of queries and keys that one linear bias takes, see `linear_columns`.
COLUMNS = 8


def linear_columns(slopes: np.ndarray, query, key, heads, scale: float):
    """Columns of q and of k whose product is scale^-1 * -slope * (query - key coordinate).

    Softmax does not see what is constant for a query, so the term of the key's coordinate, in three
    digits of 8 bits, is all that must be exact; each digit, and each half of the slope, is exact in
    bfloat16. Without the query's term (in two halves) the logits would grow large, and lose the
    content's last bits. No gradient goes through the columns.

    Args:
      slopes: (M,) of all heads. heads: (N,) which of them these are.
      query: (B, L) integers. key: (B, S) integers below 2^24.
      scale: what the product of queries and keys is multiplied with afterwards.

    Returns:
      (B, L, N, COLUMNS) and (B, S, COLUMNS) float32, all of them exact in bfloat16.
    """
    slopes = np.asarray(slopes, np.float64) / scale
    high = slopes.astype(jnp.bfloat16).astype(np.float64)
    low = (slopes - high).astype(jnp.bfloat16).astype(np.float64)
    high, low, slopes = (jnp.asarray(x, jnp.float32)[heads] for x in (high, low, high + low))

    def rounded(x):  # to bfloat16; XLA may drop a cast there and back
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    constant = -slopes * query[..., None].astype(jnp.float32)
    constant_high = rounded(constant)
    of_query = [high] * 3 + [low] * 3 + [constant_high, rounded(constant - constant_high)]
    of_query = jnp.stack([jnp.broadcast_to(x, constant.shape) for x in of_query], axis=-1)
    digits = [(key & mask).astype(jnp.float32) for mask in (0xFF0000, 0xFF00, 0xFF)]
    ones = jnp.ones_like(digits[0])
    of_key = jnp.stack([*digits, *digits, ones, ones], axis=-1)
    return jax.lax.stop_gradient((of_query, of_key))


class Alibi:
    """Attention with linear biases: -slope * slope_scale * (query coordinate - key coordinate).

    BiPE's authors multiply the slopes by 96 for segments, which are rarer than tokens. The bias is
    the product of an exact integer difference and a float32 slope.
    """

    options = {"slope_scale": float}
    rotates = False
    steady = True
    linear = True

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

    def bias(self, query: jax.Array, key: jax.Array, heads: jax.Array) -> jax.Array:
        """(B, L) and (B, S) integers, (N,) heads -> (B, N, L, S) float32."""
        distance = (query[:, None, :, None] - key[:, None, None, :]).astype(jnp.float32)
        return -jnp.asarray(self.slopes, jnp.float32)[heads][:, None, None] * distance

    def columns(self, query, key, heads, scale: float) -> tuple[jax.Array, jax.Array]:
        """The same bias for flash kernels, see `linear_columns`."""
        return linear_columns(self.slopes, query, key, heads, scale)
