"""Sources of documents: JSONL shards of the Pile's kind, TFDS datasets, and the quickstart's corpus.

A document is {"text": str, "set": str}. A source is a list of shards. Each is read in a fixed order,
which can resume after any document. A JSONL shard has one JSON object per line with `text` and, as in
the Pile, `meta` with `pile_set_name` (an object, or an object as a JSON string).
"""

import collections
import dataclasses
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson

from bipe_jax.config import Config, spec
from bipe_jax.config.spec import Source
from bipe_jax.data import quickstart
from bipe_jax.data import shards as files
from bipe_jax.errors import UserError

NO_SET = "documents"  # the set of documents without a set name
_TFDS_SHARDS = 64
_LOST = ("corrupt_frames", "truncated_shards", "unreadable_shards")
_JUDGED_FROM = 1000  # lines of a shard before its share of bad lines is judged
_REMEMBERED = 1 << 16  # documents that are searched for duplicates
# Bytes of memory that parsing a document may use: its line twice, and its characters.
_MOST_BYTES = 680_000_000
_FOUR_BYTES = re.compile(rb"[\xf0-\xff]|\\u[dD][89abAB]")  # in UTF-8, and escaped
_TWO_BYTES = re.compile(rb"[\xc4-\xff]|\\u(?!00)")


class Tally:
    """Counts the faults of data. A fault at a known location counts once, however often it is read."""

    def __init__(self):
        self._faults: dict[str, set] = collections.defaultdict(set)
        self._bad_lines: dict[str, int] = {}
        self._events = collections.Counter()
        self._codes: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._furthest: dict[tuple, Any] = {}
        self._lock = threading.Lock()

    def add(self, kind: str, *where) -> None:
        with self._lock:
            self._faults[kind].add(where)

    def retry(self) -> None:
        with self._lock:
            self._events["retries"] += 1

    def document(self, shard: tuple, cursor: Any, text: str) -> None:
        """Counts a duplicate of one of the last documents, at its first reading."""
        code = hash(text)
        with self._lock:
            if shard in self._furthest and cursor <= self._furthest[shard]:
                return
            self._furthest[shard] = cursor
            if code in self._codes:
                self._events["duplicates"] += 1
            self._codes[code] = None
            self._codes.move_to_end(code)
            if len(self._codes) > _REMEMBERED:
                self._codes.popitem(last=False)

    def bad_lines(self, shard: str, count: int) -> None:
        with self._lock:
            self._bad_lines[shard] = max(self._bad_lines.get(shard, 0), count)

    def lost_shards(self) -> int:
        """Number of shards with unreadable parts."""
        with self._lock:
            return len({where[0] for kind in _LOST for where in self._faults[kind]})

    def counts(self) -> dict[str, int]:
        """Kind of fault -> number, for kinds that have occurred."""
        with self._lock:
            counts = {kind: len(faults) for kind, faults in self._faults.items() if faults}
            bad = sum(self._bad_lines.values())
            counts |= self._events
        return counts | ({"bad_lines": bad} if bad else {})


@dataclasses.dataclass(frozen=True)
class Policy:
    """The handling of faults.

    Bad lines are always skipped and counted. Empty shards, duplicates among 65536 documents in a row
    and successful retries are only counted.

    Attributes:
      on_error: "raise", or "skip" for unreadable parts of shards, in at most `max_bad_share` of the
        source's shards.
      max_bad_share: the largest share of bad lines of a shard: no JSON, without text, or too long.
      tally: counts faults.
    """

    on_error: str = "raise"
    max_bad_share: float = 0.0
    tally: Tally = dataclasses.field(default_factory=Tally)


def policy_of(config: Config, tally: Tally | None = None) -> Policy:
    """The policy of a config."""
    return Policy(config.data.on_error, config.data.max_bad_share, tally or Tally())


ReadShard = Callable[..., Iterator[tuple[dict, Any]]]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A source whose shards are known.

    Attributes:
      source, sets: the arguments of `open_source`.
      shards: names of the shards.
      read: (number of a shard, cursor or None for its start) -> iterator over (document, cursor after
        it). Cursors are of JSON's types. Raises UserError by the policy.
    """

    source: Source
    sets: tuple[str, ...]
    shards: list[str]
    read: ReadShard


def open_source(source: Source, sets: Sequence[str] = (), policy: Policy | None = None) -> Opened:
    """Opens a source of text, without reading documents.

    Args:
      source: the quickstart's corpus, a TFDS dataset (its name or directory, in ArrayRecord files) or
        JSONL shards.
      sets: names of sets to keep, besides the source's own; () keeps all.
      policy: for the faults of JSONL shards.

    Raises:
      UserError: there is no such source.
    """
    policy = policy or Policy()
    if source.kind == spec.QUICKSTART:
        shards, read = _quickstart(source.path)
    elif source.kind == spec.TFDS:
        shards, read = _tfds(source.path)
    elif source.kind == spec.PREPARED:
        raise UserError(f"data: {source.text} is prepared data, and text is needed here")
    else:
        shards, read = _jsonl(files.find(source.path), policy)

    def read_filtered(shard, cursor=None):
        def keep(item):
            document, after = item
            name = document["set"]
            if (
                not document["text"]
                or (sets and name not in sets)
                or (source.sets and name not in source.sets)
            ):
                return False
            policy.tally.document((source.text, shard), after, document["text"])
            return True

        # Unlike a generator, `filter` has no reference to a document while it waits.
        return filter(keep, read(shard, cursor))

    return Opened(source, tuple(sets), shards, read_filtered)


def _jsonl(paths: list[str], policy: Policy) -> tuple[list[str], ReadShard]:
    return paths, lambda shard, cursor: read_shard(paths[shard], cursor, policy, len(paths))


def documents(
    source: Source, sets: Sequence[str] = (), policy: Policy | None = None
) -> Iterator[dict]:
    """Yields all documents of a source once, in a fixed order.

    Raises:
      UserError: as `open_source` and `read_shard`; or there is no document of the sets.
    """
    opened = open_source(source, sets, policy)
    empty = True
    for shard in range(len(opened.shards)):
        for document, _ in opened.read(shard):
            empty = False
            yield document
    if empty:
        raise no_documents(source, sets)


def no_documents(source: Source, sets: Sequence[str] = ()) -> UserError:
    """The error of a source without documents."""
    filtered = f" of the sets {', '.join(sets)}" if sets else ""
    return UserError(f"data: {source.text!r} holds no document{filtered}")


def _fits(line: bytes | bytearray) -> bool:
    """Whether parsing uses at most `_MOST_BYTES`: a str has 1, 2 or 4 bytes per character, for its widest."""
    if len(line) * 6 <= _MOST_BYTES:
        return True
    width = 4 if _FOUR_BYTES.search(line) else 2 if _TWO_BYTES.search(line) else 1
    return len(line) * (2 + width) <= _MOST_BYTES


def parse(line: bytes | bytearray | None) -> dict | None:
    """A line's document, or None if it is too long, not JSON, or has no text."""
    if line is None or not _fits(line):
        return None
    try:
        record = orjson.loads(line)
    except ValueError:
        return None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        return None
    meta = record.get("meta")
    if isinstance(meta, str):
        try:
            meta = orjson.loads(meta)
        except ValueError:
            meta = None
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return {"text": text, "set": name if isinstance(name, str) else NO_SET}


def read_shard(
    path: str, cursor: Any = None, policy: Policy | None = None, shards: int = 1
) -> Iterator[tuple[dict, tuple]]:
    """Yields (document, cursor after it) of one JSONL shard.

    Bad lines (no JSON, without text, or too long) are skipped and counted. Empty lines are skipped.

    Args:
      path: the file.
      cursor: None for its start; else that of `shards`, and numbers of the lines so far: all, not
        empty ones, bad ones, and the number of the first bad one.
      shards: number of shards of the source.

    Raises:
      UserError: by the policy, the shard is unreadable, or too many of its lines are bad (judged
        after 1000 lines and at its end).
    """
    policy = policy or Policy()
    tally = policy.tally
    start, (number, count, bad, first_bad) = cursor or (files.START, (0, 0, 0, None))
    damaged = False

    def judge():
        if bad > policy.max_bad_share * count:
            raise UserError(
                f"data: {bad} of {count} lines of {path} are not JSON, have no text or are too long "
                f"(the first is line {first_bad}), more than "
                f"data.max_bad_share={policy.max_bad_share:g}"
            )

    def on_damage(damage: files.Damage, frame: int):
        nonlocal damaged
        damaged = True
        tally.add(damage.kind, path, frame)
        lost = tally.lost_shards()
        if policy.on_error == "raise":
            raise UserError(str(damage))
        if lost > policy.max_bad_share * shards:
            raise UserError(
                f"{damage}; that makes {lost} of {shards} shards, more than "
                f"data.max_bad_share={policy.max_bad_share:g}"
            )

    for line, after in files.lines(path, start, on_damage, tally.retry):
        number += 1
        if line is not None and (not line or line.isspace()):
            continue
        count += 1
        document = parse(line)
        del line  # frees it and the document, which may be large, before others are read
        if document is None:
            bad += 1
            first_bad = first_bad or number
            tally.bad_lines(path, bad)
            if count >= _JUDGED_FROM:
                judge()
        else:
            documents = [document]
            del document
            yield documents.pop(), (after, (number, count, bad, first_bad))
    judge()
    if not count and not damaged:
        tally.add("empty_shards", path)


def _quickstart(split: str) -> tuple[list[str], ReadShard]:
    """The quickstart's corpus. Each document is a shard, so that they are shuffled one by one."""
    texts = list(quickstart.documents(split))

    def read(shard, cursor):
        if cursor is None:
            yield texts[shard], 1

    return [f"{spec.QUICKSTART}:{split}[{i}]" for i in range(len(texts))], read


def _tfds(dataset: str) -> tuple[list[str], ReadShard]:
    """A TFDS dataset with a feature `text`; ranges of its documents are the shards."""
    import tensorflow_datasets as tfds

    name, _, split = dataset.partition(":")
    path = f"{spec.TFDS}:{dataset}"
    split = split or "train"
    try:
        builder: Any = (
            tfds.builder_from_directory(name) if os.path.isdir(name) else tfds.builder(name)
        )
        texts = builder.as_data_source(split=split)
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"data: {path} cannot be opened as a TFDS dataset: {reason}") from None
    if "text" not in builder.info.features:
        known = ", ".join(builder.info.features)
        raise UserError(f"data: {path} has no feature 'text', but {known}")
    size = -(-len(texts) // _TFDS_SHARDS)
    starts = range(0, len(texts), max(size, 1))

    def read(shard, cursor):
        for i in range(cursor or starts[shard], min(starts[shard] + size, len(texts))):
            text = texts[i]["text"]
            if isinstance(text, bytes):
                text = text.decode("utf-8", errors="replace")
            yield {"text": text, "set": builder.info.name}, i + 1

    return [f"{path}[{start}:{min(start + size, len(texts))}]" for start in starts], read
