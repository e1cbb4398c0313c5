"""Charts: lines with error bars, bars, and fields of cells.

A chart has a `size`, the width, height and margins of its panel, and draws itself on the panel's axes.
`inline` makes SVG for a page, `pictures` makes files.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.transforms import ScaledTranslation

from bipe_jax.report import figures, palette
from bipe_jax.report.figures import LETTER, Margins, label, tip
from bipe_jax.report.palette import colour

_MARKERS = "osD^vP"
_HIGHEST = 1e100  # of a value that an axis can show, with room around it


class Style(NamedTuple):
    """The look of a curve: a name of the palette, and a marker of matplotlib."""

    name: str
    marker: str

    def line(self, **changes) -> dict:
        """The style as arguments of matplotlib."""
        size = 5 if self.marker in ("s", "D") else 6
        look = {"color": colour(self.name), "marker": self.marker, "markersize": size}
        return look | {"linewidth": 1.6 if self.marker else 1} | changes


OTHER = Style("other", "")  # of curves without a colour of their own


def series(number: int) -> Style:
    """The style of one of several curves without an order."""
    return Style(f"s{number % palette.SERIES}", _MARKERS[number % len(_MARKERS)])


def ramp(number: int, count: int) -> Style:
    """The style of one of several curves in order."""
    step = round(number * (palette.STEPS - 1) / max(count - 1, 1))
    return Style(f"r{step}", _MARKERS[number % len(_MARKERS)]) if count > 1 else series(0)


@functools.cache
@figures.drawing()
def key(style: Style) -> Markup:
    """The picture of a curve for a legend."""
    figure, (axes,) = figures.panels(26, 12, Margins(0, 0, 0, 0))
    axes.set(xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[])
    axes.add_artist(Line2D([-1, 0, 1], [0, 0, 0], markevery=[1], clip_on=False, **style.line()))
    return figures.inline(figure, "", fixed=True)


@figures.drawing()
def inline(chart: "Lines | Bars | Field", title: str) -> Markup:
    """The SVG of a chart for a page, with a title for screen readers."""
    figure, (axes,) = figures.panels(*chart.size())
    chart.draw(axes)
    return figures.inline(figure, title, fixed=isinstance(chart, Field))


class Point(NamedTuple):
    """A point of a curve. error: half the height of its bar; 0: no bar."""

    x: float
    y: float
    title: str
    error: float = 0.0


class Curve(NamedTuple):
    """Points with one style."""

    style: Style
    points: Sequence[Point]


# Arguments of `set_xscale`: logarithmic; logarithmic with room for 0, which makes doubling bins equal;
# logarithmic in the number + 1.
DOUBLINGS = {"value": "log", "base": 2}
DOUBLING_BINS = {"value": "symlog", "base": 2, "linthresh": 1, "linscale": 0.5}
DOUBLINGS_OF_NEXT = {"value": "function", "functions": (np.log1p, np.expm1)}


@dataclasses.dataclass(frozen=True)
class Lines:
    """Curves with error bars; values that the y axis cannot show, such as NaN, are left out.

    Attributes:
      x_name, y_name: of the axes, with units.
      ticks: whole numbers, of which as many are labelled as there is room for.
      trained: training lengths, which are marked on the x axis.
      scale: of the x axis, one of the above.
      log: whether the y axis is logarithmic.
      shares: the y axis begins at 0 and shows percentages.
      x_reach, y_reach: further numbers that the axes include, without ticks.
    """

    curves: Sequence[Curve]
    x_name: str
    y_name: str
    ticks: Collection[int]
    trained: Collection[int] = ()
    scale: Mapping = dataclasses.field(default_factory=lambda: DOUBLINGS)
    log: bool = False
    shares: bool = False
    x_reach: Collection[float] = ()
    y_reach: Collection[float] = ()

    def size(self) -> tuple[float, float, Margins]:
        return 360, 240, Margins(44, 6, 34, 38)

    def draw(self, axes: Axes) -> None:
        low = 0 if self.log else -_HIGHEST
        curves = [
            Curve(style, [p for p in points if low < p.y < _HIGHEST])
            for style, points in self.curves
        ]
        points = [p for curve in curves for p in curve.points]
        self._x_axis(axes)
        self._y_axis(axes, points)
        low, high = axes.get_xlim()
        for length in sorted({length for length in self.trained if low <= length <= high}):
            _dotted(axes, length, 12)
            is_left = axes.transData.transform((length, 1))[0] - axes.bbox.x0 < axes.bbox.width / 2
            axes.annotate(
                f"trained to {length:,}", (length, 1), (4 if is_left else -4, 5), color=colour("soft"),
                xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="left" if is_left else "right",
            )  # fmt: skip
        # Error bars are drawn side by side.
        shift = min(4, 14 / len(curves)) if any(p.error for p in points) else 0
        for number, curve in enumerate(curves):
            _draw_curve(axes, curve, (number - (len(curves) - 1) / 2) * shift)

    def _x_axis(self, axes: Axes) -> None:
        values = sorted(set(self.ticks))
        low, high = values[0], max((*values, *self.x_reach))
        if low == high:
            low, high = (low / 2, high * 2) if low else (0, 1)
        axes.set_xscale(**self.scale)
        axes.margins(x=0.03)
        axes.update_datalim([(low, 1), (high, 1)], updatey=False)
        axes.autoscale_view(scaley=False)

        middles = axes.transData.transform([(value, 1) for value in values])[:, 0]
        half = np.array([LETTER * len(short(value)) / 2 + 2 for value in values])
        every = 1
        while np.any((middles + half)[::every][:-1] > (middles - half)[::every][1:]):
            every += 1
        axes.set_xticks(values[::every], [short(value) for value in values[::every]])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(label(self.x_name), labelpad=6)

    def _y_axis(self, axes: Axes, points: Sequence[Point]) -> None:
        errors = [p.error if abs(p.error) < _HIGHEST else 0 for p in points]
        ends = [p.y + sign * e for p, e in zip(points, errors, strict=True) for sign in (-1, 1)]
        ends = [end for end in (*ends, *self.y_reach) if end > 0 or not self.log] or [1.0]
        ends += [0.0] if self.shares else []
        axes.set_yscale("log" if self.log else "linear")
        axes.margins(y=0.06)
        axes.update_datalim([(1, end) for end in ends], updatex=False)
        axes.autoscale_view(scalex=False)
        low, high = axes.get_ylim()
        if self.shares:
            axes.set_ylim(0, min(high, max(1, *ends)))
        if self.log and high / low > 6:
            subs = (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 1e4 else (1,)
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
        else:
            axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        factor, form = (100, "{:.3g}%") if self.shares else (1, "{:,.10g}")
        axes.yaxis.set_major_formatter(lambda value, _: form.format(round(factor * value, 10)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        _grid(axes)
        corner_name(axes, label(self.y_name), self.size()[2].left, 22)


def short(number: int) -> str:
    """16384 -> "16k", 1000 -> "1,000"."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= size and number % size == 0:
            return f"{number // size}{letter}"
    return f"{number:,}"


def _draw_curve(axes: Axes, curve: Curve, shift: float) -> None:
    """Draws a curve, moved to the right by `shift`."""
    points = curve.points
    moved = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)

    def add(xs, ys, **changes):
        look = curve.style.line(transform=moved, clip_on=False, **changes)
        return axes.add_artist(Line2D(xs, ys, **look))

    if len(points) > 1:
        add([p.x for p in points], [p.y for p in points], marker="")
    small = {"markersize": 3.6} if len(points) > 12 else {}
    for p in points:
        parts = [add([p.x], [p.y], linestyle="none", **small)]
        if p.error and abs(p.error) < _HIGHEST:
            ends = np.clip([p.y - p.error, p.y + p.error], *axes.get_ylim())
            parts.append(add([p.x, p.x], ends, marker="_", markersize=6, linewidth=1))
        # An invisible marker that is easier to point at.
        parts.append(add([p.x], [p.y], linestyle="none", marker="s", markersize=18, alpha=0))
        tip(p.title, *parts)


class Bar(NamedTuple):
    """A bar. label: below it."""

    label: str
    share: float
    title: str


@dataclasses.dataclass(frozen=True)
class Bars:
    """Bars of shares. top: the share at the full height."""

    bars: Sequence[Bar]
    top: float

    def size(self) -> tuple[float, float, Margins]:
        return 320, 150, Margins(34, 10, 12, 22)

    def draw(self, axes: Axes) -> None:
        count = len(self.bars)
        axes.set(xlim=(0, count), ylim=(0, self.top))
        levels = (0, self.top / 2, self.top)
        axes.set_yticks(levels, [f"{share:.0%}" for share in levels])
        _grid(axes)
        labelled = range(0, count, -(-count // 7))
        axes.set_xticks([i + 0.5 for i in labelled], [self.bars[i].label for i in labelled])
        axes.tick_params(axis="x", length=0, pad=5)
        gap, least = count / axes.bbox.width, self.top / axes.bbox.height
        for i, bar in enumerate(self.bars):
            high = max(bar.share, least) if bar.share else 0  # small shares stay visible
            hit = _rectangle(axes, i, 0, 1, self.top, alpha=0)
            tip(bar.title, hit, _rectangle(axes, i + gap, 0, 1 - 2 * gap, high, fc=colour("bar")))


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

    rows: Mapping
    columns: Mapping
    names: tuple[str, str]
    cells: Mapping[tuple, Cell]
    wide: float = 46
    after: int = 0
    top: float = 1.0
    uniform: Sequence[float] = ()

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
                _rectangle(axes, x + gap, y + gap, wide - 2 * gap, tall - 2 * gap, **look)
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
            _dotted(axes, wide * self.after, 4)

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


def _rectangle(axes: Axes, x: float, y: float, width: float, height: float, **look) -> Artist:
    look = {"fc": colour("line"), "clip_on": False, "zorder": 2} | look
    return axes.add_artist(Rectangle((x, y), width, height, **look))


def _dotted(axes: Axes, x: float, beyond: float) -> None:
    """A vertical line that exceeds the upper end by `beyond`."""
    dots = {"linewidth": 1, "linestyle": (0, (2, 3)), "color": colour("soft")}
    axes.axvline(x, 0, 1 + beyond / axes.bbox.height, clip_on=False, **dots)


def _grid(axes: Axes) -> None:
    axes.tick_params(axis="y", length=0, pad=5)
    axes.grid(axis="y", color=colour("line"), linewidth=0.8)
    axes.set_axisbelow(True)


def corner_name(axes: Axes, name: str, left: float, above: float, **look) -> None:
    """Writes a name, shifted to the left of and above the axes' upper left corner."""
    units = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(name, (0, 1), (-left, above), **units, **look)
