"""Protocols: which tokens of held-out documents are scored, and with how much context.

A *window* is a part of one document that the model reads at once; its last targets are scored. In each
protocol all lengths score exactly the same tokens, so that their results compare. Only documents long
enough for the longest length are used.

| protocol        | context of a target at length l                                              |
|-----------------|------------------------------------------------------------------------------|
| same-tokens     | up to l tokens, in blocks that end with the same targets                     |
| non-overlapping | the tokens before it in its block of l tokens: none at the start (as papers) |
| sliding:S       | l - S + 1 to l tokens, or the document's start; windows are S tokens apart   |
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from bipe_jax.errors import UserError

SAME_TOKENS, NON_OVERLAPPING, SLIDING = "same-tokens", "non-overlapping", "sliding"


@dataclasses.dataclass(frozen=True)
class Window:
    """Input tokens[start:end] of a document; the last `scored` of tokens[start + 1 : end + 1] count."""

    document: int
    start: int
    end: int
    scored: int


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A protocol.

    Attributes:
      name: such as "sliding:128".
      windows: (tokens of each document, a length, all lengths, limit) -> list of Window. The limit is the
        largest number of windows of the shortest length, which are spread evenly over documents.
    """

    name: str
    windows: Callable[[Sequence[int], int, Sequence[int], int], list[Window]]


def protocol(name: str, lengths: Sequence[int]) -> Protocol:
    """The protocol of a name. Raises UserError if it is unknown, or its stride is out of range."""
    if name == SAME_TOKENS:
        return Protocol(name, _same_tokens)
    if name == NON_OVERLAPPING:
        return Protocol(name, _non_overlapping)
    kind, colon, stride = name.partition(":")
    if kind != SLIDING:
        raise UserError(
            f"--protocol={name} is unknown: use {SAME_TOKENS}, {NON_OVERLAPPING} or {SLIDING}:STRIDE"
        )
    if not colon or not stride.isdecimal() or not 1 <= int(stride) <= min(lengths):
        raise UserError(
            f"--protocol={name}: the stride must be a number of tokens from 1 to the shortest length "
            f"({min(lengths)}), as in {SLIDING}:{max(min(lengths) // 2, 1)}"
        )
    return Protocol(name, functools.partial(_sliding, int(stride)))


def _spread(candidates: list, limit: int) -> list:
    """At most `limit` candidates, evenly spaced."""
    if len(candidates) <= limit:
        return candidates
    indices = np.linspace(0, len(candidates) - 1, limit).round().astype(int)
    return [candidates[i] for i in indices]


def _same_tokens(document_lengths, length, lengths, limit) -> list[Window]:
    shortest, longest = min(lengths), max(lengths)
    ends = [
        (document, end)
        for document, size in enumerate(document_lengths)
        for end in range(longest, size, shortest)
    ]
    return [Window(document, end - length, end, shortest) for document, end in _spread(ends, limit)]


def _stretches(document_lengths, lengths, limit) -> list[tuple[int, int]]:
    """(document, first) of parts with the targets first + 1 … first + the longest length."""
    longest = max(lengths)
    candidates = [
        (document, first)
        for document, size in enumerate(document_lengths)
        for first in range(0, size - longest, longest)
    ]
    return _spread(candidates, max(limit * min(lengths) // longest, 1))


def _non_overlapping(document_lengths, length, lengths, limit) -> list[Window]:
    longest = max(lengths)
    return [
        Window(document, start, end := min(start + length, first + longest), end - start)
        for document, first in _stretches(document_lengths, lengths, limit)
        for start in range(first, first + longest, length)
    ]


def _sliding(stride, document_lengths, length, lengths, limit) -> list[Window]:
    longest = max(lengths)
    return [
        Window(document, max(end - length, 0), end, end - before)
        for document, first in _stretches(document_lengths, lengths, limit)
        for before in range(first, first + longest, stride)
        for end in [min(before + stride, first + longest)]
    ]
