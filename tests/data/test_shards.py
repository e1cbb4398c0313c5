"""Shards: the lines of files in all their forms, from any place on, and around what is damaged."""

import gzip
import itertools
import json
import random
import struct

import pytest
import zstandard

from bipe_jax.data import shards

MAGIC = struct.pack("<I", zstandard.MAGIC_NUMBER)
SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"size"  # what pzstd puts before each frame


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def cut(data: bytes, places) -> list[bytes]:
    return [data[a:b] for a, b in itertools.pairwise([0, *places, len(data)])]


def at_line_ends(data: bytes, lines: int) -> list[bytes]:
    """Stretches of so many lines each."""
    whole = data.splitlines(keepends=True)
    return [b"".join(whole[i : i + lines]) for i in range(0, len(whole), lines)]


def anywhere(data: bytes) -> list[bytes]:
    """In the middle of lines, and at their ends; some are empty, and some hold no line's end."""
    places = random.Random(3).choices(range(len(data)), k=20)
    places += [0, 0, data.find(b"\n") + 1, data.find(b"\n") + 1, len(data), len(data)]
    return cut(data, sorted(places))


FORMS = {
    "plain": (".jsonl", lambda data: data),
    "one member": (".jsonl.gz", gzip.compress),
    "members": (".jsonl.gz", lambda data: b"".join(map(gzip.compress, anywhere(data)))),
    "one frame": (".jsonl.zst", zstd),
    "frames of lines": (".jsonl.zst", lambda data: b"".join(map(zstd, at_line_ends(data, 3)))),
    "frames": (".jsonl.zst", lambda data: b"".join(map(zstd, anywhere(data)))),
    "skippable frames": (
        ".jsonl.zst",
        lambda data: SKIPPABLE + b"".join(zstd(part) + SKIPPABLE for part in anywhere(data)),
    ),
    "bytes": (".jsonl.zst", lambda data: b"".join(zstd(data[i : i + 1]) for i in range(len(data)))),
}
LINES = [b"first", b"", b"x" * 150, b"cr\r", "na\u00efve \U0001f600".encode(), b"", b"", b" ", b"l"]
TEXTS = {
    "newline at the end": b"\n".join(LINES) + b"\n",
    "none at the end": b"\n".join(LINES),
    "crlf": b"\r\n".join(LINES) + b"\r\n",
    "empty lines at the end": b"\n".join(LINES) + b"\n\n\n",
    "newlines": b"\n\n\n",
    "one line": b"line",
}


@pytest.fixture(params=[1, 7, 64, 1 << 18])
def read_bytes(request, monkeypatch):
    monkeypatch.setattr(shards, "_READ_BYTES", request.param)
    monkeypatch.setattr(shards, "_PIECE_BYTES", request.param)


def write(directory, form: str, data: bytes) -> str:
    ending, packed = FORMS[form]
    path = directory / f"a{ending}"
    path.write_bytes(packed(data))
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_lines_are_those_of_the_text_and_go_on_from_every_place(tmp_path, read_bytes, form):
    for name, data in TEXTS.items():
        path = write(tmp_path, form, data)
        found = list(shards.lines(path))
        expected = data.split(b"\n")
        expected = expected if expected[-1] else expected[:-1]
        assert [line for line, _ in found] == expected, name
        for i, (_, place) in enumerate(found):
            place = json.loads(json.dumps(place))
            assert list(shards.lines(path, place)) == found[i + 1 :], (name, i)


@pytest.mark.parametrize("form", ["plain", "one member", "one frame", "frames"])
def test_what_is_read_at_once_changes_nothing(tmp_path, monkeypatch, form):
    """Larger files, whose compressed blocks and stretches end within lines."""
    generator = random.Random(0)
    lines = [generator.randbytes(generator.choice((1, 10, 99, 50_000))).hex() for _ in range(99)]
    path = write(tmp_path, form, "\n".join(lines).encode())
    for size in (shards._READ_BYTES, 999, 1 << 20):
        monkeypatch.setattr(shards, "_READ_BYTES", size)
        monkeypatch.setattr(shards, "_PIECE_BYTES", 100 * size)
        found = list(shards.lines(path))
        assert [line.decode() for line, _ in found] == lines
        for i in range(0, len(found), 7):
            assert list(shards.lines(path, found[i][1])) == found[i + 1 :]


def test_a_place_in_a_small_frame_is_gone_on_with_at_once(tmp_path, monkeypatch):
    """What is before the frame is not read again, and may even be gone."""
    data = b"".join(b"line %d\n" % i for i in range(90))
    path = write(tmp_path, "frames of lines", data)
    found = list(shards.lines(path))
    (offset, ends) = place = found[50][1]
    with open(path, "r+b") as file:
        file.write(bytes(offset))
    assert ends <= 3
    assert list(shards.lines(path, place)) == found[51:]


def read(path, place=shards.START) -> tuple[list, list]:
    """(Lines with the places behind them, (kind, frame) of the damage that was passed over)."""
    seen = []

    def on_damage(damage, frame):
        seen.append((damage.kind, frame))

    return list(shards.lines(str(path), place, on_damage)), seen


def flat(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


def frames_of(texts) -> tuple[list[list[bytes]], list[bytes], list[int]]:
    """(lines, frame, where it begins in the file) of each."""
    frames = [zstd(text) for text in texts]
    starts = [0, *itertools.accumulate(map(len, frames))][:-1]
    return [text.splitlines() for text in texts], frames, starts


@pytest.fixture
def five():
    return frames_of([b"".join(b"%d of %d\n" % (i, f) for i in range(9)) for f in range(5)])


@pytest.mark.parametrize("number", range(5))
def test_a_byte_changed_anywhere_in_a_frame_costs_that_frame_alone(tmp_path, five, number):
    lines, frames, starts = five
    path = tmp_path / "a.jsonl.zst"
    others = flat(lines[:number] + lines[number + 1 :])
    for place in range(len(frames[number])):
        damaged = bytearray(b"".join(frames))
        damaged[starts[number] + place] ^= 0x08
        path.write_bytes(damaged)
        found, ((kind, frame),) = read(path)
        assert [line for line, _ in found] == others
        assert kind in ("corrupt_frames", "truncated_shards")
        assert frame == starts[number]
        with pytest.raises(shards.Damage, match=f"{path} is .*at byte {starts[number]} "):
            list(shards.lines(str(path)))


@pytest.mark.parametrize("number", range(5))
def test_bytes_missing_in_a_frame_cost_that_frame_alone(tmp_path, five, number):
    lines, frames, starts = five
    path = tmp_path / "a.jsonl.zst"
    others = flat(lines[:number] + lines[number + 1 :])
    for place in range(1, len(frames[number]) - 7, 3):
        data = b"".join(frames)
        path.write_bytes(data[: starts[number] + place] + data[starts[number] + place + 7 :])
        found, faults = read(path)
        assert [line for line, _ in found] == others
        assert [frame for _, frame in faults] == [starts[number]]


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 5, 1 << 18])
def test_damaged_frames_in_a_row_are_one_fault_and_others_are_others(
    tmp_path, monkeypatch, five, piece_bytes
):
    """However the next frame's begin lies in what is searched at a time."""
    monkeypatch.setattr(shards, "_PIECE_BYTES", piece_bytes)
    lines, frames, starts = five
    path = tmp_path / "a.jsonl.zst"
    for broken, faults_at, left in (
        ((1, 2), [1], (0, 3, 4)),
        ((0, 2), [0, 2], (1, 3, 4)),
        ((0, 1, 3, 4), [0, 3], (2,)),
        (range(5), [0], ()),
    ):
        damaged = bytearray(b"".join(frames))
        for number in broken:
            damaged[starts[number] + 12] ^= 0xFF
        path.write_bytes(damaged)
        found, faults = read(path)
        assert [line for line, _ in found] == flat(lines[number] for number in left)
        assert faults == [("corrupt_frames", starts[number]) for number in faults_at]


def test_the_line_that_goes_into_a_damaged_frame_is_lost_and_not_joined(tmp_path):
    _, frames, starts = frames_of([b"one\ntwo\nthr", b"ee\nfour\nfi", b"ve\nsix\n"])
    damaged = bytearray(b"".join(frames))
    damaged[starts[1] + 10] ^= 1
    (path := tmp_path / "a.jsonl.zst").write_bytes(damaged)
    assert [line for line, _ in read(path)[0]] == [b"one", b"two", b"ve", b"six"]


@pytest.mark.parametrize("place", [0.1, 0.6, 0.99])
def test_reading_goes_on_the_same_from_every_place_of_a_damaged_shard(tmp_path, place):
    """Also in the damaged frame, of which the lines before the damage are kept."""
    generator = random.Random(0)
    texts = [
        b"".join(generator.randbytes(300).hex().encode() + b"\n" for _ in range(count))
        for count in (5, 2000, 70)
    ]
    lines, frames, starts = frames_of(texts)
    damaged = bytearray(b"".join(frames))
    damaged[starts[1] + int(place * len(frames[1]))] ^= 0x08
    (path := tmp_path / "a.jsonl.zst").write_bytes(damaged)
    found, faults = read(path)
    assert [frame for _, frame in faults] == [starts[1]]
    kept = [line for line, _ in found]
    assert kept[:5] == lines[0]
    assert kept[-70:] == lines[2]
    count = len(kept) - 75  # the last block's lines are lost; a block is at most 128 KiB
    assert int(place * 2000) - 450 < count < 2000
    wrong = sum(a != b for a, b in zip(kept[5:-70], lines[1], strict=False))
    assert wrong <= 1  # zstd sees some errors only at a frame's end, by its checksum
    for i in range(0, len(found), 97):
        assert read(path, found[i][1])[0] == found[i + 1 :]


@pytest.mark.slow
def test_what_looks_like_a_frame_within_a_damaged_one_is_passed_over(tmp_path):
    """Bytes that do not compress are stored as they are, here with frames' magic numbers in them."""
    generator = random.Random(0)

    def text(count):
        parts = [MAGIC + generator.randbytes(generator.randrange(1, 400)) for _ in range(count)]
        return b"".join(parts).replace(b"\n", b"") + b"\n"

    texts = [b"first\n", text(3000) + text(5), text(1) + b"second\n", b"third\n"]
    lines, frames, starts = frames_of(texts)
    lines = [text.split(b"\n")[:-1] for text in texts]  # random bytes hold other lines' ends
    assert frames[1].count(MAGIC) > 2900
    for place in (0, 4, 6, 100_000, 300_000, len(frames[1]) - 1):
        damaged = bytearray(b"".join(frames))
        damaged[starts[1] + place] ^= 0x08
        (path := tmp_path / "a.jsonl.zst").write_bytes(damaged)
        found, faults = read(path)
        assert [frame for _, frame in faults] == [starts[1]]
        known = [line for line, _ in found if line in flat(lines)]
        assert [line for line in known if line not in lines[1]] == flat(lines[:1] + lines[2:])
        for i, (_, behind) in enumerate(found):
            assert read(path, behind)[0] == found[i + 1 :]


@pytest.mark.parametrize("number", range(3))
def test_behind_a_damaged_member_of_gzip_the_shard_ends(tmp_path, number):
    texts = [b"".join(b"%d of %d\n" % (i, f) for i in range(9)) for f in range(3)]
    members = [gzip.compress(text) for text in texts]
    start = sum(map(len, members[:number]))
    damaged = bytearray(b"".join(members))
    damaged[start + len(members[number]) - 6] ^= 1  # of the checksum
    (path := tmp_path / "a.jsonl.gz").write_bytes(damaged)
    found, faults = read(path)
    assert [line for line, _ in found] == b"".join(texts[:number]).splitlines()
    assert faults == [("corrupt_frames", start)]


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst"])
def test_a_shard_cut_short_gives_the_frames_before(tmp_path, kind):
    pack = gzip.compress if kind == ".jsonl.gz" else zstd
    texts = [b"one\ntwo\n", b"three\nfour\n"]
    first, second = map(pack, texts)
    path = tmp_path / f"a{kind}"
    for length in range(1, len(second)):
        path.write_bytes(first + second[:length])
        found, faults = read(path)
        lines = [line for line, _ in found]
        assert lines[:2] == [b"one", b"two"]
        assert lines == [b"one", b"two", b"three", b"four"][: len(lines)]  # whole lines
        assert faults == [("truncated_shards", len(first))]
    path.write_bytes(b"")
    assert read(path) == ([], [("truncated_shards", 0)])


@pytest.mark.parametrize("form", ["plain", "one member", "one frame", "frames"])
def test_lines_that_are_too_long_are_none(tmp_path, monkeypatch, form):
    monkeypatch.setattr(shards, "LONGEST_LINE", 100)
    monkeypatch.setattr(shards, "_PIECE_BYTES", 30)
    monkeypatch.setattr(shards, "_READ_BYTES", 30)
    sizes = [100, 101, 3, 0, 29, 30, 31, 5000, 100, 99, 101, 131]
    data = b"\n".join(b"y" * size for size in sizes)
    found = list(shards.lines(write(tmp_path, form, data)))
    assert [line for line, _ in found] == [b"y" * n if n <= 100 else None for n in sizes]
    for i, (_, place) in enumerate(found):
        assert list(shards.lines(write(tmp_path, form, data), place)) == found[i + 1 :]


def test_chunks_are_small_however_well_text_is_compressed(tmp_path):
    (path := tmp_path / "a.jsonl.zst").write_bytes(zstd(b"\n" * 50_000_000))
    sizes = [len(data) for _, data in shards.chunks(str(path))]
    assert sum(sizes) == 50_000_000
    assert max(sizes) <= 1 << 18
