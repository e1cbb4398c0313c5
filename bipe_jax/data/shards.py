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
_READ_BYTES = 1 << 18  # small, since text may unpack to very much more
_LONGEST_LINE = 1 << 28  # bytes; longer ones are not held in memory
_RETRIES = (1.0, 4.0, 16.0)  # seconds before each further try to read
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# What another try does not mend.
_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class Damage(Exception):
    """A part of a shard cannot be read; `kind` is the name that it is counted under."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def find(spec: str) -> list[str]:
    """The files that globs, separated by commas, stand for; sorted.

    Raises:
      UserError: a glob matches no file.
    """
    found = []
    for pattern in (part.strip() for part in spec.split(",")):
        if "://" in pattern:
            directory, _, name = pattern.rpartition("/")
            matches = [str(path) for path in epath.Path(directory).glob(name)]
        else:
            matches = glob.glob(pattern, recursive=True)
        if not matches:
            raise UserError(f"data: no file matches {pattern!r}")
        found += matches
    return sorted(set(found))


class _File:
    """Reads on after errors of an object store or a network's file system, where they pass."""

    def __init__(self, path: str, offset: int, on_retry):
        self._path, self.offset, self._on_retry = path, offset, on_retry
        self._file = None

    def read(self, size: int = _READ_BYTES) -> bytes:
        """At most `size` bytes, none at the end. Raises Damage when the last try fails."""
        for wait in (*_RETRIES, None):
            try:
                if self._file is None:
                    self._file = epath.Path(self._path).open("rb")
                    self._file.seek(self.offset)
                data = self._file.read(size)
                self.offset += len(data)
                return data
            except (OSError, ImportError) as error:
                self.close()
                if wait is None or isinstance(error, (*_FINAL, ImportError)):
                    reason = getattr(error, "strerror", None) or error
                    raise Damage(
                        "unreadable_shards", f"data: shard {self._path} cannot be read: {reason}"
                    ) from None
                self._on_retry()
                time.sleep(wait)

    def close(self):
        if self._file is not None:
            self._file.close()
            self._file = None


def _frames(file: _File, new) -> Iterator[tuple[int, bytes]]:
    """Yields (offset of the frame, unpacked bytes); EOFError if the last frame is cut short.

    Args:
      new: makes a decompressor of one frame, with the attributes of zlib's.
    """
    frame, decompressor, data = file.offset, new(), b""
    while data := data or file.read():
        if decompressor.eof:
            frame, decompressor = file.offset - len(data), new()
        yield frame, decompressor.decompress(data)
        data = decompressor.unused_data
    if not decompressor.eof:
        raise EOFError("its last frame is cut short")


def _pieces(file: _File) -> Iterator[tuple[int, bytes]]:
    """The same of a plain file."""
    while True:
        offset = file.offset
        if not (data := file.read()):
            return
        yield offset, data


def _opened(path: str, offset: int, on_retry) -> tuple[_File, Iterator[tuple[int, bytes]]]:
    file = _File(path, offset, on_retry)
    if path.endswith(".zst"):
        return file, _frames(file, lambda: zstandard.ZstdDecompressor().decompressobj())
    if path.endswith(".gz"):
        return file, _frames(file, lambda: zlib.decompressobj(wbits=31))
    return file, _pieces(file)


def _next_frame(path: str, offset: int, on_retry) -> int | None:
    """Where, after `offset`, the next frame of a zstd file may begin."""
    if not path.endswith(".zst"):
        return None
    file, before = _File(path, offset, on_retry), b""
    try:
        while data := file.read():
            window = before + data
            at = window.find(_ZSTD_MAGIC)
            if at >= 0:
                return file.offset - len(window) + at
            before = window[-len(_ZSTD_MAGIC) + 1 :]
    finally:
        file.close()
    return None


def chunks(path: str, offset: int = 0, on_damage=None, on_retry=lambda: None):
    """Yields (offset of its frame, unpacked bytes) from a frame on; None after a gap.

    Args:
      offset: where a frame begins.
      on_damage: called with a Damage, (offset, ) and where reading may go on behind it; without it, or
        if it raises, the shard ends there.
      on_retry: called before each further try after an error that may pass.

    Raises:
      Damage: a frame is corrupt or cut short, or the file cannot be read.
    """
    while offset is not None:
        file, found = _opened(path, offset, on_retry)
        frame = offset
        try:
            for frame, data in found:
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
        finally:
            file.close()
        if on_damage is None:
            raise damage
        on_damage(damage, frame)
        gone_on = damage.kind != "unreadable_shards"
        offset = _next_frame(path, frame + 1, on_retry) if gone_on else None
        yield None


def lines(path: str, place=START, on_damage=None, on_retry=lambda: None):
    """Yields (line, place behind it) of a .jsonl, .jsonl.gz or .jsonl.zst file from a place on.

    Lines come without their newlines; None stands for one that is too long to be held.

    Raises:
      Damage: as `chunks`.
    """
    frame, skip = place
    ends, rest, held = 0, [], 0

    def whole(last: bytes) -> bytes | None:
        return None if held + len(last) > _LONGEST_LINE else b"".join([*rest, last])

    for chunk in chunks(path, frame, on_damage, on_retry):
        if chunk is None:  # what was begun is lost
            rest, held, skip = [], 0, 0
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
            rest, held, first = [], 0, last
        held += len(first)
        if held <= _LONGEST_LINE:
            rest.append(first)
        else:
            rest = []
    if held:
        yield whole(b""), (frame, ends + 1)
