"""Blocks of a survey to look at: which are chosen, and how they look on a terminal."""

import dataclasses
import itertools

import numpy as np

from bipe_jax import segments
from bipe_jax.data import packing
from bipe_jax.data.survey import Statistics
from bipe_jax.report.text import visible

_MARK_EVERY = 16  # tokens of a segment
_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclasses.dataclass(frozen=True)
class Block:
    """Some tokens in a row, without padding, for the eye.

    Attributes:
      texts: of each token; a character of several tokens is with its first.
      position, segment, offset, ends, document_ids: (L,) arrays; `ends` says which are separators.
    """

    texts: list[str]
    position: np.ndarray
    segment: np.ndarray
    offset: np.ndarray
    ends: np.ndarray
    document_ids: np.ndarray


def samples(statistics: Statistics, rule, tokenizer, *, length: int, count: int, kind="concat"):
    """Blocks of a set, spread over what was kept of it: list[Block], the same for every rule.

    One of them holds a border between documents, if there is such a block.
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
        _block(packed["tokens"][i], ids[i], rule, tokenizer, pieces, sizes)
        for i in sorted(list(chosen)[:count])
    ]


def _block(tokens, ids, rule, tokenizer, pieces, sizes) -> Block:
    tokens, ids = tokens[ids > 0], ids[ids > 0]
    texts = [pieces[token] for token in tokens]
    lone = [not text and sizes[token] for text, token in zip(texts, tokens, strict=True)]
    for is_lone, run in itertools.groupby(range(len(tokens)), key=lambda i: bool(lone[i])):
        places = list(run)
        if is_lone:  # bytes make characters together
            texts[places[0]] = tokenizer.decode(tokens[places])
    for i, token in enumerate(tokens.tolist()):
        if not texts[i] and not lone[i]:
            texts[i] = "⟨BOS⟩" if token == tokenizer.bos_id else f"⟨{token}⟩"
    found = segments.coordinates(tokens, rule)
    return Block(texts, **found, ends=rule.ends(tokens, found["position"]), document_ids=ids)


def text_of(block: Block, colour: bool) -> str:
    """A block for the terminal.

    Segments begin with ⟦segment⟧ and, every 16 tokens, have the ₁₆offset; separators are underlined
    or, without colour, in ⟨⟩.
    """

    def styled(text: str, *codes: int) -> str:
        return f"\033[{';'.join(map(str, codes))}m{text}\033[0m" if colour else text

    parts = []
    for i, text in enumerate(block.texts):
        segment, offset = int(block.segment[i]), int(block.offset[i])
        if i and block.document_ids[i] != block.document_ids[i - 1]:
            number = block.document_ids[i]
            parts.append(styled(f"\n──────── document {number} of the block ────────\n", 1))
        if offset == 0:
            parts.append(styled(f"⟦{segment}⟧", 2))
        elif offset % _MARK_EVERY == 0:
            parts.append(styled(str(offset).translate(_SUBSCRIPT), 2))
        shown = visible(text)
        if block.ends[i]:
            # The mark of a line's end is in the brackets, and the end itself behind them.
            marked = shown.rstrip("\n")
            end = shown[len(marked) :]
            shown = (styled(marked, 4, 1, 36 - segment % 2) if colour else f"⟨{marked}⟩") + end
        else:
            shown = styled(shown, 36 - segment % 2)
        parts.append(shown)
    return "".join(parts)
