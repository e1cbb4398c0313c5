"""Figures of matplotlib, as inline SVG of a page or as files.

A figure is drawn with the light colours of the palette. In a page each becomes the CSS variable of its
name, so that the page chooses between light and dark. Lengths are points, and pixels of a page.
"""

import contextlib
import io
import itertools
import re
import urllib.parse
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bipe_jax.report import palette
from bipe_jax.report.palette import colour
from bipe_jax.report.text import visible

_SVG = "{http://www.w3.org/2000/svg}"
_RC: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"} | {
    "font.size": 11,
    "text.parse_math": False,  # names may have dollars
    "svg.fonttype": "none",  # <text>, in the page's font
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "axes.labelcolor": colour("ink"),
    "text.color": colour("ink"),
    "xtick.color": colour("line"),
    "xtick.labelcolor": colour("soft"),
    "ytick.labelcolor": colour("soft"),
    "lines.solid_capstyle": "butt",
    "lines.dash_capstyle": "butt",
}
# The attributes of matplotlib's SVG that are kept.
_KEPT = {
    "d", "x", "y", "transform", "fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity",
    "stroke-dasharray", "opacity", "text-anchor", "font-weight",
}  # fmt: skip
_TIP = "tip:"
LETTER = 6.4  # mean width of a letter


def label(text, most: int = 60) -> str:
    """Any value as one line for a picture, cut to `most` characters."""
    line = " ".join(visible(str(text)).split())
    return line if len(line) <= most else line[: most - 1] + "…"


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """A context for all drawing, with settings of matplotlib that do not depend on the user's."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # A page shows characters that are missing from matplotlib's font.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


class Margins(NamedTuple):
    """Room around the axes of a panel."""

    left: float
    right: float
    top: float
    bottom: float


def panels(
    width: float, height: float, margins: Margins, across: int = 1, count: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure of panels of one size, in rows.

    Args:
      width, height: of a panel, with its margins.
      across: panels in a row.
    """
    whole = width * across, height * -(-count // across)
    figure = Figure(figsize=(whole[0] / 72, whole[1] / 72), dpi=72, frameon=False)
    size = width - margins.left - margins.right, height - margins.top - margins.bottom
    for i in range(count):
        x = i % across * width + margins.left
        y = whole[1] - (i // across + 1) * height + margins.bottom
        axes = figure.add_axes((x / whole[0], y / whole[1], size[0] / whole[0], size[1] / whole[1]))
        axes.patch.set_visible(False)
    return figure, figure.axes


def tip(title: str, *artists: Artist) -> None:
    """Makes a page show the title while the pointer is on one of the artists.

    The artists must be drawn one after another: equal in zorder, and added without others in between.
    """
    for artist in artists:
        artist.set_gid(_TIP + urllib.parse.quote(visible(title)))


def inline(figure: Figure, title: str, fixed: bool = False) -> Markup:
    """SVG for a page, without ids and with colours as CSS variables.

    Args:
      title: for screen readers, which skip the picture if it is "".
      fixed: the picture keeps its size if there is less room.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    drawn = ElementTree.fromstring(buffer.getvalue())
    box = drawn.attrib["viewBox"]
    root = ElementTree.Element("svg", viewBox=box)
    if fixed:
        width, height = box.split()[2:]
        root.attrib |= {"class": "fixed", "width": width, "height": height}
    root.attrib |= (
        {"role": "img", "aria-label": visible(title)} if title else {"aria-hidden": "true"}
    )
    marks = {f"#{node.get('id')}": node for node in drawn.iter(_SVG + "path")}
    for tip_title, leaves in itertools.groupby(_leaves(drawn), lambda leaf: leaf[0]):
        parent = root
        if tip_title is not None:
            parent = ElementTree.SubElement(root, "g", {"class": "tip"})
            ElementTree.SubElement(parent, "title").text = tip_title
        parent.extend([_plain(node, marks) for _, node in leaves])
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _leaves(node, title: str | None = None) -> Iterator[tuple[str | None, ElementTree.Element]]:
    """Yields the elements that are drawn, with the titles of their tips."""
    for child in node:
        if child.tag == _SVG + "g":
            gid = child.get("id", "")
            own = urllib.parse.unquote(gid.removeprefix(_TIP)) if gid.startswith(_TIP) else title
            yield from _leaves(child, own)
        elif child.tag in (_SVG + "path", _SVG + "text", _SVG + "use"):
            yield title, child


def _plain(node, marks: dict[str, ElementTree.Element]) -> ElementTree.Element:
    """A path or a text with attributes instead of styles, and the path of a mark inside."""
    attributes = dict(node.attrib)
    attributes |= dict(part.split(": ", 1) for part in node.get("style", "").split("; ") if part)
    name = node.tag.removeprefix(_SVG)
    if name == "use":
        name = "path"
        mark = marks[attributes["{http://www.w3.org/1999/xlink}href"]]
        attributes["d"] = mark.get("d")
        attributes["transform"] = f"translate({attributes.pop('x')} {attributes.pop('y')})"
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    kept = {key: _short(value) for key, value in attributes.items() if key in _KEPT}
    plain = ElementTree.Element(name, kept)
    plain.text = node.text if name == "text" else None
    return plain


def _short(value: str) -> str:
    value = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{round(float(number[0]), 2):g}", value)
    value = re.sub(r"#[0-9a-f]{6}", lambda light: f"var(--{palette.NAMES[light[0]]})", value)
    return re.sub(r"\s+", " ", value).strip()
