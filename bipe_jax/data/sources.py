"""Sources of documents: JSONL shards of the Pile's kind, TFDS datasets, and the quickstart's corpus.

A document is {"text": str, "set": str}. A source is a list of shards. Each is read in a fixed order,
which can resume after any document. A JSONL shard has one JSON object per line with `text` and, as in
the Pile, `meta` with `pile_set_name` (an object, or an object as a JSON string).
"""

import collections
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bipe_jax.config import Config, spec
from bipe_jax.config.spec import Source
from bipe_jax.data import lines, quickstart
from bipe_jax.data import shards as files
from bipe_jax.errors import UserError

_LOG = logging.getLogger(__name__)

_TFDS_SHARDS = 64
_LOST = ("corrupt_frames", "truncated_shards", "unreadable_shards")
_JUDGED_FROM = 1000  # lines of a shard before its share of bad lines is judged
_REMEMBERED = 1 << 16  # documents that are searched for duplicates


class Tally:
    """Counts the faults of data. A fault at a known location counts once, however often it is read."""

    def __init__(self):
        self._faults: dict[str, set] = collections.defaultdict(set)
        self._bad_lines: dict[str, collections.Counter[str]] = {}
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

    def bad_lines(self, shard: str, counts: Mapping[str, int]) -> bool:
        """Records the bad lines of a shard so far, by their reasons. Returns whether one is the first."""
        with self._lock:
            seen = self._bad_lines.setdefault(shard, collections.Counter())
            new = any(counts[r] and not any(c[r] for c in self._bad_lines.values()) for r in counts)
            seen |= counts  # the larger counts: a shard may be read again
            return new

    def lost_shards(self) -> int:
        """Number of shards with unreadable parts."""
        with self._lock:
            return len({where[0] for kind in _LOST for where in self._faults[kind]})

    def counts(self) -> dict[str, int]:
        """Kind of fault -> number, for kinds that have occurred."""
        with self._lock:
            counts = {kind: len(faults) for kind, faults in self._faults.items() if faults}
            counts |= self._events
            bad = sum(self._bad_lines.values(), collections.Counter())
        if bad:
            counts |= {"bad_lines": bad.total()} | {f"bad_lines/{r}": n for r, n in bad.items()}
        return counts


@dataclasses.dataclass(frozen=True)
class Policy:
    """The handling of faults.

    Bad lines are always skipped and counted. Empty shards, duplicates among 65536 documents in a row
    and successful retries are only counted.

    Attributes:
      on_error: "raise", or "skip" for unreadable parts of shards, in at most `max_bad_share` of the
        source's shards.
      max_bad_share: the largest share of bad lines of a shard: not JSON, without text, not UTF-8 or too
        long.
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


def open_source(
    source: Source,
    sets: Sequence[str] = (),
    policy: Policy | None = None,
    paths: Sequence[str] | None = None,
) -> Opened:
    """Opens a source of text, without reading documents.

    Args:
      source: the quickstart's corpus, a TFDS dataset (its name or directory, in ArrayRecord files) or
        JSONL shards.
      sets: names of sets to keep, besides the source's own; () keeps all.
      policy: for the faults of JSONL shards.
      paths: of the JSONL shards, in their order; None: those that match the source's globs.

    Raises:
      UserError: there is no such source; or by the policy, JSONL shards are missing.
    """
    policy = policy or Policy()
    if source.kind == spec.QUICKSTART:
        shards, read = _quickstart(source.path)
    elif source.kind == spec.TFDS:
        shards, read = _tfds(source)
    elif source.kind == spec.PREPARED:
        raise UserError(f"data: {source.text} is prepared data, and text is needed here")
    else:
        shards, read = _jsonl(list(paths or files.find(source.path)), policy)

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
    if policy.on_error == "raise" and (missing := files.missing(paths)):
        raise UserError(
            f"data: {len(missing)} of {len(paths)} shards are missing, such as {missing[0]}: restore them, "
            "or use globs that match only the shards to read"
        )
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


def read_shard(
    path: str, cursor: Any = None, policy: Policy | None = None, shards: int = 1
) -> Iterator[tuple[dict, tuple]]:
    """Yields (document, cursor after it) of one JSONL shard.

    Bad lines (not JSON, without text, not UTF-8, or too long) are skipped and counted, and the first one
    of each kind is logged. Empty lines are skipped, and byte order marks at the start of lines.

    Args:
      path: the file.
      cursor: None for its start; else that of `shards`, and numbers of the lines so far: all, not
        empty ones, bad ones by reason, and the number of the first bad one.
      shards: number of shards of the source.

    Raises:
      UserError: by the policy, the shard is unreadable, or too many of its lines are bad (judged
        after 1000 lines and at its end).
    """
    policy = policy or Policy()
    tally = policy.tally
    start, (number, count, counts, first_bad) = cursor or (files.START, (0, 0, (), None))
    # A checkpoint of an earlier version has one number for all reasons.
    counts = [counts] if isinstance(counts, int) else counts
    bad = dict.fromkeys(lines.REASONS, 0) | dict(zip(lines.REASONS, counts, strict=False))
    damaged = False

    def judge():
        if sum(bad.values()) > policy.max_bad_share * count:
            reasons = ", ".join(f"{n} {lines.REASONS[reason]}" for reason, n in bad.items() if n)
            raise UserError(
                f"data: {sum(bad.values())} of {count} lines of {path} are bad ({reasons}; the first is "
                f"line {first_bad}), more than data.max_bad_share={policy.max_bad_share:g}"
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
        if line is not None and line[: len(lines.MARK)] == lines.MARK:
            line = line[len(lines.MARK) :]
        if line is not None and (not line or line.isspace()):
            continue
        count += 1
        try:
            documents = [lines.parse(line)]
        except lines.BadLine as error:
            reason = str(error)
            bad[reason] += 1
            first_bad = first_bad or number
            if tally.bad_lines(path, bad):
                _LOG.info(
                    f"data: line {number} of {path} is {lines.REASONS[reason]}: skipped, as others are"
                )
            if count >= _JUDGED_FROM:
                judge()
            continue
        finally:
            del line  # frees it and the document, which may be large, before others are read
        yield documents.pop(), (after, (number, count, tuple(bad.values()), first_bad))
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


def tfds_builder(source: Source) -> tuple[Any, str]:
    """The TFDS builder of a source, and the name of its split. Raises UserError."""
    import tensorflow_datasets as tfds

    name, _, split = source.path.partition(":")
    try:
        builder: Any = (
            tfds.builder_from_directory(name) if os.path.isdir(name) else tfds.builder(name)
        )
    except Exception as error:  # of many kinds
        raise _not_opened(source, error) from None
    return builder, split or "train"


def _not_opened(source: Source, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(
        f"data: {spec.TFDS}:{source.path} cannot be opened as a TFDS dataset: {reason}"
    )


def _tfds(source: Source) -> tuple[list[str], ReadShard]:
    """A TFDS dataset with a feature `text`; ranges of its documents are the shards."""
    builder, split = tfds_builder(source)
    path = f"{spec.TFDS}:{source.path}"
    try:
        texts = builder.as_data_source(split=split)
    except Exception as error:  # of many kinds
        raise _not_opened(source, error) from None
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
