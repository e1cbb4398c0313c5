"""The HTML page of a survey."""

import math
from collections.abc import Iterator, Mapping

from markupsafe import Markup

from bipe_jax.data.lines import REASONS
from bipe_jax.data.survey import Histogram, Survey
from bipe_jax.report import charts, webpage
from bipe_jax.report.text import visible
from bipe_jax.report.webpage import Figure, Table

_MOST_SETS = 24  # sets with figures
_SEPARATORS = 40  # pieces of a rule that are listed

Rows = Mapping[str, Mapping[str, Histogram]]  # title of a row -> data set -> histogram


def render(survey: Survey, facts: dict, blocks: dict, pieces: list[str]) -> str:
    """The page as HTML.

    Args:
      survey: the statistics.
      facts: name -> text, shown at the top; "Data" is one of them.
      blocks: (set, rule) -> list of `sample.Block`.
      pieces: of the tokenizer.
    """
    sets = dict(list(survey.sets.items())[:_MOST_SETS])
    rules = {names[0]: ", also ".join(names) for names in _alike(survey)}
    head = ["set", "documents", "bytes", "tokens", "tokens/byte", "share of tokens"]

    def of_rules(field: str) -> Rows:
        return {
            shown: {n: h for n, s in sets.items() if (h := getattr(s, field)[rule]).total}
            for rule, shown in rules.items()
        }

    segments, per_block = of_rules("segments"), of_rules("per_block")
    lengths = {"": {name: s.lengths for name, s in sets.items()}}
    unit = "document" if survey.whole else "document's part"
    return webpage.render(
        "inspection.html",
        title=f"Segments of {facts['Data']}",
        facts=[*facts.items(), *_rules(survey, pieces)],
        remarks=remarks(survey),
        sets=Table(head, rows_of_sets(survey)),
        pictured=len(sets),
        segments=_pictures(segments, _powers(segments), "tokens", "segments"),
        length=f"{survey.block:,}",
        per_block=any(per_block.values())
        and _pictures(per_block, _even(per_block), "segments", "blocks"),
        unit=unit,
        lengths=_pictures(lengths, _powers(lengths), "tokens", unit + "s"),
        blocks={
            name: {shown: blocks[name, rule] for rule, shown in rules.items()} for name in sets
        },
    )


def rows_of_sets(survey: Survey) -> list[tuple[str, ...]]:
    """Set, documents, bytes, tokens, tokens per byte and share of all tokens, of each set."""
    total = sum(s.tokens for s in survey.sets.values())
    return [
        (name, f"{s.documents:,}", f"{s.text_bytes:,}", f"{s.tokens:,}",
         f"{s.tokens / max(s.text_bytes, 1):.3f}", f"{s.tokens / total:.1%}")
        for name, s in survey.sets.items()
    ]  # fmt: skip


def remarks(survey: Survey) -> list[str]:
    """Remarks on the numbers: the sample, equal rules, cuts and faults."""
    lines = [f"This is {survey.note}."] if survey.note else []
    for names in _alike(survey):
        if len(names) > 1:
            lines.append(f"With this tokenizer the rules {' and '.join(names)} are the same.")
    if not survey.whole:
        lines.append("Documents and segments are cut at the ends of the prepared blocks.")
    if survey.faults:
        lines.append(f"Could not be used: {_listed(survey.faults)}.")
    else:
        lines.append("Nothing that was read was bad.")
    return lines


def _listed(faults: Mapping[str, int]) -> str:
    """The faults by kind, and bad lines by their reasons: "bad_lines/not_json" is of "bad_lines"."""
    reasons = {key: words for key, words in REASONS.items() if f"bad_lines/{key}" in faults}
    of_lines = ", ".join(
        f"{words}: {faults[f'bad_lines/{key}']:,}" for key, words in reasons.items()
    )
    kinds = sorted((kind, n) for kind, n in faults.items() if "/" not in kind)
    return ", ".join(
        f"{kind.replace('_', ' ')}: {n:,}" + (f" ({of_lines})" if kind == "bad_lines" else "")
        for kind, n in kinds
    )


def _alike(survey: Survey) -> list[list[str]]:
    """The names of the rules, grouped by equal rules."""
    names: dict = {}
    for name, rule in survey.rules.items():
        names.setdefault(rule, []).append(name)
    return list(names.values())


def _rules(survey: Survey, pieces: list[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of each rule, with its separators."""
    for name, rule in survey.rules.items():
        text = f"a segment every {rule.length} tokens"
        if rule.segmenter:
            text = "segments of a segmenter, which reads the whole text"
        elif rule.automaton:
            text = f"segments {'begin' if rule.before else 'end'} with the token that completes a match"
        elif not rule.length:
            count = len(rule.separators)
            listed = (visible(pieces[i]).replace("\n", "") for i in rule.separators[:_SEPARATORS])
            text = Markup(f"{count:,} separators: ") + Markup(" ").join(
                Markup("<code>{}</code>").format(piece) for piece in listed
            )
            text += f" and {count - _SEPARATORS:,} more" if count > _SEPARATORS else ""
        yield f"Rule {name}", text


def _all(rows: Rows) -> list[Histogram]:
    return [histogram for row in rows.values() for histogram in row.values()]


def _powers(rows: Rows) -> list[tuple[int, int]]:
    """Bins of all numbers, each from a power of two to below the next."""
    low, high = min(h.quantile(0) for h in _all(rows)), max(h.max for h in _all(rows))
    powers = range(max(low, 1).bit_length() - 1, max(high, 1).bit_length())
    return [(1 << i, (2 << i) - 1) for i in powers]


def _even(rows: Rows) -> list[tuple[int, int]]:
    """About twenty bins of one round width, for 99 % of each histogram."""
    low = min(h.quantile(0.005) for h in _all(rows))
    high = max(h.quantile(0.995) for h in _all(rows))
    width = max((high - low) / 20, 1)
    unit = 10 ** math.floor(math.log10(width))
    width = int(next(unit * n for n in (1, 2, 5, 10) if unit * n >= width))
    return [(start, start + width - 1) for start in range(low // width * width, high + 1, width)]


def _pictures(rows: Rows, bins, unit: str, of: str) -> dict[str, list[Figure]]:
    """Title of a row -> figures of its histograms, all with the same scale.

    Args:
      bins: the first and the last number of each bar.
      unit: of the numbers. of: name of the things that have them.
    """
    highest = max(h.between(*b) / h.total for h in _all(rows) for b in bins)
    parts = 10 if highest > 0.2 else 50
    top = max(math.ceil(highest * parts), 1) / parts

    def figure(name: str, h: Histogram) -> Figure:
        bars = []
        for low, high in bins:
            count = h.between(low, high)
            span = f"{low:,}" if low == high else f"{low:,}–{high:,}"
            title = f"{span} {unit}: {count:,} {of} ({count / h.total:.2%})"
            bars.append(charts.Bar(charts.short(low), count / h.total, title))
        caption = (
            f"mean {h.mean:,.{1 if h.mean < 1000 else 0}f} · median {h.quantile(0.5):,} · "
            f"p99 {h.quantile(0.99):,} · max {h.max:,}"
        )
        return charts.figure(name, charts.Bars(bars, top), f"{of} by {unit}", caption)

    return {title: [figure(*named) for named in row.items()] for title, row in rows.items()}
