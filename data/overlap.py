"""Evaluation items in documents: which share of an item's character n-grams a document holds, and in how long a piece.

A model that has read an item is not measured by it. Brown et al. (2020, arXiv 2005.14165, appendix C) look for shared
13-grams of words and report scores on clean and dirty items apart; OpenAI (2023, arXiv 2303.08774, appendix C) look for
50 shared characters once spaces and symbols are gone. Japanese has no spaces, so here it is 13-grams of characters.
"""

import functools
import math
import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np

from console import UserError
from data import sources
from data.duplicates import jaccard

BASE = 0x9E3779B97F4A7C15  # odd, so that no character's weight vanishes modulo 2**64
SPREAD = 0xD6E8FEB86659FD93  # carries the last character of a gram to the top bits, by which `sieve` is addressed
BLOCK = 1 << 15  # grams hashed at a time: what lies between the passes stays in the cache
LAST_CODE = 0x3FFFF  # beyond are variation selectors and private use, which say nothing
FUZZY_NGRAM = 5  # characters, as near-duplicates are found by
BANDS, ROWS = 40, 3  # a signature's: a pair at Jaccard 0.35 shares a band in 83% of cases, at 0.02 in 0.03%
GLANCE = 0.1  # a passage is looked at once a document has this share of its grams
STRETCHES = 100  # of matching grams that are compared with the item in full, the longest first
CONTEXT, QUOTED = 20, 120  # characters of an excerpt around the run, and of the run itself


@dataclass(frozen=True)
class Rules:
    """When a document holds a passage; the meaning of each field is in data/contamination.py's configuration."""

    ngram: int = 13
    overlap: float = 0.5
    run: int = 50
    jaccard: float = 0.35
    shortest: int = 20
    common: int = 10


@dataclass(frozen=True)
class Hit:
    """`document` holds the field `key` of `item`: `overlap` and `jaccard` in [0, 1], `run` in characters after `fold`.

    `by` says by which rule: "overlap", "jaccard", or "run" where a piece of the item is all that it holds.
    """

    item: str
    set: str
    key: str
    document: str
    by: str
    overlap: float
    run: int
    jaccard: float
    excerpt_item: str
    excerpt_document: str

    def of(self) -> tuple[str, str, str]:
        """The field of the item that was hit."""
        return self.set, self.item, self.key


@functools.cache
def fold_table() -> np.ndarray:
    """(LAST_CODE + 1,) uint32: the lower case of every letter, mark and number; 0 for what `fold` drops."""
    table = np.zeros(LAST_CODE + 1, np.uint32)
    for code in range(LAST_CODE + 1):
        letter = chr(code)
        is_selector = 0xFE00 <= code <= 0xFE0F or 0x180B <= code <= 0x180F
        if unicodedata.category(letter)[0] in "LMN" and not is_selector:
            table[code] = ord(letter.lower()[0])
    return table


def fold(plain: str) -> np.ndarray:
    """uint32 code points of an NFKC text in lower case, 0 in the place of whitespace, punctuation and symbols.

    So a copy is found whatever its line breaks, widths and marks: `codes[codes != 0]` is what is compared.
    """
    raw = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), "<u4")
    return fold_table().take(raw, mode="clip")


def folded(text: str) -> np.ndarray:
    """(n,) uint32: the characters of `text` that are compared."""
    codes = fold(unicodedata.normalize("NFKC", text))
    return codes[codes != 0]


def hashed(codes: np.ndarray, n: int) -> np.ndarray:
    """(len(codes) - n + 1,) uint64: a polynomial hash modulo 2**64 of every run of `n` codes.

    Runs of 1, 2, 4, ... codes are joined as the bits of `n` say: five passes for n = 13 instead of thirteen.
    """
    length, have, width = len(codes) - n + 1, 0, 1
    if length <= 0:
        return np.empty(0, np.uint64)
    block, result = codes.astype(np.uint64) * np.uint64(SPREAD), np.empty(0, np.uint64)
    while True:
        weight = np.uint64(pow(BASE, width, 1 << 64))
        if n & width:
            joined = block[have:]
            result = result[: len(joined)] * weight + joined if have else joined
            have += width
        if have == n:
            return result
        block = block[:-width] * weight + block[width:]
        width *= 2


def bands(codes: np.ndarray) -> np.ndarray:
    """(BANDS,) uint64: one hash for every band of the MinHash signature of the character 5-grams."""
    from rensa import RMinHash

    grams = hashed(codes, FUZZY_NGRAM)
    digest = RMinHash.digest_matrix_from_flat_token_hashes(
        grams, np.array([0, len(grams)], np.uint64), num_perm=BANDS * ROWS, seed=0
    )
    rows = np.array(digest.to_rows()[0], np.uint64).reshape(BANDS, ROWS)
    weights = np.array([pow(BASE, k + 1, 1 << 64) for k in range(ROWS)], np.uint64)
    return (rows * weights).sum(1) + np.arange(BANDS, dtype=np.uint64)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard index of the sets of character 5-grams of two folded texts."""
    return jaccard(*(np.unique(hashed(codes, FUZZY_NGRAM)) for codes in (a, b)))


class Index:
    """Passages of evaluation items, to be looked up in documents. Plain arrays and strings: small, and it pickles.

    A passage is the text of one field of an item; what is equal after `fold` is one passage of many items, such as the
    paragraph under several questions. `states[set][item]` is "clean" where the item can be looked for. "too_short"
    says that none of its fields has `rules.shortest` characters, "indistinct" that what they say repeats itself or is
    common to too many passages: such items are not looked for, and counted.
    """

    def __init__(self, rules: Rules, fields: list[tuple[str, str, str, str]]) -> None:
        """`fields`: (set, item, key, text) of every field, in order."""
        self.rules = rules
        self.states: dict[str, dict[str, str]] = {}
        self.texts: list[str] = []
        self.owners: list[list[tuple[str, str, str]]] = []
        seen: dict[bytes, int] = {}
        for name, item, key, text in fields:
            self.states.setdefault(name, {}).setdefault(item, "too_short")
            codes = folded(text)
            if len(codes) < rules.shortest:
                continue
            passage = seen.setdefault(codes.tobytes(), len(self.texts))
            if passage == len(self.texts):
                self.texts.append(unicodedata.normalize("NFKC", text))
                self.owners.append([])
            self.owners[passage].append((name, item, key))
        folds = [folded(text) for text in self.texts]
        own = [np.unique(hashed(codes, rules.ngram)) for codes in folds]
        every = np.concatenate([*own, np.empty(0, np.uint64)])
        holders = np.repeat(np.arange(len(own)), [len(grams) for grams in own])
        self.grams, row, count = np.unique(every, return_inverse=True, return_counts=True)
        # Template text ("read the passage and answer") would make every document that has it a copy of every item.
        # Brown et al. leave out 13-grams of more than 10 documents for the same reason.
        kept = count <= rules.common
        order = np.argsort(row, kind="stable")
        self.holders = holders[order][kept[row[order]]]
        self.grams, count = self.grams[kept], count[kept]
        self.starts = np.concatenate([[0], np.cumsum(count)])
        self.kept = np.bincount(self.holders, minlength=len(own))
        self.length = np.array([len(codes) for codes in folds], np.int64)
        # How many distinct grams a document must share before a passage is looked at closely.
        glance = np.minimum(rules.run - rules.ngram + 1, np.ceil(min(GLANCE, rules.overlap) * self.kept))
        self.glance = np.maximum(1, np.where(self.length < rules.run, self.kept, glance)).astype(np.int64)
        enough = self.kept > rules.shortest - rules.ngram
        self.glance[~enough] = np.iinfo(np.int64).max
        for passage, owners in enumerate(self.owners):
            for name, item, _ in owners:
                if enough[passage] or self.states[name][item] == "too_short":
                    self.states[name][item] = "clean" if enough[passage] else "indistinct"
        bits = min(26, max(16, math.ceil(math.log2(32 * len(self.grams) + 1))))
        self.shift = np.uint64(64 - bits)
        self.sieve = np.zeros(1 << bits, bool)
        self.sieve[self.grams >> self.shift] = True
        fuzzy = [(passage, bands(folds[passage])) for passage in np.flatnonzero(enough & (self.length >= rules.run))]
        flat = np.concatenate([*(keys for _, keys in fuzzy), np.empty(0, np.uint64)])
        order = np.argsort(flat, kind="stable")
        self.bands, self.banded = flat[order], np.repeat([p for p, _ in fuzzy], BANDS).astype(np.int64)[order]
        lengths = self.length[[p for p, _ in fuzzy]]
        # Sets whose sizes differ more than the threshold cannot be as similar as it asks.
        self.fuzzy_lengths = (lengths.min() * rules.jaccard, lengths.max() / rules.jaccard) if fuzzy else (1, 0)

    @classmethod
    def build(
        cls,
        eval_sets: tuple[str, ...],
        keys: tuple[str, ...] = ("text",),
        id_key: str = "id",
        rules: Rules | None = None,
    ) -> "Index":
        """The index of all items of `eval_sets`, each a source string as `data build` takes, which names the set.

        An item's fields are its texts under `keys`, each looked for on its own. Raises UserError for what cannot be
        read, for two items of one id in a set, and for a set without items.
        """
        fields: list[tuple[str, str, str, str]] = []
        for source in dict.fromkeys(eval_sets):
            for key in keys:
                seen = set()
                for document in sources.read(source, text_key=key, id_key=id_key):
                    if document.id in seen:
                        raise UserError(
                            f"--eval_sets {source}: two items of id {document.id!r}: choose another --eval_id_key, "
                            "or --eval_id_key '' to number them"
                        )
                    seen.add(document.id)
                    fields.append((source, document.id, key, document.text))
                if not seen:
                    raise UserError(f"--eval_sets {source}: no item in it")
        return cls(rules or Rules(), fields)

    def hits(self, document: str, text: str) -> list[Hit]:
        """Every item that `text` holds, in the order of the items."""
        plain = unicodedata.normalize("NFKC", text)
        raw = fold(plain)
        codes = raw[raw != 0]
        at, rows = self.matches(codes)
        nothing = np.empty(0, np.int64)
        candidates: dict[int, np.ndarray] = {}  # of a passage: which of the matches are its grams
        if len(rows):
            distinct = np.unique(rows)
            sizes = self.starts[distinct + 1] - self.starts[distinct]
            into = np.arange(sizes.sum()) + np.repeat(self.starts[distinct] - np.cumsum(sizes) + sizes, sizes)
            holders, spread = self.holders[into], np.repeat(distinct, sizes)
            passages, counts = np.unique(holders, return_counts=True)
            for passage in passages[counts >= self.glance[passages]]:
                candidates[int(passage)] = np.flatnonzero(np.isin(rows, spread[holders == passage]))
        if self.fuzzy_lengths[0] <= len(codes) <= self.fuzzy_lengths[1]:
            keys = bands(codes)
            left, right = (np.searchsorted(self.bands, keys, side) for side in ("left", "right"))
            for begin, end in zip(left, right, strict=True):
                for passage in self.banded[begin:end]:
                    candidates.setdefault(int(passage), nothing)
        found, kept_at = [], np.flatnonzero(raw) if candidates else nothing
        for passage, mine in sorted(candidates.items()):
            if (held := self.judge(passage, codes, at[mine], self.grams[rows[mine]])) is None:
                continue
            by, overlap, run, similar, in_item, in_document = held
            text = self.texts[passage]
            of_item = excerpt(text, np.flatnonzero(fold(text)), in_item, run)
            of_document = excerpt(plain, kept_at, in_document, run)
            for name, item, key in self.owners[passage]:
                found.append(Hit(item, name, key, document, by, overlap, run, similar, of_item, of_document))
        return found

    def matches(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `codes` a gram of the index stands, and its row in `grams`; both int64."""
        n, nothing = self.rules.ngram, np.empty(0, np.int64)
        places, rows = [nothing], [nothing]
        for start in range(0, len(codes) - n + 1, BLOCK) if len(self.grams) else ():
            grams = hashed(codes[start : start + BLOCK + n - 1], n)
            near = np.flatnonzero(self.sieve[grams >> self.shift])
            row = np.searchsorted(self.grams, grams[near])
            row[row == len(self.grams)] = 0
            same = self.grams[row] == grams[near]
            places.append(near[same] + start)
            rows.append(row[same])
        return np.concatenate(places), np.concatenate(rows)

    def judge(
        self, passage: int, codes: np.ndarray, places: np.ndarray, grams: np.ndarray
    ) -> tuple[str, float, int, float, int, int] | None:
        """Whether the document `codes` holds a passage, whose `grams` stand at `places` in it; None if it does not.

        By which rule, overlap, run, Jaccard, and where the run begins in item and document. What the hashes say is
        confirmed on the characters before it counts.
        """
        rules, n, length = self.rules, self.rules.ngram, int(self.length[passage])
        item_codes = folded(self.texts[passage])
        item_grams = hashed(item_codes, n)
        order = np.argsort(item_grams, kind="stable")
        share, run, run_at, in_item, window = 0.0, 0, 0, 0, codes
        if len(places):
            windows = np.lib.stride_tricks.sliding_window_view
            grams, first = np.unique(grams, return_index=True)
            theirs = order[np.searchsorted(item_grams[order], grams)]
            same = (windows(item_codes, n)[theirs] == windows(codes, n)[places[first]]).all(axis=1)
            share = int(same.sum()) / int(self.kept[passage])
            run, run_at = longest_run(codes, item_codes, places, n)
            in_item = as_text(item_codes).find(as_text(codes[run_at : run_at + run]))
            window = codes[max(0, run_at - in_item) :][:length]
        similar = similarity(item_codes, window)
        # A short passage has to be there as a whole (as OpenAI have it): half a sentence is everybody's.
        is_long = length >= rules.run
        if share >= (rules.overlap if is_long else 1.0):
            by = "overlap"
        elif is_long and similar >= rules.jaccard:
            by = "jaccard"
        elif run >= rules.run:
            by = "run"
        else:
            return None
        return by, round(share, 4), run, round(similar, 4), in_item, run_at


def longest_run(codes: np.ndarray, item: np.ndarray, places: np.ndarray, n: int) -> tuple[int, int]:
    """Length in characters, and start in `codes`, of the longest piece of `item` whose grams all stand at `places`.

    Neighbouring grams of a document need not be neighbours in the item, so a stretch of them is looked up there. Of a
    document that repeats the item without end, so many stretches and so much of each are looked at.
    """
    cuts = np.flatnonzero(np.diff(places) != 1)
    begins = places[np.concatenate([[0], cuts + 1])]
    sizes = places[np.concatenate([cuts, [len(places) - 1]])] - begins + n
    whole, best, best_at = as_text(item), 0, 0
    for k in np.argsort(-sizes, kind="stable")[:STRETCHES]:
        if sizes[k] <= best:
            break
        stretch = as_text(codes[begins[k] : begins[k] + min(sizes[k], 4 * len(item))])
        if stretch in whole:
            best, best_at = len(stretch), int(begins[k])
        begin = 0
        while begin + best < len(stretch):
            if stretch[begin : begin + best + 1] in whole:
                best, best_at = best + 1, int(begins[k]) + begin
            else:
                begin += 1
    return best, best_at


def as_text(codes: np.ndarray) -> str:
    """Folded codes as a string."""
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def excerpt(plain: str, places: np.ndarray, start: int, run: int) -> str:
    """`run` characters of `plain` from the `start`-th that is compared, and a little around; these lie at `places`."""
    first, last = int(places[start]), int(places[min(start + (run or QUOTED), len(places)) - 1])
    end = last + 1 + CONTEXT if last < first + QUOTED else first + QUOTED
    return " ".join(plain[max(0, first - CONTEXT) : end].split())


def settled(found: dict[int, list[Hit]], common: int) -> dict[int, list[Hit]]:
    """`found`, the hits of each document hit, without common phrases: what more than `common` documents have of an
    item, and no more of it than that.

    Legal boilerplate and quotations are no leak (Brown et al. leave out 13-grams of more than 10 training documents);
    an item that stands in many documents as a whole is one and stays.
    """
    times = Counter(hit.of() for hits in found.values() for hit in hits if hit.by == "run")
    left = {n: [hit for hit in hits if hit.by != "run" or times[hit.of()] <= common] for n, hits in found.items()}
    return {number: hits for number, hits in left.items() if hits}
