"""Loss by place in the block, and the places that training never saw."""

import math
from collections.abc import Sequence

from bipe_jax.report import axes, svg, webpage
from bipe_jax.report.parts import legend, runs_legend, span, unique
from bipe_jax.report.results import Run
from bipe_jax.report.text import escaped
from bipe_jax.report.webpage import Markup

_BY = {
    "position": ("Loss by position in the block", "position (tokens)"),
    "offset": ("Loss by offset in the segment", "offset (tokens)"),
    "segment": ("Loss by segments from the block's start", "segment (number in the block)"),
}


def section(runs: Sequence[Run]) -> list[str]:
    """Curves of loss: one a run or, of a single run, one a length."""
    found = [
        (i, run, part)
        for i, run in enumerate(runs)
        if run.evaluation
        for part in run.evaluation.get("breakdowns", ())
    ]
    if not found:
        return []
    numbered = list({i: (i, run) for i, run, _ in found}.values())
    lengths = sorted({part["length"] for *_, part in found})
    body = [
        '<h2 id="breakdowns">Where the loss is</h2>',
        '<p class="soft">Nats a token, lower is better; a mark is the mean of a range. '
        "Point at one for its numbers.</p>",
    ]
    for by in unique(part["by"] for *_, part in found):
        some = [entry for entry in found if entry[2]["by"] == by]
        title, axis = _BY.get(by, (f"Loss by {by}", by))
        body.append(f"<h3>{escaped(title)}</h3>")
        if len(numbered) == 1:
            styles = {n: svg.ramp(i, len(lengths)) for i, n in enumerate(lengths)}
            body.append(legend((style, f"{n:,} tokens") for n, style in styles.items()))
            styled = [(styles[part["length"]], run, part) for _, run, part in some]
            body.append(_of_sets(styled, axis))
            continue
        body.append(runs_legend(numbered))
        for length in reversed(lengths):
            styled = [(svg.series(i), run, p) for i, run, p in some if p["length"] == length]
            if styled:
                text = f"{length:,} tokens"
                body.append(webpage.folded(text, _of_sets(styled, axis), length == lengths[-1]))
    return body


def _of_sets(styled: Sequence[tuple[svg.Style, Run, dict]], axis: str) -> str:
    """A figure for each set, of (style, run, breakdown)."""
    figures = []
    for name in unique(part["set"] for *_, part in styled):
        curves, places, trained = [], {0}, set()
        for style, run, part in styled:
            if part["set"] != name:
                continue
            held = [b for b in part["bins"] if b["tokens"] and b["loss"] is not None]
            curves.append(svg.Curve(style, [
                svg.Point(
                    math.sqrt((b["from"] + 1) * (b["to"] + 1)) - 1, b["loss"], 0,
                    f"{run.name}, {part['length']:,} tokens, {part['by']} {span(b)}: "
                    f"{b['loss']:.4f} nats, {b['tokens']:,} tokens",
                )
                for b in held
            ]))  # fmt: skip
            places |= {b[end] for b in held for end in ("from", "to")}
            trained |= {
                row["trained_max"]
                for row in run.evaluation.get("unseen", ())
                if (row["set"], row["coordinate"]) == (name, part["by"])
            }
        top = max(places)
        ticks = {0, *(1 << i for i in range(top.bit_length()))}
        x = axes.places_axis(axis, ticks, math.log1p, top)
        y = axes.number_axis("loss (nats)", [p.y for curve in curves for p in curve.points])
        picture = svg.lines(curves, x, y, f"{name}: {y.name} by {x.name}", trained)
        figures.append(webpage.figure(name, picture))
    return webpage.grid(figures, "large")


def unseen(runs: Sequence[Run]) -> list[str]:
    found = [
        (run, row) for run in runs if run.evaluation for row in run.evaluation.get("unseen", ())
    ]
    if not found:
        return []
    lengths = sorted({row["length"] for _, row in found})
    table: dict = {}
    for run, row in found:
        key = (*([run.name] if len(runs) > 1 else []), row["set"], row["coordinate"])
        line = table.setdefault((*key, row["trained_max"]), {})
        cell = f"{row['share']:.1%} to {row['max']:,}"
        line[row["length"]] = Markup(f'<span class="new">{cell}</span>') if row["share"] else cell
    head = [*(["run"] if len(runs) > 1 else []), "data set", "coordinate", "trained to"]
    rows = [
        [*key[:-1], f"{key[-1]:,}", *(line.get(n, "–") for n in lengths)]
        for key, line in table.items()
    ]
    return [
        '<h2 id="unseen">Never seen in training</h2>',
        '<p class="soft">At each length: the share of tokens whose coordinate is larger than any in '
        "training, and the largest. A relative encoding of a coordinate meets distances up to that "
        "size.</p>",
        webpage.table([*head, *(f"{n:,}" for n in lengths)], rows, texts=len(head) - 1),
    ]
