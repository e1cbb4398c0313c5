"""Reframing: the text stays, frames end at lines' ends, and any place can be gone on with at once."""

import fcntl
import gzip
import os
import random
import subprocess
import sys
import time

import pytest
import zstandard

from bipe_jax.data import reframe, shards, sources
from bipe_jax.errors import UserError

FRAME = 1000  # bytes of text
LINES = [
    b'{"text": "first", "meta": {"pile_set_name": "A"}}',
    b"not JSON at all",
    b"",
    b'{"text": "ends in a carriage return"}\r',
    b"\xff\xfe no UTF-8 \x00",
    b'{"text": "' + b"long " * 700 + b'"}',
    '{"text": "naïve \u2028 ✓"}'.encode(),
    b"x" * (FRAME - 1),  # with its end just a frame
    b"y" * FRAME,  # and just too long for one
    *(b'{"text": "document %d", "n": "%s"}' % (i, b"z" * (37 * i % 211)) for i in range(60)),
]


def frames_of(path) -> list[bytes]:
    """The frames of a file by zstd's own reading of their headers; each must have a checksum."""
    data, frames = path.read_bytes(), []
    while data:
        assert zstandard.get_frame_parameters(data).has_checksum
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        frames.append(decompressor.decompress(data))
        data = decompressor.unused_data
    return frames


def write(path, data: bytes, kind: str = "jsonl"):
    """Compressed in one frame; returns the path as a glob."""
    if kind == "jsonl.gz":
        data = gzip.compress(data)
    elif kind == "jsonl.zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"a.{kind}").write_bytes(data)
    return str(path / f"a.{kind}")


def run(spec, output, **kwargs):
    return reframe.reframe(spec, str(output), **{"frame_mb": FRAME / 1e6, **kwargs})


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("read_bytes", [1, 1 << 18])
def test_text_is_kept_and_frames_hold_as_many_lines_as_fit(
    tmp_path, monkeypatch, kind, end, read_bytes
):
    text = b"\n".join(LINES) + end
    spec = write(tmp_path / "in", text, kind)
    monkeypatch.setattr(shards, "_READ_BYTES", min(read_bytes, shards._READ_BYTES))
    monkeypatch.setattr(shards, "_PIECE_BYTES", min(read_bytes, shards._PIECE_BYTES))
    done = run(spec, tmp_path / "out")
    frames = frames_of(tmp_path / "out" / "a.jsonl.zst")
    assert b"".join(frames) == text
    expected, held = [], b""  # line by line
    for line in _with_ends(text):
        if held and len(held) + len(line) > FRAME:
            expected.append(held)
            held = b""
        held += line
    assert frames == [*expected, held]
    assert done == {
        "files": 1,
        "frames": len(frames),
        "text": len(text),
        "before": os.path.getsize(spec),
        "after": (tmp_path / "out" / "a.jsonl.zst").stat().st_size,
        "skipped": 0,
    }


def _with_ends(text: bytes) -> list[bytes]:
    *lines, last = text.split(b"\n")
    return [line + b"\n" for line in lines] + ([last] if last else [])


def test_every_place_is_in_the_frame_of_its_line(tmp_path):
    """So that no more than a frame is decompressed to resume."""
    spec = write(tmp_path / "in", b"\n".join(LINES), "jsonl.zst")
    run(spec, tmp_path / "out")
    path = str(tmp_path / "out" / "a.jsonl.zst")
    found = list(shards.lines(path))
    assert [line for line, _ in found] == LINES
    starts, at = {0}, 0
    with open(path, "rb") as file:
        data = file.read()
    while at < len(data):
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        decompressor.decompress(data[at:])
        at = len(data) - len(decompressor.unused_data)
        starts.add(at)
    assert {place[0] for _, place in found} == starts - {len(data)}
    for i, (_, place) in enumerate(found):
        assert [line for line, _ in shards.lines(path, place)] == LINES[i + 1 :]
    # The same documents, counted the same way.
    policy = sources.Policy(max_bad_share=1.0)
    before = [d for d, _ in sources.read_shard(spec, policy=policy)]
    after = [d for d, _ in sources.read_shard(path, policy=policy)]
    assert before == after and len(before) == 64


@pytest.mark.parametrize("workers", [1, 3])
def test_lines_are_dealt_out_over_shards(tmp_path, workers):
    """Line i goes to shard i mod N, through all files, also where a file's last line has no end."""
    files = {"a": LINES[:20], "b": LINES[20:21], "c": [], "d": LINES[21:]}
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(lines))
    done = run(f"{tmp_path}/*.jsonl", tmp_path / "out", shards=4, workers=workers)
    names = sorted(os.listdir(tmp_path / "out"))
    assert names == [f"0000{i}-of-00004.jsonl.zst" for i in range(4)]
    for i, name in enumerate(names):
        frames = frames_of(tmp_path / "out" / name)
        assert b"".join(frames).removesuffix(b"\n").split(b"\n") == LINES[i::4]
        assert all(frame.endswith(b"\n") for frame in frames[:-1])
        assert all(len(frame) <= FRAME or frame.count(b"\n") == 1 for frame in frames)
    assert done["files"] == 4
    assert done["before"] == sum(os.path.getsize(tmp_path / f"{name}.jsonl") for name in files)


def test_workers_change_nothing(tmp_path):
    generator = random.Random(0)
    for name in "abcde":
        text = b"\n".join(
            generator.randbytes(generator.randrange(900)).hex().encode() for _ in range(99)
        )
        (tmp_path / f"{name}.jsonl").write_bytes(text)
    for workers in (1, 4):
        run(f"{tmp_path}/*.jsonl", tmp_path / str(workers), workers=workers)
    for name in "abcde":
        one, four = (tmp_path / w / f"{name}.jsonl.zst" for w in "14")
        assert one.read_bytes() == four.read_bytes()
        assert b"".join(frames_of(one)) == (tmp_path / f"{name}.jsonl").read_bytes()


def test_empty_files_stay_readable(tmp_path):
    spec = write(tmp_path / "in", b"")
    run(spec, tmp_path / "out")
    assert list(shards.lines(str(tmp_path / "out" / "a.jsonl.zst"))) == []
    with pytest.raises(UserError, match=r"--shards=3 is more than the lines \(2\)"):
        run(write(tmp_path / "two", b"1\n2"), tmp_path / "out3", shards=3)
    assert os.listdir(tmp_path / "out3") == []


def test_finished_files_stay(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(LINES))
    output = tmp_path / "out"
    run(f"{tmp_path}/*.jsonl", output)
    (output / "a.jsonl.zst").write_bytes(b"finished before")
    (output / "b.jsonl.zst").unlink()
    (output / "b.jsonl.zst.partial").write_bytes(b"what was left of a run that was killed")
    done = run(f"{tmp_path}/*.jsonl", output)
    assert (done["files"], done["skipped"], done["text"]) == (1, 2, len(b"\n".join(LINES)))
    assert (output / "a.jsonl.zst").read_bytes() == b"finished before"
    assert b"".join(frames_of(output / "b.jsonl.zst")) == b"\n".join(LINES)
    assert len(os.listdir(output)) == 3
    # Shards are written together: none of them is known to be whole without the others.
    run(f"{tmp_path}/*.jsonl", tmp_path / "dealt", shards=2)
    before = (tmp_path / "dealt" / "00001-of-00002.jsonl.zst").read_bytes()
    (tmp_path / "dealt" / "00001-of-00002.jsonl.zst").unlink()
    assert run(f"{tmp_path}/*.jsonl", tmp_path / "dealt", shards=2)["files"] == 2
    assert (tmp_path / "dealt" / "00001-of-00002.jsonl.zst").read_bytes() == before
    assert run(f"{tmp_path}/*.jsonl", tmp_path / "dealt", shards=2)["skipped"] == 2


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dealt", [0, 2])
@pytest.mark.parametrize("damage", ["cut short", "corrupt"])
def test_damage_names_the_shard_and_leaves_nothing(tmp_path, workers, dealt, damage):
    generator = random.Random(0)
    text = b"\n".join(generator.randbytes(300).hex().encode() for _ in range(200))
    data = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(text))
    if damage == "cut short":
        del data[-100:]
    else:
        data[-1] ^= 1  # of the checksum
    (tmp_path / "b.jsonl.zst").write_bytes(data)
    for name in "ac":
        (tmp_path / f"{name}.jsonl").write_bytes(text)
    with pytest.raises(
        UserError, match=rf"^data: shard {tmp_path}/b.jsonl.zst is corrupt or"
    ) as info:
        run(f"{tmp_path}/*.jsonl*", tmp_path / "out", workers=workers, shards=dealt)
    assert "\n" not in str(info.value)
    left = set(os.listdir(tmp_path / "out"))
    if dealt:
        assert not left
    else:  # "c" may have been under way beside it
        assert {"a.jsonl.zst"} <= left <= {"a.jsonl.zst", "c.jsonl.zst"}
        assert all(b"".join(frames_of(tmp_path / "out" / name)) == text for name in left)


def test_wrong_arguments(tmp_path):
    spec = write(tmp_path / "in", b"1\n2\n", "jsonl.zst")
    write(tmp_path / "in2", b"1\n2\n", "jsonl.gz")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.jsonl.zst").symlink_to(spec)
    (tmp_path / "file").write_bytes(b"")
    with open(spec, "rb") as file:
        before = file.read()
    for wanted, given in (
        ("no file matches", {"spec": f"{tmp_path}/none*"}),
        ("holds the input", {"output": tmp_path / "in"}),
        ("holds the input", {"output": tmp_path / "link"}),
        ("holds the input", {"output": tmp_path / "in", "spec": f"{tmp_path}/links/*"}),
        ("would both become a.jsonl.zst", {"spec": f"{tmp_path}/in/*,{tmp_path}/in2/*"}),
        ("--output=.*file cannot be written: .*File exists", {"output": tmp_path / "file"}),
        ("--output=gs://x/y must be a local directory", {"output": "gs://x/y"}),
        ("--frame_mb=0", {"frame_mb": 0}),
        ("--level=23", {"level": 23}),
        ("--shards=-1", {"shards": -1}),
        ("--workers=0", {"workers": 0}),
    ):
        with pytest.raises(UserError, match=wanted) as info:
            run(**{"spec": spec, "output": tmp_path / "out", **given})
        assert "\n" not in str(info.value)
    with open(spec, "rb") as file:
        assert file.read() == before
    assert os.listdir(tmp_path / "out") == []
    run(spec, tmp_path / "out", shards=2)
    with pytest.raises(UserError, match=r"holds 00000-of-00002.*, which is not of --shards=1"):
        run(spec, tmp_path / "out", shards=1)


def test_one_run_at_a_time_writes_to_a_directory(tmp_path):
    (tmp_path / "out").mkdir()
    spec = write(tmp_path / "in", b"1\n2\n")
    other = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="is being written to by another run"):
        run(spec, tmp_path / "out")
    os.close(other)
    assert run(spec, tmp_path / "out")["files"] == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    spec = write(tmp_path / "in", b"\n".join(LINES))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left on device"):
        run(spec, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_the_command_goes_on_after_a_kill(tmp_path, command):
    text = {name: random.Random(name).randbytes(500).hex().encode() + b"\n" for name in "ab"}
    (tmp_path / "a.jsonl").write_bytes(text["a"] * 5)
    (tmp_path / "b.jsonl").write_bytes(text["b"] * 100_000)  # much to do for level 22
    arguments = [f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/out"]
    line = [sys.executable, "-m", "bipe_jax.data.reframe", *arguments, "--workers=1"]
    process = subprocess.Popen([*line, "--level=22", "--frame_mb=0.1"], stderr=subprocess.DEVNULL)
    partial = tmp_path / "out" / "b.jsonl.zst.partial"
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert sorted(os.listdir(tmp_path / "out")) == ["a.jsonl.zst", "b.jsonl.zst.partial"]
    result = command("data.reframe", *arguments)
    assert result.returncode == 0, result.stderr
    assert "Kept 1 files that exist in" in result.stderr
    assert result.stdout.startswith("Wrote 1 files of 100,100,000 bytes of text: 100,100,000 bytes")
    assert sorted(os.listdir(tmp_path / "out")) == ["a.jsonl.zst", "b.jsonl.zst"]
    frames = frames_of(tmp_path / "out" / "b.jsonl.zst")
    assert len(frames) == 26 and b"".join(frames) == text["b"] * 100_000
