"""Perplexity by length: curves, and all numbers."""

from collections.abc import Sequence

from markupsafe import Markup

from bipe_jax.report import charts, comparing
from bipe_jax.report.charts import Curve, Lines, Point, Style
from bipe_jax.report.comparing import Group, Measure, number
from bipe_jax.report.webpage import Table

Styled = Sequence[tuple[Style, Group]]

# Columns of the table of all numbers: field, name, form.
_COLUMNS = (
    ("loss", "loss (nats)", ".4f"),
    ("bits_per_byte", "bits/byte", ".4f"),
    ("tokens", "tokens", ","),
    ("documents", "documents", ","),
    ("documents_of_set", "in the set", ","),
    ("segment_tokens_mean", "tokens/segment", ",.1f"),
    ("segment_tokens_p99", "p99", ",.0f"),
    ("segments_per_block", "segments/block", ",.1f"),
    ("segment_max", "last segment", ",.0f"),
)


def section(groups: Sequence[Group], baseline: str = "") -> dict | None:
    """The values of the page's section; None without groups.

    Args:
      groups: of runs with an evaluation.json.
      baseline: name of the group that the others are compared with; "": none.

    Raises:
      UserError: the runs cannot be compared, or the baseline is none of them.
    """
    by = comparing.measure(groups)
    compared = differences(groups, baseline, by) if baseline else None
    if not groups:
        return None
    styled = [(charts.series(i), group) for i, group in enumerate(groups)]
    several = len(groups) > 1
    of_sets = lines(styled, by)
    return {
        "several": several,
        "by": by.name,
        "seeds": max(len(group.runs) for group in groups),
        "legend": [(charts.key(style), group.name) for style, group in styled if several],
        "figures": [
            charts.figure(name, chart, f"{name}: {by.name}") for name, chart in of_sets.items()
        ],
        "matrices": {name: matrix(groups, name, by) for name in of_sets if several},
        "baseline": baseline,
        "differences": compared,
        "numbers": _numbers(groups, several),
    }


def lines(
    styled: Styled, by: Measure, ratio: bool = False, named: bool = False
) -> dict[str, Lines]:
    """A chart for each data set, with a curve for each group, and a dot for each of several seeds.

    Args:
      ratio: lengths are in multiples of the training length.
      named: names are written at the curves' ends, but for grey ones.
    """
    of_sets = {}
    for name in dict.fromkeys(row.set for _, group in styled for row in group.first.results):
        curves, trained = [], set()
        for style, group in styled:
            training_length = group.first.training_length
            unit = training_length if ratio else 1
            points = [
                Point(length / unit, value.value,
                      f"{group.name}, {length:,} tokens: {by.plus_minus(value.value, value.error)}",
                      value.error or 0, value.each if len(value.each) > 1 else ())
                for length in group.lengths(name)
                if (value := group.value(name, length, by))
            ]  # fmt: skip
            if points:
                at_end = group.name if named and style != charts.OTHER else ""
                curves.append(Curve(style, points, at_end))
                trained |= set() if ratio else {training_length}
        ticks = {p.x for curve in curves for p in curve.points} | trained
        axis = "length / training length" if ratio else "length (tokens)"
        of_sets[name] = Lines(curves, axis, by.name, ticks, trained, log=True)
    return of_sets


def matrix(groups: Sequence[Group], name: str, by: Measure) -> Table:
    """The values of one set by group and length; in bold those that no other group beats."""
    lengths = sorted({length for group in groups for length in group.lengths(name)})
    best = {n: comparing.unbeaten(groups, name, n, by) for n in lengths}

    def cell(group, length):
        if (value := group.value(name, length, by)) is None:
            return "–"
        form = Markup('<span class="best">{}</span>') if group.name in best[length] else "{}"
        return form.format(by.plus_minus(value.value, value.error))

    rows = [[group.name, *(cell(group, n) for n in lengths)] for group in groups]
    return Table(["run", *(f"{n:,}" for n in lengths)], rows)


def differences(groups: Sequence[Group], baseline: str, by: Measure) -> Table:
    """The paired differences to a baseline, with their intervals and corrected p.

    Raises:
      UserError: the baseline is none of the groups.
    """
    rows = []
    for each in comparing.against(groups, baseline, by):
        *first, mean, interval, p = each.cells()
        form = Markup('<span class="best">{}</span>') if each.difference.is_certain else "{}"
        rows.append([*first, form.format(mean), interval, p])
    return Table(comparing.heads(by), rows, 2)


def _numbers(groups: Sequence[Group], several: bool) -> Table:
    rows = [
        (f"{group.name}, {seed}" if seed else group.name, row)
        for group in groups
        for seed, evaluation in group.runs.items()
        for row in evaluation.results
    ]
    columns = [c for c in _COLUMNS if any(getattr(row, c[0]) is not None for _, row in rows)]
    cells = [
        [run, row.set, f"{row.length:,}",
         comparing.PERPLEXITY.plus_minus(row.perplexity, row.perplexity_error),
         *(number(getattr(row, field), form) for field, _, form in columns)]
        for run, row in rows
    ]  # fmt: skip
    head = ["run", "data set", "length", "perplexity", *(name for _, name, _ in columns)]
    return Table(head, cells, 2) if several else Table(head[1:], [line[1:] for line in cells])
