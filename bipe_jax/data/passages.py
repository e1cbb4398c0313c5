"""Passages: some consecutive lines or sentences of a text, each written on a line of its own.

Under the segment rule `newline` line k of a passage is segment k - 1.
"""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from bipe_jax.config.spec import parse_source
from bipe_jax.data import sources
from bipe_jax.errors import UserError

LINE, SENTENCE = "line", "sentence"
UNITS = (LINE, SENTENCE)
_READ = 1 << 26  # characters of a source
_TRIES = 10_000
_PARAGRAPH = re.compile(r"\n\s*\n")
# A sentence, as the segment rule of that name has it: it ends with a full stop, an exclamation or a question
# mark, perhaps inside closing quotes or brackets, before a space; or with its paragraph.
_SENTENCE = re.compile(r"\S.*?(?:[.!?…]+[\"'”’»)\]*]*(?=\s)|$)")


def units_of(text: str, unit: str) -> list[str]:
    """The lines of a text that are not blank, or its sentences with single spaces between words."""
    if unit == LINE:
        return [line.rstrip() for line in text.splitlines() if line.strip()]
    paragraphs = (" ".join(paragraph.split()) for paragraph in _PARAGRAPH.split(text))
    return [match[0] for paragraph in paragraphs for match in _SENTENCE.finditer(paragraph)]


@dataclasses.dataclass(frozen=True)
class Passages:
    """The passages of a source's documents.

    Attributes:
      name: of the source. unit: "line" or "sentence".
      documents: the name of the set and the units of each.
      width: the most characters of a passage, divided by its units.
    """

    name: str
    unit: str
    documents: Sequence[tuple[str, Sequence[str]]]
    width: int

    def draw(self, random: np.random.RandomState, count: int) -> tuple[str, list[str]]:
        """The name of the set and the units of a random passage.

        Raises:
          UserError: none is found.
        """
        ends = list(itertools.accumulate(len(units) for _, units in self.documents))
        for _ in range(_TRIES):
            at = int(random.randint(ends[-1]))
            number = bisect.bisect_right(ends, at)
            name, units = self.documents[number]
            first = at - (ends[number] - len(units))
            passage = list(units[first : first + count])
            if len(passage) == count and sum(map(len, passage)) <= self.width * count:
                return name, passage
        raise UserError(
            f"{self.name} has no document, or few, with {count} {self.unit}s in a row of at most "
            f"{self.width} characters on average: use fewer, a larger width or more text"
        )


def read(spec: str, unit: str, width: int) -> Passages:
    """The passages of a source's first documents, see `config.spec`. Raises UserError."""
    documents: list[tuple[str, Sequence[str]]] = []
    left = _READ
    for document in _documents(spec):
        units = units_of(document["text"][:left], unit)
        if units:
            documents.append((document["set"], units))
        left -= len(document["text"])
        if left <= 0:
            break
    if not documents:
        raise UserError(f"{spec} has no text: use another source")
    return Passages(spec, unit, documents, width)


def _documents(spec: str) -> Iterator[dict]:
    return sources.documents(parse_source(spec))
