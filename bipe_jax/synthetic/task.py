"""What a synthetic task is."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with its options. Subclasses define `words`, `make` and `sample`.

    Attributes:
      seed: of the task and its examples. split: "train" or "test", whose examples are drawn apart.
      count: number of examples; 0: without end.
    """

    seed: int = 0
    split: str = "train"
    count: int = 0

    @property
    def has_sets(self) -> bool:
        """Whether the labels of tokens are sets of words, and not the tokens that follow."""
        return False

    @property
    def words(self) -> tuple[str, ...]:
        """The words that its texts consist of."""
        raise NotImplementedError

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Name -> words, of sets as labels: the parts of a set that are right or wrong by themselves."""
        return {}

    def make(self, random: np.random.RandomState) -> dict[str, Any]:
        """An example: a document of `data.examples`."""
        raise NotImplementedError

    def problems(self) -> dict[str, str]:
        """Option -> what it must be, for options whose value is wrong."""
        problems = {}
        if self.seed < 0 or self.count < 0:
            problems["seed" if self.seed < 0 else "count"] = "must be at least 0"
        if self.split not in SPLITS:
            problems["split"] = f"must be one of {', '.join(SPLITS)}"
        return problems

    def example(self, number: int) -> dict[str, Any]:
        """The example of a number, from 0."""
        return self.make(self.generator(number))

    def sample(self, number: int) -> dict[str, Any]:
        """The example of a number for people and programs that check it, of JSON's types."""
        raise NotImplementedError

    def generator(self, number: int) -> np.random.RandomState:
        """What the example of a number is drawn from."""
        return np.random.RandomState([self.seed, SPLITS.index(self.split), *_parts(number)])


def shared_generator(seed: int, purpose: str) -> np.random.RandomState:
    """What is drawn from that all examples of a seed share, such as a machine; both splits get the same."""
    digest = hashlib.sha256(purpose.encode()).digest()
    return np.random.RandomState([seed, *np.frombuffer(digest[:8], "<u4").tolist()])


def _parts(number: int) -> tuple[int, int]:
    """A number in parts of 32 bits."""
    return number & 0xFFFFFFFF, number >> 32


def check_range(problems: dict[str, str], name: str, value: tuple[int, int], low: int) -> None:
    """Adds a problem unless a range is of numbers from `low` in ascending order."""
    if not low <= value[0] <= value[1]:
        problems[name] = f"must be a range LOW:HIGH of numbers from {low}"


def document(
    tokens: Sequence[str],
    *,
    learned: Sequence[tuple[int, int]] = (),
    sets: Sequence[tuple[Sequence[str], Sequence[str]]] = (),
    segments: Sequence[int] = (),
    labels: Mapping[str, Any],
) -> dict[str, Any]:
    """An example of words, as `data.examples` takes it.

    Args:
      tokens: the words. learned: ranges of words that the model writes. sets: for each word the set of words
        that it stands for, and those that the set is from. segments: the words that they begin with.
      labels: that results may be told apart by.
    """
    ends = np.cumsum([len(token) + 1 for token in tokens])
    begins = (ends - [len(token) + 1 for token in tokens]).tolist()
    begins.append(int(ends[-1]) - 1)  # the end of the text
    example: dict[str, Any] = {
        "text": " ".join(tokens),
        "learned": [(begins[first], begins[last]) for first, last in learned],
        "segments": [[begins[i] for i in segments if i]],  # BOS begins the first one
        "answer": tokens[-1],
        "labels": dict(labels),
    }
    return example | {"sets": sets} if sets else example
