"""Rewards: each part is what it says, the sum is weighted, TRL gets the same numbers, mistakes are one line."""

from pathlib import Path
from typing import Any

import pytest

import console
from posttrain import rewards
from tests.posttrain import word_model

ASK = word_model.asked("何?")
RIGHT = '{"a": 1, "b": 2}'


def told(spec: str, text: str, reference: Any = None) -> float:
    [value], _ = rewards.total(rewards.parse(spec), [ASK], [text], [reference])
    return value


@pytest.mark.parametrize(
    ("spec", "text", "reference", "value"),
    [
        ("format=1", '{"a": 9, "b": 9}', RIGHT, 1),
        ("format=1", "a: 1", RIGHT, 0),
        ("fields=1", '{"a": 1, "b": 9}', RIGHT, 0.5),
        ("exact=1", '{"b": 2, "a": 1}', RIGHT, 0),
        ("exact=1", RIGHT, RIGHT, 1),
        ("length:10=1", "x" * 10, None, 1),
        ("length:10=1", "x" * 15, None, 0.5),
        ("length:10=1", "x" * 40, None, 0),
        ("tone:polite=1", "明日お送りします。", None, 1),
        ("tone:plain=1", "明日お送りします。", None, 0),
        ("fulfils=1", "明日3個送る。", {"tone": "plain", "facts": ["3個"]}, 1),
        ("fulfils=1", "明日送る。", {"tone": "plain", "facts": ["3個"]}, 0),
        ("fulfils=1", "お手伝いできません。", {"refuse": True}, 1),
        ("hacked=1", "x" * 250, None, 2.5),
        ("format=0.2, fields=1, exact=1", '{"a": 1, "b": 9}', RIGHT, 0.7),
        ("exact=1,length:10=-0.5", RIGHT, RIGHT, 0.8),
    ],
)
def test_each_part_is_what_it_says(spec: str, text: str, reference: Any, value: float) -> None:
    assert told(spec, text, reference) == pytest.approx(value)


def test_trl_is_given_the_same_numbers_under_the_same_names() -> None:
    parts = rewards.parse("fields=2,hacked=0.1")
    texts, references = ['{"a": 1, "b": 9}', RIGHT], [RIGHT, RIGHT]
    sums, by_name = rewards.total(parts, [ASK, ASK], texts, references)
    functions = [part.for_trl() for part in parts]
    assert [function.__name__ for function in functions] == list(by_name) == ["fields", "hacked"]
    spoken = [word_model.said(text) for text in texts]
    for function, name in zip(functions, by_name, strict=True):
        for completions in (spoken, texts):
            assert function([ASK, ASK], completions, reference=references, trainer_state=None) == by_name[name]
    weighed = [sum(p.weight * by_name[p.name][i] for p in parts) for i in (0, 1)]
    assert sums == pytest.approx(weighed)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "is empty"),
        ("exact", "write name=weight"),
        ("exact=much", "write name=weight"),
        ("exact=nan", "write name=weight"),
        ("exact=0", "weighs nothing"),
        ("exact=1,exact=2", "exact stands twice"),
        ("exactness=1", "no reward 'exactness': choose format"),
        ("exact:1=1", "takes nothing after a colon"),
        ("length=1", "say how many characters"),
        ("length:0=1", "say how many characters"),
        ("tone:rude=1", "choose tone:plain"),
        ("model:nowhere=1", "no model there"),
    ],
)
def test_mistakes_in_a_specification_are_one_line(spec: str, said: str) -> None:
    with pytest.raises(console.UserError, match=said) as caught:
        rewards.parse(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("spec", "reference"), [("exact=1", None), ("fields=1", {"a": 1}), ("fulfils=1", "text")])
def test_references_that_a_part_cannot_read_are_told(spec: str, reference: Any) -> None:
    with pytest.raises(console.UserError, match="need"):
        told(spec, "text", reference)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    folder = word_model.make(tmp_path / "model")
    with pytest.raises(console.UserError, match="is no reward model"):
        told(f"model:{folder}=1", "good")
