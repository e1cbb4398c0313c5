"""Following a run: each checkpoint once, from another process, whatever is deleted meanwhile."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bipe_jax import checkpoint
from bipe_jax.checkpoint import reading
from bipe_jax.errors import UserError
from bipe_jax.evaluation import follow
from bipe_jax.evaluation.evaluator import Settings, evaluate
from bipe_jax.training.observing import evaluation_boards
from bipe_jax.training.trainer import train
from bipe_jax.workdir import files


@pytest.fixture
def run(config, tmp_path):
    """A run with checkpoints of steps 4, 8 and 12."""
    train(config, str(tmp_path / "run"))
    return tmp_path / "run"


def start(workdir, output, **kwargs):
    line = [sys.executable, "-m", "bipe_jax.evaluate", f"--checkpoint={workdir}", "--follow",
            "--lengths=32,64", f"--output={output}"]  # fmt: skip
    return subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, **kwargs)


def evaluated(text):
    return [int(step) for step in re.findall(r"^step (\d+)$", text, re.M)]


def snapshot(directory):
    return {p: p.stat().st_mtime_ns for p in Path(directory).rglob("*")}


@pytest.mark.slow
def test_a_follower_beside_a_training_evaluates_each_checkpoint_once(
    config, tmp_path, tokenizer_file
):
    """It starts before the run, is killed on the way and started again; the run deletes checkpoints."""
    workdir, output = tmp_path / "run", tmp_path / "out"
    follower = start(workdir, output)
    config.steps, config.checkpoint.every, config.checkpoint.keep = 40, 2, 1
    file = tmp_path / "run.py"
    # A slow run: what is tested is who reads while who writes.
    file.write_text(
        "import time\nimport sys\nfrom bipe_jax import config\n"
        "from bipe_jax.data.batches import Batches\nfrom bipe_jax.training.trainer import train\n"
        f"c = {config.to_dict()!r}\n"
        "old = Batches.__next__\n"
        "def slowly(self):\n    time.sleep(0.15)\n    return old(self)\n"
        "Batches.__next__ = slowly\n"
        f"train(c, {str(workdir)!r})\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, file], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    until = time.monotonic() + 120
    while not list(output.glob("evaluations/*.json")) and time.monotonic() < until:
        time.sleep(0.1)
    follower.send_signal(signal.SIGKILL)
    first = evaluated(follower.communicate()[1])
    before = {p.name: p.stat().st_mtime_ns for p in output.glob("evaluations/*.json")}
    assert before
    again = start(workdir, output)
    text = again.communicate(timeout=180)[1]
    assert trainer.wait() == 0 and again.returncode == 0, text
    second = evaluated(text)
    results = {int(p.stem): p for p in output.glob("evaluations/*.json")}
    # What was done is not done again; what was begun is, unless the run has deleted it since.
    assert not {int(name[:-5]) for name in before} & set(second)
    assert set(results) == {int(name[:-5]) for name in before} | set(second)
    assert {p.name: p.stat().st_mtime_ns for p in results.values()}.items() >= before.items()
    assert len(second) == len(set(second)) and second[-1] == 40
    passed = [int(s) for s in re.findall(r"^step (\d+): was deleted", text, re.M)]
    assert not set(passed) & set(results)
    assert set(first[:-1]) <= set(results)
    for step, path in results.items():
        result = json.loads(path.read_text())
        assert result["step"] == step and len(result["results"]) == 4
    assert json.loads((output / "evaluation.json").read_text())["step"] == 40
    assert checkpoint.steps(workdir) == [38, 40]


@pytest.mark.slow
def test_it_only_reads_and_ends_at_once_when_all_is_done(run, tmp_path, capsys):
    before = snapshot(run)
    follow.follow(str(run), Settings(lengths=(32,)), str(tmp_path / "out"))
    assert evaluated(capsys.readouterr().err) == [4, 8, 12]
    assert snapshot(run) == before
    losses = []
    for step in (4, 8, 12):
        copy = shutil.copytree(run / "checkpoints" / str(step), tmp_path / "copies" / str(step))
        wanted = evaluate(str(copy), Settings(lengths=(32,)), str(tmp_path / "one"))["results"]
        found = json.loads((tmp_path / "out" / "evaluations" / f"{step}.json").read_text())
        assert found["results"] == wanted
        losses.append(wanted[0]["loss"])
    assert len(set(losses)) == 3
    follow.follow(str(run), Settings(lengths=(32,)), str(tmp_path / "out"))
    text = capsys.readouterr().err
    assert evaluated(text) == []
    assert f"Evaluated already, as {tmp_path}/out/evaluations says: steps 4, 8, 12\n" in text
    with pytest.raises(UserError, match="is one checkpoint, not a run"):
        follow.follow(str(run / "checkpoints" / "8"), Settings(lengths=(32,)))
    assert snapshot(run) == before


def test_a_checkpoint_that_vanishes_while_it_is_read_is_skipped(run, tmp_path, capsys, monkeypatch):
    whole = reading.meta_of

    def vanishing(manager, directory, step):
        if step == 8:
            shutil.rmtree(directory / "8")
        return whole(manager, directory, step)

    monkeypatch.setattr(reading, "meta_of", vanishing)
    output = str(tmp_path / "out")
    with evaluation_boards.EvaluationBoards(output) as boards:
        follow.follow(str(run), Settings(lengths=(32,)), output, boards.add)
    text = capsys.readouterr().err
    assert evaluated(text) == [4, 12]
    shown = EventAccumulator(str(tmp_path / "out" / "evaluations" / "tensorboard")).Reload()
    result = json.loads((tmp_path / "out" / "evaluations" / "12.json").read_text())
    for row in result["results"]:
        for name in ("loss", "perplexity"):
            scalars = shown.Scalars(f"evaluation/{row['set']}/{row['length']}/{name}")
            assert [scalar.step for scalar in scalars] == [4, 12]
            assert scalars[-1].value == pytest.approx(row[name], rel=1e-6)
    assert "step 8: was deleted before it could be read" in text


def test_unfinished_and_damaged_checkpoints(run, tmp_path, monkeypatch):
    (run / "checkpoints" / "16.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.steps(run) == [4, 8, 12]
    assert checkpoint.steps(tmp_path / "none") == []
    monkeypatch.setattr(follow, "_DELETION", 0.3)
    shutil.rmtree(run / "checkpoints" / "8" / "params")
    with pytest.raises(UserError, match="no complete checkpoint"):
        follow.follow(str(run), Settings(lengths=(32,)), str(tmp_path / "out"))
    assert (tmp_path / "out" / "evaluations" / "4.json").exists()


def test_what_a_failed_read_leaves_prints_nothing(run):
    """TensorStore's threads go on while a follower does, and would print tracebacks."""
    for file in (run / "checkpoints" / "8" / "params").rglob("d/*"):
        file.unlink()
    program = (
        "import sys, time\nfrom bipe_jax import checkpoint, cli, errors\ncli.quiet()\n"
        "try:\n    checkpoint.load(sys.argv[1], 8)\n"
        "except errors.UserError as error:\n    print(error)\n"
        "time.sleep(1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, run], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "step 8 is damaged or was deleted" in done.stdout
    assert done.stderr == ""


def test_two_followers_do_not_share_a_directory(run, tmp_path):
    (tmp_path / "out" / "evaluations").mkdir(parents=True)
    with (
        files.locked(tmp_path / "out" / "evaluations" / ".lock", "never"),
        pytest.raises(UserError, match="another follower writes to"),
    ):
        follow.follow(str(run), Settings(), str(tmp_path / "out"))


def test_results_that_cannot_be_read_are_computed_again(tmp_path):
    (tmp_path / "10.json").write_text('{"step": 10}')
    for name, content in (("20", b""), ("30", b'{"st'), ("40", b"[]"), ("50", b"\xff")):
        (tmp_path / f"{name}.json").write_bytes(content)
    (tmp_path / "60.json").mkdir()
    (tmp_path / ".lock").touch()
    assert follow._evaluated(str(tmp_path)) == {10}
    assert len(list(tmp_path.glob("*.json.unreadable-1"))) == 5
