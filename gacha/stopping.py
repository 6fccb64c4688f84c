"""How early a pull's rank is known, and what stopping the others early saves and risks: plain arrays in and out.

`fractions` (P,) are shares of a pull's budget at which it was validated, ascending, the last one 1. `values` (pulls, P)
are what was seen there, NaN from where a pull diverged: it ends there under every schedule, also under none, so that no
schedule is praised for it. The last column holds the finals.

A schedule is judged on pulls that it was not made from. What it saves belongs to the pulls it was measured on: on
public curves one schedule saves half of the compute of one recipe, and nearly none at the same regret of another.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from gacha.odds import Estimate

POINTS = 60
"""Rows of a curve at most: longer ones are thinned."""
REACHED = 0.97
"""Share of the longest pull's budget from which a pull counts as finished."""
STARTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
ETAS = (2, 4)
BRACKETS = ((2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1), (4, 2))
"""Hyperband's eta, and how many brackets there are besides the one that stops nobody."""
CHANCE = 0.05
"""The learned rule stops, where it halves too, whom it gives less than this chance of beating the leader."""
ALONE = ((0.2, 0.005), (0.2, 0.05), (0.4, 0.005), (0.4, 0.05), (0.6, 0.005), (0.6, 0.05))
"""Start and chance where it does not halve."""
ONE_BY_ONE = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2)
"""Chances of beating the best that has finished, for pulls that run one after the other."""
SETS = 400


class Rank(NamedTuple):
    """How well the order of pulls at `fraction` is that of their finals.

    The intervals are by Fisher's z (Bonett and Wright 2000 for Spearman's, Fieller, Hartley and Pearson 1957 for
    Kendall's). `p_best_is_best`: how often, in a random half of the pulls, the leader there ends first.
    """

    fraction: float
    spearman: Estimate
    kendall: Estimate
    p_best_is_best: float


class Outcome(NamedTuple):
    """What a schedule did on held-out pulls: means over random splits, and where 95% of the splits fell.

    `saved`: share of the compute of running every pull to its end (or divergence). `regret`: how far the best pull kept
    is behind the best of all, in units of the value; `regret_sd` in sd of the finals, or of the seeds. `setting`:
    "parallel" pulls are compared with each other as they run, "sequential" ones with the best that has finished before
    them.
    """

    family: str
    parameter: str
    setting: str
    saved: Estimate
    regret: Estimate
    regret_sd: Estimate


class Learned(NamedTuple):
    """The final as a line in the value seen, for each set of training pulls (S) and fraction (P).

    `error` is the sd around the line, of `df` degrees of freedom (S, 1); infinite where too few pulls finished.
    """

    intercept: np.ndarray
    slope: np.ndarray
    error: np.ndarray
    df: np.ndarray


def align(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves (x, value), x in tokens or steps, as `fractions` and `values` on the rows of the longest curve.

    Other curves are interpolated between their own rows; one that ends before REACHED of the longest is NaN from there,
    and one that is not finite somewhere is NaN from there. Raises ValueError when there is no curve with a positive x.
    """
    sorted_curves = []
    for x, y in curves:
        order = np.argsort(np.asarray(x, dtype=np.float64), kind="stable")
        sorted_curves.append((np.asarray(x, dtype=np.float64)[order], np.asarray(y, dtype=np.float64)[order]))
    longest = max((x for x, _ in sorted_curves if len(x)), key=lambda x: (x[-1], len(x)), default=np.zeros(0))
    if not len(longest) or longest[-1] <= 0:
        raise ValueError("no curve has a row beyond its start")
    grid = np.unique(longest[longest > 0])
    if len(grid) > POINTS:
        grid = grid[np.unique(np.linspace(0, len(grid) - 1, POINTS).round().astype(int))]
    values = np.full((len(sorted_curves), len(grid)), np.nan)
    for row, (x, y) in zip(values, sorted_curves, strict=True):
        bad = np.flatnonzero(~np.isfinite(y))
        diverged = len(bad) > 0
        x, y = (x[: bad[0]], y[: bad[0]]) if diverged else (x, y)
        if not len(x):
            continue
        row[:] = np.interp(grid, x, y)
        finished = not diverged and x[-1] >= REACHED * grid[-1]
        row[grid > (grid[-1] if finished else x[-1])] = np.nan
    return grid / grid[-1], values


def rank_known(
    fractions: np.ndarray, values: np.ndarray, lower_is_better: bool = True, level: float = 0.95, seed: int = 0
) -> list[Rank]:
    """How well the order at each fraction but the last is the final one; diverged pulls are last, as equals."""
    loss = np.where(np.isfinite(values), values if lower_is_better else -values, np.inf)
    n = len(loss)
    halves = np.argsort(np.random.default_rng(seed).random((SETS, n)), axis=1)[:, : max(2, n // 2)]
    finals = loss[halves, -1]
    leads = finals == finals.min(axis=1, keepdims=True)
    told = []
    for i, fraction in enumerate(fractions[:-1]):
        leader = loss[halves, i].argmin(axis=1)
        best = float(np.mean(leads[np.arange(SETS), leader]))
        spearman, kendall = (
            float(test(loss[:, i], loss[:, -1]).statistic) if len(set(loss[:, i])) > 1 < len(set(loss[:, -1])) else 0.0
            for test in (stats.spearmanr, stats.kendalltau)
        )
        told.append(
            Rank(
                float(fraction),
                by_fisher(spearman, (1 + spearman**2 / 2) / (n - 3) if n > 3 else math.inf, level),
                by_fisher(kendall, 0.437 / (n - 4) if n > 4 else math.inf, level),
                best,
            )
        )
    return told


def by_fisher(correlation: float, variance: float, level: float) -> Estimate:
    """A correlation with the interval of its inverse hyperbolic tangent, whose variance is given."""
    if not math.isfinite(variance):
        return Estimate(correlation, -1.0, 1.0)
    half = float(stats.norm.isf((1 - level) / 2)) * math.sqrt(variance)
    middle = math.atanh(min(max(correlation, -1 + 1e-12), 1 - 1e-12))
    return Estimate(correlation, math.tanh(middle - half), math.tanh(middle + half))


def learn(train: np.ndarray) -> Learned:
    """What each fraction of finished training pulls (S, n, P; lower is better) says of the final.

    The correlation of value and final is taken to rise with the fraction (isotonic regression over the fractions), is
    shrunk for the number of pulls (adjusted R^2) and never negative: where nothing is known nobody is stopped.
    """
    done = np.isfinite(train).all(axis=2)
    n = done.sum(axis=1)[:, None]
    seen = np.where(done[..., None], train, 0.0)
    mean = seen.sum(axis=1) / np.maximum(n, 1)
    centred = np.where(done[..., None], seen - mean[:, None], 0.0)
    final = centred[..., -1:]
    xx, xy, yy = ((a * b).sum(axis=1) for a, b in ((centred, centred), (centred, final), (final, final)))
    r = np.clip(rising(np.divide(xy, np.sqrt(xx * yy), out=np.zeros_like(xy), where=xx * yy > 0)), 0, 1)
    r2 = np.clip(1 - (1 - r**2) * (n - 1) / np.maximum(n - 2, 1), 0, 1)
    slope = np.sqrt(r2) * np.sqrt(np.divide(yy, xx, out=np.zeros_like(xx), where=xx > 0))
    error = np.sqrt(yy / np.maximum(n - 1, 1) * np.maximum(1 - r2, 1e-6))
    return Learned(mean[:, -1:] - slope * mean, slope, np.where(n >= 3, error, np.inf), np.maximum(n - 2, 1))


def rising(rows: np.ndarray) -> np.ndarray:
    """Each row (S, P) as the closest one that never falls: isotonic regression, by its max-min formula."""
    points = rows.shape[1]
    sums = np.concatenate([np.zeros((len(rows), 1)), np.cumsum(rows, axis=1)], axis=1)
    start, end = np.arange(points)[:, None], np.arange(points)[None, :]
    means = (sums[:, None, 1:] - sums[:, :-1, None]) / np.maximum(end - start + 1, 1)
    means = np.where(start <= end, means, np.inf)
    least = np.minimum.accumulate(means[:, :, ::-1], axis=2)[:, :, ::-1]
    return np.where(start <= end, least, -np.inf).max(axis=1)


def rungs(fractions: np.ndarray, n: int, start: float, eta: int) -> dict[int, int]:
    """Successive halving of `n` pulls: at which column how many go on. At `start`, then at eta times that, and so on.

    Jamieson and Talwalkar 2016; a rung is the first row at or after its fraction.
    """
    found = {}
    while n > 1 and (column := int(np.searchsorted(fractions, start - 1e-9))) < len(fractions) - 1:
        n = max(1, n // eta)
        found[column], start = n, start * eta
    return found


def brackets(n: int, eta: int, most: int) -> list[tuple[int, float]]:
    """Hyperband (Li et al. 2018): pulls and first rung of each bracket, `n` pulls shared as its table shares them.

    Bracket s of `most` + 1 starts at eta^-s of the budget and gets ceil((most + 1) eta^s / (s + 1)) parts.
    """
    parts = np.array([math.ceil((most + 1) * eta**s / (s + 1)) for s in range(most + 1)])
    shares = np.floor(np.cumsum(parts) / parts.sum() * n + 0.5).astype(int)
    return [(int(count), float(eta) ** -s) for s, count in enumerate(np.diff(shares, prepend=0)) if count]


def run_parallel(
    loss: np.ndarray, keep: dict[int, int], learned: Learned | None = None, chance: float = 0.0, start: int = 0
) -> np.ndarray:
    """At which column each of the pulls (S, N, P; inf once diverged) stops; P - 1 where it runs to its end.

    `keep`: how many go on at a column. With `learned` a pull stops too, from column `start` on, where the chance that
    its final beats the leader's falls below `chance`: both are predicted, with independent errors.
    """
    sets, pulls, points = loss.shape
    stopped = np.full((sets, pulls), points - 1)
    behind = -special.stdtrit(learned.df, chance) * math.sqrt(2) if learned else math.inf
    for column in range(points - 1):
        running = stopped == points - 1
        seen = np.where(running, loss[..., column], np.inf)
        drop = np.zeros_like(running)
        if column in keep:
            drop |= seen.argsort(axis=1, kind="stable").argsort(axis=1) >= keep[column]
        if learned and column >= start:
            with np.errstate(invalid="ignore"):
                gap = (seen - seen.min(axis=1, keepdims=True)) * learned.slope[:, column, None]
                drop |= gap > behind * learned.error[:, column, None]
        stopped[drop & running] = column
    return stopped


def run_hyperband(fractions: np.ndarray, loss: np.ndarray, eta: int, most: int) -> np.ndarray:
    """As `run_parallel`: every bracket halves its own pulls, and the best of all brackets is kept."""
    stopped, first = [], 0
    for count, start in brackets(loss.shape[1], eta, most):
        stopped.append(run_parallel(loss[:, first : first + count], rungs(fractions, count, start, eta)))
        first += count
    return np.concatenate(stopped, axis=1)


def run_sequential(loss: np.ndarray, learned: Learned, chance: float) -> np.ndarray:
    """As `run_parallel`, one pull after the other: it stops where it is unlikely to beat the best that has finished."""
    sets, pulls, points = loss.shape
    stopped = np.full((sets, pulls), points - 1)
    best = np.full(sets, np.inf)
    # A new pull's error has that of the line's height in it.
    behind = -special.stdtrit(learned.df, chance) * learned.error * np.sqrt(1 + 1 / (learned.df + 2))
    for pull in range(pulls):
        with np.errstate(invalid="ignore"):
            predicted = learned.intercept + learned.slope * loss[:, pull]
            hopeless = (predicted - best[:, None] > behind)[:, :-1]
        stopped[:, pull] = np.where(hopeless.any(axis=1), hopeless.argmax(axis=1), points - 1)
        best = np.where(stopped[:, pull] == points - 1, np.minimum(best, loss[:, pull, -1]), best)
    return stopped


def judge(fractions: np.ndarray, loss: np.ndarray, stopped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of compute saved, and regret, of each set in which a pull finished.

    Where all that was kept diverged, the worst final counts as what is held.
    """
    alive = np.isfinite(loss)
    # A pull that diverged costs up to the row that showed it.
    life = fractions[np.minimum(alive.sum(axis=2), loss.shape[2] - 1)]
    spent = np.minimum(fractions[stopped], life).sum(axis=1)
    finals = loss[..., -1]
    worst = np.where(alive[..., -1], finals, -np.inf).max(axis=1)
    held = np.where(stopped == loss.shape[2] - 1, finals, np.inf).min(axis=1)
    best = finals.min(axis=1)
    known = np.isfinite(best)
    return (1 - spent / life.sum(axis=1))[known], np.where(np.isfinite(held), held, worst)[known] - best[known]


def frontier(
    fractions: np.ndarray,
    values: np.ndarray,
    lower_is_better: bool = True,
    sd: float | None = None,
    splits: int = 200,
    seed: int = 0,
) -> list[Outcome]:
    """No stopping, halving, Hyperband and the learned rule on held-out pulls: what each saves and what it risks.

    Every split draws half of the pulls to learn from, and judges all schedules on the other half. `sd`: that of seeds,
    for pulls of several recipes; without it that of the finals. Raises ValueError for fewer than 6 pulls, 2 rows or 2
    finished pulls.
    """
    loss = np.where(np.isfinite(values), values if lower_is_better else -values, np.inf)
    loss[~np.logical_and.accumulate(np.isfinite(loss), axis=1)] = np.inf
    n, points = loss.shape
    finals = loss[np.isfinite(loss[:, -1]), -1]
    if n < 6 or points < 2 or len(finals) < 2:
        raise ValueError(
            f"{n} pulls of {points} rows, {len(finals)} of them finished: too few to hold half of them out"
        )
    order = np.argsort(np.random.default_rng(seed).random((splits, n)), axis=1)
    rule, held = learn(loss[order[:, : n // 2]]), loss[order[:, n // 2 :]]
    pulls, unit = held.shape[1], float(finals.std(ddof=1)) if sd is None else sd
    told = []

    def tell(family: str, parameter: str, stopped: np.ndarray, setting: str = "parallel") -> None:
        saved, regret = judge(fractions, held, stopped)
        if len(saved):
            relative = over(regret / unit) if unit > 0 else Estimate(math.nan, math.nan, math.nan)
            told.append(Outcome(family, parameter, setting, over(saved), over(regret), relative))

    tell("none", "", run_parallel(held, {}))
    for eta in ETAS:
        for start in STARTS:
            keep, first = rungs(fractions, pulls, start, eta), int(np.searchsorted(fractions, start - 1e-9))
            tell("halving", f"1 of {eta} from {start:.0%}", run_parallel(held, keep))
            told_of = f"1 of {eta} from {start:.0%}, and chance under {CHANCE:.0%}"
            tell("learned", told_of, run_parallel(held, keep, rule, CHANCE, first))
    for eta, most in BRACKETS:
        tell("hyperband", f"eta {eta}, {most + 1} brackets", run_hyperband(fractions, held, eta, most))
    for start, chance in ALONE:
        first = int(np.searchsorted(fractions, start - 1e-9))
        tell("learned", f"chance under {chance:.1%} from {start:.0%}", run_parallel(held, {}, rule, chance, first))
    for chance in ONE_BY_ONE:
        tell("learned", f"chance under {chance:.1%}", run_sequential(held, rule, chance), "sequential")
    return told


def buys_most(outcomes: Sequence[Outcome], regret_sd: float = 0.1) -> Outcome:
    """The schedule that saves most at a mean regret of at most `regret_sd` sd; stopping nobody is always one.

    It was chosen among dozens on the pulls it is told of: expect a little less of it on others.
    """
    return max((one for one in outcomes if not one.regret_sd.value > regret_sd), key=lambda one: one.saved.value)


def over(found: np.ndarray) -> Estimate:
    """Mean over splits, and where 95% of them fell."""
    lo, hi = np.quantile(found, [0.025, 0.975])
    return Estimate(float(found.mean()), float(lo), float(hi))
