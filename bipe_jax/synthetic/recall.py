"""Recall by segment: the value of an earlier segment, so many segments back."""

import dataclasses
from typing import Any

import numpy as np

from bipe_jax.synthetic.task import Task, check_range, document

END = "#"  # of a segment
_VALUES, _FILLERS = 8, 4


@dataclasses.dataclass(frozen=True)
class Recall(Task):
    """Segments of filler letters with one value each: the label of each "#" is the value `back` segments ago.

    Attributes:
      back: segments; 1 is the one before. segments: range of their number. letters: range of those of a
        segment, of which one is the value.
    """

    back: int = 1
    segments: tuple[int, int] = (1, 8)
    letters: tuple[int, int] = (4, 12)

    def problems(self) -> dict[str, str]:
        problems = super().problems()
        check_range(problems, "segments", self.segments, 1)
        check_range(problems, "letters", self.letters, 1)
        if self.back < 1:
            problems["back"] = "must be at least 1"
        elif self.segments[1] <= self.back:
            problems["segments"] = f"must reach beyond back={self.back}"
        return problems

    @property
    def has_sets(self) -> bool:
        return True

    @property
    def words(self) -> tuple[str, ...]:
        return (*self._values, *(f"f{i}" for i in range(_FILLERS)), END)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        return {"value": self._values}

    @property
    def _values(self) -> tuple[str, ...]:
        return tuple(f"v{i}" for i in range(_VALUES))

    def make(self, random: np.random.RandomState) -> dict[str, Any]:
        count = random.randint(max(self.segments[0], self.back + 1), self.segments[1] + 1)
        values = random.randint(0, _VALUES, count)
        tokens: list[str] = []
        begins: list[int] = []
        sets: list[tuple[list[str], list[str]]] = []
        for number, value in enumerate(values):
            begins.append(len(tokens))
            size = random.randint(self.letters[0], self.letters[1] + 1)
            letters = [f"f{i}" for i in random.randint(0, _FILLERS, size)]
            letters[random.randint(size)] = f"v{value}"
            tokens += [*letters, END]
            sets += [([], [])] * size
            known = number >= self.back
            sets.append(
                ([f"v{values[number - self.back]}"], list(self._values)) if known else ([], [])
            )
        return document(tokens, sets=sets, segments=begins, labels={"segments": int(count)})

    def sample(self, number: int) -> dict[str, Any]:
        example = self.example(number)
        return {"text": example["text"], "back": self.back}
