"""The base of the control: letters of a Markov chain, in segments of a fixed number of them."""

from bipe_jax.data import symbols
from bipe_jax.modalities import dna

from . import modalities, small


def get_config(size: str = "quick"):
    c = small.get_config(size, steps=1000)
    c.sequence_length = {"quick": 32, "laptop": 128, "paper": 512}[size]
    c.segments.rule = "fixed:12"
    c.tokenizer.path = symbols.PREFIX + " ".join(dna.LETTERS)
    c.model.vocab_size = len(symbols.CONTROL) + len(dna.LETTERS)
    c.data.packing = "concat"
    c.data.train = "data/dna/train-*.jsonl"
    c.data.evaluation = "data/dna/held-out.jsonl"
    c.evaluation.tokens = 4096 if size == "quick" else 65536
    modalities.set_lengths(c, 4 if size == "quick" else 16)
    return c
