"""One trainer a workdir: of this machine by flock, of others by the file's time."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import several
from paths import ROOT

from bipe_jax import checkpoint
from bipe_jax.errors import PREEMPTED, Transient, UserError
from bipe_jax.training.trainer import train
from bipe_jax.workdir import Workdir, events, lock_owner, trainer_lock

HOLDER = """
import os, sys, time
from bipe_jax.workdir import trainer_lock
with trainer_lock.locked(sys.argv[1]):
    if sys.argv[2:] and not os.fork():
        os.write(1, f"{os.getpid()}\\n".encode())  # in one piece
        time.sleep(60)
    os.write(1, b"locked\\n")
    time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that locks tmp_path."""
    running = []

    def start(*arguments):
        command = [sys.executable, "-c", HOLDER, str(tmp_path), *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(trainer_lock, "RENEWAL", 0.2)
    monkeypatch.setattr(trainer_lock, "STALE", 2.0)
    monkeypatch.setattr(trainer_lock, "_POLL", 0.1)


def seconds_to_lock(path) -> float:
    begin = time.monotonic()
    with trainer_lock.locked(path):
        return time.monotonic() - begin


def test_a_second_is_refused_by_name_until_the_first_is_dead(hold, tmp_path):
    first = hold()
    assert first.stdout.readline() == "locked\n"
    named = rf"is being trained by process {first.pid} on {os.uname().nodename}: .*--workdir$"
    with pytest.raises(Transient, match=named), trainer_lock.locked(tmp_path):
        pass
    first.kill()
    first.wait()
    assert seconds_to_lock(tmp_path) < 1
    assert (tmp_path / "trainer.lock").read_bytes() == b""


def test_a_child_that_outlives_its_trainer_holds_no_lock(hold, tmp_path):
    first = hold("fork")
    lines = {first.stdout.readline(), first.stdout.readline()}
    child = next(int(line) for line in lines if line != "locked\n")
    try:
        first.kill()
        first.wait()
        assert seconds_to_lock(tmp_path) < 1
    finally:
        os.kill(child, signal.SIGKILL)


def of_another_machine(tmp_path) -> Path:
    path = tmp_path / "trainer.lock"
    path.write_text(json.dumps({"pid": 7, "host": "elsewhere", "machine": "another"}))
    return path


def test_a_dead_machine_is_waited_for_and_a_living_one_is_refused(quick, tmp_path):
    path = of_another_machine(tmp_path)
    assert 1.9 < seconds_to_lock(tmp_path) < 10

    path, ended = of_another_machine(tmp_path), threading.Event()

    def renew():
        while not ended.wait(0.2):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with (
            pytest.raises(Transient, match="process 7 on elsewhere"),
            trainer_lock.locked(tmp_path),
        ):
            pass
        assert path.stat().st_size, "a refused trainer changes nothing"
    finally:
        ended.set()
        thread.join()


def test_a_disk_without_locks_still_has_one_trainer(quick, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with trainer_lock.locked(tmp_path), pytest.raises(Transient, match=f"process {os.getpid()} on"):
        seconds_to_lock(tmp_path)
    assert seconds_to_lock(tmp_path) < 1, "it ended well"


@pytest.fixture
def elsewhere(monkeypatch):
    """Threads are machines of their own then, whose locks the others do not see."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(lock_owner, "machine", lambda: str(threading.get_ident()))


def claims(path) -> list[Path]:
    return sorted(path.glob("trainer.lock.*.claim"))


@pytest.mark.parametrize("before", ["nobody", "ended", "killed"])
def test_of_machines_that_start_in_the_same_moment_one_trains(
    quick, elsewhere, tmp_path, monkeypatch, before
):
    """All have seen that nobody trains before one of them writes its name."""
    count = 6
    all_have_seen, all_know = threading.Barrier(count), threading.Barrier(count)
    claim, became = trainer_lock._claim, []

    def late(path, seen):
        all_have_seen.wait(30)
        return claim(path, seen)

    def start():
        try:
            with trainer_lock.locked(tmp_path):
                became.append("trains")
                all_know.wait(30)
        except Transient as error:
            assert f"by process {os.getpid()} on" in str(error)
            became.append("refused")
            all_know.wait(30)

    if before == "ended":
        seconds_to_lock(tmp_path)
    if before == "killed":
        of_another_machine(tmp_path)
        (tmp_path / "trainer.lock.0123-0.claim").mkdir()
    monkeypatch.setattr(trainer_lock, "_claim", late)
    threads = [threading.Thread(target=start) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(became) == ["refused"] * (count - 1) + ["trains"]
    assert claims(tmp_path) == []
    monkeypatch.setattr(trainer_lock, "_claim", claim)
    assert seconds_to_lock(tmp_path) < 1


def test_a_machine_that_died_as_it_claimed_the_lock_is_waited_for_once(quick, elsewhere, tmp_path):
    with trainer_lock.locked(tmp_path):
        (of_the_first,) = claims(tmp_path)
    of_the_first.mkdir()
    assert 1.9 < seconds_to_lock(tmp_path) < 10
    assert seconds_to_lock(tmp_path) < 1


def test_a_machine_that_has_seen_the_lock_long_ago_is_refused(quick, elsewhere, tmp_path):
    """It looked before another started, and even that one's claim is gone."""
    with trainer_lock.locked(tmp_path):
        (claim,) = claims(tmp_path)
        claim.rmdir()
        assert trainer_lock._claim(tmp_path / "trainer.lock", b"") is None
        assert claims(tmp_path) == []


def test_a_disk_that_takes_no_directory_has_a_trainer(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "mkdir", full)
    assert seconds_to_lock(tmp_path) < 1


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\0", b'{"pid": []}'])
def test_a_file_that_names_nobody_is_of_a_dead_one(quick, tmp_path, content):
    (tmp_path / "trainer.lock").write_bytes(content)
    assert seconds_to_lock(tmp_path) < 10


def test_what_is_no_file_is_set_aside(tmp_path):
    (tmp_path / "trainer.lock").mkdir()
    assert seconds_to_lock(tmp_path) < 1
    assert (tmp_path / "trainer.lock.unreadable-1").is_dir()


# The command, which waits at its 7th batch until a file appears.
WAITING = """
import os, runpy, sys, time
from bipe_jax.data.batches import Batches

ordinary, numbers = Batches.__next__, []

def waiting(self):
    numbers.append(1)
    if len(numbers) == 7:
        print("waiting", flush=True)
        while not os.path.exists("GO"):
            time.sleep(0.1)
    return ordinary(self)

Batches.__next__ = waiting
runpy.run_module("bipe_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def arguments(config, tmp_path):
    values = {
        "tokenizer.path": config.tokenizer.path,
        "data.train": config.data.train,
        "data.evaluation": config.data.evaluation,
        "evaluation.lengths": "(32,)",
        "checkpoint.every": 100,
    }
    settings = [f"--config.{name}={value}" for name, value in values.items()]
    return ["--config=configs/smoke.py", f"--workdir={tmp_path / 'run'}", *settings]


@pytest.mark.slow
def test_a_second_command_harms_nothing(config, arguments, tmp_path):
    workdir, go = Workdir(str(tmp_path / "run")), tmp_path / "go"
    program = WAITING.replace("GO", str(go))
    (first,) = several.start(1, 1, "-c", program, *arguments, "--stop_at=9")
    try:
        assert first.stdout.readline() == "waiting\n"
        before = len(events.read(workdir.path))
        for more in ([], ["--config.steps=1"], ["--config.stepz=1"], ["--config.model.width=31"]):
            (second,) = several.start(1, 1, "-m", "bipe_jax.train", *arguments, *more)
            _, err = second.communicate(timeout=120)
            assert second.returncode == 1 and "Traceback" not in err, err
            assert workdir.read_failure() == "", "it would keep the first from being restarted"
            if not more:
                assert err.splitlines()[-1].startswith(
                    f"error: {workdir.path} is being trained by process {first.pid} on "
                )
        with pytest.raises(UserError, match=f"process {first.pid} on"):
            train(config, workdir.path)
        assert len(events.read(workdir.path)) == before
        go.touch()
        _, err = first.communicate(timeout=120)
        assert first.returncode == PREEMPTED, err
        assert checkpoint.steps(workdir.path) == [9]
        with open(workdir.metrics, encoding="utf-8") as file:
            assert [json.loads(line)["step"] for line in file] == [*range(1, 10)]
    finally:
        first.kill()
        first.communicate()


@pytest.mark.slow
def test_all_processes_of_a_second_run_are_refused(hold, arguments, tmp_path):
    (tmp_path / "run").mkdir()
    with trainer_lock.locked(tmp_path / "run"):
        ended = several.finish(
            several.start(2, 1, "-m", "bipe_jax.train", *arguments, "--config.mesh.devices=2")
        )
    for code, _, err in ended:
        assert code == 1 and f"is being trained by process {os.getpid()} on" in err, err
        assert "Traceback" not in err
