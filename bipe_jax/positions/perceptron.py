# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""A perceptron of two layers over pairs of tokens, whose hidden units are never all held."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_AT_A_TIME = 8  # hidden units that are held


def initial(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
    """Values from U(-1/sqrt(inputs), 1/sqrt(inputs)), as PyTorch draws a linear layer's."""
    bound = inputs**-0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def apply(
    x: jax.Array,
    first: tuple[jax.Array, jax.Array],
    second: tuple[jax.Array, jax.Array],
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """second . activation(first . x), with memory for 8 hidden units a pair.

    Args:
      x: (B, I, L, S).
      first: its kernel (I, hidden) and bias (hidden,). second: (hidden, O) and (O,).

    Returns:
      (B, O, L, S) float32.
    """
    hidden = first[1].shape[0]
    padding = -hidden % _AT_A_TIME  # units of weight 0

    def groups(array: jax.Array, axis: int) -> jax.Array:
        widths = [(0, padding if a == axis else 0) for a in range(array.ndim)]
        array = jnp.moveaxis(jnp.pad(array, widths), axis, 0)
        return array.reshape(-1, _AT_A_TIME, *array.shape[1:])

    @jax.checkpoint  # or the backward pass would keep all hidden units
    def of_group(x: jax.Array, kernel: jax.Array, bias: jax.Array, out: jax.Array) -> jax.Array:
        units = jnp.einsum("bils,hi->bhls", x, kernel, precision="highest")
        units = activation(units + bias[:, None, None])
        return jnp.einsum("bhls,ho->bols", units, out, precision="highest")

    def add(total: jax.Array, group: Any) -> tuple[jax.Array, None]:
        return total + of_group(x, *group), None

    start = jnp.broadcast_to(
        second[1][:, None, None], (x.shape[0], second[1].shape[0], *x.shape[2:])
    ).astype(x.dtype)
    each = (groups(first[0], 1), groups(first[1], 0), groups(second[0], 0))
    return jax.lax.scan(add, start, each)[0]
