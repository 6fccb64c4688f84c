"""How alike two Japanese instructions are: ROUGE-L over a segmentation that is made for Japanese, at 52,000 a go.

    python -m posttrain.similarity calibrate
    python -m posttrain.similarity dedup IN.jsonl --out OUT.jsonl

Self-instruct (Wang et al. 2022) drops an instruction whose ROUGE-L F with one that it has is above 0.7. Its tokenizer
keeps [a-z0-9] alone: two equal Japanese texts score 0, "JSONで出力" and "JSONで要約" score 1. Here the cut into
tokens is chosen, with its threshold, by pairs that people labelled.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import console
from data.progress import progress
from posttrain import rows
from posttrain.segmentation import SEGMENT, Segmentation

SEGMENTATION: Segmentation = "content"
THRESHOLD = 0.87
"""the two that `calibrate` chose on the dev half of similar_pairs.jsonl; two texts are alike above it"""
ROWS = 512  # texts compared at a time
WORDS = 4  # of 64 bits in a signature


class Texts:
    """Texts as they are compared, in the order in which they are added: each token is one character of a string.

    Equal texts score 1, also those without any token. F of two sequences with a longest common subsequence of LCS
    tokens is 2PR / (P + R) with P = LCS / len a and R = LCS / len b (Lin 2004), which is 2 LCS / (len a + len b).
    """

    def __init__(self, segmentation: Segmentation = SEGMENTATION) -> None:
        self.segment = SEGMENT[segmentation]
        self.ids: dict[str, str] = {}
        self.strings: list[str] = []

    def encode(self, text: str) -> str:
        """Tokens of `text` as characters, the same ones for the same tokens."""
        # Beyond 0x10000, where no surrogates are.
        tokens = self.segment(text) or [text]
        return "".join(self.ids.setdefault(token, chr(0x10000 + len(self.ids))) for token in tokens)

    def add(self, text: str) -> None:
        self.strings.append(self.encode(text))

    def scores(self, texts: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """ROUGE-L F (len(texts), texts added so far), exact."""
        from rapidfuzz import process
        from rapidfuzz.distance import LCSseq

        coded = [self.encode(text) for text in texts]
        if not coded or not self.strings:
            return np.zeros((len(coded), len(self.strings)))
        lcs = process.cdist(coded, self.strings, scorer=LCSseq.similarity, dtype=np.uint32, workers=-1)
        lengths = np.array([len(s) for s in self.strings])
        return 2 * lcs / (np.array([len(s) for s in coded])[:, None] + lengths)

    def nearest(self, texts: Sequence[str]) -> list[tuple[int, float]]:
        """For each of `texts` the text added that is most like it, the first of equals, and its score; (-1, 0) if there
        is none."""
        scores = self.scores(texts)
        if not scores.size:
            return [(-1, 0.0)] * len(texts)
        return [(int(row.argmax()), float(row.max())) for row in scores]

    def admit(self, texts: Sequence[str], threshold: float) -> list[tuple[bool, int, float]]:
        """Add those of `texts`, in order, that score at most `threshold` with all that are there, and tell of each
        whether it was added, and its nearest with the score, as `nearest` has it."""
        before, among = self.nearest(texts), self.among(texts)
        fates, added = list[tuple[bool, int, float]](), list[tuple[int, int]]()
        for i, text in enumerate(texts):
            place, score = before[i]
            for j, other in added:
                if among[i, j] > score:
                    place, score = other, float(among[i, j])
            fates.append((score <= threshold, place, score))
            if score <= threshold:
                added.append((i, len(self.strings)))
                self.add(text)
        return fates

    def among(self, texts: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """ROUGE-L F (len(texts), len(texts)) of `texts` with each other."""
        these = Texts()
        these.segment, these.ids = self.segment, self.ids
        for text in texts:
            these.add(text)
        return these.scores(texts)


def signatures(strings: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """For each string WORDS * 64 bits: of how many of its characters fall to a bit, the parity. Shape (WORDS, n).

    Two multisets differ in at least as many elements as their signatures in bits, and what two sequences have apart
    from a common subsequence is at least that: len a + len b - 2 LCS(a, b) >= bits that differ.
    """
    lengths = np.array([len(s) for s in strings])
    points = np.frombuffer("".join(strings).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    bit = (points * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)  # Fibonacci hashing to WORDS * 64 = 256 bits
    marks = np.zeros((WORDS, len(points)), dtype=np.uint64)
    marks[(bit >> np.uint64(6)).astype(int), np.arange(len(points))] = np.uint64(1) << (bit & np.uint64(63))
    ends = np.concatenate([[0], lengths.cumsum()])
    marks = np.concatenate([marks, np.zeros((WORDS, 1), dtype=np.uint64)], axis=1)
    signed = np.bitwise_xor.reduceat(marks, ends[:-1], axis=1)
    return np.where(lengths > 0, signed, np.uint64(0))


def close_pairs(
    rows: tuple[Sequence[str], Any], columns: tuple[Sequence[str], Any], threshold: float
) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """(row, column, score) of every pair of strings with ROUGE-L above `threshold`; each side with its signatures.

    LCS <= min(len) and the signatures' bound rule out nearly all pairs before one is compared.
    """
    from rapidfuzz import process
    from rapidfuzz.distance import LCSseq

    first, second = (np.array([len(s) for s in side[0]], dtype=np.int32) for side in (rows, columns))
    total = first[:, None] + second
    possible = 2 * np.minimum(first[:, None], second) > threshold * total
    apart = np.zeros(possible.shape, dtype=np.uint16)
    for word in range(WORDS):
        apart += np.bitwise_count(rows[1][word][:, None] ^ columns[1][word])
    possible &= total - apart > threshold * total
    row, column = np.nonzero(possible)
    if not len(row):
        return row, column, np.zeros(0)
    a, b = [rows[0][i] for i in row.tolist()], [columns[0][j] for j in column.tolist()]
    lcs = process.cpdist(a, b, scorer=LCSseq.similarity, dtype=np.uint32, workers=-1)
    score = 2 * lcs.astype(np.int64) / total[row, column]
    above = score > threshold
    return row[above], column[above], score[above]


def dedup(texts: Sequence[str], segmentation: Segmentation, threshold: float) -> list[tuple[int, float] | None]:
    """For each text None where it is kept, else the kept earlier text most like it and their score.

    Greedy in the given order, as self-instruct: a text is dropped where one that was kept before scores above
    `threshold`. The result is that of comparing all pairs; memory is bounded by ROWS times the number of texts.
    """
    coded = Texts(segmentation)
    with progress("segmenting", len(texts), "texts") as advance:
        for text in texts:
            coded.add(text)
            advance(1)
    strings, fate, kept = coded.strings, list[tuple[int, float] | None](), np.zeros(len(texts), dtype=bool)
    signed = signatures(strings) if strings else np.zeros((WORDS, 0), dtype=np.uint64)
    with progress("dedup", len(strings), "texts") as advance:
        for begin in range(0, len(strings), ROWS):
            end = min(begin + ROWS, len(strings))
            earlier = np.concatenate([np.flatnonzero(kept[:begin]), np.arange(begin, end)])
            block = strings[begin:end], signed[:, begin:end]
            others = [strings[i] for i in earlier], signed[:, earlier]
            row, column, score = close_pairs(block, others, threshold)
            close: list[list[tuple[float, int]]] = [[] for _ in range(end - begin)]
            for i, j, f in zip(row.tolist(), earlier[column].tolist(), score.tolist(), strict=True):
                if j < begin + i:
                    close[i].append((-f, j))
            for i, found in enumerate(close):
                alive = [(negative, j) for negative, j in found if kept[j]]
                kept[begin + i] = not alive
                fate.append((min(alive)[1], -min(alive)[0]) if alive else None)
            advance(end - begin)
    return fate


# --- doors ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DedupConfig:
    """Drop the rows whose instruction is much like one that was kept before."""

    data: Annotated[str, tyro.conf.Positional]
    """JSONL of rows with the field --key"""
    out: str
    """JSONL of the rows that are kept"""
    key: str = "instruction"
    """field that holds the text"""
    segmentation: Segmentation = SEGMENTATION
    """how a text is cut into tokens; sudachi needs its packages"""
    threshold: float = THRESHOLD
    """ROUGE-L F above which two texts are too much alike"""
    json: bool = False
    """print one JSON object"""


def dedup_file(argv: list[str]) -> int:
    """The door of `dedup`. Raises UserError naming the line that lacks its text."""
    c = console.parse(DedupConfig, argv, "python -m posttrain.similarity dedup")
    if not 0 <= c.threshold <= 1:
        raise console.UserError(f"--threshold {c.threshold}: is a share, from 0 to 1")
    out = Path(c.out)
    if out.is_dir() or not out.parent.is_dir():
        raise console.UserError(f"--out {out}: give a file in a folder that is there")
    found, texts = [], []
    for where, row in rows.records(c.data):
        if not isinstance(row.get(c.key), str):
            raise console.UserError(f"{where}: no text {c.key}: give --key")
        found.append(row)
        texts.append(row[c.key])
    fate = dedup(texts, c.segmentation, c.threshold)
    kept = [row for row, dropped in zip(found, fate, strict=True) if dropped is None]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    console.write_atomic(out, lines.encode("utf-8", "replace"))
    told = {"texts": len(texts), "kept": len(kept), "dropped": len(texts) - len(kept), "out": str(out)}
    console.print_result(told, as_json=c.json)
    return 0


def main() -> int | None:
    command, *argv = sys.argv[1:] or ["--help"]
    if command == "dedup":
        return dedup_file(argv)
    if command == "calibrate":
        from posttrain import calibration

        return calibration.main(argv)
    if command in ("-h", "--help"):
        print(f"usage: python -m posttrain.similarity {{calibrate,dedup}} [--flag value ...]\n\n{__doc__}")
        return 0
    raise console.UserError(f"unknown command {command!r}: choose calibrate or dedup")


if __name__ == "__main__":
    console.door(main)
