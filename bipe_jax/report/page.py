"""One page of the evaluations of a run, or of several that are compared.

It shows evaluation.json (bipe_jax.evaluate), tasks.json (bipe_jax.tasks), attention.json (bipe_jax.analyse)
and metrics.jsonl (of the training) of each directory, as far as they exist.
"""

from collections.abc import Sequence

from markupsafe import Markup

from bipe_jax.report import (
    attention,
    breakdowns,
    charts,
    comparing,
    perplexity,
    results,
    tasks,
    training,
    webpage,
)
from bipe_jax.report.comparing import Group
from bipe_jax.report.results import Position, Run
from bipe_jax.report.text import visible
from bipe_jax.report.webpage import Table


def build(
    directories: Sequence[str],
    names: Sequence[str] = (),
    title: str = "",
    baseline: str = "",
    groups: Sequence[Group] = (),
    template: str = "report.html",
    **values,
) -> str:
    """The page of one directory, or of several that are compared: HTML.

    Args:
      names: of the runs, if not their directories'.
      title: of the page; "" makes one from the names.
      baseline: name of the run that the others are compared with; "": none.
      groups: whose perplexities are compared, if not those of the runs.
      template: "report.html", or one that extends it and uses `values`.

    Raises:
      UserError: see `results.read`; the runs scored other targets, or the baseline is none of them.
    """
    runs = results.read(directories, names)
    groups = groups or comparing.alone([(r.name, r.evaluation) for r in runs if r.evaluation])
    listed = ", ".join(run.name for run in runs)
    title = title or (f"Comparison of {listed}" if len(runs) > 1 else f"Evaluation of {listed}")
    sections = {
        "perplexity": perplexity.section(groups, baseline),
        "training": training.section(
            {run.name: training.read(d) for run, d in zip(runs, directories, strict=True)}
        ),
        "breakdowns": breakdowns.section(runs),
        "unseen": breakdowns.unseen(runs),
        "tasks": tasks.section(runs),
        "attention": attention.section(runs),
    }
    return webpage.render(template, title=title, **_overview(runs), **sections, **values)


def write(directories: Sequence[str], path: str, **changes) -> None:
    """Writes the page; `changes` are arguments of `build`. Raises UserError."""
    webpage.write(build(directories, **changes), path)


def _encoding(position: Position | None) -> str:
    """The encodings as text, such as "learned of offset + rope of segment"."""

    def entry(kind="?", coordinate="?", *options):
        options = [option if isinstance(option, list) else [option] for option in options]
        listed = ", ".join(" ".join(map(str, option)) for option in options)
        return f"{kind} of {coordinate}" + (f" ({listed})" if listed else "")

    if position is None:
        return "–"
    return " + ".join(entry(*e) for e in (*position.absolute, *position.relative)) or "none"


def _facts(run: Run) -> dict[str, str]:
    head = next(file for file in (run.evaluation, run.tasks, run.attention) if file)
    facts = {
        "Step": f"{head.step:,}" if isinstance(head.step, int) else None,
        "Training length": f"{head.training_length:,} tokens",
        "Positions": _encoding(head.position),
        "Segment rule": head.segment_rule,
    }
    facts = {name: "–" if fact is None else fact for name, fact in facts.items()}
    if run.evaluation:
        facts |= {
            "Data": run.evaluation.data,
            "Protocol": run.evaluation.protocol,
            "Context": run.evaluation.context,
            "BOS": run.evaluation.bos_rule,
        }
    if run.tasks:
        facts["Seed of the tasks"] = run.tasks.seed
    if run.attention and run.attention.data != facts.get("Data"):
        facts["Data of attention"] = "–" if run.attention.data is None else run.attention.data
    return {name: str(fact) for name, fact in facts.items() if fact is not None}


def _overview(runs: Sequence[Run]) -> dict:
    """The facts that all runs share, and a table of the others."""
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for of_run in facts for name in of_run)
    common = [n for n in names if len({of_run.get(n) for of_run in facts}) == 1]
    own = [n for n in names if n not in common]
    rows = [
        (Markup("{} {}").format(charts.key(charts.series(i)), visible(run.name)),
         *(of_run.get(n, "–") for n in own))
        for i, (run, of_run) in enumerate(zip(runs, facts, strict=True))
    ]  # fmt: skip
    return {
        "facts": [(n, facts[0][n]) for n in common],
        "overview": Table(["run", *own], rows, 1 + len(own)) if len(runs) > 1 else None,
    }
