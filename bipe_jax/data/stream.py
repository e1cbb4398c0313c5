"""The training stream: documents -> tokens -> blocks -> shuffled -> annotated -> batches.

A Grain pipeline. The iterator's state is a small JSON object; `restore` continues from it with exactly
the same batches.
"""

import grain
import numpy as np

from bipe_jax import segments
from bipe_jax.data import sources

_SHARDS_AT_ONCE = 8  # shards that documents are drawn from in turn
_BATCHES_AHEAD = 4


class _ShardIterator(grain.DatasetIterator):
    """Documents of one shard; its state is the number of documents read."""

    def __init__(self, read):
        super().__init__()
        self._read = read
        self._documents = read()
        self._count = 0

    def __next__(self):
        document = next(self._documents)
        self._count += 1
        return document

    def get_state(self):
        return {"documents": self._count}

    def set_state(self, state):
        self._documents = self._read()
        self._count = 0
        while self._count < state["documents"]:
            next(self)


class _Shard(grain.IterDataset):
    def __init__(self, read):
        super().__init__()
        self._read = read

    def __iter__(self):
        return _ShardIterator(self._read)


def _documents(config, tally) -> grain.IterDataset:
    """All documents, over and over; the order changes with the seed and the epoch."""
    spec, sets = config.data.train, tuple(config.data.sets)
    if sources.is_quickstart(spec):
        held = grain.MapDataset.source(list(sources.documents(spec, sets)))
        return held.shuffle(seed=config.seed).repeat().to_iter_dataset()

    def open_shard(path):
        return _Shard(lambda: sources.read_shard(path, sets, config.data.max_bad_share, tally))

    # Fail now, not in a worker thread, if there is nothing to read (and then for ever).
    next(iter(sources.documents(spec, sets, config.data.max_bad_share)))
    paths = sources.shards(spec)
    opened = grain.MapDataset.source(paths).shuffle(seed=config.seed).repeat().map(open_shard)
    return grain.experimental.InterleaveIterDataset(
        opened, cycle_length=min(len(paths), _SHARDS_AT_ONCE), iter_buffer_size=1
    )


def annotate(tokens, rule, document_ids=None) -> dict:
    """A model's inputs and targets from blocks of one token more than the model sees.

    Args:
      tokens: (..., L + 1) int32.
      rule: the segment rule.
      document_ids: (..., L + 1), if documents are to be kept apart: coordinates then restart at
        documents, and the first token of a document is not a target.

    Returns:
      Arrays (..., L): "tokens", "position", "segment", "offset", "targets", "weights" (float32, 1
      where the target counts), and "document_ids" if they were given.
    """
    inputs = tokens[..., :-1]
    block = {"tokens": inputs, "targets": tokens[..., 1:]}
    if document_ids is None:
        weights = np.ones(inputs.shape, np.float32)
    else:
        weights = (document_ids[..., 1:] == document_ids[..., :-1]).astype(np.float32)
        document_ids = block["document_ids"] = document_ids[..., :-1]
    return block | segments.coordinates(inputs, rule, document_ids) | {"weights": weights}


def stream(config, tokenizer, tally=None) -> grain.IterDataset:
    """The endless stream of annotated batches of a resolved config: arrays (B, L).

    Documents are tokenised (with BOS), concatenated and cut into blocks of L + 1 tokens, as in the
    paper. `tally` (a sources.Tally) counts the lines that could not be used.

    Raises:
      UserError: as `sources.documents`, at once or while iterating.
    """
    rule = segments.rule_of(config)
    separate = config.data.separate_documents

    def finish(batch):
        return annotate(batch["tokens"], rule, batch["document_ids"] if separate else None)

    return (
        blocks(config, tokenizer, tally)
        .batch(config.batch_size, drop_remainder=True)
        .map(finish)
        .pipe(grain.experimental.ThreadPrefetchIterDataset, prefetch_buffer_size=_BATCHES_AHEAD)
    )


def restore(iterator: grain.DatasetIterator, state: dict) -> None:
    """Sets a stream's iterator to a state that `get_state` gave, also after a passage through JSON.

    Grain tells an empty slice by the tuple (-1, -1), which JSON turns into a list.
    """

    def with_tuples(value):
        if not isinstance(value, dict):
            return value
        return {
            key: {name: tuple(cut) for name, cut in inner.items()}
            if key == "remainder_slices"
            else with_tuples(inner)
            for key, inner in value.items()
        }

    iterator.set_state(with_tuples(state))


def blocks(config, tokenizer, tally=None) -> grain.IterDataset:
    """Shuffled blocks: {"tokens", "document_ids"}, each (L + 1,) int32."""
    length = config.sequence_length + 1
    packed = grain.experimental.ConcatThenSplitIterDataset(
        _documents(config, tally).map(
            lambda document: {"tokens": tokenizer.encode(document["text"])}
        ),
        length_struct={"tokens": length},
    )
    shuffled = grain.experimental.WindowShuffleIterDataset(
        packed, window_size=config.data.shuffle_blocks, seed=config.seed
    )
    return shuffled.map(
        lambda block: {"tokens": block["tokens"], "document_ids": block["tokens_segment_ids"]}
    )
