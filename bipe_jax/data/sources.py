"""Sources of documents: JSONL shards of text or examples, TFDS datasets, synthetic tasks, the quickstart.

A document is {"text": str, "set": str}, perhaps with "segments" (see `segments.segmenters`). A source is a
list of shards. Each is read in a fixed order, which can resume after any document. A JSONL shard has one
JSON object per line with `text` and, as in the Pile, `meta` with `pile_set_name` (an object, or an object as
a JSON string).
"""

import collections
import dataclasses
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bipe_jax.config import Config, spec
from bipe_jax.config.spec import Shard, Source
from bipe_jax.data import datasets, examples, lines, scrolls
from bipe_jax.data import shards as files
from bipe_jax.data.datasets import ReadShard
from bipe_jax.errors import UserError

_LOG = logging.getLogger(__name__)

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
      source: the quickstart's corpus, a TFDS dataset (its name or directory, in ArrayRecord files), a
        synthetic task, a data set of SCROLLS, JSONL shards, or the source of a plug-in.
      sets: names of sets to keep, besides the source's own; () keeps all.
      policy: for the faults of JSONL shards.
      paths: of the JSONL shards, in their order; None: those that match the source's globs.

    Raises:
      UserError: there is no such source; or by the policy, JSONL shards are missing.
    """
    policy = policy or Policy()
    if source.kind == spec.QUICKSTART:
        shards, read = datasets.of_quickstart(source.path)
    elif source.kind == spec.TFDS:
        shards, read = datasets.of_tfds(source)
    elif source.kind == spec.SYNTHETIC:
        shards, read = datasets.of_task(source)
    elif source.kind == spec.SCROLLS:
        shards, read = scrolls.of_source(source)
    elif source.kind == spec.PREPARED:
        raise UserError(f"data: {source.text} is prepared data, and text is needed here")
    elif source.kind not in spec.FILES:
        known, read = of_plugin(source)
        shards = [shard.path for shard in known]
    else:
        shards, read = _jsonl(list(paths or files.find(source.path)), policy)

    def read_filtered(shard, cursor=None):
        def keep(item):
            document, after = item
            if examples.is_example(document) != (source.kind in spec.OF_EXAMPLES):
                raise _of_the_other_kind(source)
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


def of_plugin(source: Source) -> tuple[tuple[Shard, ...], ReadShard]:
    """The shards of a plug-in's source, and what reads them, see `Opened.read`.

    Raises:
      UserError: it is not installed, or broken.
    """
    plugin = spec.plugin_of(source)
    if plugin is None:
        raise UserError(f"data: {source.text}: no installed package has a source {source.kind!r}")
    opened = plugin.call(source.path)
    good = isinstance(opened, tuple) and len(opened) == 2 and callable(opened[1])
    if not good or not all(isinstance(shard, Shard) for shard in opened[0]):
        plugin.refuse(
            "must give (shards, read): a sequence of bipe_jax.config.spec.Shard, and a function"
        )
    shards, read = opened

    def read_named(shard: int, cursor: Any = None) -> Iterator[tuple[dict, Any]]:
        return (
            ({"set": source.kind, **document}, after) for document, after in read(shard, cursor)
        )

    return tuple(shards), read_named


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


def _of_the_other_kind(source: Source) -> UserError:
    if source.kind in spec.OF_EXAMPLES:
        return UserError(
            f"data: {source.text!r} holds text, not prompts and completions: name it "
            f"{source.text.removeprefix(spec.EXAMPLES + ':')!r}"
        )
    return UserError(
        f"data: {source.text!r} holds prompts and completions, not text: name it "
        f"'{spec.EXAMPLES}:{source.text}'"
    )
