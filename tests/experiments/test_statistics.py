"""Intervals and tests of differences, against closed forms, plain loops and SciPy."""

import math

import numpy as np
import pytest
from scipy import stats

from bipe_jax.report import statistics


def closed_form(totals, counts):
    """The standard error of a ratio estimator (Cochran 1977, equation 2.46)."""
    n, ratio = len(totals), totals.sum() / counts.sum()
    return math.sqrt(n / (n - 1) * ((totals - ratio * counts) ** 2).sum()) / counts.sum()


def test_bootstrapped_errors():
    """Near the closed form where that holds, and distributed as a plain loop's."""
    generator = np.random.default_rng(0)
    counts = generator.integers(20, 40, 300).astype(float)
    totals = counts * generator.normal(3, 1, 300)
    found = statistics.bootstrap(totals, counts)
    assert found.shape == (1000,)
    assert found.mean() == pytest.approx(totals.sum() / counts.sum(), abs=0.01)
    assert found.std(ddof=1) == pytest.approx(closed_form(totals, counts), rel=0.08)
    assert (found == statistics.bootstrap(totals, counts)).all()

    plain = []
    for _ in range(3000):
        drawn = [generator.integers(300) for _ in range(300)]
        plain.append(sum(totals[i] for i in drawn) / sum(counts[i] for i in drawn))
    for share in (0.05, 0.5, 0.95):
        spread = closed_form(totals, counts)
        assert abs(np.quantile(found, share) - np.quantile(plain, share)) < 0.2 * spread


def test_a_paired_difference_is_finer_than_its_terms():
    """Documents differ much, and two models little: the interval is that of the differences."""
    generator = np.random.default_rng(1)
    counts = generator.integers(50, 100, 200).astype(float)
    ours = counts * generator.normal(3, 1, 200)
    theirs = ours + counts * generator.normal(0.02, 0.05, 200)
    found = statistics.paired(theirs, counts, ours, counts)
    spread = closed_form(theirs - ours, counts)
    assert found.mean == pytest.approx((theirs - ours).sum() / counts.sum())
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert found.high - found.low < closed_form(ours, counts)
    assert found.p == pytest.approx(2 * stats.norm.sf(found.mean / spread), abs=0.003)
    assert found.is_certain and not statistics.paired(ours, counts, ours, counts).is_certain
    assert statistics.paired(ours, counts, ours, counts).p == 1
    back = statistics.paired(ours, counts, theirs, counts)
    assert (back.mean, back.p) == pytest.approx((-found.mean, found.p))
    assert statistics.paired(ours[:1], counts[:1], theirs[:1], counts[:1])[1:] == (None, None, None)


@pytest.mark.slow
def test_the_p_of_no_difference_is_uniform():
    """Of 400 comparisons of two equal models 5 % are below 0.05, but for chance."""
    generator = np.random.default_rng(2)
    counts = np.full(100, 10.0)
    models = [10 * generator.normal(3, 0.1, (2, 100)) for _ in range(400)]
    ps = [statistics.paired(one, counts, other, counts).p for one, other in models]
    assert 0.02 < np.mean(np.array(ps) < 0.05) < 0.09
    assert 0.4 < np.mean(np.array(ps) < 0.5) < 0.6


def test_means_over_seeds_are_those_of_students_test():
    values = [0.3, 0.1, 0.25, -0.02]
    found = statistics.mean_of(values)
    test = stats.ttest_1samp(values, 0)
    interval = test.confidence_interval(0.95)
    assert found == pytest.approx((np.mean(values), interval.low, interval.high, test.pvalue))
    assert statistics.mean_of([0.3]) == (0.3, None, None, None)
    assert statistics.mean_of([0.0, 0.0]) == (0, 0, 0, 1)


def test_several_tests_are_corrected_as_holm_does():
    ps = [0.01, None, 0.04, 0.03, 0.005]
    assert statistics.holm(ps) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1, 1]
    assert statistics.holm([]) == []


@pytest.mark.parametrize(("right", "count"), [(0, 5), (3, 10), (7, 10), (10, 10), (499, 1000)])
def test_the_interval_of_a_proportion_is_scipys(right, count):
    wanted = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert statistics.proportion(right, count) == pytest.approx((wanted.low, wanted.high))
