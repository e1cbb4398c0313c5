# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""The coordinates of tokens: of whole blocks, and one token after the other.

With tokens t_0 … t_{L-1} and separators, as in the authors' code of BiPE (He et al., 2024, section 3):

    segment_i = number of separators strictly before i
    offset_i  = i - index of the first token of i's segment

Each coarser level has a number and an offset of the same kind, and each level but the coarsest its number
within the next coarser segment. Offsets are not clipped here: a table of finite size clips them itself
(`positions.absolute`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax.errors import UserError
from bipe_jax.segments.rules import Rule, names_of, offset_of

# Name -> integers, arrays of NumPy or JAX. Besides the coordinates it may have the states of automata.
Coordinates = dict[str, Any]


def _state_of(level: str) -> str:
    """The name of the state of a level's automaton before a token, beside the coordinates."""
    return f"{level}.state"


def is_state(name: str) -> bool:
    """Whether an array beside coordinates is of the states of an automaton."""
    return name.endswith(".state")


def coordinates(
    tokens: Any,
    rule: Rule,
    document_ids: Any = None,
    start: Coordinates | None = None,
    starts: Any = None,
    states: bool = False,
) -> Coordinates:
    """The coordinates of every token of whole blocks.

    Args:
      tokens: (..., L) integers, a NumPy or a JAX array; the result is of the same kind.
      rule: where segments end.
      document_ids: (..., L) integers that change where a new document begins. If given, all
        coordinates restart there; if not, they run through the block.
      start: from `start`, `enter` or `advance`, for each row's first token, if the row begins within a
        document. For NumPy arrays only.
      starts: (..., L) integers, bit k of which says whether a segment of level k begins with the token, for
        levels with a segmenter.
      states: whether to add what `advance` needs besides the coordinates.

    Returns:
      {"position", "segment", "offset", ...}: (..., L) int32 arrays, see `names_of`.

    Raises:
      UserError: a level has a segmenter, and `starts` is None.
    """
    marks: Any = starts
    if starts is None and (names := [own.segmenter for _, own in rule.levels if own.segmenter]):
        raise UserError(
            f"the segment rule {names[0]!r} reads the text, and here are tokens alone: use a checkpoint with "
            "another rule, or give the tokens' `starts`"
        )
    xp = jnp if isinstance(tokens, jax.Array) else np
    index = xp.broadcast_to(xp.arange(tokens.shape[-1], dtype=np.int32), tokens.shape)
    fresh = index == 0
    if document_ids is not None:
        fresh = fresh | _shifted(document_ids[..., 1:] != document_ids[..., :-1])
    latest = _latest_dense if xp is jnp else _latest_sparse

    def in_document(values: Any) -> Any:
        """Values that never fall within a row, counted from the document's first token."""
        return values - (values[..., :1] if document_ids is None else latest(values, fresh))

    continued: Any = False
    if start:
        continued = np.cumsum(fresh, axis=-1) == 1  # the document that the row begins within
        start = enter(start, tokens[..., 0], rule, None if starts is None else starts[..., 0])
    position = in_document(index)
    if start:
        position = position + continued * np.int32(start["position"])
    result = {"position": position}

    # From the coarsest level to the finest: an end of the coarser one ends the finer one too.
    begun, coarser = fresh, ""
    for number, (level, own) in reversed(list(enumerate(rule.levels))):
        first_state = start.get(_state_of(level), 0) if start else 0
        state = own.machine.states(tokens, fresh, first_state)
        if own.segmenter:
            begins = (marks >> number) & 1 != 0
        else:
            cuts = own.cuts(tokens, position, state)
            begins = cuts if own.before else _shifted(cuts[..., :-1])
        within, begun = begun, begun | begins
        count = xp.cumsum(begun, axis=-1, dtype=np.int32)
        result[level] = in_document(count)
        result[offset_of(level)] = index - latest(index, begun)
        if coarser:
            result[f"{level}_in_{coarser}"] = count - latest(count, within)
        if start:
            result[level] += continued * np.int32(start[level])
            first = count == 1
            result[offset_of(level)] += first * np.int32(start[offset_of(level)])
            if coarser:
                first = np.cumsum(within, axis=-1) == 1
                name = f"{level}_in_{coarser}"
                result[name] += first * np.int32(start[name])
        if states and own.machine.has_states:
            result[_state_of(level)] = state
        coarser = level
    return result


def _shifted(cuts: Any) -> Any:
    """(..., L - 1) booleans as those of the tokens after them, (..., L)."""
    xp = jnp if isinstance(cuts, jax.Array) else np
    return xp.concatenate([xp.zeros((*cuts.shape[:-1], 1), bool), cuts], axis=-1)


def _latest_dense(values: Any, where: Any) -> Any:
    """The value at the last place where `where` is true, with JAX; values must not fall within a row."""
    return jax.lax.cummax(jnp.where(where, values, 0), axis=values.ndim - 1)


def _latest_sparse(values: Any, where: Any) -> Any:
    """The same with NumPy, where it is true at few places, and at the beginning of each row."""
    places = np.flatnonzero(where)
    return np.repeat(values.ravel()[places], np.diff(places, append=values.size)).reshape(
        values.shape
    )


def start(shape: tuple[int, ...] = (), rule: Rule | None = None) -> Coordinates:
    """The coordinates of the first token of a document: what `advance` begins from."""
    levels = (rule or Rule()).levels
    names = [*names_of([level for level, _ in levels])]
    names += [_state_of(level) for level, own in levels if own.machine.has_states]
    return {name: jnp.zeros(shape, jnp.int32) for name in names}


def enter(state: Coordinates, token: Any, rule: Rule, starts: Any = None) -> Coordinates:
    """The coordinates of a token, of which `state` has what the tokens before it tell.

    They differ where a segment begins with the token by a rule that cuts before it, or by a segmenter.

    Args:
      state: from `start` or `advance`.
      token, starts: integers, as in `coordinates`, of the shape of each coordinate.
    """
    xp = jnp if isinstance(token, jax.Array) else np
    result, coarser = dict(state), ""
    begun: Any = False
    for number, (level, own) in reversed(list(enumerate(rule.levels))):
        within = begun
        if own.segmenter and starts is not None:
            begun = begun | ((starts >> number) & 1 != 0)
        elif own.before:
            begun = begun | own.cuts(token, state["position"], state.get(_state_of(level), 0))
        offset = state[offset_of(level)]
        anew = begun & (offset != 0)  # a segment that begins here anyway begins once
        result[level] = state[level] + anew
        result[offset_of(level)] = xp.where(begun, 0, offset)
        if coarser:
            name = f"{level}_in_{coarser}"
            result[name] = xp.where(within, 0, state[name] + anew)
        coarser = level
    return result


def advance(state: Coordinates, token: Any, rule: Rule) -> Coordinates:
    """One token at a time: the coordinates of the token after `token`.

    Those of a token that itself begins a segment are only known with it: see `enter`.

    Args:
      state: the coordinates of `token` itself, from `start`, `enter` or `coordinates`.
      token: integers, an array of the shape of each coordinate.
      rule: where segments end.
    """
    result: Coordinates = {"position": state["position"] + 1}
    ended: Any = 0
    coarser = ""
    for level, own in reversed(rule.levels):
        before = state.get(_state_of(level), 0)
        outer = ended
        if not own.before:
            ended = ended | own.cuts(token, state["position"], before)
        result[level] = state[level] + ended
        result[offset_of(level)] = (state[offset_of(level)] + 1) * (1 - ended)
        if coarser:
            name = f"{level}_in_{coarser}"
            result[name] = (state[name] + ended) * (1 - outer)
        if own.machine.has_states:
            result[_state_of(level)] = own.machine.after(token, before)
        coarser = level
    return result


def statistics(segment: np.ndarray, offset: np.ndarray, blocks: int) -> dict[str, float]:
    """How long segments are, over a number of blocks that follow one another.

    Args:
      segment, offset: the coordinates of all tokens, of any shape. Each block begins with offset 0.
      blocks: the number of blocks.

    Returns:
      "segment_tokens_mean" and "segment_tokens_p99": the mean and the 99th percentile of the tokens of a
      segment. "segments_per_block": the mean. "segment_max": the largest number of a segment.
    """
    starts = np.flatnonzero(offset.ravel() == 0)
    lengths = np.diff(np.append(starts, offset.size))
    return {
        "segment_tokens_mean": float(lengths.mean()),
        "segment_tokens_p99": float(np.percentile(lengths, 99)),
        "segments_per_block": len(starts) / blocks,
        "segment_max": int(segment.max()),
    }
