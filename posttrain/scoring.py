"""How good an answer is: fixed-format answers field by field, and the same answers sampled again.

A reference is the answer as it should stand: a JSON object, lines of `name: value`, or any other text. Validity (the
format), field accuracy (the content) and exact match (all of it) are told apart, since tuning moves them apart.
"""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Score(NamedTuple):
    """`fields`: which of the reference's fields the answer has right; empty where the reference is plain text."""

    valid: bool
    exact: bool
    fields: dict[str, bool]

    @property
    def field_accuracy(self) -> float:
        return sum(self.fields.values()) / len(self.fields) if self.fields else float(self.exact)


def fields_of(text: str) -> dict[str, Any] | None:
    """The fields of a fixed-format answer in their order: of a JSON object, or of lines `name: value`; else None."""
    text = text.strip()
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None
    pairs = [line.split(": ", 1) for line in text.splitlines()]
    return dict(pairs) if pairs and all(len(pair) == 2 for pair in pairs) else None


def score(answer: str, reference: str) -> Score:
    """`answer` against `reference`. Valid: it has the reference's format and its fields in their order."""
    wanted = fields_of(reference)
    if wanted is None:
        plain = [unicodedata.normalize("NFKC", text).strip() for text in (answer, reference)]
        return Score(bool(plain[0]), plain[0] == plain[1], {})
    told = fields_of(answer)
    as_json = [text.strip().startswith("{") for text in (answer, reference)]
    if told is None or as_json[0] != as_json[1] or list(told) != list(wanted):
        return Score(False, False, dict.fromkeys(wanted, False))
    right = {name: told[name] == value for name, value in wanted.items()}
    return Score(True, all(right.values()), right)


def summarise(greedy: Sequence[Score], sampled: Sequence[Sequence[Score]]) -> dict[str, float]:
    """Scores of n items as the metrics `eval/*`, each a mean over items.

    greedy: one answer an item; sampled: several answers an item, or none at all. `sampled_sd` is the spread of repeated
    sampling: the mean over items of the standard deviation of exact match among an item's answers.
    """
    told = {"n": float(len(greedy)), **means(greedy)}
    parts = defaultdict(list)
    for one in greedy:
        for name, right in one.fields.items():
            parts[name].append(right)
    told |= {f"field/{name}": float(np.mean(right)) for name, right in parts.items()}
    if sampled and sampled[0]:
        told |= {f"sampled_{name}": value for name, value in means([one for item in sampled for one in item]).items()}
        told["sampled_sd"] = float(np.mean([np.std([one.exact for one in item]) for item in sampled]))
    return told


def means(scores: Sequence[Score]) -> dict[str, float]:
    """exact_match, field_accuracy and valid over `scores`."""
    return {
        "exact_match": float(np.mean([one.exact for one in scores])),
        "field_accuracy": float(np.mean([one.field_accuracy for one in scores])),
        "valid": float(np.mean([one.valid for one in scores])),
    }
