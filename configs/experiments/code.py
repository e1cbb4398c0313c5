"""The base of the experiment on code: modules of Python, whose segments are lines."""

from . import modalities


def get_config(size: str = "quick"):
    c = modalities.get_config(size)
    c.model.vocab_size = 512 if size == "quick" else 4096
    c.data.train = "data/code/train-*.jsonl"
    c.data.evaluation = "data/code/held-out.jsonl"
    return c
