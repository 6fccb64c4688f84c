"""The reward model learns what tells preferences apart, and scores answers alike in training and as a reward."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import console
from posttrain import models, reward, rewards
from tests.posttrain import small_task, word_model
from tests.posttrain.word_model import WORDS, asked, said, write

FLAGS: dict[str, Any] = {"lr": 1e-2, "batch_size": 8, "max_steps": 30, "log_every": 5, "device": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return word_model.make(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Answers with `good` are preferred to those with `bad`, wherever it stands: (training, held out)."""
    folder = tmp_path_factory.mktemp("preferences")
    rows = []
    for number, (ask, word) in enumerate(itertools.product(WORDS[:4], WORDS[:8])):
        texts = [f"{word} {mark}" if number % 2 else f"{mark} {word}" for mark in ("good", "bad")]
        rows.append({"prompt": asked(ask), "chosen": said(texts[0]), "rejected": said(texts[1])})
    return write(folder / "train.jsonl", rows[:20]), write(folder / "held_out.jsonl", rows[20:])


@pytest.mark.parametrize("rank", [0, 4])
def test_held_out_preferences_are_learned(
    tmp_path: Path, base: Path, preferences: tuple[Path, Path], rank: int
) -> None:
    train, held_out = preferences
    more = {"watch_data": held_out, "watch_every": 10, "lora_rank": rank}
    run = small_task.train(reward.main, tmp_path, model=base, data=train, **{**FLAGS, **more})
    assert run.code == 0 and run.result["eval/n"] == 12 and run.result["status"] == "ok"
    assert run.result["eval_before/accuracy"] < 0.9 < run.result["eval/accuracy"]
    assert run.result["eval/margin"] > max(1.0, run.result["eval_before/margin"])
    assert json.loads((run.folder / "model/config.json").read_bytes())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    # As a reward it says the same, alone or in a batch with longer answers.
    [part] = rewards.parse(f"model:{run.folder}=1")
    texts = ["good one", "bad one", "good one two three four alpha"]
    told = part.score([asked("alpha")] * 3, texts, [None] * 3)
    assert told[0] > told[1]
    assert part.score([asked("alpha")], texts[:1], [None]) == pytest.approx(told[:1], abs=1e-5)
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    won = [
        part.score([r["prompt"]] * 2, [r[k][0]["content"] for k in ("chosen", "rejected")], [None] * 2) for r in rows
    ]
    assert sum(a > b for a, b in won) / len(won) == run.result["eval/accuracy"]


def test_the_head_is_drawn_from_its_seed_and_the_rest_is_the_base(base: Path) -> None:
    def made(seed: int) -> Any:
        model, tokenizer = models.load(base)
        return reward.classifier(model, tokenizer, seed)

    one, same, other = made(1), made(1), made(2)
    assert torch.equal(one.score.weight, same.score.weight) and not torch.equal(one.score.weight, other.score.weight)
    assert one.score.weight.std().item() == pytest.approx(33**-0.5, rel=0.3)
    known = models.load(base)[0].base_model.state_dict()
    assert all(torch.equal(value, known[name]) for name, value in one.base_model.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "said_so"),
    [
        ({"center": -1}, "--center -1"),
        ({"base_data": "shards"}, "--base_data: a reward model writes no text"),
        ({"judge": "exact_match"}, "--judge exact_match: choose accuracy"),
        ({"max_length": 2}, "no pair fits in --max_length 2"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, base: Path, preferences: tuple[Path, Path], flags: dict[str, Any], said_so: str
) -> None:
    with pytest.raises(console.UserError, match=said_so) as caught:
        small_task.train(reward.main, tmp_path, model=base, data=preferences[0], **{**FLAGS, **flags})
    assert "\n" not in str(caught.value)


def test_prompts_are_no_preferences(tmp_path: Path, base: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": asked("alpha"), "reference": "one"}])
    with pytest.raises(console.UserError, match=r"not of \{prompt, chosen, rejected\}"):
        small_task.train(reward.main, tmp_path, model=base, data=rows, **FLAGS)
