"""Modules of the running Python's standard library: lines within functions and classes within modules."""

import re
from collections.abc import Iterator

from bipe_jax.data import quickstart
from bipe_jax.modalities.documents import Document, Options
from bipe_jax.segments import segmenters


def documents(options: Options) -> Iterator[Document]:
    """Yields the larger modules, in the order of their names."""
    del options
    for path in quickstart.library():
        text = path.read_text("utf-8", errors="replace")
        yield Document(path.name, text, quickstart.LIBRARY, segments(text))


def segments(text: str) -> tuple[list[int], list[int]]:
    """Where lines begin, and where functions and classes begin and end, also inner ones."""
    lines = [
        0,
        *(newline.end() for newline in re.finditer("\n", text) if newline.end() < len(text)),
    ]
    definitions = segmenters.begins("ast", {"text": text})
    return lines, sorted({0, *definitions})
