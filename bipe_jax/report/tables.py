"""Perplexities and their differences as files: CSV, and LaTeX with booktabs."""

import csv
import io
from collections.abc import Sequence

from bipe_jax.report import comparing
from bipe_jax.report.comparing import Group, Measure
from bipe_jax.report.text import line

FORMATS = (".csv", ".tex")
_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}  # fmt: skip


def of_format(groups: Sequence[Group], extension: str, baseline: str = "") -> str:
    """The table in a format of FORMATS.

    Args:
      baseline: name of the group that the others are compared with; "": none.

    Raises:
      UserError: the runs cannot be compared, or the baseline is none of them.
    """
    by = comparing.measure(groups)
    compared = comparing.against(groups, baseline, by) if baseline else []
    return {".csv": _csv, ".tex": _latex}[extension](groups, by, compared)


def _csv(groups: Sequence[Group], by: Measure, compared: Sequence[comparing.Compared]) -> str:
    """A line for each group, set and length. Differences are those of losses."""
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(
        ["run", "set", "length", by.field, "error", "unbeaten", "difference", "low", "high", "p"]
    )
    differences = {(c.name, c.set, c.length): c for c in compared}
    for of_set, lengths in _columns(groups):
        for length in lengths:
            best = comparing.unbeaten(groups, of_set, length, by)
            for group in groups:
                if value := group.value(of_set, length, by):
                    own = [group.name, of_set, length, value.value, value.error]
                    own.append(int(group.name in best))
                    compared_to = differences.get((group.name, of_set, length))
                    own += [*compared_to.difference[:3], compared_to.p] if compared_to else [""] * 4
                    lines.writerow(own)
    return text.getvalue()


def _latex(groups: Sequence[Group], by: Measure, compared: Sequence[comparing.Compared]) -> str:
    """A row for each group and a column for each set and length; in bold what no other group beats."""
    columns = _columns(groups)
    best = {
        (of_set, length): comparing.unbeaten(groups, of_set, length, by)
        for of_set, lengths in columns
        for length in lengths
    }
    differences = {(c.name, c.set, c.length): c for c in compared}

    def cell(group: Group, of_set: str, length: int) -> str:
        if (value := group.value(of_set, length, by)) is None:
            return "--"
        text = comparing.number(value.value, by.form.lstrip(","))
        text = rf"\textbf{{{text}}}" if group.name in best[of_set, length] else text
        if value.error is not None:
            text += rf" {{\scriptsize$\pm${value.error:{by.form.lstrip(',')}}}}"
        p = (
            compared_to.p
            if (compared_to := differences.get((group.name, of_set, length)))
            else None
        )
        return text + (r"\rlap{*}" if p is not None and p < 0.05 else "")

    heads, rules, at = [], [], 2
    for of_set, lengths in columns:
        heads.append(rf"\multicolumn{{{len(lengths)}}}{{c}}{{{escaped(of_set)}}}")
        rules.append(rf"\cmidrule(lr){{{at}-{at + len(lengths) - 1}}}")
        at += len(lengths)
    rows = [
        [escaped(group.name), *(cell(group, s, n) for s, lengths in columns for n in lengths)]
        for group in groups
    ]
    return "\n".join(
        [
            f"% {by.name}; bold: no other run beats it within the 95 % interval of their difference.",
            *(
                ["% *: p < 0.05 against the baseline, corrected for all of them."]
                if compared
                else []
            ),
            rf"\begin{{tabular}}{{l{'r' * (at - 2)}}}",
            r"\toprule",
            " & ".join(["", *heads]) + r" \\",
            " ".join(rules),
            " & ".join(["", *(f"{n}" for _, lengths in columns for n in lengths)]) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def escaped(text: str) -> str:
    """A text for LaTeX, in one line."""
    return "".join(_SPECIAL.get(character, character) for character in line(text))


def _columns(groups: Sequence[Group]) -> list[tuple[str, list[int]]]:
    """Each set, and the lengths that a group was evaluated at."""
    names = dict.fromkeys(row.set for group in groups for row in group.first.results)
    return [(s, sorted({n for group in groups for n in group.lengths(s)})) for s in names]
