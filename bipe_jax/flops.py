"""Model FLOPs of a training step, counted from a config.

A weight of a matrix product costs 6 FLOPs a token (2 forward, 4 backward); the lookup of embeddings costs
nothing. Causal attention costs 6 L D a layer and token: each query sees half of the L keys on average. What
is recomputed in the backward pass does not count. Model FLOP utilisation (MFU) is the rate of these FLOPs
over the peak rate of the devices.
"""

from bipe_jax.config import Config


def flops_per_token(config: Config) -> float:
    """Model FLOPs of one token in training, forward and backward."""
    m = config.model
    head_width = m.width // m.heads
    attention = 2 * m.width * head_width * (m.heads + m.kv_heads)
    weights = m.layers * (attention + 3 * m.width * m.feed_forward) + m.width * m.vocab_size
    return 6.0 * weights + 6.0 * m.layers * config.sequence_length * m.width
