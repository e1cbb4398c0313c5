"""Bi-NFA: strings of bilevel automata. A task of this project, see docs/how-to/experiments.md."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bipe_jax import synthetic
from bipe_jax.commands.options import SIZES
from bipe_jax.experiments.experiment import (
    Arm,
    Cell,
    Experiment,
    Prediction,
    crossed,
    encodings,
)
from bipe_jax.experiments.outcomes import Key, Outcomes, shown
from bipe_jax.synthetic import machines

_CONFIG = "configs/experiments/bi_nfa.py"
_STATES = {"quick": 3, "laptop": 4, "paper": 6}
_COUNTS = {"quick": 16, "laptop": 250, "paper": 1000}
_SEGMENTS = {"quick": (8, 16), "laptop": (8, 16, 32, 64), "paper": (8, 16, 32, 64)}
OUTER, _INNER = "outer set after the last segment", "inner sets, all of a string"
_WRITTEN = "all that is written right"
_SAME = "64 letters on average, in fewer and longer segments"
_SAME_LETTERS = {8: "4:12", 4: "8:24", 2: "16:48", 1: "32:96"}  # segments -> letters of each
USUAL = "segments of 4 to 12 letters"
_LONG = "segments of 12 to 24 letters"

INTRA, INTER = (("learned", "offset"),), (("rope", "segment"),)


def _task(size: str, seed: int, **options: Any) -> str:
    listed = {"seed": seed, "states": _STATES[size]} | options
    return f"synthetic:bi-nfa({', '.join(f'{name}={value}' for name, value in listed.items())})"


def _data(size: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The training text of a machine, and test strings of more segments and of longer ones."""
    count = _COUNTS[size]
    tests = [
        _task(size, seed, split="test", count=count, segments=k, **options) for k in _SEGMENTS[size]
    ]
    if size == "paper":
        tests += [
            _task(size, seed, split="test", count=count, segments=k, letters=letters, **options)
            for k, letters in _SAME_LETTERS.items()
            if k != 8  # it is there
        ]
    longer = {**options, "letters": "12:24"}
    tests.append(_task(size, seed, split="test", count=count, segments=8, **longer))
    return {"data.train": _task(size, seed, **options), "data.evaluation": "; ".join(tests)}


def _encodings(size: str) -> list[Arm]:
    names = {
        "quick": ("bipe_rope", "rope", "nope"),
        "laptop": ("bipe_rope", "rope", "alibi", "nope"),
        "paper": ("bipe_rope", "bipe_alibi", "rope", "alibi", "sinusoidal", "nope"),
    }[size]
    alone = [] if size != "paper" else [
        Arm("intra alone", {"position.absolute": INTRA, "position.relative": ()}),
        Arm("inter alone", {"position.absolute": (), "position.relative": INTER}),
    ]  # fmt: skip
    return [*encodings(*names), *alone]


def cells(files: Mapping[str, Any]) -> list[Cell]:
    """The values of a point, from its answers."""
    values: list[Cell] = []
    for of_source in files["answers.json"]["results"]:
        options = synthetic.parse(of_source["source"].partition(":")[2])
        conditions = _conditions(options.segments[0], options.letters)  # type: ignore[attr-defined]
        for item, condition in itertools.product(of_source["items"], conditions):
            groups, x = item.get("groups", {}), item["labels"]["segments"]
            if "outer" in groups:
                values.append(Cell(OUTER, condition, x, groups["outer"]["last"], 1))
            if "inner" in groups:
                inner = groups["inner"]
                values.append(Cell(_INNER, condition, x, inner["right"] == inner["total"], 1))
            if "accept" in groups:
                values.append(Cell("acceptance", condition, x, groups["accept"]["last"], 1))
            if options.mode == "scratchpad":  # type: ignore[attr-defined]
                values.append(Cell(_WRITTEN, condition, x, item["whole"], 1))
    return values


def _conditions(segments: int, letters: tuple[int, int]) -> list[str]:
    """What strings of so many segments, each of a range of letters, are a test of."""
    if letters == (12, 24):
        return [_LONG]
    usual = [USUAL] if letters == (4, 12) else []
    same = f"{letters[0]}:{letters[1]}" == _SAME_LETTERS.get(segments)
    return usual + [_SAME] * same


def _machines(size: str, seeds: Sequence[int], **options: Any) -> list[tuple[str, str]]:
    """How long the machine of each seed remembers, and what guessing scores."""
    facts: list[tuple[str, str]] = []
    for seed in seeds:
        task: Any = synthetic.parse(_task(size, seed, **options).partition(":")[2])
        random = np.random.RandomState(seed)
        memory = machines.memory(task.machine, random)
        guessed = machines.majority(machines.outer_sets(task.machine, random))
        text = (
            f"two outer states lead to one set after {memory['median']:g} segments (median; 65: more than "
            f"64), {memory['never']:.0%} not within 64; guessing the most frequent outer set of 8 segments "
            f"is right for {guessed:.0%} of the strings"
        )
        facts.append((f"Machine of seed {seed}", text))
    return facts


def _at(outcomes: Outcomes, arms: Sequence[str], measure: str, condition: str, x: float) -> str:
    return "; ".join(f"{arm} {shown(outcomes.mean(arm, measure, condition, x))}" for arm in arms)


def _no_worse_at_8(outcomes: Outcomes) -> tuple[str, bool | None]:
    means = {arm: outcomes.mean(arm, OUTER, USUAL, 8) for arm in outcomes.arms}
    text = _at(outcomes, outcomes.arms, OUTER, USUAL, 8)
    own = means.get("bipe_rope")
    others = [mean.mean for arm, mean in means.items() if mean and arm != "bipe_rope"]
    if own is None or not others:
        return text, None
    return text, own.mean >= max(others) - 0.02


def _from_8_to_most(outcomes: Outcomes, arm: str, measure: str = OUTER) -> tuple[str, float | None]:
    """A measure of an arm at 8 segments and at the most, in words, and by how much it is less."""
    last = max((key.x for key in outcomes.keys if key.condition == USUAL), default=8)
    here, there = (outcomes.mean(arm, measure, USUAL, x) for x in (8, last))
    text = f"{arm} at 8 segments {shown(here)}, at {last:g} {shown(there)}"
    return text, here.mean - there.mean if here and there else None


def _flat(outcomes: Outcomes) -> tuple[str, bool | None]:
    text, lost = _from_8_to_most(outcomes, "bipe_rope")
    return text, None if lost is None else lost <= 0.05


def _decays(outcomes: Outcomes) -> tuple[str, bool | None]:
    text, lost = _from_8_to_most(outcomes, "bipe_rope")
    return text, None if lost is None else lost > 0.05


def _writes_on(outcomes: Outcomes) -> tuple[str, bool | None]:
    text, lost = _from_8_to_most(outcomes, "bipe_rope", _WRITTEN)
    return text, None if lost is None else lost <= 0.05


def _rope_falls(outcomes: Outcomes) -> tuple[str, bool | None]:
    text, lost = _from_8_to_most(outcomes, "rope")
    return text, None if lost is None else lost >= 0.1


def _offsets_fail(outcomes: Outcomes) -> tuple[str, bool | None]:
    mean = outcomes.mean("bipe_rope", _INNER, _LONG, 8)
    usual = outcomes.mean("bipe_rope", _INNER, USUAL, 8)
    text = f"bipe_rope, all inner sets right: {shown(usual)} usual, {shown(mean)} in long segments"
    return text, mean.mean <= usual.mean - 0.1 if mean and usual else None


def _predictions(family: str) -> tuple[Prediction, ...]:
    if family == "total":
        text = "The machine forgets: BiPE-RoPE loses at most 5 points to 8 times as many segments."
        far = Prediction(text, "ours", _flat)
    else:
        text = "The machine remembers: BiPE-RoPE loses over 5 points to 8 times as many segments."
        far = Prediction(text, "ours", _decays)
    return (
        Prediction(
            "At 8 segments, as in training, BiPE-RoPE has the outer set right as often as any other, but for "
            "2 points.",
            "ours",
            _no_worse_at_8,
        ),
        far,
        Prediction(
            "RoPE loses at least 10 points with more segments than in training.",
            "ours",
            _rope_falls,
        ),
        Prediction(
            "With segments longer than any in training BiPE-RoPE has 10 points fewer strings with all inner "
            "sets right: their offsets were never seen.",
            "ours",
            _offsets_fail,
        ),
    )


_TRAINED = (
    "Trained on 1 to 8 segments of 4 to 12 letters; tested on more segments, and on longer ones. Each seed "
    "has a machine of its own."
)
_METHOD = (
    "Strings of a random machine of two levels are read token by token. At each letter the model says "
    f"which inner states are possible, at each segment's end which outer ones. {_TRAINED}"
)


def _samples(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    task = synthetic.parse(_task("laptop", 0, **options).partition(":")[2])
    return map(task.sample, itertools.count())


def _experiment(name: str, question: str, arms: Any, **changes: Any) -> Experiment:
    usual = {
        "name": name, "question": question, "method": _METHOD, "config": _CONFIG,
        "x_name": "segments", "trained": dict.fromkeys(SIZES, 8), "arms": arms, "data": _data,
        "cells": cells, "samples": lambda: _samples({}), "facts": _machines,
    }  # fmt: skip
    return Experiment(**usual | changes)


# As measured.
_COSTS = {
    "total": {"laptop": "33 min, --jobs=2, 2 cores of an AMD EPYC with other work, 2026-11-28"}
}


def _of_family(family: str) -> Experiment:
    """All encodings on one family of machines."""
    return _experiment(
        f"bi-nfa-{family}",
        f"Which encodings follow a machine of the family {family!r} over more segments than seen?",
        lambda size: [arm._replace(options={"family": family}) for arm in _encodings(size)],
        samples=lambda: _samples({"family": family}),
        predictions=_predictions(family),
        facts=functools.partial(_machines, family=family),
        costs=_COSTS.get(family, {}),
    )


def _controls(size: str) -> list[Arm]:
    """What should destroy the advantage of BiPE-RoPE."""
    (bipe,), (nope,) = encodings("bipe_rope"), encodings("nope")
    return [
        bipe,
        bipe._replace(name="random coordinates", options={"coordinates": "random"}),
        bipe._replace(name="coordinates, no separators", options={"separators": "hidden"}),
        nope._replace(name="separators, no coordinates"),
    ]


def _random_is_worse(outcomes: Outcomes) -> tuple[str, bool | None]:
    arms = ("bipe_rope", "random coordinates")
    own, random = (outcomes.mean(arm, OUTER, USUAL, 8) for arm in arms)
    verdict = random.mean <= own.mean - 0.05 if own and random else None
    return _at(outcomes, arms, OUTER, USUAL, 8), verdict


def _widths(size: str) -> list[Arm]:
    """Encodings by width of the model and states of the machine."""
    widths = (16, 32) if size == "quick" else (16, 32, 48, 64, 96, 128)
    states = (3,) if size == "quick" else (3, 4, 5, 6, 8)
    sizes = [
        Arm(f"width {w}", {"model.width": w, "model.feed_forward": 4 * w}) for w in widths
    ]  # fmt: skip
    machines = [
        Arm(f"{n} states", {"model.vocab_size": 3 + 2 * n + 8}, {"states": n}) for n in states
    ]
    return crossed(crossed(encodings("bipe_rope", "rope", "nope"), machines), sizes)


def by_width(outcomes: Outcomes) -> Outcomes:
    """Encodings by the width of the model: what was right at 8 segments, for each number of states."""
    values: dict[str, dict[Key, Mapping[int, tuple[float, float]]]] = {}
    for arm in outcomes.arms:
        encoding, states, width = arm.split(", ")
        of_encoding = values.setdefault(encoding, {})
        for key, of_seeds in outcomes.values.get(arm, {}).items():
            if key.condition == USUAL and key.x == 8:
                x = float(width.removeprefix("width "))
                of_encoding[Key(key.measure, f"{states}, 8 segments", x)] = of_seeds
    return Outcomes(list(values), values, outcomes.measures)


def least_widths(outcomes: Outcomes) -> dict[tuple[str, str], int | None]:
    """(encoding, condition) of `by_width` -> the least width with 99 % of the last outer sets right."""
    least: dict[tuple[str, str], int | None] = {}
    for key, arm in itertools.product(outcomes.keys, outcomes.arms):
        if key.measure == OUTER:
            before = least.setdefault((arm, key.condition), None)
            mean = outcomes.mean(arm, *key)
            if before is None and mean and mean.mean >= 0.99:
                least[arm, key.condition] = int(key.x)
    return least


def _width_grows(outcomes: Outcomes) -> tuple[str, bool | None]:
    least = least_widths(outcomes)
    text = "; ".join(f"{e}, {s}: {w or 'none reached 99 %'}" for (e, s), w in least.items())
    pairs = [
        (width, least.get(("rope", states)))
        for (encoding, states), width in least.items()
        if encoding == "bipe_rope"
    ]
    known = [(own, other) for own, other in pairs if own and other]
    return text, all(own <= other for own, other in known) if known else None


CONTROLS = _experiment(
    "bi-nfa-controls",
    "Is it the coordinates of segments that help, or the separators in the text?",
    _controls,
    predictions=(
        Prediction(
            "With coordinates at random places at least 5 points fewer outer sets are right.",
            "ours",
            _random_is_worse,
        ),
    ),
)
WIDTHS = _experiment(
    "bi-nfa-width",
    "Which width does a model need for a machine of so many states?",
    _widths,
    view=by_width,
    x_name="width of the model",
    trained={},
    facts=lambda size, seeds: (),
    predictions=(
        Prediction(
            "BiPE-RoPE needs no more width than RoPE, for any number of states, in distribution.",
            "the paper says that bilevel encodings need fewer parameters for such machines (its theorem's "
            "statement is not known to us)",
            _width_grows,
        ),
    ),
)
SCRATCHPAD = _experiment(
    "bi-nfa-scratchpad",
    "Which encodings follow a machine over more segments than seen if they write its states down?",
    lambda size: [
        arm._replace(
            options={"mode": "scratchpad"}, changes={**arm.changes, "sequence_length": 256}
        )
        for arm in _encodings(size)
    ],
    method="After each segment of a string the model writes the outer states, and at the end whether the "
    f"string is accepted; greedy decoding must write all of it. {_TRAINED}",
    samples=lambda: _samples({"mode": "scratchpad"}),
    predictions=(
        Prediction(
            "The states are in the text, so that no encoding needs the segment's number: BiPE-RoPE loses at "
            "most 5 points to 8 times as many segments.",
            "ours",
            _writes_on,
        ),
    ),
)
EXPERIMENTS = (
    *map(_of_family, ("collapsing", "total", "group", "counter")),
    CONTROLS,
    WIDTHS,
    SCRATCHPAD,
)
