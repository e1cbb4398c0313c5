"""Targets of an evaluation: independent of lengths and of the order of the data, tokenised in part."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from bipe_jax.errors import UserError
from bipe_jax.evaluation import documents, protocols, targets
from bipe_jax.evaluation.documents import Reader

CONTEXT = 32


def raw(count: int, seed: int = 0, most: int = 400) -> list[dict]:
    """Documents whose tokens are the bytes of their text."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(5, most, count)
    texts = ["".join(chr(c) for c in generator.integers(97, 123, size)) for size in sizes]
    return [{"set": "ab"[i % 2], "text": text} for i, text in enumerate(texts)]


class Bytes:
    """A reader of documents in memory, and the texts that it has encoded."""

    def __init__(self, some: list[dict]):
        self.encoded: list[str] = []

        def encode(document):
            self.encoded.append(document["text"])
            tokens = np.frombuffer(document["text"].encode(), np.uint8).astype(np.int32)
            return {"tokens": tokens, "bytes": np.ones_like(tokens, np.uint8)}

        self.reader = Reader(lambda: iter(some), encode)


def chosen(some, tokens, lengths=(8, 32), context=CONTEXT, name="same-tokens"):
    protocol = protocols.protocol(name, lengths, context)
    return documents.read(Bytes(some).reader, protocol, context, tokens)


def scored(of_sets) -> dict:
    """(set, text) -> the places of its targets."""
    return {
        (of_set.set, bytes(d.tokens.astype(np.uint8)).decode()): sorted(
            t for f in d.stretches for t in range(f + 1, f + 1 + of_set.size)
        )
        for of_set in of_sets
        for d in of_set.documents
    }


@pytest.mark.parametrize("name", ["same-tokens", "non-overlapping", "sliding:4"])
def test_targets_depend_on_the_context_and_not_on_lengths_or_order(name):
    some = raw(60)
    first = chosen(some, 100, (8, 32), name=name)
    for other in (chosen(some, 100, (5,), name=name), chosen(some[::-1], 100, (8, 16), name=name)):
        assert scored(other) == scored(first)
        identities = {of_set.set: of_set.identity for of_set in other}
        assert identities == {of_set.set: of_set.identity for of_set in first}
    moved = chosen(some, 100, (8, 32), context=48, name=name)
    assert {s.identity for s in moved}.isdisjoint(s.identity for s in first)


def test_each_document_gives_some_targets_until_there_are_enough():
    some = raw(600)
    for tokens, most in ((100, 1), (2 * 64 * 5, 5), (2 * 4000, 8)):
        for of_set in chosen(some, tokens):
            counts = [len(d.stretches) for d in of_set.documents]
            assert of_set.size == 2 and sum(counts) * 2 == tokens - tokens % 2
            long = sorted(
                targets.digest(d["text"].encode())
                for d in some
                if d["set"] == of_set.set and len(d["text"]) > CONTEXT
            )
            assert [d.identity for d in of_set.documents] == long[: len(counts)]
            if sum(counts) < 8 * len(long):
                assert max(counts) <= most
            assert of_set.documents_of_set == 300


def test_few_documents_give_more_and_all_of_them_everything():
    some = raw(4, most=2000)
    by_budget = {tokens: scored(chosen(some, tokens)) for tokens in (200, 0)}
    for name in "ab":
        count = sum(len(places) for (s, _), places in by_budget[200].items() if s == name)
        assert count == 200
    for (_, text), places in by_budget[0].items():
        whole = range(CONTEXT - 2 + 1, len(text))
        assert places == list(whole[: len(whole) // 2 * 2])
    assert by_budget[0].keys() == {(d["set"], d["text"]) for d in some if len(d["text"]) > CONTEXT}


def test_targets_are_evenly_spaced():
    assert targets.spread(range(10, 110, 10), 4) == (10, 40, 70, 100)
    assert targets.spread(range(10, 110, 10), 1) == (10,)
    assert targets.shares([3, 100, 1, 100], 150) == [3, 73, 1, 73]
    assert targets.shares([3, 100, 1, 100], None) == [3, 100, 1, 100]
    for counts, budget in itertools.product([[5] * 100, [1, 9, 80]], [1, 7, 64, 90]):
        given = targets.shares(counts, budget)
        assert sum(given) == budget and all(g <= c for g, c in zip(given, counts, strict=True))


def test_only_what_is_scored_is_tokenised_and_twice_the_same_text_once():
    some = raw(400)
    reading = Bytes([*some, *some[:50]])
    protocol = protocols.protocol("same-tokens", (8,), CONTEXT)
    of_sets = documents.read(reading.reader, protocol, CONTEXT, 60)
    assert len(reading.encoded) == len(set(reading.encoded)) <= 4 * len(scored(of_sets))
    assert scored(of_sets) == scored(chosen(some, 60))
    assert [s.collection for s in of_sets] == [s.collection for s in chosen(some, 60)]
    assert [s.collection for s in of_sets] != [s.collection for s in chosen(some[:-2], 60)]


def test_what_is_stored_of_the_targets():
    (of_set, _) = chosen(raw(40), 50)
    stored = json.loads(json.dumps(of_set.to_json()))
    assert stored["documents"] == sorted(stored["documents"]) and len(stored["targets"]) == 16
    assert stored["tokens"] == stored["bytes"] == [2 * len(d.stretches) for d in of_set.documents]
    first = dataclasses.replace(
        of_set.documents[0], stretches=(of_set.documents[0].stretches[0] + 1,)
    )
    other = dataclasses.replace(of_set, documents=(first, *of_set.documents[1:]))
    assert other.identity != of_set.identity


def test_targets_survive_the_way_to_other_processes():
    of_sets = chosen(raw(40), 50)
    with_starts = dataclasses.replace(
        of_sets[0].documents[0], starts=np.arange(3, dtype=np.int32), bytes=np.array([0.5, 2.25])
    )
    of_sets[0] = dataclasses.replace(of_sets[0], documents=(with_starts, *of_sets[0].documents[1:]))
    back = targets.from_bytes(targets.to_bytes(of_sets))
    assert repr(back) == repr(of_sets)
    assert back[0].documents[0].bytes.tolist() == [0.5, 2.25]


def test_documents_that_are_too_short_are_told():
    protocol = protocols.protocol("same-tokens", (8,), 1000)
    with pytest.raises(
        UserError, match=r"no document has 1,001 tokens: choose a smaller --context"
    ):
        documents.read(Bytes(raw(20)).reader, protocol, 1000, 10)
    with pytest.raises(UserError, match=r"no document has 1,001 tokens"):
        documents.check(Bytes(raw(20)).reader, 1000)
    documents.check(Bytes(raw(20)).reader, 100)


def test_a_length_above_the_context_is_refused():
    with pytest.raises(UserError, match=r"--lengths: 64 tokens are more than the context of 32"):
        protocols.protocol("same-tokens", (8, 64), 32)
