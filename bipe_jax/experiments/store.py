"""The values of finished points: OUTPUT/results/POINT.json. They are small enough to be committed."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from bipe_jax import provenance
from bipe_jax.errors import UserError
from bipe_jax.experiments.experiment import Cell
from bipe_jax.experiments.points import Point
from bipe_jax.training.observing.account import account, is_record
from bipe_jax.workdir import Workdir, events, files, json_files, outputs

DIRECTORY = "results"


class Kept(NamedTuple):
    """What is kept of a point.

    Attributes:
      cells: its values. targets: set of text -> digests of its scored targets and of the tokenizer.
    """

    cells: list[Cell]
    targets: dict[str, list[str]]


def path(output: str, point: Point) -> str:
    """The file of a point."""
    return os.path.join(output, DIRECTORY, f"{point.name}.json")


def read(output: str, point: Point) -> Kept | None:
    """What is kept of a point; None if it is not finished.

    Raises:
      UserError: the file is malformed, or of another config.
    """
    own = path(output, point)
    if not os.path.exists(own):
        return None
    kept = json_files.read(own)
    if kept.get("identity") != point.identity:
        raise UserError(
            f"{own} is of another config or size of the experiment: use another --output, or remove it"
        )
    try:
        return Kept([Cell(*values) for values in kept["cells"]], dict(kept["targets"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{own} is malformed ({error!r}): remove it, and run again") from None


def write(output: str, point: Point, cells: Iterable[Cell], files: Mapping[str, Any]) -> None:
    """Keeps the values of a point, summed over equal measures, conditions and x. Raises UserError.

    Args:
      files: those that the values are from, see `Experiment.cells`.
    """
    sums: dict[tuple[str, str, float], tuple[float, float]] = {}
    for measure, condition, x, right, total in cells:
        before = sums.get((measure, condition, x), (0, 0))
        sums[measure, condition, x] = before[0] + right, before[1] + total
    os.makedirs(os.path.join(output, DIRECTORY), exist_ok=True)
    value = {
        "identity": point.identity,
        "arm": point.arm.name,
        "seed": point.seed,
        **_origin(point.workdir),
        "targets": _targets(files),
        "cells": [[*key, *map(float, of_key)] for key, of_key in sums.items()],
    }
    outputs.write_json(path(output, point), value)


def _targets(files: Mapping[str, Any]) -> dict[str, list[str]]:
    evaluations = [file for file in files.values() if file.get("kind") == "perplexity"]
    return {
        row["set"]: [row["targets"], file["tokenizer"]]
        for file in evaluations
        for row in file["targets"]
    }


def check_alike(every: Mapping[str, Kept]) -> None:
    """Raises UserError if points scored other targets of a set, whose losses cannot be compared.

    Args:
      every: the file of each point, and what is kept in it.
    """
    known: dict[str, tuple[str, list[str]]] = {}
    for name, kept in every.items():
        for of_set, digests in kept.targets.items():
            other, before = known.setdefault(of_set, (name, digests))
            if digests != before:
                raise UserError(
                    f"{name} and {other} scored other targets of {of_set!r}, or have other tokenizers: "
                    "remove one, and run again with the same text for all points"
                )


def _origin(workdir: str) -> dict[str, Any]:
    """The seconds of a training, but for those between its starts, and the provenance of its last start."""
    directory = Workdir(workdir)
    start = files.read_json(directory.start(directory.last_start())) or {}
    recorded = [event for event in events.read(workdir) if is_record(event)]
    seconds = account(recorded).seconds if recorded else {}
    spent = sum(of_part for part, of_part in seconds.items() if part != "down")
    origin = provenance.shared(start.get("provenance") or {})
    return {"seconds": round(spent, 1), "provenance": origin}
