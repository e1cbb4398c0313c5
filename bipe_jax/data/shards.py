"""Shards: files of one JSON object a line, plain or compressed, read from any place on.

A *place* is (offset, ends): a frame of the file begins at byte `offset`, and the line at that place
begins after `ends` line ends of this frame. Frames are those of zstd, the members of gzip, and stretches
of a plain file. A shard whose frames are small (see `reframe`) is therefore gone on with at once,
wherever that is; one of a single frame is read again from its start.
"""

import glob
import time
import zlib
from collections.abc import Iterator

import zstandard
from etils import epath

from bipe_jax.errors import UserError

START = (0, 0)
_READ_BYTES = 1 << 10  # of compressed text; 4 bytes may unpack to 128 KiB
_PIECE_BYTES = 1 << 18  # of plain text
_LONGEST_LINE = 1 << 28  # bytes; longer ones are not held in memory
_RETRIES = (1.0, 4.0, 16.0)  # seconds before each further try to read
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# What another try does not mend. An ImportError is of a package that reads an object store.
_FINAL = (
    FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ImportError,
)  # fmt: skip


class Damage(Exception):
    """A part of a shard cannot be read; `kind` is the name that it is counted under."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def find(spec: str) -> list[str]:
    """The files that globs, separated by commas, stand for; sorted.

    Raises:
      UserError: a glob matches no file, or its directory cannot be listed.
    """
    found = []
    for pattern in (part.strip() for part in spec.split(",")):
        if "://" in pattern:
            directory, _, name = pattern.rpartition("/")
            try:
                matches = [str(path) for path in epath.Path(directory).glob(name)]
            except Exception as error:  # as in `_File.read`
                raise UserError(f"data: {directory} cannot be listed: {_reason(error)}") from None
        else:
            matches = glob.glob(pattern, recursive=True)
        if not matches:
            raise UserError(f"data: no file matches {pattern!r}")
        found += matches
    return sorted(set(found))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or repr(error)


class _File:
    """Reads on after errors of an object store or a network's file system, where they pass."""

    def __init__(self, path: str, offset: int, on_retry):
        self._path, self.offset, self._on_retry = path, offset, on_retry
        self._file = None

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end. Raises Damage when the last try fails."""
        data = b""
        while len(data) < size and (more := self._read(size - len(data))):
            data += more
        return data

    def _read(self, size: int) -> bytes:
        for wait in (*_RETRIES, None):
            try:
                if self._file is None:
                    self._file = epath.Path(self._path).open("rb")
                    self._file.seek(self.offset)
                data = self._file.read(size)
                self.offset += len(data)
                return data
            except Exception as error:  # not all that object stores raise is an OSError
                self.close()
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
    """Yields (offset of the frame, unpacked bytes), none of these first; EOFError if one is cut short.

    What is unpacked of a damaged frame follows from the file alone, and not from where reading began:
    bytes are taken in equal portions from each frame's begin on.

    Args:
      new: makes a decompressor of one frame, with the attributes of zlib's.
    """
    decompressor, data = None, b""
    while data := data + file.read(_READ_BYTES - len(data)):
        if decompressor is None or decompressor.eof:
            frame, decompressor = file.offset - len(data), new()
            yield frame, b""
        text = decompressor.decompress(data)
        data = decompressor.unused_data
        for start in range(0, len(text), _PIECE_BYTES):
            yield frame, text[start : start + _PIECE_BYTES]
    if decompressor is None or not decompressor.eof:
        raise EOFError("its last frame is cut short")


def _pieces(file: _File) -> Iterator[tuple[int, bytes]]:
    """The same of a plain file."""
    while True:
        offset = file.offset
        if not (data := file.read(_PIECE_BYTES)):
            return
        yield offset, data


def _unpacked(file: _File, path: str) -> Iterator[tuple[int, bytes]]:
    if path.endswith(".zst"):
        return _frames(file, lambda: zstandard.ZstdDecompressor().decompressobj())
    if path.endswith(".gz"):
        return _frames(file, lambda: zlib.decompressobj(wbits=31))
    return _pieces(file)


def _seek_frame(file: _File) -> bool:
    """Goes on to where the next frame of a zstd file may begin. Returns whether there is such a place."""
    window = b""
    while data := file.read(_PIECE_BYTES):
        window = window[-len(_ZSTD_MAGIC) + 1 :] + data
        at = window.find(_ZSTD_MAGIC)
        if at >= 0:
            file.seek(file.offset - len(window) + at)
            return True
    return False


def chunks(path: str, offset: int = 0, on_damage=None, on_retry=lambda: None):
    """Yields (offset of its frame, unpacked bytes) from a frame on; None after a gap.

    Behind a damaged frame of a zstd file, reading goes on with the next one that can be read.

    Args:
      offset: where a frame begins.
      on_damage: called with a Damage and the offset of its frame, once for frames in a row. Without
        it, or if it raises, the shard ends there.
      on_retry: called before each further try after an error that may pass.

    Raises:
      Damage: a frame is corrupt or cut short, or the file cannot be read.
    """
    file, frame, gap = _File(path, offset, on_retry), offset, False
    try:
        while True:
            try:
                if gap and not _seek_frame(file):
                    return
                begun = frame = file.offset
                for frame, data in _unpacked(file, path):
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


def lines(path: str, place=START, on_damage=None, on_retry=lambda: None):
    """Yields (line, place behind it) of a .jsonl, .jsonl.gz or .jsonl.zst file from a place on.

    Lines come without their newlines; None stands for one that is too long to be held.

    Raises:
      Damage: as `chunks`.
    """
    frame, skip = place
    ends, rest, held = 0, bytearray(), 0  # not a list of pieces, whose memory would stay in use

    def whole(last: bytes) -> bytes | bytearray | None:
        """The line that ends so. It may be large: only the caller holds it from then on."""
        nonlocal rest, held
        length, held = held + len(last), 0
        if length == len(last):
            line = last
        else:
            line, rest = rest, bytearray()
            line += last
        return line if length <= _LONGEST_LINE else None

    for chunk in chunks(path, frame, on_damage, on_retry):
        if chunk is None:  # what was begun is lost
            rest, held, skip = bytearray(), 0, 0
            continue
        if chunk[0] != frame:
            frame, ends = chunk[0], 0
        first, *more = chunk[1].split(b"\n")
        if skip:
            passed = min(skip, len(more))
            first, more = [first, *more][passed], more[passed:]
            ends, skip = ends + passed, skip - passed
            if skip:
                continue
        for last in more:
            ends += 1
            yield whole(first), (frame, ends)
            first = last
        held += len(first)
        if held <= _LONGEST_LINE:
            rest += first
        else:
            rest = bytearray()
    if held:
        yield whole(b""), (frame, ends + 1)
