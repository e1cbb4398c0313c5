"""Sources that are no files of lines: the quickstart's corpus, TFDS datasets and synthetic tasks.

Each function returns the names of the shards, and what reads one: see `sources.Opened`.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

from bipe_jax import synthetic
from bipe_jax.config import spec
from bipe_jax.config.spec import Source
from bipe_jax.data import lines, quickstart
from bipe_jax.errors import UserError

_TFDS_SHARDS = 64
_RANGES = 64  # shards of a synthetic task with a number of examples
_EXAMPLES, _ENDLESS = 1024, 1 << 16  # of a shard of another one, and the number of its shards

ReadShard = Callable[..., Iterator[tuple[dict, Any]]]


def of_task(source: Source) -> tuple[list[str], ReadShard]:
    """A synthetic task; ranges of its examples are the shards."""
    task = synthetic.parse(source.path)
    size = max(-(-task.count // _RANGES), 1) if task.count else _EXAMPLES
    last = task.count or _EXAMPLES * _ENDLESS
    starts = range(0, last, size)

    def read(shard, cursor):
        for i in range(cursor or starts[shard], min(starts[shard] + size, last)):
            yield {"set": lines.NO_SET} | task.example(i), i + 1

    return [f"{source.text}[{start}:{min(start + size, last)}]" for start in starts], read


def of_quickstart(split: str) -> tuple[list[str], ReadShard]:
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


def _plain(value: Any) -> Any:
    """Nested lists and arrays of NumPy as lists of Python's numbers."""
    return [_plain(item) for item in value] if isinstance(value, list) else value.tolist()


def of_tfds(source: Source) -> tuple[list[str], ReadShard]:
    """A TFDS dataset with a feature `text`, perhaps `segments`; ranges of its documents are the shards."""
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
            record = texts[i]
            text = record["text"]
            if isinstance(text, bytes):
                text = text.decode("utf-8", errors="replace")
            document = {"text": text, "set": builder.info.name}
            if "segments" in record:
                document["segments"] = _plain(record["segments"])  # checked where it is used
            yield document, i + 1

    return [f"{path}[{start}:{min(start + size, len(texts))}]" for start in starts], read
