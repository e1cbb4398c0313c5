"""The stream: a source's documents -> tokens -> blocks, packed and shuffled window by window.

A *window* is as many documents as fill some blocks; it follows from where in the source it begins, so
that a stream's state is that place and the number of blocks that the window has given. Going on means
to make one window again. The first windows are small, so that training starts at once.
"""

import collections
import concurrent.futures
from collections.abc import Iterator

import numpy as np

from bipe_jax import segments
from bipe_jax.data import packing
from bipe_jax.data.ahead import Ahead
from bipe_jax.data.sources import Source, nothing
from bipe_jax.errors import UserError

_SHARDS_AT_ONCE = 8  # that documents are drawn from in turn
_FIRST_WINDOW = 64  # blocks; each window is twice as large, up to the config's size
_PART = 1 << 18  # characters: longer documents are tokenised in parts, and never held as tokens
_TASK = 1 << 16  # characters that a worker tokenises at a time


def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation by NumPy's legacy generator, which is the same in all versions."""
    return np.random.RandomState([seed, epoch]).permutation(count)


def parts(text: str) -> Iterator[str]:
    """Cuts a long text, behind newlines where there are some."""
    start = 0
    while len(text) - start > _PART:
        cut = text.find("\n", start + _PART - 1, start + 2 * _PART) + 1 or start + _PART
        yield text[start:cut]
        start = cut
    yield text[start:]


class Documents:
    """All documents, over and over, drawn in turn from some shards; the order changes each epoch.

    The shards of all epochs are numbered in one sequence. Before each document, `state` is where it
    is: the next shard's number, those that are open with their places, and whose turn it is.
    """

    def __init__(self, source: Source, seed: int, reader=(0, 1), state: dict | None = None):
        self.source, self.seed = source, seed
        index, count = reader
        self.mine = range(index, len(source.shards), count)
        state = state or {"next": 0, "open": [], "turn": 0}
        self.next, self.turn = state["next"], state["turn"]
        self.open = [
            (number, place, self._reader(number, place)) for number, place in state["open"]
        ]
        self._barren = 0

    def _reader(self, number: int, place=None):
        epoch, i = divmod(number, len(self.mine))
        shard = self.mine[order(self.seed, epoch, len(self.mine))[i]]
        return self.source.read(shard, place)

    def _refill(self):
        while len(self.open) < min(_SHARDS_AT_ONCE, len(self.mine)):
            self.open.append((self.next, None, self._reader(self.next)))
            self.next += 1

    @property
    def state(self) -> dict:
        opened = [[number, place] for number, place, _ in self.open]
        return {"next": self.next, "open": opened, "turn": self.turn}

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        self._refill()
        while True:
            number, _, reader = self.open[self.turn]
            found = next(reader, None)
            if found:
                document, place = found
                self.open[self.turn] = (number, place, reader)
                self.turn = (self.turn + 1) % len(self.open)
                self._barren = 0
                return document
            self._barren += 1
            if self._barren > len(self.mine) + len(self.open):
                raise nothing(self.source.source, self.source.sets)
            self.open[self.turn] = (self.next, None, self._reader(self.next))
            self.next += 1


class Stream:
    """An endless iterator of blocks: {"tokens", "document_ids", …}, each (length,) int32.

    Args:
      source: of the documents. tokenizer: a `tokenizer.Tokenizer`.
      length: tokens of a block. window: blocks that are shuffled among each other.
      kind: how documents are packed, one of `config.fields.PACKINGS`.
      seed: of the order. reader: (which, of how many) readers, each of which takes shards of its own.
      workers: threads that tokenise, beside the one that reads and packs.
      rule: if given, blocks have the coordinates of whole documents, also where they are cut.

    Attributes:
      epochs: how often the source was read through.

    Raises:
      UserError: as `Source.read`; there are fewer shards than readers; or there is no document.
    """

    def __init__(self, source, tokenizer, *, length, window=1, kind="concat", seed=0, reader=(0, 1),
                 workers=0, rule=None):  # fmt: skip
        if len(source.shards) < reader[1]:
            raise UserError(
                f"data: {source.source.text!r} has {len(source.shards)} shards for {reader[1]} reading "
                "processes: rewrite it into more (python -m bipe_jax.data.reframe) or prepare it "
                "(python -m bipe_jax.data.prepare)"
            )
        self._source, self._tokenizer, self._rule = source, tokenizer, rule
        self._length, self._window, self._kind = length, window, kind
        self._seed, self._reader = seed, reader
        self._pool = concurrent.futures.ThreadPoolExecutor(workers) if workers else None
        self._ahead = 2 * workers
        self._windows, self.epochs = None, 0.0
        documents = Documents(source, seed, reader)
        next(documents)  # fail now if there is nothing to read
        self._shards = len(documents.mine)
        self.set_state(
            {"begin": {"number": 0, "documents": None, "part": 0, "skip": 0}, "given": 0}
        )

    def set_state(self, state: dict) -> None:
        self._end()
        self._begin, self._blocks, self._given = state["begin"], None, 0
        self._pass_over = state["given"]

    def get_state(self) -> dict:
        """JSON's types; the blocks that follow are those after the last one that was given."""
        return {"begin": self._begin, "given": self._given + self._pass_over}

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
        if self._blocks is None or self._given == len(self._blocks["tokens"]):
            if self._windows is None:
                self._windows = Ahead(self._make_windows(self._begin).__next__, 1)
            self._begin, self._blocks, self.epochs = next(self._windows)
            self._given, self._pass_over = self._pass_over, 0
            return next(self)
        block = {name: array[self._given] for name, array in self._blocks.items()}
        self._given += 1
        return block

    def _texts(self, begin: dict):
        """Yields (text, where it is) of the parts of documents."""
        documents = Documents(self._source, self._seed, self._reader, begin["documents"])
        passed = begin["part"]
        while True:
            state = documents.state
            document = next(documents)
            for i, text in enumerate(parts(document["text"])):
                if i >= passed:
                    yield text, {"documents": state, "part": i}
            passed = 0
            del document, text  # they may be large, and so may be the next

    def _tasks(self, begin: dict):
        """Yields lists of them, of some size together."""
        task, size = [], 0
        try:
            for text, where in self._texts(begin):
                task.append((text, where))
                size += len(text)
                if size >= _TASK:
                    yield task
                    task, size = [], 0
        except UserError:  # what was read before it comes first
            yield task
            raise

    def _encode(self, task):
        texts = [text for text, _ in task]
        tokens = self._tokenizer.encode_parts(texts, [where["part"] == 0 for _, where in task])
        return [(t, where) for t, (_, where) in zip(tokens, task, strict=True)]

    def _encoded(self, begin: dict):
        """Yields (tokens, where) in order, tokenised by the pool if there is one."""
        if not self._pool:
            for task in self._tasks(begin):
                yield from self._encode(task)
            return
        running: collections.deque = collections.deque()
        try:
            for task in self._tasks(begin):
                running.append(self._pool.submit(self._encode, task))
                if len(running) > self._ahead:
                    yield from running.popleft().result()
        except UserError:
            while running:
                yield from running.popleft().result()
            raise

    def _make_windows(self, begin: dict):
        """Yields (where a window begins, its shuffled blocks, epochs read)."""
        encoded = self._encoded(begin)
        piece, skip = next(encoded), begin["skip"]
        start = begin.get("start")
        number = begin["number"]
        while True:
            begin = {"number": number, **piece[1], "skip": skip}
            if start:
                begin["start"] = start
            need = min(self._window, _FIRST_WINDOW << min(number, 24)) * self._length
            pieces, total = [], 0
            while True:
                tokens, where = piece
                pieces.append((tokens[skip:], where["part"] == 0 and skip == 0))
                total += len(tokens) - skip
                if total >= need:
                    break
                piece, skip = next(encoded), 0
            # Of concatenated documents the last one's rest begins the next window.
            rest = total - need if self._kind == "concat" else 0
            firsts = np.cumsum([is_first for _, is_first in pieces]) + (not pieces[0][1])
            rows = {
                "tokens": np.concatenate([tokens for tokens, _ in pieces])[: total - rest],
                "document_ids": np.repeat(firsts, [len(tokens) for tokens, _ in pieces]),
            }
            rows["document_ids"] = rows["document_ids"][: total - rest].astype(np.int32)
            if self._rule:
                coordinates = segments.coordinates(
                    rows["tokens"], self._rule, rows["document_ids"], start
                )
                rows |= coordinates
            if rest:
                skip = len(piece[0]) - rest
            else:
                piece, skip = next(encoded), 0
            if self._rule:
                # Of the token that follows, where it goes on with a document.
                last = {name: int(array[-1]) for name, array in coordinates.items()}
                after = segments.advance(last, rows["tokens"][-1], self._rule)
                goes_on = skip or piece[1]["part"]
                start = {name: int(value) for name, value in after.items()} if goes_on else None
            packed = getattr(packing, self._kind)(rows, self._length)
            random = np.random.RandomState([self._seed, self._reader[0], number])
            shuffled = random.permutation(len(packed["tokens"]))
            blocks = {name: array[shuffled] for name, array in packed.items()}
            # Shards that were read to their ends, over those that there are.
            at = piece[1]["documents"]
            epochs = (at["next"] - len(at["open"])) / self._shards
            yield begin, blocks, epochs
            number += 1
