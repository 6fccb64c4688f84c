"""Duels against scipy, brute force, rliable's own figures, and pairs of recipes whose truth is known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from gacha import duel, noise

A = np.array([3.2763, 3.2775, 3.2741, 3.2780, 3.2768])
B = np.array([3.2780, 3.2802, 3.2785, 3.2811, 3.2779, 3.2795])
# From tests/rliable/metrics_test.py of github.com/google-research/rliable: runs x tasks, and what its metrics say.
RLIABLE_X = np.array([[1, 2], [2, 2], [1, 1], [2, 1]])
RLIABLE_Y = np.array([[1, 1], [2, 2], [3, 3]])


def test_a_duel_is_welchs() -> None:
    got, scipys = duel.duel(A, B), stats.ttest_ind(A, B, equal_var=False)
    interval = scipys.confidence_interval()
    assert got.welch_p == pytest.approx(scipys.pvalue, rel=1e-9)
    assert got.difference == pytest.approx((A.mean() - B.mean(), interval.low, interval.high))
    assert (got.n_a, got.n_b, got.winner, got.verdict) == (5, 6, "A", "A is better")
    assert duel.duel(A, B, names=("muon", "adamw")).told.startswith("muon is better than adamw")
    assert duel.duel(A, B, lower_is_better=False).verdict == "B is better"
    assert duel.duel(B, A).winner == "B"


def test_no_evidence_says_what_would_settle_it() -> None:
    """The seeds it names find a difference as large as the one seen four times in five."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, 6), rng.normal(0.3, 1, 6)
    got = duel.duel(a, b)
    assert got.winner is None and got.verdict == "no evidence" and got.n_needed is not None
    assert f"about {got.n_needed} seeds each" in got.told
    sd = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    n = got.n_needed
    found = stats.ttest_ind(rng.normal(0, sd, (n, 4000)), rng.normal(got.difference.value, sd, (n, 4000))).pvalue < 0.05
    assert 0.77 <= found.mean() <= 0.83


def test_duels_without_an_answer() -> None:
    alone = duel.duel([3.2], B)
    assert math.isnan(alone.welch_p) and alone.winner is None and "needs two on each side" in alone.told
    same = duel.duel([2.0, 2.0], [2.0, 2.0])
    assert (same.welch_p, same.winner, same.n_needed, same.p_improvement.value) == (1, None, None, 0.5)
    assert duel.duel([2.0, 2.0], [2.1, 2.1]).winner == "A"
    with pytest.raises(ValueError, match="not finite"):
        duel.duel([2.0, math.inf], B)


def test_a_permutation_test_enumerates_where_it_can() -> None:
    every = stats.PermutationMethod(n_resamples=10_000)
    exact = stats.ttest_ind(A, B, equal_var=False, method=every).pvalue
    pooled, gap = np.concatenate([A, B]), stats.ttest_ind(A, B, equal_var=False).statistic
    groups = [list(group) for group in itertools.combinations(range(11), 5)]
    gaps = [stats.ttest_ind(pooled[group], np.delete(pooled, group), equal_var=False).statistic for group in groups]
    assert duel.permutation_p(A, B) == pytest.approx(np.mean(np.abs(gaps) >= abs(gap) - 1e-9))
    assert duel.permutation_p(A, B) == pytest.approx(exact, abs=0.01)
    assert duel.permutation_p(np.array([1.0]), np.array([2.0, 3, 4])) == 0.5
    rng = np.random.default_rng(0)
    many, more = rng.normal(size=30), rng.normal(0.4, 1, 30)
    drawn = duel.permutation_p(many, more)
    assert drawn == duel.permutation_p(many, more) and drawn > 0
    assert drawn == pytest.approx(stats.ttest_ind(many, more).pvalue, abs=0.02)


def test_the_probability_of_improvement_counts_pairs() -> None:
    a, b = np.array([1.0, 2, 3]), np.array([2.0, 4])
    assert duel.p_better(a, b, lower_is_better=True).value == pytest.approx(4.5 / 6)
    assert duel.p_better(a, b, lower_is_better=False).value == pytest.approx(1.5 / 6)
    sure = duel.p_better(np.array([1.0, 2]), np.array([3.0, 4]), lower_is_better=True)
    assert sure.value == sure.hi == 1 and 0.2 < sure.lo < 0.6


@pytest.mark.parametrize(("shift", "truth"), [(0.0, 0.5), (1.0, 0.7602)])
def test_its_interval_covers_what_it_claims(shift: float, truth: float) -> None:
    """The truth is the normal distribution function at shift / sqrt 2."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(1500):
        got = duel.p_better(rng.normal(size=8), rng.normal(shift, 1, 8), lower_is_better=True)
        inside += got.lo <= truth <= got.hi
    assert abs(inside / 1500 - 0.95) <= 0.015


def test_several_duels_are_corrected() -> None:
    """Holm's steps by hand; and among recipes that are all the same a false winner is rare."""
    assert duel.holm([0.01, 0.04, 0.03, math.nan])[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert duel.holm([0.6, 0.5]) == [1, 1]
    rng = np.random.default_rng(0)
    fooled, raw = 0, 0
    for _ in range(150):
        pairs = [rng.normal(size=6) for _ in range(5)]
        ps = [duel.welch(a, b)[1] for a, b in itertools.combinations(pairs, 2)]
        fooled, raw = fooled + (min(duel.holm(ps)) < 0.05), raw + (min(ps) < 0.05)
    assert fooled / 150 <= 0.08 < raw / 150


def test_rliables_own_figures() -> None:
    assert duel.iqm(RLIABLE_X) == 1.5 and duel.iqm(RLIABLE_Y) == 2
    assert duel.improvement(RLIABLE_X, RLIABLE_Y).value == pytest.approx(1 / 3)
    assert duel.improvement(RLIABLE_X, RLIABLE_X).value == 0.5


def test_scores_over_tasks_and_runs() -> None:
    """Against the definitions, loop by loop, and intervals that hold the truth of a known distribution."""
    rng = np.random.default_rng(0)
    scores, others = rng.normal(range(4), 1, (6, 4)), rng.normal([0.5, 1, 2, 2], 1, (5, 4))
    middle = np.sort(scores.ravel())[6:18]
    assert duel.iqm(scores) == pytest.approx(middle.mean())
    assert duel.iqm_interval(scores).lo < middle.mean() < duel.iqm_interval(scores).hi
    taus = [-1.0, 0.5, 2.0, 9.0]
    profile = duel.profile(scores, taus)
    assert [one.value for one in profile] == [np.mean(scores > tau) for tau in taus]
    assert all(one.lo <= one.value <= one.hi for one in profile) and profile[1].hi - profile[1].lo > 0.1
    wins = [np.mean([[a > b for b in others[:, t]] for a in scores[:, t]]) for t in range(4)]
    assert duel.improvement(scores, others).value == pytest.approx(np.mean(wins))
    inside = [duel.iqm_interval(rng.normal(size=(8, 5)), seed=i) for i in range(60)]
    assert np.mean([one.lo <= 0 <= one.hi for one in inside]) >= 0.85


def test_paired_seeds_cancel_in_a_multibootstrap() -> None:
    """Two arms from the same checkpoints differ by 0.1 everywhere: only pairing sees it through the seeds' scatter."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(6, 1)) + rng.normal(size=(1, 200)) + 0.2 * rng.normal(size=(6, 200))
    better = base + 0.1 + 0.05 * rng.normal(size=(6, 200))
    paired, p = duel.multibootstrap(base, better, paired=True)
    loose, loose_p = duel.multibootstrap(base, better)
    assert paired.value == loose.value == pytest.approx(0.1, abs=0.01)
    assert 0.08 < paired.lo < paired.hi < 0.12 and p < 0.001
    assert loose.lo < 0 < loose.hi and loose_p > 0.1
    with pytest.raises(ValueError, match="same examples"):
        duel.multibootstrap(base, better[:, :10])


def test_variance_of_a_crossed_design_is_that_of_anova() -> None:
    rng = np.random.default_rng(0)
    init, data = np.indices((5, 4)).reshape(2, -1)
    table = rng.normal(size=(5, 1)) * 2 + rng.normal(size=(1, 4)) + rng.normal(size=(5, 4)) * 0.3
    rows, columns, mean = table.mean(axis=1), table.mean(axis=0), table.mean()
    rest = ((table - rows[:, None] - columns + mean) ** 2).sum() / 12
    of_init = (4 * ((rows - mean) ** 2).sum() / 4 - rest) / 4
    of_data = (5 * ((columns - mean) ** 2).sum() / 3 - rest) / 5
    got = noise.variance_split(table.ravel(), [str(i) for i in init], [str(i) for i in data])
    assert [one.value for one in got] == pytest.approx([of_init, of_data, rest])
    assert all(one.lo < one.value < one.hi for one in got)
    nested = noise.variance_split(table.ravel(), [str(i) for i in init], [str(i) for i in range(20)])
    within = table.var(axis=1, ddof=1).mean()
    assert nested.data.value == pytest.approx(within) and math.isnan(nested.rest.value)
    assert nested.init.value == pytest.approx(rows.var(ddof=1) - within / 4)
    with pytest.raises(ValueError, match="told apart"):
        noise.variance_split([1.0, 2.0, 3.0], ["a", "b", "c"], ["x", "y", "z"])


def test_decision_accuracy_counts_pairs() -> None:
    """Three recipes, of which the small scale swaps one pair; by single seeds some of the others are swapped too."""
    large = {"a": [1.0, 1.2], "b": [2.0], "c": [3.0, 2.8]}
    small = {"a": [5.0, 5.2], "b": [6.5, 6.7], "c": [6.0, 6.6]}
    got = noise.decision_accuracy(small, large)
    assert (got.recipes, got.pairs) == (3, 3)
    assert got.averaged.value == pytest.approx(2 / 3)
    assert got.single.value == pytest.approx((1 + 1 + 1 / 4) / 3)
    assert got.single.lo <= got.single.value <= got.single.hi
    with pytest.raises(ValueError, match="1 recipes"):
        noise.decision_accuracy({"a": [1.0]}, large)
