"""The change of a score over seeds that measured it before and after: plain numbers in, plain dicts out."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import stats

from gacha import odds

SURE = 0.05


def paired(pairs: Iterable[tuple[float, float]], items: float = math.nan) -> dict[str, Any]:
    """Mean change over `pairs` (before, after; one a seed, those not known left out) with its 95% t interval and p.

    `items_lo`, `items_hi`: what as many other items could have made of the mean change (see `items_error`), a share of
    1 being asked of `items`. One seed has that interval alone. Seeds that all changed by the same amount, as coarse
    scores do, have no scatter to judge by: then it takes the t interval's place, and without items nothing is sure.
    """
    both = np.array(list(pairs), dtype=np.float64).reshape(-1, 2).T
    both = both[:, np.isfinite(both).all(axis=0)]
    n = both.shape[1]
    told: dict[str, Any] = {"n": n} | dict.fromkeys(("before", "after", "change", "lo", "hi", "p"), math.nan)
    told |= {"items_lo": math.nan, "items_hi": math.nan}
    if not n:
        return told
    gains = both[1] - both[0]
    mean, sd = float(gains.mean()), float(gains.std(ddof=1)) if n > 1 else math.nan
    told |= {"before": float(both[0].mean()), "after": float(both[1].mean()), "change": mean}
    if items > 0:
        error = items_error(told["before"], told["after"], items)
        told |= {"items_lo": error.lo, "items_hi": error.hi}
    if sd > 1e-9:
        se = sd / math.sqrt(n)
        half = float(stats.t.isf(0.025, n - 1)) * se
        return told | {"lo": mean - half, "hi": mean + half, "p": float(2 * stats.t.sf(abs(mean) / se, n - 1))}
    if n > 1 and abs(mean) <= 1e-9:
        return told | {"lo": 0.0, "hi": 0.0, "p": 1.0}
    told |= {"lo": told["items_lo"], "hi": told["items_hi"]}
    if n > 1 and items > 0:
        pooled = (told["before"] + told["after"]) / 2
        told["p"] = float(2 * stats.norm.sf(abs(mean) / math.sqrt(2 * pooled * (1 - pooled) / items)))
    return told


def items_error(start: float, end: float, items: float) -> odds.Estimate:
    """The difference of two shares of `items` with Newcombe's interval (1998, method 10: hybrid of Wilson's scores).

    Both shares are of the same items, which only makes it wide. A mean of values in 0..1, as field accuracy is,
    scatters no more than a share.
    """
    z2 = float(stats.norm.isf(0.025)) ** 2

    def wilson(p: float) -> tuple[float, float]:
        middle, half = p + z2 / (2 * items), math.sqrt(z2 * (p * (1 - p) + z2 / (4 * items)) / items)
        return (middle - half) / (1 + z2 / items), (middle + half) / (1 + z2 / items)

    (lo0, hi0), (lo1, hi1) = wilson(start), wilson(end)
    difference = end - start
    return odds.Estimate(
        difference, difference - math.hypot(end - lo1, hi0 - start), difference + math.hypot(hi1 - end, start - lo0)
    )


def word(told: dict[str, Any], p: float, lower_is_better: bool) -> str:
    """gain, harm or no gain; or that it is not known, and why."""
    if not told["n"]:
        return "not measured"
    if math.isnan(p):
        return "one seed: not known" if told["n"] == 1 else "seeds alike: not known"
    if p >= SURE:
        return "no gain"
    return "gain" if (told["change"] < 0) == lower_is_better else "harm"


def share(k: int, n: int) -> dict[str, Any] | None:
    """k of n with the exact (Clopper-Pearson) interval; None of nothing."""
    if not n:
        return None
    p = odds.probability(k, n)
    return {"k": k, "n": n, "p": p.value, "lo": p.lo, "hi": p.hi}
