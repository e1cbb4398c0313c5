"""Sample blocks of a survey: their selection, and their text for a terminal."""

import dataclasses
import itertools

import numpy as np

from bipe_jax import segments
from bipe_jax.data import packing
from bipe_jax.data.survey import Statistics
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.report.text import visible

_MARK_EVERY = 16  # tokens of a segment
_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclasses.dataclass(frozen=True)
class Block:
    """The tokens of a block, without padding, to be shown.

    Attributes:
      texts: text of each token; a character of several tokens is in its first.
      segment, offset, ends, document_ids: (L,) arrays; `ends` is True for tokens that end a segment.
      coarser: (name, numbers (L,)) of each coarser level.
    """

    texts: list[str]
    segment: np.ndarray
    offset: np.ndarray
    ends: np.ndarray
    document_ids: np.ndarray
    coarser: list[tuple[str, np.ndarray]]


def samples(
    statistics: Statistics,
    rule: segments.Rule,
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int,
    kind: str = "concat",
) -> list[Block]:
    """Evenly spaced blocks of a set's rows, the same for every rule.

    One of them contains a border between documents, if any block does.
    """
    rows = statistics.rows
    if rows["tokens"].ndim == 1:
        packed = getattr(packing, kind)(rows, length, **({"pad": True} if kind == "concat" else {}))
    else:
        packed = {name: array[:, :length] for name, array in rows.items()}
    ids = packed["document_ids"]
    if not len(ids):
        return []
    borders = np.flatnonzero(ids.max(axis=1) > ids[:, 0])
    spread = (np.arange(count) * 2 + 1) * len(ids) // (2 * max(count, 1))
    chosen = dict.fromkeys([*borders[: count > 0].tolist(), *spread.tolist()])
    pieces, sizes = tokenizer.pieces(), tokenizer.byte_lengths()
    return [
        _block(statistics, {n: x[i] for n, x in packed.items()}, rule, tokenizer, pieces, sizes)
        for i in sorted(list(chosen)[:count])
    ]


def _block(statistics, row: dict, rule, tokenizer, pieces, sizes) -> Block:
    """A block from a row: arrays (L,) by name; `pieces`, `sizes`: of the vocabulary."""
    row = {name: array[row["document_ids"] > 0] for name, array in row.items()}
    tokens, ids = row["tokens"], row["document_ids"]
    texts = [pieces[token] for token in tokens]
    is_byte = [not text and sizes[token] > 0 for text, token in zip(texts, tokens, strict=True)]
    for of_bytes, run in itertools.groupby(range(len(tokens)), key=lambda i: is_byte[i]):
        indices = list(run)
        if of_bytes:  # several bytes encode one character
            texts[indices[0]] = tokenizer.decode(tokens[indices])
    for i, token in enumerate(tokens.tolist()):
        if not texts[i] and not is_byte[i]:
            texts[i] = "⟨BOS⟩" if token == tokenizer.bos_id else f"⟨{token}⟩"
    coordinates = statistics.coordinates(row, rule, states=True)
    segment, offset = coordinates["segment"], coordinates["offset"]
    of_last = {name: array[-1] for name, array in coordinates.items()}
    after = segments.advance(of_last, tokens[-1], rule)
    ends = np.append(offset[1:], after["offset"]) == 0
    coarser = [(name, coordinates[name]) for name, _ in rule.coarser]
    return Block(texts, segment, offset, ends, ids, coarser)


def text_of(block: Block, colour: bool) -> str:
    """The text of a block for a terminal.

    ⟦n⟧ marks the start of segment n, ⟦name n⟧ that of a coarser level's, and a subscript the offset of every
    16th token. Tokens that end a segment are underlined or, without colour, in ⟨⟩.
    """

    def styled(text: str, *codes: int) -> str:
        return f"\033[{';'.join(map(str, codes))}m{text}\033[0m" if colour else text

    parts = []
    for i, text in enumerate(block.texts):
        segment, offset = int(block.segment[i]), int(block.offset[i])
        if i and block.document_ids[i] != block.document_ids[i - 1]:
            number = block.document_ids[i]
            parts.append(styled(f"\n──────── document {number} of the block ────────\n", 1))
        for name, numbers in reversed(block.coarser):
            if not i or numbers[i] != numbers[i - 1]:
                parts.append(styled(f"⟦{name} {numbers[i]}⟧", 2))
        if offset == 0:
            parts.append(styled(f"⟦{segment}⟧", 2))
        elif offset % _MARK_EVERY == 0:
            parts.append(styled(str(offset).translate(_SUBSCRIPT), 2))
        shown = visible(text)
        if block.ends[i]:
            # The brackets contain the mark of a line's end, and the end itself follows them.
            marked = shown.rstrip("\n")
            end = shown[len(marked) :]
            shown = (styled(marked, 4, 1, 36 - segment % 2) if colour else f"⟨{marked}⟩") + end
        else:
            shown = styled(shown, 36 - segment % 2)
        parts.append(shown)
    return "".join(parts)
