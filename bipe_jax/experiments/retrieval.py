"""Retrieval that is addressed by segment. A task of this project, see docs/how-to/experiments.md."""

import itertools
from collections.abc import Mapping
from typing import Any

from bipe_jax import synthetic
from bipe_jax.experiments.experiment import Arm, Cell, Experiment, Prediction, encodings
from bipe_jax.experiments.outcomes import Outcomes, shown
from bipe_jax.synthetic import lookup

_LINES = {"quick": (8, 16), "laptop": (16, 32, 64, 128), "paper": (16, 32, 64, 128)}
_COUNTS = {"quick": 16, "laptop": 500, "paper": 2000}
RIGHT, ALL = "value right", "all k"
GUESS = 1 / lookup.VALUES  # the share that is right by chance


def _data(ask: str):
    def of(size: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        first = _LINES[size][0]
        tests = [
            f"synthetic:lookup(seed={seed}, ask={ask}, split=test, count={_COUNTS[size]}, lines={lines})"
            for lines in _LINES[size]
        ]
        train = f"synthetic:lookup(seed={seed}, ask={ask}, lines=4:{first})"
        return {"data.train": train, "data.evaluation": "; ".join(tests)}

    return of


def _cells(files: Mapping[str, Any]) -> list[Cell]:
    """The values of a point, from its answers."""
    most = synthetic.parse(files["answers.json"]["results"][0]["source"].partition(":")[2]).lines[1]  # type: ignore[attr-defined]
    values: list[Cell] = []
    for of_source in files["answers.json"]["results"]:
        for item in of_source["items"]:
            lines, k = item["labels"]["lines"], item["labels"]["k"]
            seen = "k as in training" if k <= most else "k beyond training"
            for condition in (ALL, seen):
                values.append(Cell(RIGHT, condition, lines, item["whole"], 1))
    return values


def _arms(size: str) -> list[Arm]:
    names = {
        "quick": ("bipe_rope", "rope"),
        "laptop": ("bipe_rope", "rope", "alibi", "nope"),
        "paper": ("bipe_rope", "bipe_alibi", "rope", "alibi", "sinusoidal", "nope"),
    }
    return encodings(*names[size])


def _ahead_at_twice(outcomes: Outcomes) -> tuple[str, float | None]:
    """The arms at the lines of training and at twice as many, in words, and BiPE-RoPE's lead there."""
    xs = sorted({key.x for key in outcomes.keys if key.condition == ALL})
    if len(xs) < 2:
        return "–", None
    means = {arm: [outcomes.mean(arm, RIGHT, ALL, x) for x in xs[:2]] for arm in outcomes.arms}
    text = "; ".join(
        f"{arm}: {shown(here)} of {xs[0]:g} lines, {shown(there)} of {xs[1]:g}"
        for arm, (here, there) in means.items()
    )
    own = means["bipe_rope"][1]
    others = [there for arm, (_, there) in means.items() if not arm.startswith("bipe")]
    known = [there.mean for there in others if there]
    return text, own.mean - max(known) if own and len(known) == len(others) else None


def _is_ahead(outcomes: Outcomes) -> tuple[str, bool | None]:
    text, ahead = _ahead_at_twice(outcomes)
    return text, None if ahead is None else ahead > 0.1


def _is_not_ahead(outcomes: Outcomes) -> tuple[str, bool | None]:
    text, ahead = _ahead_at_twice(outcomes)
    return text, None if ahead is None else ahead <= 0.1


_ADDRESSED = Prediction(
    "At twice the lines of training BiPE-RoPE finds over 10 points more than any encoding of position.",
    "ours",
    _is_ahead,
)
_CONTROL = Prediction(
    "At twice the lines of training BiPE-RoPE is at most 10 points ahead of the best encoding of position.",
    "ours",
    _is_not_ahead,
)


def _experiment(ask: str, question: str, prediction: Prediction) -> Experiment:
    task = synthetic.parse(f"lookup(ask={ask})")
    return Experiment(
        name=f"retrieval-{ask}",
        question=question,
        method="Lines of a key, fillers and a value, and a question at the end; the value is learned. "
        "Trained on 4 to 16 lines, tested on 16 to 128 (quick: 8 and 16). Chance is 1 of 32 values.",
        config="configs/experiments/retrieval.py",
        x_name="lines",
        trained={size: lines[0] for size, lines in _LINES.items()},
        predictions=(prediction,),
        arms=_arms,
        data=_data(ask),
        cells=_cells,
        samples=lambda: map(task.sample, itertools.count()),
    )


EXPERIMENTS = (
    _experiment(
        "back",
        "Which encodings find the line that is k lines back, in more lines than seen?",
        _ADDRESSED,
    ),
    _experiment(
        "line",
        "Which encodings find line k, counted from the start, in more lines than seen?",
        _ADDRESSED,
    ),
    _experiment(
        "before",
        "Which encodings find the line before the one with a key, in more lines than seen?",
        _ADDRESSED,
    ),
    _experiment(
        "key",
        "Which encodings find the line with a key, in more lines than seen? The control: no number helps.",
        _CONTROL,
    ),
)
