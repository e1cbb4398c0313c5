"""Sources of documents: JSONL shards of the Pile's kind, TFDS datasets, and the quickstart's corpus.

A document is {"text": str, "set": str}. A source is a list of shards, each of which is read in a fixed
order and from any place on. A JSONL shard has one JSON object a line with `text` and, if it is of the
Pile's kind, `meta` with `pile_set_name` (an object, or an object as a JSON string).
"""

import collections
import dataclasses
import os
import re
import threading
from collections.abc import Callable, Iterator

import orjson

from bipe_jax.config import Config, spec
from bipe_jax.config.spec import Source
from bipe_jax.data import quickstart
from bipe_jax.data import shards as files
from bipe_jax.errors import UserError

NO_SET = "documents"  # the set name of documents that name none
_TFDS_SHARDS = 64
_JUDGED_FROM = 1000  # lines of a shard; and at its end
_REMEMBERED = 1 << 16  # documents that duplicates are looked for among
# Bytes that a document may take while it is parsed: its line twice, and its characters.
_MOST_BYTES = 680_000_000
_FOUR_BYTES = re.compile(rb"[\xf0-\xff]|\\u[dD][89abAB]")  # in UTF-8, and escaped
_TWO_BYTES = re.compile(rb"[\xc4-\xff]|\\u(?!00)")


class Tally:
    """Counts what went wrong. A fault that has a place counts once, however often it is read."""

    def __init__(self):
        self._faults = collections.defaultdict(set)
        self._bad_lines: dict[str, int] = {}
        self._events = collections.Counter()
        self._codes: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._furthest: dict[tuple, object] = {}
        self._lock = threading.Lock()

    def add(self, kind: str, *where) -> None:
        with self._lock:
            self._faults[kind].add(where)

    def retry(self) -> None:
        with self._lock:
            self._events["retries"] += 1

    def document(self, shard: tuple, place, text: str) -> None:
        """Counts a text that one of the last documents had, when it is read for the first time."""
        code = hash(text)
        with self._lock:
            if shard in self._furthest and place <= self._furthest[shard]:
                return
            self._furthest[shard] = place
            if code in self._codes:
                self._events["duplicates"] += 1
            self._codes[code] = None
            self._codes.move_to_end(code)
            if len(self._codes) > _REMEMBERED:
                self._codes.popitem(last=False)

    def bad_lines(self, shard: str, count: int) -> None:
        with self._lock:
            self._bad_lines[shard] = max(self._bad_lines.get(shard, 0), count)

    def shards(self, *kinds: str) -> int:
        """The shards that have a fault of any of these kinds."""
        with self._lock:
            return len({where[0] for kind in kinds for where in self._faults[kind]})

    def counts(self) -> dict[str, int]:
        """Kind of fault -> how many; those that have occurred."""
        with self._lock:
            counts = {kind: len(found) for kind, found in self._faults.items() if found}
            bad = sum(self._bad_lines.values())
            counts |= self._events
        return counts | ({"bad_lines": bad} if bad else {})


@dataclasses.dataclass(frozen=True)
class Policy:
    """What to do about faults.

    Bad lines are left out and counted, whatever `on_error` is. Empty shards, documents that have the
    text of one of the 65536 before them, and errors that passed at a further try are counted only.

    Attributes:
      on_error: "raise", or "skip" what cannot be read of a shard, if no more than `max_bad_share` of
        the source's shards are so.
      max_bad_share: the largest share of a shard's lines that may be no JSON, have no text or be too
        long.
      tally: counts them.
    """

    on_error: str = "raise"
    max_bad_share: float = 0.0
    tally: Tally = dataclasses.field(default_factory=Tally)


def policy_of(config: Config, tally: Tally | None = None) -> Policy:
    """The policy that a config asks for."""
    return Policy(config.data.on_error, config.data.max_bad_share, tally or Tally())


@dataclasses.dataclass(frozen=True)
class Opened:
    """A source whose shards are known.

    Attributes:
    source, sets: what it was opened with.
    shards: their names.
    read: (number of the shard, place in it or None for its start) -> yields (document, the place
      behind it, of JSON's types). Raises UserError by the policy.
    """

    source: Source
    sets: tuple[str, ...]
    shards: list[str]
    read: Callable[[int, object], Iterator[tuple[dict, object]]]


def open_source(source: Source, sets=(), policy: Policy | None = None) -> Opened:
    """Opens a source of text; nothing is read of it yet.

    Args:
      source: the quickstart's corpus, a TFDS dataset (that TFDS finds, or the directory of one, in
        ArrayRecord files) or JSONL shards.
      sets: names of sets to keep, besides the source's own; () keeps all.

    Raises:
      UserError: there is no such source.
    """
    policy = policy or Policy()

    def kept(shard, found):
        def keep(item):
            document, place = item
            name = document["set"]
            if (
                not document["text"]
                or (sets and name not in sets)
                or (source.sets and name not in source.sets)
            ):
                return False
            policy.tally.document((source.text, shard), place, document["text"])
            return True

        return filter(keep, found)  # unlike a generator, it holds no document while it waits

    if source.kind == spec.QUICKSTART:
        shards, read = _quickstart(source.path)
    elif source.kind == spec.TFDS:
        shards, read = _tfds(source.path)
    elif source.kind == spec.PREPARED:
        raise UserError(f"data: {source.text} is prepared data, and text is needed here")
    else:
        shards = files.find(source.path)

        def read(shard, place):
            return read_shard(shards[shard], place, policy, len(shards))

    def read_kept(shard, place=None):
        return kept(shard, read(shard, place))

    return Opened(source, tuple(sets), shards, read_kept)


def documents(source: Source, sets=(), policy: Policy | None = None) -> Iterator[dict]:
    """Yields all documents of a source once, in a fixed order.

    Raises:
      UserError: as `open_source` and `read_shard`; or nothing is left after filtering.
    """
    opened = open_source(source, sets, policy)
    empty = True
    for shard in range(len(opened.shards)):
        for document, _ in opened.read(shard):
            empty = False
            yield document
    if empty:
        raise nothing(source, sets)


def nothing(source: Source, sets=()) -> UserError:
    """The error of a source without documents."""
    filtered = f" of the sets {', '.join(sets)}" if sets else ""
    return UserError(f"data: {source.text!r} holds no document{filtered}")


def _fits(line: bytes) -> bool:
    """Whether its text can be held: Python takes 1, 2 or 4 bytes for each character, as the widest needs."""
    if len(line) * 6 <= _MOST_BYTES:
        return True
    width = 4 if _FOUR_BYTES.search(line) else 2 if _TWO_BYTES.search(line) else 1
    return len(line) * (2 + width) <= _MOST_BYTES


def parse(line: bytes | None) -> dict | None:
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


def read_shard(path: str, place=None, policy: Policy | None = None, shards: int = 1):
    """Yields (document, place behind it) of one JSONL shard.

    Lines that are not JSON, have no text or are too long are left out and counted. Empty lines are
    passed over.

    Args:
      path: the file. place: None for its start; it holds that of `shards`, and the lines so far: all,
        those that are not empty, the bad ones, and the number of the first of these.
      shards: how many the source has.

    Raises:
      UserError: by the policy, the shard is unreadable, or too many of its lines are bad (judged
        after 1000 lines and at its end).
    """
    policy = policy or Policy()
    tally = policy.tally
    place, (number, count, bad, first_bad) = place or (files.START, (0, 0, 0, None))
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
        lost = tally.shards("corrupt_frames", "truncated_shards", "unreadable_shards")
        if policy.on_error == "raise":
            raise UserError(str(damage))
        if lost > policy.max_bad_share * shards:
            raise UserError(
                f"{damage}; that makes {lost} of {shards} shards, more than "
                f"data.max_bad_share={policy.max_bad_share:g}"
            )

    for line, behind in files.lines(path, place, on_damage, tally.retry):
        number += 1
        if line is not None and (not line or line.isspace()):
            continue
        count += 1
        document = parse(line)
        del line  # it may be large, and so may the document: neither is held while others are read
        if document is None:
            bad += 1
            first_bad = first_bad or number
            tally.bad_lines(path, bad)
            if count >= _JUDGED_FROM:
                judge()
        else:
            found = [document]
            del document
            yield found.pop(), (behind, (number, count, bad, first_bad))
    judge()
    if not count and not damaged:
        tally.add("empty_shards", path)


def _quickstart(split: str):
    """Each document is a shard, so that they are shuffled one by one."""
    held = list(quickstart.documents(split))

    def read(shard, place):
        if place is None:
            yield held[shard], 1

    return [f"{spec.QUICKSTART}:{split}[{i}]" for i in range(len(held))], read


def _tfds(dataset: str):
    """A TFDS dataset with a feature `text`; stretches of it are the shards."""
    import tensorflow_datasets as tfds

    name, _, split = dataset.partition(":")
    path = f"{spec.TFDS}:{dataset}"
    split = split or "train"
    try:
        builder = tfds.builder_from_directory(name) if os.path.isdir(name) else tfds.builder(name)
        texts = builder.as_data_source(split=split)
    except Exception as error:  # TFDS raises many kinds; each says what it wants
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"data: {path} cannot be opened as a TFDS dataset: {reason}") from None
    if "text" not in builder.info.features:
        known = ", ".join(builder.info.features)
        raise UserError(f"data: {path} has no feature 'text', but {known}")
    size = -(-len(texts) // _TFDS_SHARDS)
    starts = range(0, len(texts), max(size, 1))

    def read(shard, place):
        for i in range(place or starts[shard], min(starts[shard] + size, len(texts))):
            text = texts[i]["text"]
            if isinstance(text, bytes):
                text = text.decode("utf-8", errors="replace")
            yield {"text": text, "set": builder.info.name}, i + 1

    return [f"{path}[{start}:{min(start + size, len(texts))}]" for start in starts], read
