"""Shards: files of one JSON object per line, plain or compressed, that reading can resume at any line.

A *cursor* is (offset, ends): a frame of the file begins at byte `offset`, and the line begins after
`ends` line ends of this frame. Frames are those of zstd, the members of gzip, and pieces of a plain
file. Reading resumes at a frame's start: at once in a shard of small frames (see `reframe`), from the
beginning in a shard of one frame.
"""

import fnmatch
import glob
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import zstandard
from etils import epath

from bipe_jax.config.spec import hint
from bipe_jax.errors import UserError

START = (0, 0)
_READ_BYTES = 1 << 10  # of compressed text; 4 bytes may unpack to 128 KiB
_PIECE_BYTES = 1 << 18  # of plain text
LONGEST_LINE = 1 << 28  # bytes; longer lines are skipped
_RETRIES = (1.0, 4.0, 16.0)  # seconds before each retry
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Bytes of memory that decompressing a zstd frame may take: by default zstd's own limit (--long=27), since a
# stream reads several shards in turn.
MOST_WINDOW = 1 << 27
LARGEST_WINDOW = 1 << 31  # of zstd --long=31
# Shards that know their number: x-00003-of-00024.jsonl.
_NUMBERED = re.compile(r"(.*?)(\d{1,6})(-of-)(\d{1,6})(.*)")
# Errors that a retry does not help. ImportError: the package that reads an object store is missing.
_FINAL = (
    FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ImportError,
)  # fmt: skip


class Damage(Exception):
    """An unreadable part of a shard; `kind` is the fault's name in `sources.Tally`."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def find(spec: str) -> list[str]:
    """The files that match globs, separated by commas; sorted.

    Where files have names such as x-00003-of-00024.jsonl, files that the glob would match too but that do
    not exist are among them: a shard that is missing is a fault of the data, see `missing`.

    Raises:
      UserError: a glob matches no file, or its directory cannot be listed.
    """
    paths = []
    for pattern in (part.strip() for part in spec.split(",")):
        if "://" in pattern:
            directory, _, name = pattern.rpartition("/")
            try:
                matches = [str(path) for path in epath.Path(directory).glob(name)]
            except Exception as error:  # as in `_File.read`
                raise UserError(f"data: {directory} cannot be listed: {_reason(error)}") from None
        else:
            matches = glob.glob(pattern, recursive=True)
        if not matches and os.path.exists(pattern):  # a name that is no glob, such as x[1].jsonl
            matches = [pattern]
        if not matches:
            raise UserError(f"data: no file matches {pattern!r}{hint(pattern)}")
        paths += matches
        paths += _unmatched(pattern, matches)
    return sorted(set(paths))


def _unmatched(pattern: str, paths: list[str]) -> Iterator[str]:
    """The files that are missing among numbered ones, and that the glob would match."""
    names = set(paths)
    series = {}
    for path in paths:
        directory, slash, name = path.rpartition("/")
        if numbered := _NUMBERED.fullmatch(name):
            prefix, number, of, count, suffix = numbered.groups()
            series[directory + slash, prefix, len(number), of + count + suffix] = int(count)
    wanted = pattern.rpartition("/")[2]
    for (directory, prefix, digits, rest), count in series.items():
        for i in range(count):
            name = f"{prefix}{i:0{digits}}{rest}"
            if directory + name not in names and fnmatch.fnmatchcase(name, wanted):
                yield directory + name


def missing(paths: Sequence[str]) -> list[str]:
    """The local files that do not exist. That a remote one exists is seen when it is opened."""
    return [path for path in paths if "://" not in path and not os.path.exists(path)]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or repr(error)


class _File:
    """A file that retries after errors of an object store or a network's file system."""

    def __init__(self, path: str, offset: int, on_retry: Callable[[], None]):
        self._path, self.offset, self._on_retry = path, offset, on_retry
        self._file = None

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end. Raises Damage when the last retry fails."""
        data = b""
        while len(data) < size and (more := self._read(size - len(data))):
            data += more
        return data

    def _read(self, size: int) -> bytes:
        waits = iter(_RETRIES)
        while True:
            try:
                if self._file is None:
                    self._file = epath.Path(self._path).open("rb")
                    self._file.seek(self.offset)
                data = self._file.read(size)
                self.offset += len(data)
                return data
            except Exception as error:  # object stores raise other kinds than OSError
                self.close()
                wait = next(waits, None)
                if wait is None or isinstance(error, _FINAL):
                    raise Damage(
                        "unreadable_shards",
                        f"data: shard {self._path} cannot be read: {_reason(error)}",
                    ) from None
                self._on_retry()
                time.sleep(wait)

    def seek(self, offset: int):
        self.close()
        self.offset = offset

    def close(self):
        if self._file is not None:
            self._file.close()
            self._file = None


def _frames(file: _File, new) -> Iterator[tuple[int, bytes]]:
    """Yields (offset of the frame, decompressed bytes), at first b"" of each frame.

    Bytes are read in equal portions from the start of each frame. The bytes that a damaged frame yields
    therefore depend on the file alone, not on where reading began.

    Args:
      new: makes a decompressor of the frame that begins with some bytes, with the attributes of zlib's.

    Raises:
      EOFError: the last frame is cut short.
    """
    decompressor, data = None, b""
    while data := data + file.read(_READ_BYTES - len(data)):
        if decompressor is None or decompressor.eof:
            frame, decompressor = file.offset - len(data), new(data)
            yield frame, b""
        text = decompressor.decompress(data)
        data = decompressor.unused_data
        for start in range(0, len(text), _PIECE_BYTES):
            yield frame, text[start : start + _PIECE_BYTES]
    if decompressor is None or not decompressor.eof:
        raise EOFError("its last frame is cut short")


def _pieces(file: _File) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, bytes) of the pieces of a plain file."""
    while True:
        offset = file.offset
        if not (data := file.read(_PIECE_BYTES)):
            return
        yield offset, data


def _unpacked(file: _File, path: str, window: int, searched: bool) -> Iterator[tuple[int, bytes]]:
    """The frames of a file from where it is open.

    Args:
      searched: whether the first frame was searched for, and its header may be chance.
    """

    def zstd(head: bytes):
        nonlocal searched
        if not searched:
            _check_window(head, path, window)
        searched = False
        return zstandard.ZstdDecompressor(max_window_size=window).decompressobj()

    if path.endswith(".zst"):
        return _frames(file, zstd)
    if path.endswith(".gz"):
        return _frames(file, lambda _: zlib.decompressobj(wbits=31))
    return _pieces(file)


def _check_window(head: bytes, path: str, window: int) -> None:
    """Raises UserError if the frame that begins with `head` takes more memory than `window` bytes."""
    try:
        needed = zstandard.get_frame_parameters(head).window_size
    except zstandard.ZstdError:  # no frame, which the decompressor notices
        return
    if needed > window:
        raise UserError(
            f"data: shard {path} takes {needed >> 20:,} MiB of memory to decompress (zstd --long), more "
            f"than {window >> 20}: rewrite it with python -m bipe_jax.data.reframe"
        )


def _seek_frame(file: _File) -> bool:
    """Moves to the next magic number of a zstd frame. Returns False if there is none."""
    window = b""
    while data := file.read(_PIECE_BYTES):
        window = window[-len(_ZSTD_MAGIC) + 1 :] + data
        if (at := window.find(_ZSTD_MAGIC)) >= 0:
            file.seek(file.offset - len(window) + at)
            return True
    return False


def chunks(
    path: str,
    offset: int = 0,
    on_damage: Callable[[Damage, int], None] | None = None,
    on_retry: Callable[[], None] = lambda: None,
    window: int = MOST_WINDOW,
) -> Iterator[tuple[int, bytes] | None]:
    """Yields (offset of the frame, decompressed bytes) from a frame on; None for a gap.

    After a damaged frame of a zstd file, reading continues with the next readable frame.

    Args:
      path: the file. offset: of a frame.
      on_damage: called with a Damage and the offset of its frame, once per run of damaged frames.
        None raises the Damage.
      on_retry: called before each retry.
      window: bytes of memory that decompressing a zstd frame may take.

    Raises:
      Damage: a frame is corrupt or cut short, or the file cannot be read.
      UserError: a zstd frame takes more memory than `window`.
    """
    file, frame, gap = _File(path, offset, on_retry), offset, False
    try:
        while True:
            try:
                if gap and not _seek_frame(file):
                    return
                begun = frame = file.offset
                for frame, data in _unpacked(file, path, window, gap):
                    yield frame, data
                return
            except (zstandard.ZstdError, zlib.error, EOFError) as error:
                kind = "truncated_shards" if isinstance(error, EOFError) else "corrupt_frames"
                damage = Damage(
                    kind,
                    f"data: shard {path} is corrupt or truncated at byte {frame} ({error}): fetch it "
                    "again or leave it out",
                )
            except Damage as error:
                damage = error
            ended = damage.kind == "unreadable_shards" or not path.endswith(".zst")
            if ended or not gap or frame > begun:
                if on_damage is None:
                    raise damage
                on_damage(damage, frame)
            yield None
            if ended:
                return
            file.seek(frame + 1)
            gap = True
    finally:
        file.close()


def lines(
    path: str,
    cursor: Sequence[int] = START,
    on_damage: Callable[[Damage, int], None] | None = None,
    on_retry: Callable[[], None] = lambda: None,
) -> Iterator[tuple[bytes | bytearray | None, tuple[int, int]]]:
    """Yields (line, cursor after it) of a .jsonl, .jsonl.gz or .jsonl.zst file from a cursor on.

    Lines come without their newlines; None stands for one of more than 256 MiB.

    Args:
      path, on_damage, on_retry: as `chunks`.

    Raises:
      Damage, UserError: as `chunks`.
    """
    frame, skip = cursor
    ends, rest, size = 0, bytearray(), 0  # a list of pieces would fragment the memory

    def whole(last: bytes) -> bytes | bytearray | None:
        """The line that ends with `last`; keeps no reference to it, since it may be large."""
        nonlocal rest, size
        length, size = size + len(last), 0
        if length == len(last):
            line = last
        else:
            line, rest = rest, bytearray()
            line += last
        return line if length <= LONGEST_LINE else None

    for chunk in chunks(path, frame, on_damage, on_retry):
        if chunk is None:  # the line that was begun is lost
            rest, size, skip = bytearray(), 0, 0
            continue
        if chunk[0] != frame:
            frame, ends = chunk[0], 0
        first, *more = chunk[1].split(b"\n")
        if skip:
            skipped = min(skip, len(more))
            first, more = [first, *more][skipped], more[skipped:]
            ends, skip = ends + skipped, skip - skipped
            if skip:
                continue
        for last in more:
            ends += 1
            yield whole(first), (frame, ends)
            first = last
        size += len(first)
        if size <= LONGEST_LINE:
            rest += first
        else:
            rest = bytearray()
    if size:
        yield whole(b""), (frame, ends + 1)
