"""Batches: blocks of one or several sources -> annotated arrays, prefetched by a thread.

The state is a small JSON object: that of the streams (see `stream`), or one integer for prepared data.
"""

from collections.abc import Sequence

import numpy as np

from bipe_jax import segments
from bipe_jax.config import Config
from bipe_jax.config.spec import FILES, PREPARED
from bipe_jax.data import sources
from bipe_jax.data.prefetch import Prefetcher
from bipe_jax.data.prepared import Prepared
from bipe_jax.data.stream import Stream
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.hardware import cores
from bipe_jax.plan import Plan

_PREFETCHED = 4  # batches
_MOST_WORKERS = 16


def annotate(
    tokens: np.ndarray,
    rule: segments.Rule,
    document_ids: np.ndarray | None = None,
    *,
    separate: bool = True,
    coordinates: dict | None = None,
    starts: np.ndarray | None = None,
    learned: np.ndarray | None = None,
    sets: np.ndarray | None = None,
    among: np.ndarray | None = None,
) -> dict:
    """A model's inputs and targets from blocks that are one token longer than its length L.

    Args:
      tokens: (..., L + 1) int32.
      rule: the segment rule.
      document_ids: (..., L + 1), 0 for padding, which is no target. None: one document.
      separate: separates documents: coordinates restart at each document, and its first token is not
        a target.
      coordinates: (..., L + 1) each; None computes them.
      starts: (..., L + 1) of segments, see `segments.coordinates`.
      learned: (..., L + 1), 0 for tokens that are no targets. None: all are.
      sets, among: (..., L + 1), see `examples.sets_of`. Then the targets are the sets of the tokens
        themselves, not the tokens that follow.

    Returns:
      Arrays (..., L): "tokens", the coordinates, "targets", "weights" (float32, 1 where the target
      counts), "among" if there are sets, and "document_ids" if documents are separated.
    """
    inputs = tokens[..., :-1]
    block = {"tokens": inputs, "targets": tokens[..., 1:]}
    if document_ids is None:
        separate, weights = False, np.ones(inputs.shape, np.float32)
    else:
        counts = document_ids[..., 1:] != 0
        if separate:
            counts &= document_ids[..., 1:] == document_ids[..., :-1]
            block["document_ids"] = document_ids[..., :-1]
        weights = counts.astype(np.float32)
    if sets is not None and among is not None:
        block |= {"targets": sets[..., :-1], "among": among[..., :-1]}
        weights = (among[..., :-1] != 0).astype(np.float32)
    elif learned is not None:
        weights *= learned[..., 1:] != 0
    if coordinates:
        block |= {name: array[..., :-1] for name, array in coordinates.items()}
    else:
        marks = None if starts is None else starts[..., :-1]
        block |= segments.coordinates(inputs, rule, block.get("document_ids"), starts=marks)
    return block | {"weights": weights}


def workers_of(config: Config) -> int:
    """Number of threads that tokenise: the config's, else one per core, 0 for a single core."""
    if config.data.workers >= 0:
        return config.data.workers
    count = cores()
    return min(count, _MOST_WORKERS) if count > 1 else 0


class _Streams:
    """Blocks of several streams by their shares; the next is from the one with the largest deficit."""

    def __init__(
        self, config: Plan, tokenizer: Tokenizer, policy: sources.Policy, shard: tuple[int, int]
    ):
        self.names = [source.text for source in config.training.sources]
        self._shares = np.array(config.training.shares)
        self._counts = np.zeros(len(self.names), np.int64)  # blocks that were taken of each
        self._shard = shard
        continued = config.data.cut_documents == "continue"
        paths: list[list[str] | None] = [None] * len(self.names)
        for i, shards in enumerate(config.shards):
            if config.training.sources[i].kind in FILES:
                paths[i] = [shard.path for shard in shards]
        self._streams = [
            Stream(
                sources.open_source(source, config.data.sets, policy, of_source),
                tokenizer,
                length=config.sequence_length + 1,
                window=config.data.shuffle_blocks,
                kind=config.data.packing,
                seed=config.seed,
                shard=shard,
                workers=workers_of(config),
                rule=config.segment_rule if continued else None,
                segmenters=segments.segmenters_of(config),
            )
            for source, of_source in zip(config.training.sources, paths, strict=True)
        ]

    def take(self, count: int) -> dict:
        """The next blocks, as arrays (count, L + 1) by name."""
        blocks = []
        for _ in range(count):
            deficits = self._shares * (self._counts.sum() + 1) - self._counts
            i = int(np.argmax(deficits)) if len(deficits) > 1 else 0
            blocks.append(next(self._streams[i]))
            self._counts[i] += 1
        if any("learned" in block for block in blocks):  # all of a text is learned
            blocks = [{"learned": np.ones_like(block["tokens"])} | block for block in blocks]
        return {name: np.stack([block[name] for block in blocks]) for name in blocks[0]}

    def consumed(self) -> dict[str, tuple[int, float]]:
        """Source -> (blocks taken, epochs)."""
        counts = zip(self.names, self._counts.tolist(), self._streams, strict=True)
        return {name: (count, stream.epochs) for name, count, stream in counts}

    def get_state(self) -> dict:
        return {
            "reader": list(self._shard),
            "given": self._counts.tolist(),
            "streams": [stream.get_state() for stream in self._streams],
        }

    def set_state(self, state: dict, changed: Sequence[bool] = ()) -> None:
        if state["reader"] != list(self._shard):
            raise UserError(
                f"the stream of this run was read by {state['reader'][1]} processes, and now by "
                f"{self._shard[1]}: start as many, or train on prepared data, which any number can read "
                "(python -m bipe_jax.data.prepare)"
            )
        self._counts[:] = state["given"]
        changed = changed or [False] * len(self._streams)
        for stream, of_stream, anew in zip(self._streams, state["streams"], changed, strict=True):
            stream.set_state(of_stream)
            if anew:
                stream.start_over()

    def close(self) -> None:
        for stream in self._streams:
            stream.close()


class Batches:
    """An endless iterator of annotated batches, arrays (rows, L), prefetched by a thread.

    `get_state` is the state after the batch that was returned last: after `set_state`, in any process,
    the iterator continues with the batch that follows it.

    Args:
      config: with its segment rule.
      tokenizer: the run's.
      tally: counts the faults of the data.
      shard: (index, count) of this process's rows of each batch, see `sharding.data_shard`.

    Raises:
      UserError: a source cannot be read, at once or while iterating.
    """

    def __init__(
        self,
        config: Plan,
        tokenizer: Tokenizer,
        tally: sources.Tally | None = None,
        shard: tuple[int, int] = (0, 1),
    ):
        self._tally = tally or sources.Tally()
        self._rule = config.segment_rule
        self._separate = config.data.separate_documents
        self._needs_ids = self._separate or config.data.packing != "concat"
        self._shard, self._rows = shard, config.batch_size // shard[1]
        self._blocks: Prepared | _Streams
        if config.training.sources[0].kind == PREPARED:
            self._blocks = Prepared(config, config.training, tokenizer, shard)
        else:
            policy = sources.policy_of(config, self._tally)
            self._blocks = _Streams(config, tokenizer, policy, shard)
        self._state, self._consumed = self._blocks.get_state(), {}
        self._prefetcher = None

    def _make(self) -> tuple:
        blocks = self._blocks.take(self._rows)
        tokens, ids = blocks.pop("tokens"), blocks.pop("document_ids")
        rest = {name: blocks.pop(name, None) for name in ("starts", "learned", "sets", "among")}
        # Concatenated blocks have no padding and, unless documents are separated, need no ids.
        if not self._needs_ids and ids.all():
            ids = None
        batch = annotate(
            tokens, self._rule, ids, separate=self._separate, coordinates=blocks, **rest
        )
        return batch, self._blocks.get_state(), self._blocks.consumed()

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._make, _PREFETCHED)
        batch, self._state, self._consumed = next(self._prefetcher)
        return batch

    def get_state(self) -> dict:
        return self._state

    def set_state(self, state: dict, changed: Sequence[bool] = ()) -> None:
        """Continues after the batch that `state` is the state after.

        Args:
          changed: whether each source has changed since then: it starts over in a new epoch.
        """
        self._end()
        self._blocks.set_state(state, changed)
        self._state = self._blocks.get_state()

    def set_state_of(self, states: list[dict], changed: Sequence[bool] = ()) -> None:
        """`set_state` with this shard's among the states of all processes."""
        mine = [s for s in states if s == states[0] or s.get("reader") == list(self._shard)]
        self.set_state(mine[-1], changed)

    def report(self) -> dict:
        """Values to log: faults so far, and each source's share of the blocks and its epochs."""
        total = sum(blocks for blocks, _ in self._consumed.values())
        values = {"bad_lines": 0} | self._tally.counts()
        for spec, (blocks, epochs) in self._consumed.items():
            values |= {f"share/{spec}": blocks / total, f"epochs/{spec}": epochs}
        return values

    def _end(self):
        if self._prefetcher:
            self._prefetcher.close()
        self._prefetcher = None

    def close(self) -> None:
        self._end()
        self._blocks.close()
