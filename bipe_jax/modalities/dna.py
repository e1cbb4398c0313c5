"""Sequences of four letters without segments: the control. They are drawn from a Markov chain.

Each letter depends on the three before it alone, so that nothing is to be gained from a longer context.
"""

import random
from collections.abc import Iterator

from bipe_jax.modalities.documents import Document, Options

LETTERS = ("A", "C", "G", "T")
ORDER = 3
SET = "dna"
COUNT = 300  # by default
LENGTH = 10_000  # letters of a sequence
_CONCENTRATION = 0.5  # of the Dirichlet distribution of the letters after each context


def chain(seed: int) -> dict[str, list[float]]:
    """The probabilities of the four letters after each three letters."""
    draws = random.Random(f"chain {seed}")
    made: dict[str, list[float]] = {}
    contexts = [""]
    for _ in range(ORDER):
        contexts = [context + letter for context in contexts for letter in LETTERS]
    for context in contexts:
        weights = [draws.gammavariate(_CONCENTRATION, 1) for _ in LETTERS]
        made[context] = [weight / sum(weights) for weight in weights]
    return made


def documents(options: Options) -> Iterator[Document]:
    """Yields sequences of one chain, their letters separated by spaces."""
    after = chain(options.seed)
    for number in range(options.count or COUNT):
        name = f"dna {options.seed} {number}"
        draws = random.Random(name)
        letters = draws.choices(LETTERS, k=ORDER)
        while len(letters) < LENGTH:
            letters += draws.choices(LETTERS, after["".join(letters[-ORDER:])])
        yield Document(name, " ".join(letters), SET)
