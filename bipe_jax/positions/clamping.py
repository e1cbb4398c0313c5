# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Bounds of parameters."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def clamped(parameter: jax.Array, low: float, high: float | None = None) -> jax.Array:
    """The parameter within [low, high], whose gradient is that of the parameter as it is.

    An ordinary maximum has no gradient below the bound, so that a parameter that fell below it could
    never come back. Public code of the kinds that need this overwrites the parameter instead, and its
    gradient passes as well.
    """
    return jnp.clip(parameter, low, high)


@clamped.defjvp
def _clamped_jvp(
    low: float, high: float | None, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return clamped(*primals, low, high), tangents[0]
