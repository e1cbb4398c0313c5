"""Packing: every token once, in order, no document across blocks where that is asked for."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bipe_jax.data import packing


def rows_of(sizes) -> dict:
    """Documents of these sizes; all their tokens differ, so that they can be found again."""
    total = sum(sizes)
    return {
        "tokens": np.arange(1, total + 1, dtype=np.int32),
        "document_ids": np.repeat(np.arange(1, len(sizes) + 1), sizes).astype(np.int32),
        "position": np.concatenate([np.arange(n, dtype=np.int32) for n in sizes]),
    }


def runs(ids) -> list[tuple[int, list[int]]]:
    """[(id, places)] of each run of equal ids."""
    grouped = itertools.groupby(range(len(ids)), key=lambda i: ids[i])
    return [(number, list(places)) for number, places in grouped]


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(deadline=None)
@given(SIZES, st.integers(1, 17))
def test_concatenated_documents_are_a_plain_cut(sizes, length):
    rows = rows_of(sizes)
    for pad in (False, True):
        packed = packing.concat(rows, length, pad)
        count = -(-sum(sizes) // length) if pad else sum(sizes) // length
        assert packed["tokens"].shape == (count, length)
        flat = packed["tokens"].ravel().tolist()
        kept = min(count * length, sum(sizes))
        assert flat == list(range(1, kept + 1)) + [0] * (count * length - kept)
        for block, row in enumerate(packed["document_ids"]):
            cut = rows["document_ids"][block * length : (block + 1) * length]
            names = {number: i for i, (number, _) in enumerate(runs(cut.tolist()), 1)}
            assert row.tolist() == [names[n] for n in cut.tolist()] + [0] * (length - len(cut))


@settings(deadline=None)
@given(SIZES, st.integers(1, 17))
def test_no_packed_document_crosses_a_block(sizes, length):
    rows = rows_of(sizes)
    packed = packing.document(rows, length)
    assert sorted(packed["tokens"][packed["tokens"] > 0].tolist()) == rows["tokens"].tolist()
    owner = dict(zip(rows["tokens"].tolist(), rows["document_ids"].tolist(), strict=True))
    place = dict(zip(rows["tokens"].tolist(), rows["position"].tolist(), strict=True))
    pieces = {}
    for tokens, ids, position in zip(*packed.values(), strict=True):
        assert ((tokens == 0) == (ids == 0)).all()
        found = runs(ids.tolist())
        numbers = [number for number, _ in found if number]
        assert numbers == list(range(1, len(numbers) + 1))
        assert 0 not in [number for number, _ in found[:-1]]  # padding is at the end
        for number, places in found:
            if number == 0:
                continue
            piece = tokens[places].tolist()
            assert piece == list(range(piece[0], piece[0] + len(piece)))
            assert len({owner[t] for t in piece}) == 1
            assert position[places].tolist() == [place[t] for t in piece]
            pieces.setdefault(owner[piece[0]], []).append(len(piece))
    for number, size in enumerate(sizes, 1):  # cut only where a document is longer than a block
        rest = [size % length] if size % length else []
        assert sorted(pieces[number], reverse=True) == [length] * (size // length) + rest


@pytest.mark.parametrize("mean", [100, 400, 3000])
def test_packed_blocks_are_full(mean):
    """At least 97 % of windows of 1024 blocks, documents' lengths spread as wide as text's."""
    sizes = (
        np.random.default_rng(0).lognormal(np.log(mean), 1.2, 1024 * 1025 // mean).astype(int) + 1
    )
    packed = packing.document(rows_of(sizes.tolist()), 1025)
    assert (packed["tokens"] > 0).mean() > 0.97


def test_the_best_fit_is_taken():
    """7, then 6 and 5 open blocks with 3, 4 and 5 left: 4 goes to where 4 are left, not to 5."""
    packed = packing.document(rows_of([5, 4, 6, 7]), 10)
    assert packed["tokens"].tolist() == [
        list(range(16, 23)) + [0] * 3,
        list(range(10, 16)) + list(range(6, 10)),
        list(range(1, 6)) + [0] * 5,
    ]
