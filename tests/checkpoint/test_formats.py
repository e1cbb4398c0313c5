"""A checkpoint that was written before checkpoints had a format number (tests/before_formats)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

import bipe_jax
from bipe_jax import checkpoint
from bipe_jax.config import FORMAT
from bipe_jax.data import marked, quickstart
from bipe_jax.evaluation import decode, loaded, perplexity
from bipe_jax.evaluation.evaluator import evaluate
from bipe_jax.evaluation.protocols import Protocol
from bipe_jax.evaluation.targets import Document, Targets
from bipe_jax.training.trainer import train
from configs import smoke

DATA = ROOT / "tests" / "before_formats"


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A copy of the run's directory, as it was at step 4 of 8."""
    directory = tmp_path / "run"
    shutil.copytree(DATA, directory)
    return directory


def run_config():
    """The run's config, as its command line said it (tests/before_formats/README.md)."""
    c = smoke.get_config()
    c.steps, c.batch_size = 8, 4
    c.model.width, c.model.feed_forward, c.model.vocab_size = 16, 32, 384
    c.tokenizer.train_bytes = 60_000
    c.checkpoint.every, c.log.every = 4, 2
    c.evaluation.lengths = (32, 64)
    c.data.shuffle_blocks = 32
    return c


def losses(directory) -> list[float]:
    with open(directory / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["loss"] for line in file]


def test_it_is_loaded_and_applied():
    config, params = bipe_jax.load(DATA)
    assert config.model.vocab_size == 384 and config.model.width == 16
    assert config.segment_rule.separators  # of the config then, of the meta data now
    logits = bipe_jax.apply(config, params, np.arange(64).reshape(2, 32))
    assert np.isfinite(logits).all()


def targets_of_then(tokenizer) -> list[Targets]:
    """4 windows of 32 targets a set, evenly spaced over the documents, with 64 tokens or more."""
    sets: dict[str, list] = {}
    for document in quickstart.documents("validation"):
        encoded, sizes = marked.encode_whole(tokenizer, document, ())
        sets.setdefault(document["set"], []).append((encoded["tokens"], sizes))
    made = []
    for name, documents in sets.items():
        ends = [(i, e) for i, (t, _) in enumerate(documents) for e in range(64, len(t), 32)]
        chosen = [ends[i] for i in np.linspace(0, len(ends) - 1, 4).round().astype(int)]
        some = tuple(
            Document(str(i), *documents[i], stretches=tuple(e - 32 for j, e in chosen if j == i))
            for i in dict.fromkeys(i for i, _ in chosen)
        )
        made.append(Targets(name, some, 32, "", len(documents)))
    return made


def test_it_is_evaluated(tmp_path):
    """On the targets of that program its numbers are found again."""
    model = loaded.load(DATA)
    protocol = Protocol("same-tokens", 32, 32, 32, True)
    targets = targets_of_then(model.tokenizer)
    result = perplexity.Evaluation(model, targets, (32, 64), protocol)(model.params)
    wanted = json.loads((DATA / "evaluation.json").read_text())
    assert (
        evaluate(str(DATA), output=str(tmp_path / "now"), tokens=256)["step"] == wanted["step"] == 4
    )
    assert [(r["set"], r["length"]) for r in result["results"]] == [
        (r["set"], r["length"]) for r in wanted["results"]
    ]
    for row, expected in zip(result["results"], wanted["results"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert row["perplexity_error"] == pytest.approx(expected["perplexity_error"], rel=1e-4)
        assert row["tokens"] == expected["tokens"]


def test_it_is_decoded():
    model = loaded.load(DATA)
    wanted = json.loads((DATA / "generated.json").read_text())
    prompt = model.tokenizer.encode(wanted["prompt"])
    (answer,) = decode.Generator(model, 64)([prompt], len(wanted["tokens"]))
    assert answer.tolist() == wanted["tokens"]


def test_it_is_resumed(workdir):
    """The losses are those of the program that wrote it, to the rounding of another processor."""
    assert train(run_config(), str(workdir))
    assert losses(workdir) == pytest.approx(losses(DATA), rel=1e-5)
    assert checkpoint.steps(workdir) == [4, 8]
    recorded = json.loads((workdir / "config.json").read_text())
    assert recorded["format"] == FORMAT and "separators" not in recorded["segments"]
    meta, _ = checkpoint.load(workdir)
    assert meta.step == 8
    assert meta.config.rule == checkpoint.load(DATA)[0].config.rule


@pytest.mark.slow
def test_a_new_run_starts_from_it(workdir, tmp_path):
    config = run_config()
    config.initial_checkpoint = str(workdir)
    config.position.relative = (("t5", "segment"),)
    config.steps, config.schedule.warmup_steps = 4, 1
    assert train(config, str(tmp_path / "tuned"))
    # It knows what the old run had learnt: it starts below where that one started.
    assert losses(tmp_path / "tuned")[0] < losses(DATA)[0] - 0.005
