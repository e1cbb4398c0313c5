"""Pictures as SVG text for pages: line charts, bars, heat maps and fields of small bars.

Colours come from the page's style (STYLE, and `webpage`), for light and dark alike. A thing's <title>
is what a browser shows when it is pointed at. Lengths are in the picture's own units, which are
pixels at its natural size.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bipe_jax.report.axes import Axis
from bipe_jax.report.text import escaped

STYLE = """
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg.fixed { width: auto; margin-top: .3rem; }
svg text { fill: var(--soft); } svg line { stroke: var(--line); }
svg .bar { fill: var(--bar); } svg .heat { fill: var(--heat); } svg .hit { fill: transparent; }
svg g:hover > .bar, svg g:hover > .mark { fill: var(--ink); }
svg .name { fill: var(--ink); } svg .on { fill: #fff; } svg .off { fill: var(--ink); }
svg .cell { fill: var(--card); stroke: var(--line); } svg g:hover > .cell { stroke: var(--ink); }
svg .trained { stroke: var(--soft); stroke-dasharray: 2 3; }
svg .line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
svg .error { stroke: var(--c); stroke-width: 1; } svg .mark { fill: var(--c); }
svg .alike { fill: none; stroke: var(--ink); stroke-opacity: .55; }
:root { --s0: #1f6fb2; --s1: #c8501e; --s2: #0b8a67; --s3: #a8458c; --s4: #8a6d00; --s5: #5b4fc4;
  --s6: #4a4a48; --weak: #e3a008; --middle: #c2417c; --strong: #2f3fa8;
  --heat: #2a6fb5; }
@media (prefers-color-scheme: dark) { :root { --s0: #6db3f2; --s1: #ff9a66; --s2: #4fd1a5;
  --s3: #ee9bd0; --s4: #e0c04a; --s5: #a9a0ff; --s6: #c9c8c2;
  --weak: #8d6ff0; --middle: #f0719f; --strong: #ffd166;
  --heat: #3a7cc2; } }
"""
STYLE += "".join(f".s{i} {{ --c: var(--s{i}); }}\n" for i in range(7))
_STEPS = 9  # of the colours of things in order
for _i in range(_STEPS):
    _ends = ("weak", "middle") if _i < _STEPS // 2 else ("middle", "strong")
    _share = 200 * _i // (_STEPS - 1) % 100 if _i < _STEPS - 1 else 100
    STYLE += (
        f".r{_i} {{ --c: color-mix(in oklab, var(--{_ends[1]}) {_share}%, var(--{_ends[0]})); }}\n"
    )
_MARKS = (
    "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0Z",  # a disc
    "M-2.9-2.9h5.8v5.8h-5.8Z",
    "M0-4L4 0L0 4L-4 0Z",
    "M0-3.8L3.8 3H-3.8Z",
    "M0 3.8L3.8-3H-3.8Z",
    "M-1.2-3.6h2.4v2.4h2.4v2.4h-2.4v2.4h-2.4v-2.4h-2.4v-2.4h2.4Z",  # a cross
)


class Style(NamedTuple):
    """How a curve looks: a class of STYLE, and the number of its mark."""

    name: str
    mark: int = 0


def series(number: int) -> Style:
    """Of one of several things without an order."""
    return Style(f"s{number % 7}", number % len(_MARKS))


def ramp(number: int, count: int) -> Style:
    """Of one of several things in order."""
    if count < 2:
        return series(0)
    return Style(f"r{round(number * (_STEPS - 1) / (count - 1))}", number % len(_MARKS))


def key(style: Style) -> str:
    """The picture of a curve for a legend."""
    return (
        f'<svg class="fixed key {style.name}" width="26" height="12" viewBox="-13 -6 26 12" '
        f'aria-hidden="true"><path class="line" d="M-13 0H13"/>'
        f'<path class="mark" d="{_MARKS[style.mark]}"/></svg>'
    )


class Point(NamedTuple):
    x: float
    y: float
    error: float  # half of the bar's height; 0: no bar
    title: str


class Curve(NamedTuple):
    style: Style
    points: list[Point]


_WIDTH, _HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 6, 32, 36
_INSET, _BESIDE = 9, 4  # room beside the outermost marks, and between curves with error bars


def lines(
    curves: Sequence[Curve], x: Axis, y: Axis, title: str, trained: Iterable[float] = ()
) -> str:
    """A line chart with error bars.

    Args:
      title: for those who do not see it.
      trained: places on the x axis up to which models were trained.
    """
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(point_x, point_y):
        return (
            _LEFT + _INSET + x.at(point_x) * (right - _LEFT - 2 * _INSET),
            bottom - y.at(point_y) * (bottom - _TOP),
        )

    parts = [_open(_WIDTH, _HEIGHT, title)]
    parts.append(f'<text class="name" x="2" y="11">{escaped(y.name)}</text>')
    middle = f'x="{(_LEFT + right) / 2:.1f}" y="{_HEIGHT - 4}" text-anchor="middle"'
    parts.append(f'<text class="name" {middle}>{escaped(x.name)}</text>')
    for value, label in y.ticks:
        height = at(x.low, value)[1]
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(
            f'<text x="{_LEFT - 5}" y="{height + 4:.1f}" text-anchor="end">{escaped(label)}</text>'
        )
    for value, label in x.ticks:
        place = at(value, y.low)[0]
        parts.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(
            f'<text x="{place:.1f}" y="{bottom + 16}" text-anchor="middle">{escaped(label)}</text>'
        )
    for value in sorted(set(trained)):
        if x.low <= value <= x.high:
            place = at(value, y.low)[0]
            anchor = ("start", 4) if place < (_LEFT + right) / 2 else ("end", -4)
            parts.append(
                f'<line class="trained" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP - 12}" y2="{bottom}"/>'
                f'<text x="{place + anchor[1]:.1f}" y="{_TOP - 4}" text-anchor="{anchor[0]}">'
                f"trained to {value:,}</text>"
            )
    barred = any(p.error for _, points in curves for p in points)
    for number, (style, points) in enumerate(curves):
        points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
        aside = (number - (len(curves) - 1) / 2) * min(_BESIDE, 14 / len(curves)) if barred else 0
        placed = [(px + aside, py) for px, py in (at(p.x, p.y) for p in points)]
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in placed)
        parts.append(f'<g class="{style.name}">')
        if len(points) > 1:
            parts.append(f'<path class="line" d="M{path}"/>')
        small = "scale(.6)" if len(points) > 12 else ""
        for point, (px, py) in zip(points, placed, strict=True):
            parts.append(f"<g><title>{escaped(point.title)}</title>")
            if point.error and math.isfinite(point.error):
                low = at(point.x, point.y - point.error)[1]
                high = at(point.x, point.y + point.error)[1]
                bar = f"M{px - 3:.1f} {low:.1f}h6M{px:.1f} {low:.1f}V{high:.1f}M{px - 3:.1f} {high:.1f}h6"
                parts.append(f'<path class="error" d="{bar}"/>')
            moved = f"translate({px:.1f} {py:.1f}){small}"
            parts.append(
                f'<path class="mark" transform="{moved}" d="{_MARKS[style.mark]}"/>'
                f'<circle class="hit" cx="{px:.1f}" cy="{py:.1f}" r="9"/></g>'
            )
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


class Bar(NamedTuple):
    label: str  # below it
    share: float
    title: str


def bars(held: Sequence[Bar], top: float, title: str) -> str:
    """Bars of shares. top: the share that the picture's height stands for."""
    width, height, left, right, above, below = 320, 150, 34, 10, 12, 22
    step, inner = (width - left - right) / len(held), height - above - below
    parts = [_open(width, height, title)]
    for share in (0.0, top / 2, top):
        y = above + inner * (1 - share / top)
        parts.append(f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    every = -(-len(held) // 7)
    for i, bar in enumerate(held):
        x = left + i * step
        tall = max(inner * bar.share / top, 1) if bar.share else 0  # what is there shows
        parts.append(
            f"<g><title>{escaped(bar.title)}</title>"
            f'<rect class="hit" x="{x:.1f}" y="{above}" width="{step:.1f}" height="{inner}"/>'
            f'<rect class="bar" x="{x + 1:.1f}" y="{above + inner - tall:.1f}" width="{step - 2:.1f}" '
            f'height="{tall:.1f}"/></g>'
        )
        if i % every == 0:
            middle = f'x="{x + step / 2:.1f}" y="{height - 6}" text-anchor="middle"'
            parts.append(f"<text {middle}>{escaped(bar.label)}</text>")
    return "".join([*parts, "</svg>"])


class Cell(NamedTuple):
    strength: float  # of the colour, 0 to 1
    text: str
    title: str


def heat(rows: Sequence[str], columns: Sequence[str], cells: dict, names: tuple[str, str],
         title: str, after: int = 0, wide: int = 46) -> str:  # fmt: skip
    """A heat map.

    Args:
      rows, columns: labels, from the top and from the left.
      cells: (row, column) -> Cell, by number; what is not there stays empty.
      names: of the two axes, that of the rows first.
      after: draws a line behind so many columns; 0: none.
      wide: width of a cell.
    """
    tall, above = 24, 18
    left = 12 + 6.5 * max(map(len, rows))
    width = max(left + wide * len(columns) + 2, left + 6.2 * len(names[1]))
    height = above + tall * len(rows) + 36
    parts = [_open(math.ceil(width), height, title, fixed=True)]
    parts.append(f'<text class="name" x="0" y="11">{escaped(names[0])}</text>')
    for i, label in enumerate(rows):
        y = above + tall * i + 16
        parts.append(f'<text x="{left - 6:.1f}" y="{y}" text-anchor="end">{escaped(label)}</text>')
    for j, label in enumerate(columns):
        x, y = left + wide * (j + 0.5), above + tall * len(rows) + 14
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escaped(label)}</text>')
    parts.append(f'<text class="name" x="{left:.1f}" y="{height - 4}">{escaped(names[1])}</text>')
    for (i, j), cell in cells.items():
        x, y = left + wide * j, above + tall * i
        strength = min(max(cell.strength, 0.0), 1.0)
        box = f'x="{x + 0.5:.1f}" y="{y + 0.5}" width="{wide - 1}" height="{tall - 1}"'
        side = "on" if strength > 0.85 else "off"
        parts.append(
            f'<g><title>{escaped(cell.title)}</title><rect class="cell" {box}/>'
            f'<rect class="heat" {box} fill-opacity="{strength:.3f}"/>'
            f'<text class="{side}" x="{x + wide / 2:.1f}" y="{y + 16}" text-anchor="middle">'
            f"{escaped(cell.text)}</text></g>"
        )
    if after:
        x, bottom = left + wide * after, above + tall * len(rows)
        parts.append(
            f'<line class="trained" x1="{x:.1f}" x2="{x:.1f}" y1="{above - 4}" y2="{bottom + 4}"/>'
        )
    return "".join([*parts, "</svg>"])


class Small(NamedTuple):
    shares: Sequence[float]  # bars, from the left
    title: str


def small_bars(rows: Sequence[str], columns: Sequence[str], cells: dict, names: tuple[str, str],
               top: float, title: str, alike: Sequence[float] = ()) -> str:  # fmt: skip
    """A field of small bar charts with one scale.

    Args:
      rows, columns, names: as for `heat`.
      cells: (row, column) -> Small, by number.
      top: the share that a chart's height stands for.
      alike: shares that are drawn as a line in each.
    """
    count = max((len(cell.shares) for cell in cells.values()), default=1)
    step = max(60 // count, 4)
    wide, tall, above = step * count + 4, 36, 30
    left = 12 + 6.5 * max(map(len, rows))
    width, height = left + (wide + 4) * len(columns), above + (tall + 4) * len(rows)
    parts = [_open(math.ceil(width), height, title, fixed=True)]
    parts.append(f'<text class="name" x="0" y="26">{escaped(names[0])}</text>')
    parts.append(f'<text class="name" x="{left:.1f}" y="11">{escaped(names[1])}</text>')
    for i, label in enumerate(rows):
        y = above + (tall + 4) * i + 22
        parts.append(f'<text x="{left - 6:.1f}" y="{y}" text-anchor="end">{escaped(label)}</text>')
    for j, label in enumerate(columns):
        x = left + (wide + 4) * j + wide / 2
        parts.append(f'<text x="{x:.1f}" y="26" text-anchor="middle">{escaped(label)}</text>')

    def height_of(share):
        return (tall - 2) * min(share / top, 1)

    for (i, j), cell in cells.items():
        x, y = left + (wide + 4) * j, above + (tall + 4) * i
        floor = y + tall - 1
        blocks = "".join(
            f"M{x + 2 + step * n:.1f} {floor}v-{height_of(share):.1f}h{step - 1}V{floor}Z"
            for n, share in enumerate(cell.shares)
            if height_of(share) >= 0.05
        )
        line = "".join(
            f"M{x + 1.5 + step * n:.1f} {floor - height_of(share):.1f}h{step}"
            for n, share in enumerate(alike)
        )
        line = f'<path class="alike" d="{line}"/>' if line else ""
        parts.append(
            f"<g><title>{escaped(cell.title)}</title>"
            f'<rect class="cell" x="{x:.1f}" y="{y}" width="{wide}" height="{tall}"/>'
            f'<path class="bar" d="{blocks}"/>{line}</g>'
        )
    return "".join([*parts, "</svg>"])


def _open(width: float, height: float, title: str, fixed: bool = False) -> str:
    """The start of a picture; a fixed one keeps its size where there is less room."""
    size = f' class="fixed" width="{width}" height="{height}"' if fixed else ""
    return f'<svg viewBox="0 0 {width} {height}"{size} role="img" aria-label="{escaped(title)}">'
