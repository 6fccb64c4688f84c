"""The guard on synthetic curves: every divergence is caught soon, no healthy pull is ever stopped."""

import json
import math
from typing import Any

import numpy as np
import pytest

from pretrain.stability import Guard, Verdict

SEEDS = range(6)
LENGTHS = [60, 200, 1000]


def learning(steps: int, rng: np.random.Generator, tails: float = math.inf) -> np.ndarray:
    """A power law from 7.5 towards 2.5 nats with noise of 0.03, Gaussian or Student's t with `tails` degrees."""
    noise = rng.normal(0, 0.03, steps) if math.isinf(tails) else rng.standard_t(tails, steps) * 0.03
    return 2.5 + 5.0 * (1 + 40 * np.arange(steps) / steps) ** -0.6 + noise


def watch(losses: np.ndarray) -> tuple[Verdict | None, Guard]:
    guard = Guard(len(losses))
    for step, loss in enumerate(losses.tolist()):
        if verdict := guard.observe(step, loss, 1.0):
            return verdict, guard
    return None, guard


def healthy(kind: str, steps: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, steps])
    loss = learning(steps, rng, tails=2.5 if kind == "heavy tails" else math.inf)
    at = int(rng.integers(steps // 4, 3 * steps // 4))
    later = np.arange(steps - at)
    if kind == "noisy":
        loss += rng.normal(0, 0.3, steps)
    elif kind == "learning rate decays":
        loss[at:] -= 0.4 * (1 - np.exp(-later / (steps / 20)))
    elif kind == "bad batches":
        loss[rng.choice(np.arange(20, steps), steps // 40, replace=False)] += rng.uniform(1, 8, steps // 40)
    elif kind == "short spike":
        loss[at : at + 6] += 2.0
    elif kind == "another mixture":
        loss[at:] += 0.5
    elif kind == "memorised":
        loss[at:] = np.maximum(0.05, loss[at:] * np.exp(-later / (steps / 10)))
    elif kind == "spike that recovers slowly":
        loss[at:] += 3.0 * np.exp(-later / Guard(steps).patience)
    elif kind == "learns nothing":
        loss = 7.5 + rng.normal(0, 0.1, steps)
    return loss


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "noisy",
        "heavy tails",
        "learning rate decays",
        "bad batches",
        "short spike",
        "another mixture",
        "memorised",
        "spike that recovers slowly",
        "learns nothing",
    ],
)
def test_a_healthy_pull_is_never_stopped(kind: str, steps: int) -> None:
    for seed in SEEDS:
        verdict, guard = watch(healthy(kind, steps, seed))
        assert verdict is None, f"seed {seed}: {verdict}"
        if kind == "plain":
            assert (guard.spikes, guard.status) == (0, "healthy")


def test_spikes_that_return_are_counted_and_bad_batches_are_not() -> None:
    """Two excursions of six steps are two spikes; 36 single bad batches are none."""
    for seed in SEEDS:
        loss = learning(1000, np.random.default_rng(seed))
        loss[300:306] += 2.0
        loss[700:706] += 2.0
        assert watch(loss)[1].spikes == 2
        loss = learning(1000, np.random.default_rng(seed))
        loss[100:1000:25] += 2.0
        assert watch(loss)[1].spikes == 0


def test_the_guard_says_where_it_stands() -> None:
    """healthy, spiking, suspect if the level itself has left, healthy; what was saved since its first step is not."""
    loss = learning(600, np.random.default_rng(0))
    loss[300:306] += 2.0
    guard, told = Guard(600), {}
    for step, value in enumerate(loss.tolist()):
        assert guard.observe(step, value, 1.0) is None
        told[step] = (guard.status, guard.suspect_since)
        if step in (300, 305):
            assert guard.loss_z > 6
    assert told[299] == told[320] == ("healthy", -1) and told[302] == ("spiking", 300) and told[305] == ("suspect", 300)


def diverging(kind: str, steps: int, seed: int) -> tuple[np.ndarray, int]:
    """The curve and the step from which it does not come back."""
    rng = np.random.default_rng([seed, steps])
    loss, patience = learning(steps, rng), Guard(steps).patience
    at = int(rng.integers(1, 10) if kind == "at once" else rng.integers(steps // 3, steps - 3 * patience))
    later = np.arange(steps - at)
    if kind == "jumps":
        loss[at:] += 4.0
    elif kind == "climbs":
        loss[at:] += np.minimum(4.0, 8.0 * later / patience)
    elif kind == "explodes":
        loss[at:] += 0.5 * np.exp(np.minimum(later, 30) / 3)
    elif kind == "forgets everything":
        loss[at:] = 7.5 + rng.normal(0, 0.05, steps - at)
    elif kind == "settles too high":
        loss[at:] += 2.0 + 6.0 * np.exp(-later / patience)
    elif kind == "turns noisy":
        loss[at:] += 3.0 + rng.normal(0, 1.0, steps - at)
    elif kind == "at once":
        loss[at:] = 12.0 + rng.normal(0, 1.0, steps - at)
    return loss, at


@pytest.mark.parametrize("steps", LENGTHS[1:])
@pytest.mark.parametrize(
    "kind",
    ["jumps", "climbs", "explodes", "forgets everything", "settles too high", "turns noisy", "at once"],
)
def test_a_loss_that_rises_and_stays_is_caught_within_three_patiences(kind: str, steps: int) -> None:
    """And its onset is told no more than half a patience late, so that a good checkpoint is known."""
    for seed in SEEDS:
        loss, at = diverging(kind, steps, seed)
        verdict, guard = watch(loss)
        assert verdict and verdict.kind == "left_trend", f"seed {seed}: from step {at}: missed"
        assert at < verdict.step <= at + 3 * guard.patience
        assert at <= verdict.onset_step <= at + guard.patience // 2, f"seed {seed}: from step {at}: {verdict}"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "grad_norm"])
def test_what_is_not_finite_ends_the_pull_at_that_step(bad: float, where: str) -> None:
    loss = learning(100, np.random.default_rng(0)).tolist()
    for at in (0, 1, 15, 16, 63, 99):
        guard = Guard(100)
        for step in range(at):
            assert guard.observe(step, loss[step], 1.0) is None
        verdict = guard.observe(at, bad if where == "loss" else loss[at], bad if where == "grad_norm" else 1.0)
        assert verdict and (verdict.kind, verdict.step, verdict.onset_step) == ("nonfinite", at, at)
        assert str(bad) in str(verdict) and "\n" not in str(verdict)


def test_an_explosion_that_ends_in_nan_began_where_the_loss_left_its_trend() -> None:
    loss = learning(600, np.random.default_rng(0))
    loss[300:312] += np.arange(1, 13) * 2.0
    loss[312] = math.nan
    verdict, _ = watch(loss)
    assert verdict and (verdict.kind, verdict.step, verdict.onset_step) == ("nonfinite", 312, 300)


@pytest.mark.parametrize("curve", ["short spike", "jumps"])
def test_a_guard_from_a_checkpoint_goes_on_identically(curve: str) -> None:
    """state() through JSON at any step: the same z-scores, spikes and verdict as the guard that never stopped."""
    loss = diverging(curve, 200, 1)[0] if curve == "jumps" else healthy(curve, 200, 1)

    def told(guard: Guard, verdict: Verdict | None) -> tuple[Any, ...]:
        return (verdict, guard.loss_z, guard.spikes, guard.status, guard.suspect_since)

    whole, guard = [], Guard(200)
    for step, value in enumerate(loss.tolist()):
        whole.append(told(guard, guard.observe(step, value, 1.0)))
    for cut in range(0, 200, 7):
        guard = Guard(200)
        for step in range(cut):
            guard.observe(step, float(loss[step]), 1.0)
        guard = Guard(**json.loads(json.dumps(guard.state())))
        again = [told(guard, guard.observe(step, float(loss[step]), 1.0)) for step in range(cut, 200)]
        assert again == whole[cut:]
