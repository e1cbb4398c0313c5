"""Makes one HTML page of the evaluations of a run, or of several that are compared:

python -m bipe_jax.report runs/quickstart [runs/rope runs/alibi] --output=report.html

Shows what each directory has of evaluation.json (bipe_jax.evaluate), tasks.json and attention.json
(bipe_jax.analyse). The page needs no network and no script.
"""

import argparse
import math
import os
from collections.abc import Iterable, Sequence

from bipe_jax import attention_figures, cli, results, svg, webpage
from bipe_jax.errors import UserError
from bipe_jax.results import Run
from bipe_jax.text import escaped
from bipe_jax.webpage import Markup

_STYLE = """
.large { grid-template-columns: repeat(auto-fill, minmax(min(23rem, 100%), 1fr)); }
.maps { grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), max-content)); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: .5rem 0; max-width: none;
  font-size: .9rem; }
.legend span { display: inline-flex; align-items: center; gap: .4rem; overflow-wrap: anywhere; }
svg.key { flex: none; margin: 0; display: inline-block; vertical-align: middle; }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: 1rem 0 0; font-size: .9rem; }
a { color: var(--bar); }
td:first-child { max-width: 16rem; overflow: hidden; text-overflow: ellipsis; }
.new { color: var(--end); font-weight: 600; } .best { font-weight: 700; }
tr.first > td { border-top: 1px solid var(--soft); }
"""
_BY = {
    "position": ("Loss by position in the block", "position (tokens)"),
    "offset": ("Loss by offset in the segment", "offset (tokens)"),
    "segment": ("Loss by segments from the block's start", "segment (number in the block)"),
}
# Columns of the table of all numbers: key, name, form.
_COLUMNS = (
    ("loss", "loss (nats)", ".4f"),
    ("bits_per_byte", "bits/byte", ".4f"),
    ("tokens", "tokens", ","),
    ("documents", "documents", ","),
    ("documents_too_short", "too short", ","),
    ("segment_tokens_mean", "tokens/segment", ",.1f"),
    ("segment_tokens_p99", "p99", ",.0f"),
    ("segments_per_block", "segments/block", ",.1f"),
    ("segment_max", "last segment", ","),
)


def _number(value, form: str) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{form}}" if math.isfinite(value) else "∞"


def _plus_minus(value, error, form=",.2f") -> str:
    return f"{_number(value, form)} ± {_number(error, form)}"


def _unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _legend(entries: Iterable[tuple[svg.Style, str]]) -> str:
    spans = (f"<span>{svg.key(style)}{escaped(name)}</span>" for style, name in entries)
    return f'<p class="legend">{"".join(spans)}</p>'


def _runs_legend(numbered: Sequence[tuple[int, Run]]) -> str:
    """Nothing where there is only one."""
    return _legend((svg.series(i), run.name) for i, run in numbered) if len(numbered) > 1 else ""


def _encoding(position: dict | None) -> str:
    """Such as "learned of offset + rope of segment"."""

    def entry(kind="?", coordinate="?", *options):
        listed = ", ".join(" ".join(map(str, option)) for option in options)
        return f"{kind} of {coordinate}" + (f" ({listed})" if listed else "")

    if position is None:
        return "–"
    entries = [entry(*e) for part in ("absolute", "relative") for e in position[part]]
    return " + ".join(entries) or "none"


def _facts(run: Run) -> dict[str, str]:
    head = run.files[0]
    facts = {
        "Step": f"{head['step']:,}" if isinstance(head.get("step"), int) else "–",
        "Training length": f"{head['training_length']:,} tokens",
        "Positions": _encoding(head.get("position")),
        "Segment rule": head.get("segment_rule", "–"),
    }
    for key, name in (("data", "Data"), ("protocol", "Protocol"), ("bos_rule", "BOS")):
        if run.evaluation and key in run.evaluation:
            facts[name] = run.evaluation[key]
    if run.tasks and "seed" in run.tasks:
        facts["Seed of the tasks"] = run.tasks["seed"]
    if run.attention and run.attention.get("data") != facts.get("Data"):
        facts["Data of attention"] = run.attention.get("data", "–")
    return {name: str(value) for name, value in facts.items()}


def _overview(runs: Sequence[Run]) -> list[str]:
    """What the runs have in common, and a table of what they do not."""
    facts = [_facts(run) for run in runs]
    names = _unique(name for of_run in facts for name in of_run)
    common = {n for n in names if len({of_run.get(n) for of_run in facts}) == 1}
    body = [webpage.facts((n, facts[0][n]) for n in names if n in common)]
    if len(runs) > 1:
        own = [n for n in names if n not in common]
        rows = [
            (Markup(svg.key(svg.series(i)) + " " + escaped(run.name)),
             *(of_run.get(n, "–") for n in own))
            for i, (run, of_run) in enumerate(zip(runs, facts, strict=True))
        ]  # fmt: skip
        body.append(webpage.table(["run", *own], rows))
    if differing := [n for n in ("Data", "Protocol", "BOS") if n in names and n not in common]:
        body.append(
            '<p class="warning">The runs were not evaluated alike: see '
            f"{escaped(' and '.join(differing))}. Their perplexities cannot be compared.</p>"
        )
    return body


def _perplexity(runs: Sequence[Run]) -> list[str]:
    numbered = [(i, run) for i, run in enumerate(runs) if run.evaluation]
    if not numbered:
        return []
    rows = [(i, run, row) for i, run in numbered for row in run.evaluation["results"]]
    figures = []
    for name in (sets := _unique(row["set"] for _, _, row in rows)):
        of_set = [(i, run, row) for i, run, row in rows if row["set"] == name]
        curves = [
            svg.Curve(svg.series(i), [
                svg.Point(
                    row["length"], row["perplexity"], row["perplexity_error"] or 0,
                    f"{run.name}, {row['length']:,} tokens: "
                    + _plus_minus(row["perplexity"], row["perplexity_error"]),
                )
                for _, run, row in sorted(mine, key=lambda x: x[2]["length"])
            ])
            for i, _ in numbered
            if (mine := [entry for entry in of_set if entry[0] == i])
        ]  # fmt: skip
        trained = {run.evaluation["training_length"] for _, run, _ in of_set}
        x = svg.places_axis("length (tokens)", [*(row["length"] for *_, row in of_set), *trained])
        y = svg.number_axis("perplexity", _spans(curves), log=True)
        figures.append(webpage.figure(name, svg.lines(curves, x, y, f"{name}: {y.name}", trained)))
    body = [
        '<h2 id="perplexity">Perplexity by length</h2>',
        '<p class="soft">Lower is better. Bars are standard errors over documents.</p>',
        _runs_legend(numbered),
        webpage.grid(figures, "large"),
    ]
    if len(numbered) > 1:
        body += [_matrix(numbered, name) for name in sets]
        body.append(webpage.folded("All numbers", _numbers(rows, several=True), is_open=False))
    else:
        body.append(_numbers(rows, several=False))
    return body


def _spans(curves: Sequence[svg.Curve]) -> list[float]:
    """The finite ends of all error bars, above 0."""
    points = [p for curve in curves for p in curve.points if math.isfinite(p.y)]
    ends = [
        p.y + sign * (p.error if math.isfinite(p.error) else 0) for p in points for sign in (-1, 1)
    ]
    return [end for end in ends if end > 0]


def _matrix(numbered: Sequence[tuple[int, Run]], name: str) -> str:
    """The perplexities of one set: a row a run, a column a length; the lowest are marked."""
    held = {
        run.name: {r["length"]: r for r in run.evaluation["results"] if r["set"] == name}
        for _, run in numbered
    }
    lengths = sorted({length for of_run in held.values() for length in of_run})

    def cell(of_run, length):
        if not (row := of_run.get(length)):
            return "–"
        cell = _plus_minus(row["perplexity"], row["perplexity_error"])
        best = min(r[length]["perplexity"] for r in held.values() if length in r)
        return Markup(f'<span class="best">{cell}</span>') if row["perplexity"] == best else cell

    rows = [[run, *(cell(of_run, n) for n in lengths)] for run, of_run in held.items()]
    return f"<h3>{escaped(name)}</h3>" + webpage.table(["run", *(f"{n:,}" for n in lengths)], rows)


def _numbers(rows: Sequence[tuple[int, Run, dict]], several: bool) -> str:
    columns = [c for c in _COLUMNS if any(isinstance(r.get(c[0]), (int, float)) for *_, r in rows)]
    table = [
        [
            *([run.name] if several else []),
            row["set"],
            f"{row['length']:,}",
            _plus_minus(row["perplexity"], row["perplexity_error"]),
            *(_number(row.get(key), form) for key, _, form in columns),
        ]
        for _, run, row in rows
    ]
    head = ["data set", "length", "perplexity", *(name for _, name, _ in columns)]
    return webpage.table(["run", *head] if several else head, table)


def _breakdowns(runs: Sequence[Run]) -> list[str]:
    """Curves of loss: one a run or, of a single run, one a length."""
    found = [
        (i, run, part)
        for i, run in enumerate(runs)
        if run.evaluation
        for part in run.evaluation.get("breakdowns", ())
    ]
    if not found:
        return []
    numbered = list({i: (i, run) for i, run, _ in found}.values())
    lengths = sorted({part["length"] for *_, part in found})
    body = [
        '<h2 id="breakdowns">Where the loss is</h2>',
        '<p class="soft">Nats a token, lower is better; a mark is the mean of a range. '
        "Point at one for its numbers.</p>",
    ]
    for by in _unique(part["by"] for *_, part in found):
        some = [entry for entry in found if entry[2]["by"] == by]
        title, axis = _BY.get(by, (f"Loss by {by}", by))
        body.append(f"<h3>{escaped(title)}</h3>")
        if len(numbered) == 1:
            styles = {n: svg.ramp(i, len(lengths)) for i, n in enumerate(lengths)}
            body.append(_legend((style, f"{n:,} tokens") for n, style in styles.items()))
            styled = [(styles[part["length"]], run, part) for _, run, part in some]
            body.append(_of_sets(styled, axis))
            continue
        body.append(_runs_legend(numbered))
        for length in reversed(lengths):
            styled = [(svg.series(i), run, p) for i, run, p in some if p["length"] == length]
            if styled:
                text = f"{length:,} tokens"
                body.append(webpage.folded(text, _of_sets(styled, axis), length == lengths[-1]))
    return body


def _of_sets(styled: Sequence[tuple[svg.Style, Run, dict]], axis: str) -> str:
    """A figure for each set, of (style, run, breakdown)."""
    figures = []
    for name in _unique(part["set"] for *_, part in styled):
        curves, places, trained = [], {0}, set()
        for style, run, part in styled:
            if part["set"] != name:
                continue
            held = [b for b in part["bins"] if b["tokens"] and b["loss"] is not None]
            curves.append(svg.Curve(style, [
                svg.Point(
                    math.sqrt((b["from"] + 1) * (b["to"] + 1)) - 1, b["loss"], 0,
                    f"{run.name}, {part['length']:,} tokens, {part['by']} {_range(b)}: "
                    f"{b['loss']:.4f} nats, {b['tokens']:,} tokens",
                )
                for b in held
            ]))  # fmt: skip
            places |= {b[end] for b in held for end in ("from", "to")}
            trained |= {
                row["trained_max"]
                for row in run.evaluation.get("unseen", ())
                if (row["set"], row["coordinate"]) == (name, part["by"])
            }
        top = max(places)
        ticks = {0, *(1 << i for i in range(top.bit_length())), top}
        x = svg.places_axis(axis, ticks, math.log1p)
        y = svg.number_axis("loss (nats)", _spans(curves))
        picture = svg.lines(curves, x, y, f"{name}: {y.name} by {x.name}", trained)
        figures.append(webpage.figure(name, picture))
    return webpage.grid(figures, "large")


def _range(part: dict) -> str:
    low, high = part["from"], part["to"]
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _unseen(runs: Sequence[Run]) -> list[str]:
    found = [
        (run, row) for run in runs if run.evaluation for row in run.evaluation.get("unseen", ())
    ]
    if not found:
        return []
    lengths = sorted({row["length"] for _, row in found})
    table: dict = {}
    for run, row in found:
        key = (*([run.name] if len(runs) > 1 else []), row["set"], row["coordinate"])
        line = table.setdefault((*key, row["trained_max"]), {})
        cell = f"{row['share']:.1%} to {row['max']:,}"
        line[row["length"]] = Markup(f'<span class="new">{cell}</span>') if row["share"] else cell
    head = [*(["run"] if len(runs) > 1 else []), "data set", "coordinate", "trained to"]
    rows = [
        [*key[:-1], f"{key[-1]:,}", *(line.get(n, "–") for n in lengths)]
        for key, line in table.items()
    ]
    return [
        '<h2 id="unseen">Never seen in training</h2>',
        '<p class="soft">At each length: the share of tokens whose coordinate is larger than any in '
        "training, and the largest. A relative encoding of a coordinate meets distances up to that "
        "size.</p>",
        webpage.table([*head, *(f"{n:,}" for n in lengths)], rows),
    ]


def _tasks(runs: Sequence[Run]) -> list[str]:
    numbered = [(i, run) for i, run in enumerate(runs) if run.tasks]
    if not numbered:
        return []
    rows = [(i, run, row) for i, run in numbered for row in run.tasks["results"]]
    body = [
        '<h2 id="tasks">Tasks with long context</h2>',
        '<p class="soft">Percent of answers that are right, by the length of the prompt and by how far '
        "into it the answer lies (0%: at its beginning). The dotted line is the training length.</p>",
        _runs_legend(numbered),
    ]
    for task in _unique(row["task"] for *_, row in rows):
        of_task = [entry for entry in rows if entry[2]["task"] == task]
        figures = [
            _task_map(run, mine)
            for i, run in numbered
            if (mine := [row for j, _, row in of_task if j == i])
        ]
        body.append(f"<h3>{escaped(task)}</h3>")
        if len(numbered) > 1:
            figures.insert(0, _task_lines(numbered, of_task))
        body.append(webpage.grid(figures, "maps"))
    return body


def _mean_accuracy(rows: Sequence[dict]) -> float:
    return sum(row["accuracy"] * row["samples"] for row in rows) / sum(r["samples"] for r in rows)


def _task_lines(numbered, rows: Sequence[tuple[int, Run, dict]]) -> str:
    curves = []
    for i, run in numbered:
        held: dict[int, list] = {}
        for j, _, row in rows:
            if j == i and row["samples"]:
                held.setdefault(row["length"], []).append(row)
        means = {length: _mean_accuracy(held[length]) for length in sorted(held)}
        curves.append(svg.Curve(svg.series(i), [
            svg.Point(n, mean, 0, f"{run.name}, {n:,} tokens: {mean:.1%}")
            for n, mean in means.items()
        ]))  # fmt: skip
    x = svg.places_axis("length (tokens)", [row["length"] for *_, row in rows])
    y = svg.number_axis("accuracy", [1.0], zero=True, percent=True)
    trained = {run.tasks["training_length"] for _, run in numbered}
    return webpage.figure("All depths together", svg.lines(curves, x, y, y.name, trained))


def _task_map(run: Run, rows: Sequence[dict]) -> str:
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows}, key=lambda depth: (depth is None, depth or 0))
    labels = ["all" if depth is None else f"{depth:.0%}" for depth in depths]
    cells = {
        (depths.index(row["depth"]), lengths.index(row["length"])): svg.Cell(
            row["accuracy"],
            f"{100 * row['accuracy']:.3g}",
            f"{run.name}, {row['length']:,} tokens, depth {labels[depths.index(row['depth'])]}: "
            f"{row['accuracy']:.1%} of {row['samples']:,}",
        )
        for row in rows
    }
    within = sum(length <= run.tasks["training_length"] for length in lengths)
    picture = svg.heat(
        labels, [svg.short(n) for n in lengths], cells, ("depth", "length (tokens)"),
        f"{run.name}: accuracy by depth and length", within % len(lengths),
    )  # fmt: skip
    counts = _unique(row["samples"] for row in rows)
    samples = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,}–{max(counts):,}"
    return webpage.figure(
        run.name, f'<div class="wide">{picture}</div>', f"{samples} samples a cell"
    )


def build(directories: Sequence[str]) -> str:
    """The page of one directory, or of several that are compared: HTML.

    Raises:
      UserError: see `results.read`.
    """
    runs = results.read(directories)
    names = ", ".join(run.name for run in runs)
    title = f"Comparison of {names}" if len(runs) > 1 else f"Evaluation of {names}"
    sections = {
        "Perplexity": _perplexity(runs),
        "Where the loss is": _breakdowns(runs),
        "Never seen": _unseen(runs),
        "Tasks": _tasks(runs),
        "Attention": attention_figures.section(runs),
    }
    ids = ("perplexity", "breakdowns", "unseen", "tasks", "attention")
    links = [
        f'<a href="#{anchor}">{name}</a>'
        for anchor, (name, body) in zip(ids, sections.items(), strict=True)
        if body
    ]
    body = [f"<h1>{escaped(title)}</h1>", *_overview(runs)]
    if len(links) > 1:
        body.append(f"<nav>{' '.join(links)}</nav>")
    body += [line for section in sections.values() for line in section]
    return webpage.page(title, body, _STYLE)


def write(directories: Sequence[str], path: str) -> None:
    """Writes the page. Raises UserError as `build`, or if the file cannot be written."""
    text = build(directories)
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def main():
    parser = argparse.ArgumentParser(prog="python -m bipe_jax.report", description=__doc__)
    parser.add_argument("runs", nargs="+", help="directories of runs that were evaluated")
    parser.add_argument("--output", default="report.html", help="the page to write (report.html)")
    args = parser.parse_args()
    write(args.runs, args.output)
    size = os.path.getsize(args.output)
    cli.say(f"Wrote {args.output} ({size / 1024:,.0f} KiB)")


if __name__ == "__main__":
    with cli.user_errors():
        main()
