"""Cross-entropy of the next token, in float32, without holding all logits at once.

The sequence is cut into chunks; the logits of one chunk (B x chunk x V) are made, used and dropped.
Under differentiation the gradients are computed in the same pass, so that the product with the
output kernel is not done twice.
"""

import functools

import jax
import jax.numpy as jnp


def _chunks(x, chunk: int):
    """(B, L, ...) -> (L / chunk, B, chunk, ...). L must divide by chunk unless it is shorter."""
    B, L = x.shape[:2]
    chunk = min(chunk, L)
    if L % chunk:
        raise ValueError(f"length {L} is no multiple of the loss chunk {chunk}")
    return jnp.moveaxis(x.reshape(B, L // chunk, chunk, *x.shape[2:]), 1, 0)


def _logits(hidden, kernel):
    return jnp.einsum("bld,dv->blv", hidden, kernel, preferred_element_type=jnp.float32)


def _log_probs(logits, targets):
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def log_probs(hidden, kernel, targets, chunk: int):
    """Log-probability of each target.

    Args:
      hidden: (B, L, D). kernel: (D, V). targets: (B, L) integers.
      chunk: tokens of each sequence whose logits are held at once.

    Returns:
      (B, L) float32.
    """

    def one(xs):
        return _log_probs(_logits(xs[0], kernel), xs[1])

    per_chunk = jax.lax.map(one, (_chunks(hidden, chunk), _chunks(targets, chunk)))
    return jnp.moveaxis(per_chunk, 0, 1).reshape(targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(hidden, kernel, targets, weights, chunk: int):
    """Sum over tokens of weight * (-log-probability of the target).

    Args:
      hidden: (B, L, D). kernel: (D, V). targets: (B, L) integers. weights: (B, L) float32.
      chunk: tokens of each sequence whose logits are held at once.

    Returns:
      A float32 scalar; differentiable with respect to `hidden` and `kernel`.
    """
    return -jnp.sum(weights * log_probs(hidden, kernel, targets, chunk))


def _forward(hidden, kernel, targets, weights, chunk):
    def one(carry, xs):
        total, kernel_grad = carry
        x, target, weight = xs
        logits = _logits(x, kernel)
        total -= jnp.sum(weight * _log_probs(logits, target))
        vocabulary = jnp.arange(logits.shape[-1])
        error = jax.nn.softmax(logits, axis=-1) - (vocabulary == target[..., None])
        error = (error * weight[..., None]).astype(hidden.dtype)
        kernel_grad += jnp.einsum("bld,blv->dv", x, error, preferred_element_type=jnp.float32)
        return (total, kernel_grad), jnp.einsum("blv,dv->bld", error, kernel)

    start = (jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32))
    pieces = tuple(_chunks(x, chunk) for x in (hidden, targets, weights))
    (total, kernel_grad), hidden_grad = jax.lax.scan(one, start, pieces)
    hidden_grad = jnp.moveaxis(hidden_grad, 0, 1).reshape(hidden.shape)
    return total, (hidden_grad, kernel_grad.astype(kernel.dtype))


def _backward(chunk, grads, cotangent):
    hidden_grad, kernel_grad = grads
    scale = cotangent.astype(jnp.float32)
    return (
        (hidden_grad * scale).astype(hidden_grad.dtype),
        (kernel_grad * scale).astype(kernel_grad.dtype),
        None,
        None,
    )


cross_entropy_sum.defvjp(_forward, _backward)
