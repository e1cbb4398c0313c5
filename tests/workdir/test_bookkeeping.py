"""Files of bookkeeping that cannot be read or written, which never end a healthy run."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from bipe_jax import checkpoint
from bipe_jax.training.observing.wandb_board import _id
from bipe_jax.training.trainer import train
from bipe_jax.workdir import Workdir, events, files, heartbeat, metrics
from configs import smoke

STEP = b'{"step": 1, "loss": 2.5}\n'
NO_LINES = [
    b"17\n",
    b"[]\n",
    b"{}\n",
    b"null\n",
    b'{"step": "1"}\n',
    b'{"step": true}\n',
    b'{"step": 1.5}\n',
    b'{"step": -1}\n',
    b'{"step": 2, "loss": []}\n',
    b'{"step": 2, "loss"\n',
    b"[" * 1000 + b"\n",
    b"\xff\xfe\0\x80",
    b"\0" * 100,
    b"\n",
]


@pytest.fixture(scope="module")
def config(tokenizer_file, shards, held_out):
    config = smoke.get_config()
    config.tokenizer.path = tokenizer_file
    config.data.train, config.data.evaluation = shards, held_out
    config.checkpoint.every = 4
    config.log.every = 1
    return config


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory):
    """The workdir of a run that was stopped at step 2."""
    workdir = tmp_path_factory.mktemp("stopped")
    train(config, str(workdir), stop_at=2)
    return workdir


@pytest.fixture
def resumed(config, stopped, tmp_path, capfd):
    """Harms a copy of the run and resumes it to step 3. Returns it and the lines about what was set aside."""

    def resume(harm):
        workdir = tmp_path / "run"
        shutil.copytree(stopped, workdir)
        harm(workdir)
        assert not train(config, str(workdir), stop_at=3)
        assert checkpoint.steps(workdir)[-1] == 3
        with open(workdir / "metrics.jsonl", encoding="utf-8") as file:
            assert [json.loads(line)["step"] for line in file][-1] == 3
        assert heartbeat.read(workdir)["step"] == 3
        assert events.read(workdir)[-1]["event"] == "preempted"
        return workdir, [
            line for line in capfd.readouterr().err.splitlines() if "set aside" in line
        ]

    return resume


@pytest.mark.parametrize("line", NO_LINES, ids=lambda line: repr(line[:24]))
def test_a_line_that_is_no_steps(resumed, line):
    def harm(workdir):
        with open(workdir / "metrics.jsonl", "ab") as file:
            file.write(line)

    workdir, said = resumed(harm)
    assert len(said) == 1 and "metrics.jsonl cannot be used (line 3 is no step's)" in said[0]
    assert line in (workdir / "metrics.jsonl.unreadable-1").read_bytes()
    assert len((workdir / "metrics.jsonl").read_bytes().splitlines()) == 3


@pytest.mark.parametrize("end", [b"", b"{", b'{"st', b'{"step": 3, "lo', b'{"step": 3', STEP[:-1]])
def test_a_line_that_a_kill_cut_off_is_nothing_to_speak_of(resumed, end):
    def harm(workdir):
        with open(workdir / "metrics.jsonl", "ab") as file:
            file.write(end)

    workdir, said = resumed(harm)
    assert said == []
    assert not list(workdir.glob("*.unreadable*"))


BOOKKEEPING = ["metrics.jsonl", "events.jsonl", "heartbeat.json", "trainer.lock", "failed"]


@pytest.mark.parametrize("kind", ["directory", "fifo", "dangling", "loop"])
def test_what_is_no_file(resumed, kind):
    def harm(workdir):
        for name in BOOKKEEPING:
            path = workdir / name
            path.unlink(missing_ok=True)
            if kind == "directory":
                (path / "inside").mkdir(parents=True)
            elif kind == "fifo":
                os.mkfifo(path)
            else:
                path.symlink_to("nowhere" if kind == "dangling" else name)

    workdir, said = resumed(harm)
    assert len(said) == len(BOOKKEEPING)
    assert all(os.path.lexists(workdir / f"{name}.unreadable-1") for name in BOOKKEEPING)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"7",
        b"\xff\0",
        b'{"time": 1',
        b'{"time": NaN, "step": 1, "phase": [], "since": [], "seconds": {}}',
    ],
)
def test_what_is_no_heartbeat_or_event(resumed, content):
    def harm(workdir):
        for name in BOOKKEEPING[1:3]:
            (workdir / name).write_bytes(content)

    resumed(harm)


def test_a_directory_of_tensorboard_that_cannot_be_written(config, tmp_path, capfd):
    """Even root cannot write to what it leads to."""
    (tmp_path / "tensorboard").symlink_to("/proc/self")
    assert not train(config, str(tmp_path), stop_at=2)
    said = [line for line in capfd.readouterr().err.splitlines() if "TensorBoard" in line]
    assert said[0] == f"TensorBoard: tensorboard --logdir {tmp_path / 'tensorboard'}"
    assert len(said) == 2 and f"{tmp_path / 'tensorboard'} cannot be written (" in said[1]
    assert checkpoint.steps(tmp_path) == [2]


def test_a_file_in_place_of_tensorboards_directory_is_set_aside(resumed):
    def harm(workdir):
        shutil.rmtree(workdir / "tensorboard")
        (workdir / "tensorboard").write_text("a file")

    workdir, said = resumed(harm)
    assert len(said) == 1 and (workdir / "tensorboard.unreadable-1").read_text() == "a file"
    assert len(os.listdir(workdir / "tensorboard")) == 1


def test_an_id_of_weights_and_biases_that_is_none(tmp_path):
    path = tmp_path / "wandb_id"
    first = _id(str(tmp_path))
    assert first and _id(str(tmp_path)) == first
    for n, content in enumerate((b"", b"\xff\0", b"a b", b"x" * 1000), 1):
        path.write_bytes(content)
        made = _id(str(tmp_path))
        assert len(made) == 12 and _id(str(tmp_path)) == made
        assert (tmp_path / f"wandb_id.unreadable-{n}").read_bytes() == content
    path.unlink()
    path.mkdir()
    assert len(_id(str(tmp_path))) == 12


def test_the_latest_metrics_are_of_steps_alone(tmp_path):
    path = Workdir(tmp_path).metrics
    with open(path, "wb") as file:
        file.write(STEP + b"".join(NO_LINES))
    assert metrics.latest(tmp_path) == metrics.Metrics(1, 2.5)


def test_the_latest_loss_is_a_mean_over_the_last_tenth_of_the_steps(tmp_path):
    """And over 100 at most; a step whose loss was not finite is left out."""

    def latest(losses):
        rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        rows[0]["tokens_per_second"] = 7.0
        for row in rows[::3]:  # later versions write these too
            row |= {"time": 1.8e9, "tokens": 256 * row["step"], "text": "x" * 900}
        Path(tmp_path, "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return metrics.latest(tmp_path)

    losses = list(np.random.default_rng(0).uniform(1, 9, 2000))
    for steps, averaged in ((1, 1), (9, 1), (20, 2), (57, 5)):
        mean = np.mean(losses[steps - averaged : steps])
        assert latest(losses[:steps]) == metrics.Metrics(steps, pytest.approx(mean), 7.0)
    assert latest(losses).loss == pytest.approx(np.mean(losses[-100:]))
    assert latest([*losses[:38], None, 4.0]).loss == pytest.approx(
        (losses[36] + losses[37] + 4) / 3
    )
    assert latest([*losses[:39], None]).loss is None


def test_a_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        ordinary = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, ordinary=ordinary: (done.append(name), ordinary(*a))
        )
    files.write_text(tmp_path / "a", "text")
    assert done == ["fsync", "replace", "fsync"]
