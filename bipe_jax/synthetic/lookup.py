"""Retrieval that is addressed by segment: which value stands in line k, k lines back, or beside a key."""

import dataclasses
from typing import Any

import numpy as np

from bipe_jax.synthetic.task import Task, check_range, document

ASKED = ("line", "back", "before", "after", "key")
END, _QUESTION, _EQUALS = ";", "?", "="
VALUES = 32  # of a line
_KEYS, _FILLERS = 256, 4


@dataclasses.dataclass(frozen=True)
class Lookup(Task):
    """Lines of a key, fillers and a value, and a question at the end: "k7 f1 v3 ; ... ? line 1 2 = v3".

    Lines are numbered from 1, and numbers are written in digits, so that larger ones than those of training
    can be asked for. No key occurs twice.

    Attributes:
      lines: range of their number. fillers: range of those of a line.
      ask: "line": the value of line k; "back": of the k-th line from the end; "before" and "after": of the
        line before or after the one with a key; "key": of the line with the key, which no number helps with.
      k: range of the numbers that are asked for, as far as there are as many lines.
    """

    lines: tuple[int, int] = (4, 16)
    fillers: tuple[int, int] = (1, 5)
    ask: str = "line"
    k: tuple[int, int] = (1, _KEYS)

    def problems(self) -> dict[str, str]:
        problems = super().problems()
        check_range(problems, "lines", self.lines, 2)
        check_range(problems, "fillers", self.fillers, 0)
        check_range(problems, "k", self.k, 1)
        if self.ask not in ASKED:
            problems["ask"] = f"must be one of {', '.join(ASKED)}"
        if self.lines[1] > _KEYS:
            problems["lines"] = f"must be at most {_KEYS}"
        if self.k[0] > self.lines[0]:
            problems["k"] = f"must begin at {self.lines[0]} at most, the least number of lines"
        return problems

    @property
    def words(self) -> tuple[str, ...]:
        numbered = {"k": _KEYS, "v": VALUES, "f": _FILLERS}
        names = [f"{name}{i}" for name, count in numbered.items() for i in range(count)]
        return (*names, *map(str, range(10)), END, _QUESTION, _EQUALS, *ASKED)

    def make(self, random: np.random.RandomState) -> dict[str, Any]:
        count = random.randint(self.lines[0], self.lines[1] + 1)
        keys = random.permutation(_KEYS)[:count]
        values = random.randint(0, VALUES, count)
        tokens: list[str] = []
        begins: list[int] = []
        for key, value in zip(keys, values, strict=True):
            begins.append(len(tokens))
            fillers = random.randint(self.fillers[0], self.fillers[1] + 1)
            tokens += [f"k{key}", *(f"f{i}" for i in random.randint(0, _FILLERS, fillers))]
            tokens += [f"v{value}", END]
        at, address = self._address(random, keys)
        begins.append(len(tokens))
        tokens += [_QUESTION, self.ask, *address, _EQUALS, f"v{values[at]}"]
        return document(
            tokens,
            learned=[(len(tokens) - 1, len(tokens))],
            segments=begins,
            labels={"lines": int(count), "k": int(at + 1 if self.ask == "line" else count - at)},
        )

    def _address(self, random: np.random.RandomState, keys: np.ndarray) -> tuple[int, list[str]]:
        """The index of the line that is asked for, and how it is addressed."""
        count = len(keys)
        k = random.randint(self.k[0], min(self.k[1], count) + 1)
        if self.ask in ("line", "back"):
            return (k - 1 if self.ask == "line" else count - k), list(str(k))
        at = count - k
        if self.ask == "before":
            at = min(at, count - 2)
            return at, [f"k{keys[at + 1]}"]
        if self.ask == "after":
            at = max(at, 1)
            return at, [f"k{keys[at - 1]}"]
        return at, [f"k{keys[at]}"]

    def sample(self, number: int) -> dict[str, Any]:
        example = self.example(number)
        return {"text": example["text"], **example["labels"]}
