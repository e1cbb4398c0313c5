"""Managed jobs of SkyPilot: what is filled in, what SkyPilot itself says of it, and what is refused."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import stat
import subprocess
import sys

import pytest
import yaml
from paths import ROOT

from bipe_jax import errors
from bipe_jax.errors import UserError
from bipe_jax.hardware import GPUS, parse_slice
from launch import machines, sky
from launch.jobs import Job
from launch.sky import managed

TPU = ["--slice=v5e:4x4", "--volume=gs://my-runs:/runs", "--skip-preflight"]
GPU = ["--gpus=h100:8", "--nodes=4", "--volume=gs://my-runs:/runs", "--spot"]


def job(name="first", **overrides):
    pairs = tuple((key.replace("__", "."), value) for key, value in overrides.items())
    return Job("configs/smoke.py:rope", f"/runs/{name}", pairs, name)


def tasks(capsys, arguments, jobs=None):
    capsys.readouterr()
    sky.submit(jobs or [job()], arguments, dry_run=True)
    return list(yaml.safe_load_all(capsys.readouterr().out))


VALIDATE = """
import json, socket, sys

def refuse(*_, **__):
    raise OSError("the test has no network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import sky

for config in json.load(sys.stdin):
    task = sky.Task.from_yaml_config(config)
    task.validate()
    (resources,) = task.resources
    print(json.dumps([str(resources.cloud), resources.accelerators, resources.use_spot,
                      resources.job_recovery, task.num_nodes, sorted(task.storage_mounts)]))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("sky") is None, reason="needs the extra 'sky' in this Python"
)
def test_skypilot_takes_the_tasks_without_a_network(tmp_path, capsys):
    # SkyPilot would fetch its list of accelerators; the names are of skypilot-catalog, v8.
    catalog = tmp_path / ".sky" / "catalogs" / "v8" / "common" / "accelerators.csv"
    catalog.parent.mkdir(parents=True)
    lines = [f"{gpu.sky},\"['GCP', 'AWS']\"" for gpu in GPUS.values()]
    catalog.write_text("\n".join(["AcceleratorName,Clouds", *lines]) + "\n")
    configs = [yaml.safe_load((ROOT / "launch/sky" / name).read_text()) for name in
               ("tpu.yaml", "gpu.yaml")]  # fmt: skip
    configs += tasks(capsys, [*TPU, "--spot"], [job(), job("second", steps=30)])
    configs += tasks(capsys, GPU, [job(batch_size=32)])
    configs += tasks(capsys, ["--gpus=a100-80gb:1", "--volume=shared:/runs"])
    for config in configs:
        config["workdir"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", VALIDATE],
        input=json.dumps(configs),
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    recovery = {
        "strategy": "EAGER_NEXT_REGION",
        "recover_on_exit_codes": [errors.PREEMPTED, errors.LOST],
        "max_restarts_on_errors": 0,
    }
    tpu = ["GCP", {"tpu-v5litepod-16": 1}, True, recovery, 1, ["/runs"]]
    gpu = ["None", {"H100": 8}, True, recovery, 2, ["/runs"]]
    assert found == [
        tpu,
        gpu,
        tpu,
        tpu,
        [*gpu[:4], 4, ["/runs"]],
        ["None", {"A100-80GB": 1}, False, recovery, 1, []],
    ]


@pytest.mark.parametrize(
    "text, name",
    [
        ("v5e:4x4", "tpu-v5litepod-16"),
        ("v6e:2x4", "tpu-v6e-8"),
        ("v4:2x2x1", "tpu-v4-8"),  # by cores, two a chip
        ("v5p:2x2x2", "tpu-v5p-16"),
    ],
)
def test_slices_have_the_names_of_the_cloud(text, name):
    assert managed._accelerators(machines.Machines(parse_slice(text))) == name


@pytest.mark.parametrize("text", ["v5e:4x4*2", "v5p:4x4x12", "tpu7x:2x2x1"])
def test_slices_that_skypilot_cannot_name_are_refused(text):
    with pytest.raises(UserError, match=r"SkyPilot launches one slice .* launch\.gke"):
        sky.submit([job()], [f"--slice={text}", *TPU[1:]], dry_run=True)


@pytest.mark.parametrize("name, arguments", [("tpu", TPU), ("gpu", GPU)])
def test_only_what_is_said_is_filled_in(capsys, name, arguments):
    template = yaml.safe_load((ROOT / "launch" / "sky" / f"{name}.yaml").read_text())
    (made,) = tasks(capsys, arguments, [job(batch_size=32)])
    changed = {key for key in made if made[key] != template.get(key)}
    assert made.keys() == template.keys()
    assert changed <= {"name", "resources", "num_nodes", "file_mounts", "setup", "run"}
    assert made["run"].splitlines()[1:] == template["run"].splitlines()[1:]
    assert made["resources"]["job_recovery"] == template["resources"]["job_recovery"]
    assert made["file_mounts"] == {"/runs": {"source": "gs://my-runs", "mode": "MOUNT"}}


def run_script(script, tmp_path, **environment):
    """What a task's script runs: the worker's arguments and variables."""
    python = tmp_path / "train" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([os.getpid(), sys.argv[1:], dict(os.environ)]))\n"
    )
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]} | environment
    path = (
        tmp_path / "script.sh"
    )  # as SkyPilot runs it; bash -c would exec a last command by itself
    path.write_text(script)
    shell = subprocess.Popen(["bash", path], env=environment, stdout=subprocess.PIPE, text=True)
    out, _ = shell.communicate(timeout=20)
    pid, arguments, variables = json.loads(out)
    assert pid == shell.pid  # the script ends in exec: SIGTERM reaches the worker
    return arguments, variables


def test_the_script_runs_the_worker_in_its_own_process(tmp_path, capsys):
    relative = (("alibi", "position", ("slope_scale", 0.5)),)
    (made,) = tasks(capsys, TPU, [job(position__relative=relative)])
    arguments, variables = run_script(made["run"], tmp_path)
    assert arguments == [
        "-m",
        "launch.worker",
        "--config=configs/smoke.py:rope",
        f"--config.position.relative={relative}",
        "--config.mesh.devices=16",
        "--workdir=/runs/first",
    ]
    assert not any(name.startswith("JAX_") for name in variables)


def test_the_only_host_of_a_slice_is_told_that_it_is(tmp_path, capsys):
    (made,) = tasks(capsys, ["--slice=v5e:2x4", *TPU[1:]])
    _, variables = run_script(made["run"], tmp_path)
    assert {name for name in variables if name.startswith("JAX_")} == {"JAX_NUM_PROCESSES"}
    assert variables["JAX_NUM_PROCESSES"] == "1"


def test_nodes_find_the_first(tmp_path, capsys):
    (made,) = tasks(capsys, GPU, [job(batch_size=32)])
    _, variables = run_script(
        made["run"],
        tmp_path,
        SKYPILOT_NODE_IPS="10.0.0.7\n10.0.0.8\n10.0.0.9\n10.0.0.10",
        SKYPILOT_NUM_NODES="4",
        SKYPILOT_NODE_RANK="2",
    )
    assert variables["JAX_COORDINATOR_ADDRESS"] == f"10.0.0.7:{machines.PORT}"
    assert (variables["JAX_NUM_PROCESSES"], variables["JAX_PROCESS_ID"]) == ("4", "2")


def program(tmp_path, monkeypatch, queue="[]"):
    """A sky that notes how it was called and keeps what it was given."""
    path = tmp_path / "bin" / "sky"
    path.parent.mkdir()
    log = tmp_path / "log"
    path.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n'
        f"case $2 in queue) echo {shlex.quote(queue)};;"
        f" launch) for last; do :; done; cp $last {tmp_path};; esac\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return log


def test_each_job_is_launched_unless_it_is_on(tmp_path, monkeypatch, capsys):
    log = program(tmp_path, monkeypatch, '[{"job_name": "second"}]')
    sky.submit([job(), job("second"), job("third")], TPU, dry_run=False)
    queue, *launched = log.read_text().splitlines()
    assert queue == "jobs queue --skip-finished --output=json"
    assert [re.sub("/.*/", "", line) for line in launched] == [
        f"jobs launch --yes --detach-run {name}.yaml" for name in ("first", "third")
    ]
    assert "second is not finished: kept" in capsys.readouterr().err
    (made,) = tasks(capsys, TPU)
    assert yaml.safe_load((tmp_path / "first.yaml").read_text()) == made


@pytest.mark.parametrize("queue", ["not json", "[1]"])
def test_nothing_is_launched_if_sky_cannot_say_what_is_on(tmp_path, monkeypatch, queue):
    log = program(tmp_path, monkeypatch, queue)
    with pytest.raises(UserError, match="nothing was launched"):
        sky.submit([job()], TPU, dry_run=False)
    assert "launch" not in log.read_text()


@pytest.mark.parametrize(
    "arguments, jobs, says",
    [
        (["--slice=v5e:3x3", *TPU[1:]], [job()], "--slice=v5e:3x3 is unknown"),
        (["--gpus=h100x:8", *GPU[1:]], [job()], "--gpus=h100x:8 is unknown"),
        ([TPU[0], TPU[2]], [job()], "--workdir=/runs/first is in none of the volumes"),
        ([*TPU, "--image=x"], [job()], "unrecognized arguments: --image=x"),
        (TPU, [job(optimizer__learning_rat=1.0)], "learning_rat"),
        (TPU, [job(), job()], "two jobs have the name 'first'"),
        (TPU, [dataclasses.replace(job(), config="/x.py")], "inside this repository"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_launched(
    tmp_path, monkeypatch, arguments, jobs, says
):
    log = program(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=says) as error:
        sky.submit(jobs, arguments, dry_run=False)
    assert "\n" not in str(error.value) and not log.exists()


def test_extras_are_installed_and_variables_are_secrets(capsys):
    run = job(log__wandb="p")
    (made,) = tasks(capsys, [*TPU, "--env=WANDB_API_KEY=hush"], [run])
    assert "--editable '.[tpu,quickstart,wandb]'" in made["setup"]
    assert made["secrets"] == {"WANDB_API_KEY": "(hidden)"}
    with pytest.raises(UserError, match="the run would have no key"):
        sky.submit([run], TPU, dry_run=True)


def test_without_sky_nothing_is_launched(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"sky is not on this machine: python -m launch\.sky"):
        sky.submit([job()], TPU, dry_run=False)


def test_the_command_prints_the_task_or_one_line(capsys):
    line = [sys.executable, "-m", "launch.sky", "--config=configs/smoke.py:rope", "--dry-run"]
    line += ["--workdir=/runs/first", *TPU]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "# sky jobs launch --yes --detach-run first.yaml\n" in done.stdout
    assert list(yaml.safe_load_all(done.stdout)) == tasks(capsys, TPU)
    done = subprocess.run([*line, "--slice=v9:1"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --slice=v9:1 is unknown: ")
    assert len(done.stderr.splitlines()) == 1
