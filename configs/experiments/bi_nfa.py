"""The base of bipe_jax.experiments bi-nfa; the machine and the test sets are set by its points."""

from . import small


def get_config(size: str = "quick"):
    c = small.get_config(size, steps=1500)
    c.sequence_length = 128  # 8 segments of at most 12 letters and "#", and BOS
    c.segments.rule = "data"
    states = {"quick": 3, "laptop": 4, "paper": 6}[size]
    c.model.vocab_size = 3 + 2 * states + 2 + 4 + 2
    c.data.train = f"synthetic:bi-nfa(states={states})"
    c.data.evaluation = f"synthetic:bi-nfa(states={states}, split=test, count=64)"
    return c
