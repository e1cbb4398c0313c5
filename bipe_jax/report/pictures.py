"""Pictures as files: perplexity by length, and accuracy in tasks."""

import contextlib
import io
import logging
import os
import textwrap
from collections.abc import Generator, Mapping, Sequence

from matplotlib.lines import Line2D

from bipe_jax.errors import Transient, UserError
from bipe_jax.report import charts, figures, palette
from bipe_jax.report import perplexity as perplexities
from bipe_jax.report.charts import Field, Lines
from bipe_jax.report.figures import LETTER, label
from bipe_jax.report.results import Evaluation, Tasks
from bipe_jax.report.tasks import heat
from bipe_jax.workdir import outputs

_LOG = logging.getLogger(__name__)


def perplexity(evaluations: Sequence[tuple[str, Evaluation]], path: str) -> None:
    """Draws evaluations by name of the run: a panel for each data set, with standard errors.

    Args:
      evaluations: the most important first. Those after the first `palette.SERIES` are grey, without names.
      path: its extension is the format.

    Raises:
      UserError: the file cannot be written.
    """
    count = palette.SERIES
    styled = [
        (charts.series(i) if i < count else charts.OTHER, *named)
        for i, named in enumerate(evaluations)
    ]
    legend = {name: style for style, name, _ in styled[:count] if len(styled) > 1}
    if len(styled) > count:
        legend[f"{len(styled) - count} others"] = charts.OTHER
    panels = perplexities.lines([*styled[count:], *styled[:count]])  # grey ones are drawn below
    _save(panels, path, len(panels), legend=legend)


def accuracy(run: str, tasks: Tasks, path: str) -> None:
    """Draws the tasks of a run: a panel for each task, a column for each length, a row for each depth.

    Raises:
      UserError: the file cannot be written.
    """
    wide = max(46, 240 / len({row.length for row in tasks.results}))
    panels = {
        task: heat(run, tasks, [r for r in tasks.results if r.task == task], tasks.results, wide)
        for task in dict.fromkeys(row.task for row in tasks.results)
    }
    across = min(len(panels), 3)
    first = next(iter(panels.values()))
    heading = f"{label(run)}, percent right; haystack: {label(tasks.data, 300)}"
    lines = textwrap.wrap(heading, int(across * first.size()[0] / LETTER))
    if first.after:
        lines.append("right of the dotted line: longer than in training")
    _save(panels, path, across, heading="\n".join(lines))


@figures.drawing()
def _save(
    panels: Mapping[str, Lines | Field], path: str, across: int, heading="", legend: Mapping = {}
):
    """Writes charts of one size, with their titles.

    Args:
      across: panels in a row.
      heading: lines above the panels.
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
        handles = [Line2D([], [], **style.line()) for style in legend.values()]
        entry = 50 + LETTER * max(len(label(name)) for name in legend)
        columns = max(int(figure.bbox.width / entry), 1)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
        made = figure.legend(
            handles, map(str, range(len(handles))), ncols=columns, frameon=False, **below
        )
        for text, name in zip(made.get_texts(), legend, strict=True):
            text.set_text(
                label(name)
            )  # here, since matplotlib leaves out names that begin with "_"
    figure.set_frameon(True)
    kind = os.path.splitext(path)[1][1:].lower() or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path} cannot be written: Format {kind!r} is not supported")
    # In memory first: matplotlib would write to where a link leads, and half of a file.
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=200, facecolor="white", bbox_inches="tight")
    outputs.write_bytes(path, buffer.getvalue())


@contextlib.contextmanager
def by_product(path: str) -> Generator[None]:
    """A context that makes a picture or a page of numbers that are saved already.

    If it cannot be drawn, or another file that it shows is malformed, that is a warning.

    Raises:
      UserError: it cannot be written.
    """
    try:
        yield
    except (Transient, outputs.Unwritten):
        raise
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())
        _LOG.warning(f"{path} could not be drawn ({reason}); the numbers are saved")
