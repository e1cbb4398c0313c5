"""Accuracy in tasks with long context, by length and depth."""

from collections.abc import Sequence

from bipe_jax.report import charts
from bipe_jax.report.cells import Cell, Field
from bipe_jax.report.charts import Curve, Lines, Point, Style
from bipe_jax.report.results import Accuracy, Run, Tasks
from bipe_jax.report.webpage import Figure


def section(runs: Sequence[Run]) -> dict | None:
    """The values of the page's section, a heat map for each task and run; None without tasks.json."""
    styled = [(charts.series(i), run.name, run.tasks) for i, run in enumerate(runs) if run.tasks]
    if not styled:
        return None
    several = len(styled) > 1
    groups: dict[str, list[Figure]] = {}
    for task in dict.fromkeys(row.task for *_, tasks in styled for row in tasks.results):
        shown = groups.setdefault(task if several else "", [])
        if several:
            lines, of_task = _lines(styled, task), f"{task}: accuracy"
            shown.append(charts.figure("All depths together", lines, of_task, kind="line-chart"))
        for _, run, tasks in styled:
            rows = [row for row in tasks.results if row.task == task]
            if rows:
                counts = sorted({row.samples for row in rows})
                ends = dict.fromkeys((f"{counts[0]:,}", f"{counts[-1]:,}"))
                caption = f"{'–'.join(ends)} samples a cell"
                title = f"{run}, {task}: accuracy by depth and length"
                field = heat(run, tasks, rows, rows)
                shown.append(charts.figure(run if several else task, field, title, caption))
    legend = [(charts.key(style), run) for style, run, _ in styled if several]
    return {"legend": legend, "groups": groups}


def _lines(styled: Sequence[tuple[Style, str, Tasks]], task: str) -> Lines:
    """Mean accuracy over all depths, with a curve for each run."""
    curves = []
    for style, run, tasks in styled:
        of_lengths: dict[int, list[Accuracy]] = {}
        for row in tasks.results:
            if row.task == task:
                of_lengths.setdefault(row.length, []).append(row)
        points = []
        for n, rows in sorted(of_lengths.items()):
            mean = sum(r.accuracy * r.samples for r in rows) / sum(r.samples for r in rows)
            points.append(Point(n, mean, f"{run}, {n:,} tokens: {mean:.1%}"))
        curves.append(Curve(style, points))
    ticks = {int(p.x) for curve in curves for p in curve.points}
    trained = {tasks.training_length for *_, tasks in styled}
    return Lines(curves, "length (tokens)", "accuracy", ticks, trained, shares=True, y_reach=[1])


def heat(
    run: str, tasks: Tasks, rows: Sequence[Accuracy], among: Sequence[Accuracy], wide: float = 46
) -> Field:
    """Percent right, with columns and rows for the lengths and depths of the results `among`."""
    lengths = sorted({row.length for row in among})
    depths = sorted({row.depth for row in among}, key=lambda depth: (depth is None, depth or 0))
    labels = {depth: "all" if depth is None else f"{depth:.0%}" for depth in depths}
    cells = {
        (row.depth, row.length): Cell(
            f"{run}, {row.length:,} tokens, depth {labels[row.depth]}: "
            f"{row.accuracy:.1%} of {row.samples:,}",
            row.accuracy,
            f"{100 * row.accuracy:.3g}",
        )
        for row in rows
    }
    within = sum(length <= tasks.training_length for length in lengths)
    columns = {n: charts.short(n) for n in lengths}
    names = ("depth", "length (tokens)")
    return Field(labels, columns, names, cells, wide, after=within % len(lengths))
