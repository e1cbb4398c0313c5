"""What all launchers share: jobs that are checked before anything is launched, and when to restart."""

import json
import shlex
import sys

import pytest

from bipe_jax import config, errors
from bipe_jax.errors import UserError
from launch import jobs, restart


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
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    assert restart.decide(workdir, 134) == (True, "it died with code 134; resuming from step 20")
    (tmp_path / "failed").write_text("config.steps=0 must be at least 1\n")
    again, why = restart.decide(workdir, 137)
    assert not again and why.endswith("config.steps=0 must be at least 1")


def test_a_workdir_that_is_gone_or_cannot_be_written_is_left_to_a_person(tmp_path):
    """And is not made: a network's disk may come back to its place."""
    gone = tmp_path / "gone"
    again, why = restart.decide(str(gone), 1)
    assert not again and why.startswith(f"{gone} is not there: ")
    assert not gone.exists()
    assert restart.decide(str(gone), 137)[0]  # killed before it made it
    (tmp_path / "run" / "restarts.json").mkdir(parents=True)
    again, why = restart.decide(str(tmp_path / "run"), 137)
    assert not again
    assert why.endswith("run/restarts.json cannot be written: Is a directory")


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
