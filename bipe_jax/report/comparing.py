"""Whether evaluations can be set side by side, and how they differ.

Perplexities compare if they are of the same targets, by the same protocol and tokenizer. With another
tokenizer the same documents can be compared in bits per byte.

What is compared are groups: a run, or runs that differ in their seeds alone. Runs are paired by document, and
groups of several seeds by seed, so that what all have in common does not widen the intervals.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bipe_jax.errors import UserError
from bipe_jax.report import statistics
from bipe_jax.report.results import Evaluation, Perplexity, Targets
from bipe_jax.report.statistics import Difference


class Measure(NamedTuple):
    """What evaluations are compared by.

    Attributes:
      name: of the value. field, error: of `results.Perplexity`.
      unit: of losses and their differences.
      form: of the value as text.
    """

    name: str
    field: str
    error: str
    unit: str
    form: str

    def loss(self, row: Perplexity) -> float | None:
        """The loss in the unit."""
        if self is BITS:
            return row.bits_per_byte
        return math.log(row.perplexity) if row.perplexity > 0 else None

    def plus_minus(self, value: float | None, error: float | None) -> str:
        return f"{number(value, self.form)} ± {number(error, self.form)}"


PERPLEXITY = Measure("perplexity", "perplexity", "perplexity_error", "nats a token", ",.2f")
BITS = Measure("bits/byte", "bits_per_byte", "bits_per_byte_error", "bits a byte", ",.4f")


class Value(NamedTuple):
    """A value of a group at one length.

    Attributes:
      value: of the measure. error: a run's standard error over documents; of several seeds half of the
        95 % interval of their mean; None where there is none.
      each: the values of the runs.
    """

    value: float
    error: float | None
    each: tuple[float, ...]


class Group(NamedTuple):
    """Runs that differ in their seeds alone, by seed; a run by itself has any key."""

    name: str
    runs: Mapping[str, Evaluation]

    @property
    def first(self) -> Evaluation:
        """One of the runs, for what they have in common."""
        return next(iter(self.runs.values()))

    def lengths(self, of_set: str) -> list[int]:
        """The lengths at which all runs were evaluated."""
        of_runs = [
            {r.length for r in evaluation.results if r.set == of_set}
            for evaluation in self.runs.values()
        ]
        return sorted(set.intersection(*of_runs))

    def value(self, of_set: str, length: int, by: Measure) -> Value | None:
        """The value of a set at a length; None where a run was not evaluated."""
        rows = [evaluation.row(of_set, length) for evaluation in self.runs.values()]
        known = [row for row in rows if row and getattr(row, by.field) is not None]
        if not known or len(known) < len(rows):
            return None
        each = tuple(getattr(row, by.field) for row in known)
        if len(known) == 1:
            return Value(each[0], getattr(known[0], by.error), each)
        losses = [loss for row in known if (loss := by.loss(row)) is not None]
        if len(losses) < len(known) or not all(map(math.isfinite, losses)):
            return Value(math.inf, None, each)
        mean, _, high, _ = statistics.mean_of(losses)
        half = 0.0 if high is None else high - mean
        if by is BITS:
            return Value(mean, half, each)
        return Value(math.exp(mean), math.exp(mean) * half, each)


def alone(evaluations: Sequence[tuple[str, Evaluation]]) -> list[Group]:
    """Each named run as a group by itself."""
    return [Group(name, {"": evaluation}) for name, evaluation in evaluations]


def number(value: float | None, form: str) -> str:
    """A value as text: "–" for none, "∞" for what is not finite."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{form}}" if math.isfinite(value) else "∞"


def measure(groups: Sequence[Group]) -> Measure:
    """What groups can be compared by.

    Raises:
      UserError: two runs scored other targets of a set, or one does not say which.
    """
    chosen = PERPLEXITY
    runs = [(group.name, evaluation) for group in groups for evaluation in group.runs.values()]
    for (name, one), (other_name, other) in itertools.combinations(runs, 2):
        for of_set in sorted(one.sets & other.sets):
            ours, theirs = one.targets_of(of_set), other.targets_of(of_set)
            for run, targets in ((name, ours), (other_name, theirs)):
                if targets is None:
                    raise UserError(
                        f"{run}: evaluation.json does not say which tokens of {of_set!r} were scored, as "
                        "those of earlier versions do not: evaluate it again"
                    )
            if why := _other_targets(one, other, ours, theirs):
                raise UserError(
                    f"{name} and {other_name} scored other targets of {of_set!r} ({why}): evaluate both with "
                    "the same --data, --context, --tokens and --protocol"
                )
            if one.tokenizer != other.tokenizer:
                chosen = BITS
    return chosen


def _other_targets(
    one: Evaluation, other: Evaluation, ours: Targets | None, theirs: Targets | None
) -> str:
    """In what two evaluations of a set cannot be compared; "" if they can."""
    assert ours and theirs
    if ours.collection != theirs.collection:
        return "other documents"
    for name in ("protocol", "context"):
        if (a := getattr(one, name)) != (b := getattr(other, name)):
            return f"{name} {a} and {b}"
    if one.tokenizer == other.tokenizer and ours.targets != theirs.targets:
        return f"{sum(ours.tokens):,} and {sum(theirs.tokens):,} tokens"
    return ""


def difference(
    one: Group, other: Group, of_set: str, length: int, by: Measure
) -> Difference | None:
    """The loss of one group minus that of the other, in the measure's unit.

    With several seeds in common it is Student's, over the differences of each seed; else it is paired by
    document. None if either was not evaluated there.
    """
    seeds = [seed for seed in one.runs if seed in other.runs]
    pairs = [(one.runs[seed], other.runs[seed]) for seed in seeds] or [(one.first, other.first)]
    if len(pairs) == 1:
        return _of_documents(*pairs[0], of_set, length, by)
    differences = []
    for ours, theirs in pairs:
        rows = ours.row(of_set, length), theirs.row(of_set, length)
        losses = [loss for row in rows if row and (loss := by.loss(row)) is not None]
        if len(losses) < len(rows):
            return None
        differences.append(losses[0] - losses[1])
    return statistics.mean_of(differences)


def _of_documents(
    one: Evaluation, other: Evaluation, of_set: str, length: int, by: Measure
) -> Difference | None:
    """The difference over the documents of both."""
    ours, theirs = (_sums(evaluation, of_set, length, by) for evaluation in (one, other))
    common = [document for document in ours if document in theirs]
    if not common:
        return None
    columns = np.array([[*ours[document], *theirs[document]] for document in common]).T
    return statistics.paired(columns[0], columns[1], columns[2], columns[3])


def _sums(evaluation: Evaluation, of_set: str, length: int, by: Measure) -> dict:
    """Document -> (its loss, its number of tokens or bytes), in the measure's units."""
    row, targets = evaluation.row(of_set, length), evaluation.targets_of(of_set)
    if row is None or targets is None or not row.document_losses:
        return {}
    if by is BITS:
        losses, counts = [loss / math.log(2) for loss in row.document_losses], targets.bytes
    else:
        losses, counts = row.document_losses, targets.tokens
    return dict(zip(targets.documents, zip(losses, counts, strict=True), strict=True))


def unbeaten(groups: Sequence[Group], of_set: str, length: int, by: Measure) -> set[str]:
    """The names of the groups that none beats: the best, and those whose difference to it may be 0."""
    values = {g.name: v.value for g in groups if (v := g.value(of_set, length, by))}
    if not values:
        return set()
    best = min(values, key=lambda name: values[name])
    of = {group.name: group for group in groups}

    def may_be_best(name: str) -> bool:
        if values[name] == values[best]:
            return True
        to_best = difference(of[name], of[best], of_set, length, by)
        return to_best is not None and to_best.low is not None and not to_best.is_certain

    return {name for name in values if may_be_best(name)}


@dataclasses.dataclass(frozen=True)
class Compared:
    """A group against the baseline. p is corrected for all comparisons of the table (Holm)."""

    name: str
    set: str
    length: int
    difference: Difference
    p: float | None

    def cells(self) -> tuple[str, ...]:
        """As text: the name, the set, the length, the difference, its interval, and p."""
        mean, low, high, _ = self.difference
        interval = "–" if low is None else f"{low:+.4f} … {high:+.4f}"
        p = number(self.p, ".4f")
        return self.name, self.set, f"{self.length:,}", f"{mean:+.4f}", interval, p


def heads(by: Measure) -> tuple[str, ...]:
    """The heads of `Compared.cells`."""
    return "run", "data set", "length", f"difference ({by.unit})", "95 %", "p"


def against(groups: Sequence[Group], baseline: str, by: Measure) -> list[Compared]:
    """The differences of all other groups to a baseline, at each set and length of both.

    Raises:
      UserError: there is no such group.
    """
    of = {group.name: group for group in groups}
    if baseline not in of:
        raise UserError(
            f"--baseline={baseline} is none of what is compared: use one of {', '.join(of) or 'none'}"
        )
    pairs = [
        (group.name, of_set, length, of_pair)
        for group in groups
        if group.name != baseline
        for of_set in dict.fromkeys(row.set for row in group.first.results)
        for length in group.lengths(of_set)
        if (of_pair := difference(group, of[baseline], of_set, length, by))
    ]
    corrected = statistics.holm([of_pair.p for *_, of_pair in pairs])
    return [Compared(*each, p) for each, p in zip(pairs, corrected, strict=True)]
