"""PPO on tasks whose optimum is known, its arithmetic against plain loops, and the same bits after a stop."""

import copy
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import console
from gacha import runs
from posttrain import chat, gae, models, ppo, rollout, scoring, sft, stage
from tests.posttrain import small_task, word_model
from tests.posttrain.word_model import WORDS, asked, said, write

ASKS = {"alpha": "one", "beta": "two", "gamma": "one"}
FLAGS: dict[str, Any] = {
    "rewards": "exact=1",
    "batch_size": 48,
    "minibatches": 2,
    "max_new_tokens": 4,
    "max_length": 32,
    "value_lr": 1e-2,
    "samples": 0,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers every question with one of four words, about equally often."""
    folder = tmp_path_factory.mktemp("base")
    word_model.make(folder / "model")
    rows = [{"messages": asked(ask) + said(word)} for ask in ASKS for word in WORDS[4:8]]
    more: dict[str, Any] = {
        "model": folder / "model",
        "data": write(folder / "rows.jsonl", rows),
        "max_steps": 100,
        "log_every": 50,
    }
    return small_task.train(sft.main, folder / "runs", **more, batch_size=12, device="cpu").folder / "model"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": asked(ask), "reference": answer} for ask, answer in ASKS.items()]
    return write(tmp_path_factory.mktemp("task") / "rows.jsonl", rows)


def train(out: Path, base: Path, task: Path, **flags: Any) -> small_task.Trained:
    return small_task.train(ppo.main, out, model=base, data=task, **{**FLAGS, **flags})


# --- learning --------------------------------------------------------------------------------------------------------
def test_a_bandit_reaches_the_optimum_in_closed_form(tmp_path: Path, base: Path, task: Path) -> None:
    """One token an answer: the best policy under a price of beta a nat is pi_ref exp(r / beta), normalised."""
    beta = 0.3
    sizes = {"max_new_tokens": 1, "batch_size": 96, "minibatches": 1, "max_steps": 80, "lr": 3e-3}
    run = train(tmp_path, base, task, kl_coef=beta, eos_penalty=0, schedule="linear", log_every=50, **sizes)
    assert run.code == 0
    (before, tokenizer), (after, _) = models.load(base), models.load(run.folder / "model")
    for ask, answer in ASKS.items():
        ids = torch.tensor([chat.encode_prompt(tokenizer, asked(ask))])
        with torch.no_grad():
            start, end = (model(ids).logits[0, -1].softmax(-1) for model in (before, after))
        words = [tokenizer.decode([i], skip_special_tokens=True) for i in range(len(start))]
        reward = torch.tensor([float(scoring.score(word, answer).exact) for word in words])
        best = start * torch.exp(reward / beta)
        best /= best.sum()
        away, left = (0.5 * float((best - one).abs().sum()) for one in (start, end))  # total variation
        assert away > 0.5 and left < 0.02, (ask, away, left)


@pytest.mark.parametrize(("rank", "lr"), [(0, 5e-4), (8, 1e-3)])
def test_answers_become_right_for_their_prompts(tmp_path: Path, base: Path, task: Path, rank: int, lr: float) -> None:
    more = {"watch_data": task, "watch_every": 10, "kl_coef": 0.05, "lora_rank": rank, "value_warmup": 2}
    run = train(tmp_path, base, task, offline=True, max_steps=40, lr=lr, **more)
    assert run.code == 0 and run.result["status"] == "ok"
    assert run.result["eval/exact_match"] == 1
    (record,) = runs.read(tmp_path)
    assert record.job_type == "ppo" and record.summary["eval/exact_match"] == run.result["eval/exact_match"]
    told = {name: series.value for name, series in record.history.items()}
    assert told["reward/exact"][-10:].mean() > 0.6 > 0.35 > told["reward/exact"][:2].mean()
    assert abs(told["policy/kl"][:3]).max() < 1e-6  # the value model alone has learnt
    assert told["policy/kl"][-1] > 0.1 and told["policy/entropy"][-1] < told["policy/entropy"][0]
    assert told["ppo/explained_variance"][-1] > told["ppo/explained_variance"][0]
    assert told["ppo/ratio"] == pytest.approx(1, abs=0.1) and told["ppo/clip_fraction"].max() < 0.5
    assert (told["ppo/kl_coef"] == pytest.approx(0.05)) and told["ppo/value_loss"].min() >= 0
    assert models.find(str(run.folder)).name == "model"


def test_a_broken_run_ends_as_diverged(tmp_path: Path, base: Path, task: Path) -> None:
    run = train(tmp_path, base, task, max_steps=8, lr=1e18, watch_data=task, watch_every=0, samples=2)
    assert run.code == console.EXIT_DIVERGED and run.result["stop_reason"] in ("nonfinite", "kl_blowup")


def test_a_stopped_run_goes_on_with_the_same_bits(
    tmp_path: Path, base: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {
        "max_steps": 6,
        "lr": 3e-4,
        "checkpoint_every": 2,
        "kl_target": 0.5,
        "kl_horizon": 100,
        "schedule": "linear",
    }
    whole = train(tmp_path / "whole", base, task, **flags)
    plain = stage.Run.log
    coefficients: list[float] = []

    def stop_at_three(run: stage.Run, row: Any) -> None:
        plain(run, row)
        coefficients.append(row["ppo/kl_coef"])
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(stage.Run, "log", stop_at_three)
        assert train(tmp_path / "parts", base, task, **flags).code == 143
    again = train(tmp_path / "parts", base, task, **flags)
    assert again.code == 0 and again.weights == whole.weights and again.result["step"] == 6
    assert len(set(coefficients)) == 3  # it was adapted
    other = train(tmp_path / "other", base, task, **flags, sample_seed=9)
    assert other.weights != whole.weights


@pytest.mark.parametrize(
    ("flags", "said_so"),
    [
        ({"minibatches": 5}, "--minibatches 5 must divide --batch_size 48"),
        ({"ppo_epochs": 0}, "--ppo_epochs 0"),
        ({"kl_coef": -1}, "--kl_coef -1"),
        ({"kl_target": 1, "kl_horizon": 1}, "--kl_target: needs"),
        ({"gamma": 1.5}, "--gamma 1.5"),
        ({"clip": 0}, "--clip 0"),
        ({"rewards": "best=1"}, "no reward 'best'"),
        ({"rewards": "fulfils=1"}, "fulfils needs references"),
        ({"max_length": 5}, "no prompt leaves room"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, base: Path, task: Path, flags: dict[str, Any], said_so: str) -> None:
    with pytest.raises(console.UserError, match=said_so) as caught:
        train(tmp_path, base, task, **{"max_steps": 1, **flags})
    assert "\n" not in str(caught.value)


# --- rollouts --------------------------------------------------------------------------------------------------------
def test_padded_completions_have_the_probabilities_of_single_ones(base: Path) -> None:
    model, tokenizer = models.load(base)
    chat.install_template(tokenizer, model)
    prompts = [asked("alpha"), asked("beta gamma delta alpha"), asked("gamma")] * 4
    batch, again, other = (rollout.sample(model, tokenizer, prompts, 4, seed) for seed in (1, 1, 2))
    assert torch.equal(batch.ids, again.ids) and not torch.equal(batch.ids, other.ids)
    told = rollout.look_back(model, copy.deepcopy(model), ppo.ValueModel(model.base_model, 32), batch, 5)
    for row, prompt in enumerate(prompts):
        mine = batch.ids[row, -batch.width :][batch.mask[row]]
        ends = mine == tokenizer.eos_token_id
        assert not ends[:-1].any() and bool(ends[-1]) == bool(batch.ended[row])
        ids = torch.tensor([[*chat.encode_prompt(tokenizer, prompt), *mine.tolist()]])
        with torch.no_grad():
            every = model(ids).logits[0, -len(mine) - 1 : -1].log_softmax(-1)
        alone = every.gather(-1, mine[:, None])[:, 0]
        assert torch.allclose(told["logp"][row][batch.mask[row]], alone, atol=1e-5)
        assert torch.allclose(told["entropy"][row][batch.mask[row]], -(every.exp() * every).sum(-1), atol=1e-5)
        assert torch.equal(told["logp"][row], told["ref"][row]) and not told["logp"][row][~batch.mask[row]].any()


def test_every_row_is_drawn_once_a_pass() -> None:
    steps = [ppo.drawn(step, 4, 6, seed=3) for step in (1, 2, 3)]
    flat = [i for step in steps for i in step]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list(range(6)) and flat[:6] != flat[6:]
    assert steps[1] == ppo.drawn(2, 4, 6, seed=3)


# --- arithmetic ------------------------------------------------------------------------------------------------------
def random_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rewards, values, mask) of five answers of one to four tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(4) < torch.tensor([1, 4, 2, 3, 4])[:, None]
    rewards_, values = (torch.randn(5, 4, generator=generator) for _ in range(2))
    return rewards_ * mask, values, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_are_a_plain_loops(gamma: float, lam: float) -> None:
    earned, values, mask = random_batch()
    advantages, returns = gae.generalised_advantages(earned, values, mask, gamma, lam)
    for row in range(len(earned)):
        n = int(mask[row].sum())
        r, v = earned[row, :n].tolist(), [*values[row, :n].tolist(), 0.0]
        for t in range(n):
            wanted = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, n))
            assert advantages[row, t].item() == pytest.approx(wanted, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(wanted + v[t], abs=1e-5)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_whitening_looks_at_answers_only() -> None:
    values, _, mask = random_batch()
    spoilt = torch.where(mask, values, torch.full_like(values, 1e6))
    for shift in (True, False):
        white = gae.whiten(spoilt, mask, shift)
        chosen = white[mask]
        assert chosen.var(unbiased=False).item() == pytest.approx(1, abs=1e-4) and not white[~mask].any()
        assert chosen.mean().item() == pytest.approx(0 if shift else values[mask].mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 64 / 10_000), (60, 1 + 0.2 * 64 / 10_000), (0, 1 - 0.2 * 64 / 10_000)],
)
def test_the_kl_coefficient_follows_ziegler(kl: float, factor: float) -> None:
    assert gae.adapted(0.15, kl, 6.0, 10_000, 64) == pytest.approx(0.15 * factor)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"), [(1.5, 1, -1.2), (0.5, 1, -0.5), (1.5, -1, 1.5), (0.5, -1, 0.8), (1.1, 2, -2.2)]
)
def test_the_surrogate_is_clipped_from_one_side(ratio: float, advantage: float, loss: float) -> None:
    logp = torch.tensor([math.log(ratio)])
    got, told = gae.policy_losses(logp, torch.zeros(1), torch.tensor([float(advantage)]), 0.2)
    assert got.item() == pytest.approx(loss) and told.item() == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("value", "target", "loss"), [(0.1, 1, 0.405), (0.9, 1, 0.32), (-0.5, 1, 1.125), (0.9, 0, 0.405)]
)
def test_a_value_far_from_the_old_one_counts_as_if_near(value: float, target: float, loss: float) -> None:
    got = gae.value_losses(torch.tensor([value]), torch.zeros(1), torch.tensor([float(target)]), 0.2)
    assert got.item() == pytest.approx(loss)


def test_explained_variance() -> None:
    _, values, mask = random_batch()
    assert gae.explained_variance(values, values, mask) == pytest.approx(1)
    assert gae.explained_variance(torch.zeros_like(values), values, mask) == pytest.approx(0)
    assert gae.explained_variance(values, torch.ones_like(values), mask) == 0


def test_the_score_is_earned_by_the_last_token() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ratio, score = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([5.0, 7.0])
    c = ppo.PpoConfig(model="m", data="d")
    told = ppo.token_rewards(c, score, ratio, mask, 0.5)
    assert told.tolist() == [[-0.5, 4.0, 0.0], [0.0, 0.0, 6.5]]


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("constant", [0.5, 1, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25])],
)
def test_the_learning_rate_rises_and_falls(schedule: Any, shares: list[float]) -> None:
    c = ppo.PpoConfig(model="m", data="d", schedule=schedule, warmup=1 / 3)
    assert [ppo.rate(c, step, 6) for step in range(1, 7)] == pytest.approx(shares)
