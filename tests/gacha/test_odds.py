"""The statistics against exact enumeration, and against samples whose truth is known."""

import itertools
import math

import numpy as np
import pytest

from gacha import odds

FINALS = np.array([2.31, 2.27, 2.40, 2.29, 2.27, 2.35])


@pytest.mark.parametrize("k", range(1, len(FINALS) + 1))
@pytest.mark.parametrize(("lower", "best"), [(True, min), (False, max)])
def test_best_of_is_the_mean_over_all_subsets(k: int, lower: bool, best: type) -> None:
    exact = np.mean([best(subset) for subset in itertools.combinations(FINALS, k)])
    got = odds.best_of(FINALS, k, lower_is_better=lower)
    assert got.value == pytest.approx(exact, abs=1e-12)
    assert got.lo <= got.value + 1e-12 and got.value <= got.hi + 1e-12


def test_more_pulls_than_observed_are_refused() -> None:
    with pytest.raises(ValueError, match="from 6 pulls"):
        odds.best_of(FINALS, 7)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_finals_that_are_not_finite_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError):
        odds.best_of(bad, 1)


def test_bootstrap_interval_is_seeded_and_covers() -> None:
    """The interval of the mean (k = 1) at n = 20 covers the truth about as often as it says; same seed, same bits."""
    assert odds.best_of(FINALS, 3, seed=4) == odds.best_of(FINALS, 3, seed=4)
    rng = np.random.default_rng(1)
    inside = sum(
        got.lo <= 0 <= got.hi for got in (odds.best_of(rng.normal(size=20), 1, bootstraps=1000) for _ in range(200))
    )
    assert 0.88 <= inside / 200 <= 0.98


def test_divergence_interval_covers_at_least_what_it_claims() -> None:
    """Clopper-Pearson by its definition, and its coverage, summed exactly over all outcomes, is never below 95%."""
    zero = odds.probability(0, 4)
    assert zero.lo == 0 and zero.hi == pytest.approx(1 - 0.025 ** (1 / 4))
    for p in (0.05, 0.2, 0.5):
        n, covered = 8, 0.0
        for count in range(n + 1):
            got = odds.probability(count, n)
            covered += math.comb(n, count) * p**count * (1 - p) ** (n - count) * (got.lo <= p <= got.hi)
        assert covered >= 0.95


def test_spread_finds_the_outlier_and_knows_its_own_width() -> None:
    got = odds.spread([2.30, 2.31, 2.29, 2.30, 2.32, 2.60])
    assert np.abs(got.z[:5]).max() < odds.OUTLIER_Z < got.z[5]
    assert (got.n, got.low, got.high) == (6, 2.29, 2.60)
    rng = np.random.default_rng(2)
    spreads = [odds.spread(rng.normal(scale=0.7, size=4)) for _ in range(2000)]
    assert 0.93 <= np.mean([s.sd_lo <= 0.7 <= s.sd_hi for s in spreads]) <= 0.97


def test_spread_of_one_and_of_equal_finals() -> None:
    assert math.isnan(odds.spread([2.3]).sd)
    assert odds.spread([2.0, 2.0, 2.0]).z.tolist() == [0, 0, 0]


def test_a_lead_is_measured_against_chance() -> None:
    """Leads of normal draws are ordinary by construction: their own share is uniform; a loner's is small."""
    rng = np.random.default_rng(3)
    shares = [odds.lead(rng.normal(size=5), draws=2000)[1] for _ in range(300)]
    assert 0.42 < float(np.mean(shares)) < 0.58
    gap, share = odds.lead([1.0, 2.0, 2.01, 2.02, 2.03])
    assert gap > 2 and share < 0.05
    assert odds.lead([3.0, 2.0, 1.0], lower_is_better=False)[0] == pytest.approx(1.0)
