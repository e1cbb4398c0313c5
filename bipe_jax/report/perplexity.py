"""Perplexity by length: curves, and all numbers."""

import math
from collections.abc import Sequence

from bipe_jax.report import axes, svg, webpage
from bipe_jax.report.parts import runs_legend, unique
from bipe_jax.report.results import Run
from bipe_jax.report.text import escaped
from bipe_jax.report.webpage import Markup

# Columns of the table of all numbers: key, name, form.
_COLUMNS = (
    ("loss", "loss (nats)", ".4f"),
    ("bits_per_byte", "bits/byte", ".4f"),
    ("tokens", "tokens", ","),
    ("documents", "documents", ","),
    ("documents_too_short", "too short", ","),
    ("segment_tokens_mean", "tokens/segment", ",.1f"),
    ("segment_tokens_p99", "p99", ",.0f"),
    ("segments_per_block", "segments/block", ",.1f"),
    ("segment_max", "last segment", ",.0f"),
)


def _number(value, form: str) -> str:
    if not isinstance(value, (int, float)) or math.isnan(value):
        return "–"
    return f"{value:{form}}" if math.isfinite(value) else "∞"


def _plus_minus(value, error, form=",.2f") -> str:
    return f"{_number(value, form)} ± {_number(error, form)}"


def section(runs: Sequence[Run]) -> list[str]:
    numbered = [(i, run) for i, run in enumerate(runs) if run.evaluation]
    if not numbered:
        return []
    rows = [(i, run, row) for i, run in numbered for row in run.evaluation["results"]]
    figures = []
    for name in (sets := unique(row["set"] for _, _, row in rows)):
        of_set = [(i, run, row) for i, run, row in rows if row["set"] == name]
        curves = [
            svg.Curve(svg.series(i), [
                svg.Point(
                    row["length"], row["perplexity"], row["perplexity_error"] or 0,
                    f"{run.name}, {row['length']:,} tokens: "
                    + _plus_minus(row["perplexity"], row["perplexity_error"]),
                )
                for _, run, row in sorted(mine, key=lambda x: x[2]["length"])
            ])
            for i, _ in numbered
            if (mine := [entry for entry in of_set if entry[0] == i])
        ]  # fmt: skip
        trained = {run.evaluation["training_length"] for _, run, _ in of_set}
        x = axes.places_axis("length (tokens)", [*(row["length"] for *_, row in of_set), *trained])
        y = axes.number_axis("perplexity", _spans(curves), log=True)
        figures.append(webpage.figure(name, svg.lines(curves, x, y, f"{name}: {y.name}", trained)))
    body = [
        '<h2 id="perplexity">Perplexity by length</h2>',
        '<p class="soft">Lower is better. Bars are standard errors over documents'
        f"{'; in bold, the lowest of the runs' if len(numbered) > 1 else ''}.</p>",
        runs_legend(numbered),
        webpage.grid(figures, "large"),
    ]
    if len(numbered) > 1:
        body += [_matrix(numbered, name) for name in sets]
        body.append(webpage.folded("All numbers", _numbers(rows, several=True), is_open=False))
    else:
        body.append(_numbers(rows, several=False))
    return body


def _spans(curves: Sequence[svg.Curve]) -> list[float]:
    """The finite ends of all error bars, above 0."""
    points = [p for curve in curves for p in curve.points if math.isfinite(p.y)]
    ends = [
        p.y + sign * (p.error if math.isfinite(p.error) else 0) for p in points for sign in (-1, 1)
    ]
    return [end for end in ends if end > 0]


def _matrix(numbered: Sequence[tuple[int, Run]], name: str) -> str:
    """The perplexities of one set: a row a run, a column a length; the lowest are marked."""
    held = {
        run.name: {r["length"]: r for r in run.evaluation["results"] if r["set"] == name}
        for _, run in numbered
    }
    lengths = sorted({length for of_run in held.values() for length in of_run})

    def cell(of_run, length):
        if not (row := of_run.get(length)):
            return "–"
        cell = _plus_minus(row["perplexity"], row["perplexity_error"])
        best = min(r[length]["perplexity"] for r in held.values() if length in r)
        return Markup(f'<span class="best">{cell}</span>') if row["perplexity"] == best else cell

    rows = [[run, *(cell(of_run, n) for n in lengths)] for run, of_run in held.items()]
    return f"<h3>{escaped(name)}</h3>" + webpage.table(["run", *(f"{n:,}" for n in lengths)], rows)


def _numbers(rows: Sequence[tuple[int, Run, dict]], several: bool) -> str:
    columns = [c for c in _COLUMNS if any(isinstance(r.get(c[0]), (int, float)) for *_, r in rows)]
    table = [
        [
            *([run.name] if several else []),
            row["set"],
            f"{row['length']:,}",
            _plus_minus(row["perplexity"], row["perplexity_error"]),
            *(_number(row.get(key), form) for key, _, form in columns),
        ]
        for _, run, row in rows
    ]
    head = ["data set", "length", "perplexity", *(name for _, name, _ in columns)]
    return webpage.table(["run", *head] if several else head, table, texts=2 if several else 1)
