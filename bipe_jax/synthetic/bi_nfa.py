"""Strings of a bilevel automaton, with its states after each token as labels or written into the text."""

import dataclasses
import functools
from typing import Any

import numpy as np

from bipe_jax.synthetic import machines
from bipe_jax.synthetic.machines import FAMILIES, LETTERS, Machine, members
from bipe_jax.synthetic.task import Task, check_range, document, shared_generator

MODES, SHOWN, COORDINATES = ("parallel", "scratchpad"), ("shown", "hidden"), ("true", "random")
END = "#"  # of a segment
_WRITTEN = ";"  # after the states that are written
_LEAST, _MOST = 3, 8  # states


@dataclasses.dataclass(frozen=True)
class BiNfa(Task):
    """Strings of one random machine, see `machines`.

    Attributes:
      family: of the machine, one of `machines.FAMILIES`. states: inner ones, and as many outer ones.
      segments: range of the number of segments. letters: range of those of a segment.
      mode: "parallel": the sets of states are labels of each token, "scratchpad": after each "#" the outer
        set is written, as "q0 q3 ;", and after the last "yes" or "no".
      separators: "shown", or "hidden": no "#"; the outer set is read out at a segment's last letter.
      coordinates: where "segments" of the document begin: "true", or "random": at as many random tokens.
    """

    family: str = "collapsing"
    states: int = 6
    segments: tuple[int, int] = (1, 8)
    letters: tuple[int, int] = (4, 12)
    mode: str = "parallel"
    separators: str = "shown"
    coordinates: str = "true"

    def problems(self) -> dict[str, str]:
        problems = super().problems()
        choices = {
            "family": FAMILIES,
            "mode": MODES,
            "separators": SHOWN,
            "coordinates": COORDINATES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                problems[name] = f"must be one of {', '.join(known)}"
        if not _LEAST <= self.states <= _MOST:
            problems["states"] = f"must be from {_LEAST} to {_MOST}"
        check_range(problems, "segments", self.segments, 1)
        check_range(problems, "letters", self.letters, 1)
        if self.mode == "scratchpad" and self.separators == "hidden":
            problems["separators"] = "must be shown with mode=scratchpad"
        return problems

    @property
    def has_sets(self) -> bool:
        return self.mode == "parallel"

    @property
    def words(self) -> tuple[str, ...]:
        """The states and acceptance come first: labels are sets of these words."""
        states = [f"{name}{i}" for name in "pq" for i in range(self.states)]
        return (*states, "yes", "no", *LETTERS, END, _WRITTEN)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        n = self.states
        return {"inner": self.words[:n], "outer": self.words[n : 2 * n], "accept": ("yes",)}

    @property
    def machine(self) -> Machine:
        """The machine, of which all examples are."""
        return _machine(self.family, self.states, self.seed)

    def make(self, random: np.random.RandomState) -> dict[str, Any]:
        segments = machines.strings(random, self.segments, self.letters)
        inner, outer = self.machine.run(segments)
        tokens: list[str] = []
        labels: list[
            tuple[list[str], list[str]]
        ] = []  # of each token: the set, and the words it is from
        begins: list[int] = []  # of segments, as numbers of tokens
        spans: list[tuple[int, int]] = []  # tokens that are written by the model
        names_p, names_q = self.words[: self.states], self.words[self.states : 2 * self.states]
        for number, letters in enumerate(segments):
            begins.append(len(tokens))
            tokens += [LETTERS[letter] for letter in letters]
            labels += [(_named(names_p, states), list(names_p)) for states in inner[number]]
            now = _named(names_q, outer[number])
            choices = list(names_q)
            is_last = number + 1 == len(segments)
            accepts = self.machine.accepts(outer[number])
            if is_last:
                choices = [*choices, "yes"]
                read = [*now, "yes"] if accepts else now
            else:
                read = now
            if self.separators == "shown":
                tokens.append(END)
                labels.append((read, choices))
            else:
                of_letter, of_letters = labels[-1]
                labels[-1] = ([*of_letter, *read], [*of_letters, *choices])
            if self.mode == "scratchpad":
                written = [*now, _WRITTEN, *(["yes" if accepts else "no"] if is_last else [])]
                spans.append((len(tokens), len(tokens) + len(written)))
                tokens += written
        if self.coordinates == "random":
            chosen = 1 + random.permutation(len(tokens) - 1)[: len(begins) - 1]
            begins = [0, *sorted(chosen.tolist())]
        longest = max(map(len, segments))
        return document(
            tokens,
            learned=spans,
            sets=() if spans else labels,
            segments=begins,
            labels={"segments": len(segments), "longest": longest},
        )

    def sample(self, number: int) -> dict[str, Any]:
        """The example of a number with all that is needed to check it, of JSON's types."""
        random = self.generator(number)
        segments = machines.strings(random, self.segments, self.letters)
        inner, outer = self.machine.run(segments)
        tokens: list[str] = []
        states: list[list[int]] = []
        for letters, of_segment in zip(segments, inner, strict=True):
            tokens += [*(LETTERS[letter] for letter in letters), END]
            states += [*(members(one) for one in of_segment), [0]]
        return {
            "machine": _described(self.machine),
            "tokens": tokens,
            "inner": states,
            "outer": [members(one) for one in outer],
            "accept": self.machine.accepts(outer[-1]),
        }


@functools.lru_cache(maxsize=64)
def _machine(family: str, states: int, seed: int) -> Machine:
    return machines.draw(family, states, shared_generator(seed, f"bi-nfa {family} {states}"))


def _named(names: tuple[str, ...], states: int) -> list[str]:
    return [names[i] for i in members(states)]


def _described(machine: Machine) -> dict[str, Any]:
    """A machine of JSON's types."""
    return {
        "inner_start": 0,
        "outer_start": 0,
        "accept": members(machine.accepting),
        "inner": {
            str(p): {
                letter: np.flatnonzero(machine.inner[i, p]).tolist()
                for i, letter in enumerate(LETTERS)
            }
            for p in range(machine.inner.shape[1])
        },
        "outer": {
            str(q): {
                str(p): np.flatnonzero(machine.outer[p, q]).tolist()
                for p in range(machine.outer.shape[0])
            }
            for q in range(machine.outer.shape[1])
        },
    }
