"""The base of bipe_jax.experiments fold: a running fold of arithmetic, one step a segment."""

from . import small


def get_config(size: str = "quick"):
    c = small.get_config(size, steps=1500)
    most = 3 if size == "quick" else 15
    c.sequence_length = 24 if size == "quick" else 96
    c.loss_chunk = 8 if size == "quick" else 32
    c.segments.rule = "regex:;"
    c.model.width = 48
    c.model.feed_forward = 192
    c.model.vocab_size = 20
    c.data.train = f"synthetic:fold(operators=1:{most})"
    c.data.evaluation = f"synthetic:fold(operators={most}, split=test, count=64)"
    return c
