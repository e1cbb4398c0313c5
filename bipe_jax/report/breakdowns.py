"""Loss by coordinate, and the coordinates that training never saw."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from bipe_jax.report import charts
from bipe_jax.report.charts import Curve, Lines, Point, Style
from bipe_jax.report.results import Breakdown, Evaluation, Run
from bipe_jax.report.webpage import Figure, Table

_BY = {
    "position": ("Loss by position in the block", "position (tokens)"),
    "offset": ("Loss by offset in the segment", "offset (tokens)"),
    "segment": ("Loss by segments from the block's start", "segment (number in the block)"),
}


def section(runs: Sequence[Run]) -> list[dict]:
    """The values of the page's section: a curve for each run, or for each length of a single run."""
    parts = [
        (r.name, part, r.evaluation)
        for r in runs
        if r.evaluation
        for part in r.evaluation.breakdowns
    ]
    names = {name for name, *_ in parts}
    lengths = sorted({part.length for _, part, _ in parts})
    several = len(names) > 1
    if several:
        styles = {run.name: charts.series(i) for i, run in enumerate(runs) if run.name in names}
    else:
        styles = {f"{n:,} tokens": charts.ramp(i, len(lengths)) for i, n in enumerate(lengths)}
    legend = [(charts.key(style), name) for name, style in styles.items()]
    shown = []
    for by in dict.fromkeys(part.by for _, part, _ in parts):
        title, axis = _BY.get(by, (f"Loss by {by}", by))
        groups: dict[str, list] = {}
        for name, part, evaluation in sorted(parts, key=lambda entry: -entry[1].length * several):
            if part.by == by:
                tokens = f"{part.length:,} tokens"
                style = styles[name if several else tokens]
                groups.setdefault(tokens if several else "", []).append(
                    (style, name, part, evaluation)
                )
        figures = {name: _of_sets(styled, axis) for name, styled in groups.items()}
        shown.append({"title": title, "legend": legend, "groups": figures})
    return shown


def _of_sets(styled: Sequence[tuple[Style, str, Breakdown, Evaluation]], axis: str) -> list[Figure]:
    """A figure for each data set, with a curve for each breakdown."""
    figures = []
    for name in dict.fromkeys(part.set for _, _, part, _ in styled):
        curves, top, trained = [], 0, set()
        for style, run, part, evaluation in styled:
            if part.set != name:
                continue
            points = []
            for b in part.bins:
                if b.tokens and b.loss is not None:
                    text = (
                        f"{run}, {part.length:,} tokens, {part.by} {b}: {b.loss:.4f} nats, "
                        f"{b.tokens:,} tokens"
                    )
                    points.append(Point(math.sqrt((b.low + 1) * (b.high + 1)) - 1, b.loss, text))
                    top = max(top, b.high)
            curves.append(Curve(style, points))
            trained |= {
                row.trained_max
                for row in evaluation.unseen
                if (row.set, row.coordinate) == (name, part.by)
            }
        ticks = {0, *(1 << i for i in range(top.bit_length()))}
        lines = Lines(
            curves, axis, "loss (nats)", ticks, trained, charts.DOUBLINGS_OF_NEXT, x_reach=[top]
        )
        figures.append(charts.figure(name, lines, f"{name}: loss by {axis}"))
    return figures


def unseen(runs: Sequence[Run]) -> Table | None:
    """The largest coordinates at each length, and the share that is larger than in training."""
    rows = [(run.name, row) for run in runs if run.evaluation for row in run.evaluation.unseen]
    if not rows:
        return None
    lengths = sorted({row.length for _, row in rows})
    lines: dict = {}
    for name, row in rows:
        cell = f"{row.share:.1%} to {row.max:,}"
        if row.share:
            cell = Markup('<span class="new">{}</span>').format(cell)
        key = (name, row.set, row.coordinate, f"{row.trained_max:,}")
        lines.setdefault(key, {})[row.length] = cell
    first = 0 if len(runs) > 1 else 1  # a single run has no column of names
    head = ["run", "data set", "coordinate", "trained to", *(f"{n:,}" for n in lengths)][first:]
    cells = [
        [*key[first:], *(of_key.get(n, "–") for n in lengths)] for key, of_key in lines.items()
    ]
    return Table(head, cells, texts=3 - first)
