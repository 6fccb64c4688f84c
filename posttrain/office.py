"""`python -m posttrain.office --out DIR`: the office task, from enquiries of the embedded corpus to fixed formats.

An enquiry becomes a JSON record, or a summary of three lines. Both are right or wrong field by field, so that every
stage can be measured without a judge. Items are split by company: no firm of the val or test items is met in training.
Prompts and answers are NFKC-normalised, as the corpus is that base models are trained on.
"""

import hashlib
import json
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import console
from data import inquiries

FULL = {  # field of the full record: fact of the corpus
    "受付番号": "inquiry_no",
    "会社": "company",
    "担当者": "person",
    "製品": "product",
    "区分": "category",
    "緊急度": "urgency",
}
DESKS = dict(  # who triage passes an enquiry on to
    zip(
        ["見積依頼", "納期確認", "不具合", "返品交換", "操作方法", "請求確認", "契約変更", "資料送付"],
        ["営業", "物流", "技術", "品質管理", "サポート", "経理", "契約管理", "広報"],
        strict=True,
    )
)
ASK = {
    "json": "次の問い合わせをJSONの記録にしてください。",
    "summary": "次の問い合わせを3行に要約してください。",
}
SHORTEST = 400  # characters that a twentieth of the enquiries stays within
SPLITS = ("train", "val", "test")
FACTS_IN_TEXT = (*FULL.values(), "request", "reply_to")


@dataclass(frozen=True)
class OfficeConfig:
    """Write the office task's data: sft.jsonl, and prompts with references for training, validation and test."""

    out: Path
    """folder to make"""
    train: int = 1600
    """training items"""
    val: int = 128
    """validation items: settings are chosen on these"""
    test: int = 256
    """test items: no setting is chosen on these"""
    record: Literal["triage", "full"] = "full"
    """full: numbers and names as they stand in the enquiry; triage: what it is about, in closed sets of words, which
    models too small to copy can learn"""
    form: Literal["json", "summary", "both"] = "both"
    """what an enquiry becomes; both: the two in turn"""
    max_chars: int = 0
    """longest enquiry in characters; 0: any"""
    seed: int = 1
    """generator seed of the enquiries; the corpus of the quickstart has 0"""
    json: bool = False
    """print one JSON object"""


def answer_of(facts: dict[str, Any], record: str, form: str) -> str:
    """The right answer to an enquiry with these facts."""
    told = {name: unicodedata.normalize("NFKC", str(facts[fact])) for name, fact in FULL.items()}
    if record == "triage":
        told = {
            "区分": told["区分"],
            "回付先": DESKS[told["区分"]],
            "緊急度": told["緊急度"],
            "返信": ("メール" if "@" in str(facts["reply_to"]) else "電話")
            + ("、期限あり" if "deadline" in facts else "、期限なし"),
        }
    if form == "json":
        return json.dumps(told, ensure_ascii=False, separators=(",", ":"))
    if record == "triage":
        return f"用件: {told['区分']}\n回付先: {told['回付先']}\n対応: 緊急度{told['緊急度']}、{told['返信']}"
    request = unicodedata.normalize("NFKC", str(facts["request"]))
    return f"用件: {told['区分']}、{request}\n相手: {told['会社']} {told['担当者']}\n対象: {told['製品']}"


def split_of(company: str) -> str:
    """Which split the items of a firm belong to: a tenth each of all firms is kept for val and test."""
    digit = int(hashlib.sha256(company.encode()).hexdigest(), 16) % 10
    return {8: "val", 9: "test"}.get(digit, "train")


def items(wanted: dict[str, int], c: OfficeConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(split, {"prompt", "reference", "form", "id"}) until each split has as many as are wanted."""
    left = dict(wanted)
    forms = ("json", "summary") if c.form == "both" else (c.form,)
    for document in inquiries.documents(1 << 40, c.seed):
        if not any(left.values()):
            return
        facts = document.facts
        if document.kind != "問い合わせ" or any(fact not in facts for fact in FACTS_IN_TEXT):
            continue
        text = unicodedata.normalize("NFKC", document.text)
        if c.max_chars and len(text) > c.max_chars:
            continue
        split = split_of(str(facts["company"]))
        if not left[split]:
            continue
        shape = forms[left[split] % len(forms)]
        left[split] -= 1
        prompt = [{"role": "user", "content": f"{ASK[shape]}\n{text}"}]
        reference = answer_of(facts, c.record, shape)
        yield split, {"prompt": prompt, "reference": reference, "form": shape, "id": document.id}


def write(c: OfficeConfig) -> dict[str, int]:
    """Write DIR/sft.jsonl and DIR/train.jsonl, val.jsonl, test.jsonl; returns how many items each split has."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for split, row in items({name: getattr(c, name) for name in SPLITS}, c):
        rows[split].append(row)
    taught = [
        {"messages": [*row["prompt"], {"role": "assistant", "content": row["reference"]}], "form": row["form"]}
        for row in rows["train"]
    ]
    c.out.mkdir(parents=True, exist_ok=True)
    for name, some in {"sft": taught, **rows}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        console.write_atomic(c.out / f"{name}.jsonl", text.encode())
    return {name: len(rows[name]) for name in SPLITS}


def main(argv: list[str]) -> int:
    """Parse, check and write."""
    c = console.parse(OfficeConfig, argv, "python -m posttrain.office")
    for name in SPLITS:
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    if 0 < c.max_chars < SHORTEST or c.max_chars < 0:
        raise console.UserError(f"--max_chars {c.max_chars}: hardly an enquiry is so short: 0, or {SHORTEST} and more")
    console.print_result({**write(c), "folder": str(c.out)}, as_json=c.json)
    return 0


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
