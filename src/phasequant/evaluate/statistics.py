r"""Whether a difference is more than chance: 95 % intervals of means, paired by chunk or by question.

    interval of a mean      n ≥ 10   bootstrap: the mean of n values drawn with replacement, 10,000 times (fixed seed);
                                     its quantiles at α' and 1 − α', where Φ(−α'-quantile) makes the normal interval as
                                     wide as Student's: z' = t·√(n/(n−1)) (Hesterberg 2014, "expanded percentile")
                            n < 10   mean ± t·s/√n: resampling cannot reach beyond the few values that there are
                            n = 1    none
    perplexity              the interval of the mean nll over chunks, through exp
    a share of n            Wilson: (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n), which holds near 0 and 1 too
    two models, same items  the interval of the mean of the differences, item by item
    right and wrong answers McNemar, exact: of the b + c questions that one alone got right, how likely is a split at
                            least as uneven as b : c by tossing coins?  p = min(1, 2·Σ_{k ≤ min(b,c)} C(b+c, k)/2^{b+c})

Chunks of one text are not independent draws of all text: an interval speaks of this text and chunks like these.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from phasequant.errors import PhaseQuantError

RESAMPLES, SEED = 10_000, 0
FEW = 10
Z = NormalDist().inv_cdf(0.975)
T975 = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600)  # Student's, 1 to 8 degrees of freedom
AT_ONCE = 4_000_000  # values drawn at a time

Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values, its standard error, and its 95 % interval; a single value has neither. `method`: how the
    interval was found (bootstrap, student, wilson)."""

    mean: float
    error: float | None
    low: float | None
    high: float | None
    n: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: tabled; beyond 8 degrees of freedom by Abramowitz and Stegun's expansion
    26.7.5 (right to 3e-4)."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    z, v = Z, float(freedom)
    terms = (
        (z**3 + z) / 4 / v,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96 / v**2,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / v**3,
    )
    return z + sum(terms)


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise PhaseQuantError("an interval needs at least one value")
    if not np.isfinite(found).all():
        raise PhaseQuantError("an interval of NaN or infinite values does not exist: measure again")
    return found


def standard_error(values: Sequence[float]) -> float | None:
    """s/√n of a mean; None of a single value."""
    found = _finite(values)
    return float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else None


def bootstrap_means(values: Sequence[float], resamples: int = RESAMPLES, seed: int = SEED) -> NDArray[np.float64]:
    """Means of as many values drawn with replacement; the same from run to run."""
    found = _finite(values)
    draw = np.random.default_rng(seed)
    rows = max(1, AT_ONCE // len(found))
    means = [
        found[draw.integers(0, len(found), (min(rows, resamples - start), len(found)))].mean(1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(means)


def interval(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """The mean of values and its 95 % interval."""
    found = _finite(values)
    n, mean, error = len(found), float(found.mean()), standard_error(values)
    if error is None:
        return Interval(mean, None, None, None, n, "none")
    if n < FEW:
        half = student(n - 1) * error
        return Interval(mean, error, mean - half, mean + half, n, "student")
    tail = NormalDist().cdf(-student(n - 1) * math.sqrt(n / (n - 1)))
    low, high = np.quantile(bootstrap_means(values, resamples, seed), (tail, 1 - tail))
    return Interval(mean, error, float(low), float(high), n, "bootstrap")


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The mean of ours − theirs, item by item: both were measured on the same items, in the same order."""
    if len(ours) != len(theirs):
        raise PhaseQuantError(f"paired values are of the same items: there are {len(ours)} and {len(theirs)}")
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def perplexity_interval(nll: Sequence[float]) -> Interval:
    """Perplexity and its interval from the mean nll of each chunk; the error is ppl·s/√n (delta method)."""
    found = interval(nll)
    ppl, low, high = (None if x is None else _exp(x) for x in (found.mean, found.low, found.high))
    assert ppl is not None
    error = None if found.error is None else ppl * found.error
    return Interval(ppl, error, low, high, found.n, found.method)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def share(right: int, n: int) -> Interval:
    """A share of n questions with Wilson's interval; the error is √(p(1−p)/(n−1)), the harness's."""
    if not 0 <= right <= n or n < 1:
        raise PhaseQuantError(f"{right} of {n} is no share")
    p = right / n
    middle, room = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    below = 1 + Z**2 / n
    error = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
    low, high = max(0.0, (middle - room) / below), min(1.0, (middle + room) / below)
    return Interval(p, error, low, high, n, "wilson")


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[int, int, float]:
    """(questions that only we got right, that only they did, the exact two-sided p)."""
    if len(ours) != len(theirs):
        raise PhaseQuantError(f"paired answers are to the same questions: there are {len(ours)} and {len(theirs)}")
    b = sum(bool(x) and not y for x, y in zip(ours, theirs, strict=True))
    c = sum(bool(y) and not x for x, y in zip(ours, theirs, strict=True))
    term = total = 1  # C(n, 0), in whole numbers
    for k in range(min(b, c)):
        term = term * (b + c - k) // (k + 1)
        total += term
    return b, c, min(1.0, 2 * total / 2 ** (b + c)) if b + c < 1000 else min(1.0, float(_ratio(2 * total, b + c)))


def _ratio(total: int, power: int) -> float:
    """total / 2^power where both are too large for floats."""
    cut = max(0, total.bit_length() - 60)
    return math.ldexp(total >> cut, cut - power)


def verdict(difference: Interval, *, higher_is_better: bool) -> Verdict:
    """`undecided` where the interval holds zero, or there is none."""
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return "undecided"
    return "better" if (difference.low > 0) == higher_is_better else "worse"


def compare_nll(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ours against theirs, nats a token, paired by chunk: the interval's keys and the verdict (less is better)."""
    found = paired(ours, theirs)
    return {**found.to_dict(), "verdict": verdict(found, higher_is_better=False)}


def compare_answers(ours: Sequence[float], theirs: Sequence[float], *, higher_is_better: bool = True) -> dict[str, Any]:
    """Ours against theirs, paired by question. Of right and wrong answers (0 and 1) McNemar's p is there too, and a
    verdict needs both: an interval without zero, and p < 0.05."""
    found = paired(ours, theirs)
    says = verdict(found, higher_is_better=higher_is_better)
    told: dict[str, Any] = {**found.to_dict(), "only_ours": None, "only_theirs": None, "p": None}
    if {*ours, *theirs} <= {0.0, 1.0}:
        b, c, p = mcnemar([x == 1 for x in ours], [x == 1 for x in theirs])
        told |= {"only_ours": b, "only_theirs": c, "p": p}
        says = says if p < 0.05 else "undecided"
    return {**told, "verdict": says}
