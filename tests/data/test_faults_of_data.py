"""Faults of the data by policy: what is read in spite of them, what is counted, and what is held."""

import collections
import errno
import gzip
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard
from etils import epath
from paths import ROOT

from bipe_jax.config.fields import ON_ERROR
from bipe_jax.config.spec import parse_source
from bipe_jax.data import lines, shards, sources, tokenizer
from bipe_jax.data.stream import Documents, Stream
from bipe_jax.errors import UserError


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def as_lines(texts) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def skip(share: float = 1.0) -> sources.Policy:
    return sources.Policy("skip", share, sources.Tally())


def texts_of(spec, policy=None, **options) -> list[str]:
    """All texts of a source, or of a glob of shards."""
    return [d["text"] for d in sources.documents(parse_source(str(spec)), policy=policy, **options)]


@pytest.fixture
def three(tmp_path):
    """(directory, texts of each) of three shards of five frames each."""
    texts = [[[f"{s} {f} {i}" for i in range(4)] for f in range(5)] for s in range(3)]
    for number, frames in enumerate(texts):
        data = b"".join(zstd(as_lines(frame)) for frame in frames)
        (tmp_path / f"{number}.jsonl.zst").write_bytes(data)
    return tmp_path, texts


def flat(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


def damage(path: Path, frame: int) -> int:
    """Flips a byte of a frame; returns where that begins."""
    data = bytearray(path.read_bytes())
    start = -1
    for _ in range(frame + 1):
        start = data.index(b"\x28\xb5\x2f\xfd", start + 1)
    data[start + 14] ^= 0x08
    path.write_bytes(data)
    return start


def test_a_corrupt_frame_is_an_error_or_is_passed_over_and_counted_once(three):
    directory, texts = three
    start = damage(directory / "1.jsonl.zst", 2)
    with pytest.raises(UserError, match=rf"1\.jsonl\.zst is corrupt .* at byte {start} "):
        texts_of(f"{directory}/*")
    policy = skip(1 / 3)
    del texts[1][2]
    for _ in range(3):
        assert texts_of(f"{directory}/*", policy) == flat(flat(texts))
        assert policy.tally.counts() == {"corrupt_frames": 1}


def test_more_damaged_shards_than_the_allowed_share_are_an_error(three):
    directory, _ = three
    damage(directory / "1.jsonl.zst", 2)
    damage(directory / "1.jsonl.zst", 0)  # of the same shard
    assert len(texts_of(f"{directory}/*", policy := skip(0.34))) == 52
    assert policy.tally.counts() == {"corrupt_frames": 2}
    with pytest.raises(UserError, match=r"1\.jsonl\.zst is corrupt.*1 of 3 shards.*share=0\.3$"):
        texts_of(f"{directory}/*", skip(0.3))
    os.truncate(directory / "2.jsonl.zst", (directory / "2.jsonl.zst").stat().st_size - 9)
    with pytest.raises(UserError, match=r"2\.jsonl\.zst is .*trunc.*2 of 3 shards.*share=0\.34$"):
        texts_of(f"{directory}/*", skip(0.34))
    assert len(texts_of(f"{directory}/*", policy := skip(0.67))) in range(48, 52)
    assert policy.tally.counts() == {"corrupt_frames": 2, "truncated_shards": 1}


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_file_of_no_bytes(three, kind):
    """An empty shard, or a compressed one that is cut short."""
    directory, texts = three
    path = directory / f"9{kind}"
    path.write_bytes(b"")
    policy = skip()
    for _ in range(2):
        assert texts_of(f"{directory}/*", policy) == flat(flat(texts))
        expected = "empty_shards" if kind == ".jsonl" else "truncated_shards"
        assert policy.tally.counts() == {expected: 1}
    if kind == ".jsonl":
        assert texts_of(f"{directory}/*") == flat(flat(texts))
    else:
        with pytest.raises(UserError, match=f"9{kind} is corrupt or truncated at byte 0 "):
            texts_of(f"{directory}/*")


@pytest.mark.parametrize("data", [b"\n\n \t\r\n\n", b"\n", b" "])
def test_a_shard_of_blank_lines_is_empty(tmp_path, data):
    (tmp_path / "0.jsonl.zst").write_bytes(zstd(data))
    (tmp_path / "1.jsonl").write_bytes(as_lines(["text"]))
    policy = sources.Policy()
    for _ in range(2):
        assert texts_of(f"{tmp_path}/*", policy) == ["text"]
        assert policy.tally.counts() == {"empty_shards": 1}


BAD_LINES = {
    "Latin-1": (b'{"text": "caf\xe9"}', "not_utf8"),
    "a lone surrogate, escaped": (rb'{"text": "\udc80"}', "not_utf8"),
    "a lone surrogate": (b'{"text": "\xed\xb2\x80"}', "not_utf8"),
    "more than Unicode has": (b'{"text": "\xf4\x90\x80\x80"}', "not_utf8"),
    "an overlong form": (b'{"text": "\xc0\xaf"}', "not_utf8"),
    "UTF-16": ('{"text": "x"}'.encode("utf-16-le"), "not_json"),
    "a control character": (b'{"text": "\x00"}', "not_json"),
    "cut in a character": ("{'text': 'x\u20ac".encode()[:-1], "not_utf8"),
    "no text": (b'{"txt": "x"}', "no_text"),
    "text that is a number": (b'{"text": NaN}', "no_text"),
    "too long": (as_lines(["y" * 1001])[:-1], "too_long"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("on_error", ON_ERROR)
def test_a_bad_line_is_left_out_and_counted_by_both_policies(
    tmp_path, monkeypatch, caplog, bad, reason, on_error
):
    monkeypatch.setattr(shards, "LONGEST_LINE", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines("abc") + bad + b"\n" + as_lines("def"))
    policy = sources.Policy(on_error, 1 / 7, sources.Tally())
    words = lines.REASONS[reason]
    for _ in range(2):
        assert texts_of(path, policy) == list("abcdef")
        assert policy.tally.counts() == {"bad_lines": 1, f"bad_lines/{reason}": 1}
    logged = [r.message for r in caplog.records if "bipe_jax" in r.name]
    assert logged == [f"data: line 4 of {path} is {words}: skipped, as others are"]
    message = rf"1 of 7 lines of .*a\.jsonl are bad \(1 {words}; the first is line 4\)"
    with pytest.raises(UserError, match=message):
        texts_of(path, sources.Policy(on_error, 0.14))


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "data",
    [
        MARK + as_lines("abc"),
        as_lines("ab") + MARK + as_lines("c"),
        MARK + b"\n" + as_lines("abc"),
        as_lines("ab") + b'{"text": "c", "meta": {"pile_set_name": "documents", "score": NaN}}\n',
        as_lines("ab") + b'{"text": "c", "meta": {"score": [Infinity, -Infinity]}, "x": 1e999}\n',
        as_lines("ab") + b'{"text": "c", "meta": "{\\"score\\": NaN}"}\n',
        as_lines("ab") + b'{"text": "c", "meta": {"author": "caf\xe9"}}\n',
        as_lines("ab") + rb'{"text": "c", "meta": {"author": "\ud83d"}}' + b"\n",
    ],
)
def test_only_what_is_used_of_a_line_is_judged(tmp_path, data):
    (tmp_path / "a.jsonl").write_bytes(data)
    policy = sources.Policy()
    assert texts_of(tmp_path / "a.jsonl", policy) == list("abc")
    assert policy.tally.counts() == {}


def test_the_set_of_a_line_that_only_python_reads(tmp_path):
    line = b'{"text": "t", "meta": "{\\"pile_set_name\\": \\"S\\", \\"score\\": NaN}"}\n'
    (tmp_path / "a.jsonl").write_bytes(line)
    (document,) = sources.documents(parse_source(f"{tmp_path}/a.jsonl"))
    assert document == {"text": "t", "set": "S"}


def test_bad_lines_are_counted_when_they_are_read(tmp_path):
    """Not first at the end of their shard, which may be hours later."""
    (path := tmp_path / "a.jsonl").write_bytes(b"bad\n" + as_lines("abc"))
    policy = skip()
    next(sources.documents(parse_source(str(path)), policy=policy))
    assert policy.tally.counts() == {"bad_lines": 1, "bad_lines/not_json": 1}


def test_the_share_of_bad_lines_is_that_of_the_whole_shard_wherever_reading_began(tmp_path):
    """A run that goes on near the end of a shard ends neither earlier nor later than without a stop."""
    lines = [as_lines([str(i)]) for i in range(1500)]
    lines[7] = lines[1400] = lines[1499] = b"bad\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    for share in (3 / 1500, 2.9 / 1500):
        policy = sources.Policy("raise", share)
        found, error = read_on(path, None, policy)
        assert (error is None) == (share == 3 / 1500)
        assert len(found) == 1497
        for i in (0, 6, 7, 600, 1398, 1400, 1495, 1496):
            place = json.loads(json.dumps(found[i][1]))
            assert read_on(path, place, policy) == (found[i + 1 :], error)


def read_on(path, place, policy):
    """([(document, place)], the error at the end, if there is one)."""
    found = []
    try:
        for item in sources.read_shard(str(path), place, policy):
            found.append(item)
    except UserError as error:
        return found, str(error)
    return found, None


def test_a_line_that_is_too_long_is_not_held(tmp_path):
    """As measured from outside, while 30 MB of it are read."""
    with open(path := tmp_path / "a.jsonl", "wb") as file:
        file.write(as_lines(["before"]) + b'{"text": "')
        for _ in range(300):
            file.write(b"y" * 100_000)
        file.write(b'"}\n' + as_lines(["after"]))
    longest, shards.LONGEST_LINE = shards.LONGEST_LINE, 100_000
    tracemalloc.start()
    try:
        assert texts_of(path, policy := skip()) == ["before", "after"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        shards.LONGEST_LINE = longest
    assert policy.tally.counts() == {"bad_lines": 1, "bad_lines/too_long": 1}
    assert peak < 4_000_000


def test_readers_that_wait_hold_no_document(tmp_path):
    """As those of the shards do that are drawn from in turn."""
    text = "x" * 3_000_000
    for number in range(8):
        (tmp_path / f"{number}.jsonl").write_bytes(as_lines([text, text]))
    source = sources.open_source(parse_source(f"{tmp_path}/*"))
    readers = [source.read(shard) for shard in range(8)]
    tracemalloc.start()
    try:
        for reader in readers:
            assert next(reader)[0]["text"] == text
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 8_000_000


def test_a_text_whose_characters_take_too_much_memory_is_a_bad_line(monkeypatch):
    """Python takes 1, 2 or 4 bytes for each, as the widest needs."""
    monkeypatch.setattr(lines, "_MOST_BYTES", 100_000)
    kept = collections.Counter()
    for widest in ("y", "\xe9", "\u2019", "\u4e2d", "\U0001f600"):
        for ascii in (True, False):
            for length in range(1000, 60_000, 500):
                text = "y" * length + widest
                line = json.dumps({"text": text}, ensure_ascii=ascii).encode()
                taken = 2 * len(line) + sys.getsizeof(text)
                try:
                    found = lines.parse(line)
                except lines.BadLine as error:
                    found = None
                    assert str(error) == "too_long"
                assert found in (None, {"text": text, "set": "documents"})
                if taken > 100_100:
                    assert found is None
                if taken < 99_000:
                    assert found is not None
                kept[widest] += found is not None
    assert kept["y"] > kept["\u2019"] > kept["\U0001f600"] > 0


def test_a_shard_that_vanishes_before_it_is_opened(three):
    directory, texts = three
    for policy in (sources.Policy(), skip(0.3), skip(0.34)):
        source = sources.open_source(parse_source(f"{directory}/*"), policy=policy)
        assert len(source.shards) == 3
        (directory / "1.jsonl.zst").rename(directory / "elsewhere")

        def read(source=source):
            return [d["text"] for shard in range(3) for d, _ in source.read(shard)]

        message = r"1\.jsonl\.zst cannot be read: No such file"
        if policy.on_error == "raise":
            with pytest.raises(UserError, match=message):
                read()
        elif policy.max_bad_share == 0.3:
            with pytest.raises(UserError, match=f"{message}.*1 of 3 shards"):
                read()
        else:
            for _ in range(3):
                assert read() == flat(texts[0] + texts[2])
                assert policy.tally.counts() == {"unreadable_shards": 1}
        (directory / "elsewhere").rename(directory / "1.jsonl.zst")


@pytest.mark.parametrize("on_error", ON_ERROR)
def test_a_shard_that_vanishes_while_it_is_read_is_read_to_its_end(three, monkeypatch, on_error):
    """And is missed the next time through."""
    monkeypatch.setattr(shards, "_READ_BYTES", 16)  # so that it is read after that
    directory, texts = three
    policy = sources.Policy(on_error, 0.5, sources.Tally())
    documents = Documents(
        sources.open_source(parse_source(f"{directory}/*"), policy=policy), seed=0
    )
    found = [next(documents)["text"] for _ in range(4)]
    (directory / "1.jsonl.zst").unlink()
    found += [next(documents)["text"] for _ in range(56)]
    assert sorted(found) == sorted(flat(flat(texts)))
    if on_error == "raise":
        with pytest.raises(UserError, match=r"1\.jsonl\.zst cannot be read: No such file"):
            for _ in range(60):
                next(documents)
        return
    found = collections.Counter(next(documents)["text"] for _ in range(5 * 40))
    # The two that are left are read equally often, but for the time that is not yet over.
    assert found.keys() == set(flat(texts[0] + texts[2]))
    assert sum(found.values()) == 200 and max(found.values()) - min(found.values()) <= 2
    assert policy.tally.counts() == {"unreadable_shards": 1}


def test_when_all_shards_are_gone_the_stream_ends(three):
    directory, _ = three
    documents = Documents(
        sources.open_source(parse_source(f"{directory}/*"), policy=skip()), seed=0
    )
    next(documents)
    for number in range(3):
        (directory / f"{number}.jsonl.zst").unlink()
    with pytest.raises(UserError, match="holds no document"):
        for _ in range(200):
            next(documents)


class Store:
    """Files of a store that fails: `plan()` says whether the next read does, or how much it gives."""

    def __init__(self, monkeypatch, plan):
        self.plan, self.failures, self.waits = plan, 0, []
        kind = type(epath.Path("/"))
        opened = kind.open

        def open_(path, *args, **kwargs):
            if (error := plan("open")) is not None:
                self.failures += 1
                raise error
            return _Opened(opened(path, *args, **kwargs), self)

        monkeypatch.setattr(kind, "open", open_)
        monkeypatch.setattr(time, "sleep", self.waits.append)


class _Opened:
    def __init__(self, file, store):
        self._file, self._store = file, store
        self.seek, self.close = file.seek, file.close

    def read(self, size):
        if (found := self._store.plan("read")) is None:
            return self._file.read(size)
        if isinstance(found, Exception):
            self._store.failures += 1
            self._file.read(7)  # where it is now is not known
            raise found
        return self._file.read(max(1, min(size, found)))


class StoreError(Exception):
    """Not an OSError, as some of gcsfs and aiohttp are none."""


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("size", [50, 1 << 18])
def test_each_line_is_read_once_in_spite_of_errors_that_pass(tmp_path, monkeypatch, kind, size):
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}[kind]
    texts = [f"{i} " * (i % 17) for i in range(1, 300)]
    texts = [text for text in texts if text]
    path = tmp_path / f"a{kind}"
    path.write_bytes(b"".join(pack(as_lines(texts[i : i + 60])) for i in range(0, 300, 60)))
    monkeypatch.setattr(shards, "_PIECE_BYTES", size)
    monkeypatch.setattr(shards, "_READ_BYTES", size)
    generator, in_a_row, waits = random.Random(0), [], []

    def plan(what):
        kinds = [OSError(errno.EIO, "I/O error"), TimeoutError(), StoreError("503")]
        if len(in_a_row) < 3 and generator.random() < 0.5:
            waits.append((1.0, 4.0, 16.0)[len(in_a_row)])
            in_a_row.append(what)
            return generator.choice(kinds)
        if what == "read":
            in_a_row.clear()
            return generator.randrange(1, 40)  # fewer bytes than were asked for
        return None

    store = Store(monkeypatch, plan)
    policy = sources.Policy(tally=sources.Tally())
    assert texts_of(path, policy) == texts
    assert policy.tally.counts() == {"retries": store.failures}
    assert store.failures > 20
    assert store.waits == waits


def test_what_is_read_of_a_damaged_frame_does_not_depend_on_how_bytes_arrive(tmp_path, monkeypatch):
    """A store may give fewer than were asked for; here, each of zstd's blocks takes few."""
    data = bytearray(zstd(as_lines("x" * 20_000 + str(i) for i in range(1000))))
    data[len(data) * 2 // 3] ^= 0x08
    (path := tmp_path / "a.jsonl.zst").write_bytes(data + zstd(as_lines(["after"])))
    found = texts_of(path, skip())
    assert 500 < len(found) < 1000
    for most in (10, 100, 777):
        with monkeypatch.context() as context:
            Store(context, lambda what, most=most: most if what == "read" else None)
            assert texts_of(path, skip()) == found


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), StoreError("I/O\nerror")])
@pytest.mark.parametrize("where", ["open", "read"])
def test_an_error_that_stays_names_the_shard_after_the_last_try(three, monkeypatch, error, where):
    directory, texts = three
    failing = []

    def plan(what):
        return error if failing and what == where else None

    store = Store(monkeypatch, plan)
    source = sources.open_source(parse_source(f"{directory}/*"), policy=(policy := skip(1 / 3)))
    found = [d["text"] for d, _ in source.read(0)]
    failing.append(True)
    found += [d["text"] for d, _ in source.read(1)]
    failing.clear()
    found += [d["text"] for d, _ in source.read(2)]
    assert found == flat(texts[0] + texts[2])
    assert store.waits == [1.0, 4.0, 16.0]
    assert policy.tally.counts() == {"retries": 3, "unreadable_shards": 1}
    failing.append(True)
    with pytest.raises(UserError, match=r"0\.jsonl\.zst cannot be read: I/O error$"):
        texts_of(f"{directory}/*")
    assert len(store.waits) == 6


def test_an_error_in_the_search_for_the_next_frame_goes_by_the_policy_too(three, monkeypatch):
    directory, texts = three
    damage(directory / "0.jsonl.zst", 2)
    monkeypatch.setattr(shards, "_READ_BYTES", 16)
    broken = []
    search = shards._seek_frame

    def seek_frame(file):
        broken.append(True)
        return search(file)

    monkeypatch.setattr(shards, "_seek_frame", seek_frame)
    Store(monkeypatch, lambda what: OSError(errno.EIO, "I/O error") if broken else None)
    policy = skip()
    found = [d["text"] for d, _ in sources.read_shard(f"{directory}/0.jsonl.zst", policy=policy)]
    assert found == flat(texts[0][:2])
    assert policy.tally.counts() == {"corrupt_frames": 1, "unreadable_shards": 1, "retries": 3}


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError, ImportError])
def test_what_no_further_try_mends_is_final_at_once(three, monkeypatch, kind):
    directory, _ = three
    store = Store(monkeypatch, lambda what: kind("as it is"))
    with pytest.raises(UserError, match=r"0\.jsonl\.zst cannot be read: as it is"):
        texts_of(f"{directory}/*")
    assert store.waits == []


def test_a_store_that_cannot_be_listed_is_named(monkeypatch):
    def glob(path, pattern):
        raise ImportError("Please install\n gcsfs")

    monkeypatch.setattr(type(epath.Path("gs://a")), "glob", glob)
    with pytest.raises(UserError, match=r"gs://bucket/data cannot be listed: Please install gcsfs"):
        texts_of("gs://bucket/data/*.jsonl")


def duplicates(policy) -> int:
    counts = policy.tally.counts()
    assert counts.keys() <= {"duplicates"}
    return counts.get("duplicates", 0)


def test_duplicates_are_kept_and_each_is_counted_once(tmp_path):
    (tmp_path / "0.jsonl").write_bytes(as_lines(["a", "b", "a", "a ", "A", "c"]))
    (tmp_path / "1.jsonl").write_bytes(as_lines(["d", "b", "b"]))
    policy = sources.Policy(tally=sources.Tally())
    for _ in range(3):
        assert texts_of(f"{tmp_path}/*", policy) == ["a", "b", "a", "a ", "A", "c", "d", "b", "b"]
        assert duplicates(policy) == 3


def test_a_document_that_is_read_again_is_no_duplicate(three):
    directory, _ = three
    source = sources.open_source(parse_source(f"{directory}/*"), policy=(policy := skip()))
    for seed in range(3):
        documents = Documents(source, seed)
        for _ in range(150):
            next(documents)
    found = list(source.read(0))
    assert list(source.read(0, found[7][1])) == found[8:]
    assert duplicates(policy) == 0


def test_duplicates_are_looked_for_among_the_last_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_REMEMBERED", 5)
    generator = random.Random(0)
    texts = [str(generator.randrange(20)) for _ in range(500)]
    (path := tmp_path / "a.jsonl").write_bytes(as_lines(texts))
    expected, last = 0, []
    for text in texts:
        expected += text in last
        last = [*(other for other in last if other != text), text][-5:]
    texts_of(path, policy := skip())
    assert duplicates(policy) == expected > 50
    assert len(policy.tally._codes) == 5


def test_only_what_is_kept_can_be_a_duplicate(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [
        {"text": t, "meta": {"pile_set_name": s}} for t, s in zip("abbba", "XXYXX", strict=1)
    ]
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    for sets, expected in (((), 3), (("X",), 2), (("Y",), 0)):
        texts_of(path, policy := skip(), sets=sets)
        assert duplicates(policy) == expected


@pytest.fixture(scope="module")
def tokens(tokenizer_file):
    return tokenizer.load(tokenizer_file)


def stream_of(tokens, spec, policy) -> Stream:
    source = sources.open_source(parse_source(spec), policy=policy)
    return Stream(source, tokens, length=33, window=4, seed=3)


@pytest.mark.parametrize("where", [0.02, 0.5, 0.97])
def test_a_stream_with_damage_goes_on_the_same_where_it_was_stopped(tokens, tmp_path, where):
    """In its second epoch too. The damaged frame is of several blocks, of which some can be read."""
    generator = random.Random(0)
    for number, sizes in enumerate(((3, 1500, 9), (5, 5), (20,))):
        frames = []
        for size in sizes:
            texts = [f"{number} {i} {generator.randbytes(99).hex()}" for i in range(size)]
            frames.append(zstd(b"not JSON\n" * (number == 1) + as_lines(texts)))
        if size == 9:
            frames[1] = bytearray(frames[1])
            frames[1][int(where * len(frames[1]))] ^= 0x08
        (tmp_path / f"{number}.jsonl.zst").write_bytes(b"".join(frames))
    blocks, states = [], []
    stream = stream_of(tokens, f"{tmp_path}/*", policy := skip(0.4))
    while stream.epochs < 2:
        states.append(json.dumps(stream.get_state()))
        blocks.append(next(stream)["tokens"])
    stream.close()
    # With a frame's end lost, the line behind it is whole.
    assert policy.tally.counts() == {
        "corrupt_frames": 1,
        "bad_lines": 2,
        "bad_lines/not_json": 2,
    }
    other = stream_of(tokens, f"{tmp_path}/*", skip(0.4))
    for i in [*range(0, 40, 7), *range(40, len(blocks) - 60, len(blocks) // 20)]:
        other.set_state(json.loads(states[i]))
        for expected in blocks[i : i + 60]:
            np.testing.assert_array_equal(next(other)["tokens"], expected)
    other.close()


BIG = """
import hashlib, json, sys
import numpy as np
from bipe_jax.config.spec import parse_source
from bipe_jax.data import sources, tokenizer
from bipe_jax.data.stream import Stream

class Bytes:
    bos_id = 256

    def encode_parts(self, texts, firsts):
        bos = {True: [256], False: []}
        as_bytes = (np.frombuffer(text.encode(), np.uint8) for text in texts)
        return [
            np.concatenate([bos[first], ids]).astype(np.int32)
            for first, ids in zip(firsts, as_bytes)
        ]

path, kind, most = sys.argv[1:]
tokens = Bytes() if kind == "bytes" else tokenizer.load(kind)
policy = sources.Policy("skip", 0.5)
stream = Stream(sources.open_source(parse_source(path), policy=policy), tokens, length=1 << 15, workers=1)
documents, count = [], 0
while len(documents) < 6 and count < int(most):
    block = next(stream)["tokens"]
    count += len(block)
    for part in np.split(block, np.flatnonzero(block == tokens.bos_id)):
        if part[:1].tolist() == [tokens.bos_id]:
            documents.append(hashlib.sha256())
            part = part[1:]
        if len(part):
            documents[-1].update(part.astype(np.uint8 if kind == "bytes" else np.uint16))
stream.close()
# Not getrusage's, which begins with the memory of the process that started this one.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
peak = int(peak) * 1024
found = [document.hexdigest() for document in documents]
print(json.dumps({"found": found, "peak": peak, "faults": policy.tally.counts()}))
"""


def read_big(*arguments) -> dict:
    """What a process of its own finds: the digests of documents, the faults, its largest memory."""
    done = subprocess.run(
        [sys.executable, "-c", BIG, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_documents_of_200_mb_are_read_and_memory_stays_below_a_gigabyte(
    tokens, tokenizer_file, tmp_path
):
    """And those whose characters would take more are left out."""
    unit = "The quick brown fox jumps over the lazy dog, said she.\n" * 20_000
    small = ["The one before.", "And the one behind it.", "The last one."]
    escaped = json.dumps(unit)[1:-1].encode()
    times = 200_000_000 // len(unit) + 1

    def write_big(file, last=b""):
        file.write(b'{"text": "')
        for _ in range(times):
            file.write(escaped)
        file.write(last + b'"}\n')

    with zstandard.open(path := tmp_path / "a.jsonl.zst", "wb") as file:
        file.write(as_lines([small[0], 8 * unit]))
        write_big(file)
        file.write(as_lines([small[1]]))
        write_big(file, "\U0001f600".encode())
        file.write(as_lines([small[2]]))

    whole = read_big(path, "bytes", 1 << 40)
    expected = [small[0], 8 * unit, times * unit, *small[1:]]
    assert whole["found"][:5] == [hashlib.sha256(t.encode()).hexdigest() for t in expected]
    assert whole["faults"] == {"bad_lines": 1, "bad_lines/too_long": 1}
    begun = read_big(path, tokenizer_file, 16_000_000)
    ids = tokens.encode(small[0])[1:].astype(np.uint16)
    assert begun["found"][0] == hashlib.sha256(ids).hexdigest()
    assert len(begun["found"]) == 3  # it is in the large one
    assert max(whole["peak"], begun["peak"]) < 1_000_000_000


def long_window(data: bytes, window_log: int) -> bytes:
    """A frame as of `zstd --long` that reads from a pipe: it does not know its size."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize("policy", [sources.Policy(), skip()])
def test_frames_of_long_windows_are_read_or_named(tmp_path, policy):
    from bipe_jax.data import reframe

    path = tmp_path / "in" / "a.jsonl.zst"
    path.parent.mkdir()
    path.write_bytes(long_window(as_lines("abc"), 27))
    assert texts_of(path, policy) == list("abc")
    path.write_bytes(long_window(as_lines("abc"), 31))
    with pytest.raises(
        UserError, match=r"a\.jsonl\.zst takes 2,048 MiB .* bipe_jax\.data\.reframe"
    ):
        texts_of(path, policy)
    reframe.reframe(str(path), str(tmp_path / "out"))
    assert texts_of(f"{tmp_path}/out/*", policy) == list("abc")


def test_a_line_that_no_reader_keeps_is_not_reframed(tmp_path, monkeypatch):
    from bipe_jax.data import reframe

    monkeypatch.setattr(shards, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_bytes(as_lines(["x" * 3000]))
    with pytest.raises(UserError, match=r"a line of .* longer than"):
        reframe.reframe(f"{tmp_path}/a.jsonl", str(tmp_path / "out"), frame_mb=0.001)
