"""Resume bugs by their mark: Adam itself with each bug planted, and pulls made by the pretraining door."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import console
from gacha import definition
from pretrain import signatures

if TYPE_CHECKING:
    from tests.conftest import Pull

AT, STEPS = 120, 200


def adam(seed: int, fault: str, beta2: float, persistent: float, size: int = 2000) -> np.ndarray:
    """RMS of m / (sqrt(v) + eps) over STEPS updates of Adam (Kingma & Ba 2015) on gradients that partly persist."""
    draw = np.random.default_rng(seed)
    signal, m, v, count, told = draw.normal(size=size), np.zeros(size), np.zeros(size), 0, []
    for update in range(STEPS):
        if update == AT and fault == "optimizer_dropped":
            m, v, count = np.zeros(size), np.zeros(size), 0
        if update == AT and fault == "count_reset":
            count = 0
        gradient = math.sqrt(persistent) * signal + math.sqrt(1 - persistent) * draw.normal(size=size)
        m, v, count = 0.9 * m + 0.1 * gradient, beta2 * v + (1 - beta2) * gradient**2, count + 1
        step = m / (1 - 0.9**count) / (np.sqrt(v / (1 - beta2**count)) + 1e-8)
        told.append(math.sqrt(np.mean(step**2)))
    return np.array(told)


def losses(seed: int, restarted: bool = False) -> np.ndarray:
    """A loss that falls, and goes up and down with the difficulty of its batches."""
    draw = np.random.default_rng([9, seed])
    batches = draw.normal(scale=0.05, size=STEPS)
    if restarted:
        batches[AT:] = batches[: STEPS - AT]
    return 3 + 3 * np.exp(-np.arange(STEPS) / 40) + batches + draw.normal(scale=0.02, size=STEPS)


@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("kind", ["none", "optimizer_dropped", "count_reset"])
@pytest.mark.parametrize("told", [True, False], ids=["betas known", "betas unknown"])
def test_what_adam_forgot_shows_in_its_first_updates(kind: str, beta2: float, told: bool) -> None:
    step = np.arange(1, STEPS + 1)
    for seed, persistent in ((0, 0.0), (1, 0.1), (2, 0.2)):
        rms = adam(seed, kind, beta2, persistent)
        betas = {"beta1": 0.9, "beta2": beta2} if told else {}
        found = signatures.signature(step, losses(seed), np.ones(STEPS), rms, AT, **betas)
        assert found["kind"] == kind, found


def test_a_restarted_sampler_is_told_by_the_batches_that_come_again() -> None:
    step, calm = np.arange(1, STEPS + 1), np.full(STEPS, 0.25)
    for seed in range(5):
        found = signatures.signature(step, losses(seed, restarted=True), np.ones(STEPS), calm, AT)
        assert found["kind"] == "sampler_restarted" and found["evidence"]["repeats_from"] == 0
        assert signatures.signature(step, losses(seed), np.ones(STEPS), calm, AT)["kind"] == "none"
    late = losses(0)
    late[AT:] = late[40 : 40 + STEPS - AT] - 0.1
    assert signatures.signature(step, late, np.ones(STEPS), calm, AT)["evidence"]["repeats_from"] == 40


def test_what_was_not_logged_is_no_signature() -> None:
    step, unknown = np.arange(1, STEPS + 1), np.full(STEPS, math.nan)
    found = signatures.signature(step, losses(0), unknown, unknown, AT)
    assert found["kind"] == "none" and found["evidence"]["update_rms_ratio"] is None
    assert found["evidence"]["grad_norm_ratio"] is None
    assert signatures.signature(step, losses(0), unknown, unknown, STEPS)["evidence"]["correlation"] is None


def test_bugs_planted_in_a_pull_are_recognised_through_the_door(
    pull: Callable[..., "Pull"], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One pull with nothing at update 40, and then one bug after the other."""
    fault = "forget_moments@60,forget_count@110,restart_data@150"
    pull(tmp_path, offline=True, fault=fault, tokens=512 * 200, val_every=200, checkpoint_every=200)
    capsys.readouterr()
    found = {}
    for at in (40, 60, 110, 150):
        assert signatures.main([str(tmp_path), "--resumed_at", str(at), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        found[at] = told["pulls"][0]["kind"]
        assert sum(told["table"]["forget_moments"].values()) == 1
    assert found == {40: "none", 60: "optimizer_dropped", 110: "count_reset", 150: "sampler_restarted"}
    assert signatures.main([str(tmp_path)]) == 0, "at the first of the planted bugs"
    assert "optimizer_dropped" in capsys.readouterr().out


def test_a_pull_that_says_of_no_resumption_must_be_told_where(
    pull: Callable[..., "Pull"], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pull(tmp_path, offline=True)
    capsys.readouterr()
    with pytest.raises(console.UserError, match="give --resumed_at"):
        signatures.main([str(tmp_path)])


def test_the_zoo_is_every_bug_and_none_over_settings_and_seeds() -> None:
    sweep = definition.read(str(Path(__file__).parents[2] / "sweeps" / "resume_zoo.yaml"))
    cells: dict[tuple[object, ...], set[object]] = {}
    for point in sweep.points:
        cells.setdefault((point["fault"], point["lr"], point["beta2"]), set()).add(point["seed"])
    faults = {str(fault).partition("@")[0] for fault, _, _ in cells}
    assert faults == {"", "forget_moments", "forget_count", "restart_data"}
    assert len(cells) == 16 and all(len(seeds) == 5 for seeds in cells.values())
