"""Bilevel finite automata: an inner machine reads the letters of a segment, an outer one the segments.

B = (P, Q, delta, Delta, p0, q0, F) with delta: P x letters -> subsets of P, and Delta: Q x P -> subsets of Q.
In each segment the inner set R starts as {p0}. At a segment's end the outer set O becomes the union of
Delta(q, p) over q in O and p in R. The string is accepted if O then meets F. The flat machine on Q x P that
reads the same string is in the states O x R at every token. This is a task of this project, with the
paper's idea of a machine of two levels; it is no theorem of the paper.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

FAMILIES = ("total", "collapsing", "group", "counter")
LETTERS = ("a", "b", "c", "d")
_COLLAPSING = 0.17  # share of the letters that merge two states
_FURTHER = 0.6  # share of the letters of "total" that lead from one state to two
_ATTEMPTS = 1000
_STRINGS, _SEGMENTS = 256, 8  # that a machine is judged by
_ACCEPTED, _GUESSED = (0.3, 0.7), 0.4
_PAIRS_OF_STARTS = 200
_LONGEST = 64  # segments in which two starts may come to coincide


@dataclasses.dataclass(frozen=True)
class Machine:
    """A bilevel automaton whose start states are 0. Sets of states are integers, whose bit k is state k.

    Attributes:
      inner: (letters, P, P) booleans, whether a letter leads from a state to another.
      outer: (P, Q, Q) booleans, whether an inner state leads from an outer one to another.
      accepting: the set of outer states that accept.
    """

    inner: np.ndarray
    outer: np.ndarray
    accepting: int

    @functools.cached_property
    def _inner_sets(self) -> list[list[int]]:
        """For each letter and set, the set after it."""
        return [_table(joined) for joined in self.inner]

    @functools.cached_property
    def _outer_sets(self) -> list[list[int]]:
        """For each inner set and outer set, the outer set after it."""
        inner_sets = _members(len(self.outer))
        return [_table(np.any(self.outer[inner], axis=0)) for inner in inner_sets]

    def run(self, segments: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
        """The inner sets after each letter of each segment, and the outer sets after each segment."""
        inner, outer = [], []
        now = 1
        for letters in segments:
            states, of_segment = 1, []
            for letter in letters:
                states = self._inner_sets[letter][states]
                of_segment.append(states)
            inner.append(of_segment)
            now = self.after(now, states)
            outer.append(now)
        return inner, outer

    def after(self, outer: int, inner: int) -> int:
        """The outer set after a segment that ends in an inner set."""
        return self._outer_sets[inner][outer]

    def accepts(self, outer: int) -> bool:
        return bool(outer & self.accepting)


def members(states: int) -> list[int]:
    """The states of a set."""
    return [state for state in range(states.bit_length()) if states >> state & 1]


def _members(count: int) -> np.ndarray:
    """All sets of so many states, (2^count, count) booleans."""
    return np.arange(1 << count)[:, None] >> np.arange(count) & 1 != 0


def _table(joined: np.ndarray) -> list[int]:
    """For each set of states, the set of those that `joined`, (n, n), leads to."""
    after = _members(len(joined)).astype(int) @ joined > 0
    return (after @ (1 << np.arange(joined.shape[1]))).tolist()


def draw(family: str, states: int, random: np.random.RandomState) -> Machine:
    """A machine of a family, with as many inner as outer states.

    Machines that accept under 30 % or over 70 % of strings of 8 segments, or whose most frequent outer set
    has more than 40 %, are drawn again.

    Args:
      family: one of FAMILIES. "total": a successor of each state and letter, and for 60 % of the letters
        a second one of a state; a few segments later the start is forgotten. "group": letters are
        permutations, and nothing is forgotten. "collapsing": the same, but 17 % of the letters, or one, merge
        two states. "counter": the inner machine adds up numbers, and permutes the states of the outer one.

    Raises:
      ValueError: none of 1000 machines is good.
    """
    for _ in range(_ATTEMPTS):
        if family == "counter":
            inner, outer = _counter(states), _letters("group", states, states, random)
        else:
            inner = _letters(family, len(LETTERS), states, random)
            outer = _letters(family, states, states, random)
        accepting = random.randint(1, (1 << states) - 1)
        machine = Machine(inner, outer, accepting)
        if _is_good(machine, random):
            return machine
    raise ValueError(f"no machine of the family {family!r} with {states} states is good")


def _letters(family: str, count: int, states: int, random: np.random.RandomState) -> np.ndarray:
    """What the letters of a machine join: (count, states, states) booleans."""
    if family == "total":
        return np.stack([_total(states, random) for _ in range(count)])
    targets = np.stack([random.permutation(states) for _ in range(count)])
    if family == "collapsing":
        for letter in random.permutation(count)[: max(round(_COLLAPSING * count), 1)]:
            first, second = random.permutation(states)[:2]
            targets[letter, first] = targets[letter, second]
    return np.eye(states, dtype=bool)[targets]


def _total(states: int, random: np.random.RandomState) -> np.ndarray:
    joined = np.eye(states, dtype=bool)[random.randint(0, states, states)]
    if random.random_sample() < _FURTHER:
        joined[random.randint(states), random.randint(states)] = True
    return joined


def _counter(states: int) -> np.ndarray:
    """Letter k adds k + 1, modulo the number of states."""
    return np.stack([np.roll(np.eye(states, dtype=bool), k + 1, 1) for k in range(len(LETTERS))])


def strings(
    random: np.random.RandomState, segments: tuple[int, int], letters: tuple[int, int]
) -> list[list[int]]:
    """A string: letters of a random number of segments, each of a random number of letters."""
    count = random.randint(segments[0], segments[1] + 1)
    sizes = random.randint(letters[0], letters[1] + 1, count)
    return [random.randint(0, len(LETTERS), size).tolist() for size in sizes]


def _is_good(machine: Machine, random: np.random.RandomState) -> bool:
    ends = outer_sets(machine, random)
    accepted = sum(machine.accepts(outer) for outer in ends) / len(ends)
    return _ACCEPTED[0] <= accepted <= _ACCEPTED[1] and majority(ends) <= _GUESSED


def outer_sets(machine: Machine, random: np.random.RandomState) -> list[int]:
    """The last outer sets of random strings of 8 segments."""
    return [
        machine.run(strings(random, (_SEGMENTS, _SEGMENTS), (4, 12)))[1][-1]
        for _ in range(_STRINGS)
    ]


def majority(sets: Sequence[int]) -> float:
    """The share of the most frequent set: what guessing it scores."""
    return collections.Counter(sets).most_common(1)[0][1] / len(sets)


def _meetings(machine: Machine, random: np.random.RandomState) -> Iterator[int]:
    """For pairs of outer start states, the segments after which they lead to one set; 65 if never."""
    states = machine.outer.shape[1]
    while True:
        first, second = (1 << int(q) for q in random.permutation(states)[:2])
        steps = 0
        while first != second and steps <= _LONGEST:
            (inner,), _ = machine.run(strings(random, (1, 1), (4, 12)))
            first, second = machine.after(first, inner[-1]), machine.after(second, inner[-1])
            steps += 1
        yield steps


def memory(machine: Machine, random: np.random.RandomState) -> dict[str, float]:
    """How long a machine remembers, over random pairs of outer start states and random strings.

    Returns:
      "median": of the segments until both lead to one set; 65 stands for more than 64. "never": the share of
      pairs that are apart after 64 segments.
    """
    steps = np.array(list(itertools.islice(_meetings(machine, random), _PAIRS_OF_STARTS)))
    return {"median": float(np.median(steps)), "never": float((steps > _LONGEST).mean())}
