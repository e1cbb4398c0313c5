"""Segments that come with the data or from segmenters, from the text to batches, evaluation and training."""

import contextlib
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tiny import tiny, tiny_plan

import bipe_jax
from bipe_jax import segments
from bipe_jax.config.spec import parse_source
from bipe_jax.data import identity, inspect, lines, marked, prepare, sources, tokenizer
from bipe_jax.data.batches import Batches
from bipe_jax.errors import UserError
from bipe_jax.evaluation import attention_distance, loaded
from bipe_jax.segments import segmenters
from tests.data.test_prepare import write_tfds
from tests.model.test_model import draw

HARD = "Ünïcode 中文 has 3 bytes.\nA 😀 has four. \n\nThe end, é"


@pytest.fixture(scope="module")
def tokens(tokenizer_file):
    return tokenizer.load(tokenizer_file)


@pytest.fixture(scope="module")
def documents(texts):
    """With two lists of segments: every third word, and every fifth of those."""
    result = []
    for text in [HARD, *(text[500 : 500 + 90 * i] for i, text in enumerate(texts[:12], 1))]:
        words = [match.start() for match in re.finditer(r"\w+", text)][::3]
        result.append({"text": text, "segments": [words, words[::5]]})
    return result


@pytest.fixture(scope="module")
def source(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("marked") / "a.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(path)


def test_tokens_with_the_first_character_of_a_segment_are_marked(tokens):
    text = "One two three. Four"
    (row,) = marked.encode(
        tokens, list(marked.parts_of({"text": text, "segments": [[4, 15], [15]]}, ("data:0", "data:1")))
    )  # fmt: skip
    pieces = [tokens.pieces()[i] for i in row["tokens"]]
    offset, expected = 0, []
    for piece in pieces:
        inside = range(offset, offset + len(piece))
        expected.append((4 in inside or 15 in inside) + 2 * (15 in inside))
        offset += len(piece)
    assert row["starts"].tolist() == expected
    assert offset == len(text) and sum(mark > 0 for mark in expected) == 2


def test_marks_of_characters_of_several_bytes(tokens):
    """Each segment's text, decoded, begins where the offsets say, up to the token it is inside of."""
    words = [match.start() for match in re.finditer(r"\w+", HARD)]
    document = {"text": HARD, "segments": [words]}
    encoded, sizes = marked.encode_whole(tokens, document, ("data:0",))
    data, at = HARD.encode(), 0
    for size, mark in zip(sizes.tolist(), encoded["starts"].tolist(), strict=True):
        begun = [w for w in words if at <= len(HARD[:w].encode()) < at + size]
        assert bool(mark) == bool(begun)
        at += size
    assert at == len(data)


def test_long_documents_are_marked_in_parts(tokens, documents, monkeypatch):
    whole = [marked.encode_whole(tokens, d, ("data:0", "data:1"))[0] for d in documents]
    monkeypatch.setattr(tokenizer, "_PART", 50)
    for document in documents:
        parts = list(marked.parts_of(document, ("data:0", "data:1")))
        assert "".join(part.text for part in parts) == document["text"]
        starts = np.cumsum([0, *(len(part.text) for part in parts)])
        for level in (0, 1):
            joined = [
                at + start
                for part, start in zip(parts, starts.tolist(), strict=False)
                for at in part.begins[level]
            ]
            assert joined == document["segments"][level]
    assert any(row["starts"].max() == 3 for row in whole)


def by_hand(ids, starts, numbers, separate, length):
    """Rows of a block: (position, segment, offset, segment_in_part, part, part_offset) of each token."""
    rows = []
    for i in range(length):
        if i == 0 or (separate and numbers[i] != numbers[i - 1]):
            position = segment = offset = within = part = part_offset = 0
        else:
            position, offset, part_offset = position + 1, offset + 1, part_offset + 1
            if starts[1][i]:
                part, part_offset, within = part + 1, 0, 0
            if starts[0][i] or starts[1][i]:
                segment, offset, within = segment + 1, 0, within + 1
            if starts[1][i]:
                within = 0
        rows.append((position, segment, offset, within, part, part_offset))
    return rows


NAMES = ("position", "segment", "offset", "segment_in_part", "part", "part_offset")
LENGTH = 24


def config_of(tokens, data, **overrides):
    return tiny_plan(
        data__train=data,
        data__evaluation="held_out.jsonl",
        data__shuffle_blocks=1,
        batch_size=2,
        sequence_length=LENGTH,
        model__vocab_size=tokens.vocab_size,
        segments__rule="data",
        segments__levels=(("part", "data"),),
        **overrides,
    )


def rows_of(tokens, documents):
    ids, numbers, starts = [], [], [[], []]
    for number, document in enumerate(documents):
        encoded, _ = marked.encode_whole(tokens, document, ("data:0", "data:1"))
        ids += encoded["tokens"].tolist()
        numbers += [number] * len(encoded["tokens"])
        for level in (0, 1):
            starts[level] += ((encoded["starts"] >> level) & 1).tolist()
    return ids, numbers, starts


def check_batches(found, rows, separate):
    ids, numbers, starts = rows
    for row, first in zip(found, range(0, len(ids) - LENGTH, LENGTH + 1), strict=False):
        cut = slice(first, first + LENGTH)
        assert row["tokens"].tolist() == ids[cut]
        wanted = by_hand(ids[cut], [s[cut] for s in starts], numbers[cut], separate, LENGTH)
        for name, values in zip(NAMES, zip(*wanted, strict=True), strict=True):
            assert row[name].tolist() == list(values), name


@pytest.mark.parametrize("separate", [False, True])
def test_segments_of_the_data_reach_the_batches(tokens, source, documents, separate):
    config = config_of(tokens, source, data__separate_documents=separate)
    rows = rows_of(tokens, documents)
    count = len(rows[0]) // (LENGTH + 1) // 2
    with contextlib.closing(Batches(config, tokens)) as batches:
        some = list(itertools.islice(batches, count))
    found = [{n: x[i] for n, x in batch.items()} for batch in some for i in range(2)]
    check_batches(found, rows, separate)


@pytest.mark.parametrize("ragged", [True, False], ids=["lists", "an array"])
def test_segments_of_tfds_datasets_are_those_of_jsonl(documents, ragged, tmp_path, monkeypatch):
    path = tmp_path / "plays" / "1.0.0"
    if ragged:
        # TFDS writes nested sequences of NumPy's types with TensorFlow alone, and reads them without.
        monkeypatch.setattr(
            tfds.features.TensorInfo, "dtype", property(lambda info: info.np_dtype), raising=False
        )
        feature = tfds.features.Sequence(tfds.features.Sequence(np.int64))
    else:
        documents = [
            d | {"segments": np.array([d["segments"][1]] * 2, np.int32)} for d in documents
        ]
        feature = tfds.features.Tensor(shape=(2, None), dtype=np.int32)
    write_tfds(path, documents, segments=feature)
    source = parse_source(f"tfds:{path}:train")
    assert identity.count_documents(source) == len(documents)
    read = list(sources.documents(source))
    of_levels = [[list(map(int, at)) for at in d["segments"]] for d in documents]
    assert read == [
        {"text": d["text"], "set": "plays", "segments": some}
        for d, some in zip(documents, of_levels, strict=True)
    ]
    for document, some in zip(read, of_levels, strict=True):  # which takes Python's integers alone
        assert [segmenters.begins(f"data:{level}", document) for level in (0, 1)] == some


def test_where_documents_are_cut_their_coordinates_continue(tokens, source, documents):
    config = config_of(
        tokens, source, data__separate_documents=True, data__cut_documents="continue"
    )
    with contextlib.closing(Batches(config, tokens)) as batches:
        some = list(itertools.islice(batches, 10))
    ids, numbers, starts = rows_of(tokens, documents)
    whole = by_hand(ids, starts, numbers, True, len(ids))
    found = [{n: x[i] for n, x in batch.items()} for batch in some for i in range(2)]
    for row, first in zip(found, range(0, len(ids) - LENGTH, LENGTH + 1), strict=False):
        values = whole[first : first + LENGTH]
        for name, wanted in zip(NAMES, zip(*values, strict=True), strict=True):
            assert row[name].tolist() == list(wanted), name


def test_prepared_data_carry_segments(tokens, tokenizer_file, source, documents, tmp_path):
    out = str(tmp_path / "prepared")
    with pytest.raises(UserError, match="--segmenters: the segmenter 'sentence' is unknown"):
        prepare.prepare(source, out, tokenizer_file, LENGTH, segmenters=("sentence",))
    names = ("data", "data")
    prepare.prepare(source, out, tokenizer_file, LENGTH, segmenters=names, workers=1)
    config = config_of(tokens, f"prepared:{out}", data__separate_documents=True)
    rows = rows_of(tokens, documents)
    by_tokens = {}
    for first in range(0, len(rows[0]) - LENGTH, LENGTH + 1):
        cut = slice(first, first + LENGTH)
        by_tokens[tuple(rows[0][cut])] = first
    seen = 0
    with contextlib.closing(Batches(config, tokens)) as batches:
        for batch in itertools.islice(batches, 8):
            for i in range(2):
                row = {name: x[i] for name, x in batch.items()}
                first = by_tokens.get(tuple(row["tokens"].tolist()))
                if first is None:
                    continue  # padded
                seen += 1
                cut = slice(first, first + LENGTH)
                one = (rows[0][cut] + [0], rows[1][cut] + [-1], [s[cut] + [0] for s in rows[2]])
                check_batches([row], one, True)
    assert seen > 8
    other = config_of(tokens, f"prepared:{out}").replace(
        {"segments.rule": "ast", "segments.levels": ()}
    )
    with pytest.raises(UserError, match=r"segmenters 'ast', but .* --segmenters='data:0,data:1'"):
        Batches(other, tokens)


def test_a_document_without_its_segments_is_named(tokens, tmp_path):
    for number, value in enumerate(
        (None, [], [[3, 1], []], [[0, 99], []], ["ab", []], [[1.0], []])
    ):
        document = {"text": "Some text here"} | ({} if value is None else {"segments": value})
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(document) + "\n")
        with (
            pytest.raises(UserError, match=r"needs \"segments\".*begins with 'Some text here'"),
            contextlib.closing(Batches(config_of(tokens, str(path)), tokens)) as batches,
        ):
            next(batches)
    assert lines.parse(b'{"text": "a", "segments": 3}')["segments"] == 3  # of no concern to others


def test_functions_and_classes_of_python():
    text = (
        "import os\r\n\r\n@cache\r\ndef f():\r\n    pass\r\n\r\nx = 1\r\nclass A:\r\n"
        "    def g(self):\r\n        return 1\r\n    y = '中'\r\nz = 2"
    )
    at = segmenters.begins("ast", {"text": text})
    parts = [text[a:b] for a, b in itertools.pairwise([0, *at, len(text)])]
    assert [part.strip() for part in parts] == [
        "import os", "@cache\r\ndef f():\r\n    pass", "x = 1", "class A:",
        "def g(self):\r\n        return 1", "y = '中'", "z = 2",
    ]  # fmt: skip
    assert segmenters.begins("ast", {"text": "def f(:\n"}) == []
    assert segmenters.begins("ast", {"text": "\0"}) == []


def test_sentences_of_pysbd():
    pytest.importorskip("pysbd")
    text = "Dr. Smith arrived at 5 p.m. on Monday. He left. Why?"
    at = segmenters.begins("pysbd", {"text": text})
    assert [text[a:b].strip() for a, b in itertools.pairwise([*at, len(text)])] == [
        "Dr. Smith arrived at 5 p.m. on Monday.", "He left.", "Why?",
    ]  # fmt: skip
    with pytest.raises(UserError, match="does not know the language"):
        segments.check_rule("pysbd:klingon")


def test_inspect_shows_segments_of_all_levels(source, tokenizer_file, capsys, tmp_path):
    result = inspect.inspect(
        source, tokenizer_file, "data", levels="paragraph", length=40,
        output=str(tmp_path / "page.html"),
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert "⟦paragraph 0⟧⟦0⟧" in shown and "level paragraph" in shown
    (statistics,) = result.sets.values()
    assert statistics.segments["data"].total > statistics.segments["level paragraph"].total


def test_a_model_of_a_segmenter_generates_from_a_prompt(tokens):
    config = tiny_plan(
        segments__rule="ast",
        position__absolute=(("learned", "offset"),),
        position__relative=(("rope", "segment"), ("alibi", "segment")),
        model__vocab_size=tokens.vocab_size,
    )
    params = draw(config)
    prompts = ["def f():\n    return 1\n", "x = 1\ndef g():\n    pass\ny = 2\ndef h(): return\nz"]
    encoded = [marked.encode_whole(tokens, {"text": p}, ("ast",))[0] for p in prompts]
    assert encoded[1]["starts"].sum() == 4
    model = loaded.on_all_devices(config, params, tokens)
    answers = bipe_jax.Generator(model, 64)(
        [e["tokens"] for e in encoded], 6, starts=[e["starts"] for e in encoded]
    )
    for row, answer in zip(encoded, answers, strict=True):
        both = np.concatenate([row["tokens"], answer])
        starts = np.pad(row["starts"], (0, len(answer)))
        logits = np.asarray(bipe_jax.apply(config, params, both[None], starts[None]))[0]
        assert logits[len(row["tokens"]) - 1 : -1].argmax(-1).tolist() == answer.tolist()
    with pytest.raises(UserError, match="'ast' reads the text, and here are tokens alone"):
        bipe_jax.apply(config, params, both[None])


def test_attention_is_analysed_by_segments_of_the_data(
    tmp_path, tokens, source, documents, monkeypatch
):
    config = tiny_plan(model__vocab_size=tokens.vocab_size, segments__rule="data")
    model = loaded.on_all_devices(config, draw(config), tokens)
    monkeypatch.setattr(loaded, "load", lambda path: model)
    result = attention_distance.analyse("", (48,), source, str(tmp_path), blocks=4)
    rows = [marked.encode_whole(tokens, document, ("data:0",))[0] for document in documents]
    segment = [row["starts"].cumsum()[:48] for row in rows if len(row["tokens"]) >= 48][:4]
    assert result["documents"] == 4 and min(at[-1] for at in segment) > 2
    (found,) = [row["bins"] for row in result["uniform"] if row["by"] == "segment"]
    for of_bin in found:
        seen = [
            np.mean([of_bin["from"] <= at[i] - at[j] <= of_bin["to"] for j in range(i + 1)])
            for at in segment
            for i in range(48)
        ]
        assert of_bin["weight"] == pytest.approx(np.mean(seen))


@pytest.mark.slow
def test_a_model_of_levels_is_trained_resumed_evaluated_and_generates(
    tmp_path, tokens, tokenizer_file, shards, held_out
):
    def config(**overrides):
        return tiny(
            steps=6,
            data__train=shards,
            data__evaluation=held_out,
            tokenizer__path=tokenizer_file,
            model__vocab_size=tokens.vocab_size,
            segments__levels=("paragraph", "document"),
            position__absolute=(("learned", "segment_in_paragraph"),),
            position__relative=(("rope", "segment"), ("alibi", "paragraph")),
            **overrides,
        )

    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    bipe_jax.train(config(), whole)
    bipe_jax.train(config(), parts, stop_at=3)
    bipe_jax.train(config(), parts)
    losses = [
        [json.loads(line)["loss"] for line in Path(path, "metrics.jsonl").read_text().splitlines()]
        for path in (whole, parts)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6

    result = bipe_jax.evaluate(whole, lengths=(16, 64), context=64, tokens=64)
    assert {row["coordinate"] for row in result["unseen"]} >= {"paragraph", "segment_in_paragraph"}
    read, params = bipe_jax.load(whole)
    assert [name for name, _ in read.segment_rule.coarser] == ["paragraph", "document"]

    model = loaded.load(whole)
    prompts = [tokens.encode(text) for text in ("One.\n\nTwo. Three.\n", "\n\nA\n\nB\n \nC")]
    generator = bipe_jax.Generator(model, 64)
    for prompt, answer in zip(prompts, generator(prompts, 24), strict=True):
        both = np.concatenate([prompt, answer])
        logits = np.asarray(bipe_jax.apply(read, params, both[None]))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer.tolist()
