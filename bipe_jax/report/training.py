"""The course of a training: loss, held-out loss, learning rate and gradient norm by step."""

import math
from collections.abc import Mapping, Sequence

from bipe_jax.report import charts
from bipe_jax.report.charts import Curve, Lines, Point
from bipe_jax.workdir import Workdir, json_files, opening

Course = dict[str, list[tuple[int, float]]]  # metric -> (step, value), in order

_POINTS = 40  # of a curve, each the mean over a range of steps
_HELD_OUT = "evaluation/"
_SHOWN = {
    "loss": ("Loss", "loss (nats a token)"),
    "learning_rate": ("Learning rate", "learning rate"),
    "gradient_norm": ("Gradient norm", "gradient norm"),
}
_STEPS = {"value": "linear"}


def read(directory: str) -> Course:
    """The metrics of metrics.jsonl that are shown; {} without the file. Lines that are none are skipped."""
    course: Course = {}
    try:
        with opening.to_read(Workdir(directory).metrics) as file:
            for line in file:
                try:
                    values = json_files.parse(line)
                except ValueError:
                    continue
                if isinstance(values, dict) and type(step := values.get("step")) is int:
                    for name, value in values.items():
                        if _is_shown(name) and isinstance(value, float) and math.isfinite(value):
                            course.setdefault(name, []).append((step, value))
    except OSError:
        return {}
    return course


def _is_shown(name: str) -> bool:
    return name in _SHOWN or (name.startswith(_HELD_OUT) and name.endswith("/loss"))


def _title(name: str) -> tuple[str, str]:
    """The title of a metric's chart, and the name of its y axis."""
    if name in _SHOWN:
        return _SHOWN[name]
    of_set, _, length = name.removeprefix(_HELD_OUT).removesuffix("/loss").rpartition("/")
    return f"Held-out loss, {of_set}, {length} tokens", "loss (nats a token)"


def section(courses: Mapping[str, Course]) -> dict | None:
    """The values of the page's section; None if no run has metrics.

    Args:
      courses: of the runs by name, in the order of their styles.
    """
    names = dict.fromkeys(name for course in courses.values() for name in course)
    if not names:
        return None
    styles = {run: charts.series(i) for i, run in enumerate(courses)}
    ordered = sorted(names, key=lambda name: (name != "loss", name in _SHOWN))
    figures = []
    for name in ordered:
        title, axis = _title(name)
        curves = [
            Curve(styles[run], _points(f"{run}, {axis}", course[name]))
            for run, course in courses.items()
            if name in course
        ]
        last = max(course[name][-1][0] for course in courses.values() if name in course)
        chart = Lines(curves, "step", axis, _ticks(last), scale=_STEPS, log=name == "gradient_norm")
        figures.append(charts.figure(title, chart, title))
    several = len(courses) > 1
    legend = [(charts.key(style), run) for run, style in styles.items() if several]
    return {"legend": legend, "figures": figures}


def _points(title: str, values: Sequence[tuple[int, float]]) -> list[Point]:
    """The means over at most `_POINTS` ranges of steps; the last one ends with the last step."""
    every = -(-len(values) // _POINTS)
    points = []
    for first in range(0, len(values), every):
        some = values[first : first + every]
        step, mean = some[-1][0], math.fsum(value for _, value in some) / len(some)
        span = f"step {step:,}" if len(some) == 1 else f"steps {some[0][0]:,}–{step:,}"
        points.append(Point(step, mean, f"{title}, {span}: {mean:.4g}"))
    return points


def _ticks(last: int) -> list[int]:
    """0, and up to 6 round numbers to the last step."""
    size = 10 ** max(len(str(last)) - 1, 0)
    unit = next(
        unit
        for unit in (size // 5, size // 2, size, 2 * size, 5 * size)
        if unit and last // unit <= 6
    )
    return [*range(0, last + 1, unit)]
