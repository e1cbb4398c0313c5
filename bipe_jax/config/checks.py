"""What the value of a config field must be. Each check has a `complaint`: the words of what is wrong."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

from bipe_jax.suggest import did_you_mean


class Check(Protocol):
    """A condition on one value."""

    def complaint(self, value: Any) -> str | None:
        """What the value must be ("an integer", "at least 1"); None if it is."""
        ...


class Number:
    """An integer or a float from `low` to `high`; not the ends themselves if `above` or `below`."""

    def __init__(
        self,
        kind: type,
        low: float,
        high: float = math.inf,
        above: bool = False,
        below: bool = False,
    ):
        self.kind, self.low, self.high, self.above, self.below = kind, low, high, above, below

    def complaint(self, value: Any) -> str | None:
        kinds = (int, float) if self.kind is float else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return "an integer" if self.kind is int else "a number"
        if isinstance(value, float) and not math.isfinite(value):
            return "finite"
        if value < self.low or (self.above and value == self.low):
            return f"{'above' if self.above else 'at least'} {self.low:g}"
        if value > self.high or (self.below and value == self.high):
            return f"{'below' if self.below else 'at most'} {self.high:.10g}"
        return None


class Choice:
    """One of several names."""

    def __init__(self, *names: str):
        self.names = names

    def complaint(self, value: Any) -> str | None:
        if value in self.names:
            return None
        hint = did_you_mean(value, self.names) if isinstance(value, str) else ""
        return f"one of {', '.join(map(repr, self.names))}{hint}"


class Kind:
    """A value of a type, which the user is told of by a description."""

    def __init__(self, kind: type | tuple[type, ...], description: str):
        self.kind, self.description = kind, description

    def complaint(self, value: Any) -> str | None:
        return None if isinstance(value, self.kind) else self.description


class TupleOf:
    """A tuple or a list whose items all pass a check."""

    def __init__(self, item: Check, description: str):
        self.item, self.description = item, description

    def complaint(self, value: Any) -> str | None:
        if not isinstance(value, (tuple, list)):
            return self.description
        items = cast(Sequence[Any], value)
        return self.description if any(map(self.item.complaint, items)) else None


MOST = 2**53  # above it, a number is no longer the same as a float
COUNT = Number(int, low=1, high=MOST)
NATURAL = Number(int, low=0, high=MOST)
LISTED = Number(int, low=1, high=10_000)  # of what a plan lists one by one
LENGTH = Number(int, low=2, high=2**31 - 1)  # positions have 32 bits
POSITIVE = Number(float, low=0, above=True)
NOT_NEGATIVE = Number(float, low=0)
FRACTION = Number(float, low=0, high=1)
BETA = Number(float, low=0, high=1, below=True)
TEXT = Kind(str, "a string")
FLAG = Kind(bool, "True or False")
NAMES = TupleOf(TEXT, "a tuple of strings, such as ('a', 'b')")
ENTRIES = Kind((tuple, list), "a tuple of entries (kind, coordinate)")
LEVELS = Kind((tuple, list), "a tuple of rules, such as ('paragraph', 'chapter')")
LENGTHS = TupleOf(LENGTH, "a tuple of lengths, such as (256, 512)")
