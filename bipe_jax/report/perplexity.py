"""Perplexity by length: curves, and all numbers."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from bipe_jax.report import charts
from bipe_jax.report.charts import Curve, Lines, Point, Style
from bipe_jax.report.results import Evaluation, Perplexity, Run
from bipe_jax.report.webpage import Figure, Table

Styled = Sequence[tuple[Style, str, Evaluation]]  # with the run's name

# Columns of the table of all numbers: field, name, form.
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


def section(runs: Sequence[Run]) -> dict | None:
    """The values of the page's section; None if no run has an evaluation.json."""
    styled = [(charts.series(i), r.name, r.evaluation) for i, r in enumerate(runs) if r.evaluation]
    if not styled:
        return None
    several = len(styled) > 1
    of_sets = lines(styled)
    return {
        "several": several,
        "legend": [(charts.key(style), name) for style, name, _ in styled if several],
        "figures": [
            Figure(name, charts.inline(chart, f"{name}: perplexity"))
            for name, chart in of_sets.items()
        ],
        "matrices": {name: _matrix(styled, name) for name in of_sets if several},
        "numbers": _numbers(styled, several),
    }


def lines(styled: Styled) -> dict[str, Lines]:
    """A chart for each data set, with a curve for each run."""
    of_sets = {}
    for name in dict.fromkeys(row.set for *_, evaluation in styled for row in evaluation.results):
        curves, trained = [], set()
        for style, run, evaluation in styled:
            rows = [row for row in evaluation.results if row.set == name]
            points = [
                Point(row.length, row.perplexity,
                      f"{run}, {row.length:,} tokens: {_plus_minus(row)}", row.perplexity_error or 0)
                for row in sorted(rows, key=lambda row: row.length)
            ]  # fmt: skip
            if points:
                curves.append(Curve(style, points))
                trained.add(evaluation.training_length)
        ticks = {int(p.x) for curve in curves for p in curve.points} | trained
        of_sets[name] = Lines(curves, "length (tokens)", "perplexity", ticks, trained, log=True)
    return of_sets


def _matrix(styled: Styled, name: str) -> Table:
    """The perplexities of one set by run and length, with the lowest marked."""
    of_runs = {
        run: {row.length: row for row in evaluation.results if row.set == name}
        for _, run, evaluation in styled
    }
    lengths = sorted({length for of_run in of_runs.values() for length in of_run})
    lowest = {
        n: min(of_run[n].perplexity for of_run in of_runs.values() if n in of_run) for n in lengths
    }

    def cell(row):
        if row is None:
            return "–"
        best = row.perplexity == lowest[row.length]
        form = Markup('<span class="best">{}</span>') if best else "{}"
        return form.format(_plus_minus(row))

    rows = [[run, *(cell(of_run.get(n)) for n in lengths)] for run, of_run in of_runs.items()]
    return Table(["run", *(f"{n:,}" for n in lengths)], rows)


def _numbers(styled: Styled, several: bool) -> Table:
    rows = [(run, row) for _, run, evaluation in styled for row in evaluation.results]
    columns = [c for c in _COLUMNS if any(getattr(row, c[0]) is not None for _, row in rows)]
    cells = [
        [run, row.set, f"{row.length:,}", _plus_minus(row),
         *(_number(getattr(row, field), form) for field, _, form in columns)]
        for run, row in rows
    ]  # fmt: skip
    head = ["run", "data set", "length", "perplexity", *(name for _, name, _ in columns)]
    return Table(head, cells, 2) if several else Table(head[1:], [line[1:] for line in cells])


def _plus_minus(row: Perplexity) -> str:
    return f"{_number(row.perplexity, ',.2f')} ± {_number(row.perplexity_error, ',.2f')}"


def _number(value: float | None, form: str) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{form}}" if math.isfinite(value) else "∞"
