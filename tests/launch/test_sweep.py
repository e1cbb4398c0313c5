"""Sweeps: their algebra, names and checks; real runs on this machine that are killed and go on; tables."""

import contextlib
import csv
import fcntl
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from paths import ROOT

from bipe_jax import checkpoint, cli, config, plan
from bipe_jax.config import naming
from bipe_jax.errors import PREEMPTED, UserError
from bipe_jax.positions import NAMED
from bipe_jax.workdir import heartbeat
from launch import collect, jobs, local, points, sweep
from launch.algebra import chain, product, zipit
from launch.algebra import sweep as values_of
from launch.table import Table

SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.py"))
RATE = "optimizer.learning_rate"


# The algebra.


def test_the_algebra_gives_points_in_order():
    seeds, rates = values_of("seed", [0, 1]), values_of(RATE, [1.0, 2.0])
    loop = [{"seed": s, RATE: r} for s in (0, 1) for r in (1.0, 2.0)]
    assert product(seeds, rates) == loop
    assert zipit(seeds, rates) == [loop[0], loop[3]]
    assert chain(seeds, rates) == [{"seed": 0}, {"seed": 1}, {RATE: 1.0}, {RATE: 2.0}]
    nested = product(chain(seeds, values_of("seed", [5])), zipit(rates, values_of("steps", [7, 8])))
    assert [(p["seed"], p[RATE], p["steps"]) for p in nested] == [
        (seed, *pair) for seed in (0, 1, 5) for pair in ((1.0, 7), (2.0, 8))
    ]


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda: values_of("seed", []), r"sweep\('seed', \.\.\.\) has no values"),
        (lambda: values_of("segments.rule", "newline"), "the values must be a list"),
        (lambda: zipit(values_of("seed", [1]), values_of("steps", [1, 2])), "have 1, 2 points"),
        (lambda: product(values_of("seed", [1]), values_of("seed", [2])), "product: .* set 'seed'"),
        (lambda: zipit(values_of("seed", [1]), values_of("seed", [2])), "zipit: .* set 'seed'"),
    ],
)
def test_what_cannot_be_combined_is_refused(build, says):
    with pytest.raises(UserError, match=says):
        build()


# Points: names, and checks.


def checked(of_points, output="/nowhere/sweep", config="configs/smoke.py", overrides=()):
    return points.check(of_points, config, overrides, str(output), "sweeps/x.py")


def names(of_points, **changes) -> list[str]:
    return [point.job.name for point in checked(of_points, **changes)]


def test_names_do_not_depend_on_other_points():
    few = values_of(RATE, [1e-3, 3e-3])
    more = values_of(RATE, [1e-4, 3e-3, 1e-2, 1e-3])
    assert set(names(few)) < set(names(more))
    assert names([{"seed": 1, RATE: 1e-3}]) == names([{RATE: 1e-3, "seed": 1}])
    assert names([{RATE: 1}]) == names([{RATE: 1.0}])
    # The same run, whether a key is the sweep's or the command line's, has the same id.
    by_line = names(values_of("seed", [1]), overrides=[(RATE, "0.5")])[0]
    assert by_line.rpartition("--")[2] == names([{"seed": 1, RATE: 0.5}])[0].rpartition("--")[2]


def test_ids_follow_what_is_computed():
    point = values_of("seed", [1])
    first = names(point)
    assert names(point, overrides=[("steps", "99")]) != first
    assert names(point, config="configs/smoke.py:rope") != first
    how = [("mesh.fsdp", "2"), ("log.every", "1"), ("data.workers", "1"), ("model.remat", "none")]
    assert names(point, overrides=how) == first
    # What is swept counts, whatever it is.
    assert len({name[-8:] for name in names(values_of("mesh.fsdp", [2, 4]))}) == 2


@pytest.mark.parametrize(
    "key, value, readable",
    [
        (RATE, 3e-5, "learning_rate-3e-05"),
        ("position.relative", (), "relative-none"),
        (
            "position.relative",
            (("alibi", "segment", ("slope_scale", 48.0)), ("rope", "position")),
            "relative-alibi.segment.slope_scale.48_rope.position",
        ),
        ("evaluation.lengths", (64, 128), "lengths-64_128"),
        ("optimizer.name", "lion", "optimizer.name-lion"),  # schedule.name is another
        ("data.train", "a b/ü;x*.jsonl@0.5; y.jsonl@1.0", "train-a-b-x-.jsonl-0.5-y.jsonl-1.0"),
        ("data.train", "/very" * 90, "train--very-very-very-very-ve..ery-very-very-very-very"),
    ],
)  # fmt: skip
def test_names_are_readable_and_safe(key, value, readable):
    job = jobs.Job("configs/base.py", "", ((key, value),))
    name = naming.name_of({key: value}, cli.read_config(job.config_arguments()))
    assert re.fullmatch(re.escape(readable) + "--[0-9a-f]{8}", name)
    assert re.fullmatch("[A-Za-z0-9._-]{1,140}", name)


def test_shipped_sweeps_fit_the_quickstart_and_the_authors_model():
    assert len(SHIPPED) == 5
    for path_of_config in ("configs/quickstart.py", "configs/bipe_rope_151m.py"):
        for path in SHIPPED:
            found = checked(points.read(str(path)), config=path_of_config)
            assert len({point.job.workdir for point in found}) == len(found) >= 4
    for path in SHIPPED:  # each is lines, not a program
        assert len(path.read_text().splitlines()) <= 16


def test_points_in_json_are_those_of_python(tmp_path):
    of_points = [
        {"name": "one", "position.absolute": [["learned", "offset"]], "position.relative": []},
        {"name": "two", "seed": 1, "evaluation.lengths": [32, 64]},
    ]
    path = tmp_path / "points.json"
    path.write_text(json.dumps(of_points))
    tuples = [
        {"name": "one", "position.absolute": (("learned", "offset"),), "position.relative": ()},
        {"name": "two", "seed": 1, "evaluation.lengths": (32, 64)},
    ]
    read = checked(points.read(str(path)))
    wanted = checked(tuples)
    assert [(p.job.name, p.config) for p in read] == [(p.job.name, p.config) for p in wanted]
    path.write_text('[{"seed": 1')
    with pytest.raises(UserError, match=r"points\.json cannot be read"):
        points.read(str(path))
    path.write_text('{"seed": 1}')
    with pytest.raises(UserError, match="a list of dicts"):
        points.read(str(path))


def test_shipped_positions_are_the_quickstarts():
    from configs import quickstart

    found = checked(points.read("configs/sweeps/positions.py"), config="configs/quickstart.py:nope")
    for point, name in zip(found, NAMED, strict=True):
        assert point.config == plan.make(quickstart.get_config(name))


def sweep_file(tmp_path, body: str) -> str:
    path = tmp_path / "sweep.py"
    path.write_text(f"from launch.algebra import *\n\n\ndef get_sweep():\n    {body}\n")
    return str(path)


@pytest.mark.parametrize(
    "body, arguments, says",
    [
        ("return sweep('model.head', [1])", [], "point 1 of 1.*did you mean 'model.heads'"),
        ("return sweep('banana', [1])", [], "no key 'banana'"),
        ("return sweep('steps', [9, 'many'])", [], "point 2 of 2: flag --config.steps=many"),
        ("return sweep('model.heads', [2, 3])", [], "point 2 of 2: config.model.heads=3 must divide"),
        (
            "return sweep('position.absolute', [(('learned', 'position'),)])",
            ["--config.evaluation.lengths=(64,)"],
            "point 1 of 1: the learned table of position ends at 32",
        ),
        ("return sweep('seed', [1, 2, 1])", [], "point 3 of 3: it has the same name and config as point 1"),
        ("return sweep('seed', [0]) + sweep('steps', [20])", [], "point 2 of 2: it has the same"),
        ("return product(sweep('seed', [1]), sweep('seed', [2]))", [], "product: two of the sweeps"),
        ("return []", [], "has no points"),
        ("return {'seed': 1}", [], "must return a list"),
        ("return 1 / 0", [], "ZeroDivisionError"),
        ("return sweep('seed', [1])", ["--config.seed=3"], "--config.seed is set by the sweep"),
        ("return sweep('seed', [1])", ["--config.steps"], "--config.KEY=VALUE"),
        ("return sweep('seed', [1])", ["--config.stepz=3"], "no field 'stepz'"),
        ("return sweep('seed', [1])", ["--config=configs/none.py"], "no file 'configs/none.py'"),
        ("return sweep('seed', [1])", ["--sweep=none.py"], "--sweep=none.py: no such file"),
        ("return sweep('seed', [1])", ["--sweep=README.md"], "must be a Python file"),
        ("return sweep('seed', [1])", ["--on=mars"], "--on=mars is unknown: use local, slurm, gke, sky"),
        ("return sweep('seed', [1])", ["--jobs=x"], "argument --jobs: invalid int value: 'x'"),
        ("return sweep('seed', [1])", ["--confg=x"], "unrecognized arguments: --confg=x"),
        ("return sweep('seed', [1])", ["--jobs=0"], "--jobs=0 must be at least 1"),
        ("return sweep('seed', [1])", ["--on=slurm", "--jobs=2"], "--jobs=2 is for --on=local"),
        ("return sweep('seed', [1])", ["--on=gke", "--env=A=b"], "of --on=gke follow --"),
        ("return sweep('seed', [1])", ["--env=A B=c"], "--env=A B=... must be NAME or NAME=VALUE"),
        ("return sweep('seed', [1])", ["--", "--nodes=2"], "-- --nodes=2: flags after --"),
        ("return sweep('seed', [1])", ["--output="], "--output is needed"),
        ("return sweep('seed', [1])", ["--output=/proc/x"], "/proc/x/.*cannot be written"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_launches_nothing(tmp_path, monkeypatch, body, arguments, says):
    monkeypatch.setattr(subprocess, "Popen", None)
    usual = ["--config=configs/smoke.py", f"--sweep={sweep_file(tmp_path, body)}"]
    with pytest.raises(UserError, match=says) as error:
        sweep.main([*usual, f"--output={tmp_path}/out", *arguments])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_workdir_of_another_config_is_refused(tmp_path):
    path = sweep_file(tmp_path, "return sweep('seed', [1, 2])")
    last = checked(points.read(path), tmp_path)[1]
    other = last.config.replace({"model.layers": 7})
    os.makedirs(last.job.workdir)
    Path(last.job.workdir, "config.json").write_text(json.dumps(config.to_json(other)))
    with pytest.raises(
        UserError, match=f"point 2 of 2: config.model.layers=2, but .*{last.job.name}"
    ):
        sweep.main(["--config=configs/smoke.py", f"--sweep={path}", f"--output={tmp_path}"])


# Other launchers.


def beat_of(phase: str, age: float) -> dict:
    """A heartbeat of a run on another machine."""
    beat = {"time": time.time() - age, "phase": phase, "pid": 1, "host": "other", "step": 3}
    return beat | {"since": time.time() - 9999, "seconds": {}}


@pytest.fixture
def backend(monkeypatch):
    """A stand-in for launch.slurm; what it was given."""
    given = []
    monkeypatch.setitem(
        sys.modules, "launch.slurm", types.SimpleNamespace(submit=lambda *args: given.append(args))
    )
    return given


def test_a_backend_gets_what_is_neither_finished_nor_running(tmp_path, backend, capfd):
    path = sweep_file(tmp_path, "return sweep('seed', [1, 2, 3, 4])")
    line = ["--config=configs/smoke.py", "--config.steps=7", f"--sweep={path}", "--on=slurm"]
    line.append(f"--output={tmp_path}/out")
    held = checked(points.read(path), tmp_path / "out", overrides=[("steps", "7")])
    jobs_of_all = [point.job for point in held]
    sweep.main([*line, "--dry-run", "--", "--nodes=2", "--time=1:00"])
    assert backend == [(jobs_of_all, ["--nodes=2", "--time=1:00"], True)]
    assert not (tmp_path / "out").exists()
    sweep.main(line)
    assert backend.pop() == (jobs_of_all, [], False)
    assert {path.parent.name for path in (tmp_path / "out").glob("*/point.json")} == {
        job.name for job in jobs_of_all
    }

    def beat(job, phase, age):
        held = beat_of(phase, age)
        Path(job.workdir, "heartbeat.json").write_text(json.dumps(held))

    beat(jobs_of_all[0], "training", 5)
    beat(jobs_of_all[1], "training", 500)
    beat(jobs_of_all[2], "preempted", 5)
    finish(jobs_of_all[3].workdir, step=7)
    sweep.main(line)
    assert backend.pop()[0] == jobs_of_all[1:3]
    said = capfd.readouterr().err
    assert f"{jobs_of_all[0].name}: running on other (training)" in said
    assert f"{jobs_of_all[3].name}: finished before" in said


def test_backends_that_are_not_there_are_named(tmp_path, backend, monkeypatch):
    path = sweep_file(tmp_path, "return sweep('seed', [1])")
    line = ["--config=configs/smoke.py", f"--sweep={path}", f"--output={tmp_path}/out"]

    def missing(*_):
        jobs.need("no-such-program", "--on=slurm")

    monkeypatch.setattr(sys.modules["launch.slurm"], "submit", missing)
    with pytest.raises(UserError, match="no-such-program is not on this machine"):
        sweep.main([*line, "--on=slurm"])
    monkeypatch.setitem(sys.modules, "launch.sky", None)
    with pytest.raises(UserError, match=r"--on=sky cannot be used here .*nothing was launched"):
        sweep.main([*line, "--on=sky"])
    assert not (tmp_path / "out").exists()


# What a run's directory says.


def finish(workdir, step: int, perplexity: float = 9.0, evaluation=None) -> None:
    """What configs/smoke.py leaves after so many steps, as far as sweeps look at it.

    evaluation: changes to it.
    """
    os.makedirs(f"{workdir}/checkpoints/{step}/params", exist_ok=True)
    rows = [
        {"set": s, "length": n, "perplexity": perplexity + n / 100, "perplexity_error": 0.5, "loss": 2.0,
         "document_losses": [9 * math.log(perplexity + n / 100) * i for i in (0.9, 1.0, 1.1)]}
        for s in ("Plays", "Python library")
        for n in (32, 64, 128, 256, 512)
    ]  # fmt: skip
    held = {
        "step": step,
        "training_length": 32,
        "data": "quickstart:validation",
        "context": 512,
        "results": rows,
    }
    held["targets"] = [
        {"set": s, "targets": "t", "collection": "c", "documents": ["x", "y", "z"], "tokens": [9] * 3,
         "bytes": [30] * 3}
        for s in ("Plays", "Python library")
    ]  # fmt: skip
    Path(workdir, "evaluation.json").write_text(json.dumps(held | (evaluation or {})))
    losses = [json.dumps({"step": i + 1, "loss": 8.0 - i / 10}) for i in range(step)]
    Path(workdir, "metrics.jsonl").write_text("\n".join(losses) + '\n{"step": 99, "lo')


def test_finished_is_the_last_steps_checkpoint_and_its_evaluation(tmp_path):
    plain = checked([{}])[0].config
    run = str(tmp_path)
    assert not points.finished(run, plain)
    finish(run, step=20)
    assert points.finished(run, plain)
    os.rename(f"{run}/checkpoints/20", f"{run}/checkpoints/20.orbax-checkpoint-tmp")
    assert not points.finished(run, plain)
    for change in (
        {"step": 10},
        {"data": "other"},
        {"context": 64},
        {"results": [{"length": 32}]},
        {"results": None},
    ):
        finish(run, 20, evaluation=change)
        assert not points.finished(run, plain)
    finish(run, step=20)
    longer = plain.replace({"steps": 21})
    assert not points.finished(run, longer)
    Path(run, "evaluation.json").write_text('{"step": 20, "res')
    assert not points.finished(run, plain)


def test_finished_on_examples_is_an_answer_to_each_of_their_sources(tmp_path):
    tests = [f"synthetic:fold(operators={n}, split=test, count=4)" for n in (2, 3)]
    fields = {
        "data.train": "synthetic:fold", "data.evaluation": "; ".join(tests), "data.packing": "row",
    }  # fmt: skip
    of_examples = checked([fields])[0].config
    run = str(tmp_path)
    finish(run, step=20)
    assert not points.finished(run, of_examples)
    for sources, done in ((tests, True), (tests[:1], False), (tests[::-1], False)):
        answers = {"step": 20, "results": [{"source": source} for source in sources]}
        Path(run, "answers.json").write_text(json.dumps(answers))
        assert points.finished(run, of_examples) == done
    Path(run, "answers.json").write_text('{"step": 10, "results": []}')
    assert not points.finished(run, of_examples)


@pytest.mark.parametrize(
    "age, changes, alive",
    [
        (59, {}, True),
        (61, {}, False),
        (200, {"step_seconds": 30.0}, True),
        (2000, {"phase": "starting"}, True),  # compiling
        (2000, {"phase": "evaluating"}, True),
        (4000, {"phase": "evaluating"}, False),
        (1, {"phase": "done"}, False),
        (2000, {"phase": "saving", "host": socket.gethostname(), "pid": os.getpid()}, True),
        (1, {"host": socket.gethostname(), "pid": 2**22 + 1}, False),  # more than Linux has
        (1, {"host": socket.gethostname(), "pid": None}, False),
    ],
)
def test_a_run_lives_as_long_as_its_phase_may_be_quiet(tmp_path, age, changes, alive):
    (tmp_path / "heartbeat.json").write_text(json.dumps(beat_of("training", age) | changes))
    assert (heartbeat.read_alive(str(tmp_path)) is not None) == alive


# This machine.


def test_a_run_whose_directory_vanishes_fails_alone(tmp_path):
    run, other = (local.Run(point) for point in checked(values_of("seed", [0, 1]), tmp_path))
    os.makedirs(other.workdir)
    other._line = [sys.executable, "-c", "raise SystemExit(0)"]
    local._loop([run, other], [None] * 2, [], Table([run, other]))
    assert (run.state, other.state) == ("failed", "done")
    assert f"No such file or directory: '{run.log}'" in run.why


def test_what_a_dead_run_leaves_does_not_keep_it_from_starting_again(tmp_path):
    (point,) = checked(values_of("seed", [0]), tmp_path)
    run = local.Run(point)
    os.makedirs(run.workdir)
    # The first time it leaves a child that holds the log, and dies; the second time it is done.
    run._line = [
        sys.executable,
        "-c",
        "import os, subprocess, sys\n"
        f"if os.path.exists({run.workdir + '/restarts.json'!r}): sys.exit()\n"
        "subprocess.Popen(['sleep', '60'])\n"
        "os.abort()\n",
    ]
    local._loop([run], [None], [], Table([run]))
    assert run.state == "done", run.why


@pytest.fixture(scope="module")
def line(tokenizer_file, shards, held_out):
    """A sweep's command line on the tests' corpus, but for its file and output."""
    settings = {
        "tokenizer.path": tokenizer_file,
        "data.evaluation": held_out,
        "data.shuffle_blocks": 16,
        "checkpoint.every": 40,
        "evaluation.lengths": (32, 64),
        "evaluation.tokens": 64,
    }
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "launch.sweep", "--config=configs/smoke.py", *overrides]


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def logged(directory) -> list[dict]:
    """The complete lines of metrics.jsonl."""
    try:
        text = Path(directory, "metrics.jsonl").read_text()
    except OSError:
        return []
    return [json.loads(complete) for complete in text.split("\n")[:-1]]


def pid_of(workdir: str) -> int | None:
    """The living trainer of a directory."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().endswith(f"--workdir={workdir}\0".encode()):
                return int(path.parent.name)
    return None


def test_what_is_finished_is_left_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(subprocess, "Popen", None)
    path = sweep_file(tmp_path, "return sweep('seed', [1, 2])")
    line = ["--config=configs/smoke.py", f"--sweep={path}", f"--output={tmp_path}/out"]
    held = checked(points.read(path), tmp_path / "out")
    finish(held[0].job.workdir, step=20)
    assert sweep.main([*line, "--dry-run"]) == 0
    printed = capfd.readouterr()
    assert f"{held[0].job.name}: finished before" in printed.err
    assert printed.out == shlex.join([*jobs.TRAIN, *held[1].job.arguments()]) + "\n"
    finish(held[1].job.workdir, step=20)
    assert sweep.main(line) == 0
    said = capfd.readouterr().err
    assert f"{held[0].job.name}: done before" in said and "2 of 2 points are done" in said


def quick_runs(monkeypatch, script="pass"):
    """Makes every run this script, which sees its config's arguments in sys.argv."""
    monkeypatch.setattr(jobs, "TRAIN", ("python", "-c", script))


def test_a_run_that_is_alive_keeps_no_other_from_running(tmp_path, monkeypatch, capfd):
    quick_runs(monkeypatch)
    path = sweep_file(tmp_path, "return sweep('seed', [1, 2])")
    line = ["--config=configs/smoke.py", f"--sweep={path}", f"--output={tmp_path}"]
    first, second = (point.job for point in checked(points.read(path), tmp_path))
    log = Path(second.workdir, "log.txt")
    log.parent.mkdir()
    with log.open("ab") as file:  # as the run itself holds it
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep.main(line) == 1
    said = capfd.readouterr().err
    assert f"{first.name}: done\n" in said and f"{second.name}: running" not in said
    assert f"elsewhere: {second.name}: another process trains it" in said
    assert "1 of 2 points are done, 0 failed, 1 are left\nThe same command resumes" in said
    for host, left in (("other", 1), (socket.gethostname(), 0)):
        beat = beat_of("training", 0) | {"host": host, "pid": 2**30}
        (log.parent / "heartbeat.json").write_text(json.dumps(beat))
        assert sweep.main(line) == left
        assert ("it is being trained on other (training)" in capfd.readouterr().err) == bool(left)


def test_devices_are_shared_by_the_runs_at_a_time(monkeypatch, tmp_path):
    eight = [f"GPU-{i}" for i in range(8)]
    assert local.shares(eight, 8) == eight
    assert local.shares(eight, 3) == ["GPU-0,GPU-1", "GPU-2,GPU-3", "GPU-4,GPU-5"]
    assert local.shares(eight, 1) == [None]  # all of them
    assert local.shares([], 3) == local.shares(["GPU-0"], 3) == [None] * 3
    with pytest.raises(UserError, match="--jobs=9: there are 8 GPUs"):
        local.shares(eight, 9)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert local.gpus() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU-a\\nGPU-b\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert local.gpus() == ["GPU-a", "GPU-b"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert local.gpus() == []


def test_runs_at_a_time_have_other_devices_and_the_variables(tmp_path, monkeypatch, capfd):
    """Two at a time of four, which begin and end in their own order: a run that lives holds its device."""
    script = f"""
import os, sys, time
device = os.environ["CUDA_VISIBLE_DEVICES"]
os.mkdir({str(tmp_path)!r} + "/held-" + device)  # fails if another run holds it
time.sleep(0.3 if "--config.seed=1" in sys.argv else 0.05)
os.rmdir({str(tmp_path)!r} + "/held-" + device)
print(device, os.environ["TOKEN"])
"""
    quick_runs(monkeypatch, script)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    path = sweep_file(tmp_path, "return sweep('seed', [1, 2, 3, 4])")
    line = ["--config=configs/smoke.py", f"--sweep={path}", f"--output={tmp_path}/out", "--jobs=2"]
    assert sweep.main([*line, "--env=TOKEN=hush"]) == 0
    logs = [path.read_text().split() for path in (tmp_path / "out").glob("*/log.txt")]
    assert sorted({device for device, _ in logs}) == ["4", "7"]
    assert {token for _, token in logs} == {"hush"} and "hush" not in capfd.readouterr().err


def test_points_can_have_names():
    size = [{"name": "small", "model.layers": 2}, {"name": "large", "model.layers": 4}]
    assert [name[:-8] for name in names(size)] == ["small--", "large--"]
    # The same run has the same id, whatever its name is.
    assert [name[-8:] for name in names(size)] == [
        name[-8:] for name in names(values_of("model.layers", [2, 4]))
    ]
    seeds = values_of("seed", [1, 2])
    both = product(size, seeds)
    assert len(set(names(both))) == 4 and {name.split("--")[0] for name in names(both)} == {
        "small",
        "large",
    }
    rates = [{"name": "slow", RATE: 1e-4}]
    assert names(product(size, rates))[1].startswith("large-slow--")
    for wrong in ("a/b", "", 3, ".x"):
        with pytest.raises(UserError, match=r"point 1 of 1: the name .* must be letters"):
            names([{"name": wrong, "seed": 1}])


@pytest.mark.slow
def test_a_sweep_is_stopped_killed_and_goes_on(tmp_path, line, shards):
    output, last = tmp_path / "out", 200
    path = sweep_file(
        tmp_path,
        f"return product(sweep('steps', [{last}]), chain(sweep('data.train', [{shards!r}]), product("
        f"sweep('data.train', [{shards + '@1.0'!r}]), sweep('seed', [1])),"
        " sweep('data.train', ['/nowhere/*.jsonl'])))",
    )
    line = [*line, f"--sweep={path}", f"--output={output}", "--jobs=2"]

    def begin():
        return subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    first = begin()
    wait(lambda: len(list(output.glob("*/point.json"))) == 3)
    good, second, bad = sorted(
        map(str, output.iterdir()), key=lambda p: ("nowhere" in p, "seed" in p)
    )
    begun = wait(lambda: next(filter(logged, (good, second)), None))
    assert pid_of(good) and pid_of(second) and not pid_of(bad)  # two at a time
    with Path(begun, "log.txt").open("ab") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the run itself holds it
    first.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    first.send_signal(signal.SIGINT)  # the first: it kills nothing
    _, said = first.communicate(timeout=60)
    assert first.returncode == PREEMPTED, said
    assert "0 of 3 points are done, 0 failed, 3 are left\nThe same command resumes" in said
    saved = len(logged(begun))
    assert checkpoint.steps(begun)[-1] == saved < last

    # On it goes; one run is killed outright, one cannot work.
    again = begin()
    os.kill(wait(lambda: len(logged(begun)) > saved and pid_of(begun)), signal.SIGKILL)
    _, said = again.communicate(timeout=90)
    assert again.returncode == 1, said
    assert f"{Path(begun).name}: running (it died with code -9; resuming from step" in said
    assert f"failed: {Path(bad).name}: a wrong input: " in said and "/nowhere/*.jsonl" in said
    assert "2 of 3 points are done, 1 failed, 0 are left" in said
    assert "Traceback" not in said
    for directory in (good, second):
        assert [step["step"] for step in logged(directory)] == [*range(1, last + 1)]
        assert json.loads(Path(directory, "evaluation.json").read_text())["step"] == last
        assert checkpoint.steps(directory)[-1] == last

    collect.collect(str(output))
    table = list(csv.DictReader((output / "sweep.csv").open()))
    assert {row["status"] for row in table} == {"finished", "failed"}
    assert len(table) == 2 * 2 * 2 + 1


def test_no_device_is_taken_by_the_sweep_itself(tmp_path):
    """It would keep a TPU from the runs."""
    program = f"""
from launch import sweep
from jax._src import xla_bridge
sweep.main(["--config=configs/quickstart.py", "--sweep=configs/sweeps/positions.py",
    "--output={tmp_path}", "--dry-run"])
assert not xla_bridge.backends_are_initialized()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(NAMED) and all(
        text.startswith("python -m bipe_jax.train ") for text in lines
    )
    assert not any(tmp_path.iterdir())


def test_the_table_shows_what_happens_first(tmp_path):
    states = ["done"] * 30 + ["running", "failed"] + ["waiting"] * 9
    runs = [
        types.SimpleNamespace(
            name=f"{'long-' * 30}{i}", state=state, shown=state, steps=20, workdir=str(tmp_path),
            elapsed=3700.0,
        )
        for i, state in enumerate(states)
    ]  # fmt: skip
    finish(tmp_path, step=20)
    lines = Table(runs).lines(height=12, width=80)
    assert len(lines) <= 12 and max(map(len, lines)) < 80
    assert re.search(r"…\S*30 +running +20/20 +6.150 +1:01:40$", lines[1])
    assert "failed" in lines[2] and "waiting" in lines[3]
    assert "41 points: 1 running, 1 failed, 9 waiting, 30 done" in lines
