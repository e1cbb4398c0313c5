"""Loss by place in the block, and the places that training never saw."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from bipe_jax.report import charts
from bipe_jax.report.charts import Curve, Lines, Point, Style
from bipe_jax.report.results import Breakdown, Run
from bipe_jax.report.webpage import Figure, Table

_BY = {
    "position": ("Loss by position in the block", "position (tokens)"),
    "offset": ("Loss by offset in the segment", "offset (tokens)"),
    "segment": ("Loss by segments from the block's start", "segment (number in the block)"),
}


def section(runs: Sequence[Run]) -> list[dict]:
    """What the page shows of each coordinate: a curve a run or, of a single run, a curve a length."""
    parts = [(run, part) for run in runs if run.evaluation for part in run.evaluation.breakdowns]
    names = [run.name for run in runs if run.evaluation and run.evaluation.breakdowns]
    lengths = sorted({part.length for _, part in parts})
    several = len(names) > 1
    if several:
        styles = {run.name: charts.series(i) for i, run in enumerate(runs) if run.name in names}
        legend = [(charts.key(style), name) for name, style in styles.items()]
    else:
        styles = {n: charts.ramp(i, len(lengths)) for i, n in enumerate(lengths)}
        legend = [(charts.key(style), f"{n:,} tokens") for n, style in styles.items()]
    shown = []
    for by in dict.fromkeys(part.by for _, part in parts):
        title, axis = _BY.get(by, (f"Loss by {by}", by))
        styled = [
            (styles[run.name if several else part.length], run, part)
            for run, part in parts
            if part.by == by
        ]
        groups = {"": styled}
        if several:
            of_lengths = {n: [s for s in styled if s[2].length == n] for n in reversed(lengths)}
            groups = {f"{n:,} tokens": some for n, some in of_lengths.items() if some}
        figures = {name: _of_sets(some, axis) for name, some in groups.items()}
        shown.append({"title": title, "legend": legend, "groups": figures})
    return shown


def _of_sets(styled: Sequence[tuple[Style, Run, Breakdown]], axis: str) -> list[Figure]:
    """For each set, a curve for each breakdown."""
    figures = []
    for name in dict.fromkeys(part.set for *_, part in styled):
        curves, top, trained = [], 0, set()
        for style, run, part in styled:
            if part.set != name:
                continue
            bins = [b for b in part.bins if b.tokens and b.loss is not None]
            curves.append(Curve(style, [
                Point(
                    math.sqrt((b.low + 1) * (b.high + 1)) - 1, b.loss,
                    f"{run.name}, {part.length:,} tokens, {part.by} {b}: {b.loss:.4f} nats, "
                    f"{b.tokens:,} tokens",
                )
                for b in bins
            ]))  # fmt: skip
            top = max([top, *(b.high for b in bins)])
            trained |= {
                row.trained_max
                for row in run.evaluation.unseen
                if (row.set, row.coordinate) == (name, part.by)
            }
        ticks = {0, *(1 << i for i in range(top.bit_length()))}
        lines = Lines(
            curves, axis, "loss (nats)", ticks, trained, charts.DOUBLINGS_OF_NEXT, x_reach=[top]
        )
        figures.append(Figure(name, charts.inline(lines, f"{name}: loss by {axis}")))
    return figures


def unseen(runs: Sequence[Run]) -> Table | None:
    """The largest coordinates at each length, and how many of them are larger than in training."""
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
    first = 0 if len(runs) > 1 else 1  # whether the name of the run is a column
    head = ["run", "data set", "coordinate", "trained to", *(f"{n:,}" for n in lengths)][first:]
    cells = [
        [*key[first:], *(of_key.get(n, "–") for n in lengths)] for key, of_key in lines.items()
    ]
    return Table(head, cells, texts=3 - first)
