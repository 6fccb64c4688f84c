"""The office task: right answers score as right, wrong ones field by field, firms of the test are never in training."""

import json
from pathlib import Path
from typing import Any

import pytest

import console
from posttrain import office, scoring
from posttrain.rows import load_rows


def made(folder: Path, **flags: Any) -> dict[str, list[dict[str, Any]]]:
    """The files of the office task in `folder`."""
    office.main([f"--{name}={value}" for name, value in {"out": folder, **flags}.items()])
    names = ("sft", "train", "val", "test")
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")] for name in names}


@pytest.mark.parametrize("record", ["triage", "full"])
def test_right_answers_score_one_and_splits_share_no_firm(tmp_path: Path, record: str) -> None:
    rows = made(tmp_path, record=record, train=60, val=20, test=30)
    assert [len(rows[name]) for name in ("sft", "train", "val", "test")] == [60, 60, 20, 30]
    for split in ("train", "val", "test"):
        for row in rows[split]:
            one = scoring.score(row["reference"], row["reference"])
            assert one.valid and one.exact and one.field_accuracy == 1 and one.fields
    assert {row["form"] for row in rows["test"]} == {"json", "summary"}
    if record == "triage":
        return
    told = {split: [row for row in rows[split] if row["form"] == "json"] for split in ("train", "val", "test")}
    firms = {split: {json.loads(row["reference"])["会社"] for row in some} for split, some in told.items()}
    assert not firms["train"] & (firms["val"] | firms["test"]) and not firms["val"] & firms["test"]
    # What a full record says stands in the enquiry, so that it can be copied; the two labels are judged.
    for row in told["test"]:
        record_of, asked = json.loads(row["reference"]), row["prompt"][0]["content"]
        assert all(record_of[name] in asked for name in ("受付番号", "会社", "担当者", "製品"))


def test_same_flags_same_files_and_the_stages_read_them(tmp_path: Path) -> None:
    one, two = (made(tmp_path / name, record="triage", train=8, val=4, test=4) for name in ("a", "b"))
    assert one == two
    other = made(tmp_path / "c", record="triage", train=8, val=4, test=4, seed=2)
    assert other["test"] != one["test"]
    assert load_rows(str(tmp_path / "a/sft.jsonl"), "messages").num_rows == 8
    assert load_rows(str(tmp_path / "a/test.jsonl"), "prompt")["reference"] == [row["reference"] for row in one["test"]]


def test_short_enquiries_are_short(tmp_path: Path) -> None:
    rows = made(tmp_path, max_chars=440, train=6, val=2, test=2)
    asks = max(len(ask) for ask in office.ASK.values())
    assert all(len(row["prompt"][0]["content"]) <= 440 + 1 + asks for name in ("train", "test") for row in rows[name])


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--train", "0"], "--train 0"), (["--max_chars", "50"], "--max_chars 50"), (["--form", "x"], "x")],
)
def test_mistakes(tmp_path: Path, flags: list[str], said: str) -> None:
    with pytest.raises(console.UserError, match=said):
        office.main(["--out", str(tmp_path / "office"), *flags])


# --- scoring ---------------------------------------------------------------------------------------------------------
GOLD = '{"区分":"納期確認","緊急度":"高","数":3}'


@pytest.mark.parametrize(
    ("answer", "valid", "right"),
    [
        (GOLD, True, 3),
        ('{"区分": "納期確認", "緊急度": "高", "数": 3}', True, 3),  # spaces are no matter of content
        ('{"区分":"納期確認","緊急度":"低","数":3}', True, 2),
        ('{"区分":"納期確認","緊急度":"高","数":"3"}', True, 2),  # a text is no number
        ('{"緊急度":"高","区分":"納期確認","数":3}', False, 0),  # another order
        ('{"区分":"納期確認","緊急度":"高"}', False, 0),
        ('{"区分":"納期確認","緊急度":"高","数":3', False, 0),
        ("区分: 納期確認\n緊急度: 高\n数: 3", False, 0),  # right, in the other format
        ("", False, 0),
        ("[1]", False, 0),
    ],
)
def test_json_answers_field_by_field(answer: str, valid: bool, right: int) -> None:
    one = scoring.score(answer, GOLD)
    assert (one.valid, sum(one.fields.values()), one.exact) == (valid, right, right == 3)


def test_lines_and_plain_text() -> None:
    gold = "用件: 納期確認\n対象: 機器"
    assert scoring.score("用件: 納期確認\n対象: 物品", gold).fields == {"用件": True, "対象": False}
    assert not scoring.score("用件: 納期確認", gold).valid
    assert scoring.score("承知しました。", "承知しました。").exact
    assert scoring.score("ABC", "\uff21\uff22\uff23").exact  # full-width letters
    assert not scoring.score("", "承知しました。").valid


def test_summary_of_repeated_samples() -> None:
    right, wrong = scoring.score(GOLD, GOLD), scoring.score("x", GOLD)
    told = scoring.summarise([right, wrong], [[right, right], [right, wrong]])
    assert told["n"] == 2 and told["exact_match"] == told["field_accuracy"] == told["valid"] == 0.5
    assert told["sampled_exact_match"] == 0.75
    assert told["sampled_sd"] == 0.25  # no spread in the first item, 0.5 in the second
    assert told["field/区分"] == 0.5
