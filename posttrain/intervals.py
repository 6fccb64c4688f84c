"""How sure a held-out score is: intervals over items, spread of repeated sampling, paired comparison of two models.

Items are what is drawn from the task, so they are what every interval is over: answers to one prompt hang together, and
counting each as its own would make a score look surer than it is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.special import gammaln

LEVEL = 0.95
DRAWS = 4000  # of a bootstrap
CELLS = 1 << 22  # counts held at a time by a bootstrap


class Interval(NamedTuple):
    """A score with its 95% interval; `how` it was made: exact (Clopper and Pearson) or bootstrap (over items)."""

    value: float
    low: float
    high: float
    how: str

    def __str__(self) -> str:
        return f"{self.value:.4f}  [{self.low:.4f}, {self.high:.4f}]"


def rate(right: Any) -> Interval:
    """Share of items that are right, with the exact interval of Clopper and Pearson (1934)."""
    k, n = int(np.sum(right)), len(right)
    low, high = stats.binomtest(k, n).proportion_ci(LEVEL, "exact")
    return Interval(k / n, float(low), float(high), "exact")


def over_items(values: Sequence[float], seed: int) -> Interval:
    """Mean of one value in [0, 1] an item, with the percentile bootstrap over items: a cluster bootstrap where a value
    is itself a mean of an item's answers.

    Where all items agree at 0 or 1 a bootstrap would be sure of that; the interval is then the exact one of a share.
    """
    x = np.asarray(values, dtype=float)
    if np.all(x == x[0]) and x[0] in (0.0, 1.0):
        return rate(x == 1.0)
    low, high = np.quantile(bootstrap(x, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(x.mean()), float(low), float(high), "bootstrap")


def bootstrap(x: np.ndarray, seed: int) -> np.ndarray:
    """Means (DRAWS,) of `x` (items,) drawn again with replacement."""
    rng, n = np.random.default_rng(seed), len(x)
    sizes = [len(part) for part in np.array_split(np.empty(DRAWS), max(1, DRAWS * n // CELLS))]
    return np.concatenate([rng.multinomial(n, np.full(n, 1 / n), size=size) @ x / n for size in sizes])


def pass_at_k(samples: int, right: np.ndarray, k: int) -> np.ndarray:
    """Per item, the unbiased estimate that one of k answers is right, where `right` (items,) of `samples` were.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    wrong = samples - np.asarray(right)

    def log_choose(n: Any) -> Any:
        return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)

    enough = wrong >= k
    share = np.exp(log_choose(np.where(enough, wrong, k)) - log_choose(samples))
    return np.where(enough, 1 - share, 1.0)


class Spread(NamedTuple):
    """Where the variance of one answer's exact match comes from (one-way random effects, method of moments).

    within: variance between answers to the same item; between: variance of the items' own rates; rerun_sd: standard
    deviation of the whole set's score when each item is answered once, at random, and then once again.
    """

    within: float
    between: float
    rerun_sd: float


def spread(right: np.ndarray) -> Spread:
    """`right`: booleans (items, samples), at least two of each."""
    items, samples = right.shape
    within = float(right.var(axis=1, ddof=1).mean())
    between = float(right.mean(axis=1).var(ddof=1)) - within / samples
    return Spread(within, max(0.0, between), float(np.sqrt(within / items)))


class Paired(NamedTuple):
    """A first model minus a second on the same items; p is McNemar's exact (two-sided), of exact match alone."""

    difference: float
    low: float
    high: float
    p: float | None = None
    wins: int | None = None
    losses: int | None = None

    def __str__(self) -> str:
        told = f"{self.difference:+.4f}  [{self.low:+.4f}, {self.high:+.4f}]"
        if self.p is None:
            return told
        return f"{told}  right alone {self.wins} : {self.losses}  McNemar p {self.p:.3g}"


def paired(first: Any, second: Any, seed: int) -> Paired:
    """Difference of means with the percentile bootstrap over items, each item with both its values.

    Where no item differs, the interval goes as far either way as the exact one of a share of 0 does.
    """
    x = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if not x.any():
        most = rate(np.zeros(len(x), dtype=bool)).high
        return Paired(0.0, -most, most)
    low, high = np.quantile(bootstrap(x, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Paired(float(x.mean()), float(low), float(high))


def mcnemar(first: Any, second: Any, seed: int) -> Paired:
    """`paired` of right (1) and wrong (0), with McNemar's exact test (1947).

    It asks whether, of the items that one model alone has right, each model has half.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    wins, losses = int((a & ~b).sum()), int((b & ~a).sum())
    p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return paired(a.astype(float), b.astype(float), seed)._replace(p=p, wins=wins, losses=losses)
