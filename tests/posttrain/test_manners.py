"""Tone and safety data, through the command that writes them and the rules that judge by them."""
# ruff: noqa: E501  (a Japanese character counts as two columns)

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data import inquiries
from posttrain import manners, rows
from posttrain.manners import fulfils, refuses, tone_of
from posttrain.wording import TONES

N = 240
NAMES = {f"{kind}{stem}-{split}" for kind in ("tone", "safety") for stem in manners.SETS for split in ("train", "val")}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(out: Path, *flags: str) -> dict[str, list[dict[str, Any]]]:
    assert manners.main(["--out", str(out), "--json", *flags]) == 0
    return {path.stem: read(path) for path in out.iterdir()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return write(tmp_path_factory.mktemp("manners"), "--n", str(N))


@pytest.mark.parametrize(
    ("text", "tone"),
    [
        ("倉庫の鍵は守衛室に返す。遅くなる日は前もって連絡すること。", "plain"),
        ("A棟の空調が止まった。業者は午後に来る見込みである。", "plain"),
        ("在庫が足りない。追加で100個頼んでほしい。", "plain"),
        ("午前: 棚卸しの準備\n午後に全員で数えた。差異は3件だった。", "plain"),
        ("お客様からお送りいただいた図面を確認した。寸法に誤りはない。", "plain"),
        ("明日の会議は10時からです。資料は各自で印刷してきてください。", "polite"),
        ("交通費の申請は今週中に出してください。遅れると来月の支払いになります。", "polite"),
        ("件名: 消防訓練\nお疲れさまです。\n訓練は15時に始まります。雨のときは中止です。\nよろしくお願いいたします。", "polite"),
        ("ねじが一本足りませんでした。すぐに送ってもらえますか？", "polite"),
        ("平素より格別のお引き立てを賜り、厚く御礼申し上げます。先日ご依頼いただきました試作品が完成いたしましたので、本日発送いたします。", "formal"),
        ("お世話になっております。山川商会の井上でございます。お見積書を拝受いたしました。", "formal"),
        ("ご不明な点がございましたら、担当の小林までお問い合わせくださいませ。", "formal"),
        ("貴社のご要望を伺い、改めてご提案に参ります。日程をご調整いただけますと幸いです。", "formal"),
        ("本日は休みです。鍵は自分で開ける。", None),
        ("お見積書をお送りいたします。金額は変わらない。", None),
        ("議事録", None),
        ("", None),
        ("「すぐに直せ」とのご指摘をいただき、誠に申し訳ございません。", "formal"),
        ("> 納期を教えてくれ。\n来週の月曜に届きます。", "polite"),
    ],
)  # fmt: skip
def test_the_level_of_texts_that_the_rules_were_not_written_on(text: str, tone: str | None) -> None:
    assert tone_of(text) == tone


def test_the_corpus_has_the_levels_that_its_kinds_of_document_have() -> None:
    found: dict[str, Counter[str | None]] = {}
    for document in inquiries.documents(400, seed=11):
        found.setdefault(document.kind, Counter())[tone_of(document.text)] += 1
    for kind, tones in {"日報": {"plain"}, "議事録": {"plain"}, "回答": {"polite", "formal"}, "問い合わせ": {"polite", "formal"}}.items():  # fmt: skip
        right = sum(found[kind][tone] for tone in tones)
        assert right >= 0.95 * found[kind].total(), (kind, found[kind])
    assert found["回答"]["formal"] > 3 * found["回答"]["polite"]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("恐れ入りますが、その内容のメールは作成できません。別の形ならお力になれます。", True),
        ("それはできかねます。ご要望にはお応えしかねますので、ご了承ください。", True),
        ("大変申し訳ございませんが、個人の電話番号をお教えすることはいたしかねます。", True),
        ("この依頼はお断りします。", True),
        ("法律に触れるおそれがあるため、お手伝いは控えさせていただきます。", True),
        ("危険なので、その方法を教えることはできない。", True),
        ("承知しました。手順は次のとおりです。", False),
        ("まず上司に相談してください。決まりがなければ、総務に尋ねます。", False),
        ("病名の判断は医師にしかできません。まずは受診を勧めてください。", False),
        ("はい、可能です。なお、期限を過ぎた申請は受け付けられません。", False),
        ("お客様からの「対応できません」という返事には、次のように書くとよいでしょう。", False),
        ("申し訳ございません。納品が遅れております。", False),
        ("対応が遅れて申し訳ありません。明日の午前に伺います。", False),
        ("お力になれず申し訳ありません。", True),
        ("他人の通帳をお見せすることはできません。ご本人に尋ねてください。", True),
        ("そのような文書は書けません。", True),
        ("ご案内のとおり、会場は二階です。", False),
        ("1. 記録を残す。\n2. 窓口に連絡する。\n3. 一人では対応できません、と伝える。", False),
    ],
)  # fmt: skip
def test_refusals_told_from_answers(text: str, refused: bool) -> None:
    assert refuses(text) == refused


def test_every_tone_answer_keeps_its_level_and_its_facts(written: dict[str, list[dict[str, Any]]]) -> None:
    levels: Counter[str] = Counter()
    for split in ("train", "val"):
        sets = (written[f"tone{stem}-{split}"] for stem in manners.SETS)
        for chat, preference, prompt in zip(*sets, strict=True):
            reference = prompt["reference"]
            answer, rejected = chat["messages"][-1]["content"], preference["rejected"][0]["content"]
            assert fulfils(answer, reference), answer
            assert tone_of(rejected) != reference["tone"], rejected
            assert chat["messages"] == preference["prompt"] + preference["chosen"] and prompt["prompt"] == preference["prompt"]  # fmt: skip
            given = prompt["prompt"][-1]["content"]
            assert reference["facts"] and all(fact in given for fact in reference["facts"])
            levels[reference["tone"]] += 1
    assert set(levels) == set(TONES) and min(levels.values()) > 0.25 * levels.total()
    assert not fulfils(answer.replace(reference["facts"][0], ""), reference)


def test_tone_is_asked_for_in_both_turns_and_tasks(written: dict[str, list[dict[str, Any]]]) -> None:
    prompts = [row["prompt"] for row in written["tone-prompts-train"]]
    assert 0.3 < sum(prompt[0]["role"] == "system" for prompt in prompts) / len(prompts) < 0.5
    assert 0.5 < sum("・用件" in prompt[-1]["content"] for prompt in prompts) / len(prompts) < 0.7


def test_every_safety_answer_refuses_where_it_should_and_only_there(written: dict[str, list[dict[str, Any]]]) -> None:
    for split in ("train", "val"):
        sets = (written[f"safety{stem}-{split}"] for stem in manners.SETS)
        for chat, preference, prompt in zip(*sets, strict=True):
            refuse, answer = prompt["reference"]["refuse"], chat["messages"][-1]["content"]
            assert fulfils(answer, prompt["reference"]), answer
            assert refuse or not fulfils(preference["rejected"][0]["content"], prompt["reference"])
            if refuse:
                assert len(answer) > 60, f"no alternative in: {answer}"
            else:
                assert tone_of(answer) != "plain" or "\n" in answer or answer.startswith(("1.", "一、")), answer


def test_the_bank_is_large_paired_and_split_by_scene() -> None:
    bank = read(manners.BANK)
    kinds = Counter(row["kind"] for row in bank)
    assert kinds["harmful"] >= 60 and kinds["harmless"] >= 60 and kinds["expert"] >= 10
    assert len({row["prompt"] for row in bank}) == len({row["answer"] for row in bank}) == len(bank)
    scenes: dict[str, list[dict[str, Any]]] = {}
    for row in bank:
        scenes.setdefault(row["scene"], []).append(row)
    for scene, members in scenes.items():
        assert len({row["split"] for row in members}) == 1, scene
        assert sorted(row["kind"] for row in members) in (["expert"], ["harmful", "harmless"]), scene
    topics = {row["scene"].rpartition("-")[0] for row in bank}
    assert topics == {row["scene"].rpartition("-")[0] for row in bank if row["split"] == "val"}
    assert 0.15 < sum(row["split"] == "val" for row in bank) / len(bank) < 0.3


def test_train_and_validation_share_no_prompt(written: dict[str, list[dict[str, Any]]]) -> None:
    for kind in ("tone", "safety"):
        train, val = ({json.dumps(row["prompt"]) for row in written[f"{kind}-prompts-{split}"]} for split in ("train", "val"))  # fmt: skip
        assert not train & val
        assert len(train) == len(written[f"{kind}-train"])
    assert set(written) == NAMES
    assert (len(written["tone-train"]), len(written["tone-val"])) == (N, N // 10)


def test_the_same_seed_writes_the_same_bytes_and_more_rows_only_add(tmp_path: Path) -> None:
    for name, flags in {"a": (), "b": (), "more": ("--n", "60"), "other": ("--seed", "1")}.items():
        write(tmp_path / name, "--n", "20", *flags)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert (tmp_path / "more" / path.name).read_bytes().startswith(path.read_bytes())
    first, other = (read(tmp_path / name / "tone-train.jsonl") for name in ("a", "other"))
    assert first != other


def test_the_stages_read_what_is_written(tmp_path: Path) -> None:
    shapes: dict[str, rows.Kind] = {"": "messages", "-preferences": "preference", "-prompts": "prompt"}
    write(tmp_path, "--n", "20")
    for kind in ("tone", "safety"):
        for stem, shape in shapes.items():
            path = tmp_path / f"{kind}{stem}-train.jsonl"
            assert rows.load_rows(str(path), shape).num_rows == len(read(path))


@pytest.mark.parametrize(("kind", "files"), [("tone", 6), ("safety", 6)])
def test_one_kind_alone(tmp_path: Path, kind: str, files: int) -> None:
    assert len([name for name in write(tmp_path, "--n", "3", "--kind", kind) if name.startswith(kind)]) == files
    assert len(list(tmp_path.iterdir())) == files


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--n", "0"], "--n"),
        (["--kind", "rude"], "kind"),
        (["--out", __file__], "folder"),
        (["--out", f"{__file__}/x"], "folder"),
        (["--sed", "1"], "seed"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, flags: list[str], word: str) -> None:
    command = [sys.executable, "-m", "posttrain.manners", "--out", str(tmp_path / "x"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(manners.__file__).parents[1])
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and word in done.stderr
    assert not (tmp_path / "x").exists()
