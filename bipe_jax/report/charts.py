"""Charts: lines with error bars, and bars; `cells` has fields of cells.

A chart has a `size`, the width, height and margins of its panel, and draws itself on the panel's axes.
`inline` makes SVG for a page, `pictures` makes files.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from markupsafe import Markup
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation

from bipe_jax.report import downloads, figures, palette
from bipe_jax.report.figures import LETTER, Margins, label, tip
from bipe_jax.report.palette import colour
from bipe_jax.report.webpage import Figure

_MARKERS = "osD^vP"
LONGEST_NAME = 24  # letters of a curve's name
LINE = 13  # points, between the names of two curves
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


class Chart(Protocol):
    """What a panel shows. fixed: whether a page keeps its size if there is less room."""

    fixed: ClassVar[bool]

    def size(self) -> tuple[float, float, Margins]:
        """Width, height and margins of the panel."""
        ...

    def draw(self, axes: Axes) -> None:
        """Draws the chart on the panel's axes."""
        ...

    def table(self) -> list[tuple]:
        """What is drawn as a table, with its heads."""
        ...


@figures.drawing()
def inline(chart: "Chart", title: str) -> Markup:
    """The SVG of a chart for a page, with a title for screen readers."""
    figure, (axes,) = figures.panels(*chart.size())
    chart.draw(axes)
    return figures.inline(figure, title, fixed=chart.fixed)


def figure(name: str, chart: "Chart", title: str, caption: str = "", kind: str = "") -> Figure:
    """A chart on a page, with links to its files.

    Args:
      name: above the picture. title: for screen readers, and of the files.
      caption, kind: see `webpage.Figure`.
    """
    picture = inline(chart, title)
    return Figure(name, picture, downloads.links(title, picture, chart.table()), caption, kind)


class Point(NamedTuple):
    """A point of a curve.

    Attributes:
      error: half the height of its bar; 0: no bar. ends: of a bar that is not symmetric.
      dots: values it is the mean of.
    """

    x: float
    y: float
    title: str
    error: float = 0.0
    dots: tuple[float, ...] = ()
    ends: tuple[float, float] | None = None

    @property
    def bar(self) -> tuple[float, float] | None:
        """The lower and upper end of its bar; None: no bar, or one that no axis can show."""
        if self.ends or not self.error or not abs(self.error) < _HIGHEST:
            return self.ends
        return self.y - self.error, self.y + self.error


class Curve(NamedTuple):
    """Points with one style. name: written at the curve's end; "": none."""

    style: Style
    points: Sequence[Point]
    name: str = ""


_NONE = Curve(OTHER, ())

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
      ticks: numbers, of which as many are labelled as there is room for.
      trained: training lengths, which are marked on the x axis.
      scale: of the x axis, one of the above.
      log: whether the y axis is logarithmic.
      shares: the y axis begins at 0 and shows percentages.
      x_reach, y_reach: further numbers that the axes include, without ticks.
    """

    fixed: ClassVar[bool] = False
    curves: Sequence[Curve]
    x_name: str
    y_name: str
    ticks: Collection[float]
    trained: Collection[float] = ()
    scale: Mapping = dataclasses.field(default_factory=lambda: DOUBLINGS)
    log: bool = False
    shares: bool = False
    x_reach: Collection[float] = ()
    y_reach: Collection[float] = ()

    def table(self) -> list[tuple]:
        of_points = [
            (p.x, p.y, p.error or "", *(p.bar or ("", "")), p.title)
            for curve in self.curves
            for p in curve.points
        ]
        return [(self.x_name, self.y_name, "error", "low", "high", "point"), *of_points]

    def size(self) -> tuple[float, float, Margins]:
        names = max(len(label(curve.name, LONGEST_NAME)) for curve in self.curves or [_NONE])
        right = 6 + (LETTER * names + 8 if names else 0)
        return 354 + right, 240, Margins(44, right, 34, 38)

    def draw(self, axes: Axes) -> None:
        low = 0 if self.log else -_HIGHEST
        curves = [
            curve._replace(points=[p for p in curve.points if low < p.y < _HIGHEST])
            for curve in self.curves
        ]
        points = [p for curve in curves for p in curve.points]
        self._x_axis(axes)
        self._y_axis(axes, points)
        low, high = axes.get_xlim()
        for length in sorted({length for length in self.trained if low <= length <= high}):
            dotted(axes, length, 12)
            is_left = axes.transData.transform((length, 1))[0] - axes.bbox.x0 < axes.bbox.width / 2
            axes.annotate(
                f"trained to {length:,}", (length, 1), (4 if is_left else -4, 5), color=colour("soft"),
                xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="left" if is_left else "right",
            )  # fmt: skip
        # Error bars are drawn side by side.
        shift = min(4, 14 / len(curves)) if any(p.bar for p in points) else 0
        for number, curve in enumerate(curves):
            _draw_curve(axes, curve, (number - (len(curves) - 1) / 2) * shift)
        _name_ends(axes, [curve for curve in curves if curve.name and curve.points])

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
        ends = [end for p in points for end in p.bar or (p.y,)]
        ends += [y for p in points for y in p.dots if y < _HIGHEST]
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


def short(number: float) -> str:
    """16384 -> "16k", 1000 -> "1,000"."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= size and number % size == 0:
            return f"{number // size:g}{letter}"
    return f"{number:,.10g}"


def _name_ends(axes: Axes, curves: Sequence[Curve]) -> None:
    """Writes the names of curves to the right of the axes, at the heights of their ends."""
    at = [float(axes.transData.transform((c.points[-1].x, c.points[-1].y))[1]) for c in curves]
    for curve, height in zip(curves, apart(at, LINE), strict=True):
        axes.annotate(
            label(curve.name, LONGEST_NAME), (1, (height - axes.bbox.y0) / axes.bbox.height), (8, 0),
            xycoords="axes fraction", textcoords="offset points", va="center",
            color=colour(curve.style.name), annotation_clip=False,
        )  # fmt: skip


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Places that are at least `gap` apart, in the same order, as near as possible to the given ones."""
    blocks: list[
        list[float]
    ] = []  # of places that touch: [their first, how many, ...their own firsts]
    order = sorted(range(len(places)), key=lambda i: places[i])
    for i in order:
        blocks.append([places[i], 1, places[i]])
        while len(blocks) > 1 and blocks[-2][0] + gap * blocks[-2][1] > blocks[-1][0]:
            _, count, *others = blocks.pop()
            block = blocks[-1]
            block[2:] += [first - gap * block[1] for first in others]
            block[1] += count
            block[0] = sum(block[2:]) / len(block[2:])
    moved = [first + gap * n for first, count, *_ in blocks for n in range(int(count))]
    return [moved[order.index(i)] for i in range(len(places))]


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
        dots = [y for y in p.dots if axes.get_ylim()[0] <= y < _HIGHEST]
        parts = [add([p.x] * len(dots), dots, linestyle="none", marker="o", markersize=2.4)]
        parts += [add([p.x], [p.y], linestyle="none", **small)]
        if p.bar:
            ends = np.clip(p.bar, *axes.get_ylim())
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

    fixed: ClassVar[bool] = False
    bars: Sequence[Bar]
    top: float

    def table(self) -> list[tuple]:
        return [("bar", "share", "title"), *((b.label, b.share, b.title) for b in self.bars)]

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
            hit = rectangle(axes, i, 0, 1, self.top, alpha=0)
            tip(bar.title, hit, rectangle(axes, i + gap, 0, 1 - 2 * gap, high, fc=colour("bar")))


def rectangle(axes: Axes, x: float, y: float, width: float, height: float, **look) -> Artist:
    """Draws a rectangle; `look` are arguments of matplotlib."""
    look = {"fc": colour("line"), "clip_on": False, "zorder": 2} | look
    return axes.add_artist(Rectangle((x, y), width, height, **look))


def dotted(axes: Axes, x: float, beyond: float) -> None:
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
