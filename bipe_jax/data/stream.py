"""The stream: the documents of a source -> tokens -> blocks, packed and shuffled window by window.

A *window* is a run of documents that fill some number of blocks. The position in the source where it
begins determines it. A stream's state is that position and the number of blocks of the window that were
taken; resuming computes one window again. The first windows are small, so that training starts at once.
"""

import concurrent.futures
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bipe_jax import segments
from bipe_jax.data import marked, packing
from bipe_jax.data.prefetch import Prefetcher, ordered_map
from bipe_jax.data.sources import Opened, no_documents
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError

_SHARDS_AT_ONCE = 8  # shards that documents are taken from in turn
_FIRST_WINDOW = (
    64  # blocks; each window is twice as large as the one before, up to the config's size
)
_TASK = 1 << 16  # characters that are tokenised at a time


def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation by NumPy's legacy generator, which is the same in all versions."""
    return np.random.RandomState([seed, epoch]).permutation(count)


class Documents:
    """All documents of a data shard, endlessly, from several shards in turn; each epoch has its own order.

    The shards of all epochs are numbered in one sequence.

    Attributes:
      state: the position before the next document, of JSON's types: the number of the next shard, the
        open shards with their cursors, and which of them is next.
    """

    def __init__(
        self, source: Opened, seed: int, shard: tuple[int, int] = (0, 1), state: dict | None = None
    ):
        self.source, self.seed = source, seed
        index, count = shard
        self.shards = range(index, len(source.shards), count)
        state = state or {"next": 0, "open": [], "turn": 0}
        self.next, self.turn = state["next"], state["turn"]
        self.open = [
            (number, cursor, self._read(number, cursor)) for number, cursor in state["open"]
        ]
        self._empty = 0  # shards in a row without a document

    def _read(self, number: int, cursor=None) -> Iterator[tuple[dict, Any]]:
        epoch, i = divmod(number, len(self.shards))
        return self.source.read(self.shards[order(self.seed, epoch, len(self.shards))[i]], cursor)

    def _open_next(self) -> tuple:
        self.next += 1
        return self.next - 1, None, self._read(self.next - 1)

    @property
    def state(self) -> dict:
        opened = [[number, cursor] for number, cursor, _ in self.open]
        return {"next": self.next, "open": opened, "turn": self.turn}

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        while len(self.open) < min(_SHARDS_AT_ONCE, len(self.shards)):
            self.open.append(self._open_next())
        while True:
            number, _, documents = self.open[self.turn]
            if item := next(documents, None):
                document, cursor = item
                self.open[self.turn] = (number, cursor, documents)
                self.turn = (self.turn + 1) % len(self.open)
                self._empty = 0
                return document
            self._empty += 1
            if self._empty > len(self.shards) + len(self.open):
                raise no_documents(self.source.source, self.source.sets)
            self.open[self.turn] = self._open_next()


class Stream:
    """An endless iterator of blocks: {"tokens", "document_ids", …}, each (length,) int32.

    Args:
      source: of the documents.
      tokenizer: the run's.
      length: tokens of a block. window: blocks that are shuffled together.
      kind: of packing, one of `config.fields.PACKINGS`.
      seed: of the order. shard: (index, count) of the part of the source's shards to read.
      workers: threads that tokenise, besides the one that reads and packs.
      rule: adds the coordinates of whole documents to the blocks, also where documents are cut.
      segmenters: of the levels, see `segments.segmenters_of`; they add "starts" to the blocks.

    Attributes:
      epochs: passes over the source so far.

    Raises:
      UserError: as `Opened.read`; there are fewer shards than processes; or there is no document.
    """

    def __init__(
        self,
        source: Opened,
        tokenizer: Tokenizer,
        *,
        length: int,
        window: int = 1,
        kind: str = "concat",
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        workers: int = 0,
        rule: segments.Rule | None = None,
        segmenters: Sequence[str] = (),
    ):
        if len(source.shards) < shard[1]:
            raise UserError(
                f"data: {source.source.text!r} has {len(source.shards)} shards for {shard[1]} reading "
                "processes: rewrite it into more (python -m bipe_jax.data.reframe) or prepare it "
                "(python -m bipe_jax.data.prepare)"
            )
        self._source, self._tokenizer, self._rule = source, tokenizer, rule
        self._segmenters = segmenters
        self._length, self._window, self._kind = length, window, kind
        self._seed, self._shard = seed, shard
        self._pool = concurrent.futures.ThreadPoolExecutor(workers) if workers else None
        self._ahead = 2 * workers
        self._windows, self.epochs = None, 0.0
        documents = Documents(source, seed, shard)
        next(documents)  # raises now if there is no document
        self._shard_count = len(documents.shards)
        self.set_state(
            {"begin": {"number": 0, "documents": None, "part": 0, "skip": 0}, "given": 0}
        )

    def set_state(self, state: dict) -> None:
        self._end()
        self._begin, self._blocks, self._taken = state["begin"], None, 0
        self._skip = state["given"]

    def start_over(self) -> None:
        """Continues with the source's first document in the order of the next epoch."""
        begin = self._begin
        read = begin["documents"] or {"next": 0}
        epoch = read["next"] // self._shard_count + 1
        documents = {"next": epoch * self._shard_count, "open": [], "turn": 0}
        self._begin = {"number": begin["number"] + 1, "documents": documents, "part": 0, "skip": 0}
        self._skip = 0

    def get_state(self) -> dict:
        """The state after the last block, of JSON's types."""
        return {"begin": self._begin, "given": self._taken + self._skip}

    def _end(self):
        if self._windows:
            self._windows.close()
        self._windows = None

    def close(self) -> None:
        self._end()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self._blocks is None or self._taken == len(self._blocks["tokens"]):
            if self._windows is None:
                self._windows = Prefetcher(self._make_windows(self._begin).__next__, 1)
            self._begin, self._blocks, self.epochs = next(self._windows)
            self._taken, self._skip = self._skip, 0
            return next(self)
        block = {name: array[self._taken] for name, array in self._blocks.items()}
        self._taken += 1
        return block

    def _texts(self, begin: dict):
        """Yields (part, position) of each part of the documents."""
        documents = Documents(self._source, self._seed, self._shard, begin["documents"])
        first = begin["part"]
        while True:
            state = documents.state
            document = next(documents)
            for i, part in enumerate(marked.parts_of(document, self._segmenters)):
                if i >= first:
                    yield part, {"documents": state, "part": i}
            first = 0
            del document, part  # frees them, which may be large, before the next is read

    def _tasks(self, begin: dict):
        """Yields lists of (part, position) of `_TASK` characters or more."""
        task, size = [], 0
        try:
            for part, position in self._texts(begin):
                task.append((part, position))
                size += len(part.text)
                if size >= _TASK:
                    yield task
                    task, size = [], 0
        except UserError:  # after the texts before it
            yield task
            raise

    def _encode(self, task):
        rows = marked.encode(self._tokenizer, [part for part, _ in task])
        return [(row, at) for row, (_, at) in zip(rows, task, strict=True)]

    def _make_windows(self, begin: dict):
        """Yields (position where a window begins, its shuffled blocks, epochs read)."""
        tasks = ordered_map(self._pool, self._encode, self._tasks(begin), self._ahead)
        encoded = itertools.chain.from_iterable(tasks)
        piece, skip = next(encoded), begin["skip"]
        start = begin.get("start")
        number = begin["number"]
        while True:
            begin = {"number": number, **piece[1], "skip": skip}
            if start:
                begin["start"] = start
            size = min(self._window, _FIRST_WINDOW << min(number, 24)) * self._length
            pieces, total = [], 0
            while True:
                row, position = piece
                row = {name: array[skip:] for name, array in row.items()}
                pieces.append((row, position["part"] == 0 and skip == 0))
                total += len(row["tokens"])
                is_full = total >= size
                of_examples = "learned" in row or "sets" in row  # are not cut between windows
                if is_full and not of_examples:
                    break
                piece, skip = next(encoded), 0
                if is_full and piece[1]["part"] == 0:
                    break
            # The rest of the last concatenated document begins the next window.
            rest = total - size if self._kind == "concat" else 0
            firsts = np.cumsum([is_first for _, is_first in pieces]) + (not pieces[0][1])
            rows = {
                name: np.concatenate([row[name] for row, _ in pieces])[: total - rest]
                for name in pieces[0][0]
            }
            ids = np.repeat(firsts, [len(row["tokens"]) for row, _ in pieces])
            rows["document_ids"] = ids[: total - rest].astype(np.int32)
            if rest:
                skip = len(piece[0]["tokens"]) - rest
            elif not of_examples:
                piece, skip = next(encoded), 0
            if self._rule:
                starts = rows.pop("starts", None)
                coordinates = segments.coordinates(
                    rows["tokens"], self._rule, rows["document_ids"], start, starts, states=True
                )
                start = None
                if skip or piece[1]["part"]:  # the next token continues the document
                    last = {name: int(array[-1]) for name, array in coordinates.items()}
                    after = segments.advance(last, rows["tokens"][-1], self._rule)
                    start = {name: int(value) for name, value in after.items()}
                rows |= {name: x for name, x in coordinates.items() if not segments.is_state(name)}
            packed = getattr(packing, self._kind)(rows, self._length)
            random = np.random.RandomState([self._seed, self._shard[0], number])
            shuffled = random.permutation(len(packed["tokens"]))
            blocks = {name: array[shuffled] for name, array in packed.items()}
            at = piece[1]["documents"]
            epochs = (at["next"] - len(at["open"])) / self._shard_count  # shards read to their ends
            yield begin, blocks, epochs
            number += 1
