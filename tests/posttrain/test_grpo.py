"""Rewards and preferences through their doors: KL always, loopholes flagged, the same bits after a stop."""

import json
import math
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import console
from gacha import runs
from posttrain import chat, dpo, grpo, models, sft
from posttrain.rows import load_rows
from tests.posttrain import small_task

if TYPE_CHECKING:
    from tests.conftest import Pull

RL: dict[str, Any] = {"batch_size": 16, "num_generations": 4, "lr": 1e-3, "samples": 0, "watch_every": 0}


class Taught:
    """A model half taught the small task, and the task's files."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.chats, self.test = small_task.write(folder)
        more: dict[str, Any] = {"model": base, "data": self.chats, "watch_data": self.test, "watch_every": 0}
        self.run = small_task.train(sft.main, folder / "runs", max_steps=24, **more)
        self.model = self.run.result["model"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, llama: "Pull") -> Taught:
    return Taught(tmp_path_factory.mktemp("taught"), llama.folder)


@pytest.mark.parametrize(("algorithm", "beta"), [("grpo", 0.0), ("grpo", 0.05), ("rloo", 0.0)])
def test_kl_is_measured_whatever_it_weighs(taught: Taught, tmp_path: Path, algorithm: str, beta: float) -> None:
    more = {"algorithm": algorithm, "beta": beta, "max_steps": 4, "watch_data": taught.test}
    told = small_task.train(grpo.main, tmp_path, True, model=taught.model, data=taught.test, **{**RL, **more})
    assert told.code == 0 and told.result["status"] == "ok"
    (run,) = runs.read(tmp_path)
    assert run.job_type == algorithm and run.config["lineage"]["model_run"] == taught.run.result["name"]
    kl = run.history["policy/kl"].value
    assert len(kl) == 4 and math.isfinite(kl.sum()) and kl[-1] > 0
    for name in ("reward/mean", "reward/format", "reward/fields", "reward/exact", "policy/length", "reward/zero_std"):
        assert name in run.history, name
    assert run.summary["eval_before/exact_match"] == taught.run.result["eval/exact_match"]
    assert 0 <= run.summary["eval/exact_match"] <= 1


def test_a_planted_loophole_is_flagged_before_a_quarter_of_the_budget(taught: Taught, tmp_path: Path) -> None:
    """The reward counts characters: the answers run to the limit, and the guard ends the run."""
    more: dict[str, Any] = {"rewards": "hacked=1", "max_steps": 80, "lr": 5e-3, "beta": 0.0, "watch_data": taught.test}
    more |= {"watch_every": 2, "judge": "field_accuracy"}
    told = small_task.train(grpo.main, tmp_path, True, model=taught.model, data=taught.test, **{**RL, **more})
    assert told.code == console.EXIT_DIVERGED and told.result["status"] == "diverged"
    assert told.result["step"] < 20
    assert told.result["stop_reason"] in ("reward_hacking", "length_explosion", "kl_blowup", "quality_fall")
    (run,) = runs.read(tmp_path)
    assert run.status == "diverged" and run.summary["stop_reason"] == told.result["stop_reason"]
    assert "guard/events" in run.tables
    assert json.loads((told.folder / "guard.json").read_text())


def test_rollback_ends_with_the_best_weights(taught: Taught, tmp_path: Path) -> None:
    more: dict[str, Any] = {"rewards": "hacked=1", "max_steps": 80, "lr": 5e-3, "beta": 0.0, "watch_data": taught.test}
    more |= {"watch_every": 2, "judge": "field_accuracy", "on_verdict": "rollback"}
    told = small_task.train(grpo.main, tmp_path, model=taught.model, data=taught.test, **{**RL, **more})
    assert told.code == 0 and told.result["status"] == "spiked" and told.result["stop_reason"]
    before, after = (told.result[f"{when}/field_accuracy"] for when in ("eval_before", "eval"))
    assert after >= before - 0.13  # of eight items: what was lost is given back
    best = load_file(next((told.folder / "best").glob("*.safetensors")))
    kept = load_file(next((told.folder / "model").glob("*.safetensors")))
    assert all(torch.equal(best[name], kept[name]) for name in best)


def test_a_stopped_run_goes_on_with_the_same_bits(
    taught: Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {**RL, "max_steps": 5, "checkpoint_every": 2, "model": taught.model, "data": taught.test}
    whole = small_task.train(grpo.main, tmp_path / "whole", **flags)
    from posttrain import stage

    plain = stage.Run.log

    def stop_at_three(run: stage.Run, row: Any) -> None:
        plain(run, row)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(stage.Run, "log", stop_at_three)
        stopped = small_task.train(grpo.main, tmp_path / "parts", **flags)
    assert stopped.code == 143
    again = small_task.train(grpo.main, tmp_path / "parts", **flags)
    assert again.code == 0 and again.weights == whole.weights
    other = small_task.train(grpo.main, tmp_path / "other", **flags, sample_seed=9)
    assert other.weights != whole.weights


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"num_generations": 5}, "num_generations"),
        ({"rewards": "best=1"}, "best"),
        ({"temperature": 0}, "temperature"),
        ({"max_length": 12}, "max_length"),
        ({"on_verdict": "rollback", "watch_every": 0}, "watch"),
    ],
)
def test_mistakes_are_one_line(taught: Taught, tmp_path: Path, flags: dict[str, Any], said: str) -> None:
    with pytest.raises(console.UserError, match=said):
        small_task.train(grpo.main, tmp_path, model=taught.model, data=taught.test, **{**RL, "max_steps": 1, **flags})


# --- preferences -----------------------------------------------------------------------------------------------------
def preferences(folder: Path) -> Path:
    """Of every item the right answer, and the one of the next item."""
    items = small_task.items()
    rows = [
        {"prompt": row["prompt"], "chosen": row["reference"], "rejected": items[(i + 3) % len(items)]["reference"]}
        for i, row in enumerate(items)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def log_prob(model: Any, tokenizer: Any, prompt: list[dict[str, str]], answer: list[dict[str, str]]) -> torch.Tensor:
    """Sum of the log-probabilities of an answer's tokens, its end included."""
    row = chat.encode(tokenizer, [*prompt, *answer])
    ids, mine = torch.tensor([row["input_ids"]]), torch.tensor(row["assistant_masks"][1:]).bool()
    logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return logs[mine].sum()


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_the_loss_is_the_papers(taught: Taught, tmp_path: Path, loss: str) -> None:
    """The second update's logged loss against the formula, with the weights that the first one left."""
    pairs = preferences(tmp_path)
    flags = {"model": taught.model, "data": pairs, "loss": loss, "max_steps": 2, "batch_size": 8, "lr": 1e-3}
    flags |= {"checkpoint_every": 1, "beta": 0.3, "samples": 0}
    told = small_task.train(dpo.main, tmp_path / "runs", True, **flags)
    (run,) = runs.read(tmp_path / "runs")
    logged = run.history["train/loss"].value
    start, tokenizer = models.load(models.find(taught.model))
    policy, _ = models.load(told.folder / "checkpoints" / "checkpoint-1")
    losses, margins = [], []
    with torch.no_grad():
        for row in load_rows(str(pairs)):
            sides = []
            for name in ("chosen", "rejected"):
                sides.append(
                    log_prob(policy, tokenizer, row["prompt"], row[name])
                    - log_prob(start, tokenizer, row["prompt"], row[name])
                )
            if loss == "dpo":
                losses.append(-torch.nn.functional.logsigmoid(0.3 * (sides[0] - sides[1])))
            margins.append(0.3 * (sides[0] - sides[1]))
    assert run.history["dpo/margin"].value[1] == pytest.approx(float(torch.stack(margins).mean()), rel=1e-3, abs=1e-5)
    if loss == "dpo":
        assert logged[0] == pytest.approx(math.log(2), abs=1e-5)
        assert logged[1] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
        assert logged[1] < logged[0] - 1e-3


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_pairs_of_the_models_own_answers(taught: Taught, tmp_path: Path, loss: str) -> None:
    flags = {"model": taught.model, "data": taught.test, "loss": loss, "max_steps": 2, "watch_data": taught.test}
    flags |= {"watch_every": 1, "pair_samples": 8, "pair_temperature": 1.0}
    told = small_task.train(dpo.main, tmp_path, True, **flags)
    assert told.code == 0
    (run,) = runs.read(tmp_path)
    assert run.job_type == loss
    assert math.isfinite(run.history["policy/kl"].value[-1])
    (made,) = (tmp_path / ".pairs").glob("*.jsonl")
    for row in load_rows(str(made), "preference"):
        (reference,) = {one["reference"] for one in small_task.items() if one["prompt"] == row["prompt"][0]["content"]}
        better = dpo.worth(reference)
        assert better(row["chosen"][0]["content"]) > better(row["rejected"][0]["content"])


def test_preferences_without_two_sides_are_refused(taught: Taught, tmp_path: Path) -> None:
    with pytest.raises(console.UserError, match="chosen"):
        small_task.train(dpo.main, tmp_path, model=taught.model, data=taught.chats)
    with pytest.raises(console.UserError, match="beta"):
        small_task.train(dpo.main, tmp_path, model=taught.model, data=taught.test, beta=0)
