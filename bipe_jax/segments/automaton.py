# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Finite automata over tokens: what a rule remembers of the text before a token.

An automaton of one state knows the current token alone. One of a regular expression is made of the
expression's automaton over characters and of the text of each token.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import interegular
import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax.errors import UserError

Booleans = np.ndarray[Any, np.dtype[np.bool_]]
Integers = np.ndarray[Any, np.dtype[np.int32]]


_MOST_STATES = 256  # each token of a block on a device has as many integers


@dataclasses.dataclass(frozen=True)
class Automaton:
    """A finite automaton that reads tokens. It begins each document in state 0.

    Attributes:
      classes: the token ids of each class of tokens but class 0, which has all other ids.
      next: the state after a token: of each state, by class.
      cuts: whether a token cuts the text: of each state before it, by class.
    """

    classes: tuple[tuple[int, ...], ...]
    next: tuple[tuple[int, ...], ...]
    cuts: tuple[tuple[bool, ...], ...]

    @property
    def has_states(self) -> bool:
        return len(self.next) > 1

    def class_of(self, tokens: Any) -> Any:
        """The class of each token, shaped like `tokens`, an array of NumPy or JAX."""
        return _look_up(self._class_of_id, tokens)

    @functools.cached_property
    def _class_of_id(self) -> Integers:
        """The class of each id. Larger ids are clipped to the last entry, which is of class 0."""
        table = np.zeros(
            max((max(ids, default=0) for ids in self.classes), default=0) + 2, np.int32
        )
        for number, ids in enumerate(self.classes, 1):
            table[list(ids)] = number
        return table

    def cuts_at(self, tokens: Any, states: Any) -> Any:
        """Whether each token cuts the text, given the states before them: booleans."""
        if not self.has_states:
            return _look_up(self._cuts_of_id, tokens)
        return self._entries(self.cuts, tokens, states)

    def after(self, tokens: Any, states: Any) -> Any:
        """The states after tokens, given those before them: int32."""
        return self._entries(self.next, tokens, states)

    @functools.cached_property
    def _cuts_of_id(self) -> Booleans:
        """Of an automaton of one state: whether each id cuts the text."""
        return np.asarray(self.cuts[0])[self._class_of_id]

    def _entries(self, table: tuple[tuple[int, ...], ...], tokens: Any, states: Any) -> Any:
        xp = jnp if isinstance(tokens, jax.Array) else np
        return xp.take(xp.asarray(table).ravel(), self.class_of(tokens) + states * len(table[0]))

    def states(self, tokens: Any, fresh: Any, first: int = 0) -> Any:
        """The state before each token of whole rows: (..., L) int32; the number 0 if there is no other.

        Args:
          tokens: (..., L), an array of NumPy or JAX.
          fresh: (..., L) whether each token begins a document, and True where a row begins.
          first: the state before the first token of each row. For NumPy arrays only.
        """
        if not self.has_states:
            return 0
        if isinstance(tokens, jax.Array):
            return self._states_dense(self.class_of(tokens), fresh)
        return self._states_sparse(self.class_of(tokens), fresh, first)

    def _states_dense(self, classes: jax.Array, fresh: jax.Array) -> jax.Array:
        """By composing the maps that tokens are, from state to state."""
        maps = jnp.asarray(self.next, jnp.int32).T[classes]  # (..., L, states)
        maps = jnp.where(fresh[..., None], maps[..., :1], maps)

        def compose(first: jax.Array, second: jax.Array) -> jax.Array:
            return jnp.take_along_axis(second, first, axis=-1)

        after = jax.lax.associative_scan(compose, maps, axis=maps.ndim - 2)[..., 0]
        before = jnp.pad(after[..., :-1], [(0, 0)] * (after.ndim - 1) + [(1, 0)])
        return jnp.where(fresh, 0, before)

    def _states_sparse(self, classes: Integers, fresh: Booleans, first: int) -> Integers:
        """With NumPy. After most tokens the state is known, whatever it was before them."""
        shape, classes, fresh = classes.shape, classes.ravel(), fresh.ravel()
        states = np.zeros(classes.size, np.int32)
        if not classes.size:
            return states.reshape(shape)
        following = np.asarray(self.next, np.int32)
        known = (following == following[0]).all(axis=0)[classes[:-1]]
        states[1:] = np.where(known, following[0, classes[:-1]], 0)
        states[fresh] = 0
        if first:
            states.reshape(shape)[..., 0] = first
        unknown = np.flatnonzero(~fresh[1:] & ~known) + 1
        index = np.arange(len(unknown))
        begins = np.diff(unknown, prepend=-1) > 1
        ranks = index - np.maximum.accumulate(np.where(begins, index, 0))
        order = np.argsort(ranks, kind="stable")
        for at in np.split(unknown[order], np.cumsum(np.bincount(ranks))[:-1]):
            states[at] = following[states[at - 1], classes[at - 1]]
        return states.reshape(shape)


def _look_up(table: np.ndarray[Any, Any], tokens: Any) -> Any:
    """The entries of tokens in a table by id; larger ids have its last one."""
    xp = jnp if isinstance(tokens, jax.Array) else np
    return xp.take(xp.asarray(table), tokens, mode="clip")


def of_separators(ids: Sequence[int]) -> Automaton:
    """Cuts at each of the ids."""
    return Automaton((tuple(ids),), ((0, 0),), ((False, True),))


def of_pattern(pattern: str, pieces: Sequence[str]) -> Automaton:
    """Cuts at each token in whose text a match of a regular expression ends.

    Matches are sought from the start of the document, or from the end of the last match on. The first
    end of a match counts: `a+` matches one `a`.

    Args:
      pattern: of Python's syntax, without what is no regular language: `^`, `$`, `\\b` and references.
      pieces: the text of each id; "" leaves the state as it is.

    Raises:
      UserError: the pattern is malformed, too large, matches nothing at all, or the empty text.
    """
    symbol_of, lookup, is_end = _over_characters(pattern)
    V, longest = len(pieces), max(map(len, pieces), default=0)
    symbols = np.full((V, longest), -1, np.int32)
    for i, piece in enumerate(pieces):
        symbols[i, : len(piece)] = [symbol_of[character] for character in piece]
    states = np.broadcast_to(np.arange(len(lookup), dtype=np.int32)[:, None], (len(lookup), V))
    cuts = np.zeros((len(lookup), V), bool)
    for at in range(longest):
        present = symbols[:, at] >= 0
        following = np.where(present, lookup[states, symbols[:, at]], states)
        cuts |= present & is_end[following]
        states = np.where(present & is_end[following], 0, following)
    return _of_tables(states.astype(np.int32), cuts)


@functools.cache  # a config is checked several times
def _over_characters(pattern: str) -> tuple[Mapping[str, int], Integers, Booleans]:
    """The automaton that seeks a pattern in characters.

    Returns:
      The symbol of each character; (states, symbols) the state after one; (states,) whether a match ends.
    """
    try:
        own = interegular.parse_pattern(pattern).to_fsm()
        sought = interegular.parse_pattern(f"[\\s\\S]*({pattern})").to_fsm().reduce()
    except Exception as error:  # of several kinds, also from the parser below it
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(
            f"the pattern {pattern!r} of a segment rule is no regular expression that can be used "
            f"({reason}): leave out anchors (^ $ \\b) and references"
        ) from None
    if not own.finals or own.empty():
        raise UserError(
            f"the pattern {pattern!r} of a segment rule matches no text: write another pattern"
        )
    if own.initial in own.finals:
        raise UserError(
            f"the pattern {pattern!r} of a segment rule matches the empty text, which is everywhere: require "
            "one character"
        )
    if len(sought.states) > _MOST_STATES:
        raise UserError(
            f"the pattern {pattern!r} of a segment rule needs {len(sought.states):,} states, more than "
            f"{_MOST_STATES}: use shorter repetitions"
        )
    # A state without a transition for a symbol never leads to a match, which cannot happen here.
    order = [sought.initial, *sorted(set(sought.map) - {sought.initial})]
    number = {state: i for i, state in enumerate(order)}
    table = np.zeros((len(order), max(sought.alphabet.by_transition) + 1), np.int32)
    for state, of_state in sought.map.items():
        for symbol, target in of_state.items():
            table[number[state], symbol] = number[target]
    return sought.alphabet, table, np.array([state in sought.finals for state in order])


def _of_tables(states: Integers, cuts: Booleans) -> Automaton:
    """The automaton of (states, V) tables: states that can be reached, and ids in classes of equal ones."""
    reached = [0]
    for state in reached:
        reached += [s for s in np.unique(states[state]).tolist() if s not in reached]
    number = np.zeros(len(states), np.int32)
    number[reached] = np.arange(len(reached))
    both = np.concatenate([number[states[reached]], cuts[reached]])
    columns, of_id = np.unique(both, axis=1, return_inverse=True)
    of_id = of_id.ravel()
    order = np.argsort(-np.bincount(of_id), kind="stable")  # the largest class is class 0
    next_states, of_cuts = np.split(columns[:, order], 2)
    return Automaton(
        classes=tuple(tuple(np.flatnonzero(of_id == i).tolist()) for i in order[1:].tolist()),
        next=tuple(map(tuple, next_states.tolist())),
        cuts=tuple(tuple(map(bool, row)) for row in of_cuts.tolist()),
    )
