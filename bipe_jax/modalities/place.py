"""A place in a text where a model's most probable continuation is right or wrong."""

from typing import NamedTuple


class Place(NamedTuple):
    """A place.

    Attributes:
      measure: what it counts for. number: of the ply or the step, from 1.
      start, end: of its characters in the text.
      allowed: the words that are right, at a place of one token; None: what stands there is.
    """

    measure: str
    number: int
    start: int
    end: int
    allowed: frozenset[str] | None = None
