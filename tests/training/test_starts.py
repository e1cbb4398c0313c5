"""What a run says of its starts: config, provenance, and what a start changes of the config."""

import glob
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec

import jax
import kinds
import numpy as np
import optax
import pytest
from tiny import tiny_plan

from bipe_jax import checkpoint, provenance, sharding
from bipe_jax.config import spec, to_json
from bipe_jax.data import sources
from bipe_jax.plan import make
from bipe_jax.training import summary
from bipe_jax.training.trainer import train
from bipe_jax.workdir import events

RATE = "optimizer.learning_rate"


@pytest.fixture
def stopped(config, tmp_path, tmp_path_factory, capsys):
    """A copy of the workdir of a run of 8 steps that was stopped at step 3."""
    config.steps = 8
    original = tmp_path_factory.getbasetemp() / "a_start"
    if not original.exists():
        assert not train(config, str(original), stop_at=3)
    capsys.readouterr()
    return shutil.copytree(original, tmp_path / "run")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_start_is_recorded_and_checkpoints_name_theirs(config, stopped, monkeypatch):
    (first,) = (stopped / "starts").iterdir()
    kept = first.read_text()
    monkeypatch.setattr(provenance, "_code", lambda seconds: {"commit": "ab12", "clean": True})
    config.optimizer.learning_rate *= 2
    assert not train(config, str(stopped), stop_at=4)
    assert sorted(os.listdir(stopped / "starts")) == ["1.json", "2.json"]
    assert first.read_text() == kept
    one, two = (json.loads((stopped / "starts" / f"{n}.json").read_text()) for n in (1, 2))
    assert (one["number"], one["step"], two["number"], two["step"]) == (1, 0, 2, 3)
    assert 2 * one["config"]["optimizer"]["learning_rate"] == config.optimizer.learning_rate
    assert two["config"] == json.loads((stopped / "config.json").read_text())
    assert two["config"] == json.loads(json.dumps(to_json(make(config))))
    assert one["provenance"]["time"] < two["provenance"]["time"] <= time.time()
    assert (two["provenance"]["commit"], two["provenance"]["clean"]) == ("ab12", True)
    assert two["provenance"]["machine"] == {
        "host": platform.node(), "platform": "cpu", "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(), "processes": 1,
    }  # fmt: skip
    for name, module in (("jax", jax), ("numpy", np), ("optax", optax)):
        assert two["provenance"]["versions"][name] == module.__version__
    assert two["provenance"]["versions"]["python"] == platform.python_version()
    for step, start in ((3, one), (4, two)):
        del start["config"]
        shutil.copytree(stopped / "checkpoints" / str(step), stopped.parent / str(step))
        assert checkpoint.load(stopped.parent / str(step))[0].start == start


def test_a_checkpoint_without_its_workdir_counts_on(config, stopped):
    shutil.rmtree(stopped / "starts")
    (stopped / "starts").symlink_to("nowhere")
    assert not train(config, str(stopped), stop_at=4)
    assert os.listdir(stopped / "starts") == ["2.json"]
    assert (stopped / "starts.unreadable-1").is_symlink()


def test_changed_fields_are_told_and_a_jump_of_the_rate(config, stopped, capsys):
    config.steps, config.log.every, config.evaluation.lengths = 20, 4, (32, 64)
    assert not train(config, str(stopped), stop_at=5)
    said = capsys.readouterr().err.splitlines()
    assert "config.steps=20 from step 4 on; it was 8" in said
    assert "config.log.every=4 from step 4 on; it was 3" in said
    assert sum(" from step 4 on; it was " in line for line in said) == 3
    changed = [event for event in events.read(stopped) if event["event"] == "changed"]
    assert [(e["field"], e["old"], e["new"]) for e in changed] == [
        ("steps", 8, 20), ("log.every", 3, 4), ("evaluation.lengths", [], [32, 64]),
    ]  # fmt: skip
    # The warm-up is 5 steps, in which the number of steps does not matter.
    assert not any("learning rate" in line for line in said)
    config.steps = 40
    assert not train(config, str(stopped), stop_at=8)
    capsys.readouterr()
    config.steps = 20
    assert not train(config, str(stopped), stop_at=9)
    said = capsys.readouterr().err.splitlines()
    rates = {
        e["step"]: e["learning_rate"] for e in lines_of(stopped / "metrics.jsonl") if len(e) > 4
    }
    assert (
        f"The learning rate was {rates[8]:.3g} at step 8, and is {rates[9]:.3g} at step 9, since the config "
        "has changed"
    ) in said


def test_metrics_have_the_time_and_the_tokens_on_each_line(config, stopped):
    lines = lines_of(stopped / "metrics.jsonl")
    per_step = config.batch_size * config.sequence_length
    assert [line["tokens"] for line in lines] == [per_step * n for n in (1, 2, 3)]
    times = [line["time"] for line in lines]
    assert times == sorted(times) and time.time() - 600 < times[0] <= times[-1] <= time.time()


def git(directory, *words):
    identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
    return subprocess.run(
        ["git", "-C", directory, *identity, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def package(tmp_path):
    """A package in a git checkout."""
    directory = tmp_path / "repository" / "package"
    directory.mkdir(parents=True)
    (directory / "__init__.py").touch()
    (directory.parent / ".gitignore").write_text("/runs/\n/venv/\n")
    git(directory.parent, "init", "-q")
    git(directory.parent, "add", "-A")
    git(directory, "commit", "-q", "-m", "x")
    return directory


def test_the_commit_is_of_the_code_and_clean_only_without_changes(package, monkeypatch):
    commit = {"commit": git(package, "rev-parse", "HEAD")}
    # As a hook of another repository sets it.
    monkeypatch.setenv("GIT_DIR", str(package / "none"))
    assert provenance._commit(60, str(package)) == commit | {"clean": True}
    (package.parent / "runs").mkdir()
    (package.parent / "runs" / "x").touch()
    assert provenance._commit(60, str(package)) == commit | {"clean": True}
    (package / "new.py").touch()
    assert provenance._commit(60, str(package)) == commit | {"clean": False}
    (package / "new.py").unlink()
    (package / "__init__.py").write_text("changed")
    assert provenance._commit(60, str(package)) == commit | {"clean": False}


def test_what_belongs_to_no_checkout_has_no_commit(package, tmp_path):
    installed = package.parent / "venv" / "package"
    shutil.copytree(package, installed)
    for directory in (installed, tmp_path):
        with pytest.raises(subprocess.CalledProcessError):
            provenance._commit(60, str(directory))


@pytest.mark.parametrize("program", [None, "exit 1", "exec sleep 60", "trap '' TERM; sleep 60"])
def test_a_git_that_is_missing_or_fails_or_is_slow_fails_nothing(tmp_path, monkeypatch, program):
    if program:
        (tmp_path / "git").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{program}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance._code(0.2) == {"commit": None, "clean": None}


def test_a_slow_status_leaves_the_commit(package, monkeypatch):
    ordinary = subprocess.run

    def run(line, **more):
        if "status" in line:
            raise subprocess.TimeoutExpired(line, more["timeout"])
        return ordinary(line, **more)

    monkeypatch.setattr(subprocess, "run", run)
    commit = git(package, "rev-parse", "HEAD")
    assert provenance._commit(60, str(package)) == {"commit": commit, "clean": None}


def test_the_arguments_of_another_program_are_left_out(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--token=SECRET", "SECRET"])
    assert provenance._command() == ["script.py"]


def test_the_command_is_that_of_the_trainer(monkeypatch):
    """As `python -m` sets it; the names of modules are not enough: "bipe_jax_tools.x" is another's."""
    main = sys.modules["__main__"]
    line = ["/x/bipe_jax/train.py", "--config=configs/smoke.py", "--workdir", "a b"]
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setattr(main, "__spec__", ModuleSpec("bipe_jax.train", None), raising=False)
    assert provenance._command() == [sys.executable, "-m", "bipe_jax.train", *line[1:]]
    monkeypatch.setattr(main, "__spec__", ModuleSpec("bipe_jax_tools.train", None))
    assert provenance._command() == line[:1]


def test_a_run_first_says_what_it_trains_where_and_on_what(config, stopped, capsys):
    params = checkpoint.load(stopped)[1]
    assert not train(config, str(stopped), stop_at=4)
    said = capsys.readouterr().err.splitlines()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    shards = [path for path, *_ in glob_sizes(config.data.train)]
    size = sum(size for _, size in glob_sizes(config.data.train))
    first = said.index(f"Model: {count:,} parameters, attention by chunked")
    assert said[first + 1 : first + 4] == [
        "Devices: 1 of cpu in 1 process",
        f"Data: {config.data.train}: {len(shards)} shards, {size / 1e6:.1f} MB, 100% of the blocks",
        f"TensorBoard: tensorboard --logdir {stopped}/tensorboard",
    ]
    assert first < next(i for i, line in enumerate(said) if "step/s" in line)


def test_it_says_how_many_documents_there_are_where_nothing_is_read_to_know_it(config):
    source = spec.parse_source("quickstart:validation")
    count = len(list(sources.documents(source)))
    assert summary._documents(source, ()) == f"{count} documents, " != "0 documents, "
    assert summary._documents(source, ("Plays",)) == ""
    assert summary._documents(spec.parse_source("quickstart:train#Plays"), ()) == ""
    assert summary._documents(spec.parse_source(config.data.train), ()) == ""


def glob_sizes(pattern):
    return [(path, os.path.getsize(path)) for path in glob.glob(pattern)]


@pytest.mark.parametrize(
    ("relative", "platform", "heads", "found"),
    [
        ((("rope", "segment"),), "cpu", 4, ["chunked"]),
        ((("rope", "segment"),), "tpu", 4, ["splash"]),
        (
            (("rope", "position"), ("cope", "position", ("layers", "1"))),
            "tpu",
            4,
            ["splash", "chunked"],
        ),
        ((("alibi", "segment"),), "gpu", 4, ["cudnn"]),
    ],
)
def test_the_backends_are_those_that_the_trained_layers_have(
    monkeypatch, relative, platform, heads, found
):
    assert isinstance(
        summary.backends(tiny_plan(position__relative=kinds.TOGETHER, model__layers=4)), list
    )
    config = tiny_plan(position__relative=relative, model__dtype="bfloat16", sequence_length=256)
    monkeypatch.setattr(sharding, "platform", lambda mesh: platform)
    assert summary.backends(config) == found
