"""How the next token is sampled from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bipe_jax.errors import UserError


class Sampling(NamedTuple):
    """How the next token is sampled.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token.
      top_k: only the k most probable tokens; 0: all.
      top_p: only the most probable tokens that reach this probability together, at least one (Holtzman
        et al. 2020, section 3.1).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def check_sampling(sampling: Sampling) -> None:
    """Raises UserError if a value is out of its range."""
    temperature, top_k, top_p = sampling
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature} must be a number of at least 0")
    if top_k < 0:
        raise UserError(f"top_k={top_k} must be at least 0 (0: all tokens)")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be above 0 and at most 1")


def probabilities(sampling: Sampling, logits: jax.Array) -> jax.Array:
    """The probabilities (B, V) that tokens are sampled with, from logits (B, V) float32."""
    B, V = logits.shape
    if sampling.temperature == 0:
        return jax.nn.one_hot(logits.argmax(axis=-1), V)
    order = jnp.argsort(-logits, axis=-1)  # stable: of equal tokens the first comes first
    ranked = jax.nn.softmax(
        jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature, axis=-1
    )
    if sampling.top_k:
        ranked = jnp.where(jnp.arange(V) < min(sampling.top_k, V), ranked, 0)
        ranked /= ranked.sum(axis=-1, keepdims=True)
    if sampling.top_p < 1:
        before = jnp.cumsum(ranked, axis=-1) - ranked
        ranked = jnp.where(before < sampling.top_p, ranked, 0)
        ranked /= ranked.sum(axis=-1, keepdims=True)
    return jnp.zeros_like(ranked).at[jnp.arange(B)[:, None], order].set(ranked)


def sample(sampling: Sampling, logits, seed, number):
    """Samples tokens (B,) int32 from logits (B, V), independently for each row."""
    if sampling.temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    chances = jnp.log(probabilities(sampling, logits))
    key = jax.random.key(seed)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), number))(
        jnp.arange(len(logits))
    )
    return jax.vmap(jax.random.categorical)(keys, chances).astype(jnp.int32)
