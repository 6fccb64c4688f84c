"""The two hand-written files of self-instruct: seed tasks, and labelled pairs of instructions."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import posttrain

FOLDER = Path(posttrain.__path__[0])
# Runs of kanji, katakana, digits and Latin letters: what a Japanese instruction is about, without its grammar.
CONTENT = re.compile(r"[一-龠々〆]+|[ァ-ヶー]+|[A-Za-z]+|\d+")


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def seeds() -> list[dict[str, Any]]:
    return read("seed_tasks.jsonl")


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    return read("similar_pairs.jsonl")


def rouge_l(a: list[str], b: list[str]) -> float:
    """F measure of the longest common subsequence (Lin 2004)."""
    row = [0] * (len(b) + 1)
    for x in a:
        last, row = row, [0]
        for j, y in enumerate(b):
            row.append(last[j] + 1 if x == y else max(last[j + 1], row[j]))
    return 2 * row[-1] / (len(a) + len(b)) if a and b else 0.0


def test_every_seed_task_has_the_fields_of_wang_et_al(seeds: list[dict[str, Any]]) -> None:
    for number, task in enumerate(seeds):
        assert set(task) == {"id", "name", "instruction", "instances", "is_classification"}
        assert task["id"] == f"seed_task_{number:03d}"
        assert re.fullmatch(r"[a-z0-9_]+", task["name"])
        assert isinstance(task["is_classification"], bool)
        assert 10 <= len(task["instruction"]) <= 120 and "\n" not in task["instruction"]
        for one in task["instances"]:
            assert set(one) == {"input", "output"}
            assert one["output"] and one["output"] != one["input"]
            assert all(text == text.strip() and not text.endswith((":", "：")) for text in one.values())
        inputs = [one["input"] for one in task["instances"]]
        assert inputs and len(inputs) == len(set(inputs))
    assert len({task["name"] for task in seeds}) == len(seeds)


def test_there_are_enough_of_every_sort(seeds: list[dict[str, Any]]) -> None:
    assert len(seeds) >= 180
    labels = [task for task in seeds if task["is_classification"]]
    assert len(labels) >= 45
    assert all(len(one["output"]) <= 20 for task in labels for one in task["instances"])
    without_input = [task for task in seeds if not task["instances"][0]["input"]]
    assert 0.25 < len(without_input) / len(seeds) < 0.45
    endings = Counter(task["instruction"][-5:] for task in seeds)
    assert len(endings) > 80 and endings.most_common(1)[0][1] < 0.55 * len(seeds)
    assert sum("か。" in ending or "？" in ending for ending in endings.elements()) > 20  # questions
    # Any first rows that a teacher is shown hold both kinds.
    assert 2 <= sum(task["is_classification"] for task in seeds[:20]) <= 10


def test_no_two_seed_tasks_are_nearly_the_same(seeds: list[dict[str, Any]]) -> None:
    tokens = [CONTENT.findall(task["instruction"]) for task in seeds]
    assert all(tokens)
    closest = max(itertools.combinations(range(len(seeds)), 2), key=lambda ij: rouge_l(tokens[ij[0]], tokens[ij[1]]))
    likeness = rouge_l(tokens[closest[0]], tokens[closest[1]])
    assert likeness < 0.6, [seeds[i]["instruction"] for i in closest]


def test_seed_tasks_name_no_reachable_person(seeds: list[dict[str, Any]]) -> None:
    text = json.dumps(seeds, ensure_ascii=False)
    assert "@" not in text
    assert all(number.startswith("000") for number in re.findall(r"\b\d{2,4}-\d{3,4}-\d{4}\b", text))


def test_pairs_are_balanced_and_split_without_a_shared_instruction(pairs: list[dict[str, Any]]) -> None:
    assert len(pairs) >= 160
    assert len({frozenset((pair["a"], pair["b"])) for pair in pairs}) == len(pairs)
    sides: dict[str, set[str]] = {"dev": set(), "test": set()}
    for pair in pairs:
        assert set(pair) == {"a", "b", "same", "split"} and isinstance(pair["same"], bool) and pair["a"] != pair["b"]
        sides[pair["split"]] |= {pair["a"], pair["b"]}
    assert not sides["dev"] & sides["test"]
    for split in sides:
        same = [pair["same"] for pair in pairs if pair["split"] == split]
        assert 0.42 < sum(same) / len(same) < 0.58 and 0.4 < len(same) / len(pairs) < 0.6


def test_pairs_hold_the_hard_ones_too(pairs: list[dict[str, Any]]) -> None:
    likeness = [(rouge_l(list(pair["a"]), list(pair["b"])), pair["same"]) for pair in pairs]
    assert sum(same and score < 0.4 for score, same in likeness) >= 20  # the same task in other words
    assert sum(not same and score > 0.8 for score, same in likeness) >= 20  # one word makes another task
    assert sum(not same and score < 0.5 for score, same in likeness) >= 20
