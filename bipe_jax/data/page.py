"""The page of a survey: one HTML file with its style and pictures in it, and no script."""

import html
import math

from bipe_jax.data.sample import Block
from bipe_jax.data.survey import Survey
from bipe_jax.text import visible

_MOST_SETS = 24  # that have pictures
_SEPARATORS = 40  # pieces of a rule that are listed
_WIDTH, _HEIGHT = 320, 150  # of a picture, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 10, 12, 22  # its margins

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
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .875em ui-monospace, monospace; border: 1px solid var(--line); border-radius: 3px;
  padding: 0 .25em; white-space: pre; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } :is(th, td):first-child { text-align: left; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: .8rem; }
figure { margin: 0; padding: .7rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; min-width: 0; }
figure b { overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg line { stroke: var(--line); }
svg rect { fill: var(--bar); } svg .hit { fill: transparent; }
svg g:hover .bar { fill: var(--ink); }
.block { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.75 ui-monospace, monospace;
  tab-size: 4; margin: .4rem 0 0; }
.block span { padding: .1em 0; } .e { background: var(--even); } .o { background: var(--odd); }
.s { color: var(--end); font-weight: 700; border-bottom: 2px solid var(--end); }
.block span:hover { outline: 1.5px solid var(--ink); }
sup { color: var(--soft); font: 10px/1 system-ui, sans-serif; padding: 0 1px 0 3px; }
.border { display: block; border-top: 2px dashed var(--soft); color: var(--soft); margin: .5rem 0 .1rem;
  font: 12px/1.6 system-ui, sans-serif; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media (max-width: 40rem) { dl { display: block; } dt { margin-top: .5rem; }
  table { font-size: .8rem; } th, td { padding: .25rem .35rem; } }
"""


def _text(text) -> str:
    return html.escape(visible(str(text)))


def _table(head: list, rows: list) -> str:
    def cells(row, tag):
        return "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{cells(head, "th")}</tr>\n{body}</table></div>'


def _all(rows: dict) -> list:
    return [histogram for row in rows.values() for histogram in row.values()]


def _powers(rows: dict) -> list[tuple[int, int]]:
    """Bins from a power of two to below the next, that hold all numbers."""
    low, high = min(h.quantile(0) for h in _all(rows)), max(h.max for h in _all(rows))
    return [
        (1 << i, (2 << i) - 1)
        for i in range(max(low, 1).bit_length() - 1, max(high, 1).bit_length())
    ]


def _even(rows: dict) -> list[tuple[int, int]]:
    """Some twenty bins of the same, round width, that hold 99 % of each."""
    low = min(h.quantile(0.005) for h in _all(rows))
    high = max(h.quantile(0.995) for h in _all(rows))
    width = max((high - low) / 20, 1)
    unit = 10 ** math.floor(math.log10(width))
    width = int(next(unit * n for n in (1, 2, 5, 10) if unit * n >= width))
    return [(start, start + width - 1) for start in range(low // width * width, high + 1, width)]


def _short(number: int) -> str:
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= size and number % size == 0:
            return f"{number // size}{letter}"
    return f"{number:,}"


def _picture(histogram, bins, top: float, unit: str, of: str) -> str:
    """Bars of the share of each bin.

    Args:
      top: share that the highest bar of all pictures beside it has.
      unit: what the numbers count. of: what is counted.
    """
    total = histogram.total
    step = (_WIDTH - _LEFT - _RIGHT) / len(bins)
    inner = _HEIGHT - _TOP - _BOTTOM
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(of)} by {_text(unit)}">'
    ]
    for share in (0.0, top / 2, top):
        y = _TOP + inner * (1 - share / top)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    every = -(-len(bins) // 7)
    for i, (low, high) in enumerate(bins):
        x, count = _LEFT + i * step, histogram.between(low, high)
        height = inner * count / total / top
        if count:
            height = max(height, 1)  # what is there shows
        label = f"{low:,}" if low == high else f"{low:,}–{high:,}"
        parts.append(
            f"<g><title>{label} {_text(unit)}: {count:,} {_text(of)} ({count / total:.2%})</title>"
            f'<rect class="hit" x="{x:.1f}" y="{_TOP}" width="{step:.1f}" height="{inner}"/>'
            f'<rect class="bar" x="{x + 1:.1f}" y="{_TOP + inner - height:.1f}" width="{step - 2:.1f}" '
            f'height="{height:.1f}"/></g>'
        )
        if i % every == 0:
            middle = f'x="{x + step / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle"'
            parts.append(f"<text {middle}>{_short(low)}</text>")
    return "".join([*parts, "</svg>"])


def _numbers(histogram) -> str:
    mean = f"{histogram.mean:,.{1 if histogram.mean < 1000 else 0}f}"
    return (
        f"mean {mean} · median {histogram.quantile(0.5):,} · "
        f"p99 {histogram.quantile(0.99):,} · max {histogram.max:,}"
    )


def _pictures(rows: dict, bins, unit: str, of: str) -> str:
    """Pictures with the same scales: {title: {caption: histogram}}, a row each."""
    highest = max(h.between(*b) / h.total for h in _all(rows) for b in bins)
    parts = 10 if highest > 0.2 else 50
    top = max(math.ceil(highest * parts), 1) / parts
    found = []
    for title, row in rows.items():
        figures = (
            f"<figure><b>{_text(name)}</b>{_picture(histogram, bins, top, unit, of)}"
            f"<figcaption>{_numbers(histogram)}</figcaption></figure>"
            for name, histogram in row.items()
        )
        heading = f"<h3>{_text(title)}</h3>" if title else ""
        found.append(f'{heading}<div class="grid">{"".join(figures)}</div>')
    return "".join(found)


def _block(block: Block) -> str:
    parts = ['<div class="block">']
    for i, text in enumerate(block.texts):
        segment, offset = int(block.segment[i]), int(block.offset[i])
        if i and block.document_ids[i] != block.document_ids[i - 1]:
            parts.append(f'<b class="border">document {block.document_ids[i]} of the block</b>')
        if offset == 0:
            parts.append(f"<sup>{segment}</sup>")
        title = f"position {block.position[i]} · segment {segment} · offset {offset}"
        kind = "eo"[segment % 2] + (" s" if block.ends[i] else "")
        parts.append(f'<span class="{kind}" title="{title}">{_text(text)}</span>')
    return "".join([*parts, "</div>"])


def _alike(survey: Survey) -> list[list[str]]:
    """The rules' names; those that split at the same tokens are together."""
    found: dict = {}
    for name, rule in survey.rules.items():
        found.setdefault(rule, []).append(name)
    return list(found.values())


def remarks(survey: Survey) -> list[str]:
    """What a reader must know of the numbers."""
    found = [f"This is {survey.note}."] if survey.note else []
    for names in _alike(survey):
        if len(names) > 1:
            found.append(f"With this tokenizer the rules {' and '.join(names)} are the same.")
    if not survey.whole:
        found.append("Documents and segments are cut at the ends of the prepared blocks.")
    if survey.faults:
        listed = ", ".join(
            f"{kind.replace('_', ' ')}: {n:,}" for kind, n in sorted(survey.faults.items())
        )
        found.append(f"Could not be used: {listed}.")
    else:
        found.append("Nothing that was read was bad.")
    return found


def _rules(survey: Survey, pieces: list[str]) -> list[tuple[str, str]]:
    """(name, HTML) of each rule, with the pieces that it splits at."""
    found = []
    for name, rule in survey.rules.items():
        if rule.length:
            found.append((f"Rule {name}", f"a segment every {rule.length} tokens"))
            continue
        shown = " ".join(
            f"<code>{_text(pieces[i]).replace(chr(10), '')}</code>"
            for i in rule.separators[:_SEPARATORS]
        )
        more = len(rule.separators) - _SEPARATORS
        rest = f" and {more:,} more" if more > 0 else ""
        found.append((f"Rule {name}", f"{len(rule.separators):,} separators: {shown}{rest}"))
    return found


def render(survey: Survey, facts: dict, blocks: dict, pieces: list[str]) -> str:
    """The page.

    Args:
      facts: name -> text, of what was surveyed; "Data" is one.
      blocks: (set, rule) -> a list of `Block`.
      pieces: of the tokenizer.
    """
    sets = dict(list(survey.sets.items())[:_MOST_SETS])
    rules = {names[0]: ", also ".join(names) for names in _alike(survey)}
    title = f"Segments of {_text(facts['Data'])}"
    total = sum(s.tokens for s in survey.sets.values())
    listed = [(name, _text(value)) for name, value in facts.items()] + _rules(survey, pieces)
    body = [
        f"<h1>{title}</h1>",
        "<dl>",
        *(f"<dt>{_text(name)}</dt><dd>{value}</dd>" for name, value in listed),
        "</dl>",
        *(f"<p>{_text(line)}</p>" for line in remarks(survey)),
        "<h2>Sets</h2>",
        _table(
            ["set", "documents", "bytes", "tokens", "tokens/byte", "share of tokens"],
            [
                (name, f"{s.documents:,}", f"{s.text_bytes:,}", f"{s.tokens:,}",
                 f"{s.tokens / max(s.text_bytes, 1):.3f}", f"{s.tokens / total:.1%}")
                for name, s in survey.sets.items()
            ],
        ),
    ]  # fmt: skip
    if len(sets) < len(survey.sets):
        body.append(f"<p>Pictures show the {len(sets)} largest sets of {len(survey.sets)}.</p>")

    def of_rules(field: str) -> dict:
        rows = {
            shown: {n: getattr(s, field)[r] for n, s in sets.items()} for r, shown in rules.items()
        }
        return {shown: {n: h for n, h in row.items() if h.total} for shown, row in rows.items()}

    rows = of_rules("segments")
    body += [
        "<h2>Tokens a segment</h2>",
        '<p class="soft">Bars: share of the segments, from each power of two to the next. Point at one '
        "for its numbers.</p>",
        _pictures(rows, _powers(rows), "tokens", "segments"),
        f"<h2>Segments a block of {survey.block:,} tokens</h2>",
    ]
    if any((rows := of_rules("per_block")).values()):
        body += [
            '<p class="soft">Bars: share of the blocks; one in a hundred may lie outside of the picture. '
            "A relative encoding of segments must cover this range.</p>",
            _pictures(rows, _even(rows), "segments", "blocks"),
        ]
    else:
        body.append(f"<p>No set has {survey.block:,} tokens.</p>")
    unit = "document" if survey.whole else "document's part"
    rows = {"": {name: s.lengths for name, s in sets.items()}}
    body += [
        f"<h2>Tokens a {unit}</h2>",
        _pictures(rows, _powers(rows), "tokens", unit + "s"),
        "<h2>What it looks like</h2>",
        '<p class="soft">The same tokens under each rule. Small numbers count the segments, whose '
        "colours alternate; separators are underlined and end theirs. Point at a token for its "
        "coordinates. Dashed lines are borders of documents, which segments do not heed unless "
        "documents are kept separate.</p>",
    ]
    for name in sets:
        body.append(f"<h3>{_text(name)}</h3>")
        for i, (rule, shown) in enumerate(rules.items()):
            some = blocks[name, rule]
            counts = " and ".join(str(int(block.segment[-1]) + 1) for block in some)
            body.append(
                f"<details{'' if i else ' open'}><summary>{_text(shown)}: {counts} segments</summary>"
                f"{''.join(map(_block, some))}</details>"
            )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
