"""Statistics of a source under several segment rules.

Each document is tokenised once for all rules. Numbers are exact: every length is counted.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from bipe_jax import hardware, segments
from bipe_jax.config.spec import Source
from bipe_jax.data import marked, packing, prepared, sources, stream
from bipe_jax.data.prefetch import ordered_map
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError

BLOCK = 1024  # tokens, for the number of segments in a block
_SHARDS_AT_ONCE = 8
_WINDOW = 1 << 20  # tokens that are packed together
_SMALL = 1 << 16


class Histogram:
    """The number of occurrences of each natural number.

    Small numbers are counted in an array, and larger ones, which are few, one by one.
    """

    def __init__(self):
        self._small = np.zeros(_SMALL, np.int64)
        self._large: collections.Counter[int] = collections.Counter()

    def add(self, values: np.ndarray | list[int]) -> None:
        values = np.asarray(values, np.int64)
        self._small += np.bincount(values[values < _SMALL], minlength=_SMALL)
        self._large.update(values[values >= _SMALL].tolist())

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers that have occurred, ascending, and their counts: (n,) int64 each."""
        small, large = np.flatnonzero(self._small), sorted(self._large)
        counts = [self._large[number] for number in large]
        return (
            np.concatenate([small, np.asarray(large, np.int64)]),
            np.concatenate([self._small[small], np.asarray(counts, np.int64)]),
        )

    @property
    def total(self) -> int:
        return int(self._table()[1].sum())

    @property
    def mean(self) -> float:
        numbers, counts = self._table()
        return float(numbers @ counts / max(counts.sum(), 1))

    @property
    def max(self) -> int:
        return int(self._table()[0].max(initial=0))

    def quantile(self, share: float) -> int:
        """The smallest number that at least this share of all, and at least one, do not exceed."""
        numbers, counts = self._table()
        least = max(share * counts.sum(), 1)
        return int(numbers[np.searchsorted(np.cumsum(counts), least)])

    def between(self, low: int, high: int) -> int:
        """Number of occurrences from `low` to `high`, inclusive."""
        numbers, counts = self._table()
        return int(counts[(numbers >= low) & (numbers <= high)].sum())


class Statistics:
    """The statistics of one set.

    Attributes:
      documents, text_bytes, tokens: their numbers.
      lengths: tokens per document. segments: rule -> tokens per segment.
      per_block: rule -> segments per block.
      rows: arrays "tokens", "document_ids" that samples are taken from.
    """

    def __init__(self, rules: dict, kind: str = "concat", segmenters: Sequence[str] = ()):
        self.documents = self.text_bytes = self.tokens = 0
        self.lengths = Histogram()
        self.segments = {name: Histogram() for name in rules}
        self.per_block = {name: Histogram() for name in rules}
        self._rules, self._kind, self._segmenters = rules, kind, segmenters
        self._buffer: list[tuple[dict, bool]] = []  # rows to be packed; a document's first
        self._length = 0  # tokens so far of the document that was begun
        self._open = dict.fromkeys(rules, 0)  # and of its last segment
        self._next: dict[str, dict] = {}  # rule -> coordinates of its next token
        self.rows: dict = {}

    def coordinates(self, row: dict, rule: segments.Rule, **options) -> dict:
        """The coordinates of tokens under a rule, see `segments.coordinates`."""
        starts = marked.for_rule(row.get("starts"), self._segmenters, rule)
        return segments.coordinates(row["tokens"], rule, starts=starts, **options)

    def add(self, row: dict, text_bytes: int, last: bool = True) -> None:
        """A document, or the next part of one.

        Args:
          row: "tokens", (L,), and perhaps "starts", see `marked`.
          text_bytes: of the part. last: whether the document ends with it.
        """
        tokens = row["tokens"]
        self._buffer.append((row, not self._length))
        self.documents += not self._length
        self.text_bytes += text_bytes
        self.tokens += len(tokens)
        for name, rule in self._rules.items() if len(tokens) else ():
            coordinates = self.coordinates(row, rule, start=self._next.get(name), states=True)
            of_last = {key: int(values[-1]) for key, values in coordinates.items()}
            self._next[name] = segments.advance(of_last, tokens[-1], rule)
            begins = coordinates["offset"] == 0
            begins[0] &= self._open[name] > 0  # what is open there ends, if anything is
            at = np.flatnonzero(begins)
            self.segments[name].add(np.diff(at, prepend=-self._open[name]))
            self._open[name] = len(tokens) - at[-1] if len(at) else self._open[name] + len(tokens)
        if last:
            for name, size in self._open.items():
                self.segments[name].add([size] if size else [])
        self._length += len(tokens)
        if last:
            self.lengths.add([self._length])
            self._length, self._open, self._next = 0, dict.fromkeys(self._rules, 0), {}
        if sum(len(row["tokens"]) for row, _ in self._buffer) >= _WINDOW:
            self.pack()

    def pack(self) -> None:
        """Packs the buffered documents, and counts the segments of the blocks.

        What the next part may add to stays in the buffer: the tokens after the last whole block, of the
        document that was begun, or of all if documents are concatenated.
        """
        if not self._buffer:
            return
        parts = [row for row, _ in self._buffer]
        rows = {name: np.concatenate([row[name] for row in parts]) for name in parts[0]}
        rows["document_ids"] = np.repeat(
            np.cumsum([first for _, first in self._buffer]), [len(row["tokens"]) for row in parts]
        )
        rows["document_ids"] += rows["document_ids"][0] == 0  # it begins within a document
        size, rest = len(rows["tokens"]), 0
        if self._kind == "concat":
            rest = size % BLOCK
        elif self._length:
            rest = int((rows["document_ids"] == rows["document_ids"][-1]).sum()) % BLOCK
        left = {n: x[size - rest :] for n, x in rows.items() if n != "document_ids"}
        self._buffer = [(left, True)] if rest else []
        self.rows = self.rows or rows
        packed = {name: array[: size - rest] for name, array in rows.items()}
        blocks = getattr(packing, self._kind)(packed, BLOCK)
        self.add_blocks(blocks)

    def add_blocks(self, blocks: dict) -> None:
        """Counts the segments of blocks (n, L); coordinates run through each, as training's default."""
        for name, rule in self._rules.items() if len(blocks["tokens"]) else ():
            segment = self.coordinates(blocks, rule)["segment"]
            self.per_block[name].add(
                np.where(blocks["document_ids"] > 0, segment, 0).max(axis=1) + 1
            )

    def add_pieces(self, blocks: dict) -> None:
        """Counts the lengths of the parts of documents, and of segments, in blocks (n, L)."""
        ids = blocks["document_ids"]
        real = ids.ravel() > 0

        def lengths(offset):
            starts = np.flatnonzero(offset.ravel() == 0)
            sizes = np.diff(starts, append=real.size)
            return sizes[real[starts]]

        position = None
        for name, rule in self._rules.items():
            coordinates = self.coordinates(blocks, rule, document_ids=ids)
            self.segments[name].add(lengths(coordinates["offset"]))
            position = coordinates["position"]  # the same for all rules
        self.lengths.add(lengths(position))


@dataclasses.dataclass(frozen=True)
class Survey:
    """The statistics of a source.

    Attributes:
      sets: name -> Statistics, in descending order of tokens. rules: name -> rule.
      faults: kind -> number. note: describes the sample, "" if all was read.
      block: tokens of the blocks of `per_block`. whole: whether documents were read uncut.
    """

    sets: dict[str, Statistics]
    rules: dict[str, segments.Rule]
    faults: dict[str, int]
    note: str
    block: int = BLOCK
    whole: bool = True


def _shuffled(source: sources.Opened) -> Iterator[dict]:
    """All documents once, from several random shards in turn, so that the first ones are a sample."""
    waiting = iter(stream.order(0, 0, len(source.shards)).tolist())
    shards = [source.read(i) for i in itertools.islice(waiting, _SHARDS_AT_ONCE)]
    while shards:
        for shard in list(shards):
            if item := next(shard, None):
                yield item[0]
                continue
            shards.remove(shard)
            shards += [source.read(i) for i in itertools.islice(waiting, 1)]


def _encoded(
    documents: Iterable[dict], tokenizer: Tokenizer, segmenters: Sequence[str]
) -> Iterator[tuple]:
    """Yields (set, row, bytes of text, whether a document ends) of each part of the documents, in order.

    They are tokenised by one thread per core.
    """

    def of_documents():
        for document in documents:
            some = marked.parts_of(document, segmenters)
            part = next(some)
            for following in some:
                yield document["set"], part, False
                part = following
            yield document["set"], part, True
            del document, part, some  # frees them, which may be large, before the next is read

    def encode(item):
        name, part, last = item
        return name, marked.encode(tokenizer, [part])[0], len(part.text.encode()), last

    workers = hardware.cores()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        yield from ordered_map(pool, encode, of_documents(), 4 * workers)


def of_text(
    source: Source,
    tokenizer: Tokenizer,
    rules: dict[str, segments.Rule],
    *,
    sets: Sequence[str] = (),
    kind: str = "concat",
    limit: int = 0,
) -> Survey:
    """The statistics of a source of text.

    Args:
      source, sets: as `sources.open_source`. tokenizer: of the tokens.
      rules: name -> rule. kind: of packing, one of `config.fields.PACKINGS`.
      limit: number of documents to read; 0: all.

    Raises:
      UserError: as `sources.open_source`; or there is no document.
    """
    policy = sources.Policy("skip", 1.0)  # faults are counted and shown
    documents = _shuffled(sources.open_source(source, sets, policy))
    by_set: dict[str, Statistics] = {}
    taken = itertools.islice(documents, limit or None)
    bar = tqdm(taken, unit=" documents", disable=None)
    names = _segmenters(rules)
    for name, row, text_bytes, last in _encoded(bar, tokenizer, names):
        if name not in by_set:
            by_set[name] = Statistics(rules, kind, names)
        by_set[name].add(row, text_bytes, last)
    faults = policy.tally.counts()
    if not any(s.tokens for s in by_set.values()):
        error = sources.no_documents(source, sets)
        listed = ", ".join(f"{kind}: {count}" for kind, count in sorted(faults.items()))
        raise UserError(f"{error} ({listed})") if faults else error
    more = next(documents, None) is not None
    for statistics in by_set.values():
        statistics.pack()
    note = f"a sample: the first {limit:,} documents of up to {_SHARDS_AT_ONCE} shards in turn"
    return Survey(_sorted(by_set), rules, policy.tally.counts(), note if more else "")


def of_prepared(
    source: Source,
    rules: dict[str, segments.Rule],
    *,
    sets: Sequence[str] = (),
    limit: int = 0,
) -> Survey:
    """The statistics of evenly spaced blocks of each set of prepared data.

    Documents and segments are cut at the blocks' ends.

    Args:
      source, sets: as `prepared.open_prepared`. rules: as `of_text`.
      limit: number of blocks to read of each set; 0: all.

    Raises:
      UserError: as `prepared.open_prepared` and `Dataset.read`.
    """
    dataset = prepared.open_prepared(source, sets)
    names = tuple(dataset.settings.get("segmenters", ()))
    for rule, missing in ((r, set(_segmenters({r: rules[r]})) - set(names)) for r in rules):
        if missing:
            raise UserError(
                f"the segment rule {rule!r} reads the text, and {dataset.path} was prepared without "
                "--segmenters of it"
            )
    length = dataset.length - 1
    description = json.loads((dataset.path / prepared.COMPLETE).read_text())
    by_set, read, blocks = {}, 0, 0
    for name, counts in description["sets"].items():
        if (sets and name not in sets) or (source.sets and name not in source.sets):
            continue
        part = prepared.open_prepared(dataclasses.replace(source, sets=(name,)))
        statistics = by_set[name] = Statistics(rules, segmenters=names)
        for field in ("documents", "text_bytes", "tokens"):
            setattr(statistics, field, counts[field])
        size = min(limit or part.blocks, part.blocks)
        numbers = np.arange(size) * part.blocks // size
        for some in np.array_split(numbers, -(-size * length // _WINDOW)):
            rows = {n: array[:, :length] for n, array in part.read(some).items()}
            statistics.add_pieces(rows)
            statistics.add_blocks(rows)
            statistics.rows = statistics.rows or rows
        part.close()
        read, blocks = read + size, blocks + part.blocks
    note = f"a sample: {read:,} of {blocks:,} blocks, evenly spaced in each set"
    return Survey(
        _sorted(by_set), rules, description["faults"], note if read < blocks else "", length, False
    )


def _segmenters(rules: dict[str, segments.Rule]) -> tuple[str, ...]:
    """The segmenters of all levels of some rules."""
    names = [own.segmenter for rule in rules.values() for _, own in rule.levels if own.segmenter]
    return tuple(dict.fromkeys(names))


def _sorted(by_set: dict[str, Statistics]) -> dict[str, Statistics]:
    return dict(sorted(by_set.items(), key=lambda item: -item[1].tokens))
