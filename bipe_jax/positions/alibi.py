# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""ALiBi: a bias that is linear in the difference of two coordinates, and its form for flash kernels."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax.attention.columns import COLUMNS, linear_columns
from bipe_jax.attention.scoring import Extent
from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions.kind import Relative, run_on


def alibi_slopes(heads: int) -> np.ndarray:
    """The slopes of Press et al. 2022 (section 3), (N,) float64.

    2^(-8i/N) for i = 1 … N where N is a power of two; otherwise those of the power of two below,
    completed with every second slope of the power of two above (the released code's rule).
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, below + 1) / below)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - below), 2) / below)
    return np.concatenate([slopes, between])


class Alibi(Relative):
    """Attention with linear biases: -slope * slope_scale * (query coordinate - key coordinate).

    BiPE's authors multiply the slopes by 96 for segments, which are rarer than tokens. The bias is
    the product of an exact integer difference and a float32 slope.
    """

    offsets_refused = "would reward distance"
    options = {"slope_scale": float}
    width = COLUMNS

    def __init__(
        self, config: Config, coordinate: str, key: jax.Array, *, slope_scale: float = 1.0
    ):
        self.slopes = tuple((slope_scale * alibi_slopes(config.model.heads)).tolist())

    @staticmethod
    def check(config: Config, coordinate: str, *, slope_scale: float = 1.0) -> None:
        if slope_scale <= 0:
            raise UserError(f"position.relative: alibi slope_scale={slope_scale} must be above 0")

    def bias(self, query: jax.Array, key: jax.Array, heads: jax.Array) -> jax.Array:
        """(B, L) and (B, S) integers, (N,) heads -> (B, N, L, S) float32."""
        distance = (query[:, None, :, None] - key[:, None, None, :]).astype(float)
        return -jnp.asarray(self.slopes, float)[heads][:, None, None] * distance

    def bias_bound(self, query: Extent, key: Extent, heads: jax.Array) -> jax.Array:
        return self.bias(query.least, key.greatest, heads)

    def columns(
        self, query: jax.Array, key: jax.Array, heads: jax.Array, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        """The same bias for flash kernels, see `linear_columns`."""
        return linear_columns(np.array(self.slopes), query, key, heads, scale)

    def across_documents(self, features: jax.Array, starts: jax.Array) -> jax.Array:
        return run_on(features, starts)
