"""Arithmetic with all steps written out (Feng et al. 2023's task), and a running fold."""

import itertools
from collections.abc import Mapping
from typing import Any

from bipe_jax import synthetic
from bipe_jax.experiments.experiment import (
    Arm,
    Cell,
    Experiment,
    Prediction,
    crossed,
    encodings,
)
from bipe_jax.experiments.outcomes import Outcomes, shown

_MOST = {
    "arithmetic": {"quick": 3, "laptop": 6, "paper": 15},
    "fold": {"quick": 3, "laptop": 15, "paper": 15},
}
_COUNTS = {"quick": 16, "laptop": 1000, "paper": 1000}
ANSWER, _WHOLE = "answer right", "whole chain right"
ALL, _SEEN, _UNSEEN = "all chains", "offsets seen in training", "an offset not seen in training"


def _data(kind: str):
    def of(size: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        most, count = _MOST[kind][size], _COUNTS[size]
        longer = (most + 1, most + 2, most + 3) if kind == "arithmetic" else (2 * most, 4 * most)
        tests = [
            f"synthetic:{kind}(seed={seed}, split=test, count={count}, operators={n})"
            for n in (most, *longer)
        ]
        return {
            "data.train": f"synthetic:{kind}(seed={seed}, operators=1:{most})",
            "data.evaluation": "; ".join(tests),
        }

    return of


def cells(files: Mapping[str, Any]) -> list[Cell]:
    """The values of a point, from its answers."""
    values: list[Cell] = []
    for of_source in files["answers.json"]["results"]:
        for item in of_source["items"]:
            x = item["labels"]["operators"]
            conditions = [ALL]
            if (unseen := item["labels"].get("unseen_offset")) is not None:
                conditions.append(_UNSEEN if unseen else _SEEN)
            for condition in conditions:
                values.append(Cell(_WHOLE, condition, x, item["whole"], 1))
                if item.get("answer") is not None:
                    values.append(Cell(ANSWER, condition, x, item["answer"], 1))
    return values


def _arms(size: str) -> list[Arm]:
    if size == "quick":
        return encodings("bipe_rope", "rope", "nope")
    if size == "laptop":  # of width 48
        return encodings("bipe_rope", "bipe_alibi", "rope", "nope")
    own = encodings("bipe_rope", "bipe_alibi", "rope", "alibi", "sinusoidal", "nope")
    own.append(
        Arm(
            "bipe_rope, sinusoidal offsets",
            {
                "position.absolute": (("sinusoidal", "offset"),),
                "position.relative": (("rope", "segment"),),
            },
        )
    )
    of_width = [
        Arm(f"width {w}", {"model.width": w, "model.feed_forward": 4 * w})
        for w in (48, 64, 96, 128, 256)
    ]
    return crossed(own, of_width)


def _arms_of_fold(size: str) -> list[Arm]:
    if size == "quick":
        return encodings("bipe_rope", "rope")
    return encodings("bipe_rope", "bipe_alibi", "rope", "alibi", "sinusoidal", "nope")


def _xs(outcomes: Outcomes, measure: str = ANSWER) -> list[float]:
    return sorted(
        {key.x for key in outcomes.keys if (key.measure, key.condition) == (measure, ALL)}
    )


def _best_in_distribution(outcomes: Outcomes) -> tuple[str, bool | None]:
    xs = _xs(outcomes)
    narrow = [arm for arm in outcomes.arms if "width" not in arm or arm.endswith("width 48")]
    means = {arm: outcomes.mean(arm, ANSWER, ALL, xs[0]) if xs else None for arm in narrow}
    text = "; ".join(f"{arm} {shown(mean)}" for arm, mean in means.items())
    own = [mean.mean for arm, mean in means.items() if mean and arm.startswith("bipe")]
    others = [mean.mean for arm, mean in means.items() if mean and not arm.startswith("bipe")]
    return text, max(own) > max(others) + 0.1 if own and others else None


def _unseen_is_worse(outcomes: Outcomes) -> tuple[str, bool | None]:
    xs = _xs(outcomes)
    arm = outcomes.arms[0]
    pairs = [
        (x, outcomes.mean(arm, ANSWER, _SEEN, x), outcomes.mean(arm, ANSWER, _UNSEEN, x))
        for x in xs
    ]
    known = [(x, seen, unseen) for x, seen, unseen in pairs if seen and unseen]
    text = "; ".join(
        f"{arm}, {x:g} operators: seen {shown(s)}, unseen {shown(u)}" for x, s, u in known
    )
    return text or "no chain had an offset that was not seen", (
        all(unseen.mean < seen.mean for _, seen, unseen in known) if known else None
    )


def _fold_extrapolates(outcomes: Outcomes) -> tuple[str, bool | None]:
    xs = _xs(outcomes, _WHOLE)
    if len(xs) < 2:
        return "–", None
    means = {arm: outcomes.mean(arm, _WHOLE, ALL, xs[-1]) for arm in outcomes.arms}
    text = (
        "; ".join(f"{arm} {shown(mean)}" for arm, mean in means.items())
        + f" at {xs[-1]:g} operators"
    )
    own, rope = means.get("bipe_rope"), means.get("rope")
    return text, own.mean > rope.mean + 0.1 if own and rope else None


def _experiment(kind: str, question: str, method: str, arms: Any, predictions: Any) -> Experiment:
    task = synthetic.parse(f"{kind}(operators=1:15)")
    return Experiment(
        name=kind,
        question=question,
        method=method,
        config=f"configs/experiments/{kind}.py",
        x_name="operators",
        trained=_MOST[kind],
        predictions=predictions,
        arms=arms,
        data=_data(kind),
        cells=cells,
        samples=lambda: map(task.sample, itertools.count()),
    )


ARITHMETIC = _experiment(
    "arithmetic",
    "Do segments of a chain of thought help a small model to calculate, and to calculate longer chains?",
    "Expressions in Z_11 are evaluated one operator a step, the steps joined by '='; all after the first '=' "
    "is learned. Trained on 1 to 15 operators, in proportion to their number; tested on 15 to 18 (laptop: 1 "
    "to 6 and 6 to 9, quick: 1 to 3 and 3 to 6).",
    _arms,
    (
        Prediction(
            "At width 48 BiPE has over 10 points more answers right than encodings of position.",
            "second-hand: the paper has 97 % for BiPE against under 70 %, whether in or out of distribution "
            "is not known to us",
            _best_in_distribution,
        ),
        Prediction(
            "With more operators, chains with an offset that training never had are worse than others.",
            "ours",
            _unseen_is_worse,
        ),
    ),
)
FOLD = _experiment(
    "fold",
    "Does a model continue a fold, whose segments never grow, over more segments than seen?",
    "'5 + 7 = 1 ; 1 * 3 = 3 ;': each segment takes up the last result. Operators and second operands are "
    "given, the rest is learned. Trained on 1 to 15 segments; tested on 15, 30 and 60 (quick: 3, 6 and 12).",
    _arms_of_fold,
    (
        Prediction(
            "At 4 times as many segments BiPE-RoPE has over 10 points more chains right than RoPE.",
            "ours",
            _fold_extrapolates,
        ),
    ),
)
