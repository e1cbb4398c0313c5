"""Documents as tokens, with the segments that segmenters find in them, and with what is learned of examples.

A token's mark is an integer: bit k says whether a segment of level k begins with the token.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bipe_jax.data import examples
from bipe_jax.data.tokenizer import Tokenizer, parts
from bipe_jax.segments import Rule, segmenters


class Part(NamedTuple):
    """A part of a document.

    Attributes:
      text: of the part. first: whether the document begins with it.
      begins: for each level the offsets of characters of the part at which segments begin; () without
        segmenters.
      example: the document, if it is an example. learned: whether the part is. last: whether EOS follows.
      kept: the most tokens that are kept of it, and the characters at its end that are among them; None: all.
    """

    text: str
    first: bool
    begins: tuple[tuple[int, ...], ...] = ()
    example: dict | None = None
    learned: bool = True
    last: bool = False
    kept: tuple[int, int] | None = None


def parts_of(document: dict, names: Sequence[str]) -> Iterator[Part]:
    """The parts of a document, see `tokenizer.parts` and `examples.pieces_of`.

    Args:
      document: {"text", ...}. names: of the segmenters of the levels, see `segments.segmenters_of`.

    Raises:
      UserError: as `segmenters.begins`.
    """
    begins = [np.asarray(at, np.int64) for at in _begins(document, names)]
    whole = document["text"]
    example = document if examples.is_example(document) else None
    pieces = examples.pieces_of(document) if example else [(0, len(whole), True)]
    for start, end, learned in pieces:
        kept = examples.kept_of(document, learned)
        for text in [whole[start:end]] if kept else parts(whole[start:end]):
            bounds = start, start + len(text)
            own = (at[slice(*np.searchsorted(at, bounds))] - start for at in begins)
            marks = tuple(tuple(at.tolist()) for at in own)
            last = bool(example) and bounds[1] == len(whole) and learned
            yield Part(text, start == 0, marks, example, learned, last, kept)
            start += len(text)


def _begins(document: dict, names: Sequence[str]) -> list[Sequence[int]]:
    """For each level the offsets of a document's characters at which segments begin."""
    return [segmenters.begins(name, document) if name else () for name in names]


def encode(tokenizer: Tokenizer, some: Sequence[Part]) -> list[dict]:
    """The tokens of parts: {"tokens": (L,) int32} each, with segmenters also "starts": (L,) int32.

    Those of examples have "learned" too, (L,) int32, 1 where a token is; or "sets" and "among", see
    `examples.sets_of`.

    Raises:
      UserError: the tokenizer does not fit the text, see `Tokenizer.encode_parts` and `examples.sets_of`.
    """
    encoded = tokenizer.encode_parts([part.text for part in some], [part.first for part in some])
    rows = []
    for part, tokens in zip(some, encoded, strict=True):
        row = {"tokens": tokens}
        if part.begins:
            row["starts"] = _starts(part, tokenizer.text_bytes(part.text, tokens))
        if part.kept and len(tokens) > part.kept[0]:
            chosen = _kept(part.kept, part.text, tokenizer, tokens)
            row = {name: array[chosen] for name, array in row.items()}
        if part.example:
            row |= _of_example(part.example, part, tokenizer, row)
        rows.append(row)
    return rows


def encode_whole(
    tokenizer: Tokenizer, document: dict, names: Sequence[str]
) -> tuple[dict, np.ndarray]:
    """The tokens of a document, as from `encode`, and the bytes of the text that each stands for, (L,)."""
    rows, sizes = [], []
    for part in parts_of(document, names):
        rows += encode(tokenizer, [part])
        own = rows[-1]["tokens"][: len(rows[-1]["tokens"]) - part.last]
        of_part = (
            tokenizer.byte_lengths()[own] if part.kept else tokenizer.text_bytes(part.text, own)
        )
        of_part = np.pad(of_part, (0, part.last))  # EOS stands for no text
        # Most are small: a quarter of the memory.
        sizes.append(of_part.astype(np.min_scalar_type(int(of_part.max(initial=0)))))
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    return joined, np.concatenate(sizes)


def _kept(kept: tuple[int, int], text: str, tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """The indices of the tokens that are kept of a part with more: the first ones, and those of its end."""
    most, characters = kept
    size = len(text[len(text) - characters :].encode())
    ends = np.cumsum(tokenizer.text_bytes(text, tokens)[::-1])
    last = min(int(np.searchsorted(ends, size)) + 1, most) if size else 0
    return np.concatenate([np.arange(most - last), np.arange(len(tokens) - last, len(tokens))])


def starts_of(tokenizer: Tokenizer, text: str, names: Sequence[str]) -> np.ndarray | None:
    """The marks of a text's tokens, as `Tokenizer.encode` gives them: (L,) int32; None without segmenters."""
    if not names:
        return None
    part = Part(text, True, tuple(map(tuple, _begins({"text": text}, names))))
    return _starts(part, tokenizer.text_bytes(text, tokenizer.encode(text)))


def _of_example(
    example: dict, part: Part, tokenizer: Tokenizer, row: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What a part of an example has, with EOS where it follows."""
    if "sets" in example:
        return examples.sets_of(example, tokenizer, row["tokens"])
    row = row | {"learned": np.full(len(row["tokens"]), part.learned, np.int32)}
    if not part.last:
        return row
    after = {"tokens": tokenizer.end_id, "learned": 1, "starts": 0}
    return {name: np.append(array, np.int32(after[name])) for name, array in row.items()}


def for_rule(starts: np.ndarray | None, names: Sequence[str], rule: Rule) -> np.ndarray | None:
    """Marks by the numbers of these segmenters as marks by the numbers of a rule's levels."""
    if starts is None:
        return None
    marks = np.zeros_like(starts)
    for level, (_, own) in enumerate(rule.levels):
        if own.segmenter:
            marks |= ((starts >> names.index(own.segmenter)) & 1) << level
    return marks


def _starts(part: Part, sizes: np.ndarray) -> np.ndarray:
    """The marks of tokens of so many bytes each. The token with a segment's first character is its first."""
    if not len(sizes):
        return np.zeros(0, np.int32)
    firsts = np.cumsum(sizes) - sizes
    characters = np.frombuffer(part.text.encode(), np.uint8) & 0xC0 != 0x80
    byte_of = np.flatnonzero(characters)
    marks = np.zeros(len(sizes), np.int32)
    for level, begins in enumerate(part.begins):
        at = byte_of[list(begins)] if begins else np.zeros(0, int)
        marks[np.maximum(np.searchsorted(firsts, at, side="right") - 1, 0)] |= 1 << level
    return marks
