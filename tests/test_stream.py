"""The training stream: equal to a plain loop over the documents, and restored exactly."""

import collections
import contextlib
import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from tiny import tiny

from bipe_jax import segments, tokenizer
from bipe_jax.config import validate
from bipe_jax.data import sources
from bipe_jax.data.stream import annotate, blocks, restore, stream
from bipe_jax.errors import UserError

LENGTH = 16  # of tiny's blocks, which have one token more
WINDOW = 8  # blocks that are shuffled, four batches of two rows


@pytest.fixture(scope="module")
def tokens(tokenizer_file):
    return tokenizer.load(tokenizer_file)


@pytest.fixture(scope="module")
def documents(texts):
    """Of very different lengths: less than a block, exactly whole blocks, many blocks."""
    sizes = [1, 300, 7, 2, 900, 40, 41, 3, 120, 60, 5, 77]
    return [text[1000 : 1000 + size] for text, size in zip(texts, sizes, strict=False)]


def write_shards(directory, shards) -> str:
    for number, texts in enumerate(shards):
        with open(directory / f"{number:02}.jsonl", "w") as file:
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
    return f"{directory}/*.jsonl"


def make_config(tokens, spec, **overrides):
    rule = segments.resolve("sentence", tokens.pieces())
    config = tiny(
        data__train=spec,
        batch_size=2,
        sequence_length=LENGTH,
        data__shuffle_blocks=1,  # Grain takes 40 ms for a small window
        model__vocab_size=tokens.vocab_size,
        segments__separators=rule.separators,
    )
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    validate(config)
    return config


def take(dataset, count) -> list:
    with contextlib.closing(iter(dataset)) as iterator:
        return list(itertools.islice(iterator, count))


def assert_equal(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def plain_blocks(tokens, documents, count):
    """The first blocks of the documents, over and over: [(tokens, document numbers)]."""
    ids, numbers = [], []
    for number, text in enumerate(itertools.cycle(documents)):
        for token in tokens.encode(text):
            ids.append(int(token))
            numbers.append(number)
        if len(ids) >= count * (LENGTH + 1):
            break
    cut = [slice(i * (LENGTH + 1), (i + 1) * (LENGTH + 1)) for i in range(count)]
    return [(ids[c], numbers[c]) for c in cut]


def plain_annotation(ids, numbers, separators, separate):
    """What the model sees of one block, one token after the other."""
    seen = {name: [] for name in ("tokens", "targets", "position", "segment", "offset", "weights")}
    for i in range(len(ids) - 1):
        if i == 0 or (separate and numbers[i] != numbers[i - 1]):
            position = segment = offset = 0
        else:
            position += 1
            ended = ids[i - 1] in separators
            segment, offset = (segment + 1, 0) if ended else (segment, offset + 1)
        seen["tokens"].append(ids[i])
        seen["targets"].append(ids[i + 1])
        seen["position"].append(position)
        seen["segment"].append(segment)
        seen["offset"].append(offset)
        seen["weights"].append(0.0 if separate and numbers[i + 1] != numbers[i] else 1.0)
    return seen


def as_rows(batches) -> list[dict]:
    return [{k: v[i].tolist() for k, v in b.items()} for b in batches for i in range(2)]


@pytest.fixture
def one_shard(tmp_path, documents):
    return write_shards(tmp_path, [documents])


@pytest.mark.parametrize("separate", [False, True])
def test_batches_equal_a_plain_loop(tokens, documents, one_shard, separate):
    """Without shuffling, more than three times through one shard."""
    count = 3 * sum(len(tokens.encode(text)) for text in documents) // (LENGTH + 1) // 2 * 2 + 20
    config = make_config(tokens, one_shard, data__separate_documents=separate)
    batches = take(stream(config, tokens), count // 2)
    expected = plain_blocks(tokens, documents, count)
    assert any(len(set(numbers)) > 2 for _, numbers in expected)  # several documents in a block
    for row, (ids, numbers) in zip(as_rows(batches), expected, strict=True):
        found_documents = row.pop("document_ids", None)
        assert row == plain_annotation(ids, numbers, config.segments.separators, separate)
        if separate:
            same = [a == b for a, b in itertools.pairwise(numbers[:-1])]
            assert [a == b for a, b in itertools.pairwise(found_documents)] == same
        else:
            assert found_documents is None
    assert {k: (v.dtype, v.shape) for k, v in batches[0].items() if k != "document_ids"} == {
        name: (np.float32 if name == "weights" else np.int32, (2, LENGTH))
        for name in ("tokens", "targets", "position", "segment", "offset", "weights")
    }


def test_a_fixed_rule_is_annotated_by_position(tokens, one_shard):
    config = make_config(tokens, one_shard, segments__rule="fixed:5")
    (batch,) = take(stream(config, tokens), 1)
    for row in as_rows([batch]):
        assert row["segment"] == [i // 5 for i in range(LENGTH)]
        assert row["offset"] == [i % 5 for i in range(LENGTH)]


def test_a_document_that_starts_at_a_block_is_told_apart_from_the_one_before(tokens):
    """Documents 1 | 2 2 | 3: the first target of each has no weight, and coordinates restart."""
    rule = segments.Rule(separators=(9,))
    ids = np.array([[4, 9, 5, 6, 9, 7, 8]], np.int32)
    block = annotate(ids, rule, np.array([[1, 1, 2, 2, 2, 3, 3]], np.int32))
    assert {name: value.tolist()[0] for name, value in block.items()} == {
        "tokens": [4, 9, 5, 6, 9, 7],
        "targets": [9, 5, 6, 9, 7, 8],
        "document_ids": [1, 1, 2, 2, 2, 3],
        "position": [0, 1, 0, 1, 2, 0],
        "segment": [0, 0, 0, 0, 0, 0],
        "offset": [0, 1, 0, 1, 2, 0],
        "weights": [1, 0, 1, 1, 0, 1],
    }


def test_blocks_are_shuffled_within_windows(tokens, documents, one_shard):
    config = make_config(tokens, one_shard, data__shuffle_blocks=WINDOW)
    found = take(blocks(config, tokens), 10 * WINDOW)
    assert all(block["tokens"].shape == (LENGTH + 1,) for block in found)
    found = [block["tokens"].tolist() for block in found]
    expected = [ids for ids, _ in plain_blocks(tokens, documents, 10 * WINDOW)]
    orders = set()
    for start in range(0, len(found), WINDOW):
        window, plain = found[start : start + WINDOW], expected[start : start + WINDOW]
        assert sorted(window) == sorted(plain)
        orders.add(tuple(plain.index(block) for block in window))
    assert len(orders) > 5  # each window has an order of its own


def split_documents(tokens, found) -> list[str]:
    """The texts in blocks that follow each other, the last and perhaps cut one left out."""
    ids = np.concatenate([block["tokens"] for block in found])
    assert ids[0] == tokens.bos_id
    return [tokens.decode(part) for part in np.split(ids, np.flatnonzero(ids == tokens.bos_id))][
        1:-1
    ]


def test_documents_of_many_shards_are_drawn_in_turn_and_equally_often(tokens, tmp_path):
    """Ten shards of two documents, eight open at a time: after 80 documents each came four times."""
    shards = [[f"shard {s} document {d}" for d in range(2)] for s in range(10)]
    config = make_config(tokens, write_shards(tmp_path, shards))
    length = sum(len(tokens.encode(text)) for shard in shards for text in shard)
    found = take(blocks(config, tokens), 4 * length // (LENGTH + 1) + 3)
    texts = split_documents(tokens, found)[:80]
    assert collections.Counter(texts) == {text: 4 for shard in shards for text in shard}
    drawn = [text.split()[1] for text in texts[:8]]
    assert len(set(drawn)) == 8
    assert texts[:8] == [f"shard {s} document 0" for s in drawn]
    assert texts[8:16] == [f"shard {s} document 1" for s in drawn]


@pytest.fixture(scope="module")
def held_out():
    return [d["text"] for d in sources.documents("quickstart:validation")]


def test_the_quickstart_is_shuffled_anew_each_time_through(tokens, held_out):
    config = make_config(tokens, "quickstart:validation", sequence_length=1024)
    found, starts = [], 0
    with contextlib.closing(iter(blocks(config, tokens))) as iterator:
        while starts <= 2 * len(held_out):
            found.append(next(iterator))
            starts += np.count_nonzero(found[-1]["tokens"] == tokens.bos_id)
    texts = split_documents(tokens, found)
    once, again = texts[: len(held_out)], texts[len(held_out) : 2 * len(held_out)]
    assert sorted(once) == sorted(again) == sorted(held_out)
    assert once != again
    assert once != held_out
    config.seed = 1
    (other,) = take(blocks(config, tokens), 1)
    assert other["tokens"].tolist() != found[0]["tokens"].tolist()


@pytest.mark.parametrize("window", [1, WINDOW])
def test_the_order_follows_from_the_seed(tokens, documents, tmp_path, window):
    """That of the shards, and that of the blocks."""
    shards = [documents] if window > 1 else [documents[:4], documents[4:8], documents[8:]]
    spec = write_shards(tmp_path, shards)

    def rows(seed):
        config = make_config(tokens, spec, seed=seed, data__shuffle_blocks=window)
        return [row["tokens"] for row in as_rows(take(stream(config, tokens), 12))]

    one, again, other = rows(1), rows(1), rows(2)
    assert one == again
    assert one != other


def test_the_largest_seed_can_be_used(tokens, one_shard):
    config = make_config(tokens, one_shard, seed=2**31 - 1, data__shuffle_blocks=WINDOW)
    take(stream(config, tokens), 3 * WINDOW)


def record(dataset, count):
    """Batches, and the JSON of the state before each and after the last."""
    with contextlib.closing(iter(dataset)) as iterator:
        states, batches = [json.dumps(iterator.get_state())], []
        for _ in range(count):
            batches.append(next(iterator))
            states.append(json.dumps(iterator.get_state()))
    return batches, states


def resume(dataset, state: str, count) -> list:
    with contextlib.closing(iter(dataset)) as iterator:
        restore(iterator, json.loads(state))
        return list(itertools.islice(iterator, count))


def assert_restored(dataset, stops, following=4):
    """What follows each of the stops is the same as without it."""
    batches, states = record(dataset, max(stops) + following)
    for stop in stops:
        expected = batches[stop : stop + following]
        for one, other in zip(resume(dataset, states[stop], following), expected, strict=True):
            assert_equal(one, other)


LAYOUTS = {"one shard": [12], "three shards": [4, 1, 7], "ten shards": [1] * 8 + [2, 2]}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request, documents, tmp_path):
    """The documents in one or several shards."""
    left = iter(documents)
    return write_shards(tmp_path, [list(itertools.islice(left, n)) for n in request.param])


def test_a_stream_restored_anywhere_goes_on_with_the_same_batches(tokens, documents, layout):
    """In the middle of documents and at their ends, until the third time through them."""
    length = sum(len(tokens.encode(text)) for text in documents)
    config = make_config(tokens, layout, data__separate_documents=True)
    step = 1 if len(sources.shards(layout)) == 1 else 3  # Grain is slow to shuffle few shards
    stops = range(0, 2 * length // (2 * (LENGTH + 1)) + 10, step)
    assert_restored(stream(config, tokens), stops)


def test_a_shuffled_stream_restored_in_and_between_windows_goes_on_the_same(tokens, layout):
    config = make_config(tokens, layout, data__shuffle_blocks=WINDOW)
    assert_restored(stream(config, tokens), [0, 1, 3, 4, 5, 7, 8, 14, 40])


def test_a_restored_stream_goes_on_through_many_windows(tokens, one_shard):
    config = make_config(tokens, one_shard, data__shuffle_blocks=WINDOW)
    assert_restored(stream(config, tokens), [3, 4, 13], following=40)


def test_documents_of_whole_blocks_are_restored(tokens, tmp_path):
    """Nothing is left over where a block ends with a document."""
    text = " the" * 40
    while len(tokens.encode(text)) % (LENGTH + 1):
        text += "."
    spec = write_shards(tmp_path, [[text, text, "another document", text]])
    assert_restored(stream(make_config(tokens, spec), tokens), range(30))


def test_the_quickstart_is_restored(tokens):
    config = make_config(tokens, "quickstart:validation", data__shuffle_blocks=WINDOW)
    assert_restored(stream(config, tokens), (1, 4))


def test_a_state_does_not_change_when_the_stream_goes_on(tokens, one_shard):
    """Checkpoints are written while training goes on."""
    config = make_config(tokens, one_shard, data__shuffle_blocks=WINDOW)
    with contextlib.closing(iter(stream(config, tokens))) as iterator:
        for _ in range(10):
            next(iterator)
            state = iterator.get_state()
            before = json.dumps(state)
            for _ in range(3):
                next(iterator)
            assert json.dumps(state) == before


PROGRAM = """
import contextlib, itertools, json, sys
from bipe_jax import tokenizer
from bipe_jax.config import from_dict
from bipe_jax.data.stream import restore, stream

tokens = tokenizer.load(sys.argv[1])
for line in sys.stdin:
    job = json.loads(line)
    with contextlib.closing(iter(stream(from_dict(job["config"]), tokens))) as iterator:
        restore(iterator, job["state"])
        batches = list(itertools.islice(iterator, 4))
    print(json.dumps([{name: array.tolist() for name, array in b.items()} for b in batches]))
"""


def test_a_new_process_goes_on_with_the_same_batches(tokens, documents, tokenizer_file, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    one = write_shards(tmp_path / "one", [documents])
    many = write_shards(tmp_path / "many", [documents[i::5] for i in range(5)])
    jobs, expected = [], []
    for spec, window, stops in (
        (one, WINDOW, (2, 12, 27)),
        (many, 1, (1, 20, 45)),
        ("quickstart:validation", 1, (8,)),
    ):
        config = make_config(tokens, spec, data__shuffle_blocks=window)
        batches, states = record(stream(config, tokens), max(stops) + 4)
        for stop in stops:
            jobs.append({"config": config.to_dict(), "state": json.loads(states[stop])})
            cut = batches[stop : stop + 4]
            expected.append([{k: v.tolist() for k, v in batch.items()} for batch in cut])
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tokenizer_file],
        input="\n".join(map(json.dumps, jobs)),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


BREAKERS = {
    ".jsonl": lambda parts: b"".join(parts) + b"not JSON\n" + parts[0],
    ".jsonl.gz": lambda parts: b"".join(map(gzip.compress, parts))[:-20],
    ".jsonl.zst": lambda parts: b"".join(map(zstandard.ZstdCompressor().compress, parts))[:-20],
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("ending", BREAKERS)
def test_bad_data_in_mid_stream_is_an_error_that_names_the_shard(
    tokens, texts, tmp_path, monkeypatch, ending, alone
):
    monkeypatch.setattr(sources, "_READ_BYTES", 100)  # so that the fault is not seen at once
    texts = [text[:150] for text in texts]
    path = tmp_path / f"broken{ending}"
    path.write_bytes(BREAKERS[ending]([json.dumps({"text": t}).encode() + b"\n" for t in texts]))
    (tmp_path / "good").mkdir()
    spec = str(path)
    if not alone:
        spec += "," + write_shards(tmp_path / "good", [texts[:9], texts[9:]])
    seen = 0
    with (
        contextlib.closing(iter(stream(make_config(tokens, spec), tokens))) as iterator,
        pytest.raises(UserError, match=str(path)) as caught,
    ):
        for _ in range(1000):
            next(iterator)
            seen += 1
    assert seen > 20
    if ending == ".jsonl":
        assert f"the first is line {len(texts) + 1})" in str(caught.value)


def test_bad_lines_within_the_allowed_share_are_left_out_and_counted(tokens, documents, tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    spec = write_shards(good, [documents])
    (bad / "00.jsonl").write_bytes((good / "00.jsonl").read_bytes() + b"not JSON\n")
    tally = sources.Tally()
    config = make_config(tokens, f"{bad}/*", data__max_bad_share=0.1)
    found = take(stream(config, tokens, tally), 80)
    for one, other in zip(found, take(stream(make_config(tokens, spec), tokens), 80), strict=True):
        assert_equal(one, other)
    assert tally.bad_lines == 1


def test_nothing_to_read_is_an_error_before_the_first_batch(tokens, one_shard, tmp_path):
    """Not an endless search in a thread of the stream."""
    for spec, sets, message in (
        (f"{tmp_path}/none*.jsonl", (), "no file matches"),
        (one_shard, ("Github",), "holds no document of the sets Github"),
        ("quickstart:validation", ("Github",), "holds no document of the sets Github"),
        ("quickstart:test", (), "use quickstart:train or"),
    ):
        config = make_config(tokens, spec, data__sets=sets)
        with pytest.raises(UserError, match=message):
            stream(config, tokens)


def test_only_the_named_sets_are_streamed(tokens, tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        for i in range(30):
            meta = {"pile_set_name": "AB"[i % 2]}
            file.write(json.dumps({"text": f"{'ab'[i % 2]} {i}", "meta": meta}) + "\n")
    config = make_config(tokens, str(path), data__sets=("B",))
    found = split_documents(tokens, take(blocks(config, tokens), 12))
    assert found[:15] == [f"b {i}" for i in range(1, 30, 2)]
