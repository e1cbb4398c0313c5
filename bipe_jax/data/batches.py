"""Batches: blocks of one or several sources -> annotated arrays, made ahead of the step.

Whatever the source, a batch's state is a small JSON object: the stream's (see `stream`), or one integer
for prepared data.
"""

import numpy as np

from bipe_jax import segments
from bipe_jax.config import Config
from bipe_jax.config.spec import JSONL, PREPARED, Mixture, Source
from bipe_jax.data import sources
from bipe_jax.data.ahead import Ahead
from bipe_jax.data.prepared import Prepared
from bipe_jax.data.stream import Stream
from bipe_jax.errors import UserError
from bipe_jax.hardware import cores
from bipe_jax.plan import Plan

_AHEAD = 4  # batches
_MOST_WORKERS = 16


def annotate(
    tokens, rule, document_ids=None, *, separate: bool = True, coordinates: dict | None = None
) -> dict:
    """A model's inputs and targets from blocks of one token more than the model sees.

    Args:
      tokens: (..., L + 1) int32.
      rule: the segment rule.
      document_ids: (..., L + 1), 0 for padding, which is no target. None: one document.
      separate: documents are kept apart: coordinates then restart at documents, and the first token
        of a document is not a target.
      coordinates: (..., L + 1) each, if they are known already.

    Returns:
      Arrays (..., L): "tokens", "position", "segment", "offset", "targets", "weights" (float32, 1
      where the target counts), and "document_ids" if documents are kept apart.
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
    if coordinates:
        block |= {name: array[..., :-1] for name, array in coordinates.items()}
    else:
        block |= segments.coordinates(inputs, rule, block.get("document_ids"))
    return block | {"weights": weights}


def check_held_out(mixture: Mixture, evaluated: Source) -> None:
    """Raises UserError if a shard that is evaluated on is trained on too."""

    def files(source: Source) -> set[str]:
        if source.kind != JSONL:
            return {f"{source.kind}:{source.path}"}
        try:
            return set(sources.files.find(source.path))
        except UserError:  # the evaluation's own business, later
            return set()

    held_out = files(evaluated)
    for source in mixture.sources:
        apart = source.sets and evaluated.sets and not set(source.sets) & set(evaluated.sets)
        if (both := held_out & files(source)) and not apart:
            raise UserError(
                f"config.data.evaluation={evaluated.text!r} shares {min(both)} with config.data.train: "
                "evaluate on text that is held out"
            )


def workers_of(config: Config) -> int:
    """Threads that tokenise: as many as cores, none for one core, unless the config says."""
    if config.data.workers >= 0:
        return config.data.workers
    count = cores()
    return min(count, _MOST_WORKERS) if count > 1 else 0


class _Streams:
    """Blocks of several streams by their shares; the next is of the one that is furthest behind."""

    def __init__(self, config: Plan, tokenizer, policy, reader):
        self.names = [source.text for source in config.training.sources]
        self._shares = np.array(config.training.shares)
        self._given = np.zeros(len(self.names), np.int64)
        self._reader = reader
        goes_on = config.data.cut_documents == "continue"
        self._streams = [
            Stream(
                sources.open_source(source, config.data.sets, policy),
                tokenizer,
                length=config.sequence_length + 1,
                window=config.data.shuffle_blocks,
                kind=config.data.packing,
                seed=config.seed,
                reader=reader,
                workers=workers_of(config),
                rule=config.segment_rule if goes_on else None,
            )
            for source in config.training.sources
        ]

    def take(self, count: int) -> dict:
        """The next blocks, as arrays (count, L + 1) by name."""
        blocks = []
        for _ in range(count):
            behind = self._shares * (self._given.sum() + 1) - self._given
            i = int(np.argmax(behind)) if len(behind) > 1 else 0
            blocks.append(next(self._streams[i]))
            self._given[i] += 1
        return {name: np.stack([block[name] for block in blocks]) for name in blocks[0]}

    def given(self) -> dict:
        """Source -> (blocks it has given, how often it was read through)."""
        read = zip(self._given.tolist(), self._streams, strict=True)
        return dict(zip(self.names, ((n, s.epochs) for n, s in read), strict=True))

    def get_state(self) -> dict:
        return {
            "reader": list(self._reader),
            "given": self._given.tolist(),
            "streams": [stream.get_state() for stream in self._streams],
        }

    def set_state(self, state: dict) -> None:
        if state["reader"] != list(self._reader):
            raise UserError(
                f"the stream of this run was read by {state['reader'][1]} processes, and now by "
                f"{self._reader[1]}: start as many, or train on prepared data, which does not care "
                "(python -m bipe_jax.data.prepare)"
            )
        self._given[:] = state["given"]
        for stream, of_stream in zip(self._streams, state["streams"], strict=True):
            stream.set_state(of_stream)

    def close(self) -> None:
        for stream in self._streams:
            stream.close()


class Batches:
    """An endless iterator of annotated batches, arrays (rows, L) of a run.

    A thread makes them ahead. `get_state` is that of the batch that was given last, so that
    `set_state` in a new process goes on with the one behind it.

    Args:
      config: with its segment rule. tokenizer: a `tokenizer.Tokenizer`.
      tally: counts what was wrong with the data.
      reader: (which, of how many) processes that read rows of their own, see `sharding.reader`.

    Raises:
      UserError: a wrong source, at once or while iterating.
    """

    def __init__(self, config: Plan, tokenizer, tally: sources.Tally | None = None, reader=(0, 1)):
        check_held_out(config.training, config.evaluated)
        self._tally = tally or sources.Tally()
        self._rule = config.segment_rule
        self._separate = config.data.separate_documents
        self._needs_ids = self._separate or config.data.packing == "document"
        self._reader, self._rows = reader, config.batch_size // reader[1]
        self._blocks: Prepared | _Streams
        if config.training.sources[0].kind == PREPARED:
            self._blocks = Prepared(config, config.training, tokenizer, reader)
        else:
            policy = sources.policy_of(config, self._tally)
            self._blocks = _Streams(config, tokenizer, policy, reader)
        self._state, self._given = self._blocks.get_state(), {}
        self._ahead = None

    def _make(self) -> tuple:
        blocks = self._blocks.take(self._rows)
        tokens, ids = blocks.pop("tokens"), blocks.pop("document_ids")
        # What is concatenated has no padding; without ids there is nothing to compare.
        if not self._needs_ids and ids.all():
            ids = None
        batch = annotate(tokens, self._rule, ids, separate=self._separate, coordinates=blocks)
        return batch, self._blocks.get_state(), self._blocks.given()

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self._ahead is None:
            self._ahead = Ahead(self._make, _AHEAD)
        batch, self._state, self._given = next(self._ahead)
        return batch

    def get_state(self) -> dict:
        return self._state

    def set_state(self, state: dict) -> None:
        self._end()
        self._blocks.set_state(state)
        self._state = state

    def set_state_of(self, states: list[dict]) -> None:
        """`set_state` with this reader's one among those of all processes."""
        mine = [s for s in states if s == states[0] or s.get("reader") == list(self._reader)]
        self.set_state(mine[-1])

    def report(self) -> dict:
        """What to log: faults so far, and each source's share of the blocks and its epochs."""
        total = sum(blocks for blocks, _ in self._given.values())
        values = {"bad_lines": 0} | self._tally.counts()
        for spec, (blocks, epochs) in self._given.items():
            values |= {f"share/{spec}": blocks / total, f"epochs/{spec}": epochs}
        return values

    def _end(self):
        if self._ahead:
            self._ahead.close()
        self._ahead = None

    def close(self) -> None:
        self._end()
        self._blocks.close()
