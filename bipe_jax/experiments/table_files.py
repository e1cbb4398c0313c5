"""The files of a table: results.json, the table as CSV, LaTeX and Markdown, and a page."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bipe_jax.experiments.outcomes import Outcomes, Row
from bipe_jax.experiments.table import Column, Results, Table, Verdict, verdicts
from bipe_jax.report import webpage
from bipe_jax.report.tables import escaped
from bipe_jax.report.text import table as as_text
from bipe_jax.workdir import outputs

NAMES = ("results.json", "table.csv", "table.tex", "table.md", "report.html")


def _notes(mark: str) -> list[str]:
    """What a reader of the table must know.

    Args:
      mark: of the best cells, such as "In bold".
    """
    return [
        "Means over seeds with half of the 95 % interval (Student's; of one seed Wilson's over examples, "
        "of a perplexity none); shares in percent.",
        f"{mark}: no other row is better for certain, which is where the difference, paired by seed, has "
        "p < 0.05 after Holm's correction for all pairs of rows of the column. "
        "Nothing is marked where there is one seed.",
        "A column's number is the context in tokens, the segments, the operators or the lines; the first "
        "one of a group is that of training.",
    ]


_PREDICTED = ("prediction", "whose", "outcome", "as predicted")
_VERDICTS = {True: "yes", False: "no", None: "–"}
# Column of a verdict -> what it says of a row.
_SEARCHED = {
    "growth of perplexity": lambda v: _share(v.grows),
    "above the best": lambda v: _share(v.above_best),
    "values found, at least": lambda v: _share(v.retrieves, sign=False),
    "flat": lambda v: _yes(v.is_flat, v.grows),
    "within 1 %": lambda v: _yes(v.is_best, v.above_best),
    "uses the context": lambda v: _yes(v.uses_context, v.grows, v.retrieves),
}


def write(
    table: Table, size: str, results: Results, output: str, provenance: Mapping[str, Any]
) -> tuple[str, ...]:
    """Writes all files into a directory. Returns their names. Raises UserError."""
    columns = table.columns(results)
    arms = _arms(table, results)
    rows = _rows(table, results)
    cells = {arm: [_cell(rows, results, arm, column) for column in columns] for arm in arms}
    predictions = [(p, *p.outcome(results)) for p in table.predictions]
    of_rows = verdicts(results)
    value = {
        "table": table.name,
        "size": size,
        "provenance": dict(provenance),
        "columns": [{"test": c.test, **c.key._asdict()} for c in columns],
        "rows": [
            {"row": arm, "values": [_value(rows, arm, column) for column in columns]}
            for arm in arms
        ],
        "searched": {arm: verdict._asdict() for arm, verdict in of_rows.items()},
        "predictions": [
            {"text": p.text, "source": p.source, "outcome": words, "as_predicted": as_predicted}
            for p, words, as_predicted in predictions
        ],
    }  # fmt: skip
    outputs.write_json(os.path.join(output, "results.json"), value)
    shown = _Shown(
        _facts(table, size, results),
        [_head(column) for column in columns],
        cells,
        [(p.text, p.source, words, _VERDICTS[verdict]) for p, words, verdict in predictions],
        _searched(of_rows),
    )
    texts = {
        "table.csv": _csv(rows, arms, columns),
        "table.tex": _latex(cells, columns),
        "table.md": _markdown(table.name, size, shown),
        "report.html": _page([test.name for test in table.tests], shown),
    }
    for name, content in texts.items():
        outputs.write_bytes(os.path.join(output, name), content.encode())
    return NAMES


def text(table: Table, results: Results) -> str:
    """The table for a terminal."""
    columns, rows = table.columns(results), _rows(table, results)
    lines = [
        (arm, *(_plain(_cell(rows, results, arm, column)) for column in columns))
        for arm in _arms(table, results)
    ]
    return as_text(("row", *map(_head, columns)), lines)


# A mean, half of its interval or "", and whether no other row is better for certain; None if unknown.
Cell = tuple[str, str, bool] | None


class _Shown(NamedTuple):
    """What the pages show.

    Attributes:
      facts: names and values. heads: of the columns. cells: of each row, in the order of the columns.
      predictions, searched: rows of the two other tables.
    """

    facts: Sequence[tuple[str, str]]
    heads: Sequence[str]
    cells: Mapping[str, Sequence[Cell]]
    predictions: Sequence[tuple[str, ...]]
    searched: Sequence[tuple[str, ...]]


def _arms(table: Table, results: Results) -> list[str]:
    """The rows that have a value in any test, in the order of the table."""
    every = dict.fromkeys(arm for test in table.tests for arm in results[test.name].arms)
    return [arm for arm in every if any(of.values.get(arm) for of in results.values())]


def _rows(table: Table, results: Results) -> dict[tuple[str, Column], Row]:
    return {
        (row.arm, Column(test.name, row.key)): row
        for test in table.tests
        for row in results[test.name].rows()
    }


def _value(rows: Mapping[tuple[str, Column], Row], arm: str, column: Column) -> Any:
    if (row := rows.get((arm, column))) is None:
        return None
    seeds = {str(seed): value for seed, value in row.values.items()}
    return {"mean": row.mean.mean, "low": row.mean.low, "high": row.mean.high,
            "seeds": seeds, "best_rank": row.ranks[0], "worst_rank": row.ranks[1]}  # fmt: skip


def _cell(
    rows: Mapping[tuple[str, Column], Row], results: Results, arm: str, column: Column
) -> Cell:
    if (row := rows.get((arm, column))) is None:
        return None
    is_share = results[column.test].measure(column.key.measure).unit == "share"
    factor, digits = (100, 1) if is_share else (1, 2)
    mean, low, high = row.mean[:3]
    half = "" if low is None or high is None else f"{factor / 2 * (high - low):.{digits}f}"
    return f"{factor * mean:.{digits}f}", half, row.ranks[0] == 1 and len(row.values) > 1


def _plain(cell: Cell) -> str:
    if cell is None:
        return "–"
    mean, half, is_first = cell
    return mean + (f" ±{half}" if half else "") + ("*" if is_first else "")


def _head(column: Column) -> str:
    test, (_, condition, x) = column
    return (
        f"{test}, {condition}, {x:g}"
        if condition and test in ("text", "music")
        else f"{test}, {x:g}"
    )


def _facts(table: Table, size: str, results: Results) -> list[tuple[str, str]]:
    facts = [("Question", table.question), ("Size", size)]
    for test in table.tests:
        of: Outcomes = results[test.name]
        seeds = {s for arm in of.values.values() for values in arm.values() for s in values}
        done = sum(bool(values) for values in of.values.values())
        facts.append(
            (test.name, f"{test.measure}: {done} of {len(of.arms)} rows, {len(seeds)} seeds. "
                        f"{test.experiment.question} {test.experiment.method}")
        )  # fmt: skip
    return facts


def _share(value: float | None, *, sign: bool = True) -> str:
    return "–" if value is None else f"{value:{'+' if sign else ''}.1%}"


def _yes(verdict: bool, *known: float | None) -> str:
    return _VERDICTS[None if None in known else verdict]


def _searched(of_rows: Mapping[str, Verdict]) -> list[tuple[str, ...]]:
    """The rows of the search, the flattest first."""
    order = sorted(of_rows, key=lambda arm: (of_rows[arm].grows is None, of_rows[arm].grows))
    return [(arm, *(of(of_rows[arm]) for of in _SEARCHED.values())) for arm in order]


def _csv(
    rows: Mapping[tuple[str, Column], Row], arms: Sequence[str], columns: Sequence[Column]
) -> str:
    file = io.StringIO(newline="")
    lines = csv.writer(file, lineterminator="\n")
    heads = ("row", "test", "measure", "condition", "x", "seeds", "mean", "low", "high",
             "best_rank", "worst_rank")  # fmt: skip
    lines.writerow(heads)
    for arm in arms:
        for column in columns:
            if (row := rows.get((arm, column))) is not None:
                lines.writerow(
                    [arm, column.test, *column.key, len(row.values), *row.mean[:3], *row.ranks]
                )
    return file.getvalue()


def _latex(cells: Mapping[str, Sequence[Cell]], columns: Sequence[Column]) -> str:
    def cell(of: Cell) -> str:
        if of is None:
            return "--"
        mean, half, is_first = of
        bold = rf"\textbf{{{mean}}}" if is_first else mean
        return bold + (rf" {{\scriptsize$\pm${half}}}" if half else "")

    return "\n".join(
        [
            *(f"% {note}" for note in _notes("Bold")),
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            " & ".join(["", *(escaped(_head(column)) for column in columns)]) + r" \\",
            r"\midrule",
            *(
                " & ".join([escaped(arm), *map(cell, of_arm)]) + r" \\"
                for arm, of_arm in cells.items()
            ),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _markdown(name: str, size: str, shown: _Shown) -> str:
    def cell(of: Cell) -> str:
        if of is None:
            return "–"
        mean, half, is_first = of
        return (f"**{mean}**" if is_first else mean) + (f" ±{half}" if half else "")

    of_rows = [(f"`{arm}`", *map(cell, of_arm)) for arm, of_arm in shown.cells.items()]
    return "\n".join(
        [
            "# The table of encodings",
            "",
            f"Made by `python -m bipe_jax.experiments {name} --size={size}`. Do not edit it.",
            "",
            *(f"- **{fact}**: {value}" for fact, value in shown.facts),
            "",
            " ".join(_notes("Bold")),
            "",
            *_markdown_table(["row", *shown.heads], of_rows),
            "",
            "## What is searched for",
            "",
            *_markdown_table(
                ["row", *_SEARCHED], [(f"`{row[0]}`", *row[1:]) for row in shown.searched]
            ),
            "",
            "## Prediction and outcome",
            "",
            *_markdown_table(_PREDICTED, shown.predictions),
            "",
        ]
    )


def _page(tests: Sequence[str], shown: _Shown) -> str:
    return webpage.render(
        "table.html",
        title="The table of encodings",
        facts=shown.facts,
        predictions=webpage.Table(_PREDICTED, shown.predictions, 4),
        numbers=webpage.Table(
            ("row", *shown.heads),
            [(arm, *map(_plain, of_arm)) for arm, of_arm in shown.cells.items()],
        ),
        notes=_notes("With *"),
        searched=webpage.Table(("row", *_SEARCHED), shown.searched),
        tests=tests,
    )
