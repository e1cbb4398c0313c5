"""The files of an experiment: results.json, tables as CSV and LaTeX, figures, and one page."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from bipe_jax.experiments.experiment import Experiment, Measure
from bipe_jax.experiments.outcomes import Key, Outcomes, Row, shown
from bipe_jax.report import charts, palette, pictures, webpage
from bipe_jax.report.charts import Curve, Lines, Point
from bipe_jax.report.statistics import Difference
from bipe_jax.report.tables import escaped
from bipe_jax.report.text import table
from bipe_jax.report.webpage import Table
from bipe_jax.workdir import outputs

NAMES = ("results.json", "table.csv", "table.tex", "report.html")  # besides the figures
_FORMATS = ("png", "svg", "pdf")


def write(
    experiment: Experiment,
    size: str,
    outcomes: Outcomes,
    output: str,
    provenance: Mapping[str, Any],
) -> list[str]:
    """Writes all files into a directory. Returns their names. Raises UserError."""
    rows = outcomes.rows()
    of_predictions = [
        (prediction, *prediction.outcome(outcomes)) for prediction in experiment.predictions
    ]
    facts = _facts(experiment, size, outcomes, provenance)
    result = {
        "experiment": experiment.name,
        "size": size,
        "facts": dict(facts),
        "provenance": dict(provenance),
        "arms": list(outcomes.arms),
        "predictions": [
            {"text": p.text, "source": p.source, "outcome": text, "as_predicted": as_predicted}
            for p, text, as_predicted in of_predictions
        ],
        "rows": [_to_json(row) for row in rows],
    }
    outputs.write_json(os.path.join(output, "results.json"), result)
    _write_text(output, "table.csv", _csv(rows))
    _write_text(output, "table.tex", _latex(outcomes, rows))
    written = [*NAMES]
    groups, styles = _groups(rows), _styles(outcomes)
    drawn = {
        f"{measure}, {condition}" if condition else measure: _chart(
            experiment, size, outcomes, measure, of_group, styles
        )
        for (measure, condition), of_group in groups.items()
    }
    for number, (title, chart) in enumerate(drawn.items(), 1):
        for kind in _FORMATS:
            name = f"figure-{number}.{kind}"
            pictures.chart(title, chart, os.path.join(output, name))
            written.append(name)
    page = webpage.render(
        "experiment.html",
        title=f"Experiment {experiment.name}",
        facts=facts,
        predictions=Table(
            ("prediction", "whose", "outcome", "as predicted"),
            [(p.text, p.source, text, _VERDICTS[verdict]) for p, text, verdict in of_predictions],
            4,
        ),
        legend=[(charts.key(styles[arm]), arm) for arm in outcomes.arms],
        figures=[
            charts.figure(title, chart, f"{experiment.name}: {title}")
            for title, chart in drawn.items()
        ],
        numbers=Table(_HEADS, [_cells(row, outcomes) for row in rows], 3),
        baseline=outcomes.arms[0],
    )
    webpage.write(page, os.path.join(output, "report.html"))
    return written


_VERDICTS = {True: "yes", False: "no", None: "–"}
_HEADS = (
    "measure", "condition", "arm", "x", "seeds", "mean [95 %]", "difference [95 %]", "p", "ranks",
)  # fmt: skip


def text(outcomes: Outcomes) -> str:
    """The table for a terminal."""
    return table(_HEADS, [_cells(row, outcomes) for row in outcomes.rows()])


def _cells(row: Row, outcomes: Outcomes) -> tuple[str, ...]:
    difference, measure = row.difference, outcomes.measure(row.key.measure)
    p = "" if difference is None or difference.p is None else f"{difference.p:.3g}"
    return (
        row.key.measure, row.key.condition, row.arm, f"{row.key.x:g}", f"{len(row.values)}",
        shown(row.mean, measure), shown(difference, measure) if difference else "", p,
        "–".join(map(str, dict.fromkeys(row.ranks))),
    )  # fmt: skip


def _facts(
    experiment: Experiment, size: str, outcomes: Outcomes, provenance: Mapping[str, Any]
) -> list[tuple[str, str]]:
    seeds = {seed for of_arm in outcomes.values.values() for of in of_arm.values() for seed in of}
    done = sum(bool(of_arm) for of_arm in outcomes.values.values())
    return [
        ("Question", experiment.question),
        ("Method", experiment.method),
        ("Size", f"{size}: {experiment.cost(size)}"),
        ("Finished", f"{done} of {len(outcomes.arms)} arms, {len(seeds)} seeds"),
        *experiment.facts(size, sorted(seeds)),
        ("Commit", f"{provenance.get('commit') or 'unknown'}"),
    ]


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.key.measure, row.key.condition), []).append(row)
    return groups


def _styles(outcomes: Outcomes) -> dict[str, charts.Style]:
    """Arm -> its style.

    Of too many arms the first has a colour, and those that are best at the last x of the first figure.
    """
    chosen = list(outcomes.arms)
    if len(chosen) > palette.SERIES and outcomes.keys:
        first = outcomes.keys[0]
        key = max((k for k in outcomes.keys if k[:2] == first[:2]), key=lambda k: k.x)
        means = {arm: mean.mean for arm in chosen[1:] if (mean := outcomes.mean(arm, *key))}
        is_loss = outcomes.measure(key.measure).lower_is_better
        best = sorted(means, key=lambda arm: means[arm] if is_loss else -means[arm])
        some = best[: palette.SERIES - 1]
        chosen = [arm for arm in chosen if arm == chosen[0] or arm in some]
    coloured = {arm: charts.series(i) for i, arm in enumerate(chosen[: palette.SERIES])}
    return {arm: coloured.get(arm, charts.OTHER) for arm in outcomes.arms}


def _chart(
    experiment: Experiment,
    size: str,
    outcomes: Outcomes,
    measure: str,
    rows: Sequence[Row],
    styles: Mapping[str, charts.Style],
) -> Lines:
    curves, kind = [], outcomes.measure(measure)
    for arm in outcomes.arms:
        points = [
            Point(
                row.key.x,
                row.mean.mean,
                f"{arm}, {row.key.x:g}: {shown(row.mean, kind)}",
                dots=tuple(row.values.values()) if len(row.values) > 1 else (),
                ends=_ends(row.mean),
            )
            for row in rows
            if row.arm == arm
        ]
        if points:
            curves.append(Curve(styles[arm], points, arm))
    xs = {row.key.x for row in rows}
    trained = {experiment.trained[size]} if size in experiment.trained else ()
    return Lines(
        curves, experiment.x_name, measure, xs, trained, log=kind.log,
        shares=kind.unit == "share",
    )  # fmt: skip


def _ends(mean: Difference) -> tuple[float, float] | None:
    """Those of an interval, which is not symmetric if it is Wilson's."""
    return None if mean.low is None or mean.high is None else (mean.low, mean.high)


def _to_json(row: Row) -> dict[str, Any]:
    key: Key = row.key
    value = {
        "arm": row.arm, "measure": key.measure, "condition": key.condition, "x": key.x,
        "seeds": {str(seed): value for seed, value in row.values.items()},
        "mean": row.mean.mean, "low": row.mean.low, "high": row.mean.high,
    }  # fmt: skip
    value |= {"best_rank": row.ranks[0], "worst_rank": row.ranks[1]}
    if row.difference is not None:
        value |= {"difference": row.difference._asdict()}
    return value


def _csv(rows: Sequence[Row]) -> str:
    file = io.StringIO(newline="")
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(
        ["measure", "condition", "arm", "x", "seeds", "mean", "low", "high",
         "difference", "difference_low", "difference_high", "p", "best_rank", "worst_rank"]
    )  # fmt: skip
    for row in rows:
        difference = row.difference or Difference(None, None, None, None)  # type: ignore[arg-type]
        lines.writerow(
            [row.key.measure, row.key.condition, row.arm, row.key.x, len(row.values),
             *row.mean[:3], *difference, *row.ranks]
        )  # fmt: skip
    return file.getvalue()


def _latex(outcomes: Outcomes, rows: Sequence[Row]) -> str:
    """A block for each measure and condition: a row for each arm, a column for each x."""
    parts = [
        "% Shares in percent. Means over seeds with half of the 95 % interval. *: differs from the first row,"
    ]
    parts += ["% p < 0.05, corrected for all differences of the block (Holm)."]
    for (measure, condition), of_group in _groups(rows).items():
        xs = sorted({row.key.x for row in of_group})
        by_place = {(row.arm, row.key.x): row for row in of_group}
        parts += [
            rf"\begin{{tabular}}{{l{'r' * len(xs)}}}",
            r"\toprule",
            " & ".join([escaped(f"{measure} {condition}".strip()), *(f"{x:g}" for x in xs)])
            + r" \\",
            r"\midrule",
        ]
        for arm in outcomes.arms:
            kind = outcomes.measure(measure)
            cells = [_latex_cell(by_place.get((arm, x)), kind) for x in xs]
            parts.append(" & ".join([escaped(arm), *cells]) + r" \\")
        parts += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(parts)


def _latex_cell(row: Row | None, measure: Measure) -> str:
    if row is None:
        return "--"
    factor, digits = (100, 1) if measure.unit == "share" else (1, 3)
    cell = f"{factor * row.mean.mean:.{digits}f}"
    if ends := _ends(row.mean):
        cell += rf" {{\scriptsize$\pm${factor / 2 * (ends[1] - ends[0]):.{digits}f}}}"
    p = row.difference.p if row.difference else None
    return cell + (r"\rlap{*}" if p is not None and p < 0.05 else "")


def _write_text(output: str, name: str, content: str) -> None:
    outputs.write_bytes(os.path.join(output, name), content.encode())
