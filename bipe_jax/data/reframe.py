"""Rewrites JSONL shards into small frames, so that reading resumes at any line at once.

python -m bipe_jax.data.reframe --input='shards/*.jsonl.zst' --output=DIR [--frame_mb=4] [--shards=N]

The output is .jsonl.zst with one frame per 4 MB of text. Each frame ends at the end of a line and has a
checksum. All lines are copied byte for byte, to a file of the same stem or, with --shards=N, line i of
all files in the order of their paths to shard i mod N, so that N processes can read them. Files get
their names when they are complete. Existing files are kept, so that the same command resumes.

Shards that zstd --long has compressed need as much memory as its window, up to 2 GiB each: --workers=1
reads one at a time.
"""

import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator

import zstandard
from etils import epath
from tqdm import tqdm

from bipe_jax import cli, commands
from bipe_jax.data import shards as files
from bipe_jax.data.prefetch import ordered_map
from bipe_jax.errors import UserError
from bipe_jax.workdir.files import locked

_LOG = logging.getLogger("bipe_jax.data.reframe")

SUFFIX = ".jsonl.zst"
_MB = 1_000_000
_PARTIAL = ".partial"

Chunks = Callable[[str], Iterator[bytes]]  # of the text of a file


class _Framer:
    """Cuts pieces of text into frames of whole lines, of at most `size` bytes or one longer line."""

    def __init__(self, size: int):
        self._size, self._text, self._searched = size, bytearray(), 0

    def add(self, piece: bytes) -> Iterator[bytes]:
        """Yields the frames that are complete."""
        self._text += piece
        while len(self._text) > self._size:
            end = self._text.rfind(b"\n", 0, self._size) + 1
            # A long line is searched once.
            end = end or self._text.find(b"\n", max(self._size, self._searched)) + 1
            if (end or len(self._text)) > max(files.LONGEST_LINE, self._size):
                raise UserError(
                    f"--input: a line of the shards is longer than {files.LONGEST_LINE:,} bytes, which no "
                    "command reads: remove it"
                )
            if not end:
                self._searched = len(self._text)
                return
            yield self._take(end)

    def rest(self) -> bytes:
        """The text after the last complete frame."""
        return self._take(len(self._text))

    def _take(self, end: int) -> bytes:
        with memoryview(self._text) as view:
            frame = bytes(view[:end])
        del self._text[:end]
        self._searched = 0
        return frame


def _frames(paths: list[str], count: int, size: int, chunks: Chunks) -> Iterator[tuple[int, bytes]]:
    """Distributes the lines of files over `count` shards.

    Yields (shard, frame), at least one per shard, which may be empty. The text of one frame per shard is
    in memory.
    """
    framers, begun = [_Framer(size) for _ in range(count)], [False] * count
    line, ended = 0, True

    def add(piece):
        i = line % count
        for frame in framers[i].add(piece):
            begun[i] = True
            yield i, frame

    for path in paths:
        if not ended:  # the last line of the file before
            yield from add(b"\n")
            line, ended = line + 1, True
        for chunk in filter(None, chunks(path)):
            ended = chunk.endswith(b"\n")
            if count == 1:
                yield from add(chunk)
                continue
            *whole, last = chunk.split(b"\n")
            for piece in whole:
                yield from add(piece + b"\n")
                line += 1
            yield from add(last)
    if 1 < count > line + (not ended):
        raise UserError(
            f"--shards={count} is more than the lines ({line + (not ended)}): use fewer"
        )
    for i, framer in enumerate(framers):
        # A file of 0 bytes would be read as a frame that is cut short.
        if (frame := framer.rest()) or not begun[i]:
            yield i, frame


def _rewrite(
    paths: list[str],
    targets: list[str],
    size: int,
    level: int,
    chunks: Chunks,
    pool: concurrent.futures.Executor | None = None,
    ahead: int = 0,
) -> tuple[int, int]:
    """Distributes the lines of `paths` over `targets`, and writes all of them or none.

    Returns:
      The numbers of frames and bytes written.
    """

    def compressed(item):
        return item[0], zstandard.ZstdCompressor(level=level, write_checksum=True).compress(item[1])

    partial = [target + _PARTIAL for target in targets]
    count = written = 0
    try:
        for path in partial:
            open(path, "wb").close()
        frames = _frames(paths, len(targets), size, chunks)
        for i, frame in ordered_map(pool, compressed, frames, ahead):
            # Opened each time, since there may be more shards than a process may have open files.
            with open(partial[i], "ab") as file:
                file.write(frame)
            count, written = count + 1, written + len(frame)
        for path in partial:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for path, target in zip(partial, targets, strict=True):
            os.replace(path, target)
    except BaseException:
        for path in partial:
            with contextlib.suppress(OSError):
                os.remove(path)
        raise
    return count, written


def _targets(paths: list[str], output: str, shards: int) -> list[str]:
    """The files to write. Raises UserError if two of them, or one and other files, conflict."""
    if shards:
        names = [f"{i:05}-of-{shards:05}{SUFFIX}" for i in range(shards)]
        other = {name for name in os.listdir(output) if name.endswith(SUFFIX)} - set(names)
        if other:
            raise UserError(
                f"--output={output} holds {min(other)}, which is not of --shards={shards}: use an "
                "empty directory"
            )
        return [os.path.join(output, name) for name in names]
    by_stem: dict[str, str] = {}
    for path in paths:
        stem = os.path.basename(path)
        for suffix in (".zst", ".gz", ".jsonl"):
            stem = stem.removesuffix(suffix)
        if other := by_stem.get(stem):
            raise UserError(
                f"--input: {other} and {path} would both become {stem}{SUFFIX}: give each an --output "
                "of its own, or use --shards=N"
            )
        by_stem[stem] = path
    return [os.path.join(output, stem + SUFFIX) for stem in by_stem]


def _check(paths: list[str], output: str, frame_mb, shards, level, workers) -> None:
    for name, value, low, high in (
        ("frame_mb", frame_mb, 0.001, 1000),
        ("shards", shards, 0, 99999),
        ("level", level, 1, zstandard.MAX_COMPRESSION_LEVEL),
        ("workers", workers, 1, 1024),
    ):
        if not low <= value <= high:
            raise UserError(f"--{name}={value} must be from {low} to {high}")
    if "://" in output:
        raise UserError(f"--output={output} must be a local directory: copy the files from there")
    for path in paths:
        for name in (path, os.path.realpath(path)):  # its directory, and that of a link's target
            if os.path.realpath(os.path.dirname(name)) == os.path.realpath(output):
                raise UserError(f"--output={output} holds the input {path}: use another directory")


def reframe(
    spec: str,
    output: str,
    frame_mb: float = 4.0,
    shards: int = 0,
    level: int = 3,
    workers: int = 1,
) -> dict[str, int]:
    """Rewrites shards; see the module's docstring.

    Args:
      spec: globs, separated by commas. output: a local directory.
      frame_mb: 10^6 bytes of text per frame.
      shards: number of files to distribute the lines over; 0: one per input file.
      level: of zstd. workers: threads; zstd and zlib release the interpreter's lock.

    Returns:
      {"files", "frames", "text", "before", "after"} written, the last three in bytes, and "skipped":
      the number of files that existed.

    Raises:
      UserError: a shard is damaged, there is none, or an argument is wrong. Incomplete files are
        removed.
    """
    paths = files.find(spec)
    _check(paths, output, frame_mb, shards, level, workers)
    done: dict[str, int] = dict.fromkeys(
        ("files", "frames", "text", "before", "after", "skipped"), 0
    )
    stop, lock = threading.Event(), threading.Lock()
    pool = concurrent.futures.ThreadPoolExecutor(workers) if workers > 1 else None
    try:
        os.makedirs(output, exist_ok=True)
        with (
            locked(output, f"--output={output} is being written to by another run"),
            tqdm(unit="B", unit_scale=True, desc="text", disable=None) as bar,
        ):
            targets = _targets(paths, output, shards)
            jobs: list[tuple[list[str], list[str]]] = [(paths, targets)]
            if not shards:
                jobs = [([p], [t]) for p, t in zip(paths, targets, strict=True)]
            jobs = [job for job in jobs if not all(map(os.path.exists, job[1]))]
            done["files"] = sum(len(job[1]) for job in jobs)
            done["skipped"] = len(targets) - done["files"]

            def chunks(path):
                for item in files.chunks(path, window=files.LARGEST_WINDOW):
                    assert item is not None  # a gap follows `on_damage` alone
                    _, chunk = item
                    if stop.is_set():
                        raise concurrent.futures.CancelledError
                    with lock:
                        done["text"] += len(chunk)
                        bar.update(len(chunk))
                    yield chunk

            def run(job: tuple[list[str], list[str]]) -> tuple[int, int, int]:
                # Files run in parallel or, with --shards, frames.
                inner = pool if shards else None
                size = sum(epath.Path(path).stat().length for path in job[0])
                size_of_frame = int(frame_mb * _MB)
                return size, *_rewrite(*job, size_of_frame, level, chunks, inner, 2 * workers)

            outer = None if shards else pool
            for before, frames, after in ordered_map(outer, run, jobs, workers):
                done["before"] += before
                done["frames"] += frames
                done["after"] += after
                bar.set_postfix_str(f"{done['frames']} frames")
    except files.Damage as error:
        raise UserError(str(error)) from None
    except OSError as error:
        reason = f"{error.filename or output}: {error.strerror or error}"
        raise UserError(f"--output={output} cannot be written: {reason}") from None
    finally:
        stop.set()  # the other jobs end at once, and remove their files
        if pool:
            pool.shutdown(cancel_futures=True)
    return done


def main():
    args = commands.parser("reframe").parse_args()
    done = reframe(args.input, args.output, args.frame_mb, args.shards, args.level, args.workers)
    if done["skipped"]:
        _LOG.info(
            f"Kept {done['skipped']} files that exist in {args.output}; delete those to rewrite"
        )
    print(
        f"Wrote {done['files']} files of {done['text']:,} bytes of text: {done['before']:,} bytes "
        f"before, {done['after']:,} now, in {done['frames']:,} frames"
    )


if __name__ == "__main__":
    with cli.user_errors():
        main()
