"""What the sections of a report share."""

from collections.abc import Iterable, Sequence

from bipe_jax.report import svg
from bipe_jax.report.results import Run
from bipe_jax.report.text import escaped


def unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def legend(entries: Iterable[tuple[svg.Style, str]]) -> str:
    spans = (f"<span>{svg.key(style)}{escaped(name)}</span>" for style, name in entries)
    return f'<p class="legend">{"".join(spans)}</p>'


def runs_legend(numbered: Sequence[tuple[int, Run]]) -> str:
    """Nothing where there is only one."""
    return legend((svg.series(i), run.name) for i, run in numbered) if len(numbered) > 1 else ""


def span(part: dict) -> str:
    """The ends of a bin, as text."""
    low, high = part["from"], part["to"]
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
