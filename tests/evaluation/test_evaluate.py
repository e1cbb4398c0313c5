"""Evaluation by length: protocols, their numbers, files and errors."""

import json
import math

import jax
import numpy as np
import pytest
from tiny import tiny_plan

from bipe_jax import model, segments
from bipe_jax.data.prepare import prepare
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded, perplexity, protocols, scoring, tally
from bipe_jax.evaluation.evaluator import Settings, evaluate, read_targets, resolve
from bipe_jax.evaluation.targets import Document, Targets
from bipe_jax.training.trainer import train

LENGTHS = (32, 64, 128)
NAMES = ("same-tokens", "non-overlapping", "sliding:16", "sliding:9", "sliding:32")


def targets_of(windows):
    return [(w.document, t) for w in windows for t in range(w.end - w.scored + 1, w.end + 1)]


@pytest.mark.parametrize(
    ("name", "lengths"),
    [(name, lengths) for name in NAMES for lengths in (LENGTHS, (32, 100), (40,))]
    + [(name, (48, 7)) for name in ("same-tokens", "non-overlapping", "sliding:5")],
)
def test_every_length_scores_the_same_targets_once(name, lengths):
    """Whatever the other lengths are, the targets are those of the protocol and its context."""
    context = 160
    protocol = protocols.protocol(name, lengths, context)
    assert protocol == protocols.protocol(name, (max(lengths),), context)
    assert [*protocol.stretches(context)] == []  # one token too few
    for size in (context + 1, 400, 1000):
        stretches = protocol.stretches(size)
        wanted = [t for first in stretches for t in range(first + 1, first + protocol.size + 1)]
        assert len(wanted) == len(set(wanted)) and max(wanted) < size
        assert len(wanted) > size - context - protocol.size
        for length in lengths:
            windows = [w for f in stretches for w in protocol.windows(3, f, length)]
            assert targets_of(windows) == [(3, target) for target in wanted]
            for w in windows:
                assert 0 <= w.start < w.end < size
                assert 0 < w.scored <= w.end - w.start <= length
                first = w.end - w.scored + 1  # of the targets
                if name == "same-tokens":
                    assert w.end - w.start == length and w.scored <= 10
                elif name == "non-overlapping":
                    assert first == w.start + 1
                else:
                    assert w.scored <= int(name.partition(":")[2])
                    assert w.end - w.start == min(length, w.end)


def test_what_context_is_left_out_of_blocks_and_kept_by_sliding():
    blocks = protocols.protocol("non-overlapping", (8,), 16)
    assert [*blocks.stretches(40)] == [0, 16]
    assert [(w.start, w.end) for w in blocks.windows(0, 16, 8)] == [(16, 24), (24, 32)]
    sliding = protocols.protocol("sliding:4", (8,), 16)
    assert [(w.start, w.end, w.scored) for w in sliding.windows(0, 0, 8)] == [
        (0, 4, 4), (0, 8, 4), (4, 12, 4), (8, 16, 4),
    ]  # fmt: skip
    same = protocols.protocol("same-tokens", (8,), 32)
    assert [*same.stretches(37)] == [30, 32, 34]  # the last targets are tokens 35 and 36
    assert [(w.start, w.end, w.scored) for w in same.windows(0, 30, 8)] == [(24, 32, 2)]
    assert [(w.start, w.end, w.scored) for w in same.windows(0, 30, 32)] == [(0, 32, 2)]


def targets_of_documents(loaded_model, held, protocol) -> list[Targets]:
    """All targets of documents (T,) of one set."""
    sizes = loaded_model.tokenizer.byte_lengths()
    documents = tuple(
        Document(str(i), tokens, sizes[tokens], stretches=tuple(protocol.stretches(len(tokens))))
        for i, tokens in enumerate(held)
    )
    scored = tuple(document for document in documents if document.stretches)
    return [Targets("s", scored, protocol.size, "all", len(held))]


@pytest.mark.parametrize("name", ["same-tokens", "non-overlapping", "sliding:12"])
def test_numbers_equal_a_plain_loop(run, name):
    """Each target by itself: full logits of the tokens before it, in float64 from there on."""
    loaded_model = loaded.load(run)
    config, rule = loaded_model.config, loaded_model.rule
    generator = np.random.default_rng(0)
    held = [generator.integers(0, 512, n, dtype=np.int32) for n in (150, 190, 31)]
    sizes = loaded_model.tokenizer.byte_lengths()
    protocol = protocols.protocol(name, LENGTHS, 128)
    targets = targets_of_documents(loaded_model, held, protocol)
    found = perplexity.Evaluation(loaded_model, targets, LENGTHS, protocol)(loaded_model.params)
    forward = jax.jit(lambda inputs: model.apply(config, loaded_model.params, inputs))
    assert [row["length"] for row in found["results"]] == list(LENGTHS)
    for row in found["results"]:
        length = row["length"]
        total = text_bytes = count = 0
        by_document = [0.0, 0.0]
        losses: dict = {"position": {}, "segment": {}, "offset": {}}
        beyond = dict.fromkeys(losses, 0)
        largest = dict.fromkeys(losses, 0)
        windows = [
            w
            for document in (0, 1)
            for first in protocol.stretches(len(held[document]))
            for w in protocol.windows(document, first, length)
        ]
        for w in windows:
            tokens = held[w.document]
            inputs = np.zeros((1, length), np.int32)
            inputs[0, : w.end - w.start] = tokens[w.start : w.end]
            logits = forward({"tokens": inputs, **segments.coordinates(inputs, rule)})
            logits = np.asarray(logits, np.float64)[0]
            state = plain_coordinates(tokens[w.start : w.end + 1], rule)
            for t in range(w.end - w.scored + 1, w.end + 1):
                scores = logits[t - 1 - w.start]
                loss = np.log(np.exp(scores).sum()) - scores[tokens[t]]
                total, count = total + loss, count + 1
                by_document[w.document] += loss
                text_bytes += sizes[tokens[t]]
                for n in losses:
                    where = t - w.start - (n == "position")  # the place it is predicted from
                    losses[n].setdefault(state[where][n], []).append(loss)
                    trained = next(
                        u["trained_max"]
                        for u in found["unseen"]
                        if (u["length"], u["coordinate"]) == (length, n)
                    )
                    of_input = state[t - 1 - w.start][n]
                    beyond[n] += of_input > trained
                    largest[n] = max(largest[n], of_input)
        assert row["tokens"] == count == sum(found["targets"][0]["tokens"])
        assert sum(found["targets"][0]["bytes"]) == text_bytes
        assert row["loss"] == pytest.approx(total / count, rel=1e-5)
        assert row["document_losses"] == pytest.approx(by_document, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / text_bytes, rel=1e-5)
        assert row["documents"] == 2 and row["documents_of_set"] == 3
        ends = np.cumsum([0, *(w.end - w.start for w in windows)])
        starts = [
            at + i
            for w, at in zip(windows, ends, strict=False)
            for i, state in enumerate(plain_coordinates(held[w.document][w.start : w.end], rule))
            if state["offset"] == 0
        ]
        of_segments = np.diff([*starts, ends[-1]])
        assert row["segment_tokens_mean"] == pytest.approx(of_segments.mean())
        assert row["segment_tokens_p99"] == np.percentile(of_segments, 99, method="inverted_cdf")
        assert row["segments_per_block"] == pytest.approx(len(of_segments) / len(windows))
        for part in found["breakdowns"]:
            if part["length"] != length:
                continue
            assert sum(b["tokens"] for b in part["bins"]) == count
            for b in part["bins"]:
                inside = [
                    x
                    for value, some in losses[part["by"]].items()
                    if b["from"] <= value <= b["to"]
                    for x in some
                ]
                assert b["tokens"] == len(inside)
                assert b["loss"] == pytest.approx(np.mean(inside), rel=1e-5)
        for unseen in found["unseen"]:
            if unseen["length"] == length:
                assert unseen["share"] == pytest.approx(beyond[unseen["coordinate"]] / count)
                assert unseen["max"] == largest[unseen["coordinate"]]


def plain_coordinates(tokens, rule):
    """Of each token, one after the other."""
    found, at = [], {"position": 0, "segment": 0, "offset": 0}
    for token in tokens:
        found.append(dict(at))
        ends = bool(rule.cuts(np.array([token]), np.array([at["position"]]))[0])
        at["position"] += 1
        at["segment"] += ends
        at["offset"] = 0 if ends else at["offset"] + 1
    return found


def test_training_range_is_that_of_blocks_of_the_training_length():
    rule = segments.Rule(separators=(0,))
    tokens = np.array(
        [1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    )  # blocks of 4; the rest is left out
    found = perplexity.training_range([tokens, np.array([1] * 3)], 4, rule)
    assert found == {"position": 3, "segment": 2, "offset": 3, "segments": (1 + 3 + 1) / 3}
    short = perplexity.training_range([np.array([1, 0, 1])], 4, rule)
    assert short == {"position": 3, "segment": 1, "offset": 1, "segments": 2.0}


@pytest.mark.parametrize("name", ["position", "segment", "offset"])
def test_bins_take_each_value_once(name):
    for largest in (0, 1, 2, 3, 7, 8, 9, 100, 1023, 1024, 30_000):
        starts = tally.edges(name, largest)
        assert starts[0] == 0 and (np.diff(starts) > 0).all()
        assert starts[-2] <= largest < starts[-1]
    assert tally.edges("position", 20).tolist() == [0, 1, 2, 4, 8, 16, 32]
    assert tally.edges("offset", 20).tolist() == [*range(9), 12, 16, 24]


def test_errors_are_over_documents(run):
    """Sixteen copies of two documents: a quarter of the error of the two."""
    loaded_model = loaded.load(run)
    generator = np.random.default_rng(1)
    sizes = loaded_model.tokenizer.byte_lengths()
    two = [generator.integers(low, 512, 200, dtype=np.int32) for low in (0, 450)]
    protocol = protocols.protocol("non-overlapping", (64,), 64)

    def row(held):
        targets = targets_of_documents(loaded_model, held, protocol)
        evaluation = perplexity.Evaluation(loaded_model, targets, (64,), protocol)
        return evaluation(loaded_model.params)["results"][0]

    assert row(two)["loss_error"] / row(two * 16)["loss_error"] == pytest.approx(4, rel=0.15)
    assert row(two[:1])["loss_error"] is None
    # Of two documents a resample has the first alone, both, or the second alone.
    text_bytes = [sizes[tokens[1:193]].sum() for tokens in two]
    assert not 0.8 < text_bytes[0] / text_bytes[1] < 1.25
    alone = [row([tokens])["bits_per_byte"] for tokens in two]
    both = np.average(alone, weights=text_bytes)
    error = row(two)["bits_per_byte_error"]
    assert error == pytest.approx(np.std([alone[0], both, both, alone[1]]), rel=0.1)


def test_memory_grows_linearly_with_length(run):
    """Bytes that XLA allots to the compiled scorer: 8 times the length takes at most 9 times as much."""
    loaded_model = loaded.load(run)

    def size(length):
        tokens = np.zeros((1, length), np.int32)
        batch = {"tokens": tokens, **segments.coordinates(tokens, loaded_model.rule)}
        places = np.arange(length - 32, length)[None]
        scorer = scoring.Scorer(loaded_model)
        rows, targets = np.arange(1), tokens[:, -32:]
        lowered = scorer._run.lower(loaded_model.params, batch, rows, places, targets, chunk=32)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert size(16384) <= 9 * size(2048)


def test_commands_write_tables_json_and_pictures(run, command, tmp_path):
    done = command(
        "evaluate", f"--checkpoint={run}", "--lengths=64,32", f"--output={tmp_path / 'a'}"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert {(row["set"], row["length"]) for row in result["results"]} == {
        (s, n) for s in "ab" for n in (32, 64)
    }
    for row in result["results"]:
        assert f"{row['perplexity']:.2f}" in done.stdout
        assert row["perplexity_error"] > 0
    for words in ("same-tokens", "BOS where a document begins", "rule sentence", "at 32 tokens"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 120  # the last has paths
    assert (tmp_path / "a" / "extrapolation.png").read_bytes()[:4] == b"\x89PNG"
    picture = tmp_path / "both.png"
    done = command("plot", str(tmp_path / "a"), str(tmp_path / "a"), f"--output={picture}")
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"
    done = command("plot", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/evaluation.json cannot be read")


@pytest.mark.parametrize("spec", ["linear:4", "ntk:4", "yarn:4", "yarn:4:9", "dynamic-ntk:2"])
def test_an_extended_model_is_scored_with_its_scaling(run, tmp_path, spec):
    """As a model with that scaling in its config; segments ran as far as in the training's blocks."""
    result = evaluate(run, Settings((32, 256), extend=spec), str(tmp_path / "a"))
    (kind, coordinate, *options) = result["position"]["relative"][0]
    assert (kind, coordinate) == ("rope", "segment")
    options = dict(options)
    assert options["scaling"] == spec.split(":")[0] and options["factor"] == float(
        spec.split(":")[1]
    )
    plain = evaluate(run, Settings((32, 256)), str(tmp_path / "b"))
    if spec == "yarn:4:9":
        assert options["original"] == 9
    elif "original" in options:
        blocks = [row["segments_per_block"] for row in plain["results"] if row["length"] == 32]
        assert min(blocks) / 2 < options["original"] < max(blocks) * 2
    loaded_model = loaded.load(run)
    relative = (("rope", "segment", *options.items()),)
    config = loaded_model.config.replace({"position.relative": relative})
    loaded_model = loaded.on_all_devices(config, loaded_model.params, loaded_model.tokenizer)
    settings = resolve(Settings((32, 256)), loaded_model.config)
    targets = read_targets(loaded_model.config, loaded_model.tokenizer, settings)
    protocol = protocols.protocol("same-tokens", (32, 256), settings.context)
    by_config = perplexity.Evaluation(loaded_model, targets, (32, 256), protocol)
    for row, wanted, before in zip(
        result["results"], by_config(loaded_model.params)["results"], plain["results"], strict=True
    ):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        if row["length"] == 256:
            assert row["loss"] != before["loss"]


def test_from_python_it_prints_nothing_and_takes_fields_by_name(run, tmp_path, capsys):
    result = evaluate(run, lengths=(32,), output=str(tmp_path / "a"))
    assert capsys.readouterr().out == ""
    assert result == evaluate(run, Settings(lengths=(32,)), str(tmp_path / "b")) | {"name": "a"}
    assert (
        result["results"] == json.loads((tmp_path / "a" / "evaluation.json").read_text())["results"]
    )
    with pytest.raises(TypeError, match="length"):
        evaluate(run, length=32)


def test_sets_are_chosen_by_name_and_missing_ones_said(run, tmp_path, capsys):
    settings = Settings(lengths=(32,), sets=("b", "c"))
    result = evaluate(run, settings, str(tmp_path))
    assert {row["set"] for row in result["results"]} == {"b"}
    assert "no document of the set 'c'" in capsys.readouterr().err


@pytest.mark.slow
def test_prepared_data_gives_what_its_text_gives(run, tokenizer_file, held_out, tmp_path):
    """Blocks longer than any document, one document each: the same documents."""
    prepare(held_out, str(tmp_path / "p"), tokenizer_file, length=6000, packing="document")
    found = [
        evaluate(run, Settings((32, 128), data, tokens=0), str(tmp_path / "out"))
        for data in (held_out, f"prepared:{tmp_path / 'p'}")
    ]
    for text, blocks in zip(*(result["results"] for result in found), strict=True):
        assert text["tokens"] > 10_000
        assert text.keys() == blocks.keys()
        for name, value in text.items():
            # The documents are in another order, so that other ones are resampled for an error.
            if name == "document_losses" or name.endswith("_error"):
                continue
            assert blocks[name] == (
                value if isinstance(value, str) else pytest.approx(value, rel=1e-6)
            )
        # What the errors are of is the same.
        of_documents = []
        for result, row in zip(found, (text, blocks), strict=True):
            targets = next(t for t in result["targets"] if t["set"] == row["set"])
            columns = row["document_losses"], targets["tokens"], targets["bytes"]
            of_documents.append(np.array(sorted(zip(*columns, strict=True))))
        np.testing.assert_allclose(*of_documents, rtol=1e-6)
    other = tmp_path / "other.model"
    from bipe_jax.data import tokenizer

    other.write_bytes(tokenizer.train(["Some other text. " * 50] * 50, 270, 50_000).model)
    prepare(held_out, str(tmp_path / "q"), str(other), length=64, packing="concat")
    with pytest.raises(UserError, match="another tokenizer than the model"):
        evaluate(run, Settings(data=f"prepared:{tmp_path / 'q'}"), str(tmp_path / "c"))


def test_wrong_input_is_refused_by_name(run, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        evaluate(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no complete checkpoint"):
        evaluate(str(tmp_path))
    for settings, line in (
        (Settings(data="none.jsonl"), r"no file matches 'none\.jsonl'"),
        (Settings(data="a.jsonl@1; b.jsonl@2"), "one source of text"),
        (Settings(lengths=(32, 100_000)), r"more than the context of .*: set --context=100000"),
        (Settings(lengths=(32,), context=100_000), "no document has 100,001 tokens"),
        (Settings(lengths=(1,)), "at least 2"),
        (Settings(extend="yarn"), "extension 'yarn' must be SCALING:FACTOR"),
        (Settings(extend="best:4"), "SCALING one of linear, ntk"),
        (Settings(extend="yarn:0.5"), "factor=0.5 must be at least 1"),
        (Settings(protocol="whole"), "--protocol=whole is unknown: use same-tokens"),
        (Settings(protocol="sliding"), "--protocol=sliding: the stride must be"),
        (Settings(protocol="sliding:33"), r"from 1 to the shortest length \(32\)"),
        (Settings(protocol="sliding:0"), "the stride must be"),
        (Settings(protocol="sliding:x"), "the stride must be"),
    ):
        with pytest.raises(UserError, match=line):
            evaluate(run, settings, str(tmp_path / "out"))


@pytest.mark.parametrize("scale", [math.nan, 1e3])
def test_diverged_parameters_are_refused(run, scale):
    loaded_model = loaded.load(run)
    protocol = protocols.protocol("same-tokens", (32,), 32)
    targets = targets_of_documents(loaded_model, [np.arange(100, dtype=np.int32)], protocol)
    found = perplexity.Evaluation(loaded_model, targets, (32,), protocol)
    params = jax.tree.map(lambda x: x * scale, loaded_model.params)
    with pytest.raises(UserError, match=r"loss of s at 32 tokens is .* diverged"):
        found(params)


def test_a_learned_table_of_position_cannot_be_exceeded(config, tmp_path):
    config.position.absolute, config.position.relative = (("learned", "position"),), ()
    train(config, str(tmp_path), stop_at=1)
    with pytest.raises(UserError, match="table of position ends at 32 tokens"):
        evaluate(str(tmp_path), Settings(lengths=(32, 64)))
    result = evaluate(str(tmp_path), Settings())  # as at the end of a training
    assert {row["length"] for row in result["results"]} == {32}


def test_default_lengths_are_those_that_the_model_has_rows_for():
    for entry, wanted in (
        (("learned", "position", ("size", 70)), (16, 32, 64)),
        (("learned", "offset"), (16, 32, 64, 128)),
    ):
        config = tiny_plan(position__absolute=(entry,), position__relative=())
        assert perplexity.default_lengths(config, (1, 2, 4, 8)) == wanted


def test_training_refuses_what_its_evaluation_would(command, tmp_path):
    done = command(
        "train", "--config=configs/smoke.py", f"--workdir={tmp_path / 'run'}",
        "--config.position.absolute=(('learned', 'position'),)", "--config.position.relative=()",
        "--config.evaluation.lengths=(32, 64)",
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: the learned table of position ends at 32 tokens" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_the_end_needs_is_checked_before_the_training(config, command, tmp_path):
    """By the command: mistyped data, and documents that are too short for the lengths."""
    for i, (name, value, line) in enumerate(
        (
            ("data.evaluation", f"{tmp_path}/none.jsonl", "no file matches"),
            ("evaluation.lengths", "(32,100000)", "no document has 100,001 tokens"),
            ("data.sets", "('c',)", "holds no document"),
        )
    ):
        workdir = tmp_path / str(i)
        done = command(
            "train", "--config=configs/smoke.py", f"--config.data.train={config.data.train}",
            f"--config.data.evaluation={config.data.evaluation}",
            f"--config.tokenizer.path={config.tokenizer.path}", f"--config.{name}={value}",
            f"--workdir={workdir}",
        )  # fmt: skip
        assert done.returncode == 1 and line in done.stderr.splitlines()[-1]
        assert line in (workdir / "failed").read_text()
        assert not (workdir / "metrics.jsonl").exists()


def lossy_model(texts, **options) -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=400, minloglevel=2, **options
    )
    return model.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},  # by default it squeezes spaces and newlines, and has <unk>
        {"model_type": "bpe", "character_coverage": 0.98},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf"},
        {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity"},
    ],
)
def test_bytes_are_those_of_the_text_whatever_the_tokenizer(texts, options):
    from bipe_jax.data import marked, tokenizer

    lines = [line for text in texts for line in text.splitlines() if line]
    tokens = tokenizer.Tokenizer(lossy_model(lines, **options))
    hard = "  ﬁne   naïve ①\t中文 \u200b\x07😀\r\n\n\nİstanbul ŉ  "
    for text in (*texts[:5], hard, "", " ", "中", "\u200b", hard * 3):
        encoded, sizes = marked.encode_whole(tokens, {"text": text}, ())
        ids = encoded["tokens"]
        assert ids.tolist() == tokens.encode(text).tolist()
        assert len(ids) == len(sizes) and (sizes >= 0).all()
        assert sizes.sum() == len(text.encode()) * (len(ids) > 0)


def test_how_much_text_a_tokenizer_replaces(texts, tokenizer_file):
    from bipe_jax.data import tokenizer

    exact = tokenizer.load(tokenizer_file)
    assert [exact.replaced_bytes(text) for text in ("", "a  b\n", "中文 ﬁ")] == [0, 0, 0]
    lines = [line for text in texts for line in text.splitlines() if line]
    lossy = tokenizer.Tokenizer(lossy_model(lines, model_type="unigram"))
    assert lossy.replaced_bytes("the") == 0
    # The bytes of pieces that stand for something else: a space, or a word, may be of the same piece.
    assert 3 <= lossy.replaced_bytes("the 中") <= 4
    assert 3 <= lossy.replaced_bytes("the ﬁ") <= 4
    assert 2 <= lossy.replaced_bytes("the  the") <= 5
