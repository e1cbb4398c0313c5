"""What answers.json says, as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from bipe_jax.report.statistics import proportion
from bipe_jax.report.text import line, table

_MOST_VALUES = 16  # of a label that has a line for each


def tables(result: Mapping[str, Any]) -> str:
    """A table for each source: percent right with 95 % intervals, of all examples and by label."""
    return "\n\n".join(
        f"{line(of_source['source'])}\n\n{_table(of_source['items'])}"
        for of_source in result["results"]
    )


def _table(items: Sequence[Mapping[str, Any]]) -> str:
    groups: list[tuple[str, Sequence[Mapping[str, Any]]]] = [("all", items)]
    for label in items[0]["labels"]:
        values = sorted({item["labels"][label] for item in items if label in item["labels"]})
        if 1 < len(values) <= _MOST_VALUES:
            for value in values:
                chosen = [item for item in items if item["labels"].get(label) == value]
                groups.append((f"{label} {value}", chosen))
    measures = list(measures_of(items[0]))
    lines = []
    for name, chosen in groups:
        cells = []
        for measure in measures:
            right = [
                value for item in chosen if (value := measures_of(item).get(measure)) is not None
            ]
            cells.append(_percent(sum(right), len(right)))
        lines.append((name, f"{len(chosen):,}", *cells))
    return table(("examples", "number", *measures), lines)


def measures_of(item: Mapping[str, Any]) -> dict[str, bool | None]:
    """What is right or wrong of an example, by name.

    Of a completion "answer" and "whole"; of sets, for each group, "GROUP": whether all of them are right, and
    "last GROUP".
    """
    if "groups" in item:
        measures: dict[str, bool | None] = {}
        for name, counts in item["groups"].items():
            measures[name] = counts["right"] == counts["total"]
            measures[f"last {name}"] = counts["last"]
        return measures
    return {"answer": item.get("answer"), "whole": item["whole"]}


def _percent(right: int, count: int) -> str:
    if not count:
        return "-"
    low, high = proportion(right, count)
    return f"{right / count:.1%} [{low:.1%}, {high:.1%}]"
