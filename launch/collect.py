"""Compares the points of a sweep: DIR/sweep.csv, DIR/extrapolation.png and DIR/report.html.

The CSV has a line for each point, data set and length, and one for each point that has no evaluation.
"""

import csv
import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Sequence

from bipe_jax import config, plan, plot, report
from bipe_jax.errors import UserError
from bipe_jax.report import results, webpage
from bipe_jax.report.text import table
from bipe_jax.workdir import Workdir, files, heartbeat, metrics
from launch.points import finished, recorded, short_key, shortened, words

_LOG = logging.getLogger(__name__)

_TABLE = "sweep.csv"


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: of its directory. label: what is special about it, for people.
      values: of the keys that vary among the points.
      status: "finished", "failed", "running", "unfinished" or "not started".
      results: of its evaluation, if it is finished: see docs/evaluation.md.
    """

    name: str
    label: str
    values: dict[str, object]
    status: str
    metrics: metrics.Metrics
    training_length: int
    results: list[dict]


def collect(directory: str) -> None:
    """Writes the files, prints the table and names what is not finished.

    Raises:
      UserError: the directory has no points, or a file cannot be read or written.
    """
    points = read(directory)
    done = [point for point in points if point.results]
    _write_csv(points, os.path.join(directory, _TABLE))
    head, rows = _overview(points)
    print(table(tuple(head), [tuple(row) for row in rows]))
    written = [_TABLE]
    if done:
        shown = _best(done, plot.COLOURS)
        others = [point for point in done if point not in shown]
        curves = [
            {"name": p.label, "training_length": p.training_length, "results": p.results}
            for p in [*shown, *others]
        ]
        plot.draw(curves, Workdir(directory).extrapolation)
        _write_report(directory, points, shown, len(others))
        written += [Workdir.extrapolation, Workdir.report]
    for point in points:
        if point.status != "finished":
            step = f" at step {point.metrics.step:,}" if point.metrics.step else ""
            why = Workdir(os.path.join(directory, point.name)).read_failure()
            _LOG.info(f"{point.status}{step}: {point.name}{f' ({why})' if why else ''}")
    _LOG.info(
        f"{len(done)} of {len(points)} points are finished; wrote {', '.join(written)} in {directory}"
    )


def read(directory: str) -> list[Point]:
    """The points in a directory, in the order of their values."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise UserError(f"--collect={directory}: {error.strerror}") from None
    configs = {}
    for name in names:
        saved = recorded(os.path.join(directory, name))
        if saved is not None:
            configs[name] = plan.of(config.from_json(saved))
    if not configs:
        raise UserError(f"--collect={directory}: none of its directories holds a point of a sweep")
    flat = {name: config.flatten(config.to_dict(of)) for name, of in configs.items()}
    varied = [
        key for key in config.FIELDS if len({json.dumps(of[key]) for of in flat.values()}) > 1
    ]
    values = {name: {key: of[key] for key in varied} for name, of in flat.items()}
    ordered = sorted(configs, key=lambda name: [_order(value) for value in values[name].values()])
    labels = {
        name: ", ".join(f"{short_key(k)} {shortened(words(v))}" for k, v in values[name].items())
        for name in ordered
    }
    alike = list(labels.values())
    points = []
    for name in ordered:
        workdir = os.path.join(directory, name)
        status = _status(workdir, configs[name])
        label = labels[name] if alike.count(labels[name]) == 1 else name
        evaluation = (
            results.read([workdir], [label])[0].evaluation if status == "finished" else None
        )
        rows = evaluation["results"] if evaluation else []
        length = configs[name].sequence_length
        points.append(
            Point(name, label, values[name], status, metrics.latest(workdir), length, rows)
        )
    return points


def _order(value) -> tuple:
    """By text, but numbers, also those within texts, by their size."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", words(value))
    return tuple(float(part) if i % 2 else part for i, part in enumerate(parts))


def _status(workdir: str, of_point) -> str:
    if finished(workdir, of_point):
        return "finished"
    if Workdir(workdir).read_failure():
        return "failed"
    if heartbeat.read_alive(workdir):
        return "running"
    return "unfinished" if metrics.latest(workdir).step else "not started"


def _best(points: Sequence[Point], count: int) -> list[Point]:
    """So many of the points, in their order: those with the lowest perplexity at the longest length."""

    def score(point):
        longest = max(row["length"] for row in point.results)
        losses = [math.log(r["perplexity"]) for r in point.results if r["length"] == longest]
        return sum(losses) / len(losses)

    chosen = sorted(points, key=score)[:count]
    return [point for point in points if point in chosen]


def _write_csv(points: Sequence[Point], path: str) -> None:
    keys = list(points[0].values)
    measured = ("set", "length", "loss", "perplexity", "perplexity_error")
    try:
        with files.replacing(path, newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["point", "status", *keys, "step", "final_loss", *measured])
            for p in points:
                own = [p.name, p.status, *p.values.values(), p.metrics.step, p.metrics.loss]
                for row in p.results or [{}]:
                    lines.writerow([*own, *(row.get(name) for name in measured)])
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _overview(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """A table of all points, with the perplexities at the ends of the range of lengths."""
    rows = [row for point in points for row in point.results]
    sets = list(dict.fromkeys(row["set"] for row in rows))
    lengths = {row["length"] for row in rows}
    columns = [(s, n) for s in sets for n in sorted({min(lengths), max(lengths)})]
    keys = list(points[0].values)

    def line(point):
        perplexities = {(row["set"], row["length"]): row["perplexity"] for row in point.results}
        first = [shortened(words(value)) for value in point.values.values()] or [point.name]
        loss = "–" if point.metrics.loss is None else f"{point.metrics.loss:.3f}"
        cells = [
            f"{perplexities[column]:,.2f}" if column in perplexities else "–" for column in columns
        ]
        return [*first, point.status, f"{point.metrics.step:,}", loss, *cells]

    head = [*(map(short_key, keys) if keys else ["point"]), "status", "step", "final loss"]
    return [*head, *(f"{s}, {n:,}" for s, n in columns)], [line(point) for point in points]


def _write_report(directory: str, points, shown: Sequence[Point], others: int) -> None:
    head, rows = _overview(points)
    varied = max(len(points[0].values), 1)
    lead = [
        '<h2 id="points">All points</h2>',
        '<p class="soft">The loss is of the last training step, in nats a token; the perplexities are '
        "at the shortest and the longest length. sweep.csv has all lengths.</p>",
        webpage.table(head, rows, texts=varied + 1),
    ]
    if others:
        lead.append(
            f'<p class="soft">What follows is of the {len(shown)} points with the lowest perplexity '
            f"at the longest length; {others} others are finished.</p>"
        )
    report.write(
        [os.path.join(directory, point.name) for point in shown],
        Workdir(directory).report,
        names=[point.label for point in shown],
        title=f"Sweep {os.path.basename(os.path.abspath(directory))}",
        lead=lead,
    )
