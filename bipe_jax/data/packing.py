"""Packing: pieces of tokens -> blocks of one length.

`rows` are arrays over the tokens of consecutive documents, by name: "tokens", "document_ids" and perhaps
coordinates. All are cut in the same way. The "document_ids" of a block count from 1; 0 is padding.
"""

import bisect

import numpy as np

from bipe_jax.errors import UserError


def concat(rows: dict, length: int, pad: bool = False) -> dict:
    """Concatenates the documents and cuts them into blocks (as in BiPE's paper).

    Args:
      rows: arrays (T,) by name.
      length: tokens of a block.
      pad: fills the last block; otherwise the tokens after the last whole block are dropped.

    Returns:
      Arrays (blocks, length) by the same names.
    """
    count = len(rows["tokens"])
    blocks = -(-count // length) if pad else count // length

    def cut(array):
        array = array[: blocks * length]
        if len(array) < blocks * length:
            array = np.pad(array, (0, blocks * length - len(array)))
        return array.reshape(blocks, length)

    return _numbered({name: cut(array) for name, array in rows.items()})


def document(rows: dict, length: int) -> dict:
    """Packs whole documents into blocks: best fit, decreasing.

    Documents longer than a block are cut into whole blocks and a rest, which is packed like the others.

    Args:
      rows, length: as `concat`.

    Returns:
      As `concat`.

    Raises:
      UserError: an example, which is not to be cut, is longer than a block.
    """
    starts, ends = _bounds(rows["document_ids"])
    if "learned" in rows or "sets" in rows:
        _check_sizes(ends - starts, length)
    # (block, offset in it, start of the piece, its tokens)
    pieces, rests, used = [], [], 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        whole = (end - start) // length
        for i in range(whole):
            pieces.append((used + i, 0, start + i * length, length))
        used += whole
        if rest := (end - start) - whole * length:
            rests.append((rest, end - rest))
    rests.sort(key=lambda piece: (-piece[0], piece[1]))
    room: list[
        tuple[int, int]
    ] = []  # (tokens left, block), sorted: the first that fits is the best
    for size, start in rests:
        at = bisect.bisect_left(room, (size, -1))
        if at < len(room):
            left, block = room.pop(at)
        else:
            left, block = length, used
            used += 1
        pieces.append((block, length - left, start, size))
        if left > size:
            bisect.insort(room, (left - size, block))

    packed = {name: np.zeros((used, length), array.dtype) for name, array in rows.items()}
    for name, array in rows.items():
        for block, offset, start, size in pieces:
            packed[name][block, offset : offset + size] = array[start : start + size]
    return _numbered(packed)


def row(rows: dict, length: int) -> dict:
    """Blocks of one document each, with padding after it.

    Documents longer than a block are cut into whole blocks and a rest.

    Args:
      rows, length: as `concat`.

    Returns:
      As `concat`.

    Raises:
      UserError: as `document`.
    """
    starts, ends = _bounds(rows["document_ids"])
    if "learned" in rows or "sets" in rows:
        _check_sizes(ends - starts, length)
    pieces = [np.arange(start, end, length) for start, end in zip(starts, ends, strict=True)]
    firsts = np.concatenate(pieces) if pieces else np.zeros(0, int)
    sizes = np.diff(np.append(firsts, len(rows["tokens"])))
    inside = np.arange(length) < sizes[:, None]
    packed = {name: np.zeros(inside.shape, array.dtype) for name, array in rows.items()}
    for name, array in rows.items():
        packed[name][inside] = array
    return _numbered(packed)


def _check_sizes(sizes: np.ndarray, length: int) -> None:
    if sizes.max(initial=0) > length:
        raise UserError(
            f"data: an example has {sizes.max():,} tokens, more than sequence_length + 1 = {length:,}, and "
            "examples are not cut: make sequence_length longer, or leave it out"
        )


def _bounds(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the documents of these ids start, and where they end."""
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1)) if len(ids) else np.zeros(0, int)
    return starts, np.append(starts[1:], len(ids)).astype(int)


def _numbered(blocks: dict) -> dict:
    """Renumbers the document ids of each block as 1, 2, and so on."""
    ids = blocks["document_ids"]
    changes = np.zeros(ids.shape, np.int32)
    np.not_equal(ids[:, 1:], ids[:, :-1], out=changes[:, 1:], casting="unsafe")
    numbers = np.cumsum(changes, axis=1, dtype=np.int32) + 1
    return blocks | {"document_ids": np.where(ids == 0, 0, numbers)}
