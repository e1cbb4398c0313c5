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
from bipe_jax.output import Output
from bipe_jax.sharding import ACTIVATIONS, P, platform

MOST_SETS = 31  # token ids that may be in sets: they are the bits of an int32
# Of a device, whose logits a TPU computes at once at least, unless these are more than so many numbers.
_TOKENS = 1024
_LOGITS = 2**26
LARGEST = 700.0  # nats a token: the exponential of more is no finite float

_SPECS = tuple(ACTIVATIONS[name] for name in ("hidden", "kernel", "tokens", "tokens"))


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(B, L, ...) -> (L / chunk, B, chunk, ...). L must divide by chunk unless it is shorter."""
    B, L = x.shape[:2]
    chunk = min(chunk, L)
    if L % chunk:
        raise ValueError(f"length {L} is no multiple of the loss chunk {chunk}")
    return jnp.moveaxis(x.reshape(B, L // chunk, chunk, *x.shape[2:]), 1, 0)


def _chunk(hidden: jax.Array, vocabulary: int, chunk: int, on: str) -> int:
    """Tokens of each of a device's sequences whose logits are computed at once.

    A product of few rows takes as long as it takes to read the kernel from HBM, so a TPU takes more of the
    sequences if a device has few of them.

    Args:
      hidden: (B, L, D), of the device. on: its platform.
    """
    B, L = hidden.shape[:2]
    if on != "tpu" or chunk >= L or L % chunk:
        return chunk
    least = min(_TOKENS, _LOGITS // vocabulary)
    sizes = (chunk * parts for parts in range(1, L // chunk) if L % (chunk * parts) == 0)
    return next((size for size in sizes if B * size >= least), L)


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
    hidden: jax.Array, output: Output, targets: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """How probable each target is.

    Args:
      hidden: (B, L, D). output: with a kernel (D, V). targets: (B, L) integers.
      chunk: tokens of each sequence whose logits are held at once.

    Returns:
      Log-probabilities (B, L) float32, and whether no token is more probable (B, L).
    """

    def local(
        devices: Devices, hidden: jax.Array, kernel: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        whole = Output(devices.gather(kernel, "fsdp", 0), output.softcap)

        def one(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            picked, highest, log_sum, _ = _normalised(devices, whole.logits(xs[0]), xs[1])
            return picked - (highest + log_sum), picked == highest

        size = chunk // devices.count("context")
        per_chunk = jax.lax.map(one, (_chunks(hidden, size), _chunks(targets, size)))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(targets.shape), per_chunk)

    tokens = ACTIVATIONS["tokens"]
    return on_each(local, _SPECS[:3], (tokens, tokens))(hidden, output.kernel, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sum(
    hidden: jax.Array,
    output: Output,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over tokens of weight * (-log-probability of the target + z_loss * log(Z)^2).

    Z is the sum of exp(logits), which the second term keeps near 1 (Chowdhery et al. 2022, section 5).

    Args:
      hidden: (B, L, D). output: with a kernel (D, V). targets: (B, L) integers. weights: (B, L) float32.
      chunk: tokens of each sequence whose logits are held at once.

    Returns:
      A float32 scalar, differentiable with respect to `hidden` and `output`; and, with a `z_loss`, the two
      terms of the sum, "loss" and "z_loss", through which no gradient flows.
    """
    return _forward(hidden, output, targets, weights, chunk, z_loss)[0]


def _forward(
    hidden: jax.Array,
    output: Output,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    z_loss: float,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], tuple[jax.Array, Output]]:
    def local(
        devices: Devices,
        hidden: jax.Array,
        kernel_part: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
    ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        kernel = devices.gather(kernel_part, "fsdp", 0)
        whole = Output(kernel, output.softcap)

        def one(
            carry: tuple[list[jax.Array], jax.Array], xs: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[tuple[list[jax.Array], jax.Array], jax.Array]:
            totals, kernel_grad = carry
            x, target, weight = xs
            logits = whole.logits(x)
            picked, highest, log_sum, softmax = _normalised(devices, logits, target)
            log_z = highest + log_sum
            totals[0] -= jnp.sum(weight * (picked - log_z))
            if z_loss:
                totals[1] += z_loss * jnp.sum(weight * log_z**2)
                softmax *= 1 + 2 * z_loss * log_z[..., None]
            error = softmax - _targets_of(devices, logits, target)
            if output.softcap:
                error *= whole.slope(logits)
            error = (error * weight[..., None]).astype(hidden.dtype)
            flat = (a.reshape(-1, a.shape[-1]) for a in (x, error))  # see model._multiply
            kernel_grad += jnp.einsum("td,tv->dv", *flat, preferred_element_type=jnp.float32)
            return (totals, kernel_grad), jnp.einsum("blv,dv->bld", error, kernel)

        size = _chunk(hidden, kernel.shape[1], chunk // devices.count("context"), on)
        zeros = [jnp.float32(0)] * (2 if z_loss else 1)
        start = (zeros, jnp.zeros(kernel.shape, jnp.float32))
        pieces = (_chunks(hidden, size), _chunks(targets, size), _chunks(weights, size))
        (totals, kernel_grad), hidden_grad = jax.lax.scan(one, start, pieces)
        hidden_grad = jnp.moveaxis(hidden_grad, 0, 1).reshape(hidden.shape)
        # Over the devices in the compute dtype, as the gradients of other weights.
        kernel_grad = devices.sum_part(kernel_grad.astype(kernel.dtype), "fsdp", 0)
        return (
            [devices.sum(total, "data", "fsdp", "context") for total in totals],
            devices.sum(hidden_grad, "tensor"),
            devices.sum(kernel_grad, "data", "context"),
        )

    on = platform(jax.sharding.get_abstract_mesh())
    outputs = ([P()] * (2 if z_loss else 1), *_SPECS[:2])
    totals, hidden_grad, kernel_grad = on_each(local, _SPECS, outputs)(
        hidden, output.kernel, targets, weights
    )
    grads = hidden_grad, Output(kernel_grad, output.softcap)
    if not z_loss:
        return (totals[0], {}), grads
    return (totals[0] + totals[1], {"loss": totals[0], "z_loss": totals[1]}), grads


def _backward(
    chunk: int,
    z_loss: float,
    grads: tuple[jax.Array, Output],
    cotangents: tuple[jax.Array, dict[str, jax.Array]],
) -> tuple[jax.Array, Output, None, None]:
    scale = cotangents[0].astype(jnp.float32)
    hidden_grad, output_grad = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
    return hidden_grad, output_grad, None, None


cross_entropy_sum.defvjp(_forward, _backward)


def set_logits(hidden: jax.Array, output: Output) -> jax.Array:
    """The logits of the token ids that may be in sets, (B, L, at most MOST_SETS) float32."""
    return Output(output.kernel[:, :MOST_SETS], output.softcap).logits(hidden)


def sets_error_sum(
    hidden: jax.Array, output: Output, sets: jax.Array, among: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sum over tokens of weight * the binary cross-entropies of the members of a set of token ids.

    A token id k is predicted to be in its token's set with the probability 1 / (1 + exp(-logit k)).

    Args:
      hidden: (B, L, D). output: with a kernel (D, V). weights: (B, L) float32.
      sets: (B, L) integers, whose bit k says whether token id k is in the set. among: (B, L), the ids whose
        membership is predicted.
    """
    logits = set_logits(hidden, output)
    ids = jnp.arange(logits.shape[-1])
    is_in, counts = ((x[..., None] >> ids & 1).astype(jnp.float32) for x in (sets, among))
    errors = jnp.logaddexp(0.0, logits) - is_in * logits
    return jnp.sum(weights * jnp.sum(counts * errors, axis=-1))


def perplexity(loss: float) -> float:
    """exp(loss), of a loss in nats a token; infinite above `LARGEST`, and NaN for NaN."""
    return math.inf if loss >= LARGEST else math.exp(loss)
