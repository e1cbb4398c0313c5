"""Lines of JSONL shards: the document of a line, text or an example, or why it has none."""

import json
import re
from typing import Any

import orjson

from bipe_jax.data import examples

NO_SET = "documents"  # the set of documents without a set name
# Bytes of memory that parsing a document may use: its line twice, and its characters.
_MOST_BYTES = 680_000_000
MARK = b"\xef\xbb\xbf"  # the byte order mark that some programs begin a file with
# Why a line is bad, in the order of the counts in a cursor; and in words.
REASONS = {
    "not_json": "not JSON",
    "no_text": "without text",
    "not_utf8": "not UTF-8",
    "too_long": "too long",
}
_FOUR_BYTES = re.compile(rb"[\xf0-\xff]|\\u[dD][89abAB]")  # in UTF-8, and escaped
_TWO_BYTES = re.compile(rb"[\xc4-\xff]|\\u(?!00)")


class BadLine(ValueError):
    """A line without a document; its text is one of `REASONS`."""


def _fits(line: bytes | bytearray, copies: int) -> bool:
    """Whether parsing a line into `copies` strs uses at most `_MOST_BYTES`.

    A str has 1, 2 or 4 bytes per character, for its widest.
    """
    if len(line) * (2 + 4 * copies) <= _MOST_BYTES:
        return True
    width = 4 if _FOUR_BYTES.search(line) else 2 if _TWO_BYTES.search(line) else 1
    return len(line) * (2 + width * copies) <= _MOST_BYTES


def _loads(line: bytes | bytearray) -> Any:
    """The JSON value of a line. Raises BadLine.

    orjson is fast but strict. What it refuses is read again by `json`, so that only what is used of a line
    is judged: Python writes NaN into `meta`, and bytes that are not UTF-8 may be in any field.
    """
    try:
        return orjson.loads(line)
    except ValueError:
        pass
    if not _fits(line, copies=2):
        raise BadLine("too_long")
    try:
        return json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        pass
    try:
        line.decode()
    except ValueError:
        raise BadLine("not_utf8") from None
    raise BadLine("not_json")


def parse(line: bytes | bytearray | None) -> dict:
    """The document of a line: {"text", "set", perhaps "segments"}, and of an example see `examples`.

    Args:
      line: None stands for one that is too long to be kept.

    Raises:
      BadLine: it has no document.
    """
    if line is None or not _fits(line, copies=1):
        raise BadLine("too_long")
    record = _loads(line)
    if not isinstance(record, dict):
        raise BadLine("no_text")
    own = {} if "text" in record else examples.of_record(record)
    text = own.get("text", record.get("text"))
    if not isinstance(text, str):
        raise BadLine("no_text")
    if not _encodable(text):
        raise BadLine("not_utf8")
    meta = record.get("meta")
    if isinstance(meta, str):
        try:
            meta = _loads(meta.encode("utf-8", "surrogatepass"))
        except BadLine:
            meta = None
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    document = own | {
        "text": text,
        "set": name if isinstance(name, str) and _encodable(name) else NO_SET,
    }
    if "segments" in record:
        document["segments"] = record["segments"]  # checked where it is used
    return document


def _encodable(text: str) -> bool:
    """Whether a text has no lone surrogates, which are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
