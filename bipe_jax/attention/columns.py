# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Biases as columns of queries and keys, for flash kernels that take no bias."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The columns of queries and of keys that one linear bias takes, see `linear_columns`.
COLUMNS = 8

Sums = tuple[jax.Array, jax.Array]  # whole parts and rests


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

    constant = -both * query[..., None].astype(jnp.float32)
    constant_high = _rounded(constant)
    of_query = [high] * 3 + [low] * 3 + [constant_high, _rounded(constant - constant_high)]
    of_query = jnp.stack([jnp.broadcast_to(x, constant.shape) for x in of_query], axis=-1)
    digits = [(key & mask).astype(jnp.float32) for mask in (0xFF0000, 0xFF00, 0xFF)]
    ones = jnp.ones_like(digits[0])
    of_key = jnp.stack([*digits, *digits, ones, ones], axis=-1)
    return jax.lax.stop_gradient((of_query, of_key))


def sum_width(group: int, head_width: int) -> int:
    """The columns of `sum_columns`, for `group` query heads that share a key head."""
    halves = 1 if _is_exact(head_width**0.5) else 2
    return -(-(6 * halves * group + 2) // COLUMNS) * COLUMNS


def sum_columns(
    query: Sums, key: Sums, group: int, head_width: int, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Columns of q and of k whose product is scale^-1 * (the key's sum - the query's sum).

    As in `linear_columns` the term of the key alone must be exact: three digits of 8 bits of its whole part,
    and three of its rest, each exact in bfloat16. The sums of all query heads that share a key head stand
    side by side, and each query picks those of its own head. Gradients go through the first digit of the
    rest; the term of the query, constant in a row of logits, has none.

    Args:
      query: whole parts and rests in [0, 1), (B, L, N) float32 each. key: the same of the keys.
      group: query heads that share a key head. head_width: H.
      scale: what the product of queries and keys is multiplied with afterwards.

    Returns:
      (B, L, N, W) and (B, S, N / group, W) float32 with W = `sum_width`, all exact in bfloat16.
    """
    width = sum_width(group, head_width)
    high = float(np.float64(1 / scale).astype(jnp.bfloat16))
    factors = [high, 1 / scale - high] if not _is_exact(1 / scale) else [high]

    whole, rest = key
    integers = jax.lax.stop_gradient(whole).astype(jnp.int32)
    pieces = [(integers & mask).astype(whole.dtype) for mask in (0xFF0000, 0xFF00, 0xFF)]
    fixed = jax.lax.stop_gradient(rest)
    digit = _rounded(fixed)
    pieces.append(rest + (digit - fixed))  # equal to the digit, with the gradient of the rest
    left = fixed - digit
    pieces += [middle := _rounded(left), _rounded(left - middle)]
    B, S, N = whole.shape
    of_key = jnp.stack(pieces * len(factors), axis=-1)
    of_key = of_key.reshape(B, S, N // group, -1)
    of_key = jnp.concatenate([of_key, jnp.ones((*of_key.shape[:3], 2), of_key.dtype)], axis=-1)

    constant = jax.lax.stop_gradient(-(query[0] + query[1]) / scale)
    constant_high = _rounded(constant)
    constants = jnp.stack([constant_high, _rounded(constant - constant_high)], axis=-1)
    picks = np.kron(np.eye(group), np.repeat(factors, 6))  # (group, group * 6 * factors)
    picks = jnp.asarray(np.tile(picks, (N // group, 1)), constant.dtype)
    of_query = jnp.concatenate(
        [jnp.broadcast_to(picks, (*constant.shape, picks.shape[-1])), constants], axis=-1
    )

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])

    return padded(of_query), padded(of_key)


def _rounded(x: jax.Array) -> jax.Array:
    """To the next number of bfloat16; XLA may drop a cast there and back."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _is_exact(value: float) -> bool:
    """Whether bfloat16 has the number."""
    return float(np.float64(value).astype(jnp.bfloat16)) == value
