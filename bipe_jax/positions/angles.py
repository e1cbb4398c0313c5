# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Angles of rotary encodings that are exact at any coordinate."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORD = 2.0**32
_SMALL = 2.0**-4  # below it a plain product is off by 2^-29 at most


def angles(coordinate: jax.Array, frequencies: Any) -> jax.Array:
    """coordinate * frequency, modulo 2 pi where that can be done without loss.

    A product in float32 is off by up to half the spacing of float32 at the angle: 4e-3 radians at an
    angle of 100,000. For integer coordinates and frequencies that are known on the host the angle is a
    number of turns in fixed point instead: its whole turns overflow, and 2^-32 of a turn are kept. Only
    small angles are plain products, which have more digits there.

    Args:
      coordinate: (...) integers, or floats, for which the product is plain.
      frequencies: (F,) in radians a unit of the coordinate: a NumPy array in float64, or a JAX array
        (..., F), for which the product is plain.

    Returns:
      (..., F), float32 in [-pi, pi]; the plain product where the numbers are not as above, and in float64
      where JAX has that enabled.
    """
    plain = coordinate[..., None].astype(float) * jnp.asarray(frequencies, float)
    wide = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    known = isinstance(frequencies, np.ndarray)
    if wide or not known or not jnp.issubdtype(coordinate.dtype, jnp.integer):
        return plain
    turns = np.asarray(frequencies, np.float64) / (2 * math.pi) % 1.0
    high = np.floor(turns * _WORD)
    low = np.floor((turns * _WORD - high) * _WORD)
    high, low = (jnp.asarray(x.astype(np.uint64).astype(np.uint32)) for x in (high, low))
    c = coordinate[..., None].astype(jnp.uint32)
    # Of the 96 bits of the product those of weight 1/2 to 2^-32 of a turn; a negative coordinate is
    # 2^32 more than itself, and its excess of `low` is taken off.
    fraction = c * high + _high_word(c, low) - jnp.where(coordinate[..., None] < 0, low, 0)
    signed = jax.lax.bitcast_convert_type(fraction, jnp.int32)
    reduced = signed.astype(jnp.float32) * np.float32(2 * math.pi / _WORD)
    return jnp.where(jnp.abs(plain) < _SMALL, plain, reduced)


def _high_word(x: jax.Array, y: jax.Array) -> jax.Array:
    """The upper 32 bits of the product of unsigned 32-bit integers, at most 2 below the truth."""
    x_high, x_low, y_high, y_low = x >> 16, x & 0xFFFF, y >> 16, y & 0xFFFF
    return x_high * y_high + (x_high * y_low >> 16) + (x_low * y_high >> 16)
