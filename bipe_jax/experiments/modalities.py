"""Sequences that are not prose: music, proofs, code, chess, and a control without natural segments."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bipe_jax.experiments import text
from bipe_jax.experiments.experiment import (
    DATA,
    Arm,
    Cell,
    Evaluation,
    Experiment,
    Prediction,
    crossed,
    encodings,
)
from bipe_jax.experiments.outcomes import Outcomes, shown
from bipe_jax.modalities import places, registry, writing
from bipe_jax.modalities.documents import Options

_SHOWN = 300  # characters of a sample
_ALL = {"quick": 0, "laptop": 0, "paper": 0}  # the default of an option
_PROOFS = {"quick": 1500, "laptop": 8000, "paper": 0}  # from the start of the database; 0: all
_GAMES = {"quick": 150, "laptop": 5000, "paper": 20_000}
_PLIES = {"quick": 15, "laptop": 60, "paper": 120}
_SEQUENCES = {"quick": 40, "laptop": 300, "paper": 3000}
_TOKENS = {"quick": 32, "laptop": 128, "paper": 512}  # of a block, in music, code and the control
_REFERENCES, _MOVE = "references right", "legal move"
_KINDS = _ABSOLUTE, _RELATIVE = "absolute references", "relative references"

_SECONDS = {"music": 40, "proofs": 52, "code": 37, "chess": 53, "control": 32}  # at the size quick
_FEWEST = 30  # places of a share that a prediction is about
_PLACES = Evaluation("places", "bipe_jax.modalities.places")
_BY_LENGTH = (
    "Models that differ in their encoding are trained on the same blocks, and score the same held-out tokens "
    "with 1 to 16 times as much context as a block (quick: 1 to 4 times)."
)


def _arms(size: str) -> list[Arm]:
    if size == "quick":
        return encodings("bipe_rope", "rope", "nope")
    return encodings("bipe_rope", "bipe_alibi", "rope", "alibi", "sinusoidal", "nope")


def _with_places(arms: list[Arm]) -> list[Arm]:
    return [arm._replace(evaluations=(_PLACES,)) for arm in arms]


def _with_references(size: str) -> list[Arm]:
    arms = encodings("bipe_rope", "rope") if size == "quick" else _arms(size)
    kinds = [
        Arm(name, options={"references": name.partition(" ")[0]}) for name in (_ABSOLUTE, _RELATIVE)
    ]
    return _with_places(crossed(arms, kinds))


def _data(size: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    directory = os.path.join(DATA, options.get("references", ""))
    return {
        "data.train": os.path.join(directory, writing.TRAIN),
        "data.evaluation": os.path.join(directory, writing.HELD_OUT),
    }


def _prepare(
    name: str, count: Mapping[str, int] = _ALL, plies: Mapping[str, int] = _ALL
) -> Callable[[str, str], None]:
    """What prepares a data set, with options by size."""

    def prepare(size: str, directory: str) -> None:
        writing.write(name, Options(count=count[size], plies=plies[size]), directory)

    return prepare


def _prepare_proofs(size: str, directory: str) -> None:
    for kind in ("absolute", "relative"):
        chosen = Options(count=_PROOFS[size], references=kind)
        writing.write("proofs", chosen, os.path.join(directory, kind))


def _samples(name: str) -> Callable[[], Iterator[dict[str, Any]]]:
    def samples() -> Iterator[dict[str, Any]]:
        for document in registry.find(name).documents(Options()):
            beginnings = [[at for at in level if at < _SHOWN] for level in document.segments]
            yield {"text": document.text[:_SHOWN], "segments": beginnings}

    return samples


def _of_places(files: Mapping[str, Any], by: str, first: int, *measures: str) -> list[Cell]:
    """The shares of measures by plies or tokens, in ranges that double."""
    rows = [row for row in files[f"{_PLACES.name}/{places.FILE}"]["results"] if row["by"] == by]
    return [
        Cell(measure, "", places.doubling(row["at"], first), row["right"], row["total"])
        for measure in measures
        for row in rows
        if row["measure"] == measure
    ]


def cells_of_games(files: Mapping[str, Any]) -> list[Cell]:
    """The shares of legal moves and pieces by ply."""
    return _of_places(files, places.NUMBER, _PLIES["quick"], _MOVE, "legal piece")


def cells_of_proofs(files: Mapping[str, Any]) -> list[Cell]:
    """The losses by length, and the shares of right references by the tokens before them."""
    first = min(row["length"] for row in files["evaluation.json"]["results"]) // 4
    return text.cells(files) + _of_places(files, places.TOKENS, first, _REFERENCES)


def _ahead(measure: str, arm: str, other: str, over: float, *, last: bool) -> text.Outcome:
    """An outcome: whether an arm's share is larger than another's by over so much, at the first or last x.

    Those with few places do not count.
    """

    def outcome(outcomes: Outcomes) -> tuple[str, bool | None]:
        xs = [
            key.x
            for key, of_seeds in outcomes.values.get(arm, {}).items()
            if key.measure == measure and all(total >= _FEWEST for _, total in of_seeds.values())
        ] or [0.0]
        x = max(xs) if last else min(xs)
        own, others = (outcomes.mean(one, measure, "", x) for one in (arm, other))
        words = f"{arm} {shown(own)}, {other} {shown(others)} to {x:g}"
        return words, own.mean - others.mean > over if own and others else None

    return outcome


def _not(outcome: text.Outcome) -> text.Outcome:
    def negated(outcomes: Outcomes) -> tuple[str, bool | None]:
        words, verdict = outcome(outcomes)
        return words, None if verdict is None else not verdict

    return negated


def _of_segments_of_data(segments: str, lead: float) -> tuple[Prediction, ...]:
    return (
        Prediction(
            f"At the training length {segments} help: BiPE-RoPE's loss is lower than RoPE's by over "
            f"{lead:g} nats, on every set.",
            "ours",
            text.lead("bipe_rope", "rope", lead, first=True),
        ),
        Prediction(
            "At the longest length BiPE-RoPE's loss is lower than RoPE's, on every set.",
            "the paper, for prose",
            text.lead("bipe_rope", "rope", 0.0),
        ),
        Prediction(
            "The losses of ALiBi and BiPE-ALiBi grow by at most 0.05 nats.",
            "the paper for BiPE-ALiBi on prose; others' runs for both (second-hand)",
            text.growth(("alibi", "bipe_alibi"), lambda nats: nats <= 0.05),
        ),
    )


def _experiment(
    name: str, question: str, config: str, predictions: tuple[Prediction, ...], **fields: Any
) -> Experiment:
    usual: dict[str, Any] = {
        "method": _BY_LENGTH, "trained": _TOKENS, "arms": _arms, "data": _data,
    }  # fmt: skip
    own: dict[str, Any] = {
        "config": f"configs/experiments/{config}.py",
        "predictions": predictions,
        "costs": {
            "quick": f"{_SECONDS[name]} s, 2 cores of an AMD EPYC with other work, 2026-11-28"
        },
    }
    return text.experiment(f"modalities-{name}", question, **usual | own | fields)


EXPERIMENTS = (
    _experiment(
        "music",
        "Do the bars of tunes help, and do they let a model read more tunes than in training?",
        "modalities",
        _of_segments_of_data("bars", 0.01),
        prepare=_prepare("music"),
        extras={"music21": "modalities"},
        samples=_samples("music"),
    ),
    _experiment(
        "proofs",
        "Which encodings find the steps that a step of a proof refers to, by their number or by how far back "
        "they are?",
        "proofs",
        (
            Prediction(
                "In the longest proofs BiPE-RoPE has more relative references right than RoPE, by over 5 "
                "points: they count segments.",
                "ours",
                _ahead(
                    _REFERENCES, f"bipe_rope, {_RELATIVE}", f"rope, {_RELATIVE}", 0.05, last=True
                ),
            ),
            Prediction(
                "There BiPE-RoPE has more relative references right than absolute ones, whose numbers it has "
                "not seen.",
                "ours",
                _ahead(
                    _REFERENCES,
                    f"bipe_rope, {_RELATIVE}",
                    f"bipe_rope, {_ABSOLUTE}",
                    0.0,
                    last=True,
                ),
            ),
            Prediction(
                "At the longest length BiPE-RoPE's loss is lower than RoPE's, with either references.",
                "the paper, for prose",
                text.both(
                    *(text.lead(f"bipe_rope, {of}", f"rope, {of}", 0.0) for of in _KINDS),
                ),
            ),
        ),
        method=_BY_LENGTH
        + " Each step is a segment. What a step refers to is right if the most probable "
        "tokens are those of the proof; x is then the number of tokens before it. Losses of different "
        "references are of different texts.",
        trained={"quick": 64, "laptop": 256, "paper": 512},
        x_name="tokens",
        arms=_with_references,
        cells=cells_of_proofs,
        measures=text.MEASURES,
        prepare=_prepare_proofs,
        samples=_samples("proofs"),
    ),
    _experiment(
        "code",
        "Do lines of code serve as segments, and let a model read longer files than in training?",
        "code",
        _of_segments_of_data("lines", 0.01),
        prepare=_prepare("code"),
        samples=_samples("code"),
    ),
    _experiment(
        "chess",
        "Which encodings know the board after more moves than in training?",
        "chess",
        (
            Prediction(
                "In the first plies BiPE-RoPE has at most 1 point more legal moves than RoPE.",
                "ours",
                _not(_ahead(_MOVE, "bipe_rope", "rope", 0.01, last=False)),
            ),
            Prediction(
                "In the last plies BiPE-RoPE has over 5 points more legal moves than RoPE.",
                "ours",
                _ahead(_MOVE, "bipe_rope", "rope", 0.05, last=True),
            ),
        ),
        method="Games that prefer captures and checks, as squares: 'e2 e4 e7 e5'. A pair of moves is a "
        "segment. Trained on the first 60 plies (quick: 15, paper: 120), tested on whole games. After the "
        "true moves, a piece is legal if the most probable square is one from which a move is legal; a move "
        "is, if after the true square that it begins at the most probable one is where it may end.",
        x_name="ply",
        trained=_PLIES,
        arms=lambda size: _with_places(_arms(size)),
        cells=cells_of_games,
        measures={},
        prepare=_prepare("chess", count=_GAMES, plies=_PLIES),
        extras={"chess": "modalities"},
        samples=_samples("chess"),
    ),
    _experiment(
        "control",
        "Does BiPE help where nothing is a segment and nothing is far? The control.",
        "dna",
        (
            Prediction(
                "At the training length BiPE-RoPE's loss is at most 0.005 nats below RoPE's.",
                "ours",
                _not(text.lead("bipe_rope", "rope", 0.005, first=True)),
            ),
            Prediction(
                "At the longest length BiPE-ALiBi's loss is at most 0.005 nats below ALiBi's.",
                "ours",
                _not(text.lead("bipe_alibi", "alibi", 0.005)),
            ),
        ),
        method=_BY_LENGTH
        + " The text is a Markov chain of order 3 over four letters; segments have 12 "
        "letters, wherever they fall.",
        prepare=_prepare("dna", count=_SEQUENCES),
        samples=_samples("dna"),
    ),
)
