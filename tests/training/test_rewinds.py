"""Rewinds of runs that were stopped, and which checkpoints are deleted: real trainings, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import several
from etils import epath
from paths import ROOT

from bipe_jax import checkpoint
from bipe_jax.checkpoint import checksums, deleting
from bipe_jax.errors import UserError
from bipe_jax.training import observing
from bipe_jax.training.trainer import train
from tests.faults import comparing
from tests.training.test_spikes import (
    assert_state,
    batches,
    fingerprint,
    poison,
    poisoned,
    rule_of,
    trained,
    with_nan,
)
from tests.training.test_train import assert_same_run, read_checkpoint, read_metrics

__all__ = ["batches", "poisoned"]  # fixtures
pytestmark = pytest.mark.slow


def names(workdir) -> set[str]:
    return set(os.listdir(Path(workdir) / "checkpoints"))


@pytest.fixture
def config(config):
    config.spikes.policy = "rewind"
    return config


@pytest.mark.parametrize(
    ("stops", "spike", "keep"),
    [
        *(((5,), 6, keep) for keep in (1, 3)),
        *(((9, 10, 11), 12, keep) for keep in (1, 3)),
        *(((5, 6, 7), 8, 1), ((1,), 2, 1), ((1, 2), 3, 1), ((4,), 6, 1), ((5,), 10, 1)),
    ],
    ids=str,
)
def test_a_rewind_goes_as_far_back_as_in_a_run_that_was_not_stopped(
    config, batches, poisoned, tmp_path, stops, spike, keep
):
    """Regular checkpoints are those of steps 4 and 8."""
    config.checkpoint.keep = keep
    poisoned(batches[spike - 1 : spike], with_nan)
    assert train(config, str(tmp_path / "whole"))
    for stop in stops:
        assert not train(config, str(tmp_path / "stopped"), stop)
    assert train(config, str(tmp_path / "stopped"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 12)
    assert read_metrics(tmp_path / "stopped")[-1]["rewinds"] == 1
    if spike < 10:  # else they are kept, and the target of the rewind is later
        assert names(tmp_path / "stopped") == names(tmp_path / "whole")


def test_a_stop_after_a_rewind_changes_nothing(config, batches, poisoned, tmp_path, caplog):
    """Spikes at step 6 twice, with a stop before each and one after: the checkpoint 5 is saved thrice."""
    poisoned([batches[5], batches[8]], with_nan)
    assert train(config, str(tmp_path / "whole"))
    stops = {fingerprint(batches[i]) for i in (4, 7, 10)}

    def stop(key):
        if key in stops:
            stops.remove(key)
            signal.raise_signal(signal.SIGTERM)

    undo = poison(set(), with_nan, stop)
    try:
        for _ in range(3):
            assert not train(config, str(tmp_path / "stopped"))
            assert names(tmp_path / "stopped") == {"4", "5"}
    finally:
        undo()
    assert train(config, str(tmp_path / "stopped"))
    assert not stops
    assert "saving a checkpoint" not in caplog.text  # Orbax has refused none
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 12)
    assert read_checkpoint(tmp_path / "stopped", 12)["data"]["rewound"] == [4, 2]


def test_rewinds_to_one_checkpoint_are_counted_over_stops(config, batches, request, tmp_path):
    """Step 6 is a spike each time. A stop at step 5, of the third time, saves the count."""
    last, stops = fingerprint(batches[10]), []

    def stop(key):
        if key == last and not stops:
            stops.append(key)
            signal.raise_signal(signal.SIGTERM)

    bad = {fingerprint(batches[i]) for i in (5, 8, 11, 14)}
    request.addfinalizer(poison(bad, with_nan, stop))
    assert not train(config, str(tmp_path))
    assert stops and names(tmp_path) == {"4", "5"}
    with pytest.raises(UserError, match=r"step 6: .*after 3 rewinds to one checkpoint"):
        train(config, str(tmp_path))


def test_without_a_regular_checkpoint_a_run_that_has_passed_one_rewinds_to_its_latest(
    config, batches, poisoned, tmp_path, caplog
):
    """As earlier versions left them, or with another `checkpoint.every`."""
    poisoned(batches[6:7], with_nan)
    assert not train(config, str(tmp_path), 6)
    config.checkpoint.every = 5  # the checkpoints are 4 and 6
    assert train(config, str(tmp_path))
    assert "step 7: loss is nan" in caplog.text and "rewinding to step 6" in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 13))


def harm(step: Path) -> None:
    largest = max(step.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_a_rewind_restores_no_damaged_checkpoint(config, batches, poisoned, tmp_path):
    """The start has verified the latest one only. The batch after the spike is skipped too."""
    poisoned(batches[9:10], with_nan)
    assert not train(config, str(tmp_path), 9)
    harm(tmp_path / "checkpoints" / "8")
    assert train(config, str(tmp_path))
    assert names(tmp_path) == {"4", "8", "8.damaged", "12"}
    good = batches[:4] + batches[11:19]
    assert_state(trained(config, good, rule_of(tmp_path)), read_checkpoint(tmp_path, 12))


def test_a_rewind_that_fails_deletes_nothing(config, batches, poisoned, tmp_path, monkeypatch):
    poisoned(batches[6:7], with_nan)
    assert not train(config, str(tmp_path), 6)
    restore = checkpoint.Checkpoints.restore

    def fail(self, abstract, step):
        if step == 4:
            raise UserError("no")
        return restore(self, abstract, step)

    monkeypatch.setattr(checkpoint.Checkpoints, "restore", fail)
    with pytest.raises(UserError, match=r"^no$"):
        train(config, str(tmp_path))
    assert names(tmp_path) == {"4", "6"}


def test_finetuning_stopped_before_its_first_save_rewinds_to_what_it_started_from(
    config, batches, poisoned, run, tmp_path
):
    config.initial_checkpoint = run
    poisoned(batches[2:3], with_nan)
    assert train(config, str(tmp_path / "whole"))
    assert not train(config, str(tmp_path / "stopped"), 2)
    assert train(config, str(tmp_path / "stopped"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 12)


_KILLED = """
import json, os, signal, sys
from pathlib import Path
from bipe_jax import cli
from bipe_jax.checkpoint import deleting
from bipe_jax.training.trainer import train
from tests.training.test_spikes import poison, with_nan
config, workdir, bad, moment = json.loads(sys.argv[1])
cli.log_to_terminal()
cli.quiet()

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "before it is renamed":
    deleting.Deleter.delete = kill
elif moment == "before it is removed":
    deleting.remove = kill
else:
    def remove(path):
        os.unlink(next(p for p in Path(path).rglob("*") if p.is_file()))
        kill()
    deleting.remove = remove
poison({bad}, with_nan)
train(config, workdir)
"""
MOMENTS = ["before it is renamed", "before it is removed", "while it is removed"]


def killed(config, workdir, bad, moment) -> str:
    """What a training prints that is killed at a moment of the first deletion."""
    arguments = json.dumps([config.to_dict(), str(workdir), bad, moment])
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    line = [sys.executable, "-c", _KILLED, arguments]
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stderr


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_a_rewind_deletes(config, batches, poisoned, tmp_path, moment):
    poisoned(batches[5:6], with_nan)
    assert train(config, str(tmp_path / "whole"))
    workdir = tmp_path / "killed"
    assert not train(config, str(workdir), 5)
    assert "rewinding to step 4" in killed(config, workdir, fingerprint(batches[5]), moment)
    renamed = moment != MOMENTS[0]
    assert names(workdir) == {"4", "5.deleted" if renamed else "5"}
    assert checkpoint.steps(workdir) == [4] + [5] * (not renamed)
    assert train(config, str(workdir))
    assert_same_run(tmp_path / "whole", workdir, 12)
    assert names(workdir) == {"4", "8", "12"}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_a_superfluous_checkpoint_is_deleted(config, tmp_path, moment):
    config.checkpoint.keep = 1
    assert train(config, str(tmp_path / "whole"))
    workdir = tmp_path / "killed"
    killed(config, workdir, "", moment)
    assert names(workdir) >= {"4" if moment == MOMENTS[0] else "4.deleted", "8"}
    assert train(config, str(workdir))
    assert_same_run(tmp_path / "whole", workdir, 12)
    assert names(workdir) == {"8", "12"}


def test_what_is_superfluous():
    """Against the sentence: all but the latest `keep`, the latest proved and the latest regular one."""
    draw = random.Random(0)
    for _ in range(2000):
        steps = sorted(draw.sample(range(1, 30), draw.randint(0, 8)))
        keep, every = draw.randint(1, 4), draw.randint(2, 8)
        proved = draw.choice([None, draw.randint(0, 30)])
        gone = deleting.superfluous(draw.sample(steps, len(steps)), proved, keep, every)
        left = [step for step in steps if step not in gone]
        assert left[-keep:] == steps[-keep:]
        good = [step for step in steps if proved is not None and step <= proved]
        regular = [step for step in steps if step % every == 0]
        assert set(good[-1:]) | set(regular[-1:]) <= set(left)
        assert len(left) <= keep + 2 or not good
        assert gone == sorted(set(steps) - set(left))
        if not good:
            assert gone == []
        assert deleting.rewinds_to(left, every) == deleting.rewinds_to(steps, every)
    assert deleting.superfluous([4, 8, 12], 11, 1, 4) == [4]
    assert deleting.superfluous([4, 8, 12], 12, 1, 4) == [4, 8]
    assert deleting.superfluous([4, 8, 9, 10, 11], 10, 1, 4) == [4, 9]
    assert deleting.rewinds_to([4, 8, 9], 4) == 8
    assert deleting.rewinds_to([3], 4) is None and deleting.rewinds_to([], 4) is None
    assert deleting.rewinds_to([3, 5], 4) == 5


@pytest.mark.parametrize("stops", [False, True])
def test_the_last_proved_checkpoint_stays_until_a_newer_one_is_proved(
    config, tmp_path, monkeypatch, stops
):
    """The update of step 8 ruins the parameters, which are finite: all steps after it are spikes."""
    config.spikes.policy, config.steps, config.checkpoint.keep = "skip", 60, 1
    ordinary = observing.Observer.step

    def ruined(self, number, function, state, *arguments):
        state, values = ordinary(self, number, function, state, *arguments)
        if number == 8:
            scale = state["params"]["norm"]["scale"]
            state["params"]["norm"]["scale"] = scale * np.float32(1e38)
        return state, values

    monkeypatch.setattr(observing.Observer, "step", ruined)
    if stops:
        for stop in (10, 13):
            assert not train(config, str(tmp_path), stop)
    with pytest.raises(UserError, match="25 steps in a row were skipped"):
        train(config, str(tmp_path))
    assert checkpoint.steps(tmp_path) == [4, 8, *[10, 13] * stops]
    # Without the ruined ones the run goes on.
    monkeypatch.undo()
    for step in (8, 10, 13):
        if (path := tmp_path / "checkpoints" / str(step)).exists():
            deleting.remove(epath.Path(path))
    assert checksums.verify(tmp_path / "checkpoints" / "4") == []
    assert train(config, str(tmp_path))
    assert read_metrics(tmp_path)[-1]["skipped_updates"] == 0
    assert names(tmp_path) == {"56", "60"}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_an_undisturbed_run_keeps_the_latest_and_one_proved(config, tmp_path, monkeypatch, keep):
    config.checkpoint.keep, config.steps = keep, 40
    found, prove = [], checkpoint.Checkpoints.prove

    def look(self, step):
        prove(self, step)
        self._manager.wait_until_finished()
        assert not self.failed()
        found.append((step, [int(name) for name in names(tmp_path) if name.isdecimal()]))

    monkeypatch.setattr(checkpoint.Checkpoints, "prove", look)
    assert train(config, str(tmp_path))
    assert len(found) == 40
    for step, there in found:
        every = list(range(4, step + 1, 4))
        assert set(there) >= set(every[-keep:]), (step, there)
        assert len(there) <= keep + (step % 4 == 3)  # one more until it is proved
    assert names(tmp_path) == {str(step) for step in range(40, 0, -4)[: max(keep, 2)]}


_SEVERAL = """
import json, sys
from bipe_jax import cli, processes
from bipe_jax.training.trainer import train
from tests.training.test_spikes import poison, with_nan

cli.log_to_terminal()
cli.quiet()
processes.start()
config, whole, stopped, bad = json.loads(sys.argv[1])
poison({bad}, with_nan)
found = [train(config, whole)]
for stop in (5, 7, None):
    found.append(train(config, stopped, stop))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("spike", [8, 9])
def test_two_processes_rewind_and_delete_as_one(config, batches, tmp_path, spike):
    """Both read the same batches. The rewind is from step 8 to 4, and of step 9 to 8."""
    config.checkpoint.keep, config.mesh.tensor, config.mesh.devices = 1, 2, 2
    workdirs = [tmp_path / name for name in ("whole", "stopped")]
    bad = fingerprint(batches[spike - 1])
    arguments = json.dumps([config.to_dict(), *map(str, workdirs), bad])
    done = several.finish(several.start(2, 1, "-c", _SEVERAL, arguments))
    for code, out, error in done:
        assert code == 0, error
        assert json.loads(out.splitlines()[-1]) == [True, False, False, True]
    assert done[0][2].count(f"rewinding to step {4 if spike == 8 else 8}") == 2
    one, two = ([(row["step"], row["loss"]) for row in read_metrics(w)] for w in workdirs)
    assert one == two
    one, two = (comparing._last(str(workdir), 12) for workdir in workdirs)
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[name], name)
    for workdir in workdirs:
        assert read_metrics(workdir)[-1]["rewinds"] == 1
        assert names(workdir) == {"8", "12"}
