"""What all launchers share: jobs that are checked before anything is launched, and when to restart."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bipe_jax import errors
from bipe_jax.errors import UserError
from launch import jobs, restart

ROOT = Path(__file__).parent.parent


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
    config = jobs.check(job(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict()))
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
    assert restart.PREEMPTED == errors.PREEMPTED
    workdir = str(tmp_path)
    assert not restart.decide(workdir, 0)[0]
    for _ in range(9):
        assert restart.decide(workdir, restart.PREEMPTED)[0]
    assert [restart.decide(workdir, 137)[0] for _ in range(4)] == [True, True, True, False]
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    assert restart.decide(workdir, 134) == (True, "it died with code 134; going on from step 20")
    (tmp_path / "failed").write_text("config.steps=0 must be at least 1\n")
    again, why = restart.decide(workdir, 137)
    assert not again and why.endswith("config.steps=0 must be at least 1")


def test_hosts_count_one_death_once_each(tmp_path):
    for _ in range(3):
        assert all(restart.decide(str(tmp_path), 137, host)[0] for host in ("a", "b", "c"))
    assert not any(restart.decide(str(tmp_path), 137, host)[0] for host in ("a", "b", "c"))
    assert restart.decide(str(tmp_path), 137)[0]


def test_who_starts_a_run_again_that_was_given_up_has_all_tries(tmp_path):
    for _ in range(2):
        assert [restart.decide(str(tmp_path), 1)[0] for _ in range(4)] == [True, True, True, False]


def test_deaths_count_where_the_workdir_cannot_be_written_or_holds_nonsense(tmp_path):
    (tmp_path / "restarts.json.tmp").mkdir()  # fails for root too
    (tmp_path / "restarts.json").write_text("[1]")
    line = [sys.executable, "-m", "launch.restart", f"--workdir={tmp_path}", "--code=137"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("not starting again: it died with code 137")
    assert done.stderr.endswith(f"{tmp_path}/restarts.json is not writable\n")
    answers = [restart.decide(str(tmp_path), 137)[0] for _ in range(2)]
    (tmp_path / "restarts.json.tmp").rmdir()  # writable again, midway
    answers += [restart.decide(str(tmp_path), 137)[0] for _ in range(2)]
    assert answers == [True, True, True, False]
