"""Statistics of a source under some segment rules.

Each document is tokenised once for all rules. Numbers are exact: every length is counted.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator

import numpy as np
from tqdm import tqdm

from bipe_jax import hardware, segments
from bipe_jax.config.spec import Source
from bipe_jax.data import packing, prepared, sources, stream

BLOCK = 1024  # tokens, for the number of segments in a block
_SHARDS_AT_ONCE = 8
_WINDOW = 1 << 20  # tokens that are packed together


class Histogram:
    """How often each natural number occurs."""

    def __init__(self):
        self._counts = np.zeros(1, np.int64)

    def add(self, values) -> None:
        found = np.bincount(values)
        if len(found) > len(self._counts):
            self._counts = np.pad(self._counts, (0, len(found) - len(self._counts)))
        self._counts[: len(found)] += found

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
        """The smallest number that at least this share of all, and one, do not exceed."""
        least = max(share * self.total, 1)
        return int(np.searchsorted(np.cumsum(self._counts), least))

    def between(self, low: int, high: int) -> int:
        """How many are from `low` to `high`."""
        return int(self._counts[low : high + 1].sum())


class Statistics:
    """What is known of one set.

    Attributes:
      documents, text_bytes, tokens: how many.
      lengths: tokens a document. segments: rule -> tokens a segment. per_block: rule -> segments a
        block.
      rows: arrays "tokens", "document_ids" to take samples from.
    """

    def __init__(self, rules: dict, kind: str = "concat"):
        self.documents = self.text_bytes = self.tokens = 0
        self.lengths = Histogram()
        self.segments = {name: Histogram() for name in rules}
        self.per_block = {name: Histogram() for name in rules}
        self._rules, self._kind = rules, kind
        self._held, self._size = [], 0
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
        self._held.append(tokens)
        self._size += len(tokens)
        if self._size >= _WINDOW:
            self.pack()

    def pack(self) -> None:
        """Counts the segments of the blocks that the documents held make, and lets go of them."""
        if not self._held:
            return
        rows = {
            "tokens": np.concatenate(self._held),
            "document_ids": np.repeat(np.arange(len(self._held)) + 1, list(map(len, self._held))),
        }
        self.rows = self.rows or rows
        blocks = getattr(packing, self._kind)(rows, BLOCK)
        self.add_blocks(blocks["tokens"], blocks["document_ids"])
        rest = self._size % BLOCK if self._kind == "concat" else 0
        self._held, self._size = [rows["tokens"][self._size - rest :]] if rest else [], rest

    def add_blocks(self, tokens: np.ndarray, ids: np.ndarray) -> None:
        """Blocks (n, L); coordinates run through each, as in training by default."""
        for name, rule in self._rules.items() if len(tokens) else ():
            segment = segments.coordinates(tokens, rule)["segment"]
            self.per_block[name].add(np.where(ids > 0, segment, 0).max(axis=1) + 1)

    def add_pieces(self, tokens: np.ndarray, ids: np.ndarray) -> None:
        """The parts of documents, and of segments, in blocks (n, L)."""
        real = ids.ravel() > 0

        def lengths(offset):
            starts = np.flatnonzero(offset.ravel() == 0)
            sizes = np.diff(starts, append=real.size)
            return sizes[real[starts]]

        for name, rule in self._rules.items():
            found = segments.coordinates(tokens, rule, ids)
            self.segments[name].add(lengths(found["offset"]))
        self.lengths.add(lengths(found["position"]))


@dataclasses.dataclass(frozen=True)
class Survey:
    """Attributes:
    sets: name -> Statistics, the most tokens first. rules: name -> `segments.Rule`.
    faults: kind -> how many. note: what was not read, "" if all was.
    block: tokens of the blocks that `per_block` counts in. whole: documents were not cut into blocks.
    """

    sets: dict[str, Statistics]
    rules: dict
    faults: dict[str, int]
    note: str
    block: int = BLOCK
    whole: bool = True


def _drawn(source) -> Iterator[dict]:
    """All documents once, from some shards in turn, so that the first ones are a fair sample."""
    waiting = iter(stream.order(0, 0, len(source.shards)).tolist())
    readers = [source.read(i) for i in itertools.islice(waiting, _SHARDS_AT_ONCE)]
    while readers:
        for reader in list(readers):
            if found := next(reader, None):
                yield found[0]
                continue
            readers.remove(reader)
            readers += [source.read(i) for i in itertools.islice(waiting, 1)]


def _encoded(documents: Iterable[dict], tokenizer) -> Iterator[tuple[dict, np.ndarray]]:
    """Yields (document, tokens) in order, tokenised by as many threads as there are cores."""

    def encode(document):
        texts = list(stream.parts(document["text"]))
        firsts = [i == 0 for i in range(len(texts))]
        return document, np.concatenate(tokenizer.encode_parts(texts, firsts))

    workers = hardware.cores()
    running: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for document in documents:
            running.append(pool.submit(encode, document))
            if len(running) > 4 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def of_text(source: Source, tokenizer, rules: dict, *, sets=(), kind="concat", limit=0) -> Survey:
    """Reads a source of text.

    Args:
      source, sets: as `sources.open_source`. tokenizer: a `tokenizer.Tokenizer`.
      rules: name -> `segments.Rule`. kind: one of `config.fields.PACKINGS`.
      limit: documents that are read; 0: all.

    Raises:
      UserError: as `sources.open_source`; or there is no document.
    """
    policy = sources.Policy("skip", 1.0)  # what is bad is counted, and shown
    documents = _drawn(sources.open_source(source, sets, policy))
    found: dict[str, Statistics] = {}
    taken = itertools.islice(documents, limit or None)
    for document, tokens in _encoded(tqdm(taken, unit=" documents", disable=None), tokenizer):
        if document["set"] not in found:
            found[document["set"]] = Statistics(rules, kind)
        found[document["set"]].add(tokens, len(document["text"].encode()))
    faults = policy.tally.counts()
    if not any(s.tokens for s in found.values()):
        error = sources.nothing(source, sets)
        listed = ", ".join(f"{kind}: {count}" for kind, count in sorted(faults.items()))
        raise type(error)(f"{error} ({listed})" if faults else str(error))
    more = next(documents, None) is not None
    for statistics in found.values():
        statistics.pack()
    note = f"a sample: the first {limit:,} documents of up to {_SHARDS_AT_ONCE} shards in turn"
    return Survey(_sorted(found), rules, policy.tally.counts(), note if more else "")


def of_prepared(source: Source, rules: dict, *, sets=(), limit=0) -> Survey:
    """Reads prepared data, evenly spaced blocks of each set; what is counted is cut at their ends.

    Args:
      source, sets: as `prepared.open_prepared`. rules: as `of_text`.
      limit: blocks that are read of each set; 0: all.

    Raises:
      UserError: as `prepared.open_prepared` and `Dataset.read`.
    """
    dataset = prepared.open_prepared(source, sets)
    length = dataset.length - 1  # what a model sees
    description = json.loads((dataset.path / prepared.COMPLETE).read_text())
    found, read, blocks = {}, 0, 0
    for name, counts in description["sets"].items():
        if (sets and name not in sets) or (source.sets and name not in source.sets):
            continue
        part = prepared.open_prepared(dataclasses.replace(source, sets=(name,)))
        statistics = found[name] = Statistics(rules)
        for field in ("documents", "text_bytes", "tokens"):
            setattr(statistics, field, counts[field])
        size = min(limit or part.blocks, part.blocks)
        numbers = np.arange(size) * part.blocks // size
        for some in np.array_split(numbers, -(-size * length // _WINDOW)):
            rows = {n: array[:, :length] for n, array in part.read(some).items()}
            statistics.add_pieces(**_arguments(rows))
            statistics.add_blocks(**_arguments(rows))
            statistics.rows = statistics.rows or rows
        part.close()
        read, blocks = read + size, blocks + part.blocks
    note = f"a sample: {read:,} of {blocks:,} blocks, evenly spaced in each set"
    return Survey(
        _sorted(found), rules, description["faults"], note if read < blocks else "", length, False
    )


def _arguments(rows: dict) -> dict:
    return {"tokens": rows["tokens"], "ids": rows["document_ids"]}


def _sorted(found: dict) -> dict:
    return dict(sorted(found.items(), key=lambda item: -item[1].tokens))
