"""The statistics: those of Okazaki et al. against their published formulas, the others on texts counted by eye."""

import random
import re
import zlib
from collections import Counter

import pytest

from data import quality

TERMINATORS = "。．！？!?"


def measure(text: str) -> dict[str, float]:
    """Every statistic of `text`."""
    return quality.cheap(text) | quality.repetition(text)


def published(text: str) -> dict[str, float]:
    """The statistics of arXiv:2404.17733 as their paper and code define them, counted the plain way; 0 for no item."""
    paragraphs = [re.findall(f"[^{TERMINATORS}]+[{TERMINATORS}]?", line) for line in text.split("\n")]
    sentences = [sentence for paragraph in paragraphs for sentence in paragraph]
    joined = ["".join(paragraph) for paragraph in paragraphs]
    found: dict[str, float] = {"num_letters": len(text)}

    def share(name: str, part: float, whole: float) -> None:
        found[name] = part / whole if whole else 0.0

    for name, items in (("paragraph", joined), ("sentence", sentences)):
        repeats = Counter(items)
        share(f"duplicate_{name}_fraction", sum(n - 1 for n in repeats.values()), len(items))
        letters = sum(len(item) * (n - 1) for item, n in repeats.items())
        share(f"duplicate_{name}_fraction_in_character", letters, sum(map(len, items)))
    for n in range(2, 11):
        grams = Counter(text[i : i + n] for i in range(len(text) - n + 1))
        if n < 5:
            share(f"top_{n}gram_character_fraction", max(grams.values(), default=0), sum(grams.values()))
        else:
            share(f"duplicate_{n}gram_character_fraction", sum(f > 1 for f in grams.values()), len(grams))
    count = {
        "hiragana": sum("\u3041" <= c <= "\u3096" for c in text),
        "katakana": sum("\u30a1" <= c <= "\u30fa" for c in text),
        "kanji": sum(c in "々〇〻" or "\u3400" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" for c in text),
        "kuten": sum(c in "。．！？" for c in text),
        "toten": sum(c in "、，" for c in text),
    }
    found["num_japanese_letters"] = sum(count.values())
    for name, number in count.items():
        found[f"num_{name}" + ("_letters" if name not in ("kuten", "toten") else "")] = number
        share(f"{name}_fraction", number, found["num_japanese_letters"])
    share("japanese_fraction", found["num_japanese_letters"], len(text))
    share("avg_sentence_length", sum(map(len, sentences)), len(sentences))
    found["max_sentence_length"] = max(map(len, sentences), default=0)
    found["num_sentences_ending_with_ellipsis"] = sum(s.strip().endswith(("・", "…")) for s in sentences)
    share("ellipsis_fraction", found["num_sentences_ending_with_ellipsis"], len(sentences))
    return found


def made_up() -> list[str]:
    """Texts of every make: prose-like, repetitive, few symbols, many symbols, marks in a row, short and empty."""
    rng = random.Random(5)
    texts = ["", "あ", "。", "。。", "\n", "\n\n\n", " ", "あい", "！？あ！？", "a\r\nb", "は、…\nと・\n", "\ud800あ"]
    texts += ["あ" * n for n in (5, 9, 10, 11, 300)] + ["あいうえお" * 40, "😀𠮷" * 20, "一\n" * 200]
    pieces = [
        "この",
        "装置は",
        "モーター",
        "データを",
        "送る",
        "々",
        "ＡＢ",
        "x-1",
        " ",
        "\n",
        *"、，。．！…・",
        "？！",
    ]
    for _ in range(150):
        chosen = rng.sample(pieces, rng.randint(2, len(pieces)))
        texts.append("".join(rng.choices(chosen, k=rng.randint(1, 300))))
    for _ in range(60):  # many distinct letters: fewer fit in a key of the sort, so that it takes more rounds
        width = rng.choice([2, 70, 3_000, 20_000])
        text = "".join(chr(0x4E00 + rng.randrange(width)) for _ in range(rng.randint(20, 600)))
        texts.append(text + text[: rng.randint(0, 40)] + text[-rng.randint(1, 30) :])
    return texts


def test_values_equal_the_published_formulas_to_the_last_bit() -> None:
    """On 230 texts, short and empty ones included, where the published code stops."""
    texts = made_up()
    assert len(texts) >= 200
    for text in texts:
        found = measure(text)
        for name, value in published(text).items():
            assert found[name] == value, (name, text)


def test_names_and_types() -> None:
    """Both functions give what their lists name, in that order, as floats, for any text."""
    for text in ("", "説明書です。\n電源を入れる。"):
        assert tuple(quality.cheap(text)) == quality.CHEAP
        assert tuple(quality.repetition(text)) == quality.REPETITION
        assert {type(value) for value in measure(text).values()} == {float}
    assert quality.STATISTICS == quality.CHEAP + quality.REPETITION
    assert len(set(quality.STATISTICS)) == len(quality.STATISTICS)


def test_lines() -> None:
    """Fractions of lines leave blank ones out."""
    found = measure("見出し\n\n本文です。\n・箇条\n- 項目\n続きは…\n  \n終わり。\n本文です。")
    assert found["num_lines"] == 7
    assert found["punctuated_line_fraction"] == 3 / 7
    assert found["ellipsis_line_fraction"] == found["bullet_line_fraction"] == 1 / 7
    assert found["duplicate_line_fraction"] == 1 / 7
    assert found["avg_line_length"] == (3 + 5 + 3 + 4 + 4 + 4 + 5) / 7
    assert found["newlines_per_letter"] == 8 / 30  # 28 letters and the two blanks of a line


def test_letters() -> None:
    """Alphabetic ones beyond the basic plane count, emoji do not; kana is looked for in the first 50 letters."""
    assert measure("漢字a1 𠮷😀。")["num_alphabetic_letters"] == 4
    assert measure("漢字a1 𠮷😀。")["alphabetic_fraction"] == 4 / 7
    assert measure("x" * 49 + "あい")["num_kana_in_first_50"] == 1
    assert measure("x" * 50 + "あい")["num_kana_in_first_50"] == 0
    assert measure("の" * 5 + "は年")["num_stop_characters"] == 3
    assert measure("…#...abcd")["ellipses_per_letter"] == 2 / 9
    assert measure("…#...abcd")["hashes_per_letter"] == 1 / 9
    assert measure("はい。a。")["maru_fraction"] == 2 / 5


def test_toten_per_stop() -> None:
    """Commas per full stop, of the lines that have commas; a line end counts where there is no stop."""
    assert measure("a、b、c。\n見出し。\nd，e")["toten_per_stop"] == 3 / 2
    assert measure("a、" * 20)["toten_per_stop"] == 20
    assert measure("a。b。")["toten_per_stop"] == 0


def test_zlib_ratio() -> None:
    """Compressed over raw UTF-8 bytes, level 9."""
    text = "電源を入れてください。" * 30
    assert measure(text)["zlib_ratio"] == len(zlib.compress(text.encode(), 9)) / len(text.encode())


@pytest.mark.parametrize("n", [10, 14, 20])
def test_repeated_ngrams_are_taken_from_the_left_without_overlap(n: int) -> None:
    """As Gopher's rule counts: an n-gram that stood before is taken whole, and the next begins behind it."""
    rng = random.Random(n)
    for _ in range(40):
        parts = ["".join(chr(0x3041 + rng.randrange(80)) for _ in range(rng.randint(5, 60))) for _ in range(4)]
        text = "\n".join(rng.choices(parts, k=12))
        dense, taken, at = text.replace("\n", ""), 0, 0
        while at + n <= len(dense):
            again = dense.find(dense[at : at + n]) < at
            taken, at = taken + again, at + (n if again else 1)
        assert measure(text)[f"covered_by_repeated_{n}gram"] == taken * n / len(text)


def test_top_ngrams_cover() -> None:
    """Count times length of the most frequent n-gram, on the text without white space."""
    assert measure("あいうえ\nあいうえ\nかき")["covered_by_top_4gram"] == 2 * 4 / 12
    assert measure("あい う")["covered_by_top_4gram"] == 0


def test_what_is_not_asked_is_left_out_and_the_rest_is_the_same() -> None:
    """An early exit asks only for the groups that its profile's rules are about."""
    text = "電源を入れる。\n次に電源を入れる。\n" * 3
    whole = quality.repetition(text)
    for name in ("duplicate_7gram_character_fraction", "covered_by_repeated_20gram", "zlib_ratio"):
        part = quality.repetition(text, frozenset([name]))
        assert name in part and len(part) < len(whole)
        assert all(whole[key] == value for key, value in part.items())
