"""Where the scatter of pulls comes from, and whether it turns a decision: plain arrays in, plain numbers out."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gacha.odds import Estimate, finals_of

BOOTSTRAPS = 2_000


class Split(NamedTuple):
    """Variances of the finals by where they come from; `rest` is neither seed's alone: their interplay, the hardware.

    `rest` is NaN where no two initialisations share a data seed: it is then inside `data`.
    """

    init: Estimate
    data: Estimate
    rest: Estimate


class Decision(NamedTuple):
    """How often the better of two recipes at a small scale is the better one at a large scale.

    `averaged` when the small scale is judged by its mean over seeds, `single` when by one seed.
    """

    recipes: int
    pairs: int
    averaged: Estimate
    single: Estimate


def variance_split(
    values: ArrayLike,
    init_seeds: Sequence[str],
    data_seeds: Sequence[str],
    level: float = 0.95,
    seed: int = 0,
) -> Split:
    """Variance of finals by initialisation and data order: crossed or nested random effects, by the method of moments.

    Half the squared difference of two runs is on average the rest's variance, and each seed's besides where it differs;
    the three kinds of pairs give the three variances, for any design, and for a balanced one what analysis of variance
    gives (Searle et al. 1992; the question is Dodge et al. 2020's). Negative estimates count as 0. The interval is that
    of a parametric bootstrap with normal effects: with 4 to 8 seeds of each kind it covers 82 to 92%, not 95. Raises
    ValueError where the seeds cannot be told apart.
    """
    finals = finals_of(values)
    init, data = (np.unique(np.asarray(seeds), return_inverse=True)[1] for seeds in (init_seeds, data_seeds))
    if not len(finals) == len(init) == len(data):
        raise ValueError(f"{len(finals)} finals, {len(init)} and {len(data)} seeds: one of each per run")
    found = moments(finals[None], init, data)[:, 0]
    if np.isnan(found[:2]).any():
        raise ValueError(
            "the seeds cannot be told apart: some runs must share a seed of initialisation and differ in data's"
        )
    kept = np.maximum(found, 0)
    rng = np.random.default_rng(seed)
    rest = 0.0 if math.isnan(kept[2]) else kept[2]
    redrawn = rng.standard_normal((BOOTSTRAPS, len(finals))) * math.sqrt(rest + (kept[1] if math.isnan(kept[2]) else 0))
    redrawn += (rng.standard_normal((BOOTSTRAPS, init.max() + 1)) * math.sqrt(kept[0]))[:, init]
    if not math.isnan(kept[2]):
        redrawn += (rng.standard_normal((BOOTSTRAPS, data.max() + 1)) * math.sqrt(kept[1]))[:, data]
    ends = np.quantile(np.maximum(moments(redrawn, init, data), 0), [(1 - level) / 2, (1 + level) / 2], axis=1)
    return Split(*(Estimate(float(kept[i]), float(ends[0, i]), float(ends[1, i])) for i in range(3)))


def moments(sets: np.ndarray, init: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Variances (3, sets) of initialisation, data order and the rest, for rows of finals; NaN where no pairs tell."""
    cell = init * (data.max() + 1) + data

    def pairs_within(labels: np.ndarray) -> tuple[np.ndarray, float]:
        """Sum of half squared differences over the pairs that share a label, and how many pairs that is."""
        members = (labels[:, None] == np.unique(labels)).astype(np.float64)
        count = members.sum(axis=0)
        return (sets**2 @ members @ count - ((sets @ members) ** 2).sum(axis=1)) / 2, float(
            (count * (count - 1) / 2).sum()
        )

    (all_sum, all_n), (init_sum, init_n), (data_sum, data_n), (cell_sum, cell_n) = (
        pairs_within(labels) for labels in (np.zeros_like(init), init, data, cell)
    )
    nothing = np.full(len(sets), np.nan)
    same_init = (init_sum - cell_sum) / (init_n - cell_n) if init_n > cell_n else nothing
    same_data = (data_sum - cell_sum) / (data_n - cell_n) if data_n > cell_n else nothing
    apart = all_n - init_n - data_n + cell_n
    both = (all_sum - init_sum - data_sum + cell_sum) / apart if apart > 0 else nothing
    if data_n == cell_n:
        return np.array([both - same_init, same_init, nothing])
    return np.array([both - same_init, both - same_data, same_init + same_data - both])


def decision_accuracy(
    small: Mapping[str, ArrayLike], large: Mapping[str, ArrayLike], level: float = 0.95, seed: int = 0
) -> Decision:
    """Share of pairs of recipes whose order at the small scale is that of their means at the large one; ties half.

    Magnusson et al. 2025 (DataDecide). Percentile interval of a bootstrap over recipes and, within each, over seeds.
    Raises ValueError unless two recipes are at both scales.
    """
    names = [name for name in small if name in large]
    if len(names) < 2:
        raise ValueError(f"{len(names)} recipes are at both scales: a decision needs two")
    runs = [(finals_of(small[name]), finals_of(large[name])) for name in names]
    rng = np.random.default_rng(seed)
    averaged, single = agreement(runs)
    draws = np.empty((BOOTSTRAPS // 4, 2))
    for i in range(len(draws)):
        picked = rng.integers(len(runs), size=len(runs))
        while len(set(picked.tolist())) < 2:
            picked = rng.integers(len(runs), size=len(runs))
        redrawn = [(rng.choice(a, len(a)), rng.choice(b, len(b))) for a, b in runs]
        draws[i] = agreement([redrawn[j] for j in picked], picked)
    ends = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Decision(
        len(names),
        math.comb(len(names), 2),
        Estimate(averaged, float(ends[0, 0]), float(ends[1, 0])),
        Estimate(single, float(ends[0, 1]), float(ends[1, 1])),
    )


def agreement(runs: Sequence[tuple[np.ndarray, np.ndarray]], labels: np.ndarray | None = None) -> tuple[float, float]:
    """Share of pairs that agree, by means and by single small runs; pairs of the same label are no pairs."""
    of = np.arange(len(runs)) if labels is None else labels
    large = np.array([b.mean() for _, b in runs])
    means = np.array([a.mean() for a, _ in runs])
    values = np.concatenate([a for a, _ in runs])
    owner = np.repeat(np.arange(len(runs)), [len(a) for a, _ in runs])
    averaged = agree(means, large, of)
    weight = 1 / np.array([len(a) for a, _ in runs], dtype=np.float64)[owner]
    return averaged, agree(values, large[owner], of[owner], weight)


def agree(small: np.ndarray, large: np.ndarray, of: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Share of pairs (of different `of`) in the same order in `small` and `large`, a tie in either counting half."""
    weight = np.ones(len(small)) if weight is None else weight
    pairs = np.outer(weight, weight) * (of[:, None] != of[None, :])
    order = np.sign(small[:, None] - small[None, :]) * np.sign(large[:, None] - large[None, :])
    return float(np.sum(pairs * (order + 1) / 2) / pairs.sum())
