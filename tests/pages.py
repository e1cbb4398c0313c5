"""The commands of the README and the pages of docs/, as a shell would read them."""

import dataclasses
import re
import shlex
from collections.abc import Iterator

from paths import ROOT

BLOCK = re.compile(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "benchmarks/RESULTS.md")
_SEPARATORS = set("\n;&|()")
_ASSIGNED = re.compile(r"(\w+)=(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
      page: its path in the repository.
      words: with the values of the block's variables; of a loop, of its first turn.
      needs: the title of its block, if that says what the block needs, such as a cloud.
    """

    page: str
    words: tuple[str, ...]
    needs: str = ""

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def pages() -> dict[str, str]:
    """Path -> text."""
    paths = sorted(path for pattern in PAGES for path in ROOT.glob(pattern))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def blocks(language: str) -> Iterator[tuple[str, str, str]]:
    """(page, title, text) of each block of code."""
    for page, text in pages().items():
        for found, title, code in BLOCK.findall(text):
            if found == language:
                yield page, title, code


def commands() -> list[Command]:
    """All commands of blocks that are marked as bash."""
    variables: dict[str, dict[str, str]] = {}  # of each page
    return [
        Command(page, words, title if title.startswith("Needs ") else "")
        for page, title, text in blocks("bash")
        for words in words_of(text, variables.setdefault(page, {}))
    ]


def inline() -> list[Command]:
    """Commands with flags in the text of the pages, without those that are abridged or have placeholders."""
    found = []
    for page, text in pages().items():
        text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`]+)`", text):
            code = " ".join(code.split())
            is_command = re.match(r"(python -m (bipe_jax|launch|benchmarks|tests)[.]|bipe )", code)
            if is_command and "--" in code and not re.search(r"…|\.\.\.|[\[$]|\b[A-Z]+\b", code):
                found.append(Command(page, tuple(shlex.split(code))))
    return found


def words_of(text: str, variables: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """The commands of a script: with comments removed, and variables replaced by their values.

    Args:
      variables: those that are known; the script's own are added.
    """
    comment = r"""('[^']*'|"[^"]*")|(?<!\S)#[^\n]*"""  # outside of quotes
    text = re.sub(comment, lambda match: match[1] or "", text.replace("\\\n", " "))
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    command: list[str] = []
    for token in [*lexer, "\n"]:
        if set(token) <= _SEPARATORS:
            if made := _command(command, variables):
                yield made
            command = []
        else:
            command.append(token)


def _command(words: list[str], variables: dict[str, str]) -> tuple[str, ...]:
    """A command, or nothing: of assignments, which are kept in `variables`, and of a shell's own words."""
    if words[:1] == ["for"]:
        variables[words[1]] = words[3]
        return ()
    if words[:1] in (["do"], ["done"]):
        words = words[1:]
    while words and (assigned := _ASSIGNED.fullmatch(words[0])):
        variables[assigned[1]] = assigned[2]
        words = words[1:]
    made: list[str] = []
    for word in words:
        name = word.removeprefix("$")
        if name != word and name in variables:
            made += shlex.split(variables[name])
        else:
            made.append(re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), word))
    return tuple(made)
