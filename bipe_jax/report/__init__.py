"""One HTML page of the evaluations of a run, or of several that are compared.

It shows what each directory has of evaluation.json (bipe_jax.evaluate), tasks.json and attention.json
(bipe_jax.analyse), and needs no network and no script.
"""

from collections.abc import Sequence

from bipe_jax.errors import UserError
from bipe_jax.report import attention, breakdowns, perplexity, results, svg, tasks, webpage
from bipe_jax.report.parts import unique
from bipe_jax.report.results import Run
from bipe_jax.report.text import escaped
from bipe_jax.report.webpage import Markup

_STYLE = """
.large { grid-template-columns: repeat(auto-fill, minmax(min(23rem, 100%), 1fr)); }
.maps { display: flex; flex-wrap: wrap; align-items: flex-start; }
.maps > * { width: min-content; min-width: min(17rem, 100%); max-width: 100%; }
.maps > .line-chart { width: 23rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: .5rem 0; max-width: none;
  font-size: .9rem; }
.legend span { display: inline-flex; align-items: center; gap: .4rem; overflow-wrap: anywhere; }
svg.key { flex: none; margin: 0; display: inline-block; vertical-align: middle; }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: 1rem 0 0; font-size: .9rem; }
a { color: var(--bar); }
td:first-child { min-width: 7rem; max-width: 15rem; white-space: normal; overflow-wrap: anywhere; }
.new { color: var(--end); font-weight: 600; } .best { font-weight: 700; }
tr.first > td { border-top: 1px solid var(--soft); }
"""


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
    names = unique(name for of_run in facts for name in of_run)
    common = {n for n in names if len({of_run.get(n) for of_run in facts}) == 1}
    body = [webpage.facts((n, facts[0][n]) for n in names if n in common)]
    if len(runs) > 1:
        own = [n for n in names if n not in common]
        rows = [
            (Markup(svg.key(svg.series(i)) + " " + escaped(run.name)),
             *(of_run.get(n, "–") for n in own))
            for i, (run, of_run) in enumerate(zip(runs, facts, strict=True))
        ]  # fmt: skip
        body.append(webpage.table(["run", *own], rows, texts=1 + len(own)))
    if differing := [n for n in ("Data", "Protocol", "BOS") if n in names and n not in common]:
        body.append(
            '<p class="warning">The runs were not evaluated alike: see '
            f"{escaped(' and '.join(differing))}. Their perplexities cannot be compared.</p>"
        )
    return body


def build(
    directories: Sequence[str], names: Sequence[str] = (), title: str = "", lead: Sequence[str] = ()
) -> str:
    """The page of one directory, or of several that are compared: HTML.

    Args:
      names: of the runs, if not their directories'.
      title: of the page; "": made of the names.
      lead: HTML, lines that come first.

    Raises:
      UserError: see `results.read`.
    """
    runs = results.read(directories, names)
    listed = ", ".join(run.name for run in runs)
    title = title or (f"Comparison of {listed}" if len(runs) > 1 else f"Evaluation of {listed}")
    sections = {
        ("perplexity", "Perplexity"): perplexity.section(runs),
        ("breakdowns", "Where the loss is"): breakdowns.section(runs),
        ("unseen", "Never seen"): breakdowns.unseen(runs),
        ("tasks", "Tasks"): tasks.section(runs),
        ("attention", "Attention"): attention.section(runs),
    }
    links = [
        f'<a href="#{anchor}">{name}</a>' for (anchor, name), lines in sections.items() if lines
    ]
    body = [f"<h1>{escaped(title)}</h1>", *lead, *_overview(runs)]
    if len(links) > 1:
        body.append(f"<nav>{' '.join(links)}</nav>")
    body += [line for section in sections.values() for line in section]
    return webpage.page(title, body, _STYLE)


def write(directories: Sequence[str], path: str, **changes) -> None:
    """Writes the page; changes: see `build`. Raises UserError as that, or if it cannot be written."""
    text = build(directories, **changes)
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
