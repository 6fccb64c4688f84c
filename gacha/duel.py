"""Which of two recipes is better, and how sure one can be: plain arrays in, plain numbers out.

A duel is of finals, one number per run; finals that are not finite are refused, as in odds.py. Where runs were scored
on several tasks or examples, `scores` are runs x tasks, higher is better, as in rliable (Agarwal et al. 2021).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from gacha.odds import Estimate, finals_of

ENUMERATED = 20_000
"""Permutation tests enumerate up to so many regroupings, and draw beyond."""
PERMUTATIONS = 9_999
BOOTSTRAPS = 4_000
POWER = 0.8
MOST_SEEDS = 10_000


class Duel(NamedTuple):
    """What the finals of A and B say. `difference` is mean A - mean B; `p_improvement` that a run of A beats one of B.

    `n_needed`: seeds per arm with which a difference as large as the one seen would be found (power .8); None where
    there is none to find. `winner` is "A", "B" or None, by Welch's test; `verdict` says it in three words, `told` in a
    sentence.
    """

    n_a: int
    n_b: int
    difference: Estimate
    welch_p: float
    permutation_p: float
    p_improvement: Estimate
    n_needed: int | None
    winner: str | None
    verdict: str
    told: str


def welch(a: np.ndarray, b: np.ndarray, level: float = 0.95) -> tuple[Estimate, float]:
    """Difference of means with Welch's t interval, and the two-sided p; both NaN where an arm has one run.

    Two arms without any scatter differ surely or not at all: p is 0 or 1.
    """
    difference = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Estimate(difference, math.nan, math.nan), math.nan
    parts = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
    se = math.sqrt(parts.sum())
    if se == 0:
        return Estimate(difference, difference, difference), float(difference == 0)
    df = parts.sum() ** 2 / float(np.sum(parts**2 / [len(a) - 1, len(b) - 1]))
    half = float(stats.t.isf((1 - level) / 2, df)) * se
    return Estimate(difference, difference - half, difference + half), float(2 * stats.t.sf(abs(difference) / se, df))


def permutation_p(a: np.ndarray, b: np.ndarray, seed: int = 0) -> float:
    """Two-sided permutation test of Welch's t: the share of regroupings in which it is at least as far from 0.

    Studentised, so that it holds for means also where the arms scatter differently (Janssen 1997); of the difference of
    means where an arm has one run. Exact by enumeration up to ENUMERATED regroupings; beyond, PERMUTATIONS draws and
    the data themselves (Phipson and Smyth 2010), so that it is never 0.
    """
    pooled = np.concatenate([a, b]) - np.concatenate([a, b]).mean()
    n, all_n = len(a), len(a) + len(b)
    # The first arm's sums say all: the centred values sum to 0, and their squares to the same in every regrouping.
    squares = float(np.sum(pooled**2))

    def distance(arm: np.ndarray) -> np.ndarray:
        gap, m = np.abs(arm.sum(axis=-1)) * all_n / (n * (all_n - n)), all_n - n
        if min(n, m) < 2:
            return gap
        sums, own = arm.sum(axis=-1), np.sum(arm**2, axis=-1)
        variance = (own - sums**2 / n) / (n * (n - 1)) + (squares - own - sums**2 / m) / (m * (m - 1))
        return gap / np.sqrt(np.maximum(variance, 1e-30 * squares + 1e-300))

    seen = float(distance(pooled[:n])) * (1 - 1e-9)
    if math.comb(all_n, n) <= ENUMERATED:
        return float(np.mean(distance(pooled[np.array(list(itertools.combinations(range(all_n), n)))]) >= seen))
    rng, as_far = np.random.default_rng(seed), 1
    for _ in range(PERMUTATIONS):
        as_far += bool(distance(rng.permutation(pooled)[:n]) >= seen)
    return as_far / (PERMUTATIONS + 1)


def p_better(a: np.ndarray, b: np.ndarray, lower_is_better: bool, level: float = 0.95) -> Estimate:
    """Probability that a run of A beats a run of B, ties half: Mann and Whitney's U / (n m).

    The interval is Newcombe's fifth (2006, part 2): where the estimate is z standard errors off, the error being that
    of the value itself. It covers 93 to 97% from 5 runs an arm on, where a bootstrap over runs covers 89 to 99%, and it
    is not empty where every run of one arm beats every run of the other.
    """
    n, m, sign = len(a), len(b), 1.0 if lower_is_better else -1.0
    gaps = sign * (b[None, :] - a[:, None])
    value = float(np.mean((gaps > 0) + 0.5 * (gaps == 0)))
    z2, others = float(stats.norm.isf((1 - level) / 2)) ** 2, (n + m) / 2 - 1

    def beyond(p: float) -> float:
        wider = 1 + others * (1 - p) / (2 - p) + others * p / (1 + p)
        return (value - p) ** 2 - z2 * p * (1 - p) * wider / (n * m)

    lo = optimize.brentq(beyond, 0.0, value * (1 - 1e-9)) if value > 0 else 0.0
    hi = optimize.brentq(beyond, value + (1 - value) * 1e-9, 1.0) if value < 1 else 1.0
    return Estimate(value, lo, hi)


def n_needed(difference: float, sd: float, alpha: float = 0.05, power: float = POWER) -> int | None:
    """Seeds per arm for `difference` with `power` at two-sided `alpha`: 2 (z + z)^2 sd^2 / difference^2, at least 2.

    None where there is no difference, or where it would take more than MOST_SEEDS.
    """
    if difference == 0 or not math.isfinite(sd):
        return None
    z = float(stats.norm.isf(alpha / 2) + stats.norm.ppf(power))
    n = 2 * (z * sd / difference) ** 2
    return max(2, math.ceil(n)) if n <= MOST_SEEDS else None


def duel(
    a: ArrayLike,
    b: ArrayLike,
    lower_is_better: bool = True,
    names: tuple[str, str] = ("A", "B"),
    level: float = 0.95,
    seed: int = 0,
) -> Duel:
    """Recipe A against recipe B. Deterministic for a seed. Raises ValueError where an arm is empty or not finite."""
    first, second = finals_of(a), finals_of(b)
    difference, p = welch(first, second, level)
    spread = math.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2) if min(len(first), len(second)) > 1 else math.nan
    needed = n_needed(difference.value, spread, 1 - level)
    winner = None
    if p < 1 - level:
        winner = "A" if (difference.value < 0) == lower_is_better else "B"
    verdict = "no evidence" if winner is None else f"{names[winner == 'B']} is better"
    told = sentence(first, second, names, difference, p, needed, winner)
    better = p_better(first, second, lower_is_better, level)
    return Duel(
        len(first),
        len(second),
        difference,
        p,
        permutation_p(first, second, seed),
        better,
        needed,
        winner,
        verdict,
        told,
    )


def sentence(
    a: np.ndarray,
    b: np.ndarray,
    names: tuple[str, str],
    difference: Estimate,
    p: float,
    needed: int | None,
    winner: str | None,
) -> str:
    """The verdict in plain words, with how many seeds would settle what was seen."""
    gap = f"means {a.mean():.6g} and {b.mean():.6g}, {len(a)} and {len(b)} seeds"
    if winner:
        return f"{names[winner == 'B']} is better than {names[winner == 'A']}: {gap}, p = {p:.2g} (Welch)"
    if math.isnan(p):
        return f"no evidence for either: {gap}; one seed has no scatter, and a duel needs two on each side"
    if difference.value == 0:
        return f"no evidence for either: {gap}; there is no difference to settle"
    more = f"about {needed} seeds each" if needed else f"more than {MOST_SEEDS:,} seeds each"
    return f"no evidence for either: {gap}, p = {p:.2g} (Welch); a difference this large would take {more} to settle"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm 1979: p-values corrected for how many there are, in the order given; NaN stays and does not count."""
    corrected = [math.nan] * len(p_values)
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        corrected[i] = highest
    return corrected


def iqm(scores: ArrayLike) -> float:
    """Interquartile mean over all runs and tasks: the mean without the best and the worst quarter (rliable)."""
    return float(stats.trim_mean(np.asarray(scores, dtype=np.float64), proportiontocut=0.25, axis=None))


def iqm_interval(scores: ArrayLike, level: float = 0.95, seed: int = 0) -> Estimate:
    """`iqm` of runs x tasks with the percentile interval of rliable's stratified bootstrap: runs within each task."""
    table = np.asarray(scores, dtype=np.float64)
    draws = table[
        np.random.default_rng(seed).integers(len(table), size=(BOOTSTRAPS, *table.shape)), np.arange(table.shape[1])
    ]
    means = stats.trim_mean(draws.reshape(BOOTSTRAPS, -1), proportiontocut=0.25, axis=1)
    lo, hi = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(iqm(table), float(lo), float(hi))


def profile(scores: ArrayLike, taus: Sequence[float], level: float = 0.95, seed: int = 0) -> list[Estimate]:
    """Performance profile: share of runs x tasks above each of `taus`, by the same stratified bootstrap (rliable)."""
    table = np.asarray(scores, dtype=np.float64)
    above = table[..., None] > np.asarray(taus, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # Resampling the runs of a task makes its count above a threshold binomial, the same draws at every threshold.
    picked = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), size=(BOOTSTRAPS, table.shape[1]))
    shares = np.einsum("btr,rtk->bk", picked, above.astype(np.float64)) / table.size
    ends = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Estimate(float(np.mean(above[..., i])), float(ends[0, i]), float(ends[1, i])) for i in range(len(taus))]


def improvement(x: ArrayLike, y: ArrayLike, level: float = 0.95, seed: int = 0) -> Estimate:
    """P(a run of X scores higher than a run of Y), ties half, averaged over tasks (rliable), by stratified bootstrap.

    `x`, `y`: runs x tasks, of the same tasks; the numbers of runs may differ.
    """
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    gaps = first[:, None, :] - second[None, :, :]
    wins = (gaps > 0) + 0.5 * (gaps == 0)
    rng, tasks = np.random.default_rng(seed), first.shape[1]
    of_x, of_y = (
        rng.multinomial(len(arm), np.full(len(arm), 1 / len(arm)), size=(BOOTSTRAPS, tasks)) / len(arm)
        for arm in (first, second)
    )
    draws = np.einsum("bti,ijt,btj->b", of_x, wins, of_y, optimize=True) / tasks
    lo, hi = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(wins.mean()), float(lo), float(hi))


def multibootstrap(
    a: ArrayLike, b: ArrayLike, paired: bool = False, level: float = 0.95, seed: int = 0
) -> tuple[Estimate, float]:
    """Mean score of B less that of A over seeds x examples, and the one-sided p that it is not above 0.

    Sellam et al. 2022 (MultiBERTs): seeds and examples are both resampled, examples jointly for the two arms; `paired`
    also draws the same seeds for both, for arms that start from the same checkpoints. Raises ValueError where shapes
    do not allow it.
    """
    base, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if base.shape[1] != other.shape[1] or (paired and base.shape != other.shape):
        raise ValueError(f"arms of {base.shape} and {other.shape}: the same examples, and paired the same seeds")
    rng, examples = np.random.default_rng(seed), base.shape[1]
    of_a = rng.multinomial(len(base), np.full(len(base), 1 / len(base)), size=BOOTSTRAPS) / len(base)
    of_b = of_a if paired else rng.multinomial(len(other), np.full(len(other), 1 / len(other)), BOOTSTRAPS) / len(other)
    picked = rng.multinomial(examples, np.full(examples, 1 / examples), size=BOOTSTRAPS) / examples
    draws = np.sum((of_b @ other - of_a @ base) * picked, axis=1)
    lo, hi = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    p = max(float(np.mean(draws <= 0)), 1 / BOOTSTRAPS)
    return Estimate(float(other.mean() - base.mean()), float(lo), float(hi)), p
