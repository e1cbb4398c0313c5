"""Accuracy in tasks with long context, by length and depth."""

from collections.abc import Sequence

from bipe_jax.report import axes, svg, webpage
from bipe_jax.report.parts import runs_legend, unique
from bipe_jax.report.results import Run
from bipe_jax.report.text import escaped


def section(runs: Sequence[Run]) -> list[str]:
    numbered = [(i, run) for i, run in enumerate(runs) if run.tasks]
    if not numbered:
        return []
    rows = [(i, run, row) for i, run in numbered for row in run.tasks["results"]]
    body = [
        '<h2 id="tasks">Tasks with long context</h2>',
        '<p class="soft">Percent of answers that are right, by the length of the prompt and by how far '
        "into it the answer lies (0%: at its beginning). The dotted line is the training length.</p>",
        runs_legend(numbered),
    ]
    alone = []
    for task in unique(row["task"] for *_, row in rows):
        of_task = [entry for entry in rows if entry[2]["task"] == task]
        figures = [
            _task_map(run, mine, run.name if len(numbered) > 1 else task)
            for i, run in numbered
            if (mine := [row for j, _, row in of_task if j == i])
        ]
        if len(numbered) == 1:
            alone += figures
            continue
        figures.insert(0, _task_lines(numbered, of_task))
        body += [f"<h3>{escaped(task)}</h3>", webpage.grid(figures, "maps")]
    return [*body, webpage.grid(alone, "maps")] if alone else body


def _mean_accuracy(rows: Sequence[dict]) -> float:
    return sum(row["accuracy"] * row["samples"] for row in rows) / sum(r["samples"] for r in rows)


def _task_lines(numbered, rows: Sequence[tuple[int, Run, dict]]) -> str:
    curves = []
    for i, run in numbered:
        held: dict[int, list] = {}
        for j, _, row in rows:
            if j == i and row["samples"]:
                held.setdefault(row["length"], []).append(row)
        means = {length: _mean_accuracy(held[length]) for length in sorted(held)}
        curves.append(svg.Curve(svg.series(i), [
            svg.Point(n, mean, 0, f"{run.name}, {n:,} tokens: {mean:.1%}")
            for n, mean in means.items()
        ]))  # fmt: skip
    x = axes.places_axis("length (tokens)", [row["length"] for *_, row in rows])
    y = axes.number_axis("accuracy", [1.0], zero=True, percent=True)
    trained = {run.tasks["training_length"] for _, run in numbered}
    picture = svg.lines(curves, x, y, y.name, trained)
    return webpage.figure("All depths together", picture, kind="line-chart")


def _task_map(run: Run, rows: Sequence[dict], title: str) -> str:
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows}, key=lambda depth: (depth is None, depth or 0))
    labels = ["all" if depth is None else f"{depth:.0%}" for depth in depths]
    cells = {
        (depths.index(row["depth"]), lengths.index(row["length"])): svg.Cell(
            row["accuracy"],
            f"{100 * row['accuracy']:.3g}",
            f"{run.name}, {row['length']:,} tokens, depth {labels[depths.index(row['depth'])]}: "
            f"{row['accuracy']:.1%} of {row['samples']:,}",
        )
        for row in rows
    }
    within = sum(length <= run.tasks["training_length"] for length in lengths)
    picture = svg.heat(
        labels, [axes.short(n) for n in lengths], cells, ("depth", "length (tokens)"),
        f"{run.name}: accuracy by depth and length", within % len(lengths),
    )  # fmt: skip
    counts = unique(row["samples"] for row in rows)
    samples = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,}–{max(counts):,}"
    caption = f"{samples} samples a cell"
    return webpage.figure(title, f'<div class="wide">{picture}</div>', caption)
