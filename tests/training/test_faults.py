"""A few real trainings under faults (see tests/faults), and what kept some from surviving, one by one."""

import errno
import os
import resource
import subprocess
import sys
import time

import jax
import pytest
from jax.experimental import multihost_utils
from paths import ROOT

from bipe_jax import checkpoint, plan, processes
from bipe_jax.checkpoint import checksums
from bipe_jax.data import tokenizer
from bipe_jax.errors import Transient, UserError
from bipe_jax.segments import Rule
from bipe_jax.training import failures, step
from bipe_jax.training.observing.tensorboard import TensorBoard
from bipe_jax.training.trainer import train
from bipe_jax.workdir import files
from tests.faults import kinds
from tests.training.test_train import assert_same_run

# Not a full disk, a directory that vanishes, and faults of the data, which tests below and those of
# tests/data/test_faults_of_data.py have by themselves; `python -m tests.faults` has all.
KINDS = tuple(kind for kind in kinds.KINDS if kind not in ("full", "vanished", "data"))


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    line = [sys.executable, "-m", "tests.faults", f"--runs={len(KINDS)}", "--seed=7", "--jobs=2"]
    line += [f"--kinds={','.join(KINDS)}", f"--directory={tmp_path_factory.mktemp('faults')}"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_survives(harness, kind):
    assert f"\n{kind} --seed=7: survived" in "\n" + harness.stdout, harness.stdout + harness.stderr


@pytest.mark.slow
def test_the_harness_counts_what_survived(harness):
    assert harness.returncode == 0
    table = [line.split() for line in harness.stdout.split("\n\n")[-1].splitlines()]
    assert table == [
        ["fault", "survived", "lost"],
        *([kind, "1", "0"] for kind in KINDS),
        ["all", str(len(KINDS)), "0"],
    ]


def test_sigterm_is_asked_for_once_a_step_also_in_a_run_that_goes_on(config, tmp_path, monkeypatch):
    """JAX heeds it at the highest number that it was asked with: other askers delay the stop."""
    assert not train(config, str(tmp_path), stop_at=6)
    asked = []

    def record(step):
        asked.append(step)
        return False

    monkeypatch.setattr(processes, "_joined", True)  # as of several processes
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", record)
    assert train(config, str(tmp_path))
    assert asked == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def disk(monkeypatch):
    """Makes saves fail behind the training's back, at their numbers from 1; pauses are short."""
    monkeypatch.setattr(files, "PAUSES", (0.05, 0.05, 0.05))
    write, saves = checksums.write, []

    def fail(*numbers):
        def write_or_fail(directory):
            saves.append(directory)
            if len(saves) in numbers:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
            write(directory)

        monkeypatch.setattr(checksums, "write", write_or_fail)
        return saves

    return fail


def test_a_save_that_failed_is_noticed_before_the_next_is_due(
    config, tokenizer_file, tmp_path, disk
):
    disk(1)
    parsed = plan.make(config).with_rule(Rule((1,)))
    state = step.init_state(parsed, jax.random.key(0))
    things = (state, {}, parsed, tokenizer.load(tokenizer_file), {})
    with checkpoint.Checkpoints(tmp_path, keep=3, every=1) as checkpoints:
        checkpoints.save(*things)
        until = time.monotonic() + 20
        while not checkpoints.failed():
            assert time.monotonic() < until
            time.sleep(0.01)
        assert checkpoints.latest is None
        checkpoints.save(*things)
        checkpoints.finish(pytest.fail)
        assert checkpoints.latest == 0 and not checkpoints.failed()


def test_saves_that_are_due_do_not_use_up_the_pauses(config, tmp_path, disk, monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (3.0,))
    config.checkpoint.every = 1
    saves = disk(2)
    assert train(config, str(tmp_path))
    assert 3 <= len(saves) <= config.steps - 1
    assert checksums.verify(tmp_path / "checkpoints" / "12") == []


@pytest.mark.parametrize(
    "fails",
    [(2,), *(pytest.param(x, marks=pytest.mark.slow) for x in ((1, 2, 3), (2, 3, 4), (3, 4, 5)))],
    ids=str,
)
def test_each_pause_is_followed_by_a_save(config, tmp_path, disk, fails):
    """Saves 1 to 3 are those of steps 4, 8 and 12, and the failures in a row are as many as pauses."""
    assert train(config, str(tmp_path / "whole"))
    saves = disk(*fails)
    assert train(config, str(tmp_path / "full"))
    assert len(saves) >= max(fails) + 1
    assert checksums.verify(tmp_path / "full" / "checkpoints" / "12") == []
    assert_same_run(tmp_path / "whole", tmp_path / "full", config.steps)


@pytest.mark.parametrize("keep", [1, 3])
def test_a_save_that_fails_too_often_says_which_checkpoint_is_left(config, tmp_path, disk, keep):
    """Orbax counts the save that is under way, and not the one that it will delete afterwards."""
    config.checkpoint.keep = keep
    saves = disk(*range(2, 6))
    with pytest.raises(Transient, match=r"No space left on device.*last complete one is step 4: "):
        train(config, str(tmp_path))
    assert len(saves) == 5
    assert os.listdir(tmp_path / "checkpoints") == ["4"]
    assert train(config, str(tmp_path))


def test_a_write_that_the_disk_failed_goes_on_where_it_was(tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(files, "PAUSES", (0, 0))
    heals = lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))  # noqa: E731
    monkeypatch.setattr(files._LOG, "warning", heals)
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.write("a" * 99 + "\n")
        files.retry(file.flush, file.name)
        file.write("b" * 99 + "\n")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (120, hard))
            files.retry(file.flush, file.name)
        finally:
            heals()
    assert (tmp_path / "metrics.jsonl").read_text() == "a" * 99 + "\n" + "b" * 99 + "\n"


def test_a_full_disk_ends_tensorboard_with_one_line(tmp_path, capsys):
    """And neither the run, nor does it let it wait for ever for a thread that the disk has ended."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    board = TensorBoard(str(tmp_path / "board"), 1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        for number in range(50):
            board.add(number, {"loss": 1.0})
        board.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"{tmp_path / 'board'} cannot be written (File too large); continuing" in said[0]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "WORKDIR: No space left on device: mend",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "WORKDIR/x"),
            "WORKDIR/x: No such file: mend",
        ),
    ],
)
def test_what_the_disk_fails_is_one_line_and_no_wrong_input(tmp_path, error, line):
    if error.filename:
        error.filename = error.filename.replace("WORKDIR", str(tmp_path))
    with (
        pytest.raises(Transient, match=line.replace("WORKDIR", str(tmp_path))),
        failures.recorded(str(tmp_path)),
    ):
        raise error
    assert not (tmp_path / "failed").exists()
    with pytest.raises(FileNotFoundError), failures.recorded(str(tmp_path)):
        raise FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere")


@pytest.mark.slow
def test_a_workdir_that_vanished_is_not_made_anew(config, tmp_path, monkeypatch):
    """As when a network's disk is gone; the run goes on when it is back."""
    monkeypatch.setattr(files, "PAUSES", (0.05, 0.05, 0.05))
    assert train(config, str(tmp_path / "whole"))
    workdir, away = tmp_path / "run", tmp_path / "away"
    save, saves = checkpoint.Checkpoints.save, []

    def vanishing(self, *args):
        saves.append(args[0]["step"])
        if len(saves) == 2:
            self._manager.wait_until_finished()
            workdir.rename(away)
        save(self, *args)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", vanishing)
    message = r"checkpoints failed .*has vanished.* is step 4: "
    with pytest.raises(UserError, match=message) as raised:
        train(config, str(workdir))
    assert not isinstance(raised.value, Transient)
    assert len(saves) >= 5
    assert not workdir.exists()
    away.rename(workdir)
    assert train(config, str(workdir))
    assert_same_run(tmp_path / "whole", workdir, config.steps)


def test_a_workdir_that_comes_back_in_time_is_saved_to(config, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (0.05, 0.05, 0.05))
    workdir, away = tmp_path / "run", tmp_path / "away"
    save, saves = checkpoint.Checkpoints.save, []

    def blinking(self, *args):
        saves.append(args[0]["step"])
        if len(saves) == 2:
            self._manager.wait_until_finished()
            workdir.rename(away)
        if len(saves) == 4:
            away.rename(workdir)
        save(self, *args)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", blinking)
    assert train(config, str(workdir))
    assert checksums.verify(workdir / "checkpoints" / "12") == []
