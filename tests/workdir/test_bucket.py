"""Objects of a bucket as files, and as locks, against a server of the protocol, which fails some requests."""

import contextlib
import json
import threading
import time

import gcs
import pytest

from bipe_jax.errors import Transient, UserError
from bipe_jax.workdir import (
    Workdir,
    appending,
    bucket,
    bucket_lock,
    events,
    files,
    outputs,
    trainer_lock,
)

pytestmark = pytest.mark.skipif(bool(gcs.missing()), reason=gcs.missing())
RUN = "gs://runs/sweep/x"


@pytest.fixture(scope="module")
def server():
    with gcs.serving() as server, gcs.used(server):
        bucket._client.cache_clear()
        yield server
    bucket._client.cache_clear()


@pytest.fixture(autouse=True)
def undisturbed(server):
    server.fail = lambda *_: None
    for name in bucket.below(RUN):
        bucket.remove(f"{RUN}/{name}")
    yield


def once(server, wanted: str, what: str):
    """Fails the first request of a method."""
    left = [what]
    server.fail = lambda method, *_: left.pop() if method == wanted and left else None


def test_what_is_written_is_read_and_listed(server):
    path = f"{RUN}/starts/1.json"
    assert not bucket.is_directory(RUN) and bucket.names(RUN) == []
    bucket.write(path, b"one")
    bucket.write(f"{RUN}/config.json", b"")
    bucket.write("gs://runs/sweep/xy", b"another directory")
    assert bucket.read(path) == b"one" and bucket.read(f"{RUN}/config.json") == b""
    assert bucket.names(RUN) == ["config.json", "starts"]
    assert bucket.names("gs://runs/sweep") == ["x", "xy"]
    assert bucket.below(RUN) == ["config.json", "starts/1.json"]
    assert bucket.exists(path) and not bucket.exists(f"{RUN}/starts")
    assert bucket.is_directory(f"{RUN}/starts") and not bucket.is_directory(path)
    bucket.remove(path)
    assert bucket.names(RUN) == ["config.json"]
    for function in (bucket.read, bucket.remove, lambda path: list(bucket.chunks(path))):
        with pytest.raises(FileNotFoundError) as raised:
            function(path)
        assert raised.value.filename == path and raised.value.strerror


def test_a_large_object_is_read_in_parts(server, monkeypatch):
    monkeypatch.setattr(bucket, "_CHUNK", 4)
    for content in (b"0123456789", b"01234567", b""):
        bucket.write(f"{RUN}/large", content)
        parts = list(bucket.chunks(f"{RUN}/large"))
        assert b"".join(parts) == content and all(len(part) <= 4 for part in parts)


def test_only_one_of_two_replaces_what_both_have_read(server):
    path = f"{RUN}/trainer.lock"
    assert bucket.read_generation(path) == (b"", bucket.NONE)
    first = bucket.replace(path, b"a", bucket.NONE)
    with pytest.raises(bucket.Replaced):
        bucket.replace(path, b"b", bucket.NONE)
    assert bucket.read_generation(path) == (b"a", first)
    second = bucket.replace(path, b"c", first)
    assert second != first
    with pytest.raises(bucket.Replaced):
        bucket.replace(path, b"d", first)
    assert bucket.read(path) == b"c"


@pytest.mark.parametrize("what", ["before", "after"])
def test_a_request_that_fails_is_made_again_and_done_once(server, what):
    path = f"{RUN}/trainer.lock"
    once(server, "POST", what)
    generation = bucket.replace(path, b"mine", bucket.NONE)
    assert bucket.read_generation(path) == (b"mine", generation)
    assert ("POST", 503) in [(method, status) for method, _, status in server.requests]
    once(server, "GET", what)
    assert bucket.read(path) == b"mine"
    once(server, "DELETE", "before")
    bucket.remove(path)
    assert not bucket.exists(path)


def test_a_server_that_is_down_is_an_error_with_the_path(server, monkeypatch):
    monkeypatch.setattr(bucket, "_SECONDS", 0.5)
    server.fail = lambda *_: "before"
    with pytest.raises(OSError) as raised:
        bucket.replace(f"{RUN}/x", b"", 0, seconds=0.5)
    assert raised.value.filename == f"{RUN}/x" and raised.value.errno
    assert "503" in raised.value.strerror and "\n" not in raised.value.strerror


def test_no_such_bucket_is_one_line(server):
    with pytest.raises(OSError, match="nowhere"):
        bucket.write("gs://nowhere/x", b"")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "s3://runs/x",
            "s3://runs/x must be .*: Orbax saves checkpoints to no other object store$",
        ),
        ("az://runs/x", "no other object store"),
        ("gs://runs", "--workdir=gs://runs must be a local directory or gs://BUCKET/DIRECTORY$"),
        ("gs:/runs/x", "or gs://BUCKET/DIRECTORY$"),
    ],
)
def test_what_is_no_workdir_is_refused_by_name(path, message):
    with pytest.raises(UserError, match=message):
        bucket.check(path, "--workdir")


@pytest.mark.parametrize("path", ["runs/x", "/runs/x", "a:b", "gs://runs/x", "c:/x"])
def test_what_is_one_is_not(path):
    bucket.check(path, "--workdir")


def test_files_of_a_workdir(server):
    directory = Workdir(RUN)
    directory.make()
    assert bucket.below(RUN) == [], "it proves that it can write, and leaves nothing"
    assert directory.read_config() is None and directory.last_start() == 0
    files.write_json(directory.config, {"a": "ü"})
    assert directory.read_config() == {"a": "ü"} == json.loads(bucket.read(directory.config))
    with pytest.raises(ZeroDivisionError), files.replacing(directory.config) as file:
        file.write(str(1 // 0))
    assert directory.read_config() == {"a": "ü"}
    files.write_json(directory.start(9), {})
    files.write_json(directory.start(10), {})
    assert directory.last_start() == 10
    for number in (1, 2):
        event = {"event": "e", "time": 0, "since": 0, "step": number, "seconds": {}}
        events.append(RUN, event)
    assert [event["step"] for event in events.read(RUN)] == [1, 2]
    directory.write_failure("why")
    assert directory.read_failure() == "why"
    directory.forget_failure()
    directory.forget_failure()
    assert directory.read_failure() == ""
    bucket.write(directory.restarts(), b"?")
    files.set_aside(directory.restarts(), "it is no count")
    assert bucket.read(f"{RUN}/restarts.json.unreadable-1") == b"?"
    assert not files.exists(directory.restarts())
    outputs.check(directory.evaluation)
    assert not files.exists(directory.evaluation)
    assert not directory.supervisor_lock().startswith("gs://")
    assert directory.supervisor_lock() != Workdir(f"{RUN}y").supervisor_lock()


def test_processes_of_a_run_look_at_the_same_moment_whether_they_can_write(server, monkeypatch):
    """What one has written to see that, another removes."""
    write = bucket.write

    def written_and_removed(path, content):
        write(path, content)
        bucket.remove(path)

    monkeypatch.setattr(bucket, "write", written_and_removed)
    outputs.check(f"{RUN}/evaluation.json")


def test_a_growing_object_is_written_by_its_thread_and_at_once_when_asked(server, monkeypatch):
    path = f"{RUN}/metrics.jsonl"
    bucket.write(path, b"0\n")
    monkeypatch.setattr(appending, "_PAUSE", 0.05)
    monkeypatch.setattr(bucket, "_SECONDS", 0.2)
    growing = appending.Growing(path)
    growing.write(b"1\n")
    until = time.monotonic() + 30
    while bucket.read(path) != b"0\n1\n":
        assert time.monotonic() < until
    server.fail = lambda method, *_: "before" if method == "POST" else None
    growing.write(b"2\n")
    with pytest.raises(OSError, match="503"):
        growing.sync()
    assert bucket.read(path) == b"0\n1\n"
    server.fail = lambda *_: None
    monkeypatch.setattr(appending, "_PAUSE", 1e9)
    growing.sync()
    assert bucket.read(path) == b"0\n1\n2\n"
    growing.write(b"3\n")
    growing.close()
    assert bucket.read(path) == b"0\n1\n2\n3\n"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bucket_lock, "RENEWAL", 0.1)
    monkeypatch.setattr(bucket_lock, "STALE", 1.0)
    monkeypatch.setattr(bucket_lock, "_POLL", 0.1)


def test_of_those_that_start_in_the_same_moment_one_trains(server, quick, monkeypatch):
    count, read = 8, bucket.read_generation
    same_moment, ended, trained, refused = threading.Barrier(count), threading.Event(), [], []

    def all_at_once(path):
        seen = read(path)
        with contextlib.suppress(threading.BrokenBarrierError):
            same_moment.wait(10)
            monkeypatch.setattr(bucket, "read_generation", read)
        return seen

    monkeypatch.setattr(bucket, "read_generation", all_at_once)

    def start():
        try:
            with trainer_lock.locked(RUN):
                trained.append(1)
                ended.wait(10)
        except Transient as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(count)]
    for thread in threads:
        thread.start()
    while len(trained) + len(refused) < count:
        time.sleep(0.01)
    ended.set()
    for thread in threads:
        thread.join()
    assert len(trained) == 1 and all("is being trained by process" in line for line in refused)
    assert bucket.read(Workdir(RUN).trainer_lock) == b""


def test_a_dead_machine_is_waited_for_and_a_living_one_is_refused(server, quick):
    path = Workdir(RUN).trainer_lock
    other = {"pid": 7, "host": "elsewhere", "machine": "another"}
    bucket.write(path, json.dumps(other).encode())
    begin = time.monotonic()
    with trainer_lock.locked(RUN):
        assert time.monotonic() - begin >= 1.0
    ended = threading.Event()

    def renew():
        for number in range(1000):
            bucket.write(path, json.dumps(other | {"renewed": number}).encode())
            if ended.wait(0.1):
                return

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with (
            pytest.raises(Transient, match="process 7 on elsewhere"),
            trainer_lock.locked(RUN),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert json.loads(bucket.read(path))["host"] == "elsewhere", "a refused trainer changes nothing"


@pytest.mark.parametrize("how", ["taken", "removed"])
def test_who_has_lost_the_lock_is_told_and_leaves_it_as_it_is(server, quick, how):
    path = Workdir(RUN).trainer_lock
    with trainer_lock.locked(RUN):
        time.sleep(0.5)
        trainer_lock.check(RUN)  # renewed some times
        bucket.write(path, b"{}") if how == "taken" else bucket.remove(path)
        bucket_lock._held[path]._thread.join(10)
        with pytest.raises(Transient, match="this one ends without saving"):
            trainer_lock.check(RUN)
    assert bucket.read_generation(path)[0] == (b"{}" if how == "taken" else b"")
    trainer_lock.check(RUN)  # it is not in the context any more


def test_renewals_whose_answers_are_lost_lose_no_lock(server, quick):
    path = Workdir(RUN).trainer_lock
    with trainer_lock.locked(RUN):
        before = bucket.read_generation(path)[1]
        server.fail = lambda *_: "after"
        time.sleep(1.0)
        server.fail = lambda *_: None
        assert bucket.read_generation(path)[1] != before
        time.sleep(0.5)
        trainer_lock.check(RUN)
    assert bucket.read(path) == b""
