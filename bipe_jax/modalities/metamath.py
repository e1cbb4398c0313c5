"""Databases of Metamath: their statements, and the steps of their proofs.

The language and the compressed form of proofs are those of Megill and Wheeler, "Metamath: A Computer Language
for Mathematical Proofs", 2019, chapter 4 and appendix B. Proofs are expanded, not verified: which hypotheses
and distinct variables a step needs is not checked.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_COMMENT = re.compile(r"\$\(.*?\$\)", re.DOTALL)
PROVABLE = "|-"  # the type of what is asserted; other types are those of syntax

Symbols = tuple[str, ...]


class Statement(NamedTuple):
    """A statement with a label.

    Attributes:
      kind: "f" (the type of a variable), "e" (a hypothesis), "a" (an axiom or definition) or "p" (a theorem).
      symbols: the type first. hypotheses: of axioms and theorems, in the order in which proofs give them.
      proof: of theorems, its words.
    """

    label: str
    kind: str
    symbols: Symbols
    hypotheses: tuple["Statement", ...] = ()
    proof: tuple[str, ...] = ()


class Step(NamedTuple):
    """A step of a proof that asserts something.

    Attributes:
      references: the numbers of the steps that it follows from, from 1. label: of the statement that it uses.
      symbols: what it asserts.
    """

    references: tuple[int, ...]
    label: str
    symbols: Symbols


def theorems(text: str) -> Iterator[tuple[Statement, Mapping[str, Statement]]]:
    """Yields the theorems of a database in their order, each with all statements before it by label."""
    known: dict[str, Statement] = {}
    active: list[Statement] = []  # the hypotheses in force
    scopes: list[int] = []
    label = ""
    words = (word for line in _COMMENT.sub(" ", text).split("\n") for word in line.split())
    for word in words:
        if word == "${":
            scopes.append(len(active))
        elif word == "$}":
            del active[scopes.pop() :]
        elif word in ("$c", "$v", "$d"):
            _until(words, "$.")
        elif word in ("$f", "$e"):
            known[label] = Statement(label, word[1], _until(words, "$."))
            active.append(known[label])
        elif word in ("$a", "$p"):
            symbols = _until(words, "$." if word == "$a" else "$=")
            proof = _until(words, "$.") if word == "$p" else ()
            own = Statement(label, word[1], symbols, _mandatory(symbols, active), proof)
            if proof:
                yield own, known
            known[label] = own
        else:
            label = word


def _until(words: Iterator[str], end: str) -> Symbols:
    return tuple(iter(words.__next__, end))


def _mandatory(symbols: Symbols, active: Sequence[Statement]) -> tuple[Statement, ...]:
    """The hypotheses of an assertion: all of kind "e", and the types of the variables in them and in it."""
    used = set(symbols).union(*(one.symbols for one in active if one.kind == "e"))
    return tuple(one for one in active if one.kind == "e" or one.symbols[1] in used)


def steps(theorem: Statement, known: Mapping[str, Statement]) -> list[Step]:
    """The steps of a theorem's proof that assert something, the last of which is the theorem.

    A step that the proof uses twice is there once. Raises ValueError: the proof is incomplete.
    """
    made: list[Step] = []
    stack: list[tuple[Symbols, int]] = []  # what is proved, and the number of its step; 0 of syntax
    tagged: list[tuple[Symbols, int]] = []
    for used in _uses(theorem, known):
        if used is None:
            tagged.append(stack[-1])
            continue
        if isinstance(used, int):
            stack.append(tagged[used])
            continue
        count = len(used.hypotheses)
        given = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        symbols = _substituted(used, [of_one for of_one, _ in given])
        number = 0
        if symbols[0] == PROVABLE:
            of_given = zip(used.hypotheses, given, strict=True)
            references = tuple(number for one, (_, number) in of_given if one.kind == "e")
            made.append(Step(references, used.label, symbols))
            number = len(made)
        stack.append((symbols, number))
    return made


def _uses(theorem: Statement, known: Mapping[str, Statement]) -> Iterator[Statement | int | None]:
    """Yields the statements that a proof uses; None tags what was made last, and a number means a tagged one.

    In a compressed proof A to T end a number to the base 20, whose digits before are U to Y to the base 5:
    first come the hypotheses, then the labels in brackets, then what was tagged with Z.
    """
    if theorem.proof[0] != "(":
        yield from (_known(label, known) for label in theorem.proof)
        return
    close = theorem.proof.index(")")
    labels = theorem.proof[1:close]
    named = [*theorem.hypotheses, *(known[label] for label in labels)]
    number = 0
    for letter in "".join(theorem.proof[close + 1 :]):
        digit = ord(letter) - ord("A")
        if letter == "?":
            raise ValueError(f"the proof of {theorem.label} is incomplete")
        if letter == "Z":
            yield None
        elif digit >= 20:
            number = 5 * number + digit - 19
        else:
            number = 20 * number + digit
            yield named[number] if number < len(named) else number - len(named)
            number = 0


def _known(label: str, known: Mapping[str, Statement]) -> Statement:
    if label == "?":
        raise ValueError("the proof is incomplete")
    return known[label]


def _substituted(used: Statement, given: Sequence[Symbols]) -> Symbols:
    """What a statement says of the symbols that its hypotheses are given."""
    if used.kind in "fe":
        return used.symbols
    of = {
        one.symbols[1]: symbols[1:]
        for one, symbols in zip(used.hypotheses, given, strict=True)
        if one.kind == "f"
    }
    return tuple(part for symbol in used.symbols for part in of.get(symbol, (symbol,)))
