"""What all launchers share: jobs that are checked before anything is launched, and when to restart."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from bipe_jax import config, errors
from bipe_jax.errors import UserError
from launch import gke, jobs, machines, restart, sky, slurm, sweep
from launch.slurm import __main__ as slurm_main
from launch.tpu_vm import __main__ as tpu_vm_main
from launch.tpu_vm import worker


def job(tmp_path, **overrides):
    pairs = tuple((key.replace("__", "."), value) for key, value in overrides.items())
    return jobs.Job("configs/smoke.py:rope", str(tmp_path / "run"), pairs)


def test_a_job_reads_as_the_trainer_would(tmp_path):
    relative = (("alibi", "position", ("slope_scale", 0.5)),)
    config = jobs.check(
        job(tmp_path, position__relative=relative, steps=7, segments__rule="newline")
    )
    assert config.position.relative == relative
    assert (config.steps, config.segments.rule, config.position.absolute) == (7, "newline", ())


@pytest.mark.parametrize(
    "overrides, says",
    [
        ({"optimizer__learning_rat": 1.0}, "learning_rat"),
        ({"steps": "many"}, "steps"),
        ({"optimizer__learning_rate": -1.0}, "config.optimizer.learning_rate=-1.0"),
    ],
)
def test_a_wrong_job_is_refused(tmp_path, overrides, says):
    with pytest.raises(UserError, match=says):
        jobs.check(job(tmp_path, **overrides))


def test_a_workdir_of_another_config_is_refused(tmp_path):
    saved = config.to_json(jobs.check(job(tmp_path)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    jobs.check(job(tmp_path, steps=99))  # a longer run goes on
    with pytest.raises(
        UserError, match=rf"model.layers=3, but the run in {tmp_path}/run .* with 2"
    ):
        jobs.check(job(tmp_path, model__layers=3))


def test_dry_run_prints_what_would_run(tmp_path, capsys):
    line = [sys.executable, "-c", f"open({str(tmp_path / 'made')!r}, 'w')"]
    jobs.execute(line, dry_run=True)
    assert shlex.split(capsys.readouterr().out) == line
    assert not (tmp_path / "made").exists()
    jobs.execute(line, dry_run=False)
    assert (tmp_path / "made").exists()
    with pytest.raises(UserError, match="status 3"):
        jobs.execute([sys.executable, "-c", "raise SystemExit(3)"], dry_run=False)


def test_programs_that_are_not_there_are_named():
    with pytest.raises(UserError, match="no-such-program is not on this machine: --on=x"):
        jobs.need("no-such-program", "--on=x")


def test_restarts_go_on_while_checkpoints_advance(tmp_path):
    workdir = str(tmp_path)
    assert not restart.decide(workdir, 0)[0]
    for _ in range(9):
        assert restart.decide(workdir, errors.PREEMPTED)[0]
    assert [restart.decide(workdir, 137)[0] for _ in range(4)] == [True, True, True, False]
    (tmp_path / "checkpoints" / "20" / "params").mkdir(parents=True)
    assert restart.decide(workdir, 134) == (True, "it died with code 134; resuming from step 20")
    (tmp_path / "failed").write_text("config.steps=0 must be at least 1\n")
    again, why = restart.decide(workdir, 137)
    assert not again and why.endswith("config.steps=0 must be at least 1")


def test_a_workdir_that_is_gone_or_cannot_be_written_is_left_to_a_person(tmp_path):
    """And is not made: a network's disk may come back to its place."""
    gone = tmp_path / "gone"
    again, why = restart.decide(str(gone), 1)
    assert not again and why.startswith(f"{gone} does not exist: ")
    assert not gone.exists()
    assert restart.decide(str(gone), 137)[0]  # killed before it made it
    (tmp_path / "run").write_text("a file")
    again, why = restart.decide(str(tmp_path / "run"), 137)
    assert not again
    assert why.endswith("run/restarts.json cannot be written: File exists")


def test_hosts_count_one_death_once_each(tmp_path):
    for _ in range(3):
        assert all(restart.decide(str(tmp_path), 137, host)[0] for host in ("a", "b", "c"))
    assert not any(restart.decide(str(tmp_path), 137, host)[0] for host in ("a", "b", "c"))
    assert restart.decide(str(tmp_path), 137)[0]


def test_who_starts_a_run_again_that_was_given_up_has_all_tries(tmp_path):
    for _ in range(2):
        assert [restart.decide(str(tmp_path), 1)[0] for _ in range(4)] == [True, True, True, False]


def test_a_count_that_is_nonsense_is_begun_anew(tmp_path):
    for nonsense in ("[1]", "{", '{"step": -1}', '{"step": -1, "crashes": "x"}'):
        (tmp_path / "restarts.json").write_text(nonsense)
        assert restart.decide(str(tmp_path), 137)[0]
        assert json.loads((tmp_path / "restarts.json").read_text())["crashes"] == 1
    (tmp_path / "restarts.json").unlink()
    (tmp_path / "restarts.json").mkdir()
    assert restart.decide(str(tmp_path), 137)[0]
    assert (tmp_path / "restarts.json").is_file()
    assert (tmp_path / "restarts.json.unreadable-5").is_dir()


LAUNCHERS = {
    "slurm": slurm_main.main,
    "gke": lambda line: gke.submit([machines.job_of(line[:-1])], GKE, dry_run=True),
    "sky": lambda line: sky.submit([machines.job_of(line[:-1])], SKY, dry_run=True),
    "tpu_vm": lambda line: tpu_vm_main.main(["create", "x", "--zone=us-west4-a", *SLICE, *line]),
}
SLICE = ["--slice=v5e:4x4"]
SKY = [*SLICE, "--volume=gs://my-runs:/runs", "--skip-preflight"]
GKE = [*SKY, "--image=x"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    "character", ["\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\udcff"]
)
@pytest.mark.parametrize("where", ["workdir", "value"])
def test_several_lines_are_refused_by_every_launcher(launcher, character, where, capsys):
    main = LAUNCHERS[launcher]
    text = f"a{character}b"
    workdir = f"/runs/{text}" if where == "workdir" else "/runs/x"
    line = ["--config=configs/smoke.py", f"--workdir={workdir}", "--dry-run"]
    if where == "value":
        line.insert(0, f"--config.mesh.topology={text}")
    with pytest.raises(UserError, match=r"contains .*: launchers take one line") as caught:
        main(line)
    assert ascii(character) in str(caught.value)
    assert "sbatch" not in capsys.readouterr().out


@pytest.mark.parametrize("on", ["local", "slurm", "gke", "sky"])
def test_several_lines_are_refused_in_a_sweep(on, tmp_path, capsys):
    (tmp_path / "sweep.py").write_text(
        "def get_sweep():\n  return [{'mesh.topology': 'a'}, {'mesh.topology': 'x\\n--config.steps=1'}]\n"
    )
    line = ["--config=configs/smoke.py", f"--sweep={tmp_path}/sweep.py", f"--on={on}", "--dry-run"]
    with pytest.raises(UserError, match=r"point 2 of 2: --config\.mesh\.topology=.*contains '\\n'"):
        sweep.main([*line, f"--output={tmp_path}/out"])
    with pytest.raises(UserError, match=r"--workdir=.*contains '\\n'"):
        sweep.main([*line, f"--output={tmp_path}/o\nut"])
    assert not capsys.readouterr().out


HARD = "a $(X) $$ $$(Y) ${Z} `id` {{ 1 }} {% x %} %j %% \\ \\n ' \" # ; & | <é> $"


def expanded(text: str, known: dict) -> str:
    """What Kubernetes makes of an argument: $(X) is the variable's value if there is one, $$ is $."""
    return re.sub(
        r"\$(\$|\((\w+)\))",
        lambda m: "$" if m[1] == "$" else known.get(m[2], m[0]),
        text,
    )


def test_values_arrive_as_they_are(tmp_path, capsys):
    """Through Kubernetes, through SkyPilot's script in a shell, and through SLURM's file of jobs."""
    run = jobs.Job("configs/smoke.py", "/runs/x", (("mesh.topology", HARD),), "x")
    gke.submit([run], GKE, dry_run=True)
    (made,) = yaml.safe_load_all(capsys.readouterr().out)
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    arguments = pod["containers"][0]["args"]
    assert f"--config.mesh.topology={HARD}" in [
        expanded(a, {"X": "1", "Y": "2"}) for a in arguments
    ]
    assert "$$(X)" in " ".join(arguments)

    sky.submit([run], SKY, dry_run=True)
    (made,) = yaml.safe_load_all(capsys.readouterr().out)
    script = made["run"].partition("\n")[0] + '\nprintf "%s\\0" "$@"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert f"--config.mesh.topology={HARD}" in done.stdout.decode().split("\0")

    directory = tmp_path / "50%j of a b"
    job_of = jobs.Job("configs/smoke.py", str(directory / "x"), (("mesh.topology", HARD),), "x")
    slurm.submit([job_of], [], dry_run=True)
    _, line, command = capsys.readouterr().out.splitlines()
    read = 'mapfile -d "" -t a < <(xargs printf "%s\\0" <<<"$1"); printf "%s\\0" "${a[@]}"'
    done = subprocess.run(["bash", "-c", read, "bash", line], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == job_of.arguments()
    assert f"--output={tmp_path}/50%%j of a b/slurm-%A_%a.out" in shlex.split(command)
    with pytest.raises(UserError, match="has a backslash, which SLURM takes"):
        slurm.submit_one(jobs.Job("configs/smoke.py", "/a\\b/x"), [], {}, dry_run=True)


def test_a_unit_has_one_line_a_setting(tmp_path):
    """A backslash at the end of a line would join it with the next."""
    text = worker.unit("/mnt/x\\", ["--config.mesh.topology=a\\"], hosts=1)
    assert not any(line.endswith("\\") for line in text.splitlines())
