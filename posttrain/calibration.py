"""Which segmentation and threshold tell instructions apart as people do: `python -m posttrain.similarity calibrate`."""

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import console
from posttrain import rows
from posttrain.segmentation import SEGMENT

PAIRS = Path(__file__).with_name("similar_pairs.jsonl")
BETA = 0.5  # precision counts twice: a task that is lost costs more than a duplicate that stays


@dataclass(frozen=True)
class CalibrateConfig:
    """Choose segmentation and threshold on the dev pairs, and show what they are worth on the test pairs."""

    pairs: str = str(PAIRS)
    """JSONL of {"a", "b", "same": true or false, "split": "dev" or "test"}"""
    json: bool = False
    """print one JSON object"""


@dataclass(frozen=True)
class Pair:
    """Two instructions and whether a person holds them to ask for the same."""

    a: str
    b: str
    same: bool
    split: str


@dataclass(frozen=True)
class Verdict:
    """What `score > threshold` finds of the pairs that are the same."""

    segmentation: str
    threshold: float
    found: int
    right: int
    """of those found, the pairs that are the same"""
    same: int
    """pairs that are"""

    @property
    def precision(self) -> float:
        """1 where nothing is found."""
        return self.right / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        return self.right / self.same

    @property
    def f(self) -> float:
        """F of BETA."""
        below = BETA**2 * self.precision + self.recall
        return (1 + BETA**2) * self.precision * self.recall / below if below else 0.0


def read_pairs(path: Path) -> list[Pair]:
    """The labelled pairs of a JSONL file. Raises UserError naming the line."""
    pairs = []
    for where, row in rows.records(str(path)):
        a, b, same, split = (row.get(name) for name in ("a", "b", "same", "split"))
        if not (isinstance(a, str) and isinstance(b, str) and isinstance(same, bool) and split in ("dev", "test")):
            raise console.UserError(f"{where}: a pair has texts a and b, same true or false, and split dev or test")
        pairs.append(Pair(a, b, same, split))
    for split in ("dev", "test"):
        if {pair.same for pair in pairs if pair.split == split} != {True, False}:
            raise console.UserError(f"{path}: split {split} needs pairs that are the same and pairs that are not")
    return pairs


def scores(pairs: Sequence[Pair], segment: Callable[[str], list[str]]) -> list[float]:
    """ROUGE-L F of each pair; a text without tokens scores 0, as in self-instruct's own package."""
    from rapidfuzz.distance import LCSseq

    cut = [(segment(pair.a), segment(pair.b)) for pair in pairs]
    return [2 * int(LCSseq.similarity(a, b)) / (len(a) + len(b)) if a and b else 0.0 for a, b in cut]


def judge(name: str, scored: Sequence[float], pairs: Sequence[Pair], threshold: float) -> Verdict:
    found = [pair.same for pair, score in zip(pairs, scored, strict=True) if score > threshold]
    return Verdict(name, threshold, len(found), sum(found), sum(pair.same for pair in pairs))


def choose(pairs: Sequence[Pair], names: Sequence[str]) -> list[Verdict]:
    """The best threshold, in hundredths, of each segmentation on `pairs`, the best first.

    Of thresholds that tie the middle one is taken, which is farthest from either error.
    """
    best = []
    for name in names:
        scored = scores(pairs, SEGMENT[name])
        verdicts = [judge(name, scored, pairs, hundredths / 100) for hundredths in range(30, 100)]
        top = max(verdict.f for verdict in verdicts)
        tied = [verdict for verdict in verdicts if verdict.f == top]
        best.append(tied[len(tied) // 2])
    return sorted(best, key=lambda verdict: -verdict.f)


def original(text: str) -> list[str]:
    """Tokens as self-instruct's ROUGE package cuts them, without stemming."""
    return re.findall(r"[a-z0-9]+", text.lower())


def share(part: int, whole: int) -> str:
    """A share with its 95% Wilson interval."""
    from scipy.stats import binomtest

    if not whole:
        return "-"
    interval = binomtest(part, whole).proportion_ci(method="wilson")
    return f"{part / whole:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def main(argv: list[str]) -> int:
    c = console.parse(CalibrateConfig, argv, "python -m posttrain.similarity calibrate")
    pairs = read_pairs(Path(c.pairs))
    dev, test = ([pair for pair in pairs if pair.split == split] for split in ("dev", "test"))
    names = [name for name in SEGMENT if name != "sudachi" or importlib.util.find_spec("sudachipy")]
    chosen = choose(dev, names)
    tested = [judge(v.segmentation, scores(test, SEGMENT[v.segmentation]), test, v.threshold) for v in chosen]
    baseline = judge("original at 0.7", scores(test, original), test, 0.7)
    if c.json:
        best = {"segmentation": chosen[0].segmentation, "threshold": chosen[0].threshold}
        figures = {"precision": tested[0].precision, "recall": tested[0].recall, "pairs": len(test)}
        console.print_result(best | figures, as_json=True)
        return 0
    print(f"{len(dev)} dev pairs choose, {len(test)} test pairs tell (95% intervals); same ones: {tested[0].same}")
    print(f"{'segmentation':<16}{'threshold':>9}  {'dev F0.5':>8}  {'test F0.5':>9}  test precision, recall")
    for v, t in [*zip(chosen, tested, strict=True), (None, baseline)]:
        dev_f = f"{v.f:.3f}" if v else "-"
        told = f"{share(t.right, t.found)}  {share(t.right, t.same)}"
        print(f"{t.segmentation:<16}{t.threshold:>9.2f}  {dev_f:>8}  {t.f:>9.3f}  {told}")
    return 0
