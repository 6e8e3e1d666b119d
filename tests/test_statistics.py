"""Intervals and tests against closed forms, known tables and each other."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from phasequant.errors import PhaseQuantError
from phasequant.evaluate.statistics import (
    bootstrap_means,
    compare_answers,
    compare_nll,
    interval,
    mcnemar,
    paired,
    perplexity_interval,
    share,
    standard_error,
    student,
)


@pytest.mark.parametrize("freedom", [1, 2, 3, 8, 9, 12, 30, 100, 2000])
def test_student(freedom):
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=4e-4)


def test_few_values_have_students_interval():
    values = [2.9, 3.9, 4.9, 5.7]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found.method == "student" and found.n == 4
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-4)
    assert found.error == pytest.approx(stats.sem(values))
    single = interval([1.0])
    assert (single.mean, single.error, single.low, single.high) == (1.0, None, None, None)


def test_bootstrap_is_the_distribution_of_all_resamples():
    """Of 5 values every one of the 5^5 resamples can be written down."""
    values = [0.0, 1.0, 3.0, 7.0, 8.0]
    exact = np.array([np.mean(x) for x in product(values, repeat=5)])
    drawn = bootstrap_means(values, 200_000)
    assert drawn.mean() == pytest.approx(exact.mean(), abs=0.02)
    assert drawn.std() == pytest.approx(exact.std(), rel=0.01)
    for q in (0.025, 0.25, 0.75, 0.975):
        assert np.quantile(drawn, q) == pytest.approx(np.quantile(exact, q), abs=0.11)
    assert np.array_equal(bootstrap_means(values, 100), bootstrap_means(values, 100))
    assert not np.array_equal(bootstrap_means(values, 100), bootstrap_means(values, 100, seed=1))


def test_bootstrap_interval_of_normal_values_is_students_and_covers():
    draw = np.random.default_rng(3)
    values = draw.normal(5, 2, 400)
    found = interval(values)
    low, high = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert found.method == "bootstrap"
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    held = sum(
        one.low <= 0 <= one.high for one in (interval(draw.normal(0, 1, 12), resamples=1000) for _ in range(400))
    )
    assert 0.91 < held / 400 < 0.985  # the plain percentile interval of 12 values holds about 0.91


def test_perplexity_interval():
    nll = [3.0, 3.1, 3.2, 3.3]
    found, of_nll = perplexity_interval(nll), interval(nll)
    assert found.mean == pytest.approx(math.exp(3.15))
    assert (found.low, found.high) == pytest.approx((math.exp(of_nll.low), math.exp(of_nll.high)))
    assert found.error == pytest.approx(math.exp(3.15) * standard_error(nll))


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (3, 10), (131, 200), (1, 1)])
def test_share_is_wilsons(right, n):
    found = share(right, n)
    known = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=1e-9)
    answers = [1.0] * right + [0.0] * (n - right)
    assert found.error == (None if n == 1 else pytest.approx(standard_error(answers)))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 15), (9, 16), (10, 10), (700, 900), (60, 2000)])
def test_mcnemar_is_the_binomial_test(b, c):
    ours = [True] * b + [False] * c + [True, False]
    theirs = [False] * b + [True] * c + [True, False]
    found = mcnemar(ours, theirs)
    known = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert found[:2] == (b, c)
    assert found[2] == pytest.approx(known, rel=1e-9, abs=1e-300)


def test_pairing_sees_what_two_intervals_do_not():
    chunks = np.linspace(2, 4, 20)
    ours, theirs = chunks - 0.05 + 0.01 * np.sin(np.arange(20)), chunks
    apart, told = interval(ours), compare_nll(list(ours), list(theirs))
    assert apart.low < theirs.mean() < apart.high
    assert told["verdict"] == "better" and told["high"] < 0
    assert compare_nll(list(theirs), list(ours))["verdict"] == "worse"
    assert compare_nll(list(ours), list(ours))["verdict"] == "undecided"
    assert compare_nll([1.0], [2.0])["verdict"] == "undecided"
    assert paired(ours, theirs).mean == pytest.approx(ours.mean() - theirs.mean())


def test_answers_need_both_interval_and_mcnemar():
    def answers(b: int, c: int, same: int) -> tuple[list[float], list[float]]:
        return [1.0] * b + [0.0] * c + [1.0] * same, [0.0] * b + [1.0] * c + [1.0] * same

    assert compare_answers(*answers(30, 5, 100))["verdict"] == "better"
    assert compare_answers(*answers(5, 30, 100))["verdict"] == "worse"
    assert compare_answers(*answers(5, 30, 100), higher_is_better=False)["verdict"] == "better"
    close = compare_answers(*answers(5, 0, 30))
    assert close["low"] > 0 and close["p"] == pytest.approx(0.0625) and close["verdict"] == "undecided"
    logs = compare_answers([0.5, 0.7] * 10, [0.9, 1.3] * 10, higher_is_better=False)
    assert logs["p"] is None and logs["verdict"] == "better"


def test_what_has_no_interval_is_refused():
    for values in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(PhaseQuantError):
            interval(values)
    with pytest.raises(PhaseQuantError, match="same items"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(PhaseQuantError, match="same questions"):
        mcnemar([True], [])
    with pytest.raises(PhaseQuantError, match="no share"):
        share(3, 2)
