"""Pages from templates, each one HTML file without scripts or external resources."""

import dataclasses
from collections.abc import Iterable, Sequence

import jinja2
from markupsafe import Markup

from bipe_jax.report.palette import PALETTE
from bipe_jax.report.text import visible
from bipe_jax.workdir import outputs


@dataclasses.dataclass(frozen=True)
class Table:
    """A table. texts: the number of first columns that hold text, which is aligned to the left."""

    head: Sequence
    rows: Iterable[Sequence]
    texts: int = 1


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture with a title and a caption.

    Attributes:
      downloads: links to its files, see `downloads`.
      kind: its CSS class.
    """

    title: str
    picture: Markup
    downloads: Markup
    caption: str = ""
    kind: str = ""


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("bipe_jax.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values) -> str:
    """A page as HTML. Values are escaped unless they are `Markup`."""
    return _ENVIRONMENT.get_template(template).render(values, palette=PALETTE)


def write(page: str, path: str) -> None:
    """Writes a page atomically. Raises UserError if that fails."""
    outputs.write_bytes(path, page.encode())
