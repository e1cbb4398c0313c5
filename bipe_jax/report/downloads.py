"""Links to download a picture of a page and its numbers. The files are in the links: a page loads nothing."""

import base64
import csv
import io
import re
from collections.abc import Sequence

from markupsafe import Markup

from bipe_jax.report import palette
from bipe_jax.report.text import line

_FONT = "font-family: system-ui, sans-serif; font-size: 11px"


def links(name: str, picture: Markup, rows: Sequence[Sequence]) -> Markup:
    """Links to "NAME.svg", in the light colours, and to "NAME.csv".

    Args:
      picture: inline SVG, see `figures.inline`. rows: of the table, heads first.
    """
    title = re.sub(r"[^\w.-]+", "-", line(name)).strip("-.")[:80] or "figure"
    kinds = (("svg", "image/svg+xml", _standalone(picture)), ("csv", "text/csv", _csv(rows)))
    form = Markup('<a download="{}.{}" href="data:{};base64,{}">{}</a>')
    return Markup(" ").join(
        form.format(title, kind, media, _base64(text), kind.upper()) for kind, media, text in kinds
    )


def _base64(text: str) -> str:
    """UTF-8 in base 64; what UTF-8 cannot say, as names of files may have it, is escaped."""
    return base64.b64encode(text.encode(errors="backslashreplace")).decode()


def _standalone(picture: Markup) -> str:
    """Inline SVG as a file: with its name space, a font, and colours instead of variables."""
    text = re.sub(r"var\(--([\w-]+)\)", lambda name: palette.colour(name[1]), picture)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" style="{_FONT}" fill="{palette.colour("ink")}"'
    return text.replace("<svg", head, 1)


def _csv(rows: Sequence[Sequence]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
