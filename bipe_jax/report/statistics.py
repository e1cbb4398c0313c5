"""Statistics of differences: resampled documents, intervals over seeds, and corrections for several tests."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special  # scipy.stats takes a second to import, in each command

_RESAMPLES = 1000
_PAIRED_RESAMPLES = 10_000  # for small probabilities
_BATCH = 1 << 22  # numbers that are drawn at a time
LEVEL = 0.95  # of intervals


def _resamples(documents: int, count: int):
    """Yields (some, documents) numbers of documents, drawn with replacement; always the same ones.

    The units are documents since the tokens of one are correlated (Efron & Tibshirani 1993, chapter 6).
    """
    state = np.random.RandomState(0)
    while count:
        some = min(count, max(_BATCH // documents, 1))
        yield state.randint(0, documents, (some, documents))
        count -= some


def bootstrap(totals: np.ndarray, counts: np.ndarray, resamples: int = _RESAMPLES) -> np.ndarray:
    """Resampled ratios sum(totals) / sum(counts), (resamples,), with documents drawn with replacement.

    Args:
      totals, counts: of each document, (n,). The samples depend on n alone: two models, or two lengths,
        get the same ones.
    """
    return np.concatenate(
        [totals[i].sum(axis=1) / counts[i].sum(axis=1) for i in _resamples(len(totals), resamples)]
    )


class Difference(NamedTuple):
    """A difference of two means, its interval, and its two-sided p; None where it cannot be estimated."""

    mean: float
    low: float | None
    high: float | None
    p: float | None

    @property
    def is_certain(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired(
    totals: np.ndarray, counts: np.ndarray, other_totals: np.ndarray, other_counts: np.ndarray
) -> Difference:
    """The difference of two ratios sum(totals) / sum(counts) over the same documents, by paired bootstrap.

    The interval is that of percentiles. p is twice the share of resampled differences on the other side
    of 0, with one more resample on either side (Davison & Hinkley 1997, section 4.2.3).

    Args:
      totals, counts: of each document, (n,). other_totals, other_counts: what they are compared with.
    """
    mean = float(totals.sum() / counts.sum() - other_totals.sum() / other_counts.sum())
    if len(totals) < 2:
        return Difference(mean, None, None, None)
    drawn = bootstrap(totals, counts, _PAIRED_RESAMPLES)
    drawn = drawn - bootstrap(other_totals, other_counts, _PAIRED_RESAMPLES)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    fewer = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(2 * (int(fewer) + 1) / (len(drawn) + 1), 1.0)
    return Difference(mean, float(low), float(high), p)


def mean_of(values: Sequence[float]) -> Difference:
    """The mean of independent values, such as those of seeds, with Student's interval and test of 0."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Difference(mean, None, None, None)
    error = float(np.std(values, ddof=1)) / np.sqrt(len(values))
    reach = float(special.stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * error
    p = 2 * float(special.stdtr(len(values) - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Difference(mean, mean - reach, mean + reach, p)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p of several tests, corrected for their number (Holm 1979); None stays None."""
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected, largest = list(ps), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(p * (len(known) - rank), 1.0))
        corrected[i] = largest
    return corrected


def proportion(successes: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a probability (Wilson 1927), of `count` independent trials."""
    share, z2 = successes / count, float(special.ndtri((1 + LEVEL) / 2)) ** 2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = np.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    return max(float(middle - half), 0.0), min(float(middle + half), 1.0)
