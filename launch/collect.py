"""Compares the points of a sweep: DIR/sweep.csv, DIR/extrapolation.png and DIR/report.html.

The CSV has a line for each point, data set and length, and one for each point without an evaluation.
"""

import csv
import dataclasses
import io
import json
import logging
import math
import os
import re
from collections.abc import Sequence

from bipe_jax import config, plan
from bipe_jax.errors import UserError
from bipe_jax.report import page, palette, pictures
from bipe_jax.report.results import Evaluation, Perplexity, read_file
from bipe_jax.report.text import table
from bipe_jax.report.webpage import Table
from bipe_jax.workdir import Workdir, heartbeat, metrics, outputs
from launch.points import finished, recorded, short_key, shortened, words

_LOG = logging.getLogger(__name__)

_TABLE = "sweep.csv"


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: of its directory. label: the values that distinguish it, as text.
      values: of the keys that vary among the points.
      status: "finished", "failed", "running", "unfinished" or "not started".
      evaluation: if it is finished.
    """

    name: str
    label: str
    values: dict[str, object]
    status: str
    metrics: metrics.Metrics
    evaluation: Evaluation | None

    @property
    def rows(self) -> tuple[Perplexity, ...]:
        return self.evaluation.results if self.evaluation else ()


def collect(directory: str) -> None:
    """Writes the files, prints the table and lists unfinished points.

    Raises:
      UserError: the directory has no points, or a file cannot be read or written.
    """
    points = read(directory)
    for name in (_TABLE, Workdir.extrapolation, Workdir.report):
        outputs.check(os.path.join(directory, name))
    done = [point for point in points if point.evaluation]
    head, rows = _overview(points)
    print(table(tuple(head), [tuple(row) for row in rows]))
    _write_csv(points, os.path.join(directory, _TABLE))
    written = [_TABLE]
    if done:
        shown = _best(done, palette.SERIES)
        others = [point for point in done if point not in shown]
        evaluations = [(p.label, p.evaluation) for p in (*shown, *others) if p.evaluation]
        with pictures.by_product(Workdir(directory).extrapolation):
            pictures.perplexity(evaluations, Workdir(directory).extrapolation)
        with pictures.by_product(Workdir(directory).report):
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
            try:
                configs[name] = plan.of(config.from_json(saved))
            except UserError as error:
                raise UserError(f"--collect: {os.path.join(directory, name)}: {error}") from None
    if not configs:
        raise UserError(f"--collect={directory}: no directory in it is a point of a sweep")
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
        evaluation = read_file(workdir, Evaluation) if status == "finished" else None
        latest = metrics.latest(workdir)
        points.append(Point(name, label, values[name], status, latest, evaluation))
    return points


def _order(value) -> tuple:
    """A sort key: by text, with numbers in the text by size."""
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
    """The `count` points with the lowest perplexity at the longest length, in the order of `points`."""

    def score(point):
        longest = max(row.length for row in point.rows)
        losses = [math.log(row.perplexity) for row in point.rows if row.length == longest]
        return sum(losses) / len(losses)

    chosen = sorted(points, key=score)[:count]
    return [point for point in points if point in chosen]


def _write_csv(points: Sequence[Point], path: str) -> None:
    keys = list(points[0].values)
    measured = ("set", "length", "loss", "perplexity", "perplexity_error")
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    lines.writerow(["point", "status", *keys, "step", "final_loss", *measured])
    for p in points:
        own = [p.name, p.status, *p.values.values(), p.metrics.step, p.metrics.loss]
        for row in p.rows or [None]:
            lines.writerow([*own, *(getattr(row, name, None) for name in measured)])
    # Names that are not UTF-8, as those of directories may be.
    outputs.write_bytes(path, text.getvalue().encode(errors="backslashreplace"))


def _overview(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """A table of all points, with the perplexities at the shortest and the longest length."""
    rows = [row for point in points for row in point.rows]
    sets = list(dict.fromkeys(row.set for row in rows))
    lengths = {row.length for row in rows}
    columns = [(s, n) for s in sets for n in sorted({min(lengths), max(lengths)})]
    keys = list(points[0].values)

    def line(point):
        perplexities = {(row.set, row.length): row.perplexity for row in point.rows}
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
    texts = max(len(points[0].values), 1) + 1
    page.write(
        [os.path.join(directory, point.name) for point in shown],
        Workdir(directory).report,
        names=[point.label for point in shown],
        title=f"Sweep {os.path.basename(os.path.abspath(directory))}",
        template="sweep.html",
        points=Table(head, rows, texts),
        shown=len(shown),
        others=others,
    )
