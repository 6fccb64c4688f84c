"""Evol-Instruct: the four eliminations, rounds, and a run that goes on after its teacher died."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import console
from posttrain import evolve, rows
from tests.posttrain import scripted_teacher
from tests.posttrain.scripted_teacher import Trouble, prompt_of

SEEDS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "はい、分かりました。"}]}
    for text in (
        *("会議の議事録を要約してください。", "請求書の誤りを直してください。", "新商品の名前を考えてください。"),
        *("倉庫の在庫を表にしてください。", "お礼のメールを書いてください。", "残業を減らす案を出してください。"),
    )
]


def answer(asked: dict[str, Any]) -> str | tuple[str, str]:
    """As a teacher answers; each prompt always gets the same."""
    prompt = prompt_of(asked)
    rng = random.Random(hashlib.sha256((prompt + str(asked["seed"])).encode()).hexdigest())
    if "判断:" in prompt:
        return rng.choice(["同じ", "「同じ」です", "違う", "違います", "違う"])
    if "《もとの指示》" not in prompt:
        answers: list[str | tuple[str, str]] = [
            "第一に、数を確かめます。",
            "……。",
            "お答えできません。",
            ("長い", "length"),
        ]
        return rng.choice(answers)
    parent = prompt.split("《もとの指示》\n")[1].split("\n\n《")[0]
    if "まったく新しい" in prompt:
        return rng.choice([SEEDS[0]["messages"][0]["content"], f"{rng.randint(10, 99)}番の窓口の案内を英訳せよ。"])
    harder = f"{parent}\nただし{rng.randint(10, 99)}字以内とします。"
    return rng.choice(
        [harder, f"《書き換えた指示》\n{harder}", parent, f"もとの指示より難しく: {harder}", "短い", harder]
    )


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def go(tmp_path: Path, as_argv: Callable[..., list[str]]) -> Callable[..., int]:
    """The door: go(url, out, **flags)."""
    data = tmp_path / "seeds.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in SEEDS * 5), encoding="utf-8")

    def start(url: str, out: Path, **more: Any) -> int:
        return evolve.main(as_argv({"teacher": url, "data": data, "backoff": 0.01, "json": True, **more}, out=out))

    return start


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rounds_and_eliminations(go: Callable[..., int], tmp_path: Path) -> None:
    with scripted_teacher.serving(answer) as server:
        assert go(server.url, tmp_path / "a") == 0
    decisions = lines(tmp_path / "a" / "decisions.jsonl")
    assert len(decisions) == 4 * 5 * len(SEEDS)  # every instruction, in every round
    assert {d["what"] for d in decisions} == set(evolve.METHODS)
    reasons = Counter(d["reason"] for d in decisions)
    expected = {"", "no_gain", "copies_prompt", "hollow", "refusal", "similar", "length", "too_short"}
    assert set(reasons) == expected
    tasks = lines(tmp_path / "a" / "tasks.jsonl")
    by_id = {task["id"]: task for task in tasks}
    assert len(by_id) == len(tasks) == reasons[""] + 5 * len(SEEDS)
    evolved = [task for task in tasks if task["round"]]
    for task in evolved:
        parent = by_id[task["parent"]]
        assert parent["round"] < task["round"] and "《" not in task["instruction"]
        assert task["method"] == "breadth" or task["instruction"].startswith(parent["instruction"])
    assert {task["round"] for task in evolved} == {1, 2, 3, 4}
    # What failed in one round was tried again in the next.
    assert any(task["round"] > 1 and by_id[task["parent"]]["round"] == 0 for task in evolved)
    trained = [rows.standard(row, "messages") for row in lines(tmp_path / "a" / "train.jsonl")]
    assert len(trained) == len(tasks)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["config"]["rounds"] == 4 and manifest["answers"]["answers"] == len(set(server.answered))


def test_a_dead_teacher_costs_nothing_twice(go: Callable[..., int], tmp_path: Path) -> None:
    count = 0

    def dying(asked: dict[str, Any]) -> str | tuple[str, str] | Trouble:
        nonlocal count
        count += 1
        return answer(asked) if count < 60 else Trouble(0)

    with scripted_teacher.serving(dying) as server, pytest.raises(console.UserError, match="same command again"):
        go(server.url, tmp_path / "a", attempts=2)
    with scripted_teacher.serving(answer) as second:
        assert go(second.url, tmp_path / "a") == 0
        assert not set(server.answered) & set(second.answered)
        assert go(second.url, tmp_path / "b") == 0
    for name in ("tasks.jsonl", "train.jsonl", "decisions.jsonl", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("お答えできません。", "refusal"),
        ("AIアシスタントとして、その質問には回答いたしかねます。", "refusal"),
        ("I'm sorry, but I cannot do that.", "refusal"),
        ("お客様各位\nこのたびは納期が遅れ、誠に申し訳ございません。深くお詫び申し上げます。", ""),
        ("お答えできません。" + "理由を順に述べます。" * 20, ""),
        ("。、…", "hollow"),
        ("また、または。それ。", "hollow"),
        ("", "hollow"),
        ("3", ""),
    ],
)
def test_answers_that_are_dropped(text: str, fault: str) -> None:
    assert evolve.answer_fault(text, "stop", 160) == fault


def test_words_of_the_prompt_count_only_where_the_parent_has_them_not() -> None:
    c = evolve.EvolveConfig(teacher="", out="")
    text = "新しい指示を箇条書きで伝える文を書いてください。"
    assert evolve.evolved_fault("伝える文を書いてください。", text, "stop", c) == "copies_prompt"
    assert evolve.evolved_fault("新しい指示を伝える文を書いてください。", text, "stop", c) == ""
    assert evolve.evolved_fault(text, f" {text}\n", "stop", c) == "no_gain"


def test_seed_tasks_are_taken_too(go: Callable[..., int], tmp_path: Path) -> None:
    data = tmp_path / "tasks.jsonl"
    task = {"instruction": "分類せよ。", "is_classification": True}
    filled = [{"input": "急ぎの件", "output": "高い"}, {"input": "x", "output": "y"}]
    data.write_text("".join(json.dumps({**task, "instances": some}) + "\n" for some in (filled, [])))
    seeds = evolve.check(evolve.EvolveConfig(teacher="", out="", data=str(data)))
    assert [(row["instruction"], row["output"]) for row in seeds] == [
        ("分類せよ。\n\n急ぎの件", "高い"),
        ("分類せよ。", ""),
    ]
    data.write_text('{"text": "x"}\n')
    with pytest.raises(console.UserError, match=r"tasks\.jsonl:1: "):
        go("http://127.0.0.1:1", tmp_path / "out", data=data)
    data.write_text(json.dumps(SEEDS[0]))
    with pytest.raises(console.UserError, match="give one file"):
        go("http://127.0.0.1:1", tmp_path / "out", data=tmp_path / "task*.jsonl")
    with pytest.raises(console.UserError, match="--rounds 0"):
        go("http://127.0.0.1:1", tmp_path / "out", rounds=0)
