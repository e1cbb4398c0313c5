"""Statistics of a source under several segment rules.

Each document is tokenised once for all rules. Numbers are exact: every length is counted.
"""

import concurrent.futures
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from bipe_jax import hardware, segments
from bipe_jax.config.spec import Source
from bipe_jax.data import packing, prepared, sources, stream
from bipe_jax.data.prefetch import ordered_map
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError

BLOCK = 1024  # tokens, for the number of segments in a block
_SHARDS_AT_ONCE = 8
_WINDOW = 1 << 20  # tokens that are packed together


class Histogram:
    """The number of occurrences of each natural number."""

    def __init__(self):
        self._counts = np.zeros(1, np.int64)

    def add(self, values: np.ndarray | list[int]) -> None:
        counts = np.bincount(values)
        if len(counts) > len(self._counts):
            self._counts = np.pad(self._counts, (0, len(counts) - len(self._counts)))
        self._counts[: len(counts)] += counts

    @property
    def total(self) -> int:
        return int(self._counts.sum())

    @property
    def mean(self) -> float:
        return float(self._counts @ np.arange(len(self._counts)) / max(self.total, 1))

    @property
    def max(self) -> int:
        return int(np.flatnonzero(self._counts).max(initial=0))

    def quantile(self, share: float) -> int:
        """The smallest number that at least this share of all, and at least one, do not exceed."""
        least = max(share * self.total, 1)
        return int(np.searchsorted(np.cumsum(self._counts), least))

    def between(self, low: int, high: int) -> int:
        """Number of occurrences from `low` to `high`, inclusive."""
        return int(self._counts[low : high + 1].sum())


class Statistics:
    """The statistics of one set.

    Attributes:
      documents, text_bytes, tokens: their numbers.
      lengths: tokens per document. segments: rule -> tokens per segment.
      per_block: rule -> segments per block.
      rows: arrays "tokens", "document_ids" that samples are taken from.
    """

    def __init__(self, rules: dict, kind: str = "concat"):
        self.documents = self.text_bytes = self.tokens = 0
        self.lengths = Histogram()
        self.segments = {name: Histogram() for name in rules}
        self.per_block = {name: Histogram() for name in rules}
        self._rules, self._kind = rules, kind
        self._buffer, self._size = [], 0  # documents that are not packed yet, and their tokens
        self.rows: dict = {}

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """A whole document (L,)."""
        self.documents += 1
        self.text_bytes += text_bytes
        self.tokens += len(tokens)
        self.lengths.add([len(tokens)])
        for name, rule in self._rules.items():
            ends = rule.ends(tokens, np.arange(len(tokens)))
            ends[-1:] = True
            self.segments[name].add(np.diff(np.flatnonzero(ends), prepend=-1))
        self._buffer.append(tokens)
        self._size += len(tokens)
        if self._size >= _WINDOW:
            self.pack()

    def pack(self) -> None:
        """Packs the buffered documents, and counts the segments of the blocks."""
        if not self._buffer:
            return
        sizes = list(map(len, self._buffer))
        rows = {
            "tokens": np.concatenate(self._buffer),
            "document_ids": np.repeat(np.arange(len(sizes)) + 1, sizes),
        }
        self.rows = self.rows or rows
        blocks = getattr(packing, self._kind)(rows, BLOCK)
        self.add_blocks(blocks["tokens"], blocks["document_ids"])
        rest = self._size % BLOCK if self._kind == "concat" else 0
        self._buffer, self._size = [rows["tokens"][self._size - rest :]] if rest else [], rest

    def add_blocks(self, tokens: np.ndarray, ids: np.ndarray) -> None:
        """Counts the segments of blocks (n, L); coordinates run through each, as training's default."""
        for name, rule in self._rules.items() if len(tokens) else ():
            segment = segments.coordinates(tokens, rule)["segment"]
            self.per_block[name].add(np.where(ids > 0, segment, 0).max(axis=1) + 1)

    def add_pieces(self, tokens: np.ndarray, ids: np.ndarray) -> None:
        """Counts the lengths of the parts of documents, and of segments, in blocks (n, L)."""
        real = ids.ravel() > 0

        def lengths(offset):
            starts = np.flatnonzero(offset.ravel() == 0)
            sizes = np.diff(starts, append=real.size)
            return sizes[real[starts]]

        position = None
        for name, rule in self._rules.items():
            coordinates = segments.coordinates(tokens, rule, ids)
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


def _encoded(documents: Iterable[dict], tokenizer: Tokenizer) -> Iterator[tuple[dict, np.ndarray]]:
    """Yields (document, tokens) in order, tokenised by one thread per core."""

    def encode(document):
        texts = list(stream.parts(document["text"]))
        firsts = [i == 0 for i in range(len(texts))]
        return document, np.concatenate(tokenizer.encode_parts(texts, firsts))

    workers = hardware.cores()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        yield from ordered_map(pool, encode, documents, 4 * workers)


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
    for document, tokens in _encoded(tqdm(taken, unit=" documents", disable=None), tokenizer):
        if document["set"] not in by_set:
            by_set[document["set"]] = Statistics(rules, kind)
        by_set[document["set"]].add(tokens, len(document["text"].encode()))
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
    length = dataset.length - 1
    description = json.loads((dataset.path / prepared.COMPLETE).read_text())
    by_set, read, blocks = {}, 0, 0
    for name, counts in description["sets"].items():
        if (sets and name not in sets) or (source.sets and name not in source.sets):
            continue
        part = prepared.open_prepared(dataclasses.replace(source, sets=(name,)))
        statistics = by_set[name] = Statistics(rules)
        for field in ("documents", "text_bytes", "tokens"):
            setattr(statistics, field, counts[field])
        size = min(limit or part.blocks, part.blocks)
        numbers = np.arange(size) * part.blocks // size
        for some in np.array_split(numbers, -(-size * length // _WINDOW)):
            rows = {n: array[:, :length] for n, array in part.read(some).items()}
            statistics.add_pieces(rows["tokens"], rows["document_ids"])
            statistics.add_blocks(rows["tokens"], rows["document_ids"])
            statistics.rows = statistics.rows or rows
        part.close()
        read, blocks = read + size, blocks + part.blocks
    note = f"a sample: {read:,} of {blocks:,} blocks, evenly spaced in each set"
    return Survey(
        _sorted(by_set), rules, description["faults"], note if read < blocks else "", length, False
    )


def _sorted(by_set: dict[str, Statistics]) -> dict[str, Statistics]:
    return dict(sorted(by_set.items(), key=lambda item: -item[1].tokens))
