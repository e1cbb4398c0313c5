"""Protocols: in which parts of documents targets lie, and with how much context each length scores them.

A *stretch* is a run of consecutive targets in one document. Stretches depend on the protocol and on
`context`, the largest length that may score them, and not on the lengths themselves. A *window* is a part of
a document that the model reads at once; its last targets are scored. At each length the windows of a
stretch score each of its targets once.

| protocol        | stretch                          | context of a target at length l                     |
|-----------------|----------------------------------|-----------------------------------------------------|
| same-tokens     | 1/16 of `context`, after at      | l - s + 1 to l tokens, s the tokens of the stretch  |
|                 | least `context` tokens, with it  | (1 to l where l < s)                                |
| non-overlapping | `context` tokens                 | the tokens before it in its block of l tokens: none |
|                 |                                  | at the start (as papers)                            |
| sliding:S       | `context` tokens                 | l - S + 1 to l tokens, or the document's start;     |
|                 |                                  | windows are S tokens apart                          |
"""

import dataclasses
from collections.abc import Iterator, Sequence

from bipe_jax.errors import UserError

SAME_TOKENS, NON_OVERLAPPING, SLIDING = "same-tokens", "non-overlapping", "sliding"
_PARTS = 16  # of the context, one of which is a stretch of same-tokens


@dataclasses.dataclass(frozen=True)
class Window:
    """Input tokens[start:end] of a document; the last `scored` of tokens[start + 1 : end + 1] count."""

    document: int
    start: int
    end: int
    scored: int


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A protocol, for targets with at most so much context.

    Attributes:
      name: such as "sliding:128".
      size: the targets of a stretch.
      before: the tokens of a document that precede the first token a target is predicted from, at least.
      stride: the most targets of a window; None: the window's length.
      overlapping: whether a window begins before its targets.
    """

    name: str
    size: int
    before: int
    stride: int | None
    overlapping: bool

    def stretches(self, tokens: int) -> range:
        """The places f of a document's stretches, whose targets are its tokens f + 1 … f + size.

        Args:
          tokens: of the document.
        """
        return range(self.before, max(tokens - self.size, 0), self.size)

    def windows(self, document: int, first: int, length: int) -> Iterator[Window]:
        """The windows of at most `length` tokens that score a stretch of a document."""
        last = first + self.size
        stride = min(self.stride or length, length)
        for start in range(first, last, stride):
            end = min(start + stride, last)
            read_from = max(end - length, 0) if self.overlapping else start
            yield Window(document, read_from, end, end - start)


def protocol(name: str, lengths: Sequence[int], context: int) -> Protocol:
    """The protocol of a name.

    Args:
      lengths: in tokens. context: the largest length that may score the targets.

    Raises:
      UserError: it is unknown, its stride is out of range, or a length exceeds the context.
    """
    if (longest := max(lengths)) > context:
        raise UserError(
            f"--lengths: {longest:,} tokens are more than the context of {context:,} that targets have: set "
            f"--context={longest} (config.evaluation.context); all that is to be compared needs the same"
        )
    if name == SAME_TOKENS:
        size = max(context // _PARTS, 1)
        return Protocol(name, size, context - size, size, True)
    if name == NON_OVERLAPPING:
        return Protocol(name, context, 0, None, False)
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
    return Protocol(name, context, 0, int(stride), True)
