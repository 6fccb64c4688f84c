"""Statistics of a text that the rules of a profile look at: counts of letters, sentences, lines, and repetition.

Those of Okazaki et al., "Building a Large Japanese Web Corpus" (arXiv:2404.17733), have the names and, to the last bit,
the values of their published code (github.com/swallow-llm/swallow-corpus, quality.py), where that code gives one.
"""

import bisect
import functools
import re
import zlib

import numpy as np

from data.dedup import shingles

CHEAP: tuple[str, ...] = (
    # Okazaki et al.
    "num_letters",
    "num_hiragana_letters",
    "num_katakana_letters",
    "num_kanji_letters",
    "num_kuten",
    "num_toten",
    "num_japanese_letters",
    "hiragana_fraction",
    "katakana_fraction",
    "kanji_fraction",
    "kuten_fraction",
    "toten_fraction",
    "japanese_fraction",
    "avg_sentence_length",
    "max_sentence_length",
    "num_sentences_ending_with_ellipsis",
    "ellipsis_fraction",
    # lines that are not blank
    "num_lines",
    "avg_line_length",
    "punctuated_line_fraction",
    "ellipsis_line_fraction",
    "bullet_line_fraction",
    # the whole text
    "num_alphabetic_letters",
    "alphabetic_fraction",
    "newlines_per_letter",
    "hashes_per_letter",
    "ellipses_per_letter",
    "num_stop_characters",
    "num_kana_in_first_50",
    "maru_fraction",
    "toten_per_stop",
)
TOP, DUPLICATE = range(2, 5), range(5, 11)  # n of the n-grams of Okazaki et al.
TOP_WIDE, REPEATED_WIDE = range(4, 9, 2), range(10, 21, 2)  # FineWeb-2's word n-grams in letters, two to a word
NARROW = (
    *(f"top_{n}gram_character_fraction" for n in TOP),
    *(f"duplicate_{n}gram_character_fraction" for n in DUPLICATE),
)
WIDE = (*(f"covered_by_top_{n}gram" for n in TOP_WIDE), *(f"covered_by_repeated_{n}gram" for n in REPEATED_WIDE))
REPETITION: tuple[str, ...] = (
    "duplicate_paragraph_fraction",
    "duplicate_paragraph_fraction_in_character",
    "duplicate_sentence_fraction",
    "duplicate_sentence_fraction_in_character",
    "duplicate_line_fraction",
    "duplicate_line_letters_fraction",
    *NARROW,
    *WIDE,
    "zlib_ratio",
)
STATISTICS = CHEAP + REPETITION

SENTENCE = re.compile(r"[^。．！？!?\n]+[。．！？!?]?")
# A mark that follows another mark or stands first in its line belongs to no sentence, so to no paragraph either.
STRAY_MARKS = re.compile(r"(?<![^。．！？!?\n])[。．！？!?]+")
KANA = re.compile("[ぁ-んァ-ン]")
LINE_ENDS = ("。", "．", ".", "！", "!", "？", "?", "｡")  # of datatrove's TERMINAL_PUNCTUATION, what Japanese uses
BULLETS = ("•", "-")
STOP_CHARACTERS = frozenset("のにをはたてがとで年し・月れさ")  # FineWeb-2, configs/jpn_Jpan.yml
HIRAGANA, KATAKANA, KANJI, KUTEN, TOTEN, ALPHABETIC, SPACE = range(1, 8)


def cheap(text: str) -> dict[str, float]:
    """The statistics named in CHEAP, in time linear in the text.

    `toten_per_stop` is the commas of the lines that have any, per 。 or ． there or such a line's end: sentences strung
    together. `maru_fraction` is 。 per letter. Where there is nothing to divide by, a fraction is 0.0.
    """
    kinds = np.bincount(classes()[np.minimum(code_points(text), 0xFFFF)], minlength=SPACE + 1).tolist()
    japanese = sum(kinds[HIRAGANA : TOTEN + 1])
    letters, newlines = len(text), text.count("\n")
    alphabetic = sum(kinds[kind] for kind in (HIRAGANA, KATAKANA, KANJI, ALPHABETIC))
    if kinds[0] and not text.isascii() and max(text) > "\uffff":
        alphabetic += sum(letter > "\uffff" and letter.isalpha() for letter in text)
    sentences = SENTENCE.findall(text)
    sentence_lengths = [len(sentence) for sentence in sentences]
    trailing_off = sum(sentence.strip().endswith(("・", "…")) for sentence in sentences)
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    ellipses = text.count("...") + text.count("…")
    return {
        "num_letters": float(letters),
        "num_hiragana_letters": float(kinds[HIRAGANA]),
        "num_katakana_letters": float(kinds[KATAKANA]),
        "num_kanji_letters": float(kinds[KANJI]),
        "num_kuten": float(kinds[KUTEN]),
        "num_toten": float(kinds[TOTEN]),
        "num_japanese_letters": float(japanese),
        "hiragana_fraction": ratio(kinds[HIRAGANA], japanese),
        "katakana_fraction": ratio(kinds[KATAKANA], japanese),
        "kanji_fraction": ratio(kinds[KANJI], japanese),
        "kuten_fraction": ratio(kinds[KUTEN], japanese),
        "toten_fraction": ratio(kinds[TOTEN], japanese),
        "japanese_fraction": ratio(japanese, letters),
        "avg_sentence_length": ratio(sum(sentence_lengths), len(sentences)),
        "max_sentence_length": float(max(sentence_lengths, default=0)),
        "num_sentences_ending_with_ellipsis": float(trailing_off),
        "ellipsis_fraction": ratio(trailing_off, len(sentences)),
        "num_lines": float(len(lines)),
        "avg_line_length": ratio(sum(map(len, lines)), len(lines)),
        "punctuated_line_fraction": ratio(sum(line.endswith(LINE_ENDS) for line in lines), len(lines)),
        "ellipsis_line_fraction": ratio(sum(line.endswith(("…", "...")) for line in lines), len(lines)),
        "bullet_line_fraction": ratio(sum(line.startswith(BULLETS) for line in lines), len(lines)),
        "num_alphabetic_letters": float(alphabetic),
        "alphabetic_fraction": ratio(alphabetic, letters - kinds[SPACE]),
        "newlines_per_letter": ratio(newlines, letters - newlines),
        "hashes_per_letter": ratio(text.count("#"), letters),
        "ellipses_per_letter": ratio(ellipses, letters),
        "num_stop_characters": float(sum(letter in text for letter in STOP_CHARACTERS)),
        "num_kana_in_first_50": float(len(KANA.findall(text[:50]))),
        "maru_fraction": ratio(text.count("。"), letters),
        "toten_per_stop": toten_per_stop(lines),
    }


def toten_per_stop(lines: list[str]) -> float:
    """Commas per 。 or ． in those of `lines` that have a comma; a line without a stop counts as one."""
    commas = stops = 0
    for line in lines:
        if found := line.count("、") + line.count("，"):
            commas += found
            stops += line.count("。") + line.count("．") or 1
    return ratio(commas, stops)


def repetition(text: str, asked: frozenset[str] = frozenset(REPETITION)) -> dict[str, float]:
    """The statistics named in REPETITION; n-grams are of characters of the raw text, newlines and all.

    At least those that are `asked`: of what takes long, no more. A text too short for an n-gram has 0.0
    (the published code of Okazaki et al. fails there). `covered_by_*` follow FineWeb-2's way of counting, on the text
    without white space: the share of the letters in the most frequent n-gram, and in n-grams that stood earlier in the
    text, taken from left to right without overlap.
    """
    paragraphs = STRAY_MARKS.sub("", text).split("\n")
    sentences = SENTENCE.findall(text)
    lines = [line for line in text.split("\n") if line.strip()]
    found = {}
    for name, items in (("paragraph", paragraphs), ("sentence", sentences)):
        repeats, letters = duplicates(items)
        found[f"duplicate_{name}_fraction"] = ratio(repeats, len(items))
        found[f"duplicate_{name}_fraction_in_character"] = ratio(letters, sum(map(len, items)))
    repeats, letters = duplicates(lines)
    found["duplicate_line_fraction"] = ratio(repeats, len(lines))
    found["duplicate_line_letters_fraction"] = ratio(letters, len(text) - text.count("\n"))
    if not asked.isdisjoint(NARROW):
        found |= narrow_ngrams(text)
    if not asked.isdisjoint(WIDE):
        found |= wide_ngrams(text, asked)
    if "zlib_ratio" in asked:
        raw = text.encode("utf-8", "surrogatepass")
        found["zlib_ratio"] = ratio(len(zlib.compress(raw, 9)), len(raw))
    return found


def narrow_ngrams(text: str) -> dict[str, float]:
    """The share of the most frequent n-gram, and of the distinct n-grams those that occur twice: NARROW."""
    found = dict.fromkeys(NARROW, 0.0)
    if not text:
        return found
    length = len(text)
    _, shared = sort_suffixes(code_points(text), DUPLICATE[-1])
    for n in TOP:
        found[f"top_{n}gram_character_fraction"] = ratio(most(shared, n), max(0, length - n + 1))
    for n in DUPLICATE:
        same = shared >= n
        # A run of rows that equal the row before is one n-gram with a count above 1.
        twice = int(np.count_nonzero(same[1:] & ~same[:-1]))
        distinct = max(0, length - n + 1) - int(np.count_nonzero(same))
        found[f"duplicate_{n}gram_character_fraction"] = ratio(twice, distinct)
    return found


def wide_ngrams(text: str, asked: frozenset[str]) -> dict[str, float]:
    """The shares of the letters that FineWeb-2's n-grams cover, two letters to a word: those of WIDE that are asked."""
    dense = "".join(text.split())
    found = {name: 0.0 for name in WIDE if name in asked}
    if not dense:
        return found
    length = len(text)
    top = [n for n in TOP_WIDE if f"covered_by_top_{n}gram" in asked]
    repeated = [n for n in REPEATED_WIDE if f"covered_by_repeated_{n}gram" in asked]
    if not top and len(repeated) == 1:  # one length: hashes are sorted in a third of the time
        n = repeated[0]
        hashes = shingles(text, n)
        order = np.argsort(hashes, kind="stable")
        same = np.zeros(len(order), bool)
        same[1:] = hashes[order[1:]] == hashes[order[:-1]]
        paired = same.copy()
        paired[:-1] |= same[1:]
        return {f"covered_by_repeated_{n}gram": repeats_from_left(order[paired], same[paired], n) * n / length}
    order, shared = sort_suffixes(code_points(dense), max(top + repeated))
    for n in top:
        found[f"covered_by_top_{n}gram"] = most(shared, n) * n / length if n <= len(dense) else 0.0
    if not repeated:
        return found
    paired = shared >= repeated[0]
    paired[:-1] |= paired[1:]
    order, shared = order[paired], shared[paired]
    for n in repeated:
        found[f"covered_by_repeated_{n}gram"] = repeats_from_left(order, shared >= n, n) * n / length
    return found


def sort_suffixes(codes: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The starts of all n-grams, n <= depth, sorted by their first `depth` characters (the text is padded at its end).

    Returns `order` (L,) and `shared` (L,): how many leading characters, at most `depth`, a row has in common with the
    row before it. Equal n-grams are neighbours for every n at once, so one sort serves all the counts. Each round
    packs as many characters as fit behind the number of the group that a row is tied in, and sorts the tied alone.
    """
    length = len(codes)
    ranks, distinct = dense_ranks(codes)
    padded = np.zeros(length + depth, np.int64)  # 0, which no character has, ends the text: no n-gram runs over it
    padded[:length] = ranks
    bits = distinct.bit_length()
    order, shared = np.arange(length), np.zeros(length, np.int8)
    rows, groups, done = np.arange(length), np.zeros(length, np.int64), 0
    while done < depth and len(rows):
        taken = min((63 - int(groups[-1]).bit_length()) // bits, depth - done)
        starts = order[rows] + done
        key = groups
        for step in range(taken):
            key = key << bits | padded[starts + step]
        by_key = np.argsort(key)
        key = key[by_key]
        order[rows] = order[rows[by_key]]
        apart = key[1:] ^ key[:-1]  # its highest bit says which of the packed characters is the first to differ
        alike = np.full(len(apart), done, np.int8)
        for rest in range(taken):
            alike += apart < 1 << (rest * bits)
        same_group = apart < 1 << (taken * bits)
        shared[rows[1:][same_group]] = alike[same_group]
        done += taken
        tied = apart == 0
        inside = np.zeros(len(rows), bool)
        inside[1:] = tied
        inside[:-1] |= tied
        groups = np.cumsum(np.concatenate(([True], ~tied)))[inside]
        rows = rows[inside]
    return order, shared


def most(shared: np.ndarray, n: int) -> int:
    """How often the most frequent n-gram occurs, by what each suffix shares with the one before it in order."""
    edges = np.concatenate((np.flatnonzero(shared < n), [len(shared)]))
    return int((edges[1:] - edges[:-1]).max())


def repeats_from_left(starts: np.ndarray, same: np.ndarray, n: int) -> int:
    """How many n-grams that stood earlier one can take from left to right without overlap.

    `starts` come in groups of equal n-grams; `same` is False for the first row of each group.
    """
    if not same.any():
        return 0
    first = np.minimum.reduceat(starts, np.flatnonzero(~same))[np.cumsum(~same) - 1]
    again = np.sort(starts[starts != first]).tolist()
    taken = at = 0
    while at < len(again):
        taken, at = taken + 1, bisect.bisect_left(again, again[at] + n, at)
    return taken


def dense_ranks(codes: np.ndarray) -> tuple[np.ndarray, int]:
    """`codes` numbered 1, 2, ... in the order of their values, and how many there are."""
    size = int(codes.max()) + 1
    present = np.zeros(size, bool)
    present[codes] = True
    distinct = np.flatnonzero(present)
    rank = np.empty(size, np.int32)
    rank[distinct] = np.arange(1, len(distinct) + 1)
    return rank[codes], len(distinct)


def duplicates(items: list[str]) -> tuple[int, int]:
    """How many of `items` repeat an earlier one, and how many letters those have."""
    distinct = set(items)
    return len(items) - len(distinct), sum(map(len, items)) - sum(map(len, distinct))


def code_points(text: str) -> np.ndarray:
    """The characters of `text` as numbers, (L,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@functools.cache
def classes() -> np.ndarray:
    """The kind of every code point below 0x10000, (65536,) uint8; the ranges are those of Okazaki et al."""
    kinds = np.zeros(0x10000, np.uint8)
    for code in range(0xFFFF):  # the last one, no character, stands for all beyond
        letter = chr(code)
        kinds[code] = ALPHABETIC if letter.isalpha() else SPACE if letter.isspace() else 0
    kinds[0x3041 : 0x3096 + 1] = HIRAGANA
    kinds[0x30A1 : 0x30FA + 1] = KATAKANA
    kinds[0x3400 : 0x9FFF + 1] = KANJI
    kinds[0xF900 : 0xFAFF + 1] = KANJI
    kinds[[ord(letter) for letter in "々〇〻"]] = KANJI
    kinds[[ord(letter) for letter in "。．！？"]] = KUTEN
    kinds[[ord(letter) for letter in "、，"]] = TOTEN
    return kinds


def ratio(part: float, whole: float) -> float:
    """`part / whole`, 0.0 of nothing."""
    return part / whole if whole else 0.0
