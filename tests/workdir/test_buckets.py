"""Runs whose workdir is in a bucket, against a server of Google Cloud Storage's protocol.

They are compared with runs on a disk: a bucket's objects, as files, are what Orbax reads there.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import gcs
import pytest
import several
from paths import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import overrides

from bipe_jax import checkpoint
from bipe_jax.checkpoint import Checkpoints, checksums
from bipe_jax.data.prepare import prepare
from bipe_jax.errors import PREEMPTED, Transient, UserError
from bipe_jax.evaluation import follow
from bipe_jax.evaluation.evaluator import Settings, evaluate
from bipe_jax.training import observing
from bipe_jax.training.trainer import train
from bipe_jax.workdir import (
    COMMITTED,
    Workdir,
    bucket,
    bucket_lock,
    events,
    heartbeat,
    metrics,
    trainer_lock,
)
from launch import collect, restart
from tests.training.test_train import assert_same_run, read_metrics

pytestmark = [
    pytest.mark.skipif(bool(gcs.missing()), reason=gcs.missing()),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def server():
    with gcs.serving() as server, gcs.used(server):
        bucket._client.cache_clear()
        yield server
    bucket._client.cache_clear()


@pytest.fixture
def workdir(server, request):
    """A new one in the bucket, on a server that fails nothing."""
    server.fail = lambda *_: None
    name = re.sub(r"\W+", "-", request.node.name)
    yield f"gs://{gcs.BUCKET}/{name}"
    server.fail = lambda *_: None


@pytest.fixture(scope="module")
def settings(tokenizer_file, shards, held_out):
    from configs import smoke

    c = smoke.get_config()
    c.tokenizer.path = tokenizer_file
    c.data.train, c.data.evaluation = shards, held_out
    c.data.shuffle_blocks = 16
    c.steps, c.checkpoint.every, c.checkpoint.keep, c.log.every = 12, 4, 1, 3
    c.evaluation.lengths = (32,)
    return c


@pytest.fixture(scope="module")
def on_disk(settings, tmp_path_factory):
    """The same run on a disk."""
    directory = str(tmp_path_factory.mktemp("disk"))
    train(settings, directory)
    return directory


@pytest.fixture(scope="module")
def in_bucket(settings, server):
    """A run in the bucket, not to be changed."""
    directory = f"gs://{gcs.BUCKET}/sweep/run"
    assert train(settings, directory)
    return directory


def arguments(settings) -> list[str]:
    """Of a command that trains with the settings."""
    values = {"steps": 12, "log.every": 3, "checkpoint.every": 4, "checkpoint.keep": 1}
    own = [f"--config.{name}={value}" for name, value in values.items()]
    return ["--config=configs/smoke.py", *overrides(settings), *own]


def copied(workdir: str, directory: Path) -> Path:
    """The objects of a workdir as files."""
    for name in bucket.below(workdir):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(bucket.read(f"{workdir}/{name}"))
    return directory


def test_a_run_in_a_bucket_is_that_on_a_disk(in_bucket, on_disk, tmp_path):
    assert not os.path.lexists("gs:"), "a directory of that name"
    copy = copied(in_bucket, tmp_path)
    assert_same_run(on_disk, copy, 12)
    assert checkpoint.steps(in_bucket) == checkpoint.steps(on_disk) == [8, 12]
    names = set(bucket.names(in_bucket))
    assert names == set(os.listdir(on_disk))
    assert bucket.read(Workdir(in_bucket).trainer_lock) == b""
    for step in ("8", "12"):
        assert checksums.verify(copy / "checkpoints" / step) == []
        sums = dict(checksums.read(f"{in_bucket}/checkpoints/{step}"))
        assert {name.partition("/")[0] for name in sums} == {
            "config", "data", "optimizer", "params", "tokenizer",
        }  # fmt: skip
    kinds = [event["event"] for event in events.read(in_bucket)]
    assert kinds == [event["event"] for event in events.read(on_disk)]
    assert heartbeat.read(in_bucket)["phase"] == "done" and not heartbeat.read_alive(in_bucket)
    assert metrics.latest(in_bucket).loss == metrics.latest(on_disk).loss
    accumulator = EventAccumulator(str(copy / "tensorboard"))
    accumulator.Reload()
    logged = {scalar.step: scalar.value for scalar in accumulator.Scalars("loss")}
    assert sorted(logged) == [3, 6, 9, 12]


def test_commands_read_and_write_it(in_bucket, on_disk, command, monkeypatch, tmp_path):
    wanted = evaluate(on_disk, Settings(lengths=(32,)))
    assert evaluate(in_bucket, Settings(lengths=(32,)))["results"] == wanted["results"]
    written = json.loads(bucket.read(Workdir(in_bucket).evaluation))
    assert written["results"] == wanted["results"] and written["step"] == 12
    assert bucket.read(Workdir(in_bucket).extrapolation).startswith(b"\x89PNG")
    assert b"Learning rate" in bucket.read(Workdir(in_bucket).report)
    follow.follow(in_bucket, Settings(lengths=(32,)))
    assert bucket.names(Workdir(in_bucket).evaluations) == [".lock", "12.json", "8.json"]
    (point,) = collect.read(f"gs://{gcs.BUCKET}/sweep")
    assert point.status == "finished" and point.evaluation.step == 12
    done = command("goodput", in_bucket)
    assert done.returncode == 0 and "1 start," in done.stdout, done.stderr
    done = command("checkpoint", "verify", in_bucket)
    assert done.stdout == "step 8: intact\nstep 12: intact\n", done.stderr
    done = command("report", in_bucket, f"--output={tmp_path / 'report.html'}")
    assert done.returncode == 0, done.stderr


# Of a request: an object of a step's arrays; its COMMITTED; the removal of another step's files after that.
def begins(step):
    return lambda method, path, body: f"checkpoints/{step}/params/" in path and method == "POST"


def commits(step):
    return lambda method, path, body: (
        method == "POST" and f"checkpoints/{step}/{COMMITTED}".encode() in body
    )


def deletes(step):
    begun = []

    def moment(method, path, body):
        of_step = method == "DELETE" and f"checkpoints/{step}/" in path
        if of_step and f"/{step}/{COMMITTED}" in path:
            begun.append(path)
            return False
        return of_step and begun

    return moment


@pytest.mark.parametrize(
    ("moment", "resumed"),
    [(begins(8), 4), (commits(8), 4), (deletes(4), 8)],
    ids=["at-the-first-array", "before-it-is-committed", "while-another-is-deleted"],
)
def test_killed_in_a_save_it_resumes_to_the_same_end(
    settings, workdir, on_disk, server, tmp_path, moment, resumed
):
    line = [sys.executable, "-m", "bipe_jax.train", *arguments(settings), f"--workdir={workdir}"]
    killed = threading.Event()

    def fail(method, path, body):
        if not killed.is_set() and moment(method, urllib.parse.unquote(path), body):
            killed.set()
            process.send_signal(signal.SIGKILL)
        return "before" if killed.is_set() else None

    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        server.fail = fail
        error = process.communicate(timeout=180)[1]
    assert process.returncode == -signal.SIGKILL, error
    server.fail = lambda *_: None
    assert max(checkpoint.steps(workdir)) == resumed
    why = f"it died with code 137; resuming from step {resumed}"
    assert restart.decide(workdir, 137) == (True, why)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert f"Resuming from step {resumed} of {workdir}" in done.stderr
    assert_same_run(on_disk, copied(workdir, tmp_path), 12)
    assert checkpoint.steps(workdir) == [8, 12]
    assert bucket.names(f"{workdir}/checkpoints") == ["12", "8"]


def test_two_processes_save_their_shards_and_one_resumes(settings, workdir, shards, tmp_path):
    """Prepared data, which other numbers of processes read alike; losses as of one process on a disk."""
    settings = settings.copy_and_resolve_references()
    source = str(tmp_path / "prepared")
    prepare(shards, source, settings.tokenizer.path, settings.sequence_length, workers=1)
    settings.data.train = f"prepared:{source}"

    def line(directory, *more):
        of_job = [*arguments(settings), "--config.mesh.fsdp=2", f"--workdir={directory}", *more]
        return ("-m", "bipe_jax.train", *of_job)

    done = several.finish(several.start(2, 1, *line(workdir, "--stop_at=8")))
    assert [code for code, _, _ in done] == [PREEMPTED] * 2, done
    assert (
        checkpoint.steps(workdir) == [4, 8] and checksums.verify(f"{workdir}/checkpoints/8") == []
    )
    ((code, _, error),) = several.finish(several.start(1, 2, *line(workdir)))
    assert code == 0 and f"Resuming from step 8 of {workdir}" in error, error
    whole = tmp_path / "whole"
    ((code, _, error),) = several.finish(several.start(1, 2, *line(whole)))
    assert code == 0, error
    one, other = (
        [(line["step"], line["loss"]) for line in read_metrics(w)]
        for w in (whole, copied(workdir, tmp_path / "copy"))
    )
    assert one == other and len(one) == 12


@pytest.mark.parametrize("how", ["before", "after"])
def test_requests_that_fail_now_and_then_change_nothing(
    settings, workdir, on_disk, server, tmp_path, how
):
    numbers = itertools.count(1)
    server.fail = lambda *_: how if next(numbers) % 80 == 0 else None
    assert train(settings, workdir)
    server.fail = lambda *_: None
    assert next(numbers) > 800
    assert_same_run(on_disk, copied(workdir, tmp_path), 12)
    assert checkpoint.steps(workdir) == [8, 12]
    assert checksums.verify(f"{workdir}/checkpoints/12") == []


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_resumed(
    settings, workdir, on_disk, tmp_path, capfd
):
    assert not train(settings, workdir, stop_at=8)
    damaged = f"{workdir}/checkpoints/8/params/_METADATA"
    bucket.write(damaged, bucket.read(damaged)[:-1] + b"?")
    assert train(settings, workdir)
    assert "8 is damaged (params/_METADATA is not what was written)" in capfd.readouterr().err
    assert_same_run(on_disk, copied(workdir, tmp_path), 12)
    assert "8.damaged" in bucket.names(f"{workdir}/checkpoints")
    assert bucket.exists(f"{workdir}/checkpoints/8.damaged/params/_METADATA")


def test_a_rewind_deletes_later_checkpoints_whose_steps_are_saved_again(
    settings, workdir, on_disk, tmp_path
):
    assert train(settings, workdir)
    with Checkpoints(workdir, 1, 8) as checkpoints:
        assert checkpoints.rewind(lambda step: step) == 8
        assert bucket.names(f"{workdir}/checkpoints") == ["8"]
    assert train(settings, workdir)
    assert_same_run(on_disk, copied(workdir, tmp_path), 12)


def test_what_is_no_checkpoint_is_set_aside_and_an_unfinished_save_removed(settings, workdir):
    assert not train(settings, workdir, stop_at=4)
    directory = f"{workdir}/checkpoints"
    bucket.write(f"{directory}/99999/notes.txt", b"mine")
    bucket.write(f"{directory}/7/params/d/0", b"half")
    bucket.remove(f"{directory}/4/{COMMITTED}")
    assert checkpoint.steps(workdir) == []
    with Checkpoints(workdir, 1, 4) as checkpoints:
        assert checkpoints.latest is None
    assert bucket.below(directory) == ["99999.stray/notes.txt"]


def test_two_trainers_of_one_workdir(settings, workdir, monkeypatch, tmp_path):
    holder = (
        "import sys, time\nfrom bipe_jax.workdir import trainer_lock\n"
        "with trainer_lock.locked(sys.argv[1]):\n    print('locked', flush=True)\n    time.sleep(60)\n"
    )
    line = [sys.executable, "-c", holder, workdir]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            before = bucket.below(workdir)
            with pytest.raises(Transient, match=f"being trained by process {process.pid} on "):
                train(settings, workdir)
            assert bucket.below(workdir) == before == ["trainer.lock"]
        finally:
            process.kill()
    monkeypatch.setattr(bucket_lock, "STALE", 1e9)  # it is a dead process of this machine
    with trainer_lock.locked(workdir):
        trainer_lock.check(workdir)


def test_a_trainer_that_has_lost_its_lock_ends(settings, workdir, monkeypatch):
    monkeypatch.setattr(bucket_lock, "RENEWAL", 0.1)
    other = json.dumps({"pid": 7, "host": "elsewhere", "machine": "another"}).encode()
    with pytest.raises(Transient, match=r"trainer.lock was removed, or taken .* without saving$"):

        def take(*_):
            bucket.write(f"{workdir}/trainer.lock", other)
            while not bucket_lock._held[f"{workdir}/trainer.lock"].lost:
                pass

        train(settings, workdir, check=take)
    assert checkpoint.steps(workdir) == []
    assert bucket.read(f"{workdir}/trainer.lock") == other
    assert not Workdir(workdir).read_failure(), "it may be started again"


@pytest.mark.parametrize("change", ["profile", "wandb", "s3"])
def test_what_a_bucket_cannot_do_is_refused_before_the_first_step(settings, workdir, change):
    config, observer = settings.copy_and_resolve_references(), None
    if change == "wandb":
        config.log.wandb = "project"
        message = "config.log.wandb='project' needs a local --workdir, which gs://"
    elif change == "profile":
        observer = observing.Observer(profile=(1, 2))
        message = "--profile needs a local --workdir, which gs://"
    else:
        workdir = workdir.replace("gs://", "s3://")
        message = "s3://.* must be a local directory or gs://"
    with pytest.raises(UserError, match=message):
        train(config, workdir, observer=observer)
    assert change == "s3" or "metrics.jsonl" not in bucket.names(workdir)
