"""Self-instruct in Japanese: every filter, a whole run with a scripted teacher, and a run that is killed."""

import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bench_posttrain
import console
from posttrain import instruction_filters, instructions, rows, self_instruct
from tests.posttrain import scripted_teacher
from tests.posttrain.scripted_teacher import Trouble, prompt_of

FAULTY = {
    "too_short": "要約せよ。",
    "too_long": "とても長い課題の文を書いてください。" * 20,
    "blacklist": "次の画像に写っている物を答えてください。",
    "program": "素数を数えるプログラムを書いてください。",
    "punctuation": "→売上の合計を計算してください。",
    "not_japanese": "Please summarize the following text.",
}


def answer(asked: dict[str, Any]) -> str | tuple[str, str]:
    """As a teacher answers, by what it is asked for; each prompt always gets the same."""
    prompt = prompt_of(asked)
    rng = random.Random(hashlib.sha256((prompt + str(asked["seed"])).encode()).hexdigest())
    if "いろいろな課題" in prompt:
        texts = bench_posttrain.write(5, rng)
        texts.insert(2, texts[0].replace("ください。", "なさい。"))
        texts.insert(1, FAULTY[rng.choice(list(FAULTY))])
        # The first ones are what comes after the "9." of the prompt.
        listed = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 9))
        told = listed if "messages" in asked else listed.removeprefix("9. ")
        return (told, "length") if rng.random() < 0.1 else told
    if prompt.count("分類: ") > 3:
        return rng.choice(["はい", "いいえ", "いいえ。", "分かりません"])
    if "ラベル: " in prompt:
        low = "ラベル: 低い\n入力: 来月でよい\n"
        return f"ラベル: 高い\n入力: 至急の対応です\n{low}{low}ラベル: 中\n入力:"
    answers: list[str | tuple[str, str]] = [
        "例1\n入力: 売上は10です\n出力: 10\n例2\n入力: なし\n出力: なし、です。",
        "出力: 一つずつ答えます。",
        "例1\n入力: あ\n出力: あ\n例2\n入力: い\n出力:\n例3\n入力: う\n出力: 次の通り:\n例4\n入力: え\n出力: お",
        "例1\n入力: 同じ\n出力: 一\n例2\n入力: 同じ\n出力: 二",
        ("例1\n入力: 長い\n出力: 答え\n例2\n入力: 切れ\n出力: 途中", "length"),
        "例1\n入力: 件名: 納期\n出力: 短く",
    ]
    return rng.choice(answers)


def flags(url: str, out: Path, **more: Any) -> list[str]:
    given = {"teacher": url, "out": out, "n": 40, "backoff": 0.01, "price_out": 1000.0, "json": True, **more}
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed, by a teacher that chats."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with scripted_teacher.serving(answer) as server, pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_MODE", "disabled")
        assert self_instruct.main(flags(server.url, out)) == 0
    return out


def test_a_run_keeps_drops_and_counts(whole: Path) -> None:
    decisions = lines(whole / "decisions.jsonl")
    reasons = Counter((d["what"], d["reason"] or "kept") for d in decisions)
    for reason in FAULTY:
        assert reasons["instruction", reason], reason
        assert all(d["text"] == FAULTY[reason] for d in decisions if d["reason"] == reason)
    assert reasons["instruction", "similar"] and reasons["answer", "length"]
    instance = {
        "kept",
        "duplicate",
        "no_input",
        "same_as_input",
        "empty_output",
        "ends_with_colon",
        "conflicting",
        "cut",
    }
    assert instance <= {reason for what, reason in reasons if what == "instance"}
    tasks, manifest = lines(whole / "tasks.jsonl"), json.loads((whole / "manifest.json").read_text())
    assert len(tasks) == reasons["instruction", "kept"] >= 40
    told = {name: count for name, count in manifest["decisions"].items() if not name.startswith("classification/")}
    assert told == {f"{what}/{reason}": count for (what, reason), count in reasons.items()}
    kinds = {name.partition("/")[2]: n for name, n in manifest["decisions"].items() if name.startswith("classi")}
    assert set(kinds) == {"yes", "no", "unclear"} and sum(kinds.values()) == len(tasks)
    similar = next(d for d in decisions if d["reason"] == "similar")
    assert similar["score"] > 0.87 and similar["nearest"]
    for name in ("tasks.jsonl", "train.jsonl"):
        assert hashlib.sha256((whole / name).read_bytes()).hexdigest() == manifest["files"][name]["sha256"]


def test_what_comes_out_is_data_for_sft(whole: Path) -> None:
    made = [rows.standard(row, "messages") for row in lines(whole / "train.jsonl")]
    tasks = {task["id"]: task for task in lines(whole / "tasks.jsonl")}
    machine = [row for row in made if row["task"] in tasks]
    assert machine and len(made) > len(machine) + 200  # and the seeds
    formats: Counter[str] = Counter()
    for row in machine:
        task = tasks[row["task"]]
        question, reply = (message["content"] for message in row["messages"])
        assert task["instruction"] in question and reply in {i["output"] for i in task["instances"]}
        formats[re.sub(r"[^\n]{6,}", "_", question)] += 1
    assert len(formats) > 8
    assert len({json.dumps(row["messages"]) for row in made}) == len(made)
    # The name of a lone field is left out half the time.
    lone = [row["messages"][0]["content"] for row in machine if "納期" in row["messages"][0]["content"]]
    assert 0 < sum("件名" in text for text in lone) < len(lone)


def test_prompts_are_made_as_in_the_paper(tmp_path: Path) -> None:
    seeds = {task["instruction"] for task in lines(self_instruct.SEEDS)}
    with scripted_teacher.serving(answer) as server:
        self_instruct.main(flags(server.url, tmp_path / "a", teacher_mode="completion", n=12, concurrency=1))
        asked = [dict(a) for a in server.asked]
    boot = [a for a in asked if "いろいろな課題" in a["prompt"]]
    shown = [re.findall(r"(?m)^[1-8]\. (.+)$", a["prompt"]) for a in boot]
    assert all(len(texts) == 8 and a["prompt"].endswith("\n9.") for texts, a in zip(shown, boot, strict=True))
    human = [sum(text in seeds for text in texts) for texts in shown]
    assert human[:5] == [8] * 5 and set(human[5:]) <= {6}
    first = {name: boot[0][name] for name in ("max_tokens", "temperature", "top_p", "presence_penalty")}
    assert first == {"max_tokens": 1024, "temperature": 0.7, "top_p": 0.5, "presence_penalty": 2}
    assert boot[0]["stop"] == ["\n\n", "\n16"]
    yes_no = [a for a in asked if a["max_tokens"] == 8]
    assert yes_no and all(a["prompt"].endswith("分類:") and a["temperature"] == 0 for a in yes_no)
    for length, ending in ((300, "。\n"), (350, "\n例1\n")):
        some = [a for a in asked if a["max_tokens"] == length]
        assert some and all(a["presence_penalty"] == 1.5 for a in some)
        assert length == 300 or all(a["prompt"].endswith(ending) for a in some)


def test_a_killed_run_ends_with_the_same_files_and_pays_once(
    whole: Path, tmp_path: Path, spawn: Callable[..., subprocess.Popen[str]]
) -> None:
    out = tmp_path / "killed"

    def slow(asked: dict[str, Any]) -> str | tuple[str, str] | Trouble:
        time.sleep(0.01)
        return answer(asked)

    with scripted_teacher.serving(slow) as server:
        environment = {"WANDB_MODE": "disabled", "no_proxy": "127.0.0.1"}
        for ends, signum, code in ((20, signal.SIGKILL, -9), (70, signal.SIGTERM, 143)):
            command = [sys.executable, "-m", "posttrain.self_instruct", *flags(server.url, out, concurrency=4)]
            child = spawn(command, **environment)
            while len(server.answered) < ends and child.poll() is None:
                time.sleep(0.005)
            child.send_signal(signum)
            child.communicate(timeout=60)
            assert child.returncode == code and not (out / "tasks.jsonl").exists()
        assert self_instruct.main(flags(server.url, out)) == 0
        paid = Counter(server.answered)
        # Only what was under way when the process was killed was answered and not heard.
        assert sum(count - 1 for count in paid.values()) <= 4
        asked = len(server.asked)
        assert self_instruct.main(flags(server.url, out)) == 0 and len(server.asked) == asked  # done
    for name in ("tasks.jsonl", "train.jsonl", "decisions.jsonl", "manifest.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    total, expected = (json.loads((folder / "result.json").read_text()) for folder in (out, whole))
    assert total["money"] == expected["money"] > 0 and total["answers"] == expected["answers"]


def test_a_teacher_that_dies_ends_in_one_line_and_w_and_b_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    from gacha import runs

    count = 0

    def dying(asked: dict[str, Any]) -> str | tuple[str, str] | Trouble:
        nonlocal count
        count += 1
        return answer(asked) if count < 30 else Trouble(503)

    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    try:
        with scripted_teacher.serving(dying) as server, pytest.raises(console.UserError, match="same command again"):
            self_instruct.main(flags(server.url, tmp_path / "out", attempts=2, api_key_env="NO_SUCH"))
        time.sleep(1.1)  # W&B names an offline run's folder by the second
        with scripted_teacher.serving(answer) as server:
            self_instruct.main(flags(server.url, tmp_path / "out"))
            assert len(server.asked) == len(set(server.answered))
    finally:
        wandb.teardown()
    read = runs.read(tmp_path / "wandb")
    assert {run.id for run in read} == {(tmp_path / "out" / "wandb_run").read_text()}
    last = read[-1]
    assert last.summary["status"] == "ok" and last.config["stage"] == "self_instruct"
    assert last.summary["decisions/instruction/kept"] >= 40 and last.summary["cost/money"] > 0
    assert set(last.config["lineage"]) == {"teacher", "seeds"}
    tables = list((tmp_path / "wandb").rglob("decisions*.table.json"))
    assert tables and json.loads(tables[0].read_text())["columns"][0] == "step"


def test_a_useless_teacher_ends_by_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with scripted_teacher.serving(lambda _: "I cannot do that.") as server:
        assert self_instruct.main(flags(server.url, tmp_path / "out", max_requests=7, include_seeds=False)) == 0
        assert len(server.asked) == 7
    assert "0 of 40 instructions were kept of 7 requests" in capfd.readouterr().err
    assert lines(tmp_path / "out" / "train.jsonl") == []
    with pytest.raises(console.UserError, match="result of another configuration"):
        self_instruct.main(flags("http://127.0.0.1:1", tmp_path / "out", n=41))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty"),
        *((text, reason) for reason, text in FAULTY.items()),
        ("売上の推移をグラフにしてください。", "blacklist"),
        ("図に示された手順を説明してください。", "blacklist"),
        ("ここのリンクを開いて内容をまとめてください。", "blacklist"),
        ("最初のパラグラフを要約してください。", ""),
        ("お客様の意図を三つ推測してください。", ""),
        ("顧客のプロファイルを作ってください。", ""),
        ("図書館の利用案内を書いてください。", ""),
        ("「承知しました」の別の言い方を挙げてください。", ""),
        ("SQLで売上の合計を求めてください。", ""),
        ("・売上をまとめてください。", "punctuation"),
        ("请将以下文章翻译成英文。", "not_japanese"),
        ("Pythonで書かれたプログラムを説明してください。", ""),
    ],
)
def test_instruction_filters(text: str, fault: str) -> None:
    assert instruction_filters.instruction_fault(text, 8, 300) == fault


def test_no_seed_task_is_too_short_or_not_japanese() -> None:
    faults = [instruction_filters.instruction_fault(t["instruction"], 8, 300) for t in lines(self_instruct.SEEDS)]
    assert Counter(faults)[""] > 0.97 * len(faults) and not set(faults) - {"", "blacklist"}


def test_answers_are_read_as_models_write_them() -> None:
    read = instructions.read_instructions
    assert read(" 一を書け\n10. 二を書け\n11.三を\n  書け", chat=False) == ["一を書け", "二を書け", "三を 書け"]
    assert read("はい、続けます。\n\n9. 一を書け\n\n10. **二を書け**", chat=True) == ["一を書け", "二を書け"]
    assert read("課題9: 一を書け\n課題10:二を書け", chat=True) == ["一を書け", "二を書け"]
    assert read("一を書け\n16.5を四捨五入せよ", chat=False)[0] == "一を書け"
    assert [instructions.read_classification(t) for t in ("はい。", " は", "Yes", "いいえ", "分類", "")] == [
        *(True, True, True, False, None, None)
    ]
    given = "**例1**\n入力: 売上\n二行目\n出力: 増えた\n\n例2:\n入力:なし\n出力:\nない\n"
    expected = [{"input": "売上\n二行目", "output": "増えた"}, {"input": "", "output": "ない"}]
    assert instructions.read_instances(given, is_classification=False) == expected
    assert instructions.read_instances("ただの答え", is_classification=False) == [{"input": "", "output": "ただの答え"}]
    labels = "ラベル: 「高い」\n入力: 急ぎ\nです\nラベル:低い\n来月"
    expected = [{"input": "急ぎ\nです", "output": "高い"}, {"input": "来月", "output": "低い"}]
    assert instructions.read_instances(labels, is_classification=True) == expected


def test_braces_in_an_input_stay_as_they_are() -> None:
    instance = {"input": "{instruction} {input} {}", "output": "x"}
    for seed in range(20):
        asked = instructions.as_messages("波括弧を{input}と書け", instance, random.Random(seed))[0]["content"]
        assert "{instruction} {input} {}" in asked and "波括弧を{input}と書け" in asked


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"n": 0}, "--n 0"),
        ({"threshold": 1.5}, "--threshold"),
        ({"seed_tasks": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"max_chars": 3}, "--max_chars"),
        ({"segmentaton": "chars"}, "did you mean --segmentation"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(console.UserError) as mistake:
        self_instruct.main(flags("http://127.0.0.1:1", tmp_path / "out", **more))
    assert said in str(mistake.value)


def test_bad_seed_tasks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text('{"instruction": "x", "is_classification": 1}\n')
    with pytest.raises(console.UserError, match=r"seeds\.jsonl:1: is_classification"):
        self_instruct.main(flags("http://127.0.0.1:1", tmp_path / "out", seed_tasks=path))
