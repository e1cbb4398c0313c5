"""The jobs of a preparation: each tokenises some shards and writes the blocks of each set to a file.

What a job writes follows from its plan and number alone, whoever runs it. A job is done when its JSON
file exists; until then it may be run again, also by two processes at once.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
import time

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from bipe_jax import tokenizer
from bipe_jax.data import packing, sources
from bipe_jax.data.stream import parts
from bipe_jax.errors import UserError

MOST_JOBS = 256  # and so, at most as many files a set
_MOST_SETS = 512  # files that a job has open
_WINDOW = 1 << 20  # tokens that are packed together
_TASK = 1 << 16  # characters that are tokenised together
_LOST = ("corrupt_frames", "truncated_shards", "unreadable_shards")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is prepared, and how.

    Attributes:
      input: a source, see `sources.open_source`. sets: those to keep; () keeps all.
      output: the directory, which holds `tokenizer.model` already.
      length: tokens of a block. packing: one of `packing.PACKINGS`. vocab_size: the tokenizer's.
      on_error, max_bad_share: see `sources.Policy`.
    """

    input: str
    output: str
    length: int
    packing: str
    vocab_size: int
    sets: tuple[str, ...] = ()
    on_error: str = "raise"
    max_bad_share: float = 0.0

    def path(self, *names: str) -> epath.Path:
        return epath.Path(self.output).joinpath(*names)

    def file(self, number: int, name: str) -> epath.Path:
        return self.path("parts", f"{number:05}.{name}")


def shards_of(number: int, shards: int) -> range:
    """The shards of a job: as many jobs as shards, or `MOST_JOBS` of several shards each."""
    size = -(-shards // MOST_JOBS)
    return range(number * size, min((number + 1) * size, shards))


@functools.cache
def layout(length: int, vocab_size: int) -> tuple[bytes, dict]:
    """A record of zeros and where its features are.

    A record is a serialised `tf.train.Example` of two strings of bytes, as TFDS has it. Since both have
    a fixed size, everything else in it is the same in all records.

    Returns:
      The record, and {"tokens", "document_ids": {"offset" in bytes, "dtype"}}.
    """
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    dtypes = {"tokens": _smallest(vocab_size - 1), "document_ids": _smallest(length)}
    # No byte in front of a value is 0xff: it is the last one of a number, and those are below 0x80.
    values = {name: b"\xff" * (length * dtype.itemsize) for name, dtype in dtypes.items()}
    features = {
        name: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))
        for name, value in values.items()
    }
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
    record = example.SerializeToString(deterministic=True)
    first = record.index(values["document_ids"])
    second = record.index(values["tokens"], first + len(values["document_ids"]))
    offsets = {"document_ids": first, "tokens": second}
    for name, value in values.items():
        end = offsets[name] + len(value)
        record = record[: offsets[name]] + bytes(len(value)) + record[end:]
    return record, {n: {"offset": offsets[n], "dtype": dtypes[n].name} for n in dtypes}


def _smallest(largest: int) -> np.dtype:
    return np.dtype(np.uint16 if largest < 1 << 16 else np.int32)


def little_endian(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


class _Writer:
    """Packs the documents of one set and writes their blocks as records."""

    def __init__(self, path: str, plan: Plan):
        self._path, self._plan = path, plan
        self._record, self._fields = layout(plan.length, plan.vocab_size)
        self._tokens, self._ids, self._held = [], [], 0
        self._file = None
        self.counts = {"documents": 0, "tokens": 0, "text_bytes": 0, "blocks": 0}

    def add(self, tokens: np.ndarray, first: bool, text_bytes: int) -> None:
        """The next part of a document (L,); `first` if it is the document's first."""
        # Best fit needs whole documents.
        if self._held >= _WINDOW and (first or self._plan.packing == "concat"):
            self._pack()
        counts = self.counts
        counts["documents"] += first
        counts["tokens"] += len(tokens)
        counts["text_bytes"] += text_bytes
        self._tokens.append(tokens)
        self._ids.append(np.full(len(tokens), counts["documents"], np.int32))
        self._held += len(tokens)

    def _pack(self, last: bool = False) -> None:
        if not self._held:
            return
        length = self._plan.length
        rows = {
            "tokens": np.concatenate(self._tokens),
            "document_ids": np.concatenate(self._ids),
        }
        self._tokens, self._ids, self._held = [], [], 0
        if self._plan.packing == "document":
            blocks = packing.document(rows, length)
        else:
            blocks = packing.concat(rows, length, pad=last)
            used = len(blocks["tokens"]) * length
            self._tokens, self._ids = [rows["tokens"][used:]], [rows["document_ids"][used:]]
            self._held = len(self._tokens[0])
        self._write(blocks)

    def _write(self, blocks: dict) -> None:
        records = np.tile(np.frombuffer(self._record, np.uint8), (len(blocks["tokens"]), 1))
        for name, field in self._fields.items():
            values = blocks[name].astype(little_endian(field["dtype"])).view(np.uint8)
            records[:, field["offset"] : field["offset"] + values.shape[1]] = values
        with _writing(self._plan):
            self._file = self._file or ArrayRecordWriter(self._path, "group_size:1")
            for record in records:
                self._file.write(record.tobytes())
        self.counts["blocks"] += len(records)

    def close(self) -> dict:
        """Writes what is left. Returns the counts, also of the file's bytes."""
        self._pack(last=True)
        if not self._file:
            return self.counts | {"file_bytes": 0}
        with _writing(self._plan):
            self._file.close()
            if ArrayRecordReader(self._path).num_records() != self.counts["blocks"]:
                raise OSError(f"{self._path} lacks records that were written")
        return self.counts | {"file_bytes": os.path.getsize(self._path)}


_of_thread = threading.local()


def _opened(plan: Plan) -> tuple:
    """(tokenizer, source, tally) of a plan, opened once a thread: a runner may have several."""
    if getattr(_of_thread, "plan", None) != plan:
        tokens = tokenizer.load(str(plan.path("tokenizer.model")))
        policy = sources.Policy(plan.on_error, plan.max_bad_share)
        source = sources.open_source(plan.input, plan.sets, policy)
        _of_thread.plan, _of_thread.opened = plan, (tokens, source, policy.tally)
    return _of_thread.opened


def _texts(source, shards: range):
    """Yields lists of (set, part of a text, whether it is the document's first), of some size."""
    task, size = [], 0
    for shard in shards:
        for document, _ in source.read(shard):
            for i, text in enumerate(parts(document["text"])):
                task.append((document["set"], text, i == 0))
                size += len(text)
                if size >= _TASK:
                    yield task
                    task, size = [], 0
    if task:
        yield task


def run(plan: Plan, number: int, report=lambda documents, tokens: None) -> None:
    """Does a job, unless it is done.

    Args:
      report: called now and then with how many documents and tokens have been added.

    Raises:
      UserError: as `Source.read`; or the output cannot be written.
    """
    if plan.file(number, "json").exists():
        return
    tokens, source, tally = _opened(plan)
    faults, lost = tally.counts(), tally.shards(*_LOST)
    local = "://" not in plan.output
    with contextlib.ExitStack() as stack:
        with _writing(plan):
            plan.path("parts").mkdir(parents=True, exist_ok=True)
            # In the output, so that files can be renamed; object stores get copies.
            place = plan.path("parts") if local else None
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=place))
        writers: dict[str, _Writer] = {}
        for task in _texts(source, shards_of(number, len(source.shards))):
            encoded = tokens.encode_parts([t for _, t, _ in task], [f for _, _, f in task])
            for ids, (name, text, first) in zip(encoded, task, strict=True):
                if name not in writers:
                    path = os.path.join(scratch, f"{len(writers)}.array_record")
                    writers[name] = _Writer(path, plan)
                    if len(writers) > _MOST_SETS:
                        raise UserError(
                            f"--input={plan.input} has more than {_MOST_SETS} sets: choose by --sets"
                        )
                writers[name].add(ids, first, len(text.encode()))
            report(sum(first for _, _, first in task), sum(map(len, encoded)))
        result = {"sets": {}}
        for i, (name, writer) in enumerate(writers.items()):
            if (counts := writer.close())["blocks"]:
                result["sets"][name] = counts | {"file": f"{i}.array_record"}
        after = tally.counts()
        result["faults"] = {
            k: n - faults.get(k, 0) for k, n in after.items() if n > faults.get(k, 0)
        }
        result["lost_shards"] = tally.shards(*_LOST) - lost
        with _writing(plan):
            for counts in result["sets"].values():
                target = plan.file(number, counts["file"])
                _move(os.path.join(scratch, counts["file"]), target, local)
            done = os.path.join(scratch, "json")
            with open(done, "w", encoding="utf-8") as file:
                json.dump(result, file)
            _move(done, plan.file(number, "json"), local)


@contextlib.contextmanager
def _writing(plan: Plan):
    """What fails inside is the output's fault."""
    try:
        yield
    except (OSError, ImportError, RuntimeError) as error:  # ArrayRecord raises the last
        raise cannot_write(plan.output, error) from None


def cannot_write(output: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
    return UserError(f"--output={output} cannot be written to: {reason}")


def _move(path: str, target: epath.Path, local: bool) -> None:
    if local:
        os.replace(path, target)
    else:
        epath.Path(path).copy(target, overwrite=True)


def run_all(plan: Plan, numbers: list[int], workers: int, report) -> None:
    """Does jobs in as many processes; in this one if that is enough.

    Raises:
      UserError: as `run`; or a process died.
    """
    workers = min(workers, len(numbers))
    if workers <= 1:
        for number in numbers:
            run(plan, number, report)
        return
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(numbers))
    processes = {}
    try:
        for _ in range(workers):
            connection, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, plan), daemon=True)
            process.start()
            theirs.close()  # so that its end shows here
            connection.send(waiting.pop())
            processes[connection] = process
        while processes:
            for connection in multiprocessing.connection.wait(list(processes)):
                _answer(connection, processes, waiting, report)
    finally:
        for process in processes.values():
            process.kill()


def _answer(connection, processes: dict, waiting: list[int], report) -> None:
    """Takes one message of a process: progress, an error, or None for a job that is done."""
    try:
        message = connection.recv()
    except (EOFError, ConnectionError):
        processes[connection].join()
        raise UserError(
            f"a worker process died (exit code {processes[connection].exitcode}; below 0: by that "
            "signal): if memory was short, use fewer --workers; run the same command again to go on"
        ) from None
    if isinstance(message, UserError):
        raise message
    if message is not None:
        report(*message)
    elif waiting:
        connection.send(waiting.pop())
    else:
        connection.close()
        processes.pop(connection).join()


def _work(connection, plan: Plan) -> None:
    """A worker process: does the jobs that it is sent, until there is no other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sent, added = time.monotonic(), [0, 0]

    def report(documents, tokens):
        nonlocal sent
        added[0] += documents
        added[1] += tokens
        if time.monotonic() - sent > 0.2:
            connection.send(tuple(added))
            sent, added[:] = time.monotonic(), (0, 0)

    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            number = connection.recv()
            try:
                run(plan, number, report)
                answer = None
            except UserError as error:
                answer = error
            connection.send(tuple(added))
            added[:] = (0, 0)
            connection.send(answer)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
