"""Compares the points of a sweep: tables, DIR/extrapolation.png and DIR/report.html.

DIR/sweep.csv has a line for each point, data set and length, and one for each point without an evaluation.
DIR/comparison.csv and DIR/comparison.tex compare groups: points that differ in one field alone, by
default their seed, are one curve and one line, with an interval.
"""

import csv
import dataclasses
import io
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence

from bipe_jax import config, plan
from bipe_jax.config import spec
from bipe_jax.config.naming import short_key, shortened, words
from bipe_jax.errors import UserError
from bipe_jax.report import comparing, page, palette, pictures, tables
from bipe_jax.report.comparing import Group, Measure
from bipe_jax.report.results import Evaluation, Perplexity, read_file
from bipe_jax.report.text import table
from bipe_jax.report.webpage import Table
from bipe_jax.workdir import Workdir, files, heartbeat, metrics, outputs
from launch.points import finished, recorded

_LOG = logging.getLogger(__name__)

_TABLE = "sweep.csv"
_COMPARISON = "comparison"
_SEED = "seed"


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


def collect(directory: str, over: str | None = None, baseline: str = "") -> None:
    """Writes the files, prints the tables and lists unfinished points.

    Args:
      over: the field whose values are averaged over; "": none; None: the seed, if it varies.
      baseline: label of the group that the others are compared with; "": the first.

    Raises:
      UserError: the directory has no points, they do not vary in `over`, there is no such baseline, a file
        cannot be read or written, or the points scored other targets. All that does not set them
        side by side is written.
    """
    points = read(directory)
    of_formats = [_COMPARISON + extension for extension in tables.FORMATS]
    for name in (_TABLE, *of_formats, Workdir.extrapolation, Workdir.report):
        outputs.check(os.path.join(directory, name))
    over = _over(points, over)
    groups = _groups(points, over)
    refused = None
    try:
        by = comparing.measure(groups)
    except UserError as error:
        refused, by = error, None
    print(table(*_text(_overview(points, by))))
    _write_csv(points, os.path.join(directory, _TABLE))
    written = [_TABLE]
    if by and groups:
        written += _compare(directory, points, groups, by, over, baseline)
    for point in points:
        if point.status != "finished":
            step = f" at step {point.metrics.step:,}" if point.metrics.step else ""
            why = Workdir(os.path.join(directory, point.name)).read_failure()
            _LOG.info(f"{point.status}{step}: {point.name}{f' ({why})' if why else ''}")
    done = sum(point.evaluation is not None for point in points)
    _LOG.info(
        f"{done} of {len(points)} points are finished; wrote {', '.join(written)} in {directory}"
    )
    if refused:
        raise refused


def _over(points: Sequence[Point], over: str | None) -> str:
    """The field to average over; "" for none."""
    varied = points[0].values
    if over is None:
        return _SEED if _SEED in varied else ""
    if over and over not in varied:
        raise UserError(f"--over={over}: the points vary in {', '.join(varied) or 'nothing'}")
    return over


def _groups(points: Sequence[Point], over: str) -> list[Group]:
    """The finished points, those that differ in `over` alone together, in the order of their values."""
    runs: dict[str, dict[str, Evaluation]] = {}
    for point in points:
        if point.evaluation:
            rest = {key: value for key, value in point.values.items() if key != over}
            name = _label(rest) or "all" if over else point.label
            seed = f"{short_key(over)} {words(point.values[over])}" if over else ""
            of_group = runs.setdefault(name, {})
            of_group[seed if seed not in of_group else point.name] = point.evaluation
    return [Group(name, of_group) for name, of_group in runs.items()]


def _compare(
    directory: str, points: Sequence[Point], groups: list[Group], by: Measure, over, baseline: str
) -> list[str]:
    """Writes and prints the comparison of groups; returns the names of the files."""
    baseline = baseline or groups[0].name
    if len(groups) > 1 or over:
        print("\n" + table(*_text(_of_groups(groups, by))))
    if len(groups) > 1:
        rows = [each.cells() for each in comparing.against(groups, baseline, by)]
        print(f"\nagainst {baseline}:\n" + table(comparing.heads(by), rows))
    written = []
    for extension in tables.FORMATS:
        written.append(_COMPARISON + extension)
        text = tables.of_format(groups, extension, baseline)
        path = os.path.join(directory, written[-1])
        # Names that are not UTF-8, as those of directories may be.
        outputs.write_bytes(path, text.encode(errors="backslashreplace"))
    shown = _best(groups, palette.SERIES, by)
    others = [group for group in groups if group not in shown]
    with pictures.by_product(Workdir(directory).extrapolation):
        pictures.perplexity([*shown, *others], Workdir(directory).extrapolation)
    with pictures.by_product(Workdir(directory).report):
        names = [group.name for group in shown]
        _write_report(
            directory, points, shown, len(others), by, baseline if baseline in names else names[0]
        )
    return [*written, Workdir.extrapolation, Workdir.report]


def read(directory: str) -> list[Point]:
    """The points in a directory, in the order of their values."""
    try:
        names = sorted(files.names(directory))
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
    labels = {name: _label(values[name]) for name in ordered}
    alike = list(labels.values())
    points = []
    for name in ordered:
        workdir = os.path.join(directory, name)
        status = _status(workdir, configs[name])
        label = labels[name] if alike.count(labels[name]) == 1 else name
        of_text = not spec.is_of_examples(configs[name].data.evaluation)
        evaluation = read_file(workdir, Evaluation) if status == "finished" and of_text else None
        latest = metrics.latest(workdir)
        points.append(Point(name, label, values[name], status, latest, evaluation))
    return points


def _label(values: Mapping[str, object]) -> str:
    """The values as text."""
    return ", ".join(f"{short_key(k)} {shortened(words(v))}" for k, v in values.items())


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


def _best(groups: Sequence[Group], count: int, by: Measure) -> list[Group]:
    """The `count` groups with the lowest values at the longest length, in the order of `groups`."""

    def score(group: Group) -> float:
        last = [
            value.value
            for of_set in group.first.sets
            if (lengths := group.lengths(of_set))
            and (value := group.value(of_set, lengths[-1], by))
        ]
        return sum(map(math.log, last)) / len(last) if last else math.inf

    chosen = sorted(groups, key=score)[:count]
    return [group for group in groups if group in chosen]


def _write_csv(points: Sequence[Point], path: str) -> None:
    keys = list(points[0].values)
    measured = ("set", "length", "loss", "perplexity", "perplexity_error", "bits_per_byte")
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    lines.writerow(["point", "status", *keys, "step", "final_loss", *measured, "targets"])
    for p in points:
        own = [p.name, p.status, *p.values.values(), p.metrics.step, p.metrics.loss]
        for row in p.rows or [None]:
            targets = p.evaluation.targets_of(row.set) if p.evaluation and row else None
            of_row = [getattr(row, name, None) for name in measured]
            lines.writerow([*own, *of_row, targets and targets.targets])
    # Names that are not UTF-8, as those of directories may be.
    outputs.write_bytes(path, text.getvalue().encode(errors="backslashreplace"))


_Rows = tuple[Sequence, list]


def _text(rows: _Rows) -> tuple[tuple, list[tuple]]:
    return tuple(rows[0]), [tuple(row) for row in rows[1]]


def _columns(rows: Sequence[Perplexity]) -> list[tuple[str, int]]:
    """Each set, at the shortest and the longest length."""
    lengths = {row.length for row in rows}
    ends = sorted({min(lengths), max(lengths)}) if lengths else []
    return [(s, n) for s in dict.fromkeys(row.set for row in rows) for n in ends]


def _overview(points: Sequence[Point], by: Measure | None) -> _Rows:
    """A table of all points, with the values at the shortest and the longest length if they compare."""
    rows = [row for point in points for row in point.rows]
    columns = _columns(rows) if by else []
    keys = list(points[0].values)

    def line(point):
        first = [shortened(words(value)) for value in point.values.values()] or [point.name]
        loss = "–" if point.metrics.loss is None else f"{point.metrics.loss:.3f}"
        of_point = [point.evaluation and point.evaluation.row(*column) for column in columns]
        values = [getattr(row, by.field) if by and row else None for row in of_point]
        cells = [comparing.number(value, by.form) for value in values] if by else []
        return [*first, point.status, f"{point.metrics.step:,}", loss, *cells]

    head = [*(map(short_key, keys) if keys else ["point"]), "status", "step", "final loss"]
    return [*head, *(f"{s}, {n:,}" for s, n in columns)], [line(point) for point in points]


def _of_groups(groups: Sequence[Group], by: Measure) -> _Rows:
    """A table of the groups, with intervals at the shortest and the longest length."""
    columns = _columns([row for group in groups for row in group.first.results])

    def line(group):
        values = [group.value(*column, by) for column in columns]
        cells = [by.plus_minus(value.value, value.error) if value else "–" for value in values]
        return [group.name, f"{len(group.runs)}", *cells]

    return [by.name, "runs", *(f"{s}, {n:,}" for s, n in columns)], [line(g) for g in groups]


def _write_report(
    directory: str,
    points: Sequence[Point],
    shown: Sequence[Group],
    others: int,
    by: Measure,
    baseline: str,
) -> None:
    head, rows = _overview(points, by)
    texts = max(len(points[0].values), 1) + 1
    firsts = [next(p for p in points if p.evaluation is group.first) for group in shown]
    page.write(
        [os.path.join(directory, point.name) for point in firsts],
        Workdir(directory).report,
        names=[group.name for group in shown],
        title=f"Sweep {os.path.basename(os.path.abspath(directory))}",
        baseline=baseline if len(shown) > 1 else "",
        groups=shown,
        template="sweep.html",
        points=Table(head, rows, texts),
        shown=len(shown),
        others=others,
        averaged=max(len(group.runs) for group in shown) > 1,
    )
