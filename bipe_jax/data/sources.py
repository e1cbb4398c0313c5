"""Sources of documents: Pile-format JSONL shards, plain or compressed, and the quickstart's corpus.

A document is {"text": str, "set": str}. A shard has one JSON object a line with `text` and, if it is
of the Pile's kind, `meta` with `pile_set_name` (an object, or an object as a JSON string).
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator

import zstandard
from etils import epath

from bipe_jax.data import quickstart
from bipe_jax.errors import UserError

NO_SET = "documents"  # the set name of documents that name none
_READ_BYTES = 1 << 20
_QUICKSTART = "quickstart:"


def is_quickstart(spec: str) -> bool:
    return spec.startswith(_QUICKSTART)


def shards(spec: str) -> list[str]:
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


def _decompress_zstd(file) -> Iterator[bytes]:
    """Yields the decompressed chunks of one or more frames; EOFError if the last is cut short."""
    decompressor, data = zstandard.ZstdDecompressor().decompressobj(), b""
    while data := data or file.read(_READ_BYTES):
        if decompressor.eof:
            decompressor = zstandard.ZstdDecompressor().decompressobj()
        yield decompressor.decompress(data)
        data = decompressor.unused_data
    if not decompressor.eof:
        raise EOFError("the last frame is cut short")


def _decompress_gzip(file) -> Iterator[bytes]:
    """The same for gzip, which takes a file of no bytes for an empty one."""
    if not file.peek(1):
        raise EOFError("no bytes")
    with gzip.GzipFile(fileobj=file) as unpacked:
        while chunk := unpacked.read(_READ_BYTES):
            yield chunk


def _chunks(path: str) -> Iterator[bytes]:
    with epath.Path(path).open("rb") as file:
        if path.endswith(".zst"):
            yield from _decompress_zstd(file)
        elif path.endswith(".gz"):
            yield from _decompress_gzip(io.BufferedReader(file))
        else:
            while chunk := file.read(_READ_BYTES):
                yield chunk


def lines(path: str) -> Iterator[bytes]:
    """The lines of a .jsonl, .jsonl.gz or .jsonl.zst file, without their newlines.

    Raises:
      UserError: the file cannot be read, or is corrupt or truncated.
    """
    rest: list[bytes] = []
    try:
        for chunk in _chunks(path):
            first, *more = chunk.split(b"\n")
            rest.append(first)
            for part in more:
                yield b"".join(rest)
                rest = [part]
    except (zstandard.ZstdError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise UserError(
            f"data: shard {path} is corrupt or truncated ({error}): fetch it again or leave it out"
        ) from None
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data: shard {path} cannot be read: {reason}") from None
    if last := b"".join(rest):
        yield last


def _json(text):
    """What JSON holds; None if it is not JSON, not UTF-8, or too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _parse(line: bytes) -> dict | None:
    """A line's document, or None if it is not JSON or has no text."""
    record = _json(line)
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not _is_utf8(text):
        return None
    meta = record.get("meta")
    meta = _json(meta) if isinstance(meta, str) else meta
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return {"text": text, "set": name if isinstance(name, str) else NO_SET}


def _is_utf8(text: str) -> bool:
    """JSON can hold half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Tally:
    """Counts the lines of each shard, and those that could not be used."""

    def __init__(self):
        self._shards: dict[str, tuple[int, int]] = {}

    def set(self, path: str, count: int, bad: int) -> None:
        self._shards[path] = max(self._shards.get(path, (0, 0)), (count, bad))

    @property
    def bad_lines(self) -> int:
        return sum(bad for _, bad in list(self._shards.values()))


def read_shard(path: str, sets=(), max_bad_share: float = 0.0, tally: Tally | None = None):
    """Yields the documents of one shard, those of `sets` if any are named.

    Lines that are not JSON, or have no text, are left out and counted. Empty lines and empty texts
    are passed over.

    Raises:
      UserError: the shard is unreadable, or more than `max_bad_share` of its lines are bad (judged
        after 1000 lines and at its end).
    """
    count = bad = 0
    first_bad = None

    def judge():
        if tally:
            tally.set(path, count, bad)
        if bad > max_bad_share * count:
            raise UserError(
                f"data: {bad} of {count} lines of {path} are not JSON or have no text (the first is "
                f"line {first_bad}), more than data.max_bad_share={max_bad_share:g}"
            )

    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        count += 1
        document = _parse(line)
        if document is None:
            bad += 1
            first_bad = first_bad or number
            if count >= 1000:
                judge()
        elif document["text"] and (not sets or document["set"] in sets):
            yield document
    judge()


def documents(spec: str, sets=(), max_bad_share: float = 0.0, tally: Tally | None = None):
    """Yields all documents of a source once, in a fixed order.

    Args:
      spec: "quickstart:train", "quickstart:validation", or globs of shards separated by commas.
      sets: names of the sets to keep; () keeps all.

    Raises:
      UserError: as `shards` and `read_shard`; or nothing is left after filtering.
    """
    if is_quickstart(spec):
        split = spec.removeprefix(_QUICKSTART)
        found = (d for d in quickstart.documents(split) if not sets or d["set"] in sets)
    else:
        paths = shards(spec)
        found = (d for path in paths for d in read_shard(path, sets, max_bad_share, tally))
    empty = True
    for document in found:
        empty = False
        yield document
    if empty:
        filtered = f" of the sets {', '.join(sets)}" if sets else ""
        raise UserError(f"data: {spec!r} holds no document{filtered}")
