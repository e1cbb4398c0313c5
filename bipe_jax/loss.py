# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Cross-entropy of the next token, in float32, without holding all logits at once.

The sequence is cut into chunks; the logits of one chunk (B x chunk x V) are made, used and dropped.
Under differentiation the gradients are computed in the same pass, so that the product with the
output kernel is not done twice. On a mesh each device does this for its tokens and its part of the
vocabulary, and the gradients of the kernel are summed once, at the end.
"""

import functools
import math

import jax
import jax.numpy as jnp

from bipe_jax.collectives import Devices, on_each
from bipe_jax.sharding import ACTIVATIONS, P

LARGEST = 700.0  # nats a token: the exponential of more is no finite float

_SPECS = tuple(ACTIVATIONS[name] for name in ("hidden", "kernel", "tokens", "tokens"))


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(B, L, ...) -> (L / chunk, B, chunk, ...). L must divide by chunk unless it is shorter."""
    B, L = x.shape[:2]
    chunk = min(chunk, L)
    if L % chunk:
        raise ValueError(f"length {L} is no multiple of the loss chunk {chunk}")
    return jnp.moveaxis(x.reshape(B, L // chunk, chunk, *x.shape[2:]), 1, 0)


def _logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("bld,dv->blv", hidden, kernel, preferred_element_type=jnp.float32)


def _targets_of(devices: Devices, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """(B, L, V) one-hot, of this device's part of the vocabulary."""
    V = logits.shape[-1]
    return devices.index("tensor") * V + jnp.arange(V) == targets[..., None]


def _normalised(
    devices: Devices, logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The parts of a cross-entropy over a vocabulary that may be sharded.

    Returns:
      the targets' logits, the highest logits, and the logs of the sums of exp(logit - highest), (B, L)
      each; and this shard's part of the softmax, (B, L, V).
    """
    highest = devices.max(jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)), "tensor")
    exponentials = jnp.exp(logits - highest)
    sums = devices.sum(exponentials.sum(axis=-1, keepdims=True), "tensor")
    is_target = _targets_of(devices, logits, targets)
    picked = devices.sum(jnp.where(is_target, logits, 0).sum(axis=-1), "tensor")
    return picked, highest[..., 0], jnp.log(sums)[..., 0], exponentials / sums


def score(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """How probable each target is.

    Args:
      hidden: (B, L, D). kernel: (D, V). targets: (B, L) integers.
      chunk: tokens of each sequence whose logits are held at once.

    Returns:
      Log-probabilities (B, L) float32, and whether no token is more probable (B, L).
    """

    def local(
        devices: Devices, hidden: jax.Array, kernel: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        kernel = devices.gather(kernel, "fsdp", 0)

        def one(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            picked, highest, log_sum, _ = _normalised(devices, _logits(xs[0], kernel), xs[1])
            return picked - (highest + log_sum), picked == highest

        size = chunk // devices.count("context")
        per_chunk = jax.lax.map(one, (_chunks(hidden, size), _chunks(targets, size)))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(targets.shape), per_chunk)

    tokens = ACTIVATIONS["tokens"]
    return on_each(local, _SPECS[:3], (tokens, tokens))(hidden, kernel, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> jax.Array:
    """Sum over tokens of weight * (-log-probability of the target).

    Args:
      hidden: (B, L, D). kernel: (D, V). targets: (B, L) integers. weights: (B, L) float32.
      chunk: tokens of each sequence whose logits are held at once.

    Returns:
      A float32 scalar; differentiable with respect to `hidden` and `kernel`.
    """
    return -jnp.sum(weights * score(hidden, kernel, targets, chunk)[0])


def _forward(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def local(
        devices: Devices,
        hidden: jax.Array,
        kernel_part: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        kernel = devices.gather(kernel_part, "fsdp", 0)

        def one(
            carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            total, kernel_grad = carry
            x, target, weight = xs
            logits = _logits(x, kernel)
            picked, highest, log_sum, softmax = _normalised(devices, logits, target)
            total -= jnp.sum(weight * (picked - (highest + log_sum)))
            error = softmax - _targets_of(devices, logits, target)
            error = (error * weight[..., None]).astype(hidden.dtype)
            flat = (a.reshape(-1, a.shape[-1]) for a in (x, error))  # see model._multiply
            kernel_grad += jnp.einsum("td,tv->dv", *flat, preferred_element_type=jnp.float32)
            return (total, kernel_grad), jnp.einsum("blv,dv->bld", error, kernel)

        size = chunk // devices.count("context")
        start = (jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32))
        pieces = (_chunks(hidden, size), _chunks(targets, size), _chunks(weights, size))
        (total, kernel_grad), hidden_grad = jax.lax.scan(one, start, pieces)
        hidden_grad = jnp.moveaxis(hidden_grad, 0, 1).reshape(hidden.shape)
        kernel_grad = devices.sum_part(kernel_grad, "fsdp", 0)
        return (
            devices.sum(total, "data", "fsdp", "context"),
            devices.sum(hidden_grad, "tensor"),
            devices.sum(kernel_grad, "data", "context").astype(kernel.dtype),
        )

    outputs = (P(), *_SPECS[:2])
    total, *grads = on_each(local, _SPECS, outputs)(hidden, kernel, targets, weights)
    return total, tuple(grads)


def _backward(
    chunk: int, grads: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    hidden_grad, kernel_grad = grads
    scale = cotangent.astype(jnp.float32)
    return (
        (hidden_grad * scale).astype(hidden_grad.dtype),
        (kernel_grad * scale).astype(kernel_grad.dtype),
        None,
        None,
    )


cross_entropy_sum.defvjp(_forward, _backward)


def perplexity(loss: float) -> float:
    """exp(loss), of a loss in nats a token; infinite above `LARGEST`, and NaN for NaN."""
    return math.inf if loss >= LARGEST else math.exp(loss)
