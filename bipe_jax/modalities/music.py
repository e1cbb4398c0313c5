"""Tunes in ABC notation, from the corpus of PyPI's `music21`: bars within parts within tunes.

Of each tune the title, the metre, the unit of length, the key and the music are kept; what transcribers noted
is not. Tunes of a collection follow each other in one document, so that there are long ones.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bipe_jax.data.quickstart import is_held_out
from bipe_jax.errors import UserError
from bipe_jax.modalities.documents import Document, Options

# Directory of the corpus -> set. Others, such as essenFolksong, do not allow every use.
COLLECTIONS = {"oneills1850": "O'Neill", "ryansMammoth": "Ryan", "airdsAirs": "Aird"}
_KEPT = ("T", "M", "L", "K", "P")  # fields: title, metre, unit of length, key, part
_CHARACTERS = 20_000  # of a document, about

_FIELD = re.compile(r"^([A-Zw]):(?![|:])[ \t]*(.*)\n?", re.MULTILINE)
_UNSUNG = re.compile(r'"[^"\n]*"|![^!\n]*!')  # chords and remarks in quotes, ornaments
# A bar line: bars with repeat signs, and the number of an ending, also on the next line. A bracket alone
# begins a chord.
_BAR_LINE = re.compile(r"(?:[\[\]:]*\|(?:[\]|:]|\[(?=[|\]]))*|::+)(\s*\[?[1-9])?")
_BREAK = re.compile(f"(?:{_FIELD.pattern})|{_BAR_LINE.pattern}", re.MULTILINE)
_NOTE = re.compile(r"[A-Ga-gxzZ]")


class Tune(NamedTuple):
    """A tune.

    Attributes:
      title: the first of its titles. text: of its fields and its music, which ends with a newline.
      bars, parts: offsets where they begin in the text; each field is a bar of its own.
    """

    title: str
    text: str
    bars: list[int]
    parts: list[int]


def directory() -> Path:
    """The corpus of music21. Raises UserError: it is not installed."""
    spec = importlib.util.find_spec("music21")
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise UserError("the tunes are those of the package music21: pip install music21")
    return Path(places[0], "corpus")


def documents(options: Options) -> Iterator[Document]:
    """Yields documents of tunes of one collection, either all held out or none. Raises UserError."""
    del options
    for folder, name in COLLECTIONS.items():
        seen: set[str] = set()
        waiting: dict[bool, list[Tune]] = {False: [], True: []}
        paths = sorted(Path(directory(), folder).glob("*.abc"))
        for tune in (tune for path in paths for tune in tunes(path.read_text("latin-1"))):
            if tune.text in seen:
                continue
            seen.add(tune.text)
            # Settings of a tune in other collections have its title, and should be on its side.
            held_out = is_held_out(_plain(tune.title))
            waiting[held_out].append(tune)
            if sum(len(one.text) + 1 for one in waiting[held_out]) >= _CHARACTERS:
                yield _joined(waiting[held_out], name)
                waiting[held_out] = []
        yield from (_joined(some, name) for some in waiting.values() if some)


def _plain(title: str) -> str:
    """A title by its letters, without articles and what follows a dash."""
    return re.sub(r"\b(?:the|an|a)\b|[^a-z]", "", title.lower().partition("--")[0])


def _joined(tunes_of_document: list[Tune], name: str) -> Document:
    """One document of tunes, with a blank line after each. Its name is the plain title of the first."""
    text, bars, parts, begins = "", [], [], []
    for tune in tunes_of_document:
        begins.append(len(text))
        bars += [len(text) + at for at in tune.bars]
        parts += [len(text) + at for at in tune.parts]
        text += tune.text + "\n"
    return Document(_plain(tunes_of_document[0].title), text, name, (bars, parts, begins))


def tunes(text: str) -> Iterator[Tune]:
    """Yields the tunes of a file of ABC notation."""
    # Some files have no blank line between tunes.
    for block in re.split(r"^(?=X:)|\n\s*\n", text.replace("\r\n", "\n"), flags=re.MULTILINE):
        if block.startswith("X:") and (tune := _tune(block)):
            yield tune


def _tune(block: str) -> Tune | None:
    """The tune of a block that begins with X:, or None if there is no music in it."""
    lines: list[str] = []
    title, key_seen = "", False
    for line in block.splitlines()[1:]:
        line = " ".join(line.partition("%")[0].replace("`", "").rstrip("\\ ").split())
        field = _FIELD.fullmatch(line)
        if not field:
            lines += [line] if line and key_seen else []
        elif field[1] in _KEPT:
            key_seen = key_seen or field[1] == "K"
            if field[1] != "T" or not title:
                lines.append(f"{field[1]}:{field[2]}")
            title = title or (field[2] if field[1] == "T" else "")
    text = "".join(f"{line}\n" for line in lines)
    bars, parts = segments(text)
    has_music = any(_NOTE.search(line) for line in lines if not _FIELD.fullmatch(line))
    return Tune(title, text, bars, parts) if has_music else None


def segments(text: str) -> tuple[list[int], list[int]]:
    """Where bars and parts begin in a tune.

    A bar ends with a bar line and the space after it, if notes precede the line; a line without notes before
    it belongs to the bar that it begins. A part ends with a double bar line or a repeat, but not before the
    number of a further ending; P: and a bar line with a repeat that begins something begin one. The header
    belongs to the first part.
    """
    masked = _UNSUNG.sub(lambda match: " " * len(match[0]), text)
    bars, parts = {0}, {0}
    begin, has_begun = 0, False  # of the bar; whether there was music before it
    for found in _BREAK.finditer(masked):
        field, _, ending = found.groups()
        if field:
            parts |= {found.start()} if field == "P" and has_begun else set()
            bars |= {found.start(), found.end()}
            begin = found.end()
            continue
        line = found[0] if ending is None else found[0][: -len(ending)]
        if _NOTE.search(masked, begin, found.start()):
            # The number of an ending belongs to the bar that it begins.
            rest = masked[found.start() + len(line) :]
            begin, has_begun = len(masked) - len(rest.lstrip()), True
            bars.add(begin)
            if ending is None and (len(line.strip("[]")) > 1 or "]" in line or ":" in line):
                parts.add(begin)
        elif line.endswith(":") and has_begun:
            parts.add(begin)
    end = {len(text)}
    return sorted(bars - end), sorted(parts - end)
