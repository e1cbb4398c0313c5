"""Charts of cells in rows and columns: heat maps, and small bar charts."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from bipe_jax.report.charts import corner_name, dotted, rectangle
from bipe_jax.report.figures import LETTER, Margins, tip
from bipe_jax.report.palette import colour


class Cell(NamedTuple):
    """A cell with a colour of strength 0 … 1 and a text, or with a chart of small bars."""

    title: str
    strength: float = 0.0
    text: str = ""
    shares: Sequence[float] = ()


@dataclasses.dataclass(frozen=True)
class Field:
    """Cells in rows and columns: a heat map, or small bar charts with one scale.

    Attributes:
      rows, columns: keys and their labels, from the top and from the left.
      names: of the rows and of the columns.
      cells: by the keys of row and column; others are empty.
      wide: width of a cell without bars.
      after: number of columns before a vertical line; 0: none.
      top: the share at the full height of a cell with bars.
      uniform: shares that are drawn as lines in each cell with bars.
    """

    fixed: ClassVar[bool] = True
    rows: Mapping
    columns: Mapping
    names: tuple[str, str]
    cells: Mapping[tuple, Cell]
    wide: float = 46
    after: int = 0
    top: float = 1.0
    uniform: Sequence[float] = ()

    def table(self) -> list[tuple]:
        of_cells = [
            (self.rows[row], self.columns[column], cell.text or [*cell.shares], cell.title)
            for (row, column), cell in self.cells.items()
        ]
        return [(*self.names, "value", "cell"), *of_cells]

    def size(self) -> tuple[float, float, Margins]:
        wide, tall, _ = self._cell_size()
        left, across = 12 + LETTER * max(map(len, self.rows.values())), wide * len(self.columns)
        width = math.ceil(left + max(across + 2, LETTER * len(self.names[1])))
        return width, tall * len(self.rows) + 40, Margins(left, width - left - across, 34, 6)

    def _cell_size(self) -> tuple[float, float, int]:
        """Width and height of a cell, and the distance between its bars."""
        if bars := max((len(cell.shares) for cell in self.cells.values()), default=0):
            step = max(60 // bars, 4)
            return step * bars + 8, 40, step
        return self.wide, 24, 0

    def draw(self, axes: Axes) -> None:
        wide, tall, step = self._cell_size()
        rows = {key: tall * i for i, key in enumerate(self.rows)}
        columns = {key: wide * i for i, key in enumerate(self.columns)}
        # Data units are points.
        axes.set(xlim=(0, wide * len(columns)), ylim=(tall * len(rows), 0))
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xticks([x + wide / 2 for x in columns.values()], self.columns.values())
        axes.set_yticks([y + tall / 2 for y in rows.values()], self.rows.values())
        axes.tick_params(length=0, pad=5)
        axes.set_xlabel(self.names[1], loc="left", labelpad=6)
        corner_name(axes, self.names[0], self.size()[2].left, 8)
        gap = 2 if step else 0.5
        for (row, column), cell in self.cells.items():
            x, y = columns[column], rows[row]
            fill = (colour("heat"), min(max(cell.strength, 0.0), 1.0))
            look = {"fc": fill, "ec": colour("line")}
            parts: list[Artist] = [
                rectangle(axes, x + gap, y + gap, wide - 2 * gap, tall - 2 * gap, **look)
            ]
            if cell.shares:
                parts += self._draw_bars(axes, x + 4, y + tall - 3, step, cell.shares)
            else:
                of_text = colour("on-heat" if cell.strength > 0.85 else "ink")
                middle = x + wide / 2, y + tall / 2 + 4
                text = axes.text(*middle, cell.text, ha="center", color=of_text, zorder=2)
                parts.append(text)
            tip(cell.title, *parts)
        if self.after:
            dotted(axes, wide * self.after, 4)

    def _draw_bars(self, axes: Axes, x: float, floor: float, step: float, shares) -> list:
        """The bars, from their lower left corner, and the lines of `uniform`."""

        def tops(shares):
            heights = (34 * min(share / self.top, 1) for share in shares)
            return [(x + step * (n + 0.5), floor - height) for n, height in enumerate(heights)]

        def segments(ends, **look):
            path = Path(np.reshape(ends, (-1, 2)), [Path.MOVETO, Path.LINETO] * len(ends))
            return axes.add_artist(PathPatch(path, fill=False, clip_on=False, zorder=2, **look))

        bars = [((m, floor), (m, top)) for m, top in tops(shares) if floor - top >= 0.05]
        lines = [((m - step / 2, top), (m + step / 2, top)) for m, top in tops(self.uniform)]
        return [
            segments(bars, ec=colour("bar"), lw=step - 1),
            segments(lines, ec=(colour("ink"), 0.55), lw=1),
        ]
