"""A run among its siblings: the bad batches that all of them met, and the run that fails without a spike.

Siblings are runs whose losses may be compared step by step: other seeds of a recipe, or other recipes on the same data
order. Two questions, both asked after the fact and of the training loss alone:

- `bad_batches`: is a spike the run's own, or that of the data? The data's is met by siblings at the same data index.
- `forecast`: is the run where its siblings are? A wrong epsilon of AdamW cost LLM-jp two runs of 0.7T and 1.4T tokens
  without a spike; only the forecast shows it. A law's curve serves as sibling where there is none.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage, special

TREND = 101
"""Observations of the centred median that is a curve's trend; a sixth of a short curve."""
SKIPPED = 20
"""Observations at the beginning in which the loss falls too steeply for a trend."""
OUTLIER_Z = 6.0
"""Robust sd above the trend at which an excursion begins."""
AWAY_Z = 3.0
"""It goes on as long as one of its next GAP observations is still so far away."""
GAP = 3
HIT_Z = 4.0
"""Robust sd that a sibling must be above its own trend at the same step."""
LIKE = 4.0
"""Its excess in nats must be like ours up to this factor."""
CHANCE = 0.01
"""Coincidences less likely than this are the data's."""
SMALLEST_SPREAD = 5e-4
"""Of the trend: below it a log of few digits has no noise to measure."""

BLOCKS = 24
"""Blocks of a run that a forecast compares: few enough that a healthy run's CUSUM rarely gets to H by chance."""
K, H = 0.5, 5.0
"""Reference value and limit of the CUSUM (Page 1954), in sd: some 465 independent blocks between false alarms."""
FAR_Z = 3.0
"""Sd that a run must be above its siblings at an alarm: a seed that is unlucky all along adds up as well."""
LARGEST_RHO = 0.8
"""Of the correlation between a seed's neighbouring blocks, and what is assumed of fewer than four siblings."""
FLOOR = 0.05
"""Sd of one sibling's level as a share of it before any other is known (seeds of public runs: 0.0005 to 0.002)."""
MATTERS = 0.005
"""Excess as a share of the loss that is worth an alarm: a few percent of compute, several sd of seeds."""
FOREIGN_Z = 8.0
"""Robust sd from the others at which one of four or more siblings tells nothing about their spread."""


class Curve(NamedTuple):
    """One run's training loss in nats per token; `step` increases, and is the data index where siblings share data."""

    name: str
    step: np.ndarray
    loss: np.ndarray


class Residuals(NamedTuple):
    """A curve without its trend: nats above it (`excess`), and the same in robust sd of its neighbourhood (`z`)."""

    step: np.ndarray
    excess: np.ndarray
    z: np.ndarray


class Excursion(NamedTuple):
    """Rows `first` to `last` of a curve far above its trend: its onset's and its largest excess in nats, largest z."""

    first: int
    last: int
    onset: float
    peak: float
    z: float


def finite(curve: Curve) -> Curve:
    """The rows with a finite loss."""
    step, loss = np.asarray(curve.step, dtype=np.float64), np.asarray(curve.loss, dtype=np.float64)
    keep = np.isfinite(step) & np.isfinite(loss)
    return Curve(curve.name, step[keep], loss[keep])


def centred_median(values: np.ndarray, window: int) -> np.ndarray:
    """Median over `window` values around each, (n,); the ends are continued by point reflection, which keeps slopes.

    Of a curve that falls monotonically it is the curve itself, however bent.
    """
    half = min(window // 2, len(values) - 1)
    first, last = np.median(values[:5]), np.median(values[-5:])  # not one noisy value, which all would inherit
    before, after = 2 * first - values[half:0:-1], 2 * last - values[-2 : -half - 2 : -1]
    whole = np.concatenate((before, values, after))
    return ndimage.median_filter(whole, size=2 * half + 1, mode="nearest")[half : half + len(values)]


def residuals(curve: Curve) -> Residuals:
    """The curve above its trend, excursions not counted in the trend; short curves (under 30 rows) give nothing."""
    curve = finite(curve)
    n = len(curve.loss)
    if n < 30:
        return Residuals(np.empty(0), np.empty(0), np.empty(0))
    window = min(TREND, max(11, n // 6 | 1))
    loss = curve.loss
    trend = centred_median(loss, window)
    # Where the loss falls by more than its noise the median is the loss itself: second differences still see noise.
    bend = np.pad(np.abs(np.diff(loss, 2)), 1, mode="edge") / np.sqrt(6)
    noise = 1.4826 * ndimage.median_filter(bend, size=window, mode="mirror")
    for _ in range(2):
        spread = 1.4826 * ndimage.median_filter(np.abs(loss - trend), size=2 * window + 1, mode="mirror")
        spread = np.maximum(np.maximum(spread, noise), SMALLEST_SPREAD * np.abs(trend))
        inside = loss - trend <= AWAY_Z * spread
        inside[[0, -1]] = True
        trend = centred_median(np.interp(curve.step, curve.step[inside], loss[inside]), window)
    excess = loss - trend
    return Residuals(curve.step, excess, excess / np.maximum(spread, 1e-9))


def excursions(own: Residuals) -> list[Excursion]:
    """Where a run leaves its trend upwards, each as a whole: what a bad batch does to the steps after it is its own."""
    found: list[Excursion] = []
    away = np.flatnonzero(own.z > AWAY_Z)
    for first in np.flatnonzero(own.z > OUTLIER_Z):
        if first < SKIPPED or (found and first <= found[-1].last):
            continue
        last = int(first)
        for row in away[np.searchsorted(away, first) :]:
            if row > last + GAP:
                break
            last = int(row)
        span = slice(first, last + 1)
        peak = float(own.excess[span].max())
        found.append(Excursion(int(first), last, float(own.excess[first]), peak, float(own.z[span].max())))
    return found


def coincidence(hit: Sequence[bool], chances: Sequence[float]) -> float:
    """Probability that so many siblings, or one so quiet, have the like of an outlier at one step by chance.

    `chances` are each sibling's. The first is the tail of a Poisson binomial; the second, over so many siblings, is for
    a group that a restless or unrelated run is among.
    """
    if not any(hit):
        return 1.0
    counts = np.array([1.0])
    for chance in chances:
        counts = np.convolve(counts, (1 - chance, chance))
    quietest = min(chance for chance, so in zip(chances, hit, strict=True) if so)
    return min(float(counts[sum(hit) :].sum()), len(chances) * quietest)


def attributed(own: Residuals, others: Sequence[Residuals]) -> list[dict[str, Any]]:
    """Every excursion of a run and how many siblings share its onset; `p` is 1 where none does.

    step and until (its first and last), excess (its largest, nats), z, siblings_hit, siblings_with_step, p. Chance
    knows how often each sibling has such an outlier at other times, so heavy-tailed noise attributes nothing to data.
    """
    found = excursions(own)
    first = own.step[[event.first for event in found]]
    last = own.step[[event.last for event in found]]
    onset = np.array([event.onset for event in found])
    mine_too = own.step[own.z > AWAY_Z]
    hit: list[list[bool]] = [[] for _ in found]
    chances: list[list[float]] = [[] for _ in found]
    for other in others if found else ():
        n = len(other.step)
        if not n:
            continue
        at = np.minimum(np.searchsorted(other.step, first), n - 1)
        ratio = other.excess[at] / onset
        like = (other.z[at] >= HIT_Z) & (ratio >= 1 / LIKE) & (ratio <= LIKE)
        high = np.flatnonzero(other.z >= HIT_Z)
        elsewhere = np.sort(other.excess[high[~np.isin(other.step[high], mine_too)]])
        begin, end = np.searchsorted(elsewhere, onset / LIKE), np.searchsorted(elsewhere, onset * LIKE, side="right")
        for i in np.flatnonzero(other.step[at] == first):
            hit[i].append(bool(like[i]))
            chances[i].append((int(end[i] - begin[i]) + 1) / (n + 1))
    return [
        {
            "step": int(first[i]),
            "until": int(last[i]),
            "excess": event.peak,
            "z": event.z,
            "siblings_hit": sum(hit[i]),
            "siblings_with_step": len(hit[i]),
            "p": coincidence(hit[i], chances[i]),
        }
        for i, event in enumerate(found)
    ]


def bad_batches(mine: Curve, others: Sequence[Curve]) -> list[dict[str, Any]]:
    """The excursions of `mine` that are the data's: more siblings share their onset than chance explains.

    See `attributed` for the keys. A spike that no sibling has at the same step is not among them.
    """
    told = attributed(residuals(mine), [residuals(other) for other in others])
    return [event for event in told if event["p"] < CHANCE]


def forecast(mine: Curve, others: Sequence[Curve]) -> dict[str, Any]:
    """Is `mine` on the level of its siblings? `step` is where it is known not to be, None as long as it is.

    step, z (normal score of the excess in the siblings' predictive distribution), excess_nats and relative (as a share
    of their loss) are of the first alarm, or of the end without one; None where nothing can be compared. evidence: the
    number of siblings, their level, what is assumed of the correlation, the CUSUM's largest value, and how it ended.
    """
    mine, others = finite(mine), [other for other in map(finite, others) if len(other.step) > 1]
    nothing = {"step": None, "z": None, "excess_nats": None, "relative": None, "evidence": {"siblings": len(others)}}
    if not others:
        return nothing
    keep = np.zeros(len(mine.step), dtype=bool)
    for other in others:
        keep |= (mine.step >= other.step[0]) & (mine.step <= other.step[-1])
    if keep.sum() < 3:
        return nothing
    step, loss = mine.step[keep], mine.loss[keep]
    levels = np.array([np.interp(step, o.step, o.loss, left=np.nan, right=np.nan) for o in others])
    centre = np.nanmedian(levels, axis=0)
    edges = np.linspace(0, len(step), min(BLOCKS, len(step)) + 1).astype(int)
    d, level, z, rho, known = scores(loss - centre, levels - centre, centre, edges)
    relative = d / np.maximum(np.abs(level), 1e-9)
    sums = cusum(np.minimum(z[1:], z[:-1]), rho)  # two blocks in a row, so that one spike is no failure
    alarms = np.flatnonzero((sums > H) & (z[1:] > FAR_Z) & (np.minimum(relative[1:], relative[:-1]) > MATTERS)) + 1
    at = int(alarms[0]) if len(alarms) else len(z) - 1
    evidence = {
        "siblings": len(others),
        "compared": known,
        "level": float(level[at]),
        "correlation": rho,
        "cusum": float(sums.max(initial=0.0)),
        "end_excess_nats": float(d[-1]),
        "end_z": float(z[-1]),
        "back": bool(len(alarms) and relative[-1] <= MATTERS),
    }
    return {
        "step": int(step[edges[at + 1] - 1]) if len(alarms) else None,
        "z": float(z[at]),
        "excess_nats": float(d[at]),
        "relative": float(relative[at]),
        "evidence": evidence,
    }


def scores(
    mine: np.ndarray, theirs: np.ndarray, centre: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, int]:
    """Per block: excess over the siblings' median in nats, their level, and its normal score; correlation; siblings.

    mine (n,) and theirs (siblings, n) are losses less `centre`: noise of a shared data order cancels. The score is that
    of Student's t for a new member of the group. Two or three siblings leave its tails so wide that nothing would ever
    be far above them; so where it is larger, the score is that of a known sd which begins at FLOOR and becomes theirs.
    """
    blocks = len(edges) - 1
    d, level, z = np.empty(blocks), np.empty(blocks), np.empty(blocks)
    scaled = np.full((len(theirs), blocks), np.nan)
    known = 0
    for b in range(blocks):
        span = slice(edges[b], edges[b + 1])
        there = np.flatnonzero(np.isfinite(theirs[:, span]).any(axis=1))
        group = medians(theirs[there, span])
        away = np.abs(group - np.median(group))
        robust = 1.4826 * float(np.median(away)) + 1e-12
        foreign = (away > FOREIGN_Z * robust) & (away > MATTERS * abs(float(np.median(centre[span]))))
        kept = ~foreign if len(group) > 3 else np.ones(len(group), dtype=bool)
        group, n = group[kept], int(kept.sum())
        d[b] = float(np.median(mine[span])) - float(np.median(group))
        level[b] = float(np.median(centre[span]))
        noise = own_noise(mine[None, span])[0]
        usual = float(np.median(own_noise(theirs[there, span]))) if n > 1 else 0.0
        more = max(0.0, float(noise) - usual)
        known = max(known, n)
        sd = float(group.std(ddof=1)) + 1e-12 if n > 1 else 0.0
        new = 1 + (np.pi / 2 if n > 2 else 1.0) / n  # variance of one more run less the others' median, in theirs
        z[b] = d[b] / np.sqrt(new * (sd**2 + (FLOOR * level[b] / n) ** 2) + more)
        if n > 1:
            scaled[there[kept], b] = (group - group.mean()) / sd
            t = normal_score(d[b] / np.sqrt(new * sd**2 + more), n - 1)
            z[b] = max(t, z[b]) if d[b] > 0 else t
    left, right = scaled[:, :-1], scaled[:, 1:]
    both = np.isfinite(left) & np.isfinite(right)
    rho = LARGEST_RHO
    if known > 3 and both.sum() > 20 and left[both].any() and right[both].any():  # no copies of one run
        rho = float(np.clip(np.corrcoef(left[both], right[both])[0, 1], 0.0, LARGEST_RHO))
    return d, level, z, rho, known


def medians(rows: np.ndarray) -> np.ndarray:
    """Median of each row, (rows,), without its NaN."""
    return np.median(rows, axis=1) if np.isfinite(rows).all() else np.nanmedian(rows, axis=1)


def own_noise(rows: np.ndarray) -> np.ndarray:
    """Variance of the median of each row of a block, from its differences: what a level does not know of itself."""
    n = rows.shape[1]
    if n < 4 or not np.isfinite(rows).all():
        return np.zeros(len(rows))
    sd = 1.4826 * np.median(np.abs(np.diff(rows, axis=1)), axis=1) / np.sqrt(2)
    return np.pi / 2 * sd**2 / n


def normal_score(t: float, df: int) -> float:
    """The standard normal deviate as unlikely as Student's t."""
    return float(-np.sign(t) * special.ndtri(max(special.stdtr(df, -abs(t)), 1e-300)))


def cusum(z: np.ndarray, rho: float) -> np.ndarray:
    """Upper CUSUM of the innovations of z, (n,): a seed that is unlucky stays so, which says nothing new each time.

    An innovation is never taken for more than z itself, so that coming back from a lead is no alarm.
    """
    before = np.concatenate(([0.0], np.maximum(z[:-1], 0.0)))
    new = np.minimum(z, (z - rho * before) / np.sqrt(1 - rho**2))
    if len(new):
        new[0] = z[0]
    sums, total = np.empty(len(z)), 0.0
    for i, value in enumerate(new):
        total = max(0.0, total + float(value) - K)
        sums[i] = total
    return sums
