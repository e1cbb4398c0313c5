"""The table: each row of `rows` in tests of several kinds, and the search for one that extrapolates."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bipe_jax import flags
from bipe_jax.experiments import arithmetic, bi_nfa, length, modalities, retrieval, text
from bipe_jax.experiments.experiment import Arm, Experiment
from bipe_jax.experiments.outcomes import Key, Outcomes
from bipe_jax.experiments.rows import Base, rows

# Test -> its values.
Results = Mapping[str, Outcomes]
_FLAT = _BEST = 0.01  # of a perplexity
_SHOWN = 4  # names in a sentence


class Test(NamedTuple):
    """An experiment whose arms are the rows.

    Attributes:
      name: of the test, and of its directory.
      measure: what the table shows of it. condition: of that measure; "": each, such as each set of text.
    """

    name: str
    experiment: Experiment
    measure: str
    condition: str = ""


class Column(NamedTuple):
    """A column of the table.

    Attributes:
      test: its name. key: what it shows.
    """

    test: str
    key: Key


class Prediction(NamedTuple):
    """What was expected of the whole table, see `experiment.Prediction`."""

    text: str
    source: str
    outcome: Callable[[Results], tuple[str, bool | None]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Experiments with the same arms, whose values are the columns of one table.

    Attributes:
      name: of the command. question: in one sentence.
      tests: in the order in which the points of a seed are trained.
      predictions: written before the first run.
    """

    name: str
    question: str
    tests: Sequence[Test]
    predictions: Sequence[Prediction]

    def runs(self, size: str) -> int:
        """The number of points of a size, in all tests."""
        return sum(test.experiment.runs(size) for test in self.tests)

    def cost(self, size: str) -> str:
        """What a size costs, in words."""
        return "not measured"

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yields samples of the data of all tests, in turn."""
        for of_tests in zip(*(test.experiment.samples() for test in self.tests), strict=False):
            yield from of_tests

    def columns(self, results: Results) -> list[Column]:
        """The columns of the tests that have values.

        Of each condition there are the first x, which is that of training, four times the first if it was
        measured, and the last.
        """
        made: list[Column] = []
        for test in self.tests:
            keys = [
                key
                for key in results[test.name].keys
                if key.measure == test.measure and test.condition in ("", key.condition)
            ]
            for condition in dict.fromkeys(key.condition for key in keys):
                of = [key for key in keys if key.condition == condition]
                xs = (of[0].x, 4 * of[0].x, of[-1].x)
                made += [Column(test.name, key) for key in of if key.x in xs]
        return made


def _with_rows(experiment: Experiment, test: str, **fields: Any) -> Experiment:
    """An experiment with the rows for arms, whatever its own are."""

    def arms(size: str) -> list[Arm]:
        config: Any = flags.read_config([f"--config={experiment.config}:{size}"])
        width = config.model.width // config.model.heads
        first = experiment.arms(size)[0]  # all have the same options of the task
        return [
            arm._replace(options=first.options)
            for arm in rows(size, Base(width // 2, int(config.steps)))
        ]

    name = f"table, {test}"
    usual: dict[str, Any] = {"name": name, "arms": arms, "predictions": (), "costs": {}}
    return dataclasses.replace(experiment, **usual | fields)


def _find(experiments: Sequence[Experiment], name: str) -> Experiment:
    return next(one for one in experiments if one.name == name)


def _test(
    name: str, experiment: Experiment, measure: str, condition: str = "", **fields: Any
) -> Test:
    return Test(name, _with_rows(experiment, name, **fields), measure, condition)


class Verdict(NamedTuple):
    """What a row does of what is searched for; None where it is not known.

    Attributes:
      grows: the largest growth of its perplexity from the first to the last length, over the sets, as a
        share. above_best: how far its perplexity at the first length is above the best row's, likewise.
      retrieves: the low end of the interval of values that it finds at the most lines.
    """

    grows: float | None
    above_best: float | None
    retrieves: float | None

    @property
    def is_flat(self) -> bool:
        return self.grows is not None and self.grows <= _FLAT

    @property
    def is_best(self) -> bool:
        return self.above_best is not None and self.above_best <= _BEST

    @property
    def uses_context(self) -> bool:
        """Whether its perplexity falls with length, and it finds more values than guessing does."""
        falls = self.grows is not None and self.grows < 0
        return falls and self.retrieves is not None and self.retrieves > retrieval.GUESS


def verdicts(results: Results) -> dict[str, Verdict]:
    """Row -> its verdict, of rows that were trained on text.

    What is searched for is flat to the last length (perplexity grows by at most 1 %), within 1 % of the best
    row at the first length, on each set, and uses the added context.
    """
    of_text, of_lines = results[TEXT], results[LINES]
    keys = [key for key in of_text.keys if key.measure == text.PERPLEXITY]
    sets = dict.fromkeys(key.condition for key in keys)
    ends = {name: [key for key in keys if key.condition == name] for name in sets}
    first = {
        name: {
            arm: mean.mean for arm in of_text.arms if (mean := of_text.mean(arm, *of_set[0]))
        }
        for name, of_set in ends.items()
    }  # fmt: skip
    lines = [key for key in of_lines.keys if key[:2] == (retrieval.RIGHT, retrieval.ALL)]
    made: dict[str, Verdict] = {}
    for arm in of_text.arms:
        if any(arm not in of_set for of_set in first.values()) or not first:
            continue
        last = {name: of_text.mean(arm, *of_set[-1]) for name, of_set in ends.items()}
        grown = [mean.mean / first[name][arm] - 1 for name, mean in last.items() if mean]
        above = [of_set[arm] / min(of_set.values()) - 1 for of_set in first.values()]
        share = of_lines.mean(arm, *lines[-1]) if lines else None
        low = None if share is None else share.low
        made[arm] = Verdict(max(grown) if len(grown) == len(sets) else None, max(above), low)
    return made


def _all_searched(results: Results) -> tuple[str, bool | None]:
    known = verdicts(results)
    good = [arm for arm, of in known.items() if of.is_flat and of.is_best and of.uses_context]
    near = [arm for arm, of in known.items() if of.is_flat and of.is_best and arm not in good]
    words = f"the whole: {_listed(good)}; flat and within 1 % of the best: {_listed(near)}"
    return words, not good if known else None


def _flat(arms: Sequence[str], wanted: bool) -> Callable[[Results], tuple[str, bool | None]]:
    def outcome(results: Results) -> tuple[str, bool | None]:
        known = verdicts(results)
        grown = {arm: known[arm].grows for arm in arms if arm in known}
        words = "; ".join(f"{arm} {g:+.1%}" for arm, g in grown.items() if g is not None)
        if not words or None in grown.values() or len(grown) < len(arms):
            return words or "–", None
        return words, all(known[arm].is_flat == wanted for arm in arms)

    return outcome


def _randomized(results: Results) -> tuple[str, bool | None]:
    known = verdicts(results)
    own, plain = known.get("bipe_rope_randomized"), known.get("bipe_rope")
    if not own or not plain or own.grows is None or plain.grows is None:
        return "–", None
    words = (
        f"grows by {own.grows:+.1%} against {plain.grows:+.1%}; at the first length {own.above_best:+.1%} "
        f"from the best against {plain.above_best:+.1%}"
    )
    return words, own.is_flat and (own.above_best or 0) - (plain.above_best or 0) <= _BEST


def _listed(names: Sequence[str]) -> str:
    some = ", ".join(names[:_SHOWN]) or "none"
    return some + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


TEXT, LINES = "text", "lines"

TABLE = Table(
    "table",
    "Which encoding keeps its perplexity at 16 times its training length, costs nothing at that length, and "
    "uses the added context?",
    (
        _test(
            TEXT,
            _find(length.EXPERIMENTS, "length"),
            text.PERPLEXITY,
            seeds={"quick": 1, "laptop": 5, "paper": 5},
        ),
        _test(
            LINES, _find(retrieval.EXPERIMENTS, "retrieval-back"), retrieval.RIGHT, retrieval.ALL
        ),
        _test("machines", _find(bi_nfa.EXPERIMENTS, "bi-nfa-total"), bi_nfa.OUTER, bi_nfa.USUAL),
        _test("arithmetic", arithmetic.ARITHMETIC, arithmetic.ANSWER, arithmetic.ALL),
        _test("music", _find(modalities.EXPERIMENTS, "modalities-music"), text.PERPLEXITY),
    ),
    (
        Prediction(
            "No row is all that is searched for: flat to the longest length, within 1 % of the best at the "
            "first, on each set, with a use of the added context.",
            "ours",
            _all_searched,
        ),
        Prediction(
            "The rotations and tables of positions are not flat: RoPE, PoPE, sinusoidal, learned.",
            "the literature on extrapolation",
            _flat(("rope", "pope", "sinusoidal", "learned"), False),
        ),
        Prediction(
            "The biases that fall with the distance are flat: ALiBi, KERPLE's logarithm, FoX, and ALiBi and "
            "FoX of segments.",
            "the literature on extrapolation; of segments: ours",
            _flat(("alibi", "kerple_log", "fox", "bipe_alibi", "bipe_fox"), True),
        ),
        Prediction(
            "Random draws of segments in training make BiPE-RoPE flat, for at most 1 % of perplexity at the "
            "first length.",
            "ours",
            _randomized,
        ),
        Prediction(
            "Windows of segments in every other layer, with offsets alone in the others, are flat.",
            "ours",
            _flat(("bipe_window",), True),
        ),
    ),
)
