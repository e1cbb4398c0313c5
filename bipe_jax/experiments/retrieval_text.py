"""Retrieval over real text: what line k says, or the sentence before one; and a pass key in it.

A task of this project, see docs/how-to/experiments.md.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from bipe_jax.data import passages, questions
from bipe_jax.data.questions import Settings
from bipe_jax.experiments import text, two_stages
from bipe_jax.experiments.experiment import DATA, Arm, Cell, Experiment, Prediction
from bipe_jax.experiments.outcomes import Outcomes, shown

_LINES = {"quick": (8, 16), "laptop": (16, 32, 64, 128), "paper": (16, 32, 64, 128)}
_TRAINED = {"quick": 200, "laptop": 20_000, "paper": 50_000}  # questions of each kind
_TESTED = {"quick": 6, "laptop": 125, "paper": 1000}  # at each length, seen k and others
_WIDTH = 56  # characters of a line, on average
_QUICKSTART = "quickstart:train", "quickstart:validation"
_PILE = "pile/train/*.jsonl.zst", "pile/test.jsonl.zst"
_SENTENCES = ("before", "key")  # what is asked about sentences, and not about lines
_RIGHT, _BEFORE = "answer right", "tokens of the answer before the first wrong one"
_LOSS = "loss on text by tokens, nats"
_TEXT = {
    "quick": {"steps": 20},
    "laptop": {"steps": 2000, "optimizer.learning_rate": 3e-3},
    "paper": {"steps": 500_000, "schedule.warmup_steps": 10_000, "checkpoint.every": 10_000},
}


def _sources(size: str, ask: str) -> tuple[str, str]:
    """The text of training and of tests: held-out documents."""
    if size == "paper":
        return _PILE
    train, test = _QUICKSTART
    return (f"{train}#Plays", f"{test}#Plays") if ask in _SENTENCES else _QUICKSTART


def _prepare(asked: Sequence[str]):
    def prepare(size: str, directory: str) -> None:
        os.makedirs(directory, exist_ok=True)
        lines = _LINES[size]
        for ask in asked:
            unit = passages.SENTENCE if ask in _SENTENCES else passages.LINE
            train, test = _sources(size, ask)
            files = {f"train-{ask}": (train, (lines[0] // 4, lines[0]), (1, lines[0]), 0)}
            for n in lines:
                files[f"test-{ask}-{n}"] = (test, (n, n), (1, lines[0]), 1)
                if n > lines[0]:
                    files[f"test-{ask}-{n}-beyond"] = (test, (n, n), (lines[0] + 1, n), 2)
            for name, (source, of_lines, k, seed) in files.items():
                path = os.path.join(directory, f"{name}.jsonl.gz")
                if not os.path.exists(path):
                    count = (_TESTED if seed else _TRAINED)[size]
                    read = passages.read(source, unit, _WIDTH)
                    settings = Settings(ask, of_lines, k)
                    questions.write(path, questions.examples(read, [settings], count, seed))

    return prepare


def _data(size: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    if options.get(two_stages.TEXT):
        train, test = _PILE if size == "paper" else _QUICKSTART
        return {"data.train": train, "data.evaluation": test}
    return {
        "data.train": f"examples:{DATA}/train-*.jsonl.gz",
        "data.evaluation": f"examples:{DATA}/test-*.jsonl.gz",
    }


def _arms(size: str) -> list[Arm]:
    names = ("bipe_rope", "rope") if size == "quick" else (
        "bipe_rope", "bipe_alibi", "rope", "alibi", "sinusoidal", "nope",
    )  # fmt: skip
    length = {"quick": 512, "laptop": 640, "paper": 1024}[size]
    return two_stages.arms(names, length, _TEXT[size])


def cells(files: Mapping[str, Any]) -> list[Cell]:
    """The values of a point: the loss of one on text, else its answers by what is asked, lines and k."""
    if "answers.json" not in files:
        losses = (cell for cell in text.cells(files) if cell.measure == text.LOSS)
        return [cell._replace(measure=_LOSS) for cell in losses]
    values: list[Cell] = []
    items = [item for of in files["answers.json"]["results"] for item in of["items"]]
    least = min(item["labels"]["lines"] for item in items)  # the most in training
    for item in sorted(items, key=lambda item: item["labels"]["k"]):
        ask, lines, k = (item["labels"][name] for name in ("ask", "lines", "k"))
        values.append(Cell(_RIGHT, f"{ask}, all k", lines, item["whole"], 1))
        before = item["learned"] if item["whole"] else item["first_wrong"]
        values.append(Cell(_BEFORE, f"{ask}, all k", lines, before, item["learned"]))
        values.append(Cell(_RIGHT, f"{ask}, {_range_of(k, least)}", lines, item["whole"], 1))
    return values


def _range_of(k: int, seen: int) -> str:
    """The range that a number is in, and whether training had it."""
    low = 1
    for high in (seen // 4, seen, 4 * seen):
        if k <= high:
            return f"k {low}-{high}, {'seen' if high <= seen else 'not seen'}"
        low = high + 1
    return f"k from {low}, not seen"


def _ahead(outcomes: Outcomes, ask: str, factor: int) -> tuple[str, float | None]:
    """The arms at the most lines of training and at some times as many, and BiPE-RoPE's lead there."""
    condition = f"{ask}, all k"
    xs = sorted({key.x for key in outcomes.keys if key.condition == condition})
    if not xs or factor * xs[0] not in xs:
        return "–", None
    arms = two_stages.tuned(outcomes)
    there = {arm: outcomes.mean(arm, _RIGHT, condition, factor * xs[0]) for arm in arms}
    words = "; ".join(
        f"{arm}: {shown(outcomes.mean(arm, _RIGHT, condition, xs[0]))} of {xs[0]:g} lines, "
        f"{shown(mean)} of {factor * xs[0]:g}"
        for arm, mean in there.items()
    )
    own = there["bipe_rope"]
    others = [mean for arm, mean in there.items() if not arm.startswith("bipe")]
    known = [mean.mean for mean in others if mean]
    return words, own.mean - max(known) if own and known and len(known) == len(others) else None


def _lead(ask: str, factor: int, is_over: bool) -> Prediction:
    """Whether BiPE-RoPE is more than 10 points ahead of all encodings of position, or is not."""

    def outcome(outcomes: Outcomes) -> tuple[str, bool | None]:
        words, ahead = _ahead(outcomes, ask, factor)
        return words, None if ahead is None else (ahead > 0.1) == is_over

    by = "over" if is_over else "at most"
    times = {2: "twice", 8: "8 times"}[factor]
    return Prediction(
        f"{ask!r}: at {times} the lines of training BiPE-RoPE is {by} 10 points ahead of the best encoding "
        "of position.",
        "ours",
        outcome,
    )


def _experiment(
    name: str, asked: Sequence[str], question: str, predictions: tuple[Prediction, ...]
) -> Experiment:
    def samples():
        sources = {
            ask: passages.read(
                _sources("quick", ask)[0],
                passages.SENTENCE if ask in _SENTENCES else passages.LINE,
                _WIDTH,
            )
            for ask in asked
        }
        for seed in itertools.count():
            for ask, source in sources.items():
                yield from questions.examples(source, [Settings(ask, (4, 8), (1, 8))], 1, seed)

    return Experiment(
        name=name,
        question=question,
        method="A model is trained on text, and then on passages of 4 to 16 lines or sentences with a "
        "question at the end, of which the answer is learned; it is tested on passages of 16 to 128 (quick: "
        "2 to 8, 8 and 16) of held-out documents, on k that training had and on larger ones. Each line is a "
        "segment.",
        config="configs/experiments/retrieval_text.py",
        x_name="lines",
        trained={size: lines[0] for size, lines in _LINES.items()},
        predictions=predictions,
        arms=_arms,
        data=_data,
        cells=cells,
        measures={_LOSS: text.MEASURES[text.LOSS]},
        samples=samples,
        prepare=_prepare(asked),
    )


EXPERIMENTS = (
    _experiment(
        "retrieval-text",
        ("line", "back", "before", "key"),
        "Which encodings find, in more lines of real text than seen, line k ('line'), the k-th from the end "
        "('back'), the sentence before one that is quoted ('before'), and, as the control, how one goes on "
        "whose beginning is quoted ('key')?",
        (
            _lead("line", 2, True),
            _lead("back", 2, True),
            _lead("before", 2, True),
            _lead("key", 2, False),
        ),
    ),
    _experiment(
        "passkey",
        ("passkey",),
        "Which encodings find a pass key in more lines of real text than seen? No number of a line helps.",
        (_lead("passkey", 2, False), _lead("passkey", 8, True)),
    ),
)
