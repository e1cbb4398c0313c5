"""The base of bipe_jax.experiments retrieval: values of lines that a question addresses."""

from . import small


def get_config(size: str = "quick"):
    c = small.get_config(size, steps=2000)
    c.sequence_length = 64 if size == "quick" else 144
    c.loss_chunk = 16
    c.segments.rule = "regex:;"
    c.model.vocab_size = 313
    lines = "4:8" if size == "quick" else "4:16"
    c.data.train = f"synthetic:lookup(lines={lines})"
    c.data.evaluation = f"synthetic:lookup(lines={lines}, split=test, count=64)"
    return c
