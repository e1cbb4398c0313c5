"""Attention by distance: means, and maps of all layers and heads."""

from collections.abc import Sequence

from bipe_jax.report import charts
from bipe_jax.report.cells import Cell, Field
from bipe_jax.report.charts import Curve, Lines, Point, Style
from bipe_jax.report.results import Attention, Head, HeadAttention, Run
from bipe_jax.report.webpage import Figure

_BY = {"segment": "distance in segments", "position": "distance in tokens"}
_OF_HEADS = (  # title, field, factor
    ("Entropy (nats)", "entropy", 1.0),
    ("Weight on the block's first token (%)", "first", 100.0),
)


def section(runs: Sequence[Run]) -> list[dict]:
    """The values of the page's section, for each run with an attention.json."""
    shown = []
    for run in runs:
        attention = run.attention
        if not attention:
            continue
        lengths = sorted({row.length for row in attention.results})
        kinds = dict.fromkeys(row.by for row in attention.results)
        styles = {n: charts.ramp(i, len(lengths)) for i, n in enumerate(lengths)}
        groups = {
            f"Layers and heads at {n:,} tokens": [
                *(_map(run.name, attention, by, n) for by in kinds if _of(attention, by, n)),
                *_heads(run.name, [row for row in attention.heads if row.length == n]),
            ]
            for n in reversed(lengths)
        }
        legend = [(charts.key(style), f"{n:,} tokens") for n, style in styles.items()]
        means = [_means(run.name, attention, by, styles) for by in kinds]
        name = run.name if len(runs) > 1 else ""
        shown.append({"name": name, "legend": legend, "means": means, "groups": groups})
    return shown


def _of(attention: Attention, by: str, length: int) -> list[HeadAttention]:
    return [row for row in attention.results if (row.by, row.length) == (by, length)]


def _means(run: str, attention: Attention, by: str, styles: dict[int, Style]) -> Figure:
    """Mean over all layers and heads: a curve for each length."""
    curves = []
    for length, style in styles.items():
        rows = _of(attention, by, length)
        weights: dict[int, float] = {}
        for part in (part for row in rows for part in row.bins):
            weights[part.low] = weights.get(part.low, 0.0) + part.weight / len(rows)
        ranges = {part.low: part for row in rows for part in row.bins}
        points = [
            Point(low, mean, f"{length:,} tokens, distance {ranges[low]}: {mean:.2%}")
            for low, mean in sorted(weights.items())
        ]
        curves.append(Curve(style, points))
    name = _BY.get(by, by)
    title = f"{name.capitalize()}, mean of all heads"
    ticks = {int(p.x) for curve in curves for p in curve.points}
    lines = Lines(curves, name, "weight", ticks, scale=charts.DOUBLING_BINS, shares=True)
    return charts.figure(title, lines, f"{run}: {title}")


def _map(run: str, attention: Attention, by: str, length: int) -> Figure:
    """A small chart for each layer and head."""
    rows = _of(attention, by, length)
    cells = {
        (row.layer, row.head): Cell(
            f"layer {row.layer}, head {row.head}\n"
            + "\n".join(f"{part}: {part.weight:.1%}" for part in row.bins),
            shares=[part.weight for part in row.bins],
        )
        for row in rows
    }
    top = max((part.weight for row in rows for part in row.bins), default=0) or 1.0
    uniform = [row.bins for row in attention.uniform if (row.by, row.length) == (by, length)]
    shares = [part.weight for part in uniform[0]] if uniform else []
    name = _BY.get(by, by)
    title = f"{run}: attention by {name} in each layer and head, at {length:,} tokens"
    field = Field(*_axes(rows), cells, top=top, uniform=shares)
    line = "; the lines: the same weight for all tokens" if shares else ""
    ranges = ", ".join(map(str, rows[0].bins))
    caption = f"Bars from left to right: {ranges}. Full height: {top:.0%}{line}."
    return charts.figure(name.capitalize(), field, title, caption)


def _heads(run: str, rows: Sequence[Head]) -> list[Figure]:
    """Heat maps of one number for each head; the colour is strongest at the largest."""
    shown = []
    for title, field, factor in _OF_HEADS if rows else ():
        top = max(getattr(row, field) for row in rows) or 1.0
        cells = {}
        for row in rows:
            value = getattr(row, field)
            text = f"layer {row.layer}, head {row.head}: {value * factor:.3f}"
            cells[row.layer, row.head] = Cell(text, value / top, f"{value * factor:.1f}")
        heat = Field(*_axes(rows), cells, wide=32)
        text = f"{run}: {title} at {rows[0].length:,} tokens"
        shown.append(charts.figure(title, heat, text))
    return shown


def _axes(rows: Sequence[HeadAttention | Head]) -> tuple[dict, dict, tuple[str, str]]:
    """The layers and the heads with their labels, and the names of the axes."""
    layers, heads = sorted({row.layer for row in rows}), sorted({row.head for row in rows})
    return {n: str(n) for n in layers}, {n: str(n) for n in heads}, ("layer", "head")
