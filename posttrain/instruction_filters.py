"""What self-instruct throws away, with the name of each reason; its rules (Wang et al. 2022) made right for Japanese.

The original counts words between spaces, which Japanese has not, drops what begins with a letter outside of ASCII, as
every Japanese instruction does, and looks for English words.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

# What a model that reads and writes text can neither see nor make. Within longer words that mean something else (意図,
# パラグラフ, プロファイル, 地図帳 is a map all the same) they do not count.
BLACKLIST = re.compile(
    r"画像|写真|動画|映像|音声|(?<!パラ)グラフ(?!ィ)|(?<!プロ)ファイル|イラスト|地図|図面|図表|作図|チャート(?!を読)"
    r"|(?<![意企構縮版])図(?=[をにで示])|添付|プロットし|描[いきくけこ]|(?:ここ|次|下|この)の?(?:URL|リンク|サイト)|クリックし"
)
PROGRAM = re.compile(r"(?:プログラム|スクリプト)を(?:書|作|記述|実装)|^write a program", re.IGNORECASE)
HIRAGANA = re.compile("[ぁ-ゖ]")
OPENING = frozenset("「『【《〈“‘(")


def instruction_fault(text: str, min_chars: int, max_chars: int) -> str:
    """Why an instruction is dropped, the first reason in the original's order; empty where none is found."""
    if not text:
        return "empty"
    if len(text) < min_chars:
        return "too_short"
    if len(text) > max_chars:
        return "too_long"
    whole = unicodedata.normalize("NFKC", text)
    if BLACKLIST.search(whole):
        return "blacklist"
    if PROGRAM.search(whole):
        return "program"
    if unicodedata.category(text[0])[0] in "PS" and text[0] not in OPENING:
        return "punctuation"
    # Every Japanese sentence has hiragana; Chinese and English have none.
    if not HIRAGANA.search(text):
        return "not_japanese"
    return ""


def instance_faults(found: Sequence[dict[str, str]], cut: bool, is_classification: bool) -> list[str]:
    """Why each instance of a task is dropped, empty where it is kept; `cut`: the answer ended for its length.

    Where the same input has different outputs, all of the task's instances are dropped, as in the original.
    """
    faults, seen = [], set()
    for number, instance in enumerate(found):
        given, told = instance["input"], instance["output"]
        if cut and number == len(found) - 1:
            fault = "cut"
        elif not told:
            fault = "empty_output"
        elif is_classification and not given:
            fault = "no_input"
        elif given == told:
            fault = "same_as_input"
        elif given.endswith((":", ":")) or told.endswith((":", ":")):
            fault = "ends_with_colon"
        else:
            fault = "duplicate" if (given, told) in seen else ""
            seen.add((given, told))
        faults.append(fault)
    outputs: dict[str, set[str]] = {}
    for given, told in seen:
        outputs.setdefault(given, set()).add(told)
    if any(given and len(told) > 1 for given, told in outputs.items()):
        return [fault or "conflicting" for fault in faults]
    return faults


def seed_fault(task: dict[str, Any]) -> str:
    """What is wrong with a row of a file of seed tasks; empty where nothing is."""
    if not isinstance(task.get("instruction"), str) or not task["instruction"].strip():
        return "has no text instruction"
    if not isinstance(task.get("is_classification"), bool):
        return "is_classification must be true or false"
    instances = task.get("instances")
    if not isinstance(instances, list) or not instances:
        return "has no list of instances"
    for instance in instances:
        if not isinstance(instance, dict) or not all(isinstance(instance.get(k), str) for k in ("input", "output")):
            return "an instance has texts input and output"
    return ""
