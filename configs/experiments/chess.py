"""The base of the experiment on chess: games of words, one a row; what is measured are legal moves."""

from bipe_jax.data import symbols
from bipe_jax.modalities import games

from . import modalities, small


def get_config(size: str = "quick"):
    c = small.get_config(size, steps=6000)
    c.sequence_length = {"quick": 48, "laptop": 128, "paper": 256}[size]
    c.segments.rule = "data"
    c.tokenizer.path = symbols.PREFIX + " ".join(games.WORDS)
    c.model.vocab_size = len(symbols.CONTROL) + len(games.WORDS)
    if size == "laptop":
        c.model.width = 128
        c.model.feed_forward = 512
    if size == "paper":
        c.model.layers, c.model.width, c.model.feed_forward = 6, 256, 1024
    c.data.train = "data/chess/train-*.jsonl"
    c.data.evaluation = "data/chess/held-out.jsonl"
    c.evaluation.tokens = 16384
    modalities.set_lengths(c, 2)
    return c
