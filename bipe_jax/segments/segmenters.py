# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
"""Segmenters: rules that read a document's whole text, before it becomes tokens.

They may look ahead, so that a token's coordinates can depend on later text. Where text is generated, they
know the prompt alone.
"""

import ast
import functools
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from bipe_jax.errors import UserError

_DATA, _AST, _PYSBD = "data", "ast", "pysbd"
PLAIN = (_DATA, _AST, _PYSBD)  # without an argument
NAMES = ("data[:LIST]", _AST, "pysbd[:LANGUAGE]")
_LIST = re.compile(r"data:[0-9]{1,2}")


def is_known(name: str) -> bool:
    """Whether a rule's name is a segmenter's."""
    return name in PLAIN or bool(_LIST.fullmatch(name) or name.startswith(f"{_PYSBD}:"))


def reads_text(name: str) -> bool:
    """Whether a segmenter needs nothing of a document but its text."""
    return not name.startswith(_DATA)


def of_level(name: str, level: int) -> str:
    """The segmenter of a level, by its number: "data" reads the list of that number."""
    return f"{_DATA}:{level}" if name == _DATA else name


def check(name: str, key: str) -> None:
    """Raises UserError if a segmenter is unknown, or its library is missing or lacks the language.

    Args:
      key: of the config, or a flag, that names it.
    """
    if not is_known(name):
        raise UserError(f"{key}: the segmenter {name!r} is unknown: use one of {', '.join(NAMES)}")
    if not name.startswith(_PYSBD):
        return
    if importlib.util.find_spec("pysbd") is None:
        raise UserError(
            f"the segment rule {name!r} needs the extra `pysbd`: pip install 'bipe_jax[pysbd]'"
        )
    _pysbd(name)


def begins(name: str, document: dict[str, Any]) -> list[int]:
    """Where segments begin in a document: the offsets of their first characters, ascending.

    Args:
      name: of the segmenter, from `of_level`.
      document: "text", and for "data:K" also "segments", whose list K is taken.

    Raises:
      UserError: the document has no such segments.
    """
    if not reads_text(name):
        return _of_data(document, int(name.partition(":")[2]))
    text = document["text"]
    return sorted(set(_definitions(text) if name == _AST else _pysbd(name)(text)))


def _of_data(document: dict[str, Any], number: int) -> list[int]:
    lists: Any = document.get("segments")
    own: Any = lists[number] if isinstance(lists, list) and len(lists) > number else None
    length = len(document["text"])
    good = isinstance(own, list) and all(type(at) is int and 0 <= at <= length for at in own)
    if not good or sorted(own) != own:
        beginning = " ".join(document["text"][:60].split())
        raise UserError(
            'data: the segment rule \'data\' needs "segments" beside a document\'s "text": a list for each '
            f"level, of which list {number} must be the ascending character offsets where segments begin; "
            f"the document that begins with {beginning!r} does not have it"
        )
    return own


def _definitions(text: str) -> Iterator[int]:
    """Where functions and classes of Python begin and end; nowhere if the text is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the text
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = [0, *(end.end() for end in re.finditer(r"\r\n?|\n", text)), len(text)]
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield lines[first - 1]
            if node.end_lineno is not None and lines[node.end_lineno] < len(text):
                yield lines[node.end_lineno]


@functools.cache
def _pysbd(name: str) -> Callable[[str], list[int]]:
    import pysbd

    language = name.partition(":")[2] or "en"
    try:
        segmenter: Any = pysbd.Segmenter(language=language, clean=False, char_span=True)
    except ValueError:
        raise UserError(f"the segment rule {name!r}: pysbd does not know the language") from None
    return lambda text: [span.start for span in segmenter.segment(text)]
