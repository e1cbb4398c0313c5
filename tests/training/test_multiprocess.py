"""Whole runs in several real processes: equal to one process, stopped, lost, gone on with elsewhere."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import several

from bipe_jax.data.prepare import prepare
from bipe_jax.errors import LOST, PREEMPTED, UserError
from bipe_jax.evaluation.evaluator import evaluate
from bipe_jax.training.trainer import train
from configs import smoke

# Trains several runs, one after the other, and says what became of each.
PROGRAM = """
import json, sys
from bipe_jax import checkpoint, cli, generate, processes
from bipe_jax.errors import UserError
from bipe_jax.evaluation.evaluator import evaluate
from bipe_jax.evaluation import attention_distance
from bipe_jax.evaluation.sampling import Sampling
from bipe_jax.training.trainer import train
from configs import smoke

cli.log_to_terminal()
cli.quiet()
cli.log_to_terminal()
processes.start()
found = {}
for workdir, changes in json.loads(sys.argv[1]).items():
    config = smoke.get_config()
    config.update_from_flattened_dict(changes)
    try:
        found[workdir] = train(config, workdir)
    except UserError as error:
        found[workdir] = str(error)
workdir = next(iter(found))
found["evaluation"] = evaluate(workdir)["results"]
sampling = Sampling(temperature=0.8)
found["text"] = "".join(generate.generate(workdir, "ROMEO: I", 12, sampling))
found["attention"] = attention_distance.analyse(workdir, (32,))["results"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory, shards, held_out, tokenizer_file) -> dict:
    """What all runs here change of configs/smoke.py: prepared data, among others."""
    directory = str(tmp_path_factory.mktemp("prepared"))
    prepare(shards, directory, tokenizer_file, 32, workers=1)
    return {
        "data.train": f"prepared:{directory}",
        "data.evaluation": held_out,
        "steps": 6,
        "checkpoint.every": 4,
        "log.every": 2,
        "evaluation.lengths": (64,),
    }


def losses(workdir) -> dict:
    """Step -> loss. Each step is there once, in order."""
    rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == list(range(1, len(steps) + 1))
    return {row["step"]: row["loss"] for row in rows}


def arguments(workdir, changes: dict, *more: str) -> list[str]:
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    return [
        "-m",
        "bipe_jax.train",
        "--config=configs/smoke.py",
        f"--workdir={workdir}",
        *overrides,
        *more,
    ]


def wait_for(path: Path, running) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until and all(p.poll() is None for p in running)
        time.sleep(0.05)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(base, tmp_path, shards, tokenizer_file):
    """Bit for bit, on each mesh: XLA and gloo add the parts of two devices in the same order."""

    def jobs(of):
        text = base | {"data.train": shards}
        changes = {
            "fsdp": base | {"mesh.fsdp": 2, "mesh.devices": 2},
            # Two that hold the same rows read one stream; the first one trains a tokenizer.
            "tensor": text | {"mesh.tensor": 2, "tokenizer.train_bytes": 100_000},
            "data": base | {"mesh.data": 2, "initial_checkpoint": str(tmp_path / of / "fsdp")},
            "wrong": base | {"mesh.devices": 4},
        }
        if of == "two":
            changes["stream"] = text | {"mesh.data": 2, "tokenizer.path": tokenizer_file}
        return {str(tmp_path / of / name): of_run for name, of_run in changes.items()}

    two = several.start(2, 1, "-c", PROGRAM, json.dumps(jobs("two")))
    one = several.start(1, 2, "-c", PROGRAM, json.dumps(jobs("one")))
    (one,), two = several.finish(one), several.finish(two)
    assert [code for code, _, _ in [one, *two]] == [0, 0, 0], (one, *two)
    texts = [out.splitlines()[-1].replace(str(tmp_path / of), "") for of, (_, out, _) in
             zip(("one", "two", "two"), [one, *two], strict=True)]  # fmt: skip
    of_one, *of_two = map(json.loads, texts)
    wrong = of_one.pop("/wrong")
    assert wrong.startswith("config.mesh.devices=4, but there are 2 devices in 1 processes")
    for found in of_two:
        assert found.pop("/wrong") == wrong.replace("in 1 processes", "in 2 processes")
        assert found.pop("/stream") is True
        assert found == of_one
    for name in ("fsdp", "tensor", "data"):
        assert losses(tmp_path / "two" / name) == losses(tmp_path / "one" / name), name
        assert len(losses(tmp_path / "two" / name)) == 6
    assert losses(tmp_path / "two" / "data")[1] < losses(tmp_path / "two" / "fsdp")[6] + 0.1
    # The first process alone says what it does, and writes.
    _, second = two
    assert second[2] == "" and "perplexity" in two[0][2]
    first, other = (
        json.loads((tmp_path / of / "fsdp" / "evaluation.json").read_text())
        for of in ("one", "two")
    )
    assert first == other
    # A stream gives each reader blocks of its own, and says so to other numbers of readers.
    config = smoke.get_config()
    config.update_from_flattened_dict(
        base | {"data.train": shards, "tokenizer.path": tokenizer_file, "steps": 8}
    )
    with pytest.raises(UserError, match=r"was read by 2 processes, and now by 1: .* prepared data"):
        train(config, str(tmp_path / "two" / "stream"))


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_meshes(base, tmp_path):
    """4 processes, SIGTERM to one of them; then 1, stopped; then 2, which evaluate."""
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    changes = base | {"steps": 40}
    running = several.start(4, 1, *arguments(workdir, changes, "--config.mesh.fsdp=2"))
    wait_for(workdir / "config.json", running)
    undisturbed = several.start(1, 4, *arguments(whole, changes, "--config.mesh.fsdp=2"))
    running[2].send_signal(signal.SIGTERM)
    done = several.finish(running)
    assert [code for code, _, _ in done] == [PREEMPTED] * 4, done
    assert "Stopped and saved" in done[0][2]
    said = [line for _, _, err in done[1:] for line in err.splitlines()]
    assert all("SIGTERM caught" in line for line in said)  # JAX, in the one that got it
    stopped = len(losses(workdir))
    assert 0 < stopped < 36
    assert (workdir / "checkpoints" / str(stopped)).is_dir()

    ((code, _, err),) = several.finish(
        several.start(
            1, 2, *arguments(workdir, changes, f"--stop_at={stopped + 2}", "--config.mesh.tensor=2")
        )
    )
    assert code == PREEMPTED, err
    done = several.finish(
        several.start(2, 1, *arguments(workdir, changes, "--config.mesh.context=2"))
    )
    assert [code for code, _, _ in done] == [0, 0], done
    assert f"Resuming from step {stopped + 2}" in done[0][2] and done[1][2] == ""

    ((code, _, err),) = several.finish(undisturbed)
    assert code == 0, err
    found, expected = losses(workdir), losses(whole)
    # Other meshes, and gloo for four devices, add up in other orders.
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-6)
    result = json.loads((workdir / "evaluation.json").read_text())
    alone = evaluate(str(workdir), output=str(tmp_path / "alone"))
    for row, of_alone in zip(result["results"], alone["results"], strict=True):
        assert row["loss"] == pytest.approx(of_alone["loss"], rel=1e-6)
        assert row["tokens"] == of_alone["tokens"]


@pytest.mark.slow
def test_the_error_of_one_process_ends_all(base, tmp_path):
    """One of two has not got the data, as on a node without the disk."""
    workdir = tmp_path / "run"
    own = [[], ["--config.data.train=prepared:/missing"]]
    begun = time.monotonic()
    done = several.finish(
        several.start(2, 1, *arguments(workdir, base | {"tokenizer.path": ""}), own=own)
    )
    assert time.monotonic() - begun < 60
    assert done[1][0] == 1 and done[0][0] in (LOST, -signal.SIGABRT), done
    line = done[1][2].splitlines()[-1]
    assert line.startswith("error: ") and "/missing" in line and line.endswith("(process 1 of 2)")
    assert "/missing" in (workdir / "failed").read_text()


@pytest.mark.slow
def test_a_save_that_one_process_cannot_make_ends_all(base, tmp_path):
    """One of two may write no file of more than 4 KiB. Orbax would wait for 20 minutes."""
    program = (
        "import os, resource, runpy, sys\n"
        "if os.environ['JAX_PROCESS_ID'] == '0':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "runpy.run_module('bipe_jax.train', run_name='__main__', alter_sys=True)\n"
    )
    changes = base | {"mesh.fsdp": 2}
    begun = time.monotonic()
    done = several.finish(several.start(2, 1, "-c", program, *arguments(tmp_path, changes)[2:]))
    assert time.monotonic() - begun < 90  # training begins, and a dead process is noticed
    assert done[0][0] == 1 and done[1][0] not in (0, PREEMPTED), done
    line = next(line for line in done[0][2].splitlines() if line.startswith("error: "))
    assert f"saving a checkpoint to {tmp_path}/checkpoints failed" in line
    assert "the last complete one is step None" in line
    assert not (tmp_path / "failed").exists()  # another start may do better


def test_one_process_reads_a_checkpoint_while_the_other_computes(run):
    """The second alone: a run's processes notice at different steps that a save is complete."""
    program = (
        "import sys, jax\nfrom bipe_jax import checkpoint, processes\n"
        "from bipe_jax.checkpoint import reading\nprocesses.start()\n"
        "if jax.process_index():\n"
        "    step = checkpoint.steps(sys.argv[1])[-1]\n"
        "    reading.check_restorable(sys.argv[1], step, (1, 2))\n"
        "    print(reading.load(sys.argv[1])[0].step == step)\n"
    )
    first, second = several.finish(several.start(2, 1, "-c", program, str(run)), 60)
    assert first[0] == second[0] == 0, (first, second)
    assert second[1] == "True\n"


def test_processes_that_do_not_come_are_missed():
    program = (
        "from bipe_jax import cli, processes\nprocesses._START_TIMEOUT = 3\n"
        "with cli.user_errors(): processes.start()"
    )
    alone = []
    for number in (0, 1):
        running = several.start(2, 1, "-c", program)
        running.pop(1 - number).kill()
        alone += running
    for code, _, err in several.finish(alone, 60):
        assert code == LOST
        assert err.startswith("error: not all processes of the run came within 3 s")


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_NUM_PROCESSES": "2"},
        {"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "host:x", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
    ],
)
def test_wrong_variables_are_shown(variables, monkeypatch):
    from bipe_jax import processes

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=.*set all three"):
        processes.start()
