# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""A linear bias as columns of queries and keys, for flash kernels that take no bias."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The columns of queries and of keys that one linear bias takes, see `linear_columns`.
COLUMNS = 8


def linear_columns(
    slopes: Any, query: jax.Array, key: jax.Array, heads: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
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
    scaled = np.asarray(slopes, np.float64) / scale
    high = scaled.astype(jnp.bfloat16).astype(np.float64)
    low = (scaled - high).astype(jnp.bfloat16).astype(np.float64)
    high, low, both = (jnp.asarray(x, jnp.float32)[heads] for x in (high, low, high + low))

    def rounded(x: jax.Array) -> jax.Array:  # to bfloat16; XLA may drop a cast there and back
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    constant = -both * query[..., None].astype(jnp.float32)
    constant_high = rounded(constant)
    of_query = [high] * 3 + [low] * 3 + [constant_high, rounded(constant - constant_high)]
    of_query = jnp.stack([jnp.broadcast_to(x, constant.shape) for x in of_query], axis=-1)
    digits = [(key & mask).astype(jnp.float32) for mask in (0xFF0000, 0xFF00, 0xFF)]
    ones = jnp.ones_like(digits[0])
    of_key = jnp.stack([*digits, *digits, ones, ones], axis=-1)
    return jax.lax.stop_gradient((of_query, of_key))
