"""The statistics against exact enumeration, published values, and samples whose truth is known."""

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from gacha import odds

FINALS = np.array([2.31, 2.27, 2.40, 2.29, 2.27, 2.35])
# The 20 accuracies in plot.py of github.com/dodgejesse/show_your_work, and what its samplemax() says of them.
DODGE = [0.8, 0.75, 0.9, 0.24, 0.45, 0.6, 0.65, 0.67, 0.49, 0.49, 0.59, 0.52, 0.78, 0.84, 0.63, 0.42, 0.85, 0.76, 0.68]
DODGE += [0.6]
DODGE_BEST_OF = {1: 0.6355, 2: 0.727575, 3: 0.77024875, 5: 0.813337346875, 10: 0.8540611815493975}
DODGE_BEST_OF |= {15: 0.8701465284941716, 20: 0.8789943646472491}


@pytest.mark.parametrize("k", range(1, len(FINALS) + 1))
@pytest.mark.parametrize(("lower", "best"), [(True, min), (False, max)])
def test_best_of_is_the_mean_over_all_subsets(k: int, lower: bool, best: type) -> None:
    exact = np.mean([best(subset) for subset in itertools.combinations(FINALS, k)])
    replaced = np.mean([best(draw) for draw in itertools.product(FINALS, repeat=k)])
    got = odds.best_of_curve(FINALS, [k], lower_is_better=lower)[0]
    assert got.u == pytest.approx(exact, abs=1e-12)
    assert got.v == pytest.approx(replaced, abs=1e-12)
    assert got.lo < got.u < got.hi
    assert odds.best_of(FINALS, k, lower_is_better=lower) == (got.u, got.lo, got.hi)


def test_the_published_values_of_dodge_et_al() -> None:
    curve = {one.k: one for one in odds.best_of_curve(DODGE, lower_is_better=False)}
    for k, published in DODGE_BEST_OF.items():
        assert curve[k].v == pytest.approx(published, abs=1e-12)
        assert curve[k].u >= curve[k].v


def test_more_pulls_than_observed_are_refused() -> None:
    with pytest.raises(ValueError, match="from 6 pulls"):
        odds.best_of(FINALS, 7)
    with pytest.raises(ValueError, match=r"1\.\.6"):
        odds.p_hit(2, 6, 7)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_finals_that_are_not_finite_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError):
        odds.best_of(bad, 1)


def test_the_interval_of_one_pull_is_students() -> None:
    curve = odds.best_of_curve(FINALS, [1])[0]
    student = stats.ttest_1samp(FINALS, 0).confidence_interval()
    assert (curve.lo, curve.hi) == pytest.approx((student.low, student.high), abs=0.03 * (student.high - student.low))


@pytest.mark.parametrize(("draw", "width"), [("normal", 0.015), ("gumbel", 0.025)])
def test_the_interval_covers_what_it_claims(draw: str, width: float) -> None:
    """Also at k = n. The truth is the mean best of k of that distribution."""
    rng, n, ks, sets = np.random.default_rng(1), 10, [1, 3, 5, 10], 1500
    truth = {k: float(np.mean(getattr(rng, draw)(size=(100_000, k)).min(axis=1))) for k in ks}
    inside = dict.fromkeys(ks, 0)
    for _ in range(sets):
        for got in odds.best_of_curve(getattr(rng, draw)(size=n), ks):
            inside[got.k] += got.lo <= truth[got.k] <= got.hi
    for k in ks:
        assert abs(inside[k] / sets - 0.95) <= width, (k, inside[k] / sets)


def test_the_interval_follows_shift_scale_and_direction() -> None:
    for got, same, mirrored in zip(
        odds.best_of_curve(FINALS),
        odds.best_of_curve(100 + 7 * FINALS),
        odds.best_of_curve(-FINALS, lower_is_better=False),
        strict=True,
    ):
        assert same[1:5] == pytest.approx([100 + 7 * x for x in got[1:5]], rel=1e-9)
        assert mirrored[1:5] == pytest.approx([-got.u, -got.v, -got.hi, -got.lo])
        assert got.trusted == (got.k <= 3)


def test_a_curve_of_many_pulls_is_thinned_and_of_one_has_no_interval() -> None:
    ks = odds.ks_of(1000)
    assert ks[:20] == list(range(1, 21)) and ks[-1] == 1000 and len(ks) < 40
    alone = odds.best_of_curve([2.3])
    assert [one.k for one in alone] == [1] and alone[0].u == 2.3 and math.isnan(alone[0].lo)
    values = np.random.default_rng(0).normal(size=1000)
    curve = odds.best_of_curve(values, [1, 20, 1000])
    assert curve[2].u == values.min()
    assert curve[1].lo < -1.8675 < curve[1].hi  # the mean least of 20 normal draws


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


def test_p_hit_is_unbiased_and_its_interval_covers() -> None:
    """Over all outcomes of n pulls its mean is 1 - (1 - p)^k; the interval never covers less than it says."""
    n, p, k = 9, 0.3, 4
    truth, mean, covered = 1 - (1 - p) ** k, 0.0, 0.0
    for hits in range(n + 1):
        weight = math.comb(n, hits) * p**hits * (1 - p) ** (n - hits)
        got = odds.p_hit(hits, n, k)
        mean += weight * got.value
        covered += weight * (got.lo <= truth <= got.hi)
        assert got.lo <= got.value <= got.hi
    assert mean == pytest.approx(truth, abs=1e-12)
    assert covered >= 0.95
    subsets = [any(i < 3 for i in subset) for subset in itertools.combinations(range(n), k)]
    assert odds.p_hit(3, n, k).value == pytest.approx(np.mean(subsets))
    assert odds.hits_of(FINALS, 2.29) == 3 and odds.hits_of(FINALS, 2.35, lower_is_better=False) == 2


def test_the_mean_against_a_target() -> None:
    assert odds.p_one_sided(FINALS, 2.35) == pytest.approx(stats.ttest_1samp(FINALS, 2.35, alternative="less").pvalue)
    higher = stats.ttest_1samp(FINALS, 2.3, alternative="greater").pvalue
    assert odds.p_one_sided(FINALS, 2.3, lower_is_better=False) == pytest.approx(higher)
    assert math.isnan(odds.p_one_sided([2.3], 2.3))
    assert [odds.p_one_sided([2.0, 2.0], target) for target in (1.9, 2.0, 2.1)] == [1, 0.5, 0]


def spend_of(
    rng: np.random.Generator, good: float, diverge: float, detect: float, alarm: float
) -> tuple[int, float, float]:
    """Pulls until the first hit, by simulation: how many, what they cost, and what those before the last cost."""
    pulls, spend = 0, 0.0
    while True:
        pulls += 1
        stopped = rng.random() < diverge or rng.random() < alarm
        if not stopped and rng.random() < good:
            return pulls, spend + 1, spend
        spend += detect if stopped else 1


@pytest.mark.parametrize(("good", "diverge", "detect", "alarm"), [(0.3, 0, 1, 0), (0.25, 0.4, 0.1, 0.1)])
def test_the_price_of_a_target_is_that_of_a_renewal_simulation(
    good: float, diverge: float, detect: float, alarm: float
) -> None:
    rng, runs = np.random.default_rng(0), 8000
    pulls, spend, before = np.array([spend_of(rng, good, diverge, detect, alarm) for _ in range(runs)]).T
    got = odds.price(good, 1.0, diverge, detect, alarm, confidence=0.9)
    assert got.pulls_mean == pytest.approx(pulls.mean(), rel=0.04)
    assert got.spend_mean == pytest.approx(spend.mean(), rel=0.04)
    assert got.pulls == pytest.approx(np.quantile(pulls, 0.9), abs=1)
    for budget in (0.5, 1, 3.7, got.spend, 15):
        # The last pull is only started where all of it can be paid.
        within = float(np.mean(before <= budget - 1 + 1e-9))
        assert odds.hit_within(budget, good, 1.0, diverge, detect, alarm) == pytest.approx(within, abs=0.016)
    assert odds.hit_within(got.spend, good, 1.0, diverge, detect, alarm) >= 0.9
    assert odds.hit_within(got.spend - 0.002, good, 1.0, diverge, detect, alarm) < 0.9


def test_without_divergence_the_price_is_the_geometric_one() -> None:
    got = odds.price(0.2, cost=50.0, confidence=0.95)
    assert got == (0.2, 50.0, 5.0, 250.0, math.ceil(math.log(0.05) / math.log(0.8)), got.spend)
    assert got.spend == pytest.approx(50 * got.pulls)
    assert odds.hit_within(120, 0.2, 50, 0, 1, 0) == pytest.approx(1 - 0.8**2)
    assert odds.price(0.0).spend == math.inf and odds.price(1.0).pulls == 1
    assert odds.price(0.5, p_diverge=1.0).pulls_mean == math.inf


@pytest.mark.parametrize("cost", [1e-4, 0.01, 0.03, 0.5])
def test_the_reservation_value_is_where_another_pull_earns_its_cost(cost: float) -> None:
    got = odds.reservation(FINALS, cost)
    assert np.mean(np.maximum(got.value - FINALS, 0)) == pytest.approx(cost)
    assert got.lo < got.value < got.hi
    mirrored = odds.reservation(-FINALS, cost, lower_is_better=False)
    assert mirrored == pytest.approx((-got.value, -got.hi, -got.lo))
    lost = odds.reservation(FINALS, cost, diverged=6)
    assert np.sum(np.maximum(lost.value - FINALS, 0)) / 12 == pytest.approx(cost)


def test_the_reservation_value_stops_best() -> None:
    """Pulling until one holds it costs less, pulls and value together, than any other rule; its interval covers."""
    rng, cost = np.random.default_rng(0), 0.15

    def total(threshold: float) -> float:
        p = special.ndtr(threshold)  # pulls are geometric, what is held at the end a normal below the threshold
        return float(cost / p - math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi) / p)

    truth = min(np.linspace(-2, 2, 4001), key=total)
    assert odds.reservation(rng.normal(size=20_000), cost, draws=50).value == pytest.approx(truth, abs=0.03)
    got = [odds.reservation(rng.normal(size=12), cost, draws=500) for _ in range(400)]
    assert 0.92 <= np.mean([one.lo <= truth <= one.hi for one in got]) <= 0.98
    with pytest.raises(ValueError, match="cost 0"):
        odds.reservation(FINALS, 0)


def test_spread_finds_the_outlier_and_knows_its_own_width() -> None:
    finals = [2.30, 2.31, 2.29, 2.30, 2.32, 2.60]
    got = odds.spread(finals)
    assert np.abs(got.z[:5]).max() < odds.OUTLIER_Z < got.z[5]
    assert (got.n, got.low, got.high) == (6, 2.29, 2.60)
    assert odds.outliers(finals) == [5]
    rng = np.random.default_rng(2)
    spreads = [odds.spread(rng.normal(scale=0.7, size=4)) for _ in range(2000)]
    assert 0.93 <= np.mean([s.sd_lo <= 0.7 <= s.sd_hi for s in spreads]) <= 0.97


def test_spread_of_one_and_of_equal_finals() -> None:
    assert math.isnan(odds.spread([2.3]).sd)
    assert odds.spread([2.0, 2.0, 2.0]).z.tolist() == [0, 0, 0]
    same = odds.best_of_curve([2.0, 2.0, 2.0])[1]
    assert same[1:5] == pytest.approx((2, 2, 2, 2))


def test_a_lead_is_measured_against_chance() -> None:
    """Leads of normal draws are ordinary by construction: their own share is uniform; a loner's is small."""
    rng = np.random.default_rng(3)
    shares = [odds.lead(rng.normal(size=5), draws=2000)[1] for _ in range(300)]
    assert 0.42 < float(np.mean(shares)) < 0.58
    gap, share = odds.lead([1.0, 2.0, 2.01, 2.02, 2.03])
    assert gap > 2 and share < 0.05
    assert odds.lead([3.0, 2.0, 1.0], lower_is_better=False)[0] == pytest.approx(1.0)
