"""A target that a run has reached already: nothing is trained, deleted or rewritten."""

import json
from pathlib import Path

import pytest
from tiny import overrides

from bipe_jax.data.batches import Batches
from bipe_jax.errors import PREEMPTED, UserError
from bipe_jax.training.trainer import train
from bipe_jax.workdir import events, heartbeat

OBSERVED = {"trainer.lock", "events.jsonl", "heartbeat.json"}  # say that there was a start


@pytest.fixture
def saved(config, tmp_path):
    """The workdir of a run that was killed at step 10, with checkpoints of steps 4 and 8."""
    train(config, str(tmp_path), stop_at=8)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        for step in (9, 10):
            file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
    return tmp_path


@pytest.fixture
def no_data(monkeypatch):
    """No batch is read: a loop without end fails."""
    monkeypatch.setattr(Batches, "__next__", lambda self: pytest.fail("a step is trained"))


def snapshot(workdir) -> dict:
    paths = [path for path in Path(workdir).rglob("*") if path.name not in OBSERVED]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_stop_at_a_step_that_is_past(config, saved, no_data, stop_at):
    before = snapshot(saved)
    assert train(config, str(saved), stop_at=stop_at) is False
    assert snapshot(saved) == before
    assert events.read(str(saved))[-1]["event"] == "preempted"
    assert heartbeat.read(str(saved))["phase"] == "preempted"


@pytest.mark.parametrize("stop_at", [None, 3, 8, 20])
def test_all_steps_are_trained_already(config, saved, no_data, stop_at, capsys):
    config.steps = 8
    before = snapshot(saved)
    assert train(config, str(saved), stop_at=stop_at) is True
    assert snapshot(saved) == before
    assert events.read(str(saved))[-1]["event"] == "done"
    assert f"{saved} has a checkpoint of step 8: nothing to train" in capsys.readouterr().err


def test_another_learning_rate_of_a_finished_run_is_recorded_nowhere(config, saved, no_data):
    config.steps, config.optimizer.learning_rate = 8, 0.5
    before, recorded = snapshot(saved), (saved / "config.json").read_text()
    assert train(config, str(saved))
    assert snapshot(saved) == before and json.loads(recorded)["optimizer"]["learning_rate"] != 0.5
    assert {event["event"] for event in events.read(saved)} >= {"started", "done"}
    assert "changed" not in {event["event"] for event in events.read(saved)}


def test_a_start_that_fails_before_its_first_step_is_recorded_nowhere(config, saved, monkeypatch):
    def fail(_):
        raise UserError("no data")

    before = {name: (saved / name).read_text() for name in ("config.json", "starts/1.json")}
    monkeypatch.setattr(Batches, "__next__", fail)
    config.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match="no data"):
        train(config, str(saved))
    assert {name: (saved / name).read_text() for name in before} == before
    assert [path.name for path in (saved / "starts").iterdir()] == ["1.json"]


@pytest.mark.parametrize("stop_at", [None, 3])
def test_fewer_steps_than_the_checkpoint_has_are_refused(config, saved, no_data, stop_at):
    config.steps = 7
    before = snapshot(saved)
    with pytest.raises(UserError) as caught:
        train(config, str(saved), stop_at=stop_at)
    assert str(caught.value) == (
        f"config.steps=7, but the run in {saved} has a checkpoint of step 8: set config.steps to at "
        "least 8, or use another --workdir"
    )
    assert snapshot(saved) == before


def test_a_longer_run_resumes_as_before(config, saved):
    config.steps = 10
    assert train(config, str(saved))
    lines = [json.loads(line) for line in (saved / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["loss"] != 1.0


def test_exit_codes(config, saved, command):
    """Of the command: as when the target is reached by training; the evaluation is that of the config."""

    def run(steps, *more):
        line = ["--config=configs/smoke.py", f"--workdir={saved}", f"--config.steps={steps}"]
        return command("train", *line, *overrides(config), *more, timeout=120)

    done = run(12, "--stop_at=5")
    assert done.returncode == PREEMPTED, done.stderr
    done = run(7)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: config.steps=7, but the run in ")
    done = run(8)
    assert done.returncode == 0, done.stderr
    result = json.loads((saved / "evaluation.json").read_text())
    assert {row["length"] for row in result["results"]} == {
        32
    }  # the checkpoint's config has others
    assert result["step"] == 8
