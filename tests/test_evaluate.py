"""Evaluation by length: the protocol, its numbers, its files and its errors."""

import json
import math

import jax
import numpy as np
import pytest

from bipe_jax import checkpoint, inference, model, perplexity, segments
from bipe_jax.errors import UserError
from bipe_jax.evaluate import evaluate
from bipe_jax.train import train

LENGTHS = (32, 64, 128)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_file, shards, held_out):
    from configs import smoke

    config = smoke.get_config()
    config.tokenizer.path = tokenizer_file
    config.data.train, config.data.evaluation = shards, held_out
    workdir = str(tmp_path_factory.mktemp("run"))
    train(config, workdir)
    return workdir


@pytest.mark.parametrize("limit", [5, 10_000])
def test_windows_score_each_target_once_with_room_for_the_longest(limit):
    lengths = [10, 128, 129, 400, 1000]
    windows = perplexity.choose_windows(lengths, LENGTHS, limit)
    assert len(windows) == min(limit, sum(len(range(128, n, 32)) for n in lengths))
    seen = set()
    for window in windows:
        assert max(LENGTHS) <= window.end < lengths[window.document]
        targets = {(window.document, t) for t in range(window.end - 31, window.end + 1)}
        assert not targets & seen
        seen |= targets
    assert {w.document for w in perplexity.choose_windows(lengths, LENGTHS, 10_000)} == {2, 3, 4}


def test_perplexities_equal_a_plain_loop(run):
    """Each target by itself: full logits of the tokens before it, in float64 from there on."""
    meta, params = checkpoint.load(run)
    config = meta.config
    config.evaluation.windows = 3
    rule = segments.rule_of(config)
    generator = np.random.default_rng(0)
    documents = [
        {"set": "s", "tokens": generator.integers(0, 512, n, dtype=np.int32)} for n in (150, 190)
    ]
    sizes = meta.tokenizer.byte_lengths()
    rows = perplexity.by_length(config, params, documents, sizes, LENGTHS)
    assert [row["length"] for row in rows] == list(LENGTHS)
    windows = perplexity.choose_windows([150, 190], LENGTHS, 3)
    forward = jax.jit(lambda inputs: model.apply(config, params, inputs))
    for row in rows:
        total = text_bytes = 0
        for window in windows:
            tokens = documents[window.document]["tokens"]
            inputs = tokens[None, window.end - row["length"] : window.end]
            logits = forward({"tokens": inputs, **segments.coordinates(inputs, rule)})
            logits = np.asarray(logits, np.float64)[0]
            for back in range(32):
                target = tokens[window.end - back]
                scores = logits[-1 - back]
                total -= scores[target] - np.log(np.exp(scores).sum())
                text_bytes += sizes[target]
        assert row["tokens"] == 32 * len(windows)
        assert row["loss"] == pytest.approx(total / (32 * len(windows)), rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / text_bytes, rel=1e-5)


def test_standard_error_over_documents():
    """With equal counts it is the textbook error of a mean; with unequal ones, near the jackknife."""
    generator = np.random.default_rng(0)
    means = generator.normal(3, 1, 50)
    ratio, error = perplexity.ratio_and_error(means * 32, np.full(50, 32.0))
    assert ratio == pytest.approx(means.mean())
    assert error == pytest.approx(means.std(ddof=1) / math.sqrt(50))

    counts = generator.integers(20, 40, 400).astype(float)
    totals = counts * generator.normal(3, 1, 400)
    left_out = (totals.sum() - totals) / (counts.sum() - counts)
    jackknife = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    assert perplexity.ratio_and_error(totals, counts)[1] == pytest.approx(jackknife, rel=0.01)
    assert math.isnan(perplexity.ratio_and_error(totals[:1], counts[:1])[1])


def test_memory_grows_linearly_with_length(run):
    """Bytes that XLA allots to the compiled scorer: 8 times the length takes at most 9 times as much."""
    meta, params = checkpoint.load(run)
    rule = segments.rule_of(meta.config)

    def size(length):
        tokens = np.zeros((1, length), np.int32)
        batch = {"tokens": tokens, **segments.coordinates(tokens, rule)}
        scorer = perplexity.Scorer(inference.place(meta.config, params))
        lowered = scorer._run.lower(params, batch, tokens[:, -32:], 32)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert size(16384) <= 9 * size(2048)


def test_commands_write_table_json_and_pictures(run, command, tmp_path):
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
    assert (tmp_path / "a" / "extrapolation.png").read_bytes()[:4] == b"\x89PNG"
    picture = tmp_path / "both.png"
    done = command("plot", str(tmp_path / "a"), str(tmp_path / "a"), f"--output={picture}")
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"
    done = command("plot", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/evaluation.json cannot be read")


def test_wrong_input_is_refused_by_name(run, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        evaluate(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no complete checkpoint"):
        evaluate(str(tmp_path))
    with pytest.raises(UserError, match=r"no file matches 'none\.jsonl'"):
        evaluate(run, data="none.jsonl")
    with pytest.raises(UserError, match="no document has 100001 tokens"):
        evaluate(run, lengths=(32, 100_000))
    with pytest.raises(UserError, match="at least 2"):
        evaluate(run, lengths=(1,))


def test_a_learned_table_of_position_cannot_be_exceeded(config, tmp_path):
    config.position.absolute, config.position.relative = (("learned", "position"),), ()
    train(config, str(tmp_path), stop_at=1)
    with pytest.raises(UserError, match="table of position ends at 32 tokens"):
        evaluate(str(tmp_path), lengths=(32, 64))
