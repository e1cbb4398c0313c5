"""Pages of one HTML file, with their style and pictures in them: no script, nothing to load."""

from collections.abc import Iterable, Sequence

from bipe_jax.report import svg
from bipe_jax.report.text import escaped

_STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1c1c1a; --soft: #5f5e5a; --line: #dddcd7;
  --bar: #2a6fb5; --even: #d9e8f8; --odd: #fbe6c8; --end: #b3261e; --card: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --paper: #161615; --ink: #ecebe6; --soft: #a5a39c;
  --line: #3a3936; --bar: #6aa9e9; --even: #1d3a59; --odd: #52391a; --end: #ff8f85; --card: #1f1f1d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .3rem; }
h3 { margin: 1.4rem 0 .4rem; font-size: 1rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.warning { border-left: 3px solid var(--end); padding-left: .7rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .875em ui-monospace, monospace; border: 1px solid var(--line); border-radius: 3px;
  padding: 0 .25em; white-space: pre; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } :is(th, td):is(:first-child, .text) { text-align: left; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: .8rem; }
figure { margin: 0; padding: .7rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; min-width: 0; }
figure b { overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media (max-width: 40rem) { dl { display: block; } dt { margin-top: .5rem; }
  table { font-size: .8rem; } th, td { padding: .25rem .35rem; } }
"""


class Markup(str):
    """HTML that is shown as it is, where other values would be escaped."""


def shown(value) -> str:
    """A value's HTML."""
    return value if isinstance(value, Markup) else escaped(value)


def table(head: Sequence, rows: Iterable[Sequence], texts: int = 1) -> str:
    """The first columns, which hold texts, are set to the left, the others to the right."""

    def cell(tag, i, value):
        attribute = ' class="text"' if 0 < i < texts else ""
        return f"<{tag}{attribute}>{shown(value)}</{tag}>"

    def cells(row, tag):
        return "".join(cell(tag, i, value) for i, value in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{cells(head, "th")}</tr>\n{body}</table></div>'


def facts(named: Iterable[tuple]) -> str:
    """Pairs of a name and a value."""
    pairs = "".join(f"<dt>{escaped(name)}</dt><dd>{shown(value)}</dd>\n" for name, value in named)
    return f"<dl>{pairs}</dl>"


def figure(title, picture: str, caption="", kind="") -> str:
    """A picture on a card. picture: HTML; title and caption are values; kind: a class."""
    title = f"<b>{shown(title)}</b>" if title else ""
    caption = f"<figcaption>{shown(caption)}</figcaption>" if caption else ""
    attribute = f' class="{kind}"' if kind else ""
    return f"<figure{attribute}>{title}{picture}{caption}</figure>"


def grid(figures: Iterable[str], kind: str = "") -> str:
    return f'<div class="{f"grid {kind}".strip()}">{"".join(figures)}</div>'


def folded(summary, body: str, is_open: bool) -> str:
    """What a click on the summary shows and hides."""
    attribute = " open" if is_open else ""
    return f"<details{attribute}><summary>{shown(summary)}</summary>{body}</details>"


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """The whole file. body: HTML, lines."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}{svg.STYLE}{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
