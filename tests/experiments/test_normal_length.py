"""Questions about short texts, and what the harness says of them as values of an experiment."""

import json
import subprocess
import sys

import pytest
from paths import ROOT

from bipe_jax.data import quickstart
from bipe_jax.experiments import normal_length, registry
from bipe_jax.experiments.experiment import Cell


def test_the_right_choice_follows_the_context_and_the_others_do_not():
    texts = [document["text"] for document in quickstart.documents("validation")]
    made = list(normal_length.questions())
    assert len(made) >= 1000
    for question in made:
        right = question["choices"][question["answer"]]
        within = [text for text in texts if question["context"] + right in text]
        assert within and len(question["choices"]) == 4
        assert all(any(choice in text for text in within) for choice in question["choices"])
        assert question["choices"].count(right) == 1
    answers = [question["answer"] for question in made]
    assert all(0.2 < answers.count(i) / len(answers) < 0.3 for i in range(4))


def test_a_task_of_the_harness_is_written(tmp_path):
    experiment = registry.find("normal-length")
    experiment.prepare("quick", str(tmp_path))
    lines = (tmp_path / "continuation.jsonl").read_text().splitlines()
    assert len(lines) == 40 and len({json.loads(line)["context"] for line in lines}) > 30
    assert str(tmp_path / "continuation.jsonl") in (tmp_path / "continuation.yaml").read_text()
    experiment.prepare("paper", str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_accuracies_are_counts_of_questions():
    files = {
        "short/harness.json": {
            "training_length": 128,
            "results": {"piqa": {"acc,none": 0.6, "acc_norm,none": 0.7}, "group": {"alias": "g"}},
            "n-samples": {"piqa": {"original": 30, "effective": 20}},
        },
        "evaluation.json": {"results": []},
    }
    assert normal_length.cells(files) == [Cell("accuracy", "piqa", 128, 12, 20)]


@pytest.mark.slow
def test_models_answer_through_the_harness(tmp_path):
    pytest.importorskip("lm_eval")
    line = ["bipe_jax.experiments", "normal-length", "--size=quick", f"--output={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", *line], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    (rope, bipe) = (row for row in rows if row["measure"] == "accuracy")
    assert (rope["arm"], bipe["arm"]) == ("rope", "bipe_rope")
    for row in (rope, bipe):
        (result,) = tmp_path.glob(f"evaluations/{row['arm']}-seed0/short/harness.json")
        assert row["mean"] == json.loads(result.read_text())["results"]["continuation"]["acc,none"]
