"""The statistics of pulls: plain arrays in, plain numbers out. Notation: n pulls observed, k pulls bought.

Finals that are not finite are refused: whoever calls decides first what a diverged pull counts as.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

CALIBRATED = 400
OUTLIER_Z = 3.5
"""|robust z| from which a pull is an outlier: Iglewicz and Hoaglin 1993's rule for median/MAD scores."""


class Estimate(NamedTuple):
    """A value with its interval."""

    value: float
    lo: float
    hi: float


class BestOf(NamedTuple):
    """The expected best of k pulls: `u` unbiased, `v` Dodge's, `lo`..`hi` the interval of what they estimate.

    `trusted` is False where 2 k > n: the interval then rests on the shape of a tail that n pulls hardly show.
    """

    k: int
    u: float
    v: float
    lo: float
    hi: float
    trusted: bool


class Price(NamedTuple):
    """What a target costs. `p` is the chance that one pull hits, all told; `cost` is the mean cost of a pull.

    `pulls_mean`, `spend_mean`: until the first hit, on average. `pulls`, `spend`: for a hit with the confidence asked.
    All are infinite where no pull can hit.
    """

    p: float
    cost: float
    pulls_mean: float
    spend_mean: float
    pulls: float
    spend: float


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
    # Each weight from the one before it: C(n - i - 1, k - 1) / C(n - i, k - 1) = (n - i - k + 1) / (n - i).
    i = np.arange(1, n)
    return k / n * np.concatenate([[1.0], np.cumprod(np.maximum(n - i - k + 1, 0) / (n - i))])


def v_weights(n: int, k: int) -> np.ndarray:
    """Weights on the n sorted finals of Dodge et al. 2019 (Show Your Work): the mean best of k draws with replacement.

    A V-statistic: it draws one pull several times, so it is pessimistic (Tang et al. 2020), and varies a little less.
    Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"best of {k} cannot be estimated from {n} pulls: k must lie in 1..{n}")
    behind = np.arange(n, -1, -1) / n
    return behind[:-1] ** k - behind[1:] ** k


def influence_se(ordered: np.ndarray, k: int) -> np.ndarray:
    """Standard error of the mean best of k from its influence function; `ordered` is (..., n), best first.

    The estimate is an L-statistic with weight k (1 - u)^(k - 1) at quantile u; its influence function is a sum over the
    gaps between neighbours (Serfling 1980, section 8.1), so that only the gaps near the best end count when k is large.
    """
    n = ordered.shape[-1]
    u = np.arange(1, n) / n
    gaps = k * (1 - u) ** (k - 1) * np.diff(ordered, axis=-1)
    behind = np.zeros(ordered.shape)
    behind[..., :-1] = np.cumsum(gaps[..., ::-1], axis=-1)[..., ::-1]
    return np.sqrt(np.mean(((gaps @ u)[..., None] - behind) ** 2, axis=-1) / n)


@lru_cache(maxsize=2)
def normal_sets(n: int) -> np.ndarray:
    """Sets of n standard normal draws, each sorted: the same for every caller."""
    return np.sort(np.random.default_rng(n).standard_normal((min(20_000, 2_000_000 // n), n)), axis=1)


@lru_cache(maxsize=4096)
def pivot_quantiles(n: int, k: int, level: float) -> tuple[float, float]:
    """Quantiles of (estimate - truth) / influence_se of the best of k, over sets of n normal finals.

    Beyond CALIBRATED finals they are those of as many at the same k / n, on which alone they depend in the limit.
    """
    if n > CALIBRATED:
        return pivot_quantiles(CALIBRATED, max(1, round(k * CALIBRATED / n)), level)
    sets = normal_sets(n)
    u = (np.arange(200_000) + 0.5) / 200_000
    truth = float(np.mean(special.ndtri(u) * k * (1 - u) ** (k - 1)))
    pivots = (sets @ best_of_weights(n, k) - truth) / influence_se(sets, k)
    lo, hi = np.quantile(pivots, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def ks_of(n: int) -> list[int]:
    """Which k to tell: each up to 20, then a quarter more each time, and n itself."""
    ks = list(range(1, min(n, 20) + 1))
    while ks[-1] < n:
        ks.append(min(n, math.ceil(ks[-1] * 1.25)))
    return ks


def best_of_curve(
    values: ArrayLike,
    ks: Sequence[int] | None = None,
    lower_is_better: bool = True,
    level: float = 0.95,
    intervals: bool = True,
) -> list[BestOf]:
    """Expected best of k pulls for each of `ks` (default: `ks_of`), with the interval of the unbiased estimate.

    Calibrating `intervals` takes up to a second for a number of finals not met before; without them they are NaN.

    The interval is a studentised parametric bootstrap: finals are redrawn as normal, and since (estimate - truth) over
    its standard error is free of mean and sd, the redraws do not depend on the finals. It is the t interval for k = 1
    and exact for normal finals at every k. Resampling the finals themselves cannot see beyond the best one and covers
    43% at k = n = 10 (Tang et al. 2020 saw the same). `python tests/gacha/coverage.py` prints what it covers for other
    shapes. Raises ValueError when a k is not in 1..n. The interval of a single pull is NaN.
    """
    finals = finals_of(values)
    n = len(finals)
    sign = 1.0 if lower_is_better else -1.0
    ordered = np.sort(sign * finals)
    told = []
    for k in ks if ks is not None else ks_of(n):
        u, v = float(ordered @ best_of_weights(n, k)), float(ordered @ v_weights(n, k))
        lo = hi = math.nan
        if n > 1 and intervals:
            low, high = pivot_quantiles(n, k, level)
            se = float(influence_se(ordered, k))
            lo, hi = sorted((sign * (u - high * se), sign * (u - low * se)))
        told.append(BestOf(k, sign * u, sign * v, lo, hi, trusted=n > 1 and intervals and 2 * k <= n))
    return told


def best_of(values: ArrayLike, k: int, lower_is_better: bool = True, level: float = 0.95) -> Estimate:
    """Expected best of `k` pulls, unbiased, with the interval of `best_of_curve`. Raises ValueError when k > n."""
    got = best_of_curve(values, [k], lower_is_better, level)[0]
    return Estimate(got.u, got.lo, got.hi)


def probability(count: int, n: int, level: float = 0.95) -> Estimate:
    """Share `count` / `n` with its exact (Clopper-Pearson) interval; the divergence probability of a recipe."""
    lo = float(special.betaincinv(count, n - count + 1, (1 - level) / 2)) if count else 0.0
    hi = float(special.betaincinv(count + 1, n - count, (1 + level) / 2)) if count < n else 1.0
    return Estimate(count / n, lo, hi)


def spread(values: ArrayLike, level: float = 0.95) -> Spread:
    """How finals scatter. The interval of the sd is the chi-square one, exact if finals are normal; NaN for one."""
    finals = finals_of(values)
    n = len(finals)
    sd = lo = hi = math.nan
    if n > 1:
        sd = float(finals.std(ddof=1))
        tails = [2 * special.gammaincinv((n - 1) / 2, p) for p in ((1 + level) / 2, (1 - level) / 2)]
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


def outliers(values: ArrayLike) -> list[int]:
    """Indices of the finals whose robust z is beyond OUTLIER_Z (Iglewicz and Hoaglin 1993)."""
    return [int(i) for i in np.flatnonzero(np.abs(spread(values).z) > OUTLIER_Z)]


def hits_of(values: ArrayLike, target: float, lower_is_better: bool = True) -> int:
    """How many finals are at `target` or better."""
    finals = finals_of(values)
    return int(np.sum(finals <= target if lower_is_better else finals >= target))


def p_hit(hits: int, n: int, k: int, level: float = 0.95) -> Estimate:
    """Probability that at least one of `k` pulls hits, when `hits` of `n` did: 1 - C(n - hits, k) / C(n, k), unbiased.

    The interval is Clopper and Pearson's of a single pull sent through 1 - (1 - p)^k, which is monotone: it covers at
    least what it says. Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"the odds of {k} pulls cannot be estimated from {n} without bias: k must lie in 1..{n}")
    value = 1 - math.comb(n - hits, k) / math.comb(n, k)
    single = probability(hits, n, level)
    lo, hi = (-math.expm1(k * math.log1p(-p)) if p < 1 else 1.0 for p in (single.lo, single.hi))
    return Estimate(value, min(lo, value), max(hi, value))


def p_one_sided(values: ArrayLike, target: float, lower_is_better: bool = True) -> float:
    """One-sample t: how likely a mean this far past `target` is if the true mean only reaches it; NaN for one pull.

    The rule by which modded-nanogpt accepts a record: p < .01 that the mean loss is at most 3.28.
    """
    finals = finals_of(values)
    ahead = (target - finals.mean()) * (1 if lower_is_better else -1)
    if len(finals) < 2:
        return math.nan
    se = finals.std(ddof=1) / math.sqrt(len(finals))
    if se == 0:
        return 0.5 if ahead == 0 else float(ahead < 0)
    return float(stats.t.sf(ahead / se, len(finals) - 1))


def hit_within(budget: float, good: float, cost: float, p_diverge: float, detect: float, false_alarm: float) -> float:
    """Probability of a hit before the money is out; a pull is started while all of it can be paid.

    A pull that nobody stops costs `cost` and hits with probability `good`; one that is stopped costs `detect` x cost.
    Exact: with j pulls run to the end and m stopped before it, the next one is started while j + m detect <= budget /
    cost - 1, and the sum over m is a negative binomial distribution function.
    """
    stopped = p_diverge + (1 - p_diverge) * false_alarm
    p = (1 - stopped) * good
    if p == 0 or budget < cost:
        return 0.0
    left = budget / cost - 1 + 1e-9
    full = np.arange(math.floor(left) + 1)
    most = np.floor((left - full) / detect)
    return float(p / (1 - stopped) * np.sum((1 - good) ** full * stats.nbinom.cdf(most, full + 1, 1 - stopped)))


def price(
    good: float,
    cost: float = 1.0,
    p_diverge: float = 0.0,
    detect: float = 1.0,
    false_alarm: float = 0.0,
    confidence: float = 0.9,
) -> Price:
    """Pulls and money for a target that a share `good` of the finished pulls reaches.

    Of all pulls `p_diverge` diverge, and are stopped after the share `detect` of their cost; `false_alarm` of the
    others are stopped then too. The means are Wald's identity, pulls being geometric; `spend` is the least budget (to a
    thousandth of a pull) for which `hit_within` reaches `confidence`.
    """
    stopped = p_diverge + (1 - p_diverge) * false_alarm
    p, mean_cost = (1 - stopped) * good, cost * (1 - stopped + stopped * detect)
    if p == 0:
        return Price(0.0, mean_cost, *[math.inf] * 4)
    pulls = 1 if p == 1 else max(1, math.ceil(math.log(1 - confidence) / math.log1p(-p) - 1e-12))
    low, high = 0, math.ceil(1000 * pulls)
    while low < high:
        middle = (low + high) // 2
        enough = hit_within(middle / 1000 * cost, good, cost, p_diverge, detect, false_alarm) >= confidence
        low, high = (low, middle) if enough else (middle + 1, high)
    return Price(p, mean_cost, 1 / p, mean_cost / p, pulls, low / 1000 * cost)


def reservation(
    values: ArrayLike,
    cost: float,
    lower_is_better: bool = True,
    diverged: int = 0,
    level: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> Estimate:
    """Stop pulling when you hold `value` or better: where the mean gain of one more pull, E[(r - X)+], is its `cost`.

    Weitzman 1979 (Pandora's rule, with recall). `cost` is a pull's, in units of the value: money per pull over what one
    unit is worth. `diverged` pulls gain nothing. Raises ValueError unless the cost is positive.
    The interval is a studentised parametric bootstrap as in `best_of_curve`, with the cost in units of the finals' sd.
    """
    finals = finals_of(values)
    if not 0 < cost < math.inf:
        raise ValueError(f"cost {cost}: a pull must cost more than nothing, or one would pull for ever")
    n, sign = len(finals), 1.0 if lower_is_better else -1.0
    kept = n / (n + diverged)
    ordered = np.sort(sign * finals)
    value, se = (float(x[0]) for x in stopping_point(ordered[None], cost / kept))
    lo = hi = math.nan
    if n > 1 and (sd := float(ordered.std(ddof=1))) > 0:
        c = cost / kept / sd
        truth = optimize.brentq(
            lambda r: r * special.ndtr(r) + math.exp(-r * r / 2) / math.sqrt(2 * math.pi) - c, -40, c + 1
        )
        # Of many finals the estimate is normal, and so it is of CALIBRATED.
        sets = np.sort(np.random.default_rng(seed).standard_normal((draws, min(n, CALIBRATED))), axis=1)
        redrawn, redrawn_se = stopping_point(sets, c)
        low, high = np.quantile((redrawn - truth) / redrawn_se, [(1 - level) / 2, (1 + level) / 2])
        lo, hi = sorted((sign * (value - float(high) * se), sign * (value - float(low) * se)))
    return Estimate(sign * value, lo, hi)


def stopping_point(ordered: np.ndarray, cost: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the mean of (r - x)+ over each sorted row of `ordered` equals `cost`, and its standard error.

    Between two finals the mean is linear in r, so that with the m best below it r = (n cost + their sum) / m.
    """
    n = ordered.shape[1]
    candidates = (n * cost + np.cumsum(ordered, axis=1)) / np.arange(1, n + 1)
    r = candidates.min(axis=1)
    gains = np.maximum(r[:, None] - ordered, 0)
    return r, gains.std(axis=1) / np.mean(ordered < r[:, None], axis=1) / math.sqrt(n)
