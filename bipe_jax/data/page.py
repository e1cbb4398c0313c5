"""The page of a survey."""

import math

from bipe_jax.data.sample import Block
from bipe_jax.data.survey import Survey
from bipe_jax.report import axes, svg, webpage
from bipe_jax.report.text import escaped

_MOST_SETS = 24  # that have pictures
_SEPARATORS = 40  # pieces of a rule that are listed

_STYLE = """
.block { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.75 ui-monospace, monospace;
  tab-size: 4; margin: .4rem 0 0; }
.block span { padding: .1em 0; } .e { background: var(--even); } .o { background: var(--odd); }
.s { color: var(--end); font-weight: 700; border-bottom: 2px solid var(--end); }
.block span:hover { outline: 1.5px solid var(--ink); }
sup { color: var(--soft); font: 10px/1 system-ui, sans-serif; padding: 0 1px 0 3px; }
.border { display: block; border-top: 2px dashed var(--soft); color: var(--soft); margin: .5rem 0 .1rem;
  font: 12px/1.6 system-ui, sans-serif; }
"""


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


def _picture(histogram, bins, top: float, unit: str, of: str) -> str:
    """Bars of the share of each bin.

    Args:
      top: share that the highest bar of all pictures beside it has.
      unit: what the numbers count. of: what is counted.
    """
    bars = []
    for low, high in bins:
        count = histogram.between(low, high)
        share = count / histogram.total
        label = f"{low:,}" if low == high else f"{low:,}–{high:,}"
        title = f"{label} {unit}: {count:,} {of} ({share:.2%})"
        bars.append(svg.Bar(axes.short(low), share, title))
    return svg.bars(bars, top, f"{of} by {unit}")


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
            webpage.figure(name, _picture(histogram, bins, top, unit, of), _numbers(histogram))
            for name, histogram in row.items()
        )
        heading = f"<h3>{escaped(title)}</h3>" if title else ""
        found.append(heading + webpage.grid(figures))
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
        parts.append(f'<span class="{kind}" title="{title}">{escaped(text)}</span>')
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
    """(name, text) of each rule, with the pieces that it splits at."""
    found = []
    for name, rule in survey.rules.items():
        if rule.length:
            found.append((f"Rule {name}", f"a segment every {rule.length} tokens"))
            continue
        shown = " ".join(
            f"<code>{escaped(pieces[i]).replace(chr(10), '')}</code>"
            for i in rule.separators[:_SEPARATORS]
        )
        more = len(rule.separators) - _SEPARATORS
        rest = f" and {more:,} more" if more > 0 else ""
        listed = f"{len(rule.separators):,} separators: {shown}{rest}"
        found.append((f"Rule {name}", webpage.Markup(listed)))
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
    title = f"Segments of {facts['Data']}"
    total = sum(s.tokens for s in survey.sets.values())
    listed = [*facts.items(), *_rules(survey, pieces)]
    body = [
        f"<h1>{escaped(title)}</h1>",
        webpage.facts(listed),
        *(f"<p>{escaped(line)}</p>" for line in remarks(survey)),
        "<h2>Sets</h2>",
        webpage.table(
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
        body.append(f"<h3>{escaped(name)}</h3>")
        for i, (rule, shown) in enumerate(rules.items()):
            some = blocks[name, rule]
            counts = " and ".join(str(int(block.segment[-1]) + 1) for block in some)
            summary = f"{shown}: {counts} segments"
            body.append(webpage.folded(summary, "".join(map(_block, some)), is_open=i == 0))
    return webpage.page(title, body, _STYLE)
