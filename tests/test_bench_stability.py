"""The detectors' bench: the curves are what they say, the rules are the published ones, and figures count mistakes."""

import json
import math

import numpy as np
import pytest

import bench_stability as bench


def test_curves_are_seeded_and_half_of_them_diverge_from_their_onset_on() -> None:
    made, again = bench.curves(40, 3), bench.curves(40, 3)
    assert all(np.array_equal(a.loss, b.loss, equal_nan=True) for a, b in zip(made, again, strict=True))
    assert not np.array_equal(made[0].loss, bench.curves(1, 4)[0].loss)
    for one in made:
        if one.onset is None:
            assert np.isfinite(one.loss).all() and one.kind in bench.HEALTHY
            continue
        assert one.kind in bench.DIVERGING and np.isfinite(one.loss[: one.onset]).all()
        before, end = np.median(one.loss[max(0, one.onset - 50) : one.onset]), one.loss[-20:]
        assert not np.isfinite(end).all() or np.median(end) > before


def run(loss: np.ndarray) -> bench.Synthetic:
    return bench.Synthetic("plain", loss, np.exp(np.random.default_rng(1).normal(0, 0.05, len(loss))), None)


def test_the_published_rules() -> None:
    loss = np.random.default_rng(0).normal(3.0, 0.1, 3000)
    loss[40], loss[300] = 5.0, 3.0 + 0.1 * 6.6
    assert np.flatnonzero(bench.olmo_core(run(loss))).tolist() == [300]
    loss[2000] = 3.0 + 0.1 * 9
    assert np.flatnonzero(bench.olmo_2(run(loss))).tolist() == [2000]
    loss[2500:2506] = 6.5
    assert np.flatnonzero(bench.kill_loss_spike(run(loss))).tolist() == list(range(2500, 2506))
    loss[1000:] += 8.0
    assert bench.kill_loss_spike(run(loss))[1200:].all()


def test_figures_count_alarms_before_the_onset_and_none_at_all_as_misses() -> None:
    healthy, lost = run(np.ones(100)), run(np.ones(100))._replace(onset=50)
    told = bench.figures([healthy, healthy, lost, lost, lost, lost], [None, 7, 60, 40, None, 52])
    assert (told.recall, told.false_alarms) == (0.5, 0.5) and told.delay == pytest.approx(0.3)
    assert len(told.mistakes) == 3
    assert bench.first_run(np.array([1, 0, 1, 1, 1, 0]) > 0, 3) == 4 and bench.first_run(np.zeros(2) > 0, 3) is None


def test_the_guard_is_ahead_of_the_rules(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On short curves of another seed, through the door."""
    monkeypatch.setattr(bench, "LONGEST", 1500)
    monkeypatch.setattr("sys.argv", ["bench_stability.py", "--curves", "60", "--seed", "11", "--json"])
    assert bench.main() == 0
    entries = json.loads(capsys.readouterr().out)
    assert len(entries) == 9 and all(set(one) == {"name", "ours", "peer", "ratio", "unit"} for one in entries)
    for one in entries:
        assert math.isfinite(one["ratio"])
        if "found" in one["name"] or "alone" in one["name"]:
            assert one["ours"] >= 96 and one["ours"] >= one["peer"]
