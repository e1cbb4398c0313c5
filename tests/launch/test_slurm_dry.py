"""What launch.slurm would submit, and refuses, without SLURM."""

import os
import shlex
import stat
import subprocess

import pytest
from paths import ROOT

from bipe_jax.errors import UserError
from launch import slurm
from launch.jobs import Job
from launch.slurm import __main__ as command


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    """A PATH without SLURM; returns a directory on it."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_dry_run_of_a_run(no_slurm, tmp_path, capsys):
    run = f"{tmp_path}/run"
    command.main(
        ["--config=configs/smoke.py", "--config.steps=9", f"--workdir={run}", "--dry-run", "--",
         "--nodes=2", "--ntasks-per-node=8"]
    )  # fmt: skip
    assert shlex.split(capsys.readouterr().out) == [
        "sbatch", f"--comment={run}", f"--output={run}/slurm-%j.out", "--job-name=run", "--nodes=2",
        "--ntasks-per-node=8", "launch/slurm/train.sbatch", "--config=configs/smoke.py",
        "--config.steps=9", f"--workdir={run}",
    ]  # fmt: skip
    assert not os.path.exists(run)


def test_dry_run_of_a_sweep(no_slurm, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    points = [Job("configs/smoke.py", f"{sweep}/{i}", (("seed", i),), str(i)) for i in range(3)]
    slurm.submit(points, ["--jobs=2", "--gres=gpu:1"], dry_run=True)
    comment, *lines, line = capsys.readouterr().out.splitlines()
    assert [shlex.split(text) for text in lines] == [point.arguments() for point in points]
    path = comment.removeprefix("# ")
    assert os.path.dirname(path) == str(sweep)
    assert shlex.split(line) == [
        "sbatch", f"--comment={sweep}", f"--output={sweep}/slurm-%A_%a.out", "--array=0-2%2",
        "--gres=gpu:1", "launch/slurm/sweep.sbatch", path,
    ]  # fmt: skip
    assert not sweep.exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--config.stepz=9"], "config has no field 'stepz'"),
        (["--config.steps=0"], "config.steps=0 must be at least 1"),
        (["--nodes=2"], "unexpected argument '--nodes=2'"),
        ([], "sbatch is not on this machine"),
    ],
)
def test_bad_runs_are_refused(no_slurm, tmp_path, arguments, says):
    with pytest.raises(UserError, match=says):
        command.main(["--config=configs/smoke.py", f"--workdir={tmp_path}/run", *arguments])
    assert not (tmp_path / "run").exists()


def test_variables_reach_sbatch_by_its_environment(no_slurm, tmp_path, capfd):
    program(no_slurm / "squeue", "exit 0")
    program(
        no_slurm / "sbatch", f'echo "$TOKEN" >> {tmp_path}/tokens; echo "$@" >> {tmp_path}/lines'
    )
    line = ["--config=configs/smoke.py", f"--workdir={tmp_path}/run", "--env=TOKEN=hush"]
    command.main(line)
    points = [Job("configs/smoke.py", f"{tmp_path}/sweep/0")]
    slurm.submit(points, ["--env=TOKEN=hush", "--nodes=2"], dry_run=False)
    assert (tmp_path / "tokens").read_text() == "hush\nhush\n"
    lines = (tmp_path / "lines").read_text()
    assert "--nodes=2" in lines and "hush" not in lines + "".join(capfd.readouterr())


def test_a_sweep_that_cannot_be_submitted_leaves_nothing(no_slurm, tmp_path):
    points = [Job("configs/smoke.py", f"{tmp_path}/sweep/0")]
    for limit in ("0", "many"):
        with pytest.raises(UserError, match=f"--jobs={limit} must be"):
            slurm.submit(points, [f"--jobs={limit}"], dry_run=False)
    with pytest.raises(UserError, match="sbatch is not on this machine"):
        slurm.submit(points, [], dry_run=False)
    program(no_slurm / "sbatch", "exit 0")
    program(no_slurm / "squeue", "echo 'slurm_load_jobs error: no controller' >&2; exit 1")
    with pytest.raises(UserError, match=r"SLURM does not answer .*no controller"):
        slurm.submit(points, [], dry_run=False)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("spelling", [["--workdir={}"], ["--workdir", "{}"]])
def test_the_batch_script_takes_both_spellings_of_the_workdir(no_slurm, tmp_path, spelling):
    program(no_slurm / "srun", f'echo "$@" > {tmp_path}/srun')
    program(no_slurm / "python", f'echo "$@" > {tmp_path}/asked; exit 1')
    run = tmp_path / "a b"
    environment = {
        "PATH": f"{no_slurm}:/usr/bin:/bin",
        "SLURM_NTASKS": "2",
        "SLURM_TASKS_PER_NODE": "2",
        "SLURM_JOB_NODELIST": "a",
        "SLURM_JOB_ID": "7",
    }
    line = ["bash", "-c", '. launch/slurm/run.sh; train "$@"', "bash", "--config=smoke"]
    line += [word.format(run) for word in spelling]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run.is_dir()
    assert (tmp_path / "asked").read_text() == f"-m launch.restart --workdir={run} --code=0\n"
    assert (tmp_path / "srun").read_text().endswith("--config.mesh.devices=2\n")
