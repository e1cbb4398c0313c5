"""One machine's attempts at a run, under a controller that starts them again."""

import os
import signal
import subprocess
import sys
import time

import pytest
from paths import ROOT

from bipe_jax import errors
from launch import worker


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    for name in worker._RANKS:
        monkeypatch.delenv(name, raising=False)


def attempt(workdir, code, *, failed=False):
    """An attempt whose trainer ends with a code, or by a signal, and first does what a trainer does."""
    lines = [
        "import os, pathlib, signal",
        f"failed = pathlib.Path({str(workdir)!r}, 'failed')",
        "failed.unlink(missing_ok=True)",
        "failed.write_text('config.steps=0') if " + str(failed) + " else None",
        f"os.kill(os.getpid(), {-code}) if {code} < 0 else os._exit({code})",
    ]
    return worker.attempt(str(workdir), [sys.executable, "-c", "\n".join(lines)])


def test_the_status_says_what_the_controller_is_to_do(tmp_path):
    assert attempt(tmp_path / "a", 0) == 0
    assert attempt(tmp_path / "b", errors.PREEMPTED) == errors.PREEMPTED
    assert attempt(tmp_path / "c", 1, failed=True) == worker.STOP
    assert attempt(tmp_path / "d", 1) == errors.LOST  # a traceback, not a user's error
    assert attempt(tmp_path / "e", -9) == errors.LOST


def test_a_run_that_dies_at_one_step_is_given_up_and_one_that_advances_is_not(tmp_path):
    for step in range(9):
        assert attempt(tmp_path, -11) == errors.LOST
        (tmp_path / "checkpoints" / str(step) / "params").mkdir(parents=True)
    # It died at step 8 once now, as the next attempt will count, and may do so three times.
    assert [attempt(tmp_path, 137) for _ in range(4)] == [errors.LOST] * 3 + [worker.STOP]
    # Whoever starts it again after that has one attempt, and it goes on if that one is good.
    assert attempt(tmp_path, errors.PREEMPTED) == errors.PREEMPTED


def test_an_attempt_that_vanished_with_its_machine_is_counted(tmp_path, capfd):
    (tmp_path / "running").touch()
    attempt(tmp_path, errors.PREEMPTED)
    assert "it died with code 43" in capfd.readouterr().err
    attempt(tmp_path, errors.PREEMPTED)
    assert "died" not in capfd.readouterr().err


@pytest.mark.parametrize("name", worker._RANKS)
def test_only_the_first_machine_counts(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    for _ in range(6):
        assert attempt(tmp_path, 139) == errors.LOST
    assert attempt(tmp_path, 1, failed=True) == worker.STOP
    assert {path.name for path in tmp_path.iterdir()} == {"failed"}


def test_a_run_is_started_again_after_a_users_error_was_mended(tmp_path):
    (tmp_path / "running").touch()
    (tmp_path / "failed").write_text("config.steps=0")
    assert attempt(tmp_path, 0) == 0


@pytest.mark.parametrize(
    "numbers", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT]]
)
def test_a_signal_reaches_the_trainer_as_sigterm(tmp_path, numbers):
    trainer = (
        "import signal, sys, time, pathlib\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({errors.PREEMPTED}))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    line = "import sys; from launch import worker; sys.exit(worker.attempt(*eval(sys.argv[1])))"
    arguments = repr((str(tmp_path), [sys.executable, "-c", trainer]))
    process = subprocess.Popen([sys.executable, "-c", line, arguments], cwd=ROOT)
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.02)
    for number in numbers:
        os.kill(process.pid, number)
    assert process.wait(20) == errors.PREEMPTED
    assert not (tmp_path / "running").exists()


def test_a_workdir_that_cannot_be_written_ends_it(tmp_path):
    (tmp_path / "file").touch()
    line = [sys.executable, "-m", "launch.worker", f"--workdir={tmp_path / 'file' / 'x'}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == worker.STOP
    assert len(done.stderr.splitlines()) == 1 and "file/x" in done.stderr


def test_it_waits_for_all_machines(monkeypatch, capfd):
    asked, there = [], {"x-w-0-0.x", "x-w-1-0.x"}

    def address(name):
        asked.append(name)
        if name == "x-w-0-1.x" and asked.count(name) == 3:
            there.update(("x-w-0-1.x", "x-w-1-1.x"))
        return name in there

    monkeypatch.setattr(worker, "_has_address", address)
    monkeypatch.setattr(worker, "_POLL", 0)
    worker.wait_for_peers("x-w-{}-{}.x 2 2")
    assert there == set(asked) and asked.count("x-w-0-0.x") == 1
    assert capfd.readouterr().err == "launch.worker: waiting for 2 machines, such as x-w-0-1.x\n"


def test_names_without_an_address_are_not_there():
    assert worker._has_address("localhost") and not worker._has_address("no-such-name.invalid")


def test_a_sigterm_while_it_waits_is_a_preemption(tmp_path):
    line = [sys.executable, "-m", "launch.worker", f"--workdir={tmp_path}"]
    environment = os.environ | {"PEERS": "no-such-name-{}-{}.invalid 1 1"}
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert "waiting for 1 machines" in process.stderr.readline()
    process.terminate()
    assert process.wait(20) == errors.PREEMPTED
    assert not list(tmp_path.iterdir())
