"""Pictures as files: perplexity by length, and accuracy in tasks."""

import contextlib
import importlib.metadata
import io
import logging
import os
import textwrap
from collections.abc import Generator, Mapping, Sequence

from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from bipe_jax.errors import Transient, UserError
from bipe_jax.report import charts, comparing, figures, palette
from bipe_jax.report import perplexity as perplexities
from bipe_jax.report.cells import Field
from bipe_jax.report.charts import Lines
from bipe_jax.report.comparing import Group
from bipe_jax.report.figures import LETTER, label
from bipe_jax.report.results import Tasks
from bipe_jax.report.tasks import heat
from bipe_jax.report.text import line
from bipe_jax.workdir import outputs

_NARROWEST = 170  # points, of a panel
# The keys of a title and a description in the metadata of a format.
_ABOUT = {
    "png": ("Title", "Description"),
    "svg": ("Title", "Description"),
    "pdf": ("Title", "Subject"),
}

_LOG = logging.getLogger(__name__)


def perplexity(
    groups: Sequence[Group], path: str, width: float | None = None, ratio: bool = False
) -> None:
    """Draws evaluations: a panel for each data set, with standard errors, or intervals over seeds.

    Args:
      groups: the most important first. Those after the first `palette.SERIES` are grey, without names.
      path: its extension is the format.
      width: of the picture in inches; None: as the panels need.
      ratio: lengths are in multiples of the training length.

    Raises:
      UserError: the file cannot be written, or the runs scored other targets.
    """
    by = comparing.measure(groups)
    count = palette.SERIES
    styled = [
        (charts.series(i) if i < count else charts.OTHER, group) for i, group in enumerate(groups)
    ]
    several = len(styled) > 1
    # Names that are too long, or alike where they are cut, are in a legend.
    named = several and all(len(label(g.name)) <= charts.LONGEST_NAME for _, g in styled[:count])
    legend = {group.name: style for style, group in styled[:count] if several and not named}
    if len(styled) > count:
        legend[f"{len(styled) - count} others"] = charts.OTHER
    # Grey ones are drawn below.
    panels = perplexities.lines([*styled[count:], *styled[:count]], by, ratio, named)
    described = (f"{by.name} by length".capitalize(), _description(groups))
    _save(panels, path, len(panels), legend=legend, width=width, described=described)


def _description(groups: Sequence[Group]) -> str:
    """What a picture shows: the checkpoints, and what they were scored on."""
    of_runs = [
        f"{line(group.name)}{f', {seed}' if seed else ''}: step {evaluation.step}, {evaluation.protocol}, "
        f"context {evaluation.context}, tokenizer {evaluation.tokenizer}, targets "
        + " ".join(f"{line(targets.set)}={targets.targets}" for targets in evaluation.targets)
        for group in groups
        for seed, evaluation in group.runs.items()
    ]
    text = "; ".join([*of_runs, f"bipe_jax {importlib.metadata.version('bipe-jax')}"])
    # Names of directories may be no UTF-8.
    return text.encode(errors="backslashreplace").decode()


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


def chart(name: str, drawn: Lines, path: str) -> None:
    """Draws one chart with its name above it. Raises UserError: the file cannot be written."""
    version = f"bipe_jax {importlib.metadata.version('bipe-jax')}"
    _save({name: drawn}, path, 1, described=(name, version))


@figures.drawing()
def _save(
    panels: Mapping[str, Lines | Field],
    path: str,
    across: int,
    heading="",
    legend: Mapping = {},
    width: float | None = None,
    described: tuple[str, str] = ("", ""),
):
    """Writes charts of one size, with their titles.

    Args:
      across: panels in a row.
      heading: lines above the panels.
      legend: names and their styles.
      width: of the picture in inches; None: as the panels need.
      described: a title and a description, for the metadata of the formats that have them.
    """
    wide, height, margins = next(iter(panels.values())).size()
    margins = margins._replace(top=margins.top + 22, right=margins.right + 16)
    if width is not None:
        across = max(min(across, int(72 * width // _NARROWEST)), 1)
        wide = 72 * width / across - 16
    figure, every = figures.panels(wide + 16, height + 22, margins, across, len(panels))
    for axes, (name, chart) in zip(every, panels.items(), strict=True):
        chart.draw(axes)
        title = label(name, int(wide / LETTER))
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
    box = figure.get_tightbbox().padded(0.1)
    if width is not None:
        box = Bbox.from_extents(0, box.y0, width, box.y1)
    about = {key: text for key, text in zip(_ABOUT.get(kind, ()), described, strict=False)}
    figure.savefig(buffer, format=kind, dpi=200, facecolor="white", bbox_inches=box, metadata=about)
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
