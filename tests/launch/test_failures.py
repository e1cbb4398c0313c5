"""A user's error is recorded where supervisors look for it, however the workdir is named, or nowhere."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

from bipe_jax.errors import USER_ERROR
from launch import restart


@pytest.fixture
def elsewhere(tmp_path):
    """An empty directory to start programs in."""
    path = tmp_path / "elsewhere"
    path.mkdir()
    return path


def run(*arguments, cwd=ROOT):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", *arguments]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("override", [[], ["--config.steps=0"], ["--workdir="]])
def test_without_a_workdir_nothing_is_written(elsewhere, override):
    done = run("bipe_jax.train", "--config=smoke", *override, cwd=elsewhere)
    assert done.returncode == USER_ERROR
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert "--workdir" in done.stderr
    assert os.listdir(elsewhere) == []
    for workdir in ("", str(elsewhere / "run")):
        assert not restart.decide(workdir, done.returncode)[0]
    assert os.listdir(elsewhere) == []


@pytest.mark.parametrize("spelling", [["--workdir={}"], ["--workdir", "{}"]])
def test_both_spellings_of_the_workdir_name_it(elsewhere, tmp_path, spelling):
    workdir = tmp_path / "run"
    workdir.mkdir()
    flags = [word.format(workdir) for word in spelling]
    done = run("bipe_jax.train", *flags, "--config=smoke", "--config.steps=0", cwd=elsewhere)
    line = "config.steps=0 must be at least 1"
    assert (done.returncode, done.stderr) == (USER_ERROR, f"error: {line}\n")
    assert (workdir / "failed").read_text() == f"{line}\n"
    assert os.listdir(elsewhere) == []
    assert restart.decide(str(workdir), done.returncode) == (False, f"a wrong input: {line}")


def test_a_supervisor_starts_a_trainer_with_a_wrong_config_once(tmp_path):
    trainer = [sys.executable, "-m", "bipe_jax.train", "--config=smoke", "--config.steps=0"]
    line = ["launch.supervise", f"--workdir={tmp_path / 'run'}", "--pause=0.1", "--", *trainer]
    done = run(*line, "--workdir", str(tmp_path / "run"))
    assert done.returncode == USER_ERROR
    assert done.stderr.splitlines()[1:] == [
        "supervise: not restarting: a wrong input: config.steps=0 must be at least 1"
    ]


@pytest.mark.parametrize("named", [[], ["--workdir=/another"], ["--workdir"]])
def test_a_supervisor_refuses_a_trainer_of_another_workdir(tmp_path, named):
    line = ["launch.supervise", f"--workdir={tmp_path / 'run'}", "--"]
    done = run(*line, "python", "-m", "bipe_jax.train", "--config=smoke", *named)
    assert done.returncode == 2
    assert f"the trainer's command must have --workdir={tmp_path}/run too" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_worker_takes_both_spellings(tmp_path):
    done = run("launch.worker", "--workdir", str(tmp_path / "run"), "--config=smoke", "--stop=3")
    assert done.returncode == 44
    assert "--stop=3" in (tmp_path / "run" / "failed").read_text()
