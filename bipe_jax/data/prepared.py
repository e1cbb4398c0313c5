"""Prepared data: blocks tokenised in advance, read in any order.

The blocks of a batch are a function of the config and the batch's number alone: the shares of the
sources determine the source of each block, and a permutation per source and epoch the block. Batches
are therefore the same for any number of processes.
"""

import dataclasses
import hashlib
import itertools
import resource
from collections.abc import Iterator, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from bipe_jax import segments
from bipe_jax.config import Config, spec
from bipe_jax.config.spec import Mixture, Source
from bipe_jax.data.mixing import integer_weights, permuted, source_counts
from bipe_jax.data.records import read_field
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.workdir import json_files

COMPLETE, PREPARING = "bipe.json", "preparing.json"  # the first is written last
FORMAT = 1
# Single records are read, so that nothing is prefetched.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 1 << 15
_READ_AT_ONCE = 256  # blocks
_OTHER_FILES = 256  # open files of other kinds


class Dataset:
    """The blocks of some sets of a prepared directory.

    Attributes:
      source: the source that was opened. path: its directory.
      settings: of its preparation, see `prepare.prepare`.
      blocks: number of blocks. length: tokens of each.
      files: names of the files of its sets. document_count: number of their documents.
      shards, documents: of the text, see `prepare.prepare`; () in data of an earlier version.
    """

    def __init__(self, source: Source, path: epath.Path, description: dict, sets: list[str]):
        self.source, self.path, self.settings = source, path, description["settings"]
        self.length = self.settings["sequence_length"] + 1
        self.shards = [spec.Shard(*shard) for shard in self.settings.get("shards", ())]
        self.documents = description.get("documents", ())
        self._record = description["record"]
        chosen = [description["sets"][name] for name in sets]
        self.files = [name for counts in chosen for name in counts["files"]]
        self.document_count = sum(counts["documents"] for counts in chosen)
        self._file_blocks = [n for counts in chosen for n in counts["file_blocks"]]
        self._ends = np.cumsum(self._file_blocks)
        self.blocks = int(self._ends[-1])
        self._readers: list[ArrayRecordReader | None] = [None] * len(self.files)
        _allow_files(len(self.files))

    def _reader(self, i: int) -> ArrayRecordReader:
        """Opens a file at its first use."""
        if (reader := self._readers[i]) is None:
            path = str(self.path / self.files[i])
            reader = ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)
            if reader.num_records() != self._file_blocks[i]:  # 0 of a file that cannot be read
                raise UserError(
                    f"data: {path} is missing or damaged ({reader.num_records()} of "
                    f"{self._file_blocks[i]} blocks): fetch it again, or prepare {self.path} again"
                )
            self._readers[i] = reader
        return reader

    def read(self, numbers: Sequence[int] | np.ndarray) -> dict:
        """Blocks by their numbers.

        Args:
          numbers: (n,) integers from 0 to `blocks` - 1.

        Returns:
          {"tokens", "document_ids", perhaps "starts"}: (n, length) int32.

        Raises:
          UserError: a file is missing or damaged.
        """
        numbers = np.asarray(numbers, np.int64)
        files = np.searchsorted(self._ends, numbers, side="right")
        in_file = numbers - self._ends[files] + np.take(self._file_blocks, files)
        size = self._record["bytes"]
        records = np.empty((len(numbers), size), np.uint8)
        for i in np.unique(files).tolist():
            rows = np.flatnonzero(files == i)
            try:
                texts = self._reader(i).read(in_file[rows].tolist())
                records[rows] = np.frombuffer(b"".join(texts), np.uint8).reshape(-1, size)
            except (RuntimeError, ValueError, IndexError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"data: {self.path / self.files[i]} is damaged ({reason}): fetch it again, or "
                    f"prepare {self.path} again"
                ) from None
        names = [name for name in ("tokens", "document_ids", "starts") if name in self._record]
        return {name: read_field(records, self._record[name], self.length) for name in names}

    def close(self) -> None:
        for reader in self._readers:
            if reader is not None:
                reader.close()
        self._readers = [None] * len(self.files)


def _allow_files(count: int) -> None:
    """Raises this process's limit of open files. Raises UserError if the hard limit is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(f"data: {count} prepared files cannot be open at once: ulimit -Hn {needed}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _description(path: epath.Path) -> dict:
    """The contents of bipe.json. Raises UserError."""
    try:
        description = json_files.parse((path / COMPLETE).read_text())
        if description["format"] != FORMAT:
            raise UserError(
                f"data: {path} was prepared by another version (format {description['format']}, not "
                f"{FORMAT}): prepare it again"
            )
        if not {"settings", "record", "sets"} <= description.keys():
            raise KeyError
        return description
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data: {path / COMPLETE} cannot be read: {reason}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"data: {path / COMPLETE} is damaged: prepare {path} again") from None
    if (path / PREPARING).exists():
        raise UserError(
            f"data: {path} is not completely prepared: run the same python -m bipe_jax.data.prepare "
            "again"
        )
    raise UserError(
        f"data: {path} is no prepared directory (it has no {COMPLETE}): python -m "
        "bipe_jax.data.prepare writes one"
    )


def open_prepared(source: Source, sets: Sequence[str] = ()) -> Dataset:
    """Opens prepared data.

    Args:
      source: of the kind "prepared".
      sets: names of sets to keep, besides the source's own; () keeps all.

    Raises:
      UserError: DIR is missing or not completely prepared, or has no such set.
    """
    path = source.path
    description = _description(epath.Path(path))
    known = list(description["sets"])
    named = source.sets or known
    unknown = [name for name in named if name not in known]
    chosen = [name for name in known if name in named and (not sets or name in sets)]
    if unknown or not chosen:
        missing = unknown or sets
        raise UserError(
            f"data: {path} has no set {' or '.join(map(repr, missing))}: it has "
            f"{', '.join(map(repr, known))}"
        )
    return Dataset(source, epath.Path(path), description, chosen)


def files(source: Source) -> list[str]:
    """The files of prepared data: its description, and those of its sets. Raises as `open_prepared`."""
    dataset = open_prepared(source)
    return [str(dataset.path / name) for name in (COMPLETE, *dataset.files)]


def documents(
    source: Source, sets: Sequence[str], tokenizer: Tokenizer, segmenters: Sequence[str] = ()
) -> Iterator[dict]:
    """Yields {"set": str, "tokens": (T,) int32, "bytes": (T,)} of each document, block by block.

    With `segmenters` (of the levels, see `segments.segmenters_of`) there is "starts" too.

    A document that was cut comes in parts, each no longer than a block. "bytes" are those of the text that
    each token stands for: those of its piece, times the ratio of both in the whole set.

    Raises:
      UserError: as `open_prepared` and `Dataset.read`; or it was prepared with another tokenizer, or
        other segmenters.
    """
    opened = open_prepared(source, sets)
    check_tokenizer(opened, tokenizer)
    _check_segmenters(opened, segmenters)
    of_sets = _description(epath.Path(source.path))["sets"]
    for name in source.sets or list(of_sets):
        if sets and name not in sets:
            continue
        text_bytes = of_sets[name]["text_bytes"]
        # Data of an earlier version do not have the bytes of the pieces.
        piece_bytes = of_sets[name].get("piece_bytes", text_bytes)
        sizes = tokenizer.byte_lengths() * (text_bytes / max(piece_bytes, 1))
        part = open_prepared(dataclasses.replace(source, sets=(name,)))
        for start in range(0, part.blocks, _READ_AT_ONCE):
            rows = part.read(np.arange(start, min(start + _READ_AT_ONCE, part.blocks)))
            for number, ids in enumerate(rows.pop("document_ids")):
                bounds = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
                for first, last in itertools.pairwise(bounds):
                    if ids[first]:  # 0 is padding
                        piece = {name: of[number, first:last] for name, of in rows.items()}
                        yield {"set": name, "bytes": sizes[piece["tokens"]], **piece}
        part.close()


class Prepared:
    """Batches of blocks from one or several prepared sources; the state is the next batch's number.

    Args:
      config: its `batch_size`, `sequence_length`, `seed` and `data` are used.
      mixture: of prepared sources. tokenizer: the run's.
      shard: (index, count) of this process's rows of each batch.

    Raises:
      UserError: as `open_prepared`; or a source was prepared with other settings.
    """

    def __init__(
        self,
        config: Config,
        mixture: Mixture,
        tokenizer: Tokenizer,
        shard: tuple[int, int] = (0, 1),
    ):
        self._sources = [open_prepared(source, config.data.sets) for source in mixture.sources]
        for source in self._sources:
            _check(source, config, tokenizer)
        self._weights = integer_weights(list(mixture.shares))
        self._seed, self._batch_size = config.seed, config.batch_size
        self._shard, self._batch = shard, 0

    def take(self, count: int) -> dict:
        """This process's rows of the next batch: {"tokens", "document_ids"}, (count, L + 1) int32.

        Row r of batch b is block b B + r of the run.
        """
        first = self._batch * self._batch_size + self._shard[0] * count
        blocks = self.blocks(np.arange(first, first + count))
        self._batch += 1
        return blocks

    def blocks(self, numbers: np.ndarray) -> dict:
        """Blocks of the run by their numbers (n,): {"tokens", "document_ids"}, (n, L + 1) int32."""
        before = source_counts(numbers, self._weights)
        chosen = np.argmax(source_counts(numbers + 1, self._weights) - before, axis=1)
        blocks = {}
        for i in np.unique(chosen).tolist():
            source, rows = self._sources[i], np.flatnonzero(chosen == i)
            of_source = [
                permuted(n, source.blocks, self._seed, i) for n in before[rows, i].tolist()
            ]
            for name, values in source.read(of_source).items():
                if name not in blocks:
                    blocks[name] = np.empty((len(numbers), values.shape[1]), np.int32)
                blocks[name][rows] = values
        return blocks

    def consumed(self) -> dict[str, tuple[int, float]]:
        """Source -> (blocks that all processes together have taken, epochs)."""
        counts = source_counts(self._batch * self._batch_size, self._weights).tolist()
        return {
            s.source.text: (n, n / s.blocks) for s, n in zip(self._sources, counts, strict=True)
        }

    def get_state(self) -> dict:
        return {"batch": self._batch}

    def set_state(self, state: dict, changed: Sequence[bool] = ()) -> None:
        """Continues with a batch; of data that have `changed`, with their batch of that number."""
        self._batch = state["batch"]

    def close(self) -> None:
        for source in self._sources:
            source.close()


def _check(source: Dataset, config: Config, tokenizer: Tokenizer) -> None:
    """Raises UserError if the settings of a preparation are not those of a run."""
    for name, value in (
        ("sequence_length", config.sequence_length),
        ("data.packing", config.data.packing),
    ):
        before = source.settings[name.removeprefix("data.")]
        if value != before:
            raise UserError(
                f"config.{name}={value!r}, but {source.path} was prepared with {before!r}: use that, "
                "or prepare another directory"
            )
    if config.data.cut_documents == "continue":
        raise UserError(
            "config.data.cut_documents='continue' needs whole documents, and "
            f"{source.path} has blocks only: use 'restart', or the shards themselves"
        )
    check_tokenizer(source, tokenizer)
    _check_segmenters(source, segments.segmenters_of(config))


def _check_segmenters(source: Dataset, segmenters: Sequence[str]) -> None:
    """Raises UserError if a source does not carry the segments of these segmenters."""
    before = tuple(source.settings.get("segmenters", ()))
    if segmenters and tuple(segmenters) != before:
        raise UserError(
            f"config.segments has the segmenters {','.join(segmenters)!r}, but {source.path} was prepared "
            f"with --segmenters={','.join(before)!r}: prepare another directory"
        )


def check_tokenizer(source: Dataset, tokenizer: Tokenizer) -> None:
    """Raises UserError if a source was prepared with another tokenizer."""
    if hashlib.sha256(tokenizer.model).hexdigest() != source.settings["tokenizer_sha256"]:
        path = str(source.path / "tokenizer.model")
        raise UserError(
            f"{source.path} was prepared with another tokenizer than the model has "
            f"(config.tokenizer.path={path!r} would fit): prepare it again with the model's"
        )
