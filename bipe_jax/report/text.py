"""Text for a terminal: tables, and foreign strings without control characters."""

import unicodedata

from bipe_jax.streams import escaped


def visible(text: str) -> str:
    """Text with its line ends marked, and control characters escaped."""
    return escaped(text).replace("\n", "↵\n")


def line(text: str) -> str:
    """Text in one line: line ends and tabs are escaped as all control characters are."""
    return escaped(text, keep="")


def _width(text: str) -> int:
    """The columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def table(head: tuple, lines: list[tuple]) -> str:
    """A table as text; the first column is aligned to the left, the others to the right.

    Cells may be names of any kind: each is written in one line, see `line`.
    """
    rows = [[line(cell) for cell in row] for row in (head, *lines)]
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]

    def pad(row):
        cells = (
            (" " * (w - _width(c)) + c) if i else (c + " " * (w - _width(c)))
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(map(pad, rows))
