"""Pages of the site that are made of the repository: a hook of mkdocs.yml.

The home page is README.md. A file outside docs/ that a page links to, such as a config or a module, becomes a
page too, so that the site has all that it refers to; a link to a directory outside docs/ becomes text. A
notebook becomes a page with its saved outputs.
"""

import os
import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
HOME = "README.md"
_ALONE = "---\nhide: [navigation]\n---\n"  # a page that is its own section
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")

_UNSEARCHED = (
    "---\nsearch: {exclude: true}\n---\n"  # the pages that describe a file are found instead
)
_titles: dict[str, str] = {}  # of the pages of docs/
_origins: dict[str, str] = {}  # of each page made here: what it is in the site -> in the repository


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    _origins.clear()
    waiting = {
        HOME: _text(HOME)
    }  # pages whose links are to be followed: path in the repository -> text
    for file in list(files):
        origin = f"docs/{file.src_uri}"
        if origin.endswith(".ipynb"):
            files.remove(file)
            waiting[origin], pictures = _of_notebook(origin)
            for name, data in pictures.items():
                files.append(File.generated(config, name, content=data))
        elif origin.endswith(".md"):
            waiting[origin] = file.content_string
    while waiting:
        origin, text = waiting.popitem()
        uri = _in_site(origin)
        if uri not in files.src_uris:
            files.append(File.generated(config, uri, content=text))
            _origins[uri] = origin
        if origin.startswith("docs/") and (title := re.search("^# (.*)", text, re.MULTILINE)):
            _titles[origin] = title[1]
        for _, target, _ in LINK.findall(text) if origin.endswith((".md", ".ipynb")) else ():
            path = _in_repository(target, origin)
            if (ROOT / path).is_file() and _in_site(path) not in files.src_uris:
                waiting.setdefault(path, _text(path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text with links to where the files are in the site."""
    uri = page.file.src_uri
    origin = _origins.get(uri, f"docs/{uri}")

    def link(match: re.Match) -> str:
        text, target, anchor = match.groups()
        path = _in_repository(target, origin)
        if "://" in target or not (ROOT / path).exists():
            return match[0]
        if (ROOT / path).is_dir():
            return text
        if text.strip("`") == os.path.basename(path) and _titles.get(path):
            text = _titles[path]  # instead of a file's name
        return f"[{text}]({os.path.relpath(_in_site(path), os.path.dirname(uri))}{anchor or ''})"

    # A value stays beside its error on a narrow screen.
    markdown = re.sub(r"(?m)^\|.*$", lambda row: row[0].replace(" ± ", "&nbsp;±&nbsp;"), markdown)
    return LINK.sub(link, markdown)


def _in_repository(target: str, origin: str) -> str:
    """The path in the repository of what a page there links to."""
    return os.path.normpath(os.path.join(os.path.dirname(origin), target))


def _in_site(path: str) -> str:
    if path == HOME:
        return "index.md"
    if path.endswith(".ipynb"):
        path = path.removesuffix(".ipynb") + ".md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    # Files whose names begin with a dot are no part of a site.
    return f"repository/{path.lstrip('.')}" + ("" if path.endswith(".md") else ".md")


def _text(path: str) -> str:
    """A file of the repository as the text of a page."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path == HOME:
        return _ALONE + text
    if path.endswith(".md"):
        return text
    language = {".py": "python", ".yaml": "yaml", ".toml": "toml"}.get(Path(path).suffix, "text")
    return f"{_UNSEARCHED}# `{path}`\n\n````{language}\n{text}````\n"


def _of_notebook(origin: str) -> tuple[str, dict[str, bytes]]:
    """The page of a notebook, and its pictures by their paths in the site."""
    notebook = nbformat.read(ROOT / origin, as_version=4)
    directory = {"output_files_dir": f"{Path(origin).stem}_files"}
    text, made = MarkdownExporter().from_notebook_node(notebook, resources=directory)
    at = os.path.dirname(_in_site(origin))
    return text, {os.path.join(at, name): data for name, data in made["outputs"].items()}
