"""Stopping schedules on curves whose best is known, by hand, and on the 32 real pulls of docs/early_stopping.csv."""

from pathlib import Path

import numpy as np
import pytest
from scipy import special

from gacha import csv_source, stopping

REAL = Path(__file__).parents[2] / "docs" / "early_stopping.csv"


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    table = csv_source.load(str(REAL))
    curves: dict[str, list[tuple[float, float]]] = {}
    for run, x, y in zip(table.columns["run"], table.numbers("tokens"), table.numbers("val_bpb"), strict=True):
        curves.setdefault(run, []).append((float(x), float(y)))
    return stopping.align([(np.array(rows)[:, 0], np.array(rows)[:, 1]) for rows in curves.values()])


def synthetic(known: float, pulls: int = 24, points: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Curves that fall to a final which their earlier points show up to noise: `known` 1 all of it, 0 nothing."""
    rng = np.random.default_rng(seed)
    fractions = np.arange(1, points + 1) / points
    finals = rng.normal(size=(pulls, 1))
    noise = rng.normal(size=(pulls, points))
    seen = known * finals + np.sqrt(1 - known**2) * noise
    seen[:, -1] = finals[:, 0]
    return fractions, seen + 5 * (1 - fractions)


def test_curves_of_different_rows_are_put_on_one_grid() -> None:
    fractions, values = stopping.align(
        [
            (np.array([0.0, 10, 20, 30, 40]), np.array([9.0, 5, 4, 3, 2])),
            (np.array([0.0, 20, 39.5]), np.array([9.0, 5, 1])),
            (np.array([10.0, 20]), np.array([5.0, 7])),
            (np.array([40.0, 10, 30, 20]), np.array([1.0, 4, np.inf, 3])),
        ]
    )
    assert fractions == pytest.approx([0.25, 0.5, 0.75, 1])
    assert values[0] == pytest.approx([5, 4, 3, 2])
    assert values[1] == pytest.approx([7, 5, 5 - 4 * 10 / 19.5, 1])
    assert values[2][:2] == pytest.approx([5, 7]) and np.isnan(values[2][2:]).all()
    assert values[3][:2] == pytest.approx([4, 3]) and np.isnan(values[3][2:]).all()
    long = np.arange(1.0, 2001)
    assert len(stopping.align([(long, -long)])[0]) == stopping.POINTS
    with pytest.raises(ValueError, match="beyond its start"):
        stopping.align([(np.array([0.0]), np.array([1.0]))])


def test_rungs_and_brackets_are_the_published_ones() -> None:
    """Successive halving by hand, and the table of Li et al. 2018 for R = 81, eta = 3 (143 pulls in all)."""
    assert stopping.rungs(np.arange(1, 11) / 10, 16, 0.2, 2) == {1: 8, 3: 4, 7: 2}
    published = [(5, 1.0), (8, 1 / 3), (15, 1 / 9), (34, 1 / 27), (81, 1 / 81)]
    got = stopping.brackets(143, 3, 4)
    assert [count for count, _ in got] == [count for count, _ in published]
    assert [start for _, start in got] == pytest.approx([start for _, start in published])
    assert sum(count for count, _ in stopping.brackets(10, 3, 4)) == 10


def test_isotonic_regression_is_the_closest_rising_row() -> None:
    assert stopping.rising(np.array([[3.0, 1, 2, 5, 4, 6]]))[0] == pytest.approx([2, 2, 2, 4.5, 4.5, 6])
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 7))
    fitted = stopping.rising(rows)
    assert (np.diff(fitted, axis=1) >= -1e-12).all()
    for other in np.sort(rows + rng.normal(scale=0.3, size=(200, 5, 7)), axis=2):
        assert (((fitted - rows) ** 2).sum(axis=1) <= ((other - rows) ** 2).sum(axis=1) + 1e-12).all()


def test_saving_and_regret_by_hand() -> None:
    """Four pulls, one of which diverges after a quarter of its budget under every schedule."""
    fractions = np.array([0.25, 0.5, 1.0])
    loss = np.array([[[4.0, 3, 2], [3.0, 2.5, 2.4], [5.0, 4, 3], [9.0, np.inf, np.inf]]])
    saved, regret = stopping.judge(fractions, loss, stopping.run_parallel(loss, {}))
    assert (saved[0], regret[0]) == (0, 0)
    # Two go on from a quarter, one from a half: the second pull, which ends .4 behind the first.
    stopped = stopping.run_parallel(loss, {0: 2, 1: 1})
    assert stopped.tolist() == [[1, 2, 0, 0]]
    saved, regret = stopping.judge(fractions, loss, stopped)
    assert saved[0] == pytest.approx(1 - (0.5 + 1 + 0.25 + 0.25) / (1 + 1 + 1 + 0.5))
    assert regret[0] == pytest.approx(0.4)


def test_what_shows_nothing_stops_nobody_and_what_shows_all_stops_the_rest() -> None:
    unknown = next(one for one in stopping.frontier(*synthetic(0.0)) if one.parameter == "chance under 0.5% from 20%")
    assert unknown.saved.value < 0.02
    outcomes = stopping.frontier(*synthetic(0.999))
    assert outcomes[0].family == "none" and outcomes[0].saved == (0, 0, 0) and outcomes[0].regret == (0, 0, 0)
    early = next(one for one in outcomes if one.parameter == "chance under 0.5% from 20%")
    assert early.saved.value > 0.6 and early.regret_sd.value < 0.02
    assert stopping.buys_most(outcomes).saved.value >= early.saved.value


@pytest.mark.parametrize(("learned_from", "width"), [(5, 0.03), (20, 0.01)])
def test_a_chance_is_about_what_it_says(learned_from: int, width: float) -> None:
    """Of new pulls whose chance of beating a value is put at 5%, so many do; nearly, where it learned from five."""
    rng, n = np.random.default_rng(0), learned_from
    finals = rng.normal(size=(4000, n + 5, 1))
    curves = np.concatenate([finals + rng.normal(scale=0.7, size=finals.shape), finals], axis=2)
    rule, held = stopping.learn(curves[:, :n]), curves[:, n:]
    predicted = rule.intercept[:, :1] + rule.slope[:, :1] * held[..., 0]
    below = predicted - special.stdtrit(n - 2, 0.95) * rule.error[:, :1] * np.sqrt(1 + 1 / n)
    assert np.mean(held[..., 1] < below) == pytest.approx(0.05, abs=width)


def test_values_may_be_better_when_higher_and_outcomes_are_repeatable() -> None:
    fractions, values = synthetic(0.8)
    assert stopping.frontier(fractions, values) == stopping.frontier(fractions, values)
    for one, mirrored in zip(
        stopping.frontier(fractions, values), stopping.frontier(fractions, -values, lower_is_better=False), strict=True
    ):
        assert mirrored.saved == pytest.approx(one.saved) and mirrored.regret == pytest.approx(one.regret)
    assert stopping.rank_known(fractions, values) == stopping.rank_known(fractions, -values, lower_is_better=False)


def test_how_early_a_rank_is_known() -> None:
    ranks = stopping.rank_known(*synthetic(0.9, pulls=200))
    assert len(ranks) == 9 and ranks[0].fraction == pytest.approx(0.1)
    # Spearman's and Kendall's of a bivariate normal with correlation .9.
    assert ranks[3].spearman.lo < 6 / np.pi * np.arcsin(0.45) < ranks[3].spearman.hi
    assert ranks[3].kendall.lo < 2 / np.pi * np.arcsin(0.9) < ranks[3].kendall.hi
    assert 0.2 < ranks[3].p_best_is_best < 0.95
    fractions, values = synthetic(1.0)
    values[:6, 4:] = np.nan
    assert all(one.p_best_is_best == 1 for one in stopping.rank_known(fractions, values[6:]))
    assert all(-1 <= one.spearman.value <= 1 for one in stopping.rank_known(fractions, values))


def test_diverged_pulls_are_paid_for_and_never_kept() -> None:
    fractions, values = synthetic(0.9)
    values[:8, 3:] = np.nan
    outcomes = stopping.frontier(fractions, values)
    assert outcomes[0].saved.value == 0
    assert all(np.isfinite([*one.saved, *one.regret, *one.regret_sd]).all() for one in outcomes)
    assert all(one.regret.lo >= 0 for one in outcomes)
    with pytest.raises(ValueError, match="too few"):
        stopping.frontier(fractions, values[:5])


def test_on_real_pulls_the_learned_rule_is_no_worse_than_the_others(real: tuple[np.ndarray, np.ndarray]) -> None:
    """At the regret of every halving and Hyperband schedule some learned one saves as much, on held-out halves."""
    fractions, values = real
    assert values.shape == (32, 20)
    outcomes = stopping.frontier(fractions, values)
    learned = [one for one in outcomes if one.family == "learned" and one.setting == "parallel"]
    for other in outcomes:
        if other.family in ("halving", "hyperband"):
            as_safe = [one for one in learned if one.regret_sd.value <= other.regret_sd.value + 0.001]
            assert max(one.saved.value for one in as_safe) >= other.saved.value - 0.001, other
