"""Training under a real SLURM on this host, see slurm_cluster.py.

BIPE_SLURM=1 pytest tests/launch/test_slurm.py

Jobs are disturbed as SLURM, their users and the hardware do it, and must end as an undisturbed one.
"""

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from paths import ROOT
from slurm_cluster import wait

from launch import slurm
from launch.jobs import Job

pytestmark = pytest.mark.skipif(
    "BIPE_SLURM" not in os.environ, reason="takes minutes, and root: set BIPE_SLURM=1"
)

STEPS = 30
LONG = 400  # seconds, for a job on a machine that is busy


@pytest.fixture(scope="module")
def cluster():
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module", autouse=True)
def environment(cluster):
    """What launchers, and by way of sbatch jobs, inherit."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SLURM_CONF", "PATH"):
            patch.setenv(name, cluster.environment[name])
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("BIPE_PYTHON", sys.executable)
        patch.chdir(ROOT)
        yield patch


@pytest.fixture(autouse=True)
def crashes_of_this_test(cluster):
    cluster.crashes.clear()


@pytest.fixture(scope="module")
def overrides(tmp_path_factory, command, shards, held_out, tokenizer_file):
    """Of a small run on prepared data, which any number of processes can read."""
    prepared = str(tmp_path_factory.mktemp("data") / "prepared")
    done = command("data.prepare", f"--input={shards}", f"--output={prepared}",
                   f"--tokenizer={tokenizer_file}", "--length=32", "--workers=1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return (
        ("data.train", f"prepared:{prepared}"),
        ("data.evaluation", held_out),
        ("tokenizer.path", tokenizer_file),
        ("evaluation.lengths", (32,)),
        ("steps", STEPS),
        ("checkpoint.every", 5),
    )


@pytest.fixture
def slowly(monkeypatch):
    """Jobs take two seconds a step until they are restarted: SLURM looks at limits each half minute."""
    monkeypatch.setenv("BIPE_PYTHON", f"{sys.executable} tests/slow_python.py")
    monkeypatch.setenv("SLEEP", "2")


@pytest.fixture(scope="module")
def sweep(cluster, environment, overrides, tmp_path_factory) -> Path:
    """Two points, each trained by two processes on two nodes."""
    directory = tmp_path_factory.mktemp("sweep")
    rates = {"low": 1e-3, "high": 3e-3}
    points = [
        Job("configs/smoke.py", f"{directory}/{name}", (*overrides, ("optimizer.learning_rate", r)), name)
        for name, r in rates.items()
    ]  # fmt: skip
    slurm.submit(points, TWO, dry_run=False)
    with pytest.raises(slurm.UserError, match=f"for {directory} is in the queue"):
        slurm.submit(points, ["--nodes=2"], dry_run=False)
    return directory


def losses(workdir) -> dict[int, float]:
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def log(workdir) -> str:
    return "".join(path.read_text() for path in Path(workdir).glob("slurm-*.out"))


def launch(cluster, workdir, overrides, *flags) -> str:
    """The number of a job."""
    slurm.submit_one(
        Job("configs/smoke.py", str(workdir), overrides), list(flags), {}, dry_run=False
    )
    shown = cluster.run("squeue", "-h", "-o", "%A %k").stdout.splitlines()
    return next(number for number, where in map(str.split, shown) if where == str(workdir))


TWO = ("--nodes=2", "--cpus-per-task=1")
RATE = (("optimizer.learning_rate", 3e-3),)  # of the sweep's point "high"


def begun(cluster, number, workdir):
    """Waits for a job's first save."""
    saved = workdir / "checkpoints" / "5"
    wait(lambda: saved.exists() or ended(cluster, number), LONG, f"{log(workdir)}\nno save")
    assert saved.exists(), log(workdir)


def ended(cluster, number) -> str:
    """The state that a job has ended in, or ""."""
    state = cluster.job(number)["JobState"]
    return state if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") else ""


def completes(cluster, number, workdir):
    state = wait(lambda: ended(cluster, number), LONG, f"{log(workdir)}\nno end")
    assert state == "COMPLETED", log(workdir)


def assert_undisturbed(cluster, number, workdir, sweep):
    """The job ends well after a restart, with each loss and the evaluation as in the sweep."""
    completes(cluster, number, workdir)
    restarts = int(cluster.job(number)["Restarts"])
    # A slurmd that crashes by itself is one more disturbance.
    assert 1 <= restarts <= 1 + len(cluster.crashes), (cluster.crashes, log(workdir))
    assert "Resuming from step" in log(workdir)
    wait((sweep / "high" / "evaluation.json").exists, LONG, "no end of the sweep")
    assert losses(workdir) == losses(sweep / "high")
    assert len(losses(workdir)) == STEPS
    mine, theirs = (
        json.loads((d / "evaluation.json").read_text()) for d in (workdir, sweep / "high")
    )
    assert mine["results"] == theirs["results"]


def test_two_nodes_of_two_tasks_train_and_evaluate(cluster, overrides, tmp_path):
    number = launch(
        cluster, tmp_path, overrides, "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"
    )
    completes(cluster, number, tmp_path)
    assert len(losses(tmp_path)) == STEPS
    assert (tmp_path / "evaluation.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["devices"] == 4
    assert re.search(r"4 tasks on n\[\d-\d\], start 1", log(tmp_path))


def test_a_sweep_is_an_array(cluster, sweep):
    wait(lambda: all((sweep / name / "evaluation.json").exists() for name in ("low", "high")),
         LONG, f"{log(sweep)}\nno end")  # fmt: skip
    assert losses(sweep / "low")[STEPS] != losses(sweep / "high")[STEPS]
    assert sorted(path.name.rpartition("_")[2] for path in sweep.glob("slurm-*_*.out")) == [
        "0.out",
        "1.out",
    ]


SHOW = """
import json, os, sys
if sys.argv[2] != "bipe_jax.train":
    sys.exit(1)  # launch.restart: no
print(json.dumps({"arguments": sys.argv[3:], "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
                  "setup": os.environ.get("FROM_SETUP")}))
"""


def test_what_tasks_are_given(cluster, tmp_path, monkeypatch):
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "setup.sh").write_text("export FROM_SETUP=yes\n")
    monkeypatch.setenv("BIPE_PYTHON", f"{sys.executable} {tmp_path}/show.py")
    monkeypatch.setenv("BIPE_SETUP", f"{tmp_path}/setup.sh")
    hard = f'{tmp_path}/it\'s \\ "one" $HOME `id` *'
    Path(hard).write_text("A file that only the launcher opens.\n" * 10_000)
    points = [
        Job("configs/smoke.py", f"{tmp_path}/{i}", (("data.train", hard), ("seed", i)), str(i))
        for i in range(2)
    ]
    points[1] = dataclasses.replace(points[1], overrides=(("mesh.devices", 16),))
    gpus = ["--ntasks-per-node=2", "--gpus-per-task=1", "--cpus-per-task=1"]
    slurm.submit(points, ["--jobs=1", *gpus], dry_run=False)
    few = ["--gres=gpu:2", "--cpus-per-task=1"]
    number = launch(cluster, tmp_path / "few", (), *few)
    wait(lambda: log(tmp_path).count("ended with status 0") == 2, 60, "no end")
    wait(lambda: ended(cluster, number), 60, "no end")

    assert "error: 2 GPUs a node, but 1 tasks: --ntasks-per-node=2" in log(tmp_path / "few")
    given = [json.loads(found) for found in re.findall(r"^\d: (\{.*\})$", log(tmp_path), re.M)]
    expected = [
        [*points[0].arguments(), "--config.mesh.devices=2"],
        [*points[1].arguments(), "--config.mesh.devices=16"],
    ]
    assert sorted(task["arguments"] for task in given) == sorted(expected * 2)
    # Each task sees both GPUs of the node: JAX takes the one of its number.
    assert {(task["gpus"], task["setup"]) for task in given} == {("0,1", "yes")}


def test_a_higher_partition_and_the_time_limit(cluster, sweep, overrides, slowly, tmp_path):
    preempted, limited = tmp_path / "preempted", tmp_path / "limited"
    first = launch(cluster, preempted, overrides + RATE, *TWO)
    second = launch(cluster, limited, overrides + RATE, *TWO, "--signal=TERM@60", "--time=30")

    begun(cluster, first, preempted)
    nodes = cluster.job(first)["NodeList"]
    done = cluster.run(
        "sbatch", "--partition=high", f"--nodelist={nodes}", "--nodes=2", "--ntasks=8",
        f"--output={tmp_path}/high.out", "--wrap=date",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    begun(cluster, second, limited)
    minutes = int(cluster.job(second)["RunTime"].split(":")[1])  # of 00:01:23
    cluster.run("scontrol", "update", f"JobId={second}", f"TimeLimit={minutes + 2}")

    for number, workdir in ((first, preempted), (second, limited)):
        assert_undisturbed(cluster, number, workdir, sweep)
        assert "ended with status 42" in log(workdir)
    assert (tmp_path / "high.out").exists()


def test_nodes_that_die(cluster, sweep, overrides, slowly, tmp_path):
    """With a job's first node its batch script dies; without another, that sees the trainer fail."""
    jobs = {}
    for at in (0, 1):
        workdir = tmp_path / str(at)
        number = launch(cluster, workdir, overrides + RATE, "--nodes=2", "--cpus-per-task=4")
        jobs[at] = number, workdir
    lost = []
    for at, (number, workdir) in jobs.items():
        begun(cluster, number, workdir)
        job = cluster.job(number)
        hosts = cluster.run("scontrol", "show", "hostnames", job["NodeList"]).stdout.split()
        assert hosts[0] == job["BatchHost"]
        lost.append(hosts[at])
    for node in lost:
        cluster.kill_node(node)
    try:
        for number, workdir in jobs.values():
            assert_undisturbed(cluster, number, workdir, sweep)
    finally:
        for node in lost:
            cluster.start_node(node)
        wait(lambda: len(cluster.nodes("idle")) == 4, 60, f"{lost} do not come back")


WRONG = ("optimizer.learning_rate=-1", "optimizer.learning_rat=1")


def test_users_errors_are_not_requeued(cluster, overrides, tmp_path):
    numbers = []
    for i in range(2):
        done = cluster.run(
            "sbatch", "--parsable", "--ntasks-per-node=2", "--cpus-per-task=1",
            f"--output={tmp_path}/slurm-{i}.out", "launch/slurm/train.sbatch",
            "--config=configs/smoke.py", f"--config.{WRONG[i]}", f"--workdir={tmp_path}/{i}",
        )  # fmt: skip
        numbers.append(done.stdout.strip())
    for number in numbers:
        wait(lambda n=number: ended(cluster, n), LONG, f"{log(tmp_path)}\nno end")
    time.sleep(8)  # longer than a requeued job would be held
    for i, number in enumerate(numbers):
        job = cluster.job(number)
        assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
        key = WRONG[i].partition("=")[0].rpartition(".")[2]
        assert key in (tmp_path / str(i) / "failed").read_text()
        assert "not restarting: a wrong input: config" in (tmp_path / f"slurm-{i}.out").read_text()


def test_cancelled_by_its_user(cluster, overrides, slowly, tmp_path):
    number = launch(cluster, tmp_path, overrides, *TWO)
    begun(cluster, number, tmp_path)
    cluster.run("scancel", number)
    wait(lambda: "left to SLURM" in log(tmp_path), LONG, f"{log(tmp_path)}\nno end")
    assert "ended with status 42" in log(tmp_path)  # saved all the same
    time.sleep(8)
    assert cluster.job(number)["JobState"] == "CANCELLED"
    assert cluster.job(number)["Restarts"] == "0"
