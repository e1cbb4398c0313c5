"""The base of bipe_jax.experiments arithmetic; the number of operators is set by its points."""

from . import small


def get_config(size: str = "quick"):
    c = small.get_config(size, steps=2000)
    c.sequence_length = {"quick": 64, "laptop": 96, "paper": 512}[size]
    c.loss_chunk = 32
    c.segments.rule = "regex:="
    c.model.width = 48
    c.model.feed_forward = 192
    c.model.vocab_size = 21
    most = {"quick": 3, "laptop": 6, "paper": 15}[size]
    c.data.train = f"synthetic:arithmetic(operators=1:{most})"
    c.data.evaluation = f"synthetic:arithmetic(operators={most}, split=test, count=64)"
    return c
