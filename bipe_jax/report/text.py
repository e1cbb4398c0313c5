"""Text for a terminal: tables, and foreign strings without control characters."""

import unicodedata


def visible(text: str) -> str:
    """Text with its line ends marked, and control characters escaped."""
    shown = (
        c
        if c in "\n\t" or unicodedata.category(c)[0] != "C"
        else c.encode("unicode_escape").decode()
        for c in text
    )
    return "".join(shown).replace("\n", "↵\n")


def table(head: tuple, lines: list[tuple]) -> str:
    """A table as text; the first column is aligned to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]

    def pad(line):
        cells = (
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(map(pad, [head, *lines]))
