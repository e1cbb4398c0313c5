"""Proofs of set.mm, from Debian's package metamath-databases: steps within proofs.

A document is a proof. Its first line is what is proved; each further line is a step: its number from 1, the
steps that it follows from, the statement that it uses, and what it asserts. With absolute references these
are the numbers of steps ("3,7"); with relative ones, how many steps back they are ("-1,-4").

    prove |- ( ( ph -> ps ) -> ( ph -> ch ) )
    1 a2i.1 |- ( ph -> ( ps -> ch ) )
    2 ax-2 |- ( ( ph -> ( ps -> ch ) ) -> ( ( ph -> ps ) -> ( ph -> ch ) ) )
    3 1,2 ax-mp |- ( ( ph -> ps ) -> ( ph -> ch ) )
"""

import itertools
import os
import re
from collections.abc import Iterator

from bipe_jax.errors import UserError
from bipe_jax.modalities import metamath
from bipe_jax.modalities.documents import Document, Options
from bipe_jax.modalities.place import Place

FILE = "/usr/share/metamath/databases/set.mm"
SET, RELATIVE = "set.mm", "set.mm, relative references"  # of the two kinds of text


def documents(options: Options) -> Iterator[Document]:
    """Yields proofs in the order of the database. Raises UserError: it is not installed."""
    relative = options.references == "relative"
    yield from itertools.islice(_all(relative), options.count or None)


def _all(relative: bool) -> Iterator[Document]:
    if not os.path.exists(FILE):
        raise UserError(
            f"the proofs are those of {FILE}, which is not there: apt-get install metamath-databases"
        )
    with open(FILE, encoding="ascii") as file:
        text = file.read()
    for theorem, known in metamath.theorems(text):
        if theorem.symbols[0] == metamath.PROVABLE and "?" not in theorem.proof:
            yield document(theorem, metamath.steps(theorem, known), relative)


def document(theorem: metamath.Statement, steps: list[metamath.Step], relative: bool) -> Document:
    """A proof as text, whose segments are its lines."""
    lines = [f"prove {' '.join(theorem.symbols)}\n"]
    for number, step in enumerate(steps, 1):
        shown = [str(to - number if relative else to) for to in step.references]
        references = [",".join(shown)] if shown else []
        lines.append(f"{' '.join([str(number), *references, step.label, *step.symbols])}\n")
    begins = [0, *itertools.accumulate(map(len, lines))][:-1]
    return Document(theorem.label, "".join(lines), RELATIVE if relative else SET, (begins,))


def places(text: str) -> Iterator[Place]:
    """The references of a proof's steps, by the number of the step."""
    for line in re.finditer(r"^(\d+) (-?\d+(?:,-?\d+)*) ", text, re.MULTILINE):
        yield Place("references right", int(line[1]), *line.span(2))
