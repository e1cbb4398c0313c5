"""A run's directory as others know it: atomic writes, locks, failures, and all of it without JAX."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from bipe_jax.errors import UserError
from bipe_jax.workdir import Workdir, files, workdir_argument

HEAVY = {"jax", "numpy", "ml_collections", "absl", "etils", "yaml"}


def run(*arguments, **options):
    line = [sys.executable, *arguments]
    options = {"cwd": ROOT, "capture_output": True, "text": True} | options
    return subprocess.run(line, **options)


def quickest(*arguments) -> float:
    """Seconds of the processor that a program takes at best: the machine may be busy with others."""
    took = []
    while len(took) < 3 or (min(took) > 0.15 and len(took) < 10):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(took)


@pytest.mark.parametrize("module", ["bipe_jax.workdir", "bipe_jax.hardware", "bipe_jax.errors"])
def test_the_ground_floor_is_imported_in_no_time_and_without_jax(module):
    program = f"import {module}, sys; print(*sys.modules)"
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())
    assert quickest("-c", f"import {module}") < 0.2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["launch.restart", "--workdir=/nowhere/x", "--code=1"], 1),
        (["launch.supervise", "--help"], 0),
        (["launch.worker"], 44),
        (["launch.tpu_vm.worker", "--help"], 0),
    ],
)
def test_launchers_that_need_no_jax_import_none(arguments, code):
    done = run("-X", "importtime", "-m", *arguments)
    assert done.returncode == code
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "bipe_jax.workdir" in modules and not HEAVY & modules
    assert quickest("-m", *arguments) < 0.3


def test_names_are_those_of_the_files():
    assert Workdir("runs/x").metrics == "runs/x/metrics.jsonl"
    assert Workdir(Path("runs/x")).checkpoints == "runs/x/checkpoints"
    assert Workdir.evaluation == "evaluation.json"
    assert Workdir("x").restarts() == "x/restarts.json"
    assert Workdir("x").restarts("b") == "x/restarts-b.json"
    assert Workdir("x").supervisor_lock("b") == "x/supervisor-b.lock"


@pytest.mark.parametrize(
    ("arguments", "workdir"),
    [
        (["--config=a", "--workdir=x"], "x"),
        (["--workdir", "x", "--config=a"], "x"),
        (["--workdir=x", "--workdir", "y"], "y"),
        (["--workdir=a=b c"], "a=b c"),
        (["--config.workdir=x", "--workdirs=y"], ""),
        (["--workdir="], ""),
        (["--workdir"], ""),
        ([], ""),
    ],
)
def test_the_workdir_of_a_command_line(arguments, workdir):
    assert workdir_argument(arguments) == workdir


def test_a_file_is_replaced_by_all_of_the_new_one_or_stays(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(KeyError), files.replacing(path) as file:
        file.write("half")
        raise KeyError
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    assert files.read_json(path) == {"a": 1}
    with files.replacing(path) as one, files.replacing(path) as other:
        one.write("[1]")
        other.write("[2]" * 1000)
        assert files.read_json(path) == {"a": 1}
    assert path.read_text() == "[1]"
    assert os.listdir(tmp_path) == ["x.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(OSError), files.replacing(tmp_path / "none" / "x"):
        pytest.fail("it was opened")


def test_only_what_killed_writers_left_is_removed(tmp_path):
    program = (
        "import os, signal, sys; from bipe_jax.workdir import files\n"
        "with files.replacing(sys.argv[1]) as file: os.kill(os.getpid(), signal.SIGKILL)"
    )
    run("-c", program, str(tmp_path / "heartbeat.json"))
    (left,) = os.listdir(tmp_path)
    others = tmp_path / "x.json.7@else.where.0123abcd.tmp"
    others.touch()
    (tmp_path / "mine.tmp").touch()
    with files.replacing(tmp_path / "y.json"):
        files.remove_unfinished(tmp_path)
        assert left not in os.listdir(tmp_path)
        assert len(os.listdir(tmp_path)) == 3
    os.utime(others, (0, 0))
    Workdir(tmp_path).make()
    assert sorted(os.listdir(tmp_path)) == ["mine.tmp", "y.json"]


def test_a_directory_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--workdir=.*/file is not writable: File exists$"):
        Workdir(tmp_path / "file").make()
    with pytest.raises(UserError, match=r"^--output=.*/x is not writable: Not a directory$"):
        Workdir(tmp_path / "file" / "x").make("--output")


HOLD = """
import sys, time
from bipe_jax.workdir import files
with files.locked(sys.argv[1], "refused"):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["a.lock", "directory"])
def test_a_lock_is_held_as_long_as_the_process_lives(tmp_path, name):
    (tmp_path / "directory").mkdir()
    line = [sys.executable, "-c", HOLD, str(tmp_path / name)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=r"^refused$"), files.locked(tmp_path / name, "refused"):
            pytest.fail("two hold it")
        holder.kill()
        holder.wait()
    for _ in range(2):
        with files.locked(tmp_path / name, "refused"):
            pass


def test_a_child_that_inherits_a_lock_holds_it(tmp_path):
    path = tmp_path / "a.lock"
    line = [sys.executable, "-c", "import time; time.sleep(60)"]
    with files.locked(path, "refused") as descriptor:
        child = subprocess.Popen(line, pass_fds=(descriptor,))
    try:
        with pytest.raises(UserError), files.locked(path, "refused"):
            pytest.fail("the child does not hold it")
    finally:
        child.kill()
        child.wait()
    with files.locked(path, "refused") as descriptor:
        os.write(descriptor, b"appended")
    assert path.read_text() == "appended"


def test_where_there_are_no_locks_a_warning_is_all(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.locked(tmp_path / "a.lock", "refused") as descriptor:
        assert os.fstat(descriptor)
    assert "a.lock cannot be locked (No locks available)" in capsys.readouterr().err


def test_the_latest_step_is_of_complete_checkpoints(tmp_path):
    assert Workdir(tmp_path).latest_step() is None
    for name in ("4", "12", "16.orbax-checkpoint-tmp", "20.damaged"):
        (tmp_path / "checkpoints" / name / "params").mkdir(parents=True)
    (tmp_path / "checkpoints" / "99").mkdir()
    assert Workdir(tmp_path).latest_step() == 12


def test_a_failure_is_one_line_that_is_forgotten(tmp_path):
    run = Workdir(tmp_path)
    assert run.read_failure() == ""
    run.forget_failure()
    run.write_failure("config.steps=0 must be\nat least 1")
    assert run.read_failure() == "config.steps=0 must be at least 1"
    Path(run.failed).write_text("")  # of a full disk: it failed all the same
    assert run.read_failure()
    run.forget_failure()
    assert os.listdir(tmp_path) == []
    Workdir(tmp_path / "none").write_failure("lost")
    assert not (tmp_path / "none").exists()


def test_a_config_that_cannot_be_read_is_one_line(tmp_path):
    run = Workdir(tmp_path)
    assert run.read_config() is None
    files.write_json(run.config, {"steps": 3})
    assert run.read_config() == {"steps": 3}
    for wrong in ("{", "[1]", json.dumps("x")):
        Path(run.config).write_text(wrong)
        with pytest.raises(UserError, match=r"config.json cannot be read .*: use another"):
            run.read_config()
