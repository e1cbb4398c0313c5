"""The jobs of a preparation: each tokenises some shards and writes the blocks of each set to a file.

The plan and a job's number determine what it writes. A job is done when its JSON file exists. Until then
it may be run again, also by two processes at once.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from bipe_jax.config.spec import parse_source
from bipe_jax.data import marked, sources, tokenizer
from bipe_jax.data.records import SetWriter, writing
from bipe_jax.errors import UserError

MOST_JOBS = 256  # and files per set
_MOST_SETS = 512  # and open files of a job
_TASK = 1 << 16  # characters that are tokenised at a time

Report = Callable[[int, int], None]  # of numbers of documents and tokens


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings of a preparation.

    Attributes:
      input: a source, see `config.spec`. sets: to keep; () keeps all.
      output: the directory, which contains `tokenizer.model`.
      length: tokens of a block. packing: one of `config.fields.PACKINGS`. vocab_size: the tokenizer's.
      on_error, max_bad_share: see `sources.Policy`.
      segmenters: of the levels, see `marked`; () for none.
    """

    input: str
    output: str
    length: int
    packing: str
    vocab_size: int
    sets: tuple[str, ...] = ()
    on_error: str = "raise"
    max_bad_share: float = 0.0
    segmenters: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        return "://" not in self.output

    def path(self, *names: str) -> epath.Path:
        return epath.Path(self.output).joinpath(*names)

    def file(self, number: int, name: str) -> epath.Path:
        return self.path("parts", f"{number:05}.{name}")


def _size(shards: int) -> int:
    return max(-(-shards // MOST_JOBS), 1)


def count(shards: int) -> int:
    """Number of jobs: one per shard, or at most `MOST_JOBS` of several shards each."""
    return -(-shards // _size(shards))


def shards_of(number: int, shards: int) -> range:
    """The shards of a job."""
    size = _size(shards)
    return range(number * size, min((number + 1) * size, shards))


_of_thread = threading.local()


def _opened(plan: Plan) -> tuple:
    """(tokenizer, source, tally) of a plan, opened once per thread, since runners have several."""
    if getattr(_of_thread, "plan", None) != plan:
        tokens = tokenizer.load(str(plan.path("tokenizer.model")))
        policy = sources.Policy(plan.on_error, plan.max_bad_share)
        source = sources.open_source(parse_source(plan.input), plan.sets, policy)
        _of_thread.plan, _of_thread.opened = plan, (tokens, source, policy.tally)
    return _of_thread.opened


def _texts(
    source: sources.Opened, shards: range, segmenters: Sequence[str]
) -> Iterator[list[tuple[str, marked.Part]]]:
    """Yields lists of (set, part of a document), see `_TASK`."""
    task, size = [], 0
    for shard in shards:
        for document, _ in source.read(shard):
            for part in marked.parts_of(document, segmenters):
                task.append((document["set"], part))
                size += len(part.text)
                if size >= _TASK:
                    yield task
                    task, size = [], 0
            del document, part  # frees them, which may be large, before the next is read
    if task:
        yield task


def run(plan: Plan, number: int, report: Report = lambda documents, tokens: None) -> None:
    """Runs a job, unless it is done.

    Args:
      plan, number: of the job.
      report: called repeatedly with the numbers of documents and tokens since the last call.

    Raises:
      UserError: as `Opened.read`; or the output cannot be written.
    """
    if plan.file(number, "json").exists():
        return
    tokens, source, tally = _opened(plan)
    tally.__init__()  # the counts of a job do not depend on the jobs before it
    with contextlib.ExitStack() as stack:
        with writing(plan.output):
            plan.path("parts").mkdir(parents=True, exist_ok=True)
            # In the output, so that files can be renamed; object stores get copies.
            parent = os.fspath(plan.path("parts")) if plan.local else None
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=parent))
        writers: dict[str, SetWriter] = {}
        sizes = tokens.byte_lengths()
        for task in _texts(source, shards_of(number, len(source.shards)), plan.segmenters):
            encoded = marked.encode(tokens, [part for _, part in task])
            with writing(plan.output):
                for row, (name, part) in zip(encoded, task, strict=True):
                    if name not in writers:
                        path = os.path.join(scratch, f"{len(writers)}.array_record")
                        writers[name] = SetWriter(
                            path,
                            plan.length,
                            plan.vocab_size,
                            plan.packing,
                            len(plan.segmenters),
                        )
                    piece_bytes = int(sizes[row["tokens"]].sum())
                    writers[name].add(row, part.first, len(part.text.encode()), piece_bytes)
            if len(writers) > _MOST_SETS:
                raise UserError(
                    f"--input={plan.input} has more than {_MOST_SETS} sets: choose some by --sets"
                )
            report(sum(part.first for _, part in task), sum(len(r["tokens"]) for r in encoded))
        with writing(plan.output):
            counts = {name: writer.close() for name, writer in writers.items()}
            result = {
                "sets": {
                    name: of_set | {"file": f"{i}.array_record"}
                    for i, (name, of_set) in enumerate(counts.items())
                    if of_set["blocks"]
                },
                "faults": {k: n for k, n in tally.counts().items() if k != "retries"},
                "lost_shards": tally.lost_shards(),
            }
            for of_set in result["sets"].values():
                target = plan.file(number, of_set["file"])
                _move(os.path.join(scratch, of_set["file"]), target, plan.local)
            done = os.path.join(scratch, "json")
            with open(done, "w", encoding="utf-8") as file:
                json.dump(result, file)
            _move(done, plan.file(number, "json"), plan.local)


def _move(path: str, target: epath.Path, local: bool) -> None:
    if local:
        os.replace(path, target)
    else:
        epath.Path(path).copy(target, overwrite=True)


def run_all(plan: Plan, numbers: list[int], workers: int, report: Report) -> None:
    """Runs jobs in `workers` processes; for 1, in this process.

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
            theirs.close()  # so that its death closes the pipe
            connection.send(waiting.pop())
            processes[connection] = process
        while processes:
            for connection in multiprocessing.connection.wait(list(processes)):
                _answer(connection, processes, waiting, report)
    finally:
        for process in processes.values():
            process.kill()


def _answer(connection, processes: dict, waiting: list[int], report) -> None:
    """Handles one message of a worker: progress, an error, or None for a job that is done."""
    try:
        message = connection.recv()
    except (EOFError, ConnectionError):
        processes[connection].join()
        raise UserError(
            f"a worker process died (exit code {processes[connection].exitcode}; below 0: by that "
            "signal): if memory was short, use fewer --workers; run the same command again to resume"
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
    """A worker process: runs the jobs that it is sent, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
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
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
