"""The training stream: equal to a plain loop over the documents, and restored exactly."""

import collections
import contextlib
import functools
import gzip
import importlib
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import zstandard
from paths import ROOT
from tiny import tiny_plan

from bipe_jax import segments
from bipe_jax.checkpoint import meta_to_json
from bipe_jax.config.spec import parse_source
from bipe_jax.data import identity, sources, tokenizer
from bipe_jax.data.batches import Batches, annotate
from bipe_jax.data.held_out import check
from bipe_jax.data.prepare import prepare
from bipe_jax.data.stream import Stream
from bipe_jax.data.tokenizer import parts
from bipe_jax.errors import UserError

module = importlib.import_module("bipe_jax.data.stream")

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
    config = tiny_plan(
        data__train=spec,
        data__evaluation="held_out.jsonl",
        batch_size=2,
        sequence_length=LENGTH,
        data__shuffle_blocks=1,
        model__vocab_size=tokens.vocab_size,
        separators=rule.separators,
    )
    return config.replace({k.replace("__", "."): v for k, v in overrides.items()})


def take(iterator, count) -> list:
    with contextlib.closing(iterator):
        return list(itertools.islice(iterator, count))


def stream_of(config, tokens, **options) -> Stream:
    """The blocks of a config's source."""
    source = sources.open_source(config.training.sources[0], config.data.sets)
    return Stream(
        source,
        tokens,
        length=config.sequence_length + 1,
        window=config.data.shuffle_blocks,
        kind=config.data.packing,
        seed=config.seed,
        **options,
    )


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
    batches = take(Batches(config, tokens), count // 2)
    expected = plain_blocks(tokens, documents, count)
    assert any(len(set(numbers)) > 2 for _, numbers in expected)  # several documents in a block
    for row, (ids, numbers) in zip(as_rows(batches), expected, strict=True):
        found_documents = row.pop("document_ids", None)
        assert row == plain_annotation(ids, numbers, config.segment_rule.separators, separate)
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
    (batch,) = take(Batches(config, tokens), 1)
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
    found = take(stream_of(config, tokens), 10 * WINDOW)
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
    found = take(stream_of(config, tokens), 4 * length // (LENGTH + 1) + 3)
    texts = split_documents(tokens, found)[:80]
    assert collections.Counter(texts) == {text: 4 for shard in shards for text in shard}
    drawn = [text.split()[1] for text in texts[:8]]
    assert len(set(drawn)) == 8
    assert texts[:8] == [f"shard {s} document 0" for s in drawn]
    assert texts[8:16] == [f"shard {s} document 1" for s in drawn]


@pytest.fixture(scope="module")
def held_out():
    return [d["text"] for d in sources.documents(parse_source("quickstart:validation"))]


def test_the_quickstart_is_shuffled_anew_each_time_through(tokens, held_out):
    config = make_config(tokens, "quickstart:validation", sequence_length=1024)
    found, starts = [], 0
    with contextlib.closing(stream_of(config, tokens)) as iterator:
        while starts <= 2 * len(held_out):
            found.append(next(iterator))
            starts += np.count_nonzero(found[-1]["tokens"] == tokens.bos_id)
    texts = split_documents(tokens, found)
    once, again = texts[: len(held_out)], texts[len(held_out) : 2 * len(held_out)]
    assert sorted(once) == sorted(again) == sorted(held_out)
    assert once != again
    assert once != held_out
    config = config.replace({"seed": 1})
    (other,) = take(stream_of(config, tokens), 1)
    assert other["tokens"].tolist() != found[0]["tokens"].tolist()


@pytest.mark.parametrize("window", [1, WINDOW])
def test_the_order_follows_from_the_seed(tokens, documents, tmp_path, window):
    """That of the shards, and that of the blocks."""
    shards = [documents] if window > 1 else [documents[:4], documents[4:8], documents[8:]]
    spec = write_shards(tmp_path, shards)

    def rows(seed):
        config = make_config(tokens, spec, seed=seed, data__shuffle_blocks=window)
        return [row["tokens"] for row in as_rows(take(Batches(config, tokens), 12))]

    one, again, other = rows(1), rows(1), rows(2)
    assert one == again
    assert one != other


def test_the_largest_seed_can_be_used(tokens, one_shard):
    config = make_config(tokens, one_shard, seed=2**31 - 1, data__shuffle_blocks=WINDOW)
    take(Batches(config, tokens), 3 * WINDOW)


def record(make, count):
    """Batches, and the JSON of the state before each and after the last."""
    with contextlib.closing(make()) as iterator:
        states, batches = [json.dumps(iterator.get_state())], []
        for _ in range(count):
            batches.append(next(iterator))
            states.append(json.dumps(iterator.get_state()))
    return batches, states


def resume(make, state: str, count) -> list:
    with contextlib.closing(make()) as iterator:
        iterator.set_state(json.loads(state))
        return list(itertools.islice(iterator, count))


def assert_restored(make, stops, following=4):
    """What follows each of the stops is the same as without it."""
    batches, states = record(make, max(stops) + following)
    for stop in stops:
        expected = batches[stop : stop + following]
        for one, other in zip(resume(make, states[stop], following), expected, strict=True):
            assert_equal(one, other)


LAYOUTS = [
    pytest.param([12], id="one shard"),
    pytest.param([4, 1, 7], id="three shards"),
    pytest.param([1] * 8 + [2, 2], id="ten shards", marks=pytest.mark.slow),
]


@pytest.fixture(params=LAYOUTS)
def layout(request, documents, tmp_path):
    """The documents in one or several shards."""
    left = iter(documents)
    return write_shards(tmp_path, [list(itertools.islice(left, n)) for n in request.param])


@pytest.mark.slow
def test_a_stream_restored_anywhere_goes_on_with_the_same_batches(tokens, documents, layout):
    """In the middle of documents and at their ends, until the third time through them."""
    length = sum(len(tokens.encode(text)) for text in documents)
    config = make_config(tokens, layout, data__separate_documents=True)
    step = 1 if len(sources.files.find(layout)) == 1 else 3
    stops = range(0, 2 * length // (2 * (LENGTH + 1)) + 10, step)
    assert_restored(lambda: Batches(config, tokens), stops)


def test_a_shuffled_stream_restored_in_and_between_windows_goes_on_the_same(tokens, layout):
    config = make_config(tokens, layout, data__shuffle_blocks=WINDOW)
    assert_restored(lambda: Batches(config, tokens), [0, 1, 3, 4, 5, 7, 8, 14, 40])


def test_a_restored_stream_goes_on_through_many_windows(tokens, one_shard):
    config = make_config(tokens, one_shard, data__shuffle_blocks=WINDOW)
    assert_restored(lambda: Batches(config, tokens), [3, 4, 13], following=40)


@pytest.mark.slow
def test_documents_of_whole_blocks_are_restored(tokens, tmp_path):
    """Nothing is left over where a block ends with a document."""
    text = " the" * 40
    while len(tokens.encode(text)) % (LENGTH + 1):
        text += "."
    spec = write_shards(tmp_path, [[text, text, "another document", text]])
    assert_restored(lambda: Batches(make_config(tokens, spec), tokens), range(30))


def test_the_quickstart_is_restored(tokens):
    config = make_config(tokens, "quickstart:validation", data__shuffle_blocks=WINDOW)
    assert_restored(lambda: Batches(config, tokens), (1, 4))


def test_a_state_does_not_change_when_the_stream_goes_on(tokens, one_shard):
    """Checkpoints are written while training goes on."""
    config = make_config(tokens, one_shard, data__shuffle_blocks=WINDOW)
    with contextlib.closing(Batches(config, tokens)) as iterator:
        for _ in range(10):
            next(iterator)
            state = iterator.get_state()
            before = json.dumps(state)
            for _ in range(3):
                next(iterator)
            assert json.dumps(state) == before


PROGRAM = """
import contextlib, itertools, json, sys
from bipe_jax.checkpoint import plan_from_json
from bipe_jax.data import tokenizer
from bipe_jax.data.batches import Batches

tokens = tokenizer.load(sys.argv[1])
for line in sys.stdin:
    job = json.loads(line)
    with contextlib.closing(Batches(plan_from_json(job["config"]), tokens)) as iterator:
        iterator.set_state(job["state"])
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
        batches, states = record(functools.partial(Batches, config, tokens), max(stops) + 4)
        for stop in stops:
            jobs.append({"config": meta_to_json(config), "state": json.loads(states[stop])})
            cut = batches[stop : stop + 4]
            expected.append([{k: v.tolist() for k, v in batch.items()} for batch in cut])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
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
    monkeypatch.setattr(sources.files, "_READ_BYTES", 100)  # so that the fault is not seen at once
    texts = [text[:150] for text in texts]
    path = tmp_path / f"broken{ending}"
    path.write_bytes(BREAKERS[ending]([json.dumps({"text": t}).encode() + b"\n" for t in texts]))
    (tmp_path / "good").mkdir()
    spec = str(path)
    if not alone:
        spec += "," + write_shards(tmp_path / "good", [texts[:9], texts[9:]])
    seen = 0
    with (
        contextlib.closing(Batches(make_config(tokens, spec), tokens)) as iterator,
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
    found = take(Batches(config, tokens, tally), 80)
    for one, other in zip(found, take(Batches(make_config(tokens, spec), tokens), 80), strict=True):
        assert_equal(one, other)
    assert tally.counts() == {"bad_lines": 1, "bad_lines/not_json": 1}


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
            Batches(config, tokens)


def test_only_the_named_sets_are_streamed(tokens, tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        for i in range(30):
            meta = {"pile_set_name": "AB"[i % 2]}
            file.write(json.dumps({"text": f"{'ab'[i % 2]} {i}", "meta": meta}) + "\n")
    config = make_config(tokens, str(path), data__sets=("B",))
    found = split_documents(tokens, take(stream_of(config, tokens), 12))
    assert found[:15] == [f"b {i}" for i in range(1, 30, 2)]


def packed_config(tokens, spec, packing, **overrides):
    return make_config(
        tokens, spec, data__packing=packing, data__shuffle_blocks=WINDOW, **overrides
    )


def whole_documents(tokens, documents, separators) -> dict:
    """(token, position, segment, offset) of every token of each document, by the document's number."""
    found = {}
    for number, text in enumerate(documents):
        ids = [int(i) for i in tokens.encode(text)]
        annotated = plain_annotation([*ids, 0], [0] * (len(ids) + 1), separators, True)
        names = ("tokens", "position", "segment", "offset")
        found[number] = list(zip(*(annotated[name] for name in names), strict=True))
    return found


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_cut_documents_continue_their_coordinates(tokens, documents, layout, packing):
    """Pieces of blocks, joined by their positions, are the documents with coordinates of the whole."""
    config = packed_config(
        tokens, layout, packing, data__separate_documents=True, data__cut_documents="continue"
    )
    expected = whole_documents(tokens, documents, config.segment_rule.separators)
    stream = stream_of(config, tokens, rule=config.segment_rule)
    length = sum(map(len, expected.values()))
    found = collections.Counter()
    for block in take(stream, length // (LENGTH + 1)):
        columns = zip(*(block[n].tolist() for n in ("tokens", "position", "segment", "offset")),
                      strict=True)  # fmt: skip
        pairs = zip(block["document_ids"].tolist(), columns, strict=True)
        for number, piece in itertools.groupby(pairs, key=lambda pair: pair[0]):
            if number:
                found[tuple(column for _, column in piece)] += 1
    assert any(piece[0][2] > 0 and piece[0][3] > 0 for piece in found)  # cut within segments
    wholes = list(expected.values())
    for piece in found:
        start = piece[0][1]
        assert any(tuple(whole[start : start + len(piece)]) == piece for whole in wholes)


def test_long_documents_are_tokenised_in_parts_that_join(tokens, tmp_path, monkeypatch):
    """Each part is cut behind a newline where there is one; one BOS; coordinates run on."""
    monkeypatch.setattr(tokenizer, "_PART", 50)
    lines = [f"line {i} has. some words {'x' * (i % 7)}\n" for i in range(60)]
    text = "".join(lines) + "y" * 230 + "\nend"
    assert "".join(parts(text)) == text
    assert sum(part.endswith("\n") for part in parts(text)) > 20
    config = make_config(
        tokens,
        write_shards(tmp_path, [[text, "short"]]),
        data__separate_documents=True,
        data__cut_documents="continue",
    )
    pieces = [tokens.encode_parts([p], [i == 0])[0] for i, p in enumerate(parts(text))]
    ids = np.concatenate(pieces)
    assert np.count_nonzero(ids == tokens.bos_id) == 1
    count = len(ids) // (LENGTH + 1)
    found = take(stream_of(config, tokens, rule=config.segment_rule), count)
    for name, expected in {
        "tokens": ids,
        **segments.coordinates(ids, config.segment_rule),
    }.items():
        flat = np.concatenate([block[name] for block in found])
        np.testing.assert_array_equal(flat, expected[: len(flat)], err_msg=name)
    assert_restored(lambda: Batches(config, tokens), range(0, 2 * count, 5))


@pytest.mark.parametrize("separate", [False, True])
def test_padding_is_no_target(tokens, documents, one_shard, separate):
    config = packed_config(tokens, one_shard, "document", data__separate_documents=separate)
    blocks = take(stream_of(config, tokens), 40)
    rows = as_rows(take(Batches(config, tokens), 20))
    padded = 0
    for block, row in zip(blocks, rows, strict=True):
        ids = block["document_ids"].tolist()
        padded += 0 in ids
        apart = [separate and a != b for a, b in itertools.pairwise(ids)]
        expected = [0.0 if b == 0 or cut else 1.0 for b, cut in zip(ids[1:], apart, strict=True)]
        assert row["weights"] == expected
        assert ("document_ids" in row) == separate
    assert padded > 1


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("packing", ["concat", "document"])
def test_workers_change_nothing_and_restore_anywhere(
    tokens, documents, layout, packing, workers, monkeypatch
):
    monkeypatch.setattr(module, "_TASK", 100)  # many tasks at a time
    alone = packed_config(tokens, layout, packing, data__workers=0)
    config = packed_config(tokens, layout, packing, data__workers=workers)
    for one, other in zip(
        take(Batches(config, tokens), 60), take(Batches(alone, tokens), 60), strict=True
    ):
        assert_equal(one, other)
    assert_restored(lambda: Batches(config, tokens), [0, 1, 3, 4, 6, 11, 17, 30, 52])


def test_a_mixture_gives_each_source_its_share(tokens, tmp_path):
    specs = []
    for name in "abc":
        (tmp_path / name).mkdir()
        specs.append(write_shards(tmp_path / name, [[f"{name} " * 40] * 3]))
    weights = (5, 2, 1)
    config = make_config(tokens, "; ".join(f"{s}@{w}" for s, w in zip(specs, weights, strict=True)))
    with contextlib.closing(Batches(config, tokens)) as batches:
        counts, states = collections.Counter(), []
        for step in range(1, 101):
            states.append(json.dumps(batches.get_state()))
            for row in next(batches)["tokens"]:
                counts[max("abc", key=tokens.decode(row).count)] += 1
            for name, weight in zip(
                "abc", weights, strict=True
            ):  # at any time, not in the end alone
                assert abs(counts[name] - 2 * step * weight / 8) <= 1.5
        report = batches.report()
    for spec, name in zip(specs, "abc", strict=True):
        assert report[f"share/{spec}"] == counts[name] / 200
        assert report[f"epochs/{spec}"] >= 0
    assert report[f"epochs/{specs[0]}"] > report[f"epochs/{specs[2]}"]
    assert_restored(lambda: Batches(config, tokens), [0, 3, 20])


def test_a_mixture_can_be_of_the_sets_of_one_source(tokens, tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        for i in range(30):
            meta = {"pile_set_name": ["Set A", "B", "C"][i % 3]}
            file.write(json.dumps({"text": f"{'abc'[i % 3]} " * 50, "meta": meta}) + "\n")
    config = make_config(tokens, f"{path}#Set A @ 3; {path}#B|C")
    rows = [tokens.decode(r) for b in take(Batches(config, tokens), 40) for r in b["tokens"]]
    assert sum("a" in row for row in rows) == 60
    assert all("b" in row or "c" in row for row in rows if "a" not in row)


@pytest.mark.parametrize(
    "train, message",
    [
        ("", "weights above 0"),
        ("a.jsonl;", "weights above 0"),
        ("a.jsonl@0; b.jsonl@1", "weights above 0"),
        ("a.jsonl@-1", "weights above 0"),
        ("a.jsonl@nan", "weights above 0"),
        ("a.jsonl@inf", "weights above 0"),
        ("a.jsonl; a.jsonl@2", "names a source twice"),
    ],
)
def test_a_malformed_mixture_is_refused(tokens, train, message):
    with pytest.raises(UserError, match=message):
        make_config(tokens, train)


def check_held_out(config):
    shards = tuple(map(identity.of_source, config.training.sources))
    check(config.with_shards(shards))


def test_what_is_evaluated_on_is_not_trained_on(tokens, tmp_path):
    spec = write_shards(tmp_path, [["one"], ["two"]])
    for train, held in (
        (spec, f"{tmp_path}/01.jsonl"),
        (f"{tmp_path}/00.jsonl, {tmp_path}/01.jsonl", f"{tmp_path}/01.jsonl#A"),
        ("quickstart:train", "quickstart:train"),
        (f"{spec}#A; {spec}#B", f"{spec}#B|C"),
    ):
        config = make_config(tokens, train, data__evaluation=held)
        with pytest.raises(UserError, match="evaluate on text that is held out"):
            check_held_out(config)
    config = make_config(tokens, f"{tmp_path}/00.jsonl", data__evaluation=f"{tmp_path}/01.jsonl")
    check_held_out(config)


READER = """
import contextlib, itertools, json, sys
from bipe_jax.checkpoint import plan_from_json
from bipe_jax.data import tokenizer
from bipe_jax.data.batches import Batches

tokens = tokenizer.load(sys.argv[1])
job = json.load(sys.stdin)
with contextlib.closing(Batches(plan_from_json(job["config"]), tokens, shard=job["shard"])) as batches:
    if job["state"]:
        batches.set_state(job["state"])
    rows = [row for batch in itertools.islice(batches, job["count"]) for row in batch["tokens"].tolist()]
    print(json.dumps({"rows": rows, "state": batches.get_state(), "epochs": batches.report()}))
"""


def read_in_processes(config, tokenizer_file, states, counts):
    """What as many real processes read, all at a time."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = []
    for i, (state, count) in enumerate(zip(states, counts, strict=True)):
        process = subprocess.Popen(
            [sys.executable, "-c", READER, tokenizer_file],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        job = {
            "config": meta_to_json(config),
            "shard": [i, len(states)],
            "state": state,
            "count": count,
        }
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        running.append(process)
    read = [json.loads(process.stdout.read()) for process in running]
    assert [process.wait() for process in running] == [0] * len(running)
    return read


@pytest.mark.parametrize("readers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_read_disjoint_parts_and_together_all(tokens, tokenizer_file, tmp_path, readers):
    """In one epoch each document is read once, by one process; half-way they are stopped."""
    shards = [[f"shard {s} document {d} of some words" for d in range(5)] for s in range(10)]
    spec = write_shards(tmp_path, shards)
    config = make_config(tokens, spec, batch_size=readers, model__heads=4)
    mine = [[text for shard in shards[i::readers] for text in shard] for i in range(readers)]
    sizes = [sum(len(tokens.encode(text)) for text in texts) for texts in mine]
    counts = [-(-size // (LENGTH + 1)) for size in sizes]
    halves = [count // 2 for count in counts]
    first = read_in_processes(config, tokenizer_file, [None] * readers, halves)
    states = [part["state"] for part in first]
    left = [count - half for count, half in zip(counts, halves, strict=True)]
    second = read_in_processes(config, tokenizer_file, states, left)
    for i in range(readers):
        # A row lacks its block's last token, which is the next one's only where they overlap.
        ids = [row for part in (first[i], second[i]) for row in part["rows"]]
        found = [tokens.decode(row) for row in ids]
        for s in range(10):
            named = sum(f"shard {s} " in text for text in found)
            assert (named > 0) == (s % readers == i)
    with pytest.raises(UserError, match=f"was read by {readers} processes, and now by 1"):
        Batches(config, tokens).set_state(states[0])


def test_each_shard_finds_its_state_among_all(tokens, layout):
    config = make_config(tokens, layout.replace("*", "0*"), batch_size=2)
    shards = [(0, 1)] if len(sources.files.find(layout)) == 1 else [(0, 2), (1, 2)]
    streams = [Batches(config, tokens, shard=shard) for shard in shards]
    for _ in range(5):
        for stream in streams:
            next(stream)
    states = json.loads(json.dumps([stream.get_state() for stream in streams]))
    for shard, stream in zip(shards, streams, strict=True):
        with contextlib.closing(Batches(config, tokens, shard=shard)) as other:
            other.set_state_of(states)
            assert_equal(next(other), next(stream))
        stream.close()


def prepared_rows(tokens, tokenizer_file, config, counts, state):
    """The rows of batches in order, read by as many real processes."""
    readers = len(counts)
    read = read_in_processes(config, tokenizer_file, [state] * readers, counts)
    rows = [part["rows"] for part in read]
    each = config.batch_size // readers
    batches = [
        [row for part in rows for row in part[b * each : (b + 1) * each]] for b in range(counts[0])
    ]
    return batches, read[0]["state"]


@pytest.mark.slow
def test_prepared_data_goes_on_with_another_number_of_processes(
    tokens, tokenizer_file, tmp_path, documents
):
    (tmp_path / "shards").mkdir()
    spec = write_shards(tmp_path / "shards", [documents[i::3] for i in range(3)])
    prepare(spec, str(tmp_path / "prepared"), tokenizer_file, LENGTH, workers=1)
    config = make_config(tokens, f"prepared:{tmp_path}/prepared", batch_size=4)
    whole, _ = prepared_rows(tokens, tokenizer_file, config, [12], None)
    start, state = prepared_rows(tokens, tokenizer_file, config, [5] * 2, None)
    rest, _ = prepared_rows(tokens, tokenizer_file, config, [7] * 4, state)
    assert start + rest == whole


def test_fewer_shards_than_processes_are_refused(tokens, one_shard):
    config = make_config(tokens, one_shard)
    with pytest.raises(UserError, match="has 1 shards for 2 reading processes: rewrite it"):
        Batches(config, tokens, shard=(0, 2))
