"""Pictures as files: perplexity by length, and accuracy in tasks."""

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.lines import Line2D

from bipe_jax.errors import UserError
from bipe_jax.report import charts, figures, palette, tasks
from bipe_jax.report import perplexity as perplexities
from bipe_jax.report.charts import Field, Lines
from bipe_jax.report.figures import LETTER, label
from bipe_jax.report.results import Run


def perplexity(runs: Sequence[Run], path: str) -> None:
    """Draws runs with an evaluation: a panel a data set, a curve a run, with standard errors.

    Args:
      runs: there are `palette.SERIES` colours; runs beyond are grey and without names, so what matters
        comes first.
      path: its ending chooses the format.

    Raises:
      UserError: the file cannot be written.
    """
    count = palette.SERIES
    styled = [(charts.series(i) if i < count else charts.OTHER, run) for i, run in enumerate(runs)]
    legend = {run.name: style for style, run in styled[:count] if len(runs) > 1}
    if len(runs) > count:
        legend[f"{len(runs) - count} others"] = charts.OTHER
    panels = perplexities.lines([*styled[count:], *styled[:count]])  # grey ones lie below
    _save(panels, path, len(panels), legend=legend)


def accuracy(run: Run, path: str) -> None:
    """Draws a run with tasks: a panel a task, a column a length, a row a depth.

    Raises:
      UserError: the file cannot be written.
    """
    rows = run.tasks.results
    wide = max(46, 240 / len({row.length for row in rows}))
    panels = {
        task: tasks.heat(run, tasks.of_task(run, task), rows, wide) for task in tasks.names([run])
    }
    across = min(len(panels), 3)
    heat = next(iter(panels.values()))
    heading = f"{label(run.name)}, percent right; haystack: {label(run.tasks.data, 300)}"
    lines = textwrap.wrap(heading, int(across * heat.size()[0] / LETTER))
    if heat.after:
        lines.append("right of the dotted line: longer than in training")
    _save(panels, path, across, heading="\n".join(lines))


@figures.drawing()
def _save(
    panels: Mapping[str, Lines | Field], path: str, across: int, heading="", legend: Mapping = {}
):
    """Writes charts of one size, with their titles.

    Args:
      across: panels in a row.
      heading: lines over the panels.
      legend: names and their styles.
    """
    width, height, margins = next(iter(panels.values())).size()
    margins = margins._replace(top=margins.top + 22, right=margins.right + 16)
    figure, every = figures.panels(width + 16, height + 22, margins, across, len(panels))
    for axes, (name, chart) in zip(every, panels.items(), strict=True):
        chart.draw(axes)
        title = label(name, int(width / LETTER))
        charts.corner_name(axes, title, margins.left, margins.top - 16, fontweight="bold")
    figure.text(0.5, 1, heading, ha="center", va="bottom")
    if legend:
        handles = [
            Line2D([], [], label=label(name), **style.line()) for name, style in legend.items()
        ]
        entry = 50 + LETTER * max(len(handle.get_label()) for handle in handles)
        columns = max(int(figure.bbox.width / entry), 1)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
        figure.legend(handles=handles, ncols=columns, frameon=False, **below)
    figure.set_frameon(True)
    try:
        figure.savefig(path, dpi=200, facecolor="white", bbox_inches="tight")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    except ValueError as error:  # the ending
        raise UserError(f"{path} cannot be written: {error}") from None
