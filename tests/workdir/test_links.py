"""Symbolic links in a run's directory that came from elsewhere: nothing is written where they lead."""

import contextlib
import os
import subprocess
import sys

import pytest
from paths import ROOT
from tiny import overrides

from bipe_jax import checkpoint, errors, plan, workdir
from bipe_jax.data import vocabulary
from bipe_jax.training.observing import wandb_board
from bipe_jax.training.trainer import train
from bipe_jax.workdir import Workdir, events, files, trainer_lock
from launch import jobs, local, points, restart, worker
from launch.table import Table

RUN = Workdir("")
NAMES = [name for name, entry in vars(Workdir).items() if isinstance(entry, workdir._Entry)]
NAMES = [getattr(Workdir, name) for name in NAMES]
NAMES += [RUN.restarts(), RUN.restarts("h"), RUN.supervisor_lock(), RUN.supervisor_lock("h")]
NAMES += [".writable", ".writable.tmp"]
FATAL = ["config.json", "checkpoints"]  # of which a run ends with a line
MINE = "mine\n"


@pytest.fixture
def linked(tmp_path):
    """Makes TMP/run with links to files of these names, or to none, in TMP/outside, and checks these."""
    outside, directory = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    directory.mkdir()

    def make(names, there=True):
        for name in names:
            (directory / name).symlink_to(outside / name)
            if there:
                (outside / name).write_text(MINE)
        before.extend(os.listdir(outside))
        return directory

    before = []
    yield make
    assert sorted(os.listdir(outside)) == sorted(before)
    for name in before:
        assert (outside / name).read_text() == MINE, name


@pytest.fixture
def line(config, tmp_path):
    """Of a training of two steps, by its command."""
    return [
        "--config=configs/smoke.py",
        f"--workdir={tmp_path / 'run'}",
        "--profile=1:2",
        *overrides(config),
        "--config.evaluation.tokens=64",
        "--config.steps=2",
        "--config.schedule.warmup_steps=1",
    ]


def run(*line):
    return subprocess.run([sys.executable, "-m", *line], cwd=ROOT, capture_output=True, text=True)


def test_the_names_are_those_of_a_run():
    assert {"metrics.jsonl", "events.jsonl", "failed", "trainer.lock", "log.txt"} <= set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False])
def test_a_supervised_training_writes_through_no_link(linked, line, there):
    directory = linked(set(NAMES) - set(FATAL), there)
    supervised = ["launch.supervise", f"--workdir={directory}", "--"]
    done = run(*supervised, sys.executable, "-m", "bipe_jax.train", *line)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert checkpoint.steps(directory) == [2]
    own = ["metrics", "events", "heartbeat", "evaluation", "config", "trainer_lock"]
    for name in (getattr(Workdir, name) for name in own):
        path = directory / name
        assert path.is_file() and not path.is_symlink(), name
        assert name == Workdir.trainer_lock or path.read_text() != MINE
    for name in ("metrics.jsonl", "events.jsonl", "heartbeat.json", "trainer.lock"):
        said = f"{directory / name} cannot be used (it is a symbolic link): set aside as "
        assert done.stderr.count(said) == 1, done.stderr
    assert not (directory / "tensorboard").is_symlink()


@pytest.mark.parametrize("name", FATAL)
def test_a_line_ends_a_run_whose_own_start_is_a_link_to_a_file(linked, line, name):
    directory = linked([name])
    done = run("bipe_jax.train", *line)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"error: {directory / name}" in done.stderr.splitlines()[-1]


def test_a_users_error_is_recorded_in_a_file(linked, line):
    directory = linked(["failed", "trainer.lock"])
    done = run("bipe_jax.train", *line, "--config.steps=0")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "config.steps=0" in Workdir(str(directory)).read_failure()


def test_launchers_write_through_no_link(linked, config):
    directory = str(linked(["restarts.json", "restarts-h.json", "running", "point.json", "failed"]))
    assert worker.attempt(directory, [sys.executable, "-c", "raise SystemExit(7)"]) == errors.LOST
    assert os.path.isfile(os.path.join(directory, "running"))
    for host in ("", "h"):
        again, _ = restart.decide(directory, 7, host)
        assert again and not os.path.islink(Workdir(directory).restarts(host))
    points.record(directory, config)
    assert points.recorded(directory)


def test_a_local_sweep_writes_no_log_through_a_link(linked, config):
    directory = linked(["log.txt"])
    job = jobs.Job("configs/smoke.py", str(directory), name="x")
    sweep = local.Run(points.Checked(job, plan.make(config)))
    sweep._line = [sys.executable, "-c", "print('said')"]
    local._loop([sweep], [None], [], Table([sweep]))
    assert sweep.state == "done", sweep.why
    assert not (directory / "log.txt").is_symlink()
    assert (directory / "log.txt").read_text() == "said\n"


@pytest.mark.parametrize("there", [True, False])
def test_the_id_of_weights_and_biases_is_kept_in_a_file(linked, there):
    directory = linked(["wandb_id"], there)
    made = wandb_board._id(str(directory))
    assert made != MINE.strip() and (directory / "wandb_id").read_text() == made
    assert not (directory / "wandb_id").is_symlink()


def test_a_trained_tokenizer_is_kept_in_a_file(linked, config):
    directory = linked(["tokenizer.model"], there=False)
    config.tokenizer.path, config.tokenizer.train_bytes = "", 20_000
    chosen = vocabulary.choose(plan.make(config), str(directory), None)
    path = directory / "tokenizer.model"
    assert not path.is_symlink() and path.read_bytes() == chosen.model


def test_a_link_that_appears_later_is_not_written_through(linked, monkeypatch, config):
    """As if it had been put there after the run has looked."""
    directory = linked(["events.jsonl", "trainer.lock", "supervisor.lock"])
    with pytest.raises(OSError):
        events.append(directory, {"event": "x"})
    with pytest.raises(OSError), files.locked(directory / "supervisor.lock", ""):
        pass
    monkeypatch.setattr(files, "set_aside_unless_file", lambda path: None)
    with pytest.raises(OSError), trainer_lock.locked(directory):
        pass


def test_metrics_are_not_written_through_a_link_that_appears_later(linked, monkeypatch, config):
    directory = linked([])
    ordinary = files.replacing

    @contextlib.contextmanager
    def replacing(path, *more):
        with ordinary(path, *more) as file:
            yield file
        if os.path.basename(path) == "metrics.jsonl":
            os.replace(directory / "link", path)

    train(config, str(directory), stop_at=1)
    (directory / "link").symlink_to(directory.parent / "outside" / "made")
    monkeypatch.setattr(files, "replacing", replacing)
    with pytest.raises(OSError):
        train(config, str(directory), stop_at=2)


def test_a_temporary_file_is_a_new_one(linked, monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda count: b"\0" * count)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(files.socket, "gethostname", lambda: "here")
    directory = linked(["x.json.7@here.00000000.tmp"])
    with pytest.raises(FileExistsError):
        files.write_text(directory / "x.json", "text")


def test_directories_on_a_large_disk_and_a_workdir_behind_a_link_stay(config, tmp_path, capfd):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    for name in ("checkpoints", "tensorboard"):
        (tmp_path / "large" / name).mkdir(parents=True)
        (tmp_path / "disk" / "run" / name).symlink_to(tmp_path / "large" / name)
    for step in (1, 2):
        assert not train(config, str(tmp_path / "data" / "run"), stop_at=step)
    assert "set aside" not in capfd.readouterr().err
    assert (tmp_path / "large" / "checkpoints" / "2").is_dir()
    assert len(os.listdir(tmp_path / "large" / "tensorboard")) == 2
    assert len((tmp_path / "disk" / "run" / "metrics.jsonl").read_text().splitlines()) == 2
