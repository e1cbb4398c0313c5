"""Attention by distance: means, and maps of all layers and heads."""

import math
from collections.abc import Sequence

from bipe_jax.report import axes, svg, webpage
from bipe_jax.report.parts import legend, span, unique
from bipe_jax.report.results import Run
from bipe_jax.report.text import escaped

_BY = {"segment": "distance in segments", "position": "distance in tokens"}


def section(runs: Sequence[Run]) -> list[str]:
    """HTML, empty if no run has an attention.json."""
    found = [run for run in runs if run.attention]
    if not found:
        return []
    body = [
        '<h2 id="attention">Attention by distance</h2>',
        '<p class="soft">Weight of attention on tokens at each distance from the query, 0 being the '
        "query's own segment or token; each curve, and each small chart, adds up to 100%. Distances "
        "are in ranges from each power of two to the next.</p>",
    ]
    for run in found:
        if len(runs) > 1:
            body.append(f"<h3>{escaped(run.name)}</h3>")
        body += _of_run(run)
    return body


def _of_run(run: Run) -> list[str]:
    rows = run.attention["results"]
    lengths = sorted({row["length"] for row in rows})
    styles = {length: svg.ramp(i, len(lengths)) for i, length in enumerate(lengths)}
    kinds = unique(row["by"] for row in rows)
    body = [legend((style, f"{length:,} tokens") for length, style in styles.items())]
    body.append(webpage.grid((_means(run, by, styles) for by in kinds), "large"))
    for length in reversed(lengths):
        figures = [_map(run, by, length) for by in kinds]
        figures += [
            _heads(run, length, "entropy", "Entropy (nats)", "{:.1f}", 1.0),
            _heads(run, length, "first", "Weight on the block's first token (%)", "{:.1f}", 100.0),
        ]
        summary = f"Layers and heads at {length:,} tokens"
        body.append(
            webpage.folded(
                summary, webpage.grid(filter(None, figures), "maps"), length == lengths[-1]
            )
        )
    return body


def _means(run: Run, by: str, styles: dict) -> str:
    """Mean over all layers and heads: a curve a length."""
    curves, starts = [], set()
    for length, style in styles.items():
        held = [
            row["bins"]
            for row in run.attention["results"]
            if (row["by"], row["length"]) == (by, length)
        ]
        sums: dict[int, float] = {}
        names: dict[int, str] = {}
        for part in (part for bins in held for part in bins):
            sums[part["from"]] = sums.get(part["from"], 0.0) + part["weight"]
            names[part["from"]] = span(part)
        points = [
            svg.Point(low, sums[low] / len(held), 0,
                      f"{length:,} tokens, distance {names[low]}: {sums[low] / len(held):.2%}")
            for low in sorted(sums)
        ]  # fmt: skip
        curves.append(svg.Curve(style, points))
        starts |= set(sums)
    # One step of the axis a bin, as bins double.
    x = axes.places_axis(_BY.get(by, by), starts, lambda d: math.log2(d) + 1 if d >= 1 else d)
    y = axes.number_axis("weight", [p.y for c in curves for p in c.points], zero=True, percent=True)
    title = f"{x.name.capitalize()}, mean of all heads"
    return webpage.figure(title, svg.lines(curves, x, y, f"{run.name}: {title}"))


def _places(rows: Sequence[dict]) -> tuple[list[int], list[int]]:
    return sorted({row["layer"] for row in rows}), sorted({row["head"] for row in rows})


def _map(run: Run, by: str, length: int) -> str:
    rows = [r for r in run.attention["results"] if (r["by"], r["length"]) == (by, length)]
    if not rows:
        return ""
    layers, heads = _places(rows)
    top = max((part["weight"] for row in rows for part in row["bins"]), default=0) or 1.0
    cells = {
        (layers.index(row["layer"]), heads.index(row["head"])): svg.Small(
            [part["weight"] for part in row["bins"]],
            f"layer {row['layer']}, head {row['head']}\n"
            + "\n".join(f"{span(part)}: {part['weight']:.1%}" for part in row["bins"]),
        )
        for row in rows
    }
    alike = next(
        (
            [part["weight"] for part in row["bins"]]
            for row in run.attention.get("uniform", ())
            if (row["by"], row["length"]) == (by, length)
        ),
        [],
    )
    name = _BY.get(by, by)
    picture = svg.small_bars(
        [str(n) for n in layers], [str(n) for n in heads], cells, ("layer", "head"), top,
        f"{run.name}: attention by {name} in each layer and head, at {length:,} tokens", alike,
    )  # fmt: skip
    bins = rows[0]["bins"]
    line = "; the lines: the same weight for all tokens" if alike else ""
    caption = (
        f"Bars from left to right: {', '.join(map(span, bins))}. Full height: {top:.0%}{line}."
    )
    return webpage.figure(name.capitalize(), f'<div class="wide">{picture}</div>', caption)


def _heads(run: Run, length: int, key: str, title: str, form: str, factor: float) -> str:
    """A heat map of one number a head; the colour is strongest at the largest."""
    rows = [row for row in run.attention.get("heads", ()) if row["length"] == length]
    if not rows:
        return ""
    layers, heads = _places(rows)
    top = max(row[key] for row in rows) or 1.0
    cells = {
        (layers.index(row["layer"]), heads.index(row["head"])): svg.Cell(
            row[key] / top,
            form.format(row[key] * factor),
            f"layer {row['layer']}, head {row['head']}: {row[key] * factor:.3f}",
        )
        for row in rows
    }
    picture = svg.heat(
        [str(n) for n in layers], [str(n) for n in heads], cells, ("layer", "head"),
        f"{run.name}: {title} at {length:,} tokens", wide=32,
    )  # fmt: skip
    return webpage.figure(title, f'<div class="wide">{picture}</div>')
