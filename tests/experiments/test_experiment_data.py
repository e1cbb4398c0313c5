"""The data that an experiment prepares: written once, and known to its points."""

import dataclasses
from pathlib import Path

import pytest

from bipe_jax.errors import UserError
from bipe_jax.experiments import registry, runner
from bipe_jax.experiments.experiment import DATA
from bipe_jax.experiments.points import stages


def test_a_missing_module_is_named_before_any_training(tmp_path, monkeypatch):
    """It would be needed after the trainings."""
    monkeypatch.setattr(runner, "_sweep", lambda *_: pytest.fail("it was trained"))
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    for name, message in {
        "normal-length": r"normal-length needs lm_eval: pip install -e '\.\[eval\]'",
        "scrolls": "scrolls needs rouge_score",
        "modalities-chess": "modalities-chess needs chess",
    }.items():
        experiment = registry.find(name)
        points = stages(experiment, "quick", 1, str(tmp_path))
        with pytest.raises(UserError, match=message):
            runner.run(experiment, "quick", points, str(tmp_path), ())
    assert not list(tmp_path.iterdir())


def test_data_are_prepared_once_and_an_interrupted_preparation_is_repeated(tmp_path, monkeypatch):
    output, prepared = str(tmp_path), []

    def prepare(size, directory):
        prepared.append(size)
        Path(directory, "train.jsonl").write_text(size)
        if len(prepared) == 1:
            raise UserError("no room")

    experiment = dataclasses.replace(
        registry.find("fold"),
        prepare=prepare,
        data=lambda size, seed, options: {"data.train": f"{DATA}/train.jsonl"},
    )
    (points,) = stages(experiment, "quick", 1, output)
    (elsewhere,) = stages(experiment, "quick", 1, f"{output}/elsewhere")
    path = Path(points[0].overrides["data.train"])
    assert path.parent.parent.parent == tmp_path
    assert [point.identity for point in points] == [point.identity for point in elsewhere]
    swept = []
    monkeypatch.setattr(runner, "_sweep", lambda *_: swept.append(path.read_text()) or 1)
    with pytest.raises(UserError, match="no room"):
        runner.run(experiment, "quick", [points], output, ())
    assert not swept
    for _ in range(2):
        runner.run(experiment, "quick", [points], output, ())
    assert swept == ["quick", "quick"] and prepared == ["quick", "quick"]
