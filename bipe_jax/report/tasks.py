"""Accuracy in tasks with long context, by length and depth."""

from collections.abc import Sequence

from bipe_jax.report import charts
from bipe_jax.report.charts import Cell, Curve, Field, Lines, Point
from bipe_jax.report.results import Accuracy, Run
from bipe_jax.report.webpage import Figure


def section(runs: Sequence[Run]) -> dict | None:
    """What the page shows, if any run has a tasks.json: a heat map of each task and run."""
    numbered = [(i, run) for i, run in enumerate(runs) if run.tasks]
    if not numbered:
        return None
    several = len(numbered) > 1
    groups: dict[str, list[Figure]] = {}
    for task in names(runs):
        shown = groups.setdefault(task if several else "", [])
        if several:
            lines = charts.inline(_lines(numbered, task), f"{task}: accuracy")
            shown.append(Figure("All depths together", lines, kind="line-chart"))
        for _, run in numbered:
            if not (rows := of_task(run, task)):
                continue
            picture = charts.inline(
                heat(run, rows, rows), f"{run.name}: accuracy by depth and length"
            )
            counts = sorted({row.samples for row in rows})
            samples = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,}–{counts[-1]:,}"
            shown.append(
                Figure(run.name if several else task, picture, f"{samples} samples a cell")
            )
    legend = [(charts.key(charts.series(i)), run.name) for i, run in numbered if several]
    return {"legend": legend, "groups": groups}


def names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(row.task for run in runs if run.tasks for row in run.tasks.results))


def of_task(run: Run, task: str) -> list[Accuracy]:
    return [row for row in run.tasks.results if row.task == task]


def _lines(numbered: Sequence[tuple[int, Run]], task: str) -> Lines:
    """Mean accuracy over all depths: a curve a run."""
    curves = []
    for i, run in numbered:
        points = []
        for n in sorted({row.length for row in of_task(run, task)}):
            rows = [row for row in of_task(run, task) if row.length == n]
            mean = sum(r.accuracy * r.samples for r in rows) / sum(r.samples for r in rows)
            points.append(Point(n, mean, f"{run.name}, {n:,} tokens: {mean:.1%}"))
        curves.append(Curve(charts.series(i), points))
    ticks = {int(p.x) for curve in curves for p in curve.points}
    trained = {run.tasks.training_length for _, run in numbered}
    return Lines(curves, "length (tokens)", "accuracy", ticks, trained, shares=True, y_reach=[1])


def heat(run: Run, rows: Sequence[Accuracy], among: Sequence[Accuracy], wide: float = 46) -> Field:
    """Percent right: a column for each length that is among some results, a row for each depth."""
    lengths = sorted({row.length for row in among})
    depths = sorted({row.depth for row in among}, key=lambda depth: (depth is None, depth or 0))
    labels = {depth: "all" if depth is None else f"{depth:.0%}" for depth in depths}
    cells = {
        (row.depth, row.length): Cell(
            f"{run.name}, {row.length:,} tokens, depth {labels[row.depth]}: "
            f"{row.accuracy:.1%} of {row.samples:,}",
            row.accuracy,
            f"{100 * row.accuracy:.3g}",
        )
        for row in rows
    }
    within = sum(length <= run.tasks.training_length for length in lengths)
    columns = {n: charts.short(n) for n in lengths}
    names = ("depth", "length (tokens)")
    return Field(labels, columns, names, cells, wide, after=within % len(lengths))
