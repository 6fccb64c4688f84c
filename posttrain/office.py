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

RECORD = {  # field of the JSON record: fact of the corpus
    "受付番号": "inquiry_no",
    "会社": "company",
    "担当者": "person",
    "製品": "product",
    "区分": "category",
    "緊急度": "urgency",
}
ASK = {
    "json": "次の問い合わせをJSONの記録にしてください。",
    "summary": "次の問い合わせを3行に要約してください。",
}
SPLITS = ("train", "val", "test")
FACTS_IN_TEXT = ("inquiry_no", "company", "person", "product", "category", "urgency", "request")


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
    form: Literal["json", "summary", "both"] = "both"
    """what an enquiry becomes; both: the two in turn"""
    seed: int = 1
    """generator seed of the enquiries; the corpus of the quickstart has 0"""
    json: bool = False
    """print one JSON object"""


def answer_of(facts: dict[str, Any], form: str) -> str:
    """The right answer to an enquiry with these facts."""
    told = {name: unicodedata.normalize("NFKC", str(facts[fact])) for name, fact in RECORD.items()}
    if form == "json":
        return json.dumps(told, ensure_ascii=False, separators=(",", ":"))
    request = unicodedata.normalize("NFKC", str(facts["request"]))
    return f"用件: {told['区分']}、{request}\n相手: {told['会社']} {told['担当者']}\n対象: {told['製品']}"


def split_of(company: str) -> str:
    """Which split the items of a firm belong to: a tenth each of all firms is kept for val and test."""
    digit = int(hashlib.sha256(company.encode()).hexdigest(), 16) % 10
    return {8: "val", 9: "test"}.get(digit, "train")


def items(wanted: dict[str, int], form: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(split, {"prompt", "reference", "form", "id"}) until each split has as many as are wanted."""
    left = dict(wanted)
    forms = ("json", "summary") if form == "both" else (form,)
    for document in inquiries.documents(1 << 40, seed):
        if not any(left.values()):
            return
        facts = document.facts
        if document.kind != "問い合わせ" or any(fact not in facts for fact in FACTS_IN_TEXT):
            continue
        split = split_of(str(facts["company"]))
        if not left[split]:
            continue
        shape = forms[left[split] % len(forms)]
        left[split] -= 1
        asked = f"{ASK[shape]}\n{unicodedata.normalize('NFKC', document.text)}"
        prompt = [{"role": "user", "content": asked}]
        yield split, {"prompt": prompt, "reference": answer_of(facts, shape), "form": shape, "id": document.id}


def main(argv: list[str]) -> int:
    """Write DIR/sft.jsonl and DIR/train.jsonl, val.jsonl, test.jsonl; says how many items each has."""
    c = console.parse(OfficeConfig, argv, "python -m posttrain.office")
    for name in SPLITS:
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for split, row in items({name: getattr(c, name) for name in SPLITS}, c.form, c.seed):
        rows[split].append(row)
    taught = [
        {"messages": [*row["prompt"], {"role": "assistant", "content": row["reference"]}], "form": row["form"]}
        for row in rows["train"]
    ]
    c.out.mkdir(parents=True, exist_ok=True)
    for name, some in {"sft": taught, **rows}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        console.write_atomic(c.out / f"{name}.jsonl", text.encode())
    console.print_result({**{name: len(rows[name]) for name in SPLITS}, "folder": str(c.out)}, as_json=c.json)
    return 0


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
