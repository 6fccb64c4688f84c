"""The guard on synthetic curves: every divergence is caught soon, no healthy pull is ever stopped."""

import json
import math
from typing import Any

import numpy as np
import pytest

from pretrain.stability import MAX_EVENTS, Event, Guard, Verdict

SEEDS = range(6)
LENGTHS = [60, 200, 1000]


def learning(steps: int, rng: np.random.Generator, tails: float = math.inf) -> np.ndarray:
    """A power law from 7.5 towards 2.5 nats with noise of 0.03, Gaussian or Student's t with `tails` degrees."""
    noise = rng.normal(0, 0.03, steps) if math.isinf(tails) else rng.standard_t(tails, steps) * 0.03
    return 2.5 + 5.0 * (1 + 40 * np.arange(steps) / steps) ** -0.6 + noise


def watch(losses: np.ndarray, norms: np.ndarray | None = None) -> tuple[Verdict | None, Guard]:
    guard = Guard(len(losses))
    for step, loss in enumerate(losses.tolist()):
        if verdict := guard.observe(step, loss, 1.0 if norms is None else float(norms[step])):
            return verdict, guard
    return guard.at_the_end(len(losses)), guard


def kinds(guard: Guard) -> list[str]:
    return [event.kind for event in guard.events]


def healthy(kind: str, steps: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, steps])
    loss = learning(steps, rng, tails=2.5 if kind == "heavy tails" else math.inf)
    at = int(rng.integers(steps // 4, 3 * steps // 4))
    later = np.arange(steps - at)
    if kind == "noisy":
        loss += rng.normal(0, 0.3, steps)
    elif kind == "learning rate decays":
        loss[at:] -= 0.4 * (1 - np.exp(-later / (steps / 20)))
    elif kind == "learning rate steps":
        loss[at:] -= 0.4
    elif kind == "bad batches":
        loss[rng.choice(np.arange(20, steps), steps // 40, replace=False)] += rng.uniform(1, 8, steps // 40)
    elif kind == "short spike":
        loss[at : at + 6] += 2.0
    elif kind == "another mixture":
        loss[at:] += 0.5
    elif kind == "memorised":
        loss[at:] = np.maximum(0.05, loss[at:] * np.exp(-later / (steps / 10)))
    elif kind == "spike that recovers slowly":
        loss[at:] += 3.0 * np.exp(-later / max(12, steps / 50))
    elif kind == "converged":
        loss = 2.5 + rng.normal(0, 0.1, steps)
    elif kind == "warm-up":
        loss[: steps // 20] += np.hanning(steps // 20) * 0.8
    return loss


HARMLESS = [
    "plain",
    "noisy",
    "heavy tails",
    "learning rate decays",
    "learning rate steps",
    "bad batches",
    "short spike",
    "another mixture",
    "memorised",
    "spike that recovers slowly",
    "converged",
    "warm-up",
]


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("kind", HARMLESS)
def test_a_healthy_pull_is_never_stopped(kind: str, steps: int) -> None:
    for seed in SEEDS:
        verdict, guard = watch(healthy(kind, steps, seed))
        assert verdict is None, f"seed {seed}: {verdict}"
        if kind == "plain":
            assert (guard.spikes, guard.status, guard.events) == (0, "healthy", [])


def test_another_mixture_is_a_level_shift_even_where_it_costs_a_third_of_what_was_learned() -> None:
    """Clean and quiet, it is a new trend; as loud as a divergence, it is one."""
    for seed in SEEDS:
        loss = learning(3000, np.random.default_rng(seed))
        loss[1500:] += 1.4
        verdict, guard = watch(loss)
        shifts = [event for event in guard.events if event.kind == "level_shift"]
        assert verdict is None and [event.step for event in shifts] == [1500] and guard.status == "healthy"
        loss[1500:] += np.random.default_rng(seed).normal(0, 0.3, 1500)
        verdict, _ = watch(loss)
        assert verdict and verdict.kind == "divergence"


def test_spikes_that_return_are_events_and_so_are_bad_batches() -> None:
    """Two excursions of six steps are two spikes; 32 single bad batches are outliers."""
    for seed in SEEDS:
        loss = learning(1000, np.random.default_rng(seed))
        loss[300:306] += 2.0
        loss[700:706] += 2.0
        guard = watch(loss)[1]
        assert guard.spikes == 2 and kinds(guard) == ["spike", "spike"]
        assert [event.step for event in guard.events] == [300, 700]
        first = guard.events[0]
        assert first.evidence["recovered"] == "fast" and first.recovered_step and 306 <= first.recovered_step <= 309
        assert float(first.evidence["excess"]) == pytest.approx(2.0, abs=0.2)
        loss = learning(1000, np.random.default_rng(seed))
        loss[200:1000:25] += 2.0
        guard = watch(loss)[1]
        assert guard.spikes == 0 and kinds(guard) == ["outlier"] * 32


def test_a_spike_that_takes_long_recovers_slowly() -> None:
    loss = healthy("spike that recovers slowly", 3000, 0)
    guard = watch(loss)[1]
    assert [event.evidence["recovered"] for event in guard.events if event.kind == "spike"] in (
        ["slowly"],
        ["not_wholly"],
    )


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
    assert told[299] == told[320] == ("healthy", -1) and told[305] == ("suspect", 300)


def diverging(kind: str, steps: int, seed: int) -> tuple[np.ndarray, int]:
    """The curve and the step from which it does not come back."""
    rng = np.random.default_rng([seed, steps])
    loss, patience = learning(steps, rng), Guard(steps).patience
    at = int(rng.integers(1, 10) if kind == "at once" else rng.integers(steps // 3, steps - 4 * patience))
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
def test_a_loss_that_rises_and_stays_is_caught_within_five_patiences(kind: str, steps: int) -> None:
    """And its onset is told no more than half a patience late, so that a good checkpoint is known."""
    for seed in SEEDS:
        loss, at = diverging(kind, steps, seed)
        verdict, guard = watch(loss)
        assert verdict and verdict.kind == "divergence", f"seed {seed}: from step {at}: missed"
        assert at < verdict.step <= at + 5 * guard.patience
        assert at <= verdict.onset_step <= at + guard.patience // 2, f"seed {seed}: from step {at}: {verdict}"
        assert (guard.events[-1].kind, guard.events[-1].step) == ("divergence", verdict.onset_step)


def test_a_slow_rise_without_a_spike_is_an_event_and_then_a_divergence() -> None:
    for seed in SEEDS:
        loss = learning(4000, np.random.default_rng(seed))
        loss[2000:] += np.minimum(3.0, np.arange(2000) / 300)
        verdict, guard = watch(loss)
        assert verdict and verdict.kind == "divergence" and 2000 < verdict.step < 2700
        drift = [event for event in guard.events if event.kind == "drift"]
        assert len(drift) == 1 and 2000 < drift[0].step < verdict.step


def test_a_divergence_is_told_once_and_is_over_when_the_loss_returns() -> None:
    loss = learning(1000, np.random.default_rng(0))
    loss[400:600] += 4.0
    guard = Guard(1000)
    verdicts = [guard.observe(step, value, 1.0) for step, value in enumerate(loss.tolist())]
    assert [one.kind for one in verdicts if one] == ["divergence"] and guard.status == "healthy"
    over = [event.recovered_step for event in guard.events if event.kind == "divergence"]
    assert over[0] and 600 <= over[0] <= 600 + guard.patience


def test_a_pull_that_learns_nothing_is_stopped_only_where_that_is_certain() -> None:
    """Flat at 7.5 nats for a fifth of the budget: lost. Learning slowly: not for us to say."""
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        verdict, guard = watch(7.5 + rng.normal(0, 0.1, 1000))
        assert verdict and verdict.kind == "not_learning" and verdict.step <= 400 and kinds(guard) == ["not_learning"]
        assert watch(7.5 - 1.5 * np.linspace(0, 1, 1000) ** 0.7 + rng.normal(0, 0.05, 1000))[0] is None


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
        assert guard.observe(at + 1, bad, 1.0) is None and kinds(guard) == ["nonfinite"]
        for step in range(3):
            guard.observe(at + 2 + step, loss[at], 1.0)
        assert guard.events[0].recovered_step == at + 4 and guard.observe(at + 5, bad, 1.0)


def test_an_explosion_that_ends_in_nan_began_where_the_loss_left_its_trend() -> None:
    loss = learning(600, np.random.default_rng(0))
    loss[300:310] += np.arange(1, 11) * 2.0
    loss[310] = math.nan
    verdict, _ = watch(loss)
    assert verdict and (verdict.kind, verdict.step, verdict.onset_step) == ("nonfinite", 310, 300)


@pytest.mark.parametrize("signal", ["grad_norm", "update_rms", "max_logit"])
def test_a_signal_that_leaves_its_trend_before_the_loss_is_the_warning(signal: str) -> None:
    """Four steps ahead, as BLOOM's gradient norm was; signals that come every second step are heard like the others."""
    loss = learning(600, np.random.default_rng(0))
    loss[300:400] += 3.0
    guard, verdict = Guard(600), None
    rng = np.random.default_rng(1)
    for step, value in enumerate(loss.tolist()):
        told: dict[str, float | None] = {"grad_norm": 1.0, "update_rms": 0.2, "max_logit": 8.0}
        told = {name: (x or 0) * float(np.exp(rng.normal(0, 0.1))) for name, x in told.items()}
        if 296 <= step < 400:
            told[signal] = (told[signal] or 0) * 20
        if step % 2:
            told |= {"update_rms": None, "max_logit": None}
        verdict = verdict or guard.observe(step, value, told.pop("grad_norm"), **told)
    lost = next(event for event in guard.events if event.kind == "divergence")
    assert verdict and (lost.step, lost.warn_step) == (300, 296)
    warning = next(event for event in guard.events if event.kind == "warning")
    assert (warning.step, warning.evidence["signal"]) == (296, signal)


def test_limits_of_the_next_update_are_above_noise_and_below_damage() -> None:
    """No limit while the trend is young; then noise with heavy tails passes, and a corrupted batch does not."""
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        loss, norms = learning(2000, rng, tails=2.5), np.exp(rng.standard_t(4, 2000) * 0.15)
        guard, over = Guard(2000), 0
        for step, (value, norm) in enumerate(zip(loss.tolist(), norms.tolist(), strict=True)):
            limits = guard.limits()
            if step < 32:
                assert limits == (math.inf, math.inf)
            else:
                over += value > limits[0] or norm > limits[1]
            if step > 200:
                assert limits[0] < value + 2.0 and limits[1] < 20.0
            guard.observe(step, value, norm)
        assert over <= 10


@pytest.mark.parametrize("curve", ["short spike", "jumps", "another mixture", "noisy"])
def test_a_guard_from_a_checkpoint_goes_on_identically(curve: str) -> None:
    """state() through JSON at any step: the same z-scores, spikes and verdict as the guard that never stopped."""
    loss = diverging(curve, 200, 1)[0] if curve == "jumps" else healthy(curve, 200, 1)
    norms = np.exp(np.random.default_rng(0).normal(0, 0.1, 200))
    norms[100:110] *= 50

    def told(guard: Guard, step: int) -> tuple[Any, ...]:
        verdict = guard.observe(step, float(loss[step]), float(norms[step]), max_logit=float(norms[step]) * 3)
        return (verdict, guard.loss_z, guard.spikes, guard.status, guard.suspect_since, guard.limits())

    guard = Guard(200)
    whole = [told(guard, step) for step in range(200)]
    last = guard.state()
    for cut in range(0, 200, 22):
        guard = Guard(200)
        for step in range(cut):
            told(guard, step)
        guard = Guard(**json.loads(json.dumps(guard.state())))
        assert [told(guard, step) for step in range(cut, 200)] == whole[cut:] and guard.state() == last


def test_memory_is_bounded_and_forgets_outliers_first() -> None:
    loss = learning(20_000, np.random.default_rng(0))
    loss[100::20] += 3.0
    loss[400:406] += 3.0
    guard = watch(loss)[1]
    assert len(guard.events) == MAX_EVENTS and guard.events[0].kind == "spike"
    assert isinstance(guard.events[0], Event) and len(json.dumps(guard.state())) < 200_000
