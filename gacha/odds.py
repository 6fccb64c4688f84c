"""The statistics of pulls: plain arrays in, plain numbers out. Notation: n pulls observed, k pulls bought.

Finals that are not finite are refused: whoever calls decides first what a diverged pull counts as.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

BOOTSTRAPS = 10_000
OUTLIER_Z = 3.5
"""|robust z| from which a pull is an outlier: Iglewicz and Hoaglin 1993's rule for median/MAD scores."""


class Estimate(NamedTuple):
    """A value with its interval."""

    value: float
    lo: float
    hi: float


class Spread(NamedTuple):
    """How finals scatter over seeds. `sd` is the n - 1 one; `sd_lo`, `sd_hi` its 95% interval if they are normal."""

    n: int
    mean: float
    sd: float
    sd_lo: float
    sd_hi: float
    low: float
    high: float
    median: float
    z: np.ndarray
    """Robust z of each final, (x - median) / (1.4826 MAD), in the order given; 0 where the MAD is 0."""


def finals_of(values: ArrayLike) -> np.ndarray:
    """`values` as a 1-D float64 array. Raises ValueError when there are none or one is not finite."""
    finals = np.asarray(values, dtype=np.float64).ravel()
    if not len(finals):
        raise ValueError("no finals given")
    if not np.isfinite(finals).all():
        raise ValueError("a final is not finite: leave diverged pulls out, or count them by p_diverge")
    return finals


def best_of_weights(n: int, k: int) -> np.ndarray:
    """Weights on the n sorted finals (best first) whose sum is the mean best of all C(n, k) subsets of size k.

    The U-statistic: the i-th best is a subset's best when the k - 1 others come from the n - i behind it.
    Raises ValueError unless 1 <= k <= n: beyond n nothing unbiased exists.
    """
    if not 1 <= k <= n:
        raise ValueError(f"best of {k} cannot be estimated from {n} pulls: k must lie in 1..{n}")
    total = math.comb(n, k)
    return np.array([math.comb(n - i, k - 1) / total for i in range(1, n + 1)])


def best_of(
    values: ArrayLike,
    k: int,
    lower_is_better: bool = True,
    level: float = 0.95,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
) -> Estimate:
    """Expected best of `k` pulls, unbiased, with the percentile interval of a bootstrap over runs.

    The interval resamples the n finals themselves, so it never reaches beyond the best one seen and is too narrow
    for k near a small n; say n beside it. Raises ValueError when k > n.
    """
    finals = finals_of(values)
    n = len(finals)
    weights = best_of_weights(n, k)
    sign = 1.0 if lower_is_better else -1.0
    value = float(np.sort(sign * finals) @ weights)
    draws = np.random.default_rng(seed).integers(n, size=(bootstraps, n))
    lo, hi = np.quantile(np.sort(sign * finals[draws], axis=1) @ weights, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(sign * value, *sorted((float(sign * lo), float(sign * hi))))


def probability(count: int, n: int, level: float = 0.95) -> Estimate:
    """Share `count` / `n` with its exact (Clopper-Pearson) interval; the divergence probability of a recipe."""
    test = stats.binomtest(count, n)
    interval = test.proportion_ci(confidence_level=level, method="exact")
    return Estimate(count / n, float(interval.low), float(interval.high))


def spread(values: ArrayLike, level: float = 0.95) -> Spread:
    """How finals scatter. The interval of the sd is the chi-square one, exact if finals are normal; NaN for one."""
    finals = finals_of(values)
    n = len(finals)
    sd = lo = hi = math.nan
    if n > 1:
        sd = float(finals.std(ddof=1))
        tails = stats.chi2.ppf([(1 + level) / 2, (1 - level) / 2], n - 1)
        lo, hi = (float(sd * math.sqrt((n - 1) / tail)) for tail in tails)
    median = float(np.median(finals))
    mad = float(np.median(np.abs(finals - median)))
    z = (finals - median) / (1.4826 * mad) if mad > 0 else np.zeros(n)
    return Spread(n, float(finals.mean()), sd, lo, hi, float(finals.min()), float(finals.max()), median, z)


def lead(values: ArrayLike, lower_is_better: bool = True, draws: int = 20_000, seed: int = 0) -> tuple[float, float]:
    """The best final's lead over the second best in units of the finals' sd, and how ordinary such a lead is.

    The second number is the share of sets of n normal draws whose best leads by at least that much: near 1 the best
    pull is one of the crowd, near 0 it stands out. Raises ValueError for fewer than three finals.
    """
    finals = finals_of(values)
    if len(finals) < 3:
        raise ValueError("a lead needs three finals: with two it is always the same number of sd")

    def leads(sets: np.ndarray) -> np.ndarray:
        ordered = np.sort(sets, axis=1)
        sd = ordered.std(axis=1, ddof=1)
        gap = ordered[:, 1] - ordered[:, 0]
        return np.divide(gap, sd, out=np.zeros_like(gap), where=sd > 0)

    ours = float(leads((finals if lower_is_better else -finals)[None])[0])
    chance = leads(np.random.default_rng(seed).standard_normal((draws, len(finals))))
    return ours, float((chance >= ours).mean())
