"""SIGTERM and Ctrl-C: of the command, and of `train` in a program of its user's."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import several
from paths import ROOT

from bipe_jax import checkpoint, processes
from bipe_jax.data.batches import Batches
from bipe_jax.errors import PREEMPTED
from bipe_jax.training.trainer import train
from bipe_jax.workdir import events
from tests.training.test_train import assert_same_run

STOPS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def at_batch(monkeypatch):
    """Calls functions before batches, by their number from 1 in the whole test."""
    ordinary, numbers = Batches.__next__, []

    def set_actions(actions):
        def following(self):
            numbers.append(len(numbers) + 1)
            actions.get(numbers[-1], lambda: None)()
            return ordinary(self)

        monkeypatch.setattr(Batches, "__next__", following)

    return set_actions


@pytest.fixture(autouse=True)
def interrupts():
    """Python's own handler of SIGINT, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def sends(number):
    return lambda: signal.raise_signal(number)


def handlers():
    return [signal.getsignal(number) for number in STOPS]


@pytest.mark.slow
def test_ctrl_c_in_a_notebook_saves_and_then_raises(config, at_batch, tmp_path):
    assert train(config, str(tmp_path / "whole"))
    before = handlers()
    at_batch({5: sends(signal.SIGINT)})
    with pytest.raises(KeyboardInterrupt):
        train(config, str(tmp_path / "cut"))
    assert handlers() == before
    assert checkpoint.steps(tmp_path / "cut") == [4, 5]
    assert events.read(str(tmp_path / "cut"))[-1]["event"] == "preempted"
    assert train(config, str(tmp_path / "cut"))  # the cell again
    assert_same_run(tmp_path / "whole", tmp_path / "cut", config.steps)


def test_sigterm_saves_and_returns(config, at_batch, tmp_path, capsys):
    before = handlers()
    at_batch({6: sends(signal.SIGTERM)})
    assert train(config, str(tmp_path)) is False
    assert handlers() == before
    assert checkpoint.steps(tmp_path) == [4, 6]
    assert "Stopping after step 6" in capsys.readouterr().err
    assert train(config, str(tmp_path))  # it does not hear the signal a second time


def test_a_second_ctrl_c_raises_at_once(config, at_batch, tmp_path):
    before = handlers()

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    at_batch({6: twice})
    with pytest.raises(KeyboardInterrupt):
        train(config, str(tmp_path))
    assert handlers() == before
    assert checkpoint.steps(tmp_path) == [4]
    assert events.read(str(tmp_path))[-1]["event"] == "failed"


def test_ctrl_c_at_the_last_step_raises_too(config, at_batch, tmp_path):
    at_batch({12: sends(signal.SIGINT)})
    with pytest.raises(KeyboardInterrupt):
        train(config, str(tmp_path))
    assert checkpoint.steps(tmp_path)[-1] == 12
    assert train(config, str(tmp_path))


def test_the_handlers_of_a_program_stay(config, at_batch, tmp_path):
    heard = []
    before = handlers()
    for number in STOPS:
        signal.signal(number, lambda number, _: heard.append(number))
    try:
        own = handlers()
        at_batch({3: sends(signal.SIGTERM), 5: sends(signal.SIGINT)})
        assert train(config, str(tmp_path))
        assert handlers() == own and heard == list(STOPS)
    finally:
        for number, handler in zip(STOPS, before, strict=True):
            signal.signal(number, handler)


def test_a_thread_trains_without_signals(config, tmp_path):
    before, results = handlers(), []
    thread = threading.Thread(target=lambda: results.append(train(config, str(tmp_path))))
    thread.start()
    thread.join()
    assert results == [True] and handlers() == before


def test_contexts_of_signals_nest():
    before = handlers()
    with processes.stop_signals():
        outer = handlers()
        with processes.stop_signals():
            assert handlers() == outer
            signal.raise_signal(signal.SIGTERM)
        assert processes.preempted(1)  # the inner context was not the one that heard it
    assert handlers() == before and not processes.preempted(1)


def test_the_library_defines_no_flags_and_needs_no_coordinator():
    program = (
        "from absl import flags\n"
        "import bipe_jax.training.trainer, bipe_jax.evaluation.evaluator\n"
        "assert not {'config', 'workdir', 'stop_at', 'profile'} & set(flags.FLAGS)\n"
        "import jax\n"
        "from bipe_jax import processes\n"
        "processes.start()\n"
        "assert not jax.distributed.is_initialized() and jax.process_count() == 1\n"
        "assert processes.is_first() and processes.name() == ''\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "1",
}


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_NUM_PROCESSES": "1"},
        {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "here:1"},
        SLURM | {"SLURM_NTASKS": "1"},
        SLURM | {"SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://127.0.0.1:1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {
            "TPU_PROCESS_ADDRESSES": "10.0.0.1:8476",
            "TPU_WORKER_HOSTNAMES": "a,b",
            "TPU_WORKER_ID": "0",
        },
    ],
    ids=lambda variables: "-".join(variables),
)
def test_a_process_that_is_alone_starts_no_coordination_service(variables):
    """Which would abort it when the wall clock jumps."""
    program = (
        "import jax\n"
        "from bipe_jax import processes\n"
        "def initialize(*args, **kwargs): raise AssertionError('initialized')\n"
        "jax.distributed.initialize = initialize\n"
        "processes.start()\n"
        "assert jax.process_count() == 1 and processes.is_first()\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | variables
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, env=environment)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        SLURM | {"SLURM_NTASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2", "SLURM_NTASKS": "1"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {
            "TPU_PROCESS_ADDRESSES": "10.0.0.1:8476,10.0.0.2:8476",
            "TPU_WORKER_HOSTNAMES": "localhost",
        },
        {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"},
    ],
    ids=lambda variables: "-".join(variables),
)
def test_one_of_several_processes_is_not_alone(variables, monkeypatch):
    for name in (*processes._COUNTS, *processes._HOSTS, "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not processes._is_alone()


# The command, whose 7th batch takes some seconds.
SLOW = """
import runpy, sys, time
from bipe_jax.data.batches import Batches

ordinary, numbers = Batches.__next__, []

def slowly(self):
    numbers.append(1)
    if len(numbers) == 7:
        print("waiting", flush=True)
        time.sleep(SECONDS)
    return ordinary(self)

Batches.__next__ = slowly
runpy.run_module("bipe_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def slow(config, tmp_path):
    """Starts the command, which waits for its 7th batch for so many seconds."""
    values = {
        "tokenizer.path": config.tokenizer.path,
        "data.train": config.data.train,
        "data.evaluation": config.data.evaluation,
        "evaluation.lengths": "(32,)",
        "checkpoint.every": 100,
    }
    arguments = ["--config=configs/smoke.py", f"--workdir={tmp_path}"]
    arguments += [f"--config.{name}={value}" for name, value in values.items()]
    running = []

    def start(seconds):
        program = SLOW.replace("SECONDS", str(seconds))
        process = several.start(1, 1, "-c", program, *arguments)[0]
        running.append(process)
        assert process.stdout.readline() == "waiting\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPS, ids=str)
def test_the_command_saves_and_ends_with_one_status(slow, tmp_path, number):
    process = slow(1.0)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, err
    assert err.splitlines()[-1] == ("Stopped and saved: the same command resumes (exit status 42)")
    assert "Traceback" not in err and "Stopping after step 7" in err
    assert checkpoint.steps(tmp_path) == [7]
    assert events.read(str(tmp_path))[-1]["event"] == "preempted"


@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGTERM, signal.SIGINT],
        [signal.SIGINT, signal.SIGTERM],
        [signal.SIGTERM, signal.SIGTERM, signal.SIGINT],
    ],
    ids=str,
)
def test_only_a_second_ctrl_c_loses_the_save(slow, tmp_path, numbers):
    process = slow(2.0)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.3)
    _, err = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, err
    assert "Traceback" not in err
    assert checkpoint.steps(tmp_path) == [7]


def test_a_second_ctrl_c_ends_the_command(slow, tmp_path):
    process = slow(60.0)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and time.monotonic() - begun < 30
    assert "Traceback" not in err
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.slow
def test_ctrl_c_to_one_of_two_processes_stops_both(config, tmp_path):
    """As SIGTERM: they agree on a step, which both save."""
    values = {
        "tokenizer.path": config.tokenizer.path,
        "data.train": config.data.train,
        "data.evaluation": config.data.evaluation,
        "evaluation.lengths": "(32,)",
        "steps": 100_000,
        "mesh.devices": 2,
    }
    arguments = ["--config=configs/smoke.py", f"--workdir={tmp_path}"]
    arguments += [f"--config.{name}={value}" for name, value in values.items()]
    running = several.start(2, 1, "-m", "bipe_jax.train", *arguments)
    until = time.monotonic() + 120
    while not checkpoint.steps(tmp_path):
        assert time.monotonic() < until and all(p.poll() is None for p in running)
        time.sleep(0.1)
    running[1].send_signal(signal.SIGINT)
    done = several.finish(running, 120)
    assert [code for code, _, _ in done] == [PREEMPTED] * 2, done
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert checkpoint.steps(tmp_path)[-1] == len(lines)
    assert "Traceback" not in done[0][2] + done[1][2]
