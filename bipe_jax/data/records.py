"""Records: packed blocks in ArrayRecord files, in the format of TFDS.

A record is a serialised `tf.train.Example` of two byte strings, the block's tokens and document ids. Both
have a fixed size. All other bytes are therefore the same in all records, and the offsets are constant:
`layout`.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from bipe_jax.data import packing
from bipe_jax.errors import UserError

DATASET, VERSION = "blocks", "1.0.0"  # TFDS's names
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_WINDOW = 1 << 20  # tokens that are packed together


def _smallest(largest: int) -> np.dtype:
    return np.dtype(np.uint16 if largest < 1 << 16 else np.int32)


@functools.cache
def layout(length: int, vocab_size: int, levels: int = 0) -> tuple[bytes, dict]:
    """A record of zeros, and the layout of its features.

    Args:
      length: tokens of a block. vocab_size: determines the dtype of the tokens.
      levels: whose segments the tokens carry, see `marked`; 0 for none.

    Returns:
      The record, and {"tokens", "document_ids", perhaps "starts": {"offset" in bytes, "dtype"}}.
    """
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    example, feature = cast(Any, tf_example_pb2), cast(Any, tf_feature_pb2)  # without types

    def serialised(filled: str = "") -> bytes:
        features = {
            name: feature.Feature(
                bytes_list=feature.BytesList(
                    value=[(b"\xff" if name == filled else b"\0") * (length * dtype.itemsize)]
                )
            )
            for name, dtype in dtypes.items()
        }
        record = example.Example(features=feature.Features(feature=features))
        return record.SerializeToString(deterministic=True)

    dtypes = {"tokens": _smallest(vocab_size - 1), "document_ids": _smallest(length)}
    if levels:
        dtypes["starts"] = _smallest((1 << levels) - 1)
    zeros = serialised()

    def offset(name: str) -> int:
        filled = np.frombuffer(serialised(name), np.uint8)
        return int(np.flatnonzero(filled != np.frombuffer(zeros, np.uint8))[0])

    return zeros, {n: {"offset": offset(n), "dtype": dtypes[n].name} for n in dtypes}


def _view(records: np.ndarray, field: dict, length: int) -> tuple[np.ndarray, np.dtype]:
    """A view of a feature's bytes in records (n, bytes), and its dtype."""
    dtype = np.dtype(field["dtype"]).newbyteorder("<")
    return records[:, field["offset"] : field["offset"] + length * dtype.itemsize], dtype


def read_field(records: np.ndarray, field: dict, length: int) -> np.ndarray:
    """A feature of records (n, bytes) uint8, by its entry of `layout`: (n, length) int32."""
    values, dtype = _view(records, field, length)
    return np.ascontiguousarray(values).view(dtype).astype(np.int32)


class SetWriter:
    """Packs the documents of one set and writes their blocks to an ArrayRecord file.

    Args:
      path: a local file. length: tokens of a block. kind: one of `config.fields.PACKINGS`.
      levels: as `layout`.
    """

    def __init__(self, path: str, length: int, vocab_size: int, kind: str, levels: int = 0):
        self._path, self._length, self._kind = path, length, kind
        self._record, self._fields = layout(length, vocab_size, levels)
        self._rows: list[dict] = []
        self._buffered = 0
        self._file = None
        self.counts = {"documents": 0, "tokens": 0, "text_bytes": 0, "piece_bytes": 0, "blocks": 0}

    def add(self, row: dict, first: bool, text_bytes: int, piece_bytes: int) -> None:
        """Adds the next part of a document.

        Args:
          row: "tokens", (L,), and perhaps "starts". first: whether a document begins with it.
          text_bytes: of its text. piece_bytes: of what its tokens stand for.
        """
        # Best fit needs whole documents.
        if self._buffered >= _WINDOW and (first or self._kind == "concat"):
            self._pack()
        counts = self.counts
        counts["documents"] += first
        size = len(row["tokens"])
        counts["tokens"] += size
        counts["text_bytes"] += text_bytes
        counts["piece_bytes"] += piece_bytes
        self._rows.append(row | {"document_ids": np.full(size, counts["documents"], np.int32)})
        self._buffered += size

    def _pack(self, last: bool = False) -> None:
        if not self._buffered:
            return
        rows = {name: np.concatenate([row[name] for row in self._rows]) for name in self._fields}
        if self._kind == "concat":
            blocks = packing.concat(rows, self._length, pad=last)
            used = len(blocks["tokens"]) * self._length
        else:
            blocks = getattr(packing, self._kind)(rows, self._length)
            used = len(rows["tokens"])
        self._rows = [{name: array[used:] for name, array in rows.items()}]
        self._buffered = len(self._rows[0]["tokens"])
        self._write(blocks)

    def _write(self, blocks: dict) -> None:
        records = np.tile(np.frombuffer(self._record, np.uint8), (len(blocks["tokens"]), 1))
        for name, field in self._fields.items():
            view, dtype = _view(records, field, self._length)
            view[:] = blocks[name].astype(dtype).view(np.uint8)
        self._file = self._file or ArrayRecordWriter(self._path, "group_size:1")
        for record in records:
            self._file.write(record.tobytes())
        self.counts["blocks"] += len(records)

    def close(self) -> dict:
        """Writes the remaining blocks. Returns the counts and "file_bytes", 0 if there is no block."""
        self._pack(last=True)
        if not self._file:
            return self.counts | {"file_bytes": 0}
        self._file.close()
        if ArrayRecordReader(self._path).num_records() != self.counts["blocks"]:
            raise OSError(f"{self._path} lacks records that were written")
        return self.counts | {"file_bytes": os.path.getsize(self._path)}


@contextlib.contextmanager
def writing(output: str) -> Iterator[None]:
    """Turns errors of writing into a UserError that names the output."""
    try:
        yield
    except (OSError, ImportError, RuntimeError) as error:  # ArrayRecord raises the last
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise UserError(f"--output={output} cannot be written to: {reason}") from None


def file_name(split: str, number: int, count: int) -> str:
    """TFDS's name of file `number` of the `count` files of a split."""
    return f"{DATASET}-{split}.array_record-{number:05}-of-{count:05}"


def describe_for_tfds(
    path: epath.Path, length: int, vocab_size: int, levels: int, sets: list[dict]
) -> None:
    """Writes TFDS's dataset_info.json and features.json.

    Args:
      path: the directory. length: tokens of a block. vocab_size, levels: as `layout`.
      sets: {"split", "blocks", "file_blocks"} of each split.
    """
    import tensorflow_datasets as tfds

    record, fields = layout(length, vocab_size, levels)
    features = {
        name: tfds.features.Tensor(
            shape=(length,), dtype=np.dtype(field["dtype"]).type, encoding="bytes"
        )
        for name, field in fields.items()
    }
    template = tfds.core.ShardedFileTemplate(
        data_dir=path, dataset_name=DATASET, filetype_suffix="array_record", template=_TEMPLATE
    )
    splits = [
        tfds.core.SplitInfo(
            name=counts["split"],
            shard_lengths=counts["file_blocks"],
            num_bytes=counts["blocks"] * len(record),
            filename_template=template,
        )
        for counts in sets
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=path,
        features=features,
        split_infos=splits,
        version=VERSION,
        filename_template=template,
        check_data=False,  # would need TensorFlow
        description=f"Blocks of {length} tokens and the numbers of their documents.",
    )
