"""Bad batches, forecasts and failures without a spike, on made-up runs whose truth is known."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gacha import definition, report
from pretrain import pretrain, siblings
from pretrain.siblings import Curve

STEPS = 300


def run(
    seed: int,
    order: int = 0,
    steps: int = STEPS,
    *,
    noise: float = 0.03,
    luck: float = 0.01,
    tails: float = 30.0,
    plus: np.ndarray | float = 0.0,
) -> Curve:
    """One seed's loss: a level, what the batches of a data order add, its own noise, and luck that it keeps."""
    own, data = np.random.default_rng([1, seed]), np.random.default_rng([2, order])
    step = np.arange(1, steps + 1)
    level = 3.0 + 4.3 * np.exp(-5 * np.sqrt(step / steps))
    batches = noise * data.standard_t(tails, steps)
    drift = luck * (own.normal() + 0.3 * np.cumsum(own.normal(size=steps)) / math.sqrt(steps))
    return Curve(f"s{seed}", step, level + batches + 0.3 * noise * own.standard_t(tails, steps) + drift + plus)


def spike(at: int, height: float, lasting: float = 0.01, steps: int = STEPS) -> np.ndarray:
    """A loss that jumps at the step `at` and comes back with a time constant in steps."""
    since = np.arange(1, steps + 1) - at
    return np.where(since >= 0, height * np.exp(-np.maximum(since, 0) / lasting), 0.0)


def test_bad_batches_of_eight_seeds_are_the_datas_and_a_lone_spike_is_not() -> None:
    """One batch hurts for a step, one for a dozen, one each seed otherwise; seed 3 has a spike of its own as well."""
    mine = np.random.default_rng(0)
    curves = []
    for seed in range(8):
        plus = spike(61, 1.5) + spike(121, 1.0, lasting=6) + spike(200, mine.uniform(0.3, 0.7), lasting=2)
        curves.append(run(seed, plus=plus + (spike(160, 0.8, lasting=4) if seed == 3 else 0)))
    for curve in curves:
        others = [other for other in curves if other is not curve]
        found = siblings.bad_batches(curve, others)
        assert [batch["step"] for batch in found] == [61, 121, 200]
        assert all(batch["siblings_hit"] == batch["siblings_with_step"] == 7 for batch in found)
        assert all(batch["p"] < 1e-9 for batch in found)
        assert [batch["excess"] for batch in found[:2]] == pytest.approx([1.5, 1.0], abs=0.15)
        assert 126 <= found[1]["until"] <= 150, "the whole excursion is the batch's"
        alone = siblings.attributed(siblings.residuals(curve), [siblings.residuals(other) for other in others])
        assert [event["step"] for event in alone if event["p"] == 1] == ([160] if curve.name == "s3" else [])


def test_one_sibling_is_enough_where_the_coincidence_is_no_chance() -> None:
    spiky = [run(seed, plus=spike(61, 1.5) + spike(200, 1.0)) for seed in (0, 1)]
    assert [batch["step"] for batch in siblings.bad_batches(spiky[0], spiky[1:])] == [61, 200]
    longer = run(2, steps=STEPS, plus=spike(61, 1.5))
    shorter = Curve("", longer.step[:100], longer.loss[:100])
    (batch,) = siblings.bad_batches(spiky[0], [shorter])
    assert batch["step"] == 61 and batch["siblings_with_step"] == 1
    assert siblings.bad_batches(spiky[0], []) == []
    much_more = run(1, plus=spike(61, 15.0))
    assert siblings.bad_batches(spiky[0], [much_more]) == [], "a batch does the like to all"


def test_what_spikes_often_meets_by_chance() -> None:
    """A twentieth of one sibling's steps are outliers: that it has one at the same step says nothing."""
    often = np.random.default_rng(5).random(STEPS) < 0.05
    often[199] = True
    restless = run(1, plus=np.where(often, 1.0, 0.0))
    assert siblings.bad_batches(run(0, plus=spike(200, 1.0)), [restless]) == []
    assert siblings.bad_batches(run(0, plus=spike(200, 1.0)), [restless, run(2, plus=spike(200, 1.0))])


def test_heavy_tails_of_other_data_orders_are_not_bad_batches() -> None:
    """Student's t with 2 degrees of freedom: every run has outliers, and next to none is called the data's."""
    curves = [run(seed, order=seed, steps=2000, tails=2.0) for seed in range(8)]
    rests = [siblings.residuals(curve) for curve in curves]
    told = [e for i, own in enumerate(rests) for e in siblings.attributed(own, rests[:i] + rests[i + 1 :])]
    assert len(told) > 50
    assert sum(event["p"] < siblings.CHANCE for event in told) <= 0.03 * len(told)


def test_forecast_of_healthy_seeds_holds_its_rates() -> None:
    """Groups of 3, 5 and 9 seeds, each left out once: 95% bands cover 93 to 97% and almost no run is alarmed."""
    inside, alarms, runs = [], 0, 0
    for group, size in enumerate((3, 5, 9) * 12):
        curves = [run(100 * group + i, order=100 * group + (i if group % 2 else 0)) for i in range(size)]
        for curve in curves:
            told = siblings.forecast(curve, [other for other in curves if other is not curve])
            inside.append(abs(told["evidence"]["end_z"]) < 1.96)
            alarms += told["step"] is not None
            runs += 1
    assert 0.91 < np.mean(inside) < 0.99, "of some 200 ends, so within two standard errors"
    assert alarms < 0.02 * runs


@pytest.mark.parametrize("size", [3, 8])
def test_a_run_that_learns_slowly_is_flagged_without_a_spike(size: int) -> None:
    others = [run(seed) for seed in range(size)]
    slow = run(99, plus=0.4 * np.minimum(1.0, np.arange(STEPS) / 30))
    told = siblings.forecast(slow, others)
    assert told["step"] is not None and told["step"] <= 0.2 * STEPS
    assert told["relative"] > siblings.MATTERS and told["evidence"]["end_excess_nats"] == pytest.approx(0.4, abs=0.05)
    assert not told["evidence"]["back"]
    late = siblings.forecast(run(99, plus=np.where(np.arange(STEPS) > 150, 0.4, 0.0)), others)
    assert 150 < late["step"] < 200
    drift = siblings.forecast(run(99, plus=np.linspace(0, 0.5, STEPS)), others)
    assert drift["step"] is not None and drift["step"] < 200
    back = siblings.forecast(run(99, plus=spike(60, 1.0, lasting=30)), others)
    assert back["step"] is not None and back["evidence"]["back"]
    assert siblings.forecast(run(99, plus=spike(60, 3.0, lasting=2)), others)["step"] is None, "a spike is no level"
    assert siblings.forecast(run(99, plus=-0.4), others)["step"] is None, "better is no failure"


def test_failed_siblings_do_not_hide_a_failure() -> None:
    others = [run(seed) for seed in range(6)] + [run(50 + i, plus=0.4) for i in range(2)]
    assert siblings.forecast(run(99, plus=0.4), others)["step"] is not None
    assert siblings.forecast(run(98), others)["step"] is None


def test_one_sibling_flags_only_what_is_beyond_any_scatter() -> None:
    step = np.arange(200, 4200, 200)
    good = Curve("good", step, 3.7 + 5.5 * np.exp(-step / 500))
    lost = Curve("lost", step, np.maximum(good.loss, 8.4 + 0.1 * np.sin(step)))
    told = siblings.forecast(lost, [good])
    assert told["step"] is not None and told["step"] <= 1000 and told["excess_nats"] > 1
    for share in (0.97, 1.05):
        assert siblings.forecast(Curve("other recipe", step, share * good.loss), [good])["step"] is None


def test_curves_of_other_steps_and_laws_are_siblings_too() -> None:
    law = Curve("law", np.array([10.0, 40.0, 90.0, 160.0, 300.0]), np.array([4.7, 3.7, 3.28, 3.11, 3.03]))
    assert siblings.forecast(run(0), [law])["step"] is None
    assert siblings.forecast(run(0, plus=3.0), [law])["step"] is not None
    others = [run(seed) for seed in range(1, 5)]
    thinned = Curve("", run(0).step[4::5], run(0).loss[4::5])
    assert siblings.forecast(thinned, others)["step"] is None
    beyond = Curve("", np.arange(1000, 1100), np.full(100, 3.0))
    assert siblings.forecast(beyond, others)["z"] is None
    assert siblings.forecast(run(0), [])["step"] is None


@pytest.mark.filterwarnings("error")
def test_copies_of_one_run_and_losses_of_zero_are_compared_too() -> None:
    copies = [run(0)] * 5
    assert siblings.forecast(run(0), copies)["step"] is None
    assert siblings.forecast(run(0, plus=0.4), copies)["step"] is not None
    learned_by_heart = Curve("", run(0).step, np.zeros(STEPS))
    assert siblings.forecast(learned_by_heart, [learned_by_heart] * 5)["step"] is None
    assert siblings.bad_batches(learned_by_heart, [learned_by_heart]) == []


def test_losses_that_are_not_finite_are_passed_over() -> None:
    curve = run(0)
    curve.loss[[3, 50, 299]] = [math.nan, math.inf, math.nan]
    others = [run(seed) for seed in range(1, 4)]
    assert siblings.forecast(curve, others)["step"] is None
    assert siblings.bad_batches(curve, others) == []
    empty = Curve("", np.arange(3), np.full(3, math.nan))
    assert siblings.forecast(empty, others)["z"] is None and siblings.bad_batches(empty, others) == []


def test_planted_batches_of_real_pulls_are_told_in_the_report(
    tiny_flags: dict[str, Any],
    as_argv: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three seeds on one data order meet random tokens at data step 45."""
    import wandb

    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = {**tiny_flags, "tokens": 512 * 60, "val_every": 60, "checkpoint_every": 60}
    wandb.teardown()
    try:
        assert pretrain.main(as_argv(flags, out=tmp_path, seed="0..2", data_seed=0, fault="batch@45")) == 0
    finally:
        wandb.teardown()
    capsys.readouterr()
    assert report.main([str(tmp_path), "--out", str(tmp_path / "report.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["siblings"]
    (batch,) = told["bad_batches"]
    assert batch["step"] == 46 and len(batch["runs"]) == batch["of"] == 3 and batch["excess"] > 0.5
    assert told["alone"] == [] and told["above"] == []


def test_the_sweep_of_bad_batches_is_eight_seeds_on_one_data_order() -> None:
    sweep = definition.read(str(Path(__file__).parents[2] / "sweeps" / "bad_batches.yaml"))
    assert sorted(int(str(point["seed"])) for point in sweep.points) == list(range(8))
    assert {point["data_seed"] for point in sweep.points} == {0}
    assert {str(point["fault"]).count("@") for point in sweep.points} == {3}
