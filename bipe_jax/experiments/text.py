"""What the experiments on text have in common: the loss by length on each set, and its comparisons."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bipe_jax.data import quickstart
from bipe_jax.experiments.experiment import Cell, Experiment
from bipe_jax.experiments.outcomes import Measure, Outcomes

CONFIG = "configs/experiments/text.py"
LENGTHS = {"quick": 32, "laptop": 128, "paper": 1024}  # of training, in tokens
LOSS, PERPLEXITY = "loss, nats a token", "perplexity"
MEASURES = {
    LOSS: Measure("number", lower_is_better=True),
    PERPLEXITY: Measure("number", lower_is_better=True, log=True),
}
Outcome = Callable[[Outcomes], tuple[str, bool | None]]
_SHOWN = 300  # characters of a sample


def cells(files: Mapping[str, Any], name: str = "evaluation.json") -> list[Cell]:
    """The loss and the perplexity by length, each set being a condition.

    Args:
      name: of the file that `bipe_jax.evaluate`, or a training, wrote.
    """
    values: list[Cell] = []
    for row in files[name]["results"]:
        where = row["set"], row["length"]
        values.append(Cell(LOSS, *where, row["loss"] * row["tokens"], row["tokens"]))
        values.append(Cell(PERPLEXITY, *where, row["perplexity"], 1))
    return values


def samples() -> Iterator[dict[str, Any]]:
    """The beginnings of the quickstart's documents."""
    for document in quickstart.documents("train"):
        yield {"set": document["set"], "text": document["text"][:_SHOWN]}


def _no_data(size: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The text is the config's, whatever the seed is."""
    return {}


def experiment(name: str, question: str, method: str, **fields: Any) -> Experiment:
    """An experiment whose points are trained on text, and measured by their loss at several lengths."""
    usual: dict[str, Any] = {
        "config": CONFIG, "x_name": "tokens", "trained": LENGTHS, "measures": MEASURES,
        "data": _no_data, "cells": cells, "samples": samples,
    }  # fmt: skip
    return Experiment(name=name, question=question, method=method, **(usual | fields))


def growth(arms: Sequence[str], wanted: Callable[[float], bool]) -> Outcome:
    """An outcome: whether what arms lose from the first length to the longest, in nats, is as wanted.

    It is that of each arm on each set.
    """

    def outcome(outcomes: Outcomes) -> tuple[str, bool | None]:
        first, last = _ends(outcomes)
        lost = {
            arm: _differences(_losses(outcomes, arm, last), _losses(outcomes, arm, first))
            for arm in arms
        }
        words = "; ".join(_said(f"{arm} loses", values) for arm, values in lost.items())
        every = [value for values in lost.values() for value in values]
        return words, all(map(wanted, every)) if all(lost.values()) else None

    return outcome


def lead(arm: str, other: str, over: float, *, first: bool = False) -> Outcome:
    """An outcome: whether an arm's loss is lower than another's by over so many nats, on each set.

    Args:
      first: at the first length, that of training, and not at the longest.
    """

    def outcome(outcomes: Outcomes) -> tuple[str, bool | None]:
        length = _ends(outcomes)[0 if first else 1]
        values = _differences(_losses(outcomes, other, length), _losses(outcomes, arm, length))
        words = _said(f"{other} less {arm} at {length:g} tokens", values)
        return words, min(values) > over if values else None

    return outcome


def both(*parts: Outcome) -> Outcome:
    """An outcome: whether all parts came out as predicted."""

    def outcome(outcomes: Outcomes) -> tuple[str, bool | None]:
        found = [part(outcomes) for part in parts]
        verdicts = [verdict for _, verdict in found]
        words = "; ".join(words for words, _ in found)
        return words, None if None in verdicts else all(verdicts)

    return outcome


def _ends(outcomes: Outcomes) -> tuple[float, float]:
    """The first and the longest length, in tokens."""
    known = [key.x for key in outcomes.keys if key.measure == LOSS] or [0.0]
    return min(known), max(known)


def _losses(outcomes: Outcomes, arm: str, length: float) -> dict[str, float]:
    """Set -> an arm's mean loss at a length, where it is known."""
    sets = dict.fromkeys(key.condition for key in outcomes.keys if key.measure == LOSS)
    means = {name: outcomes.mean(arm, LOSS, name, length) for name in sets}
    return {name: mean.mean for name, mean in means.items() if mean}


def _differences(losses: Mapping[str, float], others: Mapping[str, float]) -> list[float]:
    return [loss - others[name] for name, loss in losses.items() if name in others]


def _said(what: str, values: Sequence[float]) -> str:
    """A text with the least and the greatest of some numbers of nats."""
    if not values:
        return f"{what} –"
    low, high = f"{min(values):+.3f}", f"{max(values):+.3f}"
    return f"{what} {low if low == high else f'{low} to {high}'} nats"
