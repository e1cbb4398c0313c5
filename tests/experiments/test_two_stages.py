"""Experiments of two stages: their values, predictions, and data that are prepared once."""

import json

import pytest

from bipe_jax import flags
from bipe_jax.data import questions, tokenizer
from bipe_jax.errors import UserError
from bipe_jax.evaluation import answers
from bipe_jax.experiments import registry, retrieval_text, scrolls
from bipe_jax.experiments.experiment import Cell
from bipe_jax.experiments.outcomes import Key, Outcomes
from bipe_jax.experiments.points import stages
from bipe_jax.plan import make


@pytest.mark.parametrize("name", ["retrieval-text", "passkey", "scrolls"])
def test_each_encoding_is_tuned_after_its_own_text(name):
    experiment = registry.find(name)
    for size in ("quick", "laptop", "paper"):
        bases, tuned = stages(experiment, size, 1, "out")
        assert len(bases) == len(tuned) == len(experiment.arms(size)) / 2
        for point in tuned:
            assert point.base.name == f"{point.arm.name}-text-seed{point.seed}"
            assert point.overrides["initial_checkpoint"] == point.base.workdir
            for entry in ("position.absolute", "position.relative"):
                assert point.overrides[entry] == point.base.overrides[entry]
            assert "OUTPUT" not in json.dumps(point.overrides)
        assert experiment.arms(size)[0].name == "bipe_rope"  # the baseline is no base
    elsewhere = stages(experiment, "paper", 1, "else/where")[1]
    assert [p.identity for p in elsewhere] == [p.identity for p in tuned]


def item(ask, lines, k, whole, first_wrong=None):
    labels = {"ask": ask, "lines": lines, "k": k}
    return {"labels": labels, "whole": whole, "first_wrong": first_wrong, "learned": 4}


def test_answers_are_told_apart_by_k_and_whether_it_was_seen():
    items = [item("line", 16, 3, True), item("line", 64, 16, False, 1), item("line", 64, 64, True),
             item("line", 128, 65, False, 3), item("back", 64, 5, True)]  # fmt: skip
    cells = retrieval_text.cells({"answers.json": {"results": [{"items": items}]}})
    right = [cell for cell in cells if cell.measure == "answer right"]
    assert {cell.condition for cell in right} == {
        "line, all k", "line, k 1-4, seen", "line, k 5-16, seen", "line, k 17-64, not seen",
        "line, k from 65, not seen", "back, all k", "back, k 5-16, seen",
    }  # fmt: skip
    assert Cell("answer right", "line, k 17-64, not seen", 64, True, 1) in cells
    assert Cell("answer right", "line, all k", 128, False, 1) in cells
    before = "tokens of the answer before the first wrong one"
    assert Cell(before, "line, all k", 128, 3, 4) in cells
    assert Cell(before, "line, all k", 16, 4, 4) in cells


def test_the_loss_on_text_is_not_taken_for_one_by_lines():
    row = {"set": "Plays", "length": 512, "loss": 2.0, "perplexity": 7.4, "tokens": 100}
    (cell,) = retrieval_text.cells({"evaluation.json": {"results": [row]}})
    assert cell == Cell("loss on text by tokens, nats", "Plays", 512, 200.0, 100)


def test_predictions_of_retrieval_compare_what_is_tuned():
    experiment = registry.find("passkey")
    keys = [Key("answer right", "passkey, all k", x) for x in (16, 32, 128)]

    def of(own, rope):
        values = {
            arm: {key: {0: (right, 10)} for key, right in zip(keys, of_arm, strict=True)}
            for arm, of_arm in (("bipe_rope", own), ("rope", rope))
        }
        made = Outcomes(["bipe_rope", "rope", "bipe_rope, text", "rope, text"], values)
        return [prediction.outcome(made) for prediction in experiment.predictions]

    (words, near), (_, far) = of((10, 9, 8), (10, 9, 3))
    assert near is True and far is True
    assert "rope: 100.0%" in words and "text" not in words
    assert [verdict for _, verdict in of((10, 9, 8), (10, 2, 8))] == [False, False]
    assert experiment.predictions[0].outcome(Outcomes(["bipe_rope"], {}))[1] is None


def result(tokens, score):
    rows = [
        {"task": "lines", "score": score, "choice": None, "option": None},
        {"task": "orders", "score": score + 10, "choice": 50.0, "option": 25.0},
    ]
    return {"tokens": tokens, "results": rows, "mean": score + 5}


def test_scores_are_told_apart_by_data_set_with_the_mean():
    files = {
        "evaluation.json": {},
        "1x/scrolls.json": result(640, 20.0),
        "2x/scrolls.json": result(1280, 10.0),
    }
    cells = scrolls.cells(files)
    assert Cell("score", "orders", 640, 30.0, 1) in cells
    assert Cell("score", "mean", 1280, 15.0, 1) in cells
    choices = [cell for cell in cells if cell.measure == "likeliest option right"]
    assert [(cell.condition, cell.x) for cell in choices] == [("orders", 640), ("orders", 1280)]


def test_predictions_of_scrolls_are_of_means_and_data_sets():
    def of(**of_arms):
        values = {
            arm: {
                Key(cell.measure, cell.condition, cell.x): {0: (cell.right, cell.total)}
                for cell in scrolls.cells(
                    {"1x/scrolls.json": result(640, here), "2x/scrolls.json": result(1280, there)}
                )
            }
            for arm, (here, there) in of_arms.items()
        }
        made = Outcomes(list(of_arms), values, scrolls.SCROLLS.measures)
        return [prediction.outcome(made)[1] for prediction in scrolls.SCROLLS.predictions]

    assert of(bipe_rope=(20, 15), rope=(10, 4)) == [True, None, True]
    assert of(bipe_rope=(20, 5), rope=(19, 9), alibi=(3, 3), nope=(21, 1)) == [False, True, False]
    assert of(bipe_rope=(20, 5), rope=(30, 9), alibi=(3, 3), nope=(21, 1))[1] is False


@pytest.mark.parametrize("name", ["retrieval-text", "scrolls"])
def test_data_are_prepared_once_and_can_be_read(name, tmp_path, monkeypatch, tokenizer_file):
    for module in (retrieval_text, scrolls):
        monkeypatch.setitem(module._TRAINED, "quick", 4)
        monkeypatch.setitem(module._TESTED, "quick", 2)
    experiment = registry.find(name)
    experiment.prepare("quick", str(tmp_path / "data" / "quick"))
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(written) == {"retrieval-text": 4 * 4, "scrolls": 3 * 4}[name]
    next(iter(written)).unlink()
    kept = list(written)[1]
    kept.write_bytes(b"kept")
    experiment.prepare("quick", str(tmp_path / "data" / "quick"))
    assert kept.read_bytes() == b"kept"
    kept.write_bytes(written[kept])
    assert {path: path.read_bytes() for path in written} == written
    _, tuned = stages(experiment, "quick", 1, str(tmp_path))
    point = tuned[0]
    texts = [
        f"--config.{key}={value}"
        for key, value in point.overrides.items()
        if key.startswith("data.")
    ]
    config = make(flags.read_config([f"--config={experiment.config}:quick", *texts]))
    if name == "retrieval-text":
        answers.check_examples(config, tokenizer.load(tokenizer_file))
    assert config.training.sources


def test_a_missing_data_set_is_named_before_any_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"neither scrolls/gov_report/validation\.jsonl nor"):
        registry.find("scrolls").prepare("paper", str(tmp_path))


def test_questions_of_tests_have_other_seeds_and_documents(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(questions, "write", lambda path, lines: made.append((path, list(lines))))
    monkeypatch.setitem(retrieval_text._TRAINED, "laptop", 2)
    monkeypatch.setitem(retrieval_text._TESTED, "laptop", 2)
    registry.find("retrieval-text").prepare("laptop", str(tmp_path))
    for path, lines in made:
        labels = [line["labels"] for line in lines]
        if "train" in path:
            assert all(4 <= of["lines"] <= 16 and of["k"] <= 16 for of in labels)
        elif "beyond" in path:
            assert all(of["k"] > 16 for of in labels)
        else:
            assert all(of["k"] <= 16 for of in labels)
    assert len(made) == 4 * (1 + 4 + 3)
