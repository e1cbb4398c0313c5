# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Segments: which tokens end one, and the coordinates of every token.

A *separator* is a token that ends a segment and belongs to it. With tokens t_0 … t_{L-1}, as in the
authors' code of BiPE (He et al., 2024, section 3):

    segment_i = number of separators strictly before i
    offset_i  = i - index of the first token of i's segment

Offsets are not clipped here: a table of finite size clips them itself (`positions.absolute`).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax.config import Config
from bipe_jax.errors import UserError

_POSITION, _OF_SEGMENT = "position", ("segment", "offset")

_NEWLINE = re.compile(r"\n")
# Full stops, exclamation and question marks, perhaps inside closing quotes or brackets.
_SENTENCE_END = re.compile(r"\n|[.!?…。！？]+[\"'”’»)\]]*\s*$")

_PIECE_RULES: dict[str, Callable[[str], Any]] = {
    "sentence": lambda piece: _SENTENCE_END.search(piece),
    "newline": lambda piece: _NEWLINE.search(piece),
    # What the authors' code does with Llama's tokenizer (ids 13 and 869).
    "newline-and-spaced-period": lambda piece: _NEWLINE.search(piece) or piece == " .",
}
_FIXED = re.compile(r"fixed:([1-9][0-9]*)")
RULES = (*_PIECE_RULES, "fixed:N")


Coordinates = dict[str, Any]  # name -> integers, arrays of NumPy or JAX


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where segments end: after each separator id or, if `length` > 0, every `length` tokens."""

    separators: tuple[int, ...] = ()
    length: int = 0

    def ends(self, tokens: Any, position: Any) -> Any:
        """Whether each token ends its segment: a boolean array shaped like `tokens`."""
        if self.length:
            return position % self.length == self.length - 1
        xp = jnp if isinstance(tokens, jax.Array) else np
        return xp.take(xp.asarray(self._table), tokens, mode="clip")

    @functools.cached_property
    def _table(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """True for each separator id, False for the others and for any larger id (by clipping)."""
        table = np.zeros(max(self.separators, default=0) + 2, bool)
        table[list(self.separators)] = True
        return table


def check_rule(name: str) -> None:
    """Raises UserError unless `name` is one of RULES."""
    if name not in _PIECE_RULES and not _FIXED.fullmatch(name):
        raise UserError(f"segments.rule={name!r} is unknown: use one of {', '.join(RULES)}")


def resolve(name: str, pieces: Sequence[str]) -> Rule:
    """Turns a rule's name into a Rule for one tokenizer.

    Args:
      name: one of RULES, such as "sentence" or "fixed:16".
      pieces: the text that each token id stands for, with plain spaces; "" for control tokens.

    Raises:
      UserError: the rule is unknown, or the tokenizer has no piece that it would split at.
    """
    if rule := rule_without_tokenizer(name):
        return rule
    is_separator = _PIECE_RULES[name]
    separators = tuple(i for i, piece in enumerate(pieces) if is_separator(piece))
    if not separators:
        raise UserError(
            f"segments.rule={name!r} finds no separator among the tokenizer's {len(pieces)} pieces "
            "(no newline or sentence end): use another tokenizer or segments.rule='fixed:N'"
        )
    return Rule(separators=separators)


def rule_without_tokenizer(name: str) -> Rule | None:
    """The Rule of a name that needs no tokenizer, such as "fixed:16"; None for the others.

    Raises:
      UserError: the rule is unknown.
    """
    check_rule(name)
    fixed = _FIXED.fullmatch(name)
    return Rule(length=int(fixed[1])) if fixed else None


def coordinate_names(config: Config) -> tuple[str, ...]:
    """The coordinates that each token has under a config."""
    return _POSITION, *_OF_SEGMENT


def coordinates(
    tokens: Any, rule: Rule, document_ids: Any = None, start: Coordinates | None = None
) -> Coordinates:
    """The coordinates of every token of whole blocks.

    Args:
      tokens: (..., L) integers, a NumPy or a JAX array; the result is of the same kind.
      rule: where segments end.
      document_ids: (..., L) integers that change where a new document begins. If given, all
        three coordinates restart there; if not, they run through the block.
      start: the coordinates (integers) of each row's first token, if they are not 0: the row begins
        within a document. For NumPy arrays only.

    Returns:
      {"position", "segment", "offset"}: (..., L) int32 arrays.
    """
    if isinstance(tokens, jax.Array):
        return _dense(tokens, rule, document_ids)
    return _sparse(tokens, rule, document_ids, start)


def _dense(tokens: jax.Array, rule: Rule, document_ids: Any) -> Coordinates:
    """With JAX: every step is an array operation of static shape."""

    def since(starts: Any) -> Any:
        """The distance from the last place where `starts` is true."""
        return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=tokens.ndim - 1)

    index = jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)
    documents = index == 0
    if document_ids is not None:
        documents = documents.at[..., 1:].set(document_ids[..., 1:] != document_ids[..., :-1])
    position = since(documents)
    ends = rule.ends(tokens, position)
    starts = documents.at[..., 1:].set(documents[..., 1:] | ends[..., :-1])
    count = jnp.cumsum(starts, axis=-1, dtype=jnp.int32)
    before = jax.lax.cummax(jnp.where(documents, count, 0), axis=tokens.ndim - 1)
    return {"position": position, "segment": count - before, "offset": since(starts)}


def _sparse(tokens: Any, rule: Rule, document_ids: Any, start: Coordinates | None) -> Coordinates:
    """With NumPy: segments start at few places, so that work on those alone costs a third."""
    shape, size = tokens.shape, tokens.size

    def since(starts: Any) -> Any:
        """The distance from the last place where `starts` is true, as it is where a row begins."""
        places = np.flatnonzero(starts)
        steps = np.ones(size, np.int32)
        steps[0] = 0
        steps[places[1:]] = 1 - np.diff(places)
        return np.cumsum(steps, dtype=np.int32).reshape(shape)

    documents = np.zeros(shape, bool)
    documents[..., 0] = True
    position = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    if document_ids is not None:
        documents[..., 1:] = document_ids[..., 1:] != document_ids[..., :-1]
        position = since(documents)
    if start:
        first_document = np.cumsum(documents, axis=-1) == 1
        position = position + first_document * np.int32(start["position"])
    after_separator = np.zeros(shape, bool)
    after_separator[..., 1:] = rule.ends(tokens, position)[..., :-1]
    segment = np.cumsum(after_separator, axis=-1, dtype=np.int32)
    if document_ids is not None:
        places = np.flatnonzero(documents)
        segment -= np.repeat(segment.ravel()[places], np.diff(places, append=size)).reshape(shape)
    starts = after_separator | documents
    offset = since(starts)
    if start:
        first_document = np.cumsum(documents, axis=-1) == 1
        segment += first_document * np.int32(start["segment"])
        offset += (np.cumsum(starts, axis=-1) == 1) * np.int32(start["offset"])
    return {"position": position, "segment": segment, "offset": offset}


def start(shape: tuple[int, ...] = ()) -> Coordinates:
    """The coordinates of the first token of a document: what `advance` begins from."""
    return {name: jnp.zeros(shape, jnp.int32) for name in (_POSITION, *_OF_SEGMENT)}


def advance(state: Coordinates, token: Any, rule: Rule) -> Coordinates:
    """One token at a time: the coordinates of the token after `token`.

    Args:
      state: the coordinates of `token` itself, from `start` or an earlier `advance`.
      token: integers, an array of the shape of each coordinate.
      rule: where segments end.
    """
    ends = rule.ends(token, state["position"])
    return {
        "position": state["position"] + 1,
        "segment": state["segment"] + ends,
        "offset": (state["offset"] + 1) * (1 - ends),
    }


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
