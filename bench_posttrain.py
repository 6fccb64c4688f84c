"""`python bench_posttrain.py`: 52,000 synthetic instructions de-duplicated against three minutes on two cores, and
ROUGE-L by the pair against the pure Python that self-instruct calls.

The instructions are put together from parts, so that they have what such collections have: many that share most of
their words, some that are the same but for politeness. A part of them is held against the plain rule, pair by pair.
"""

import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import console
from posttrain import similarity
from posttrain.segmentation import SEGMENT

SECONDS = 180.0  # the limit
ROUNDS = 5
THINGS = str.split(
    "請求書 見積書 議事録 出張報告 顧客アンケート 就業規則 取扱説明書 求人票 社内報 契約書 在庫表 勤怠表 提案書 日報 "
    "仕様書 稟議書 プレスリリース 商品紹介 問い合わせ 苦情 安全手順 研修資料 予算案 工程表 検査記録 会議案内 "
    "配送計画 売上データ 評価シート 防災計画"
)
PLACES = str.split(
    "営業部 経理部 人事部 工場 倉庫 店舗 病院 役所 学校 旅館 建設現場 研究所 コールセンター 物流拠点 農協 銀行 "
    "飲食店 保育園 図書館 空港 製薬会社 印刷会社 介護施設 不動産会社 清掃会社 自動車販売店 港湾 電力会社 通信会社 "
    "出版社"
)
ACTS = str.split(
    "要約して 分類して 英語に訳して 表にまとめて 誤りを直して 敬語に書き換えて 要点を三つ挙げて 件名を付けて "
    "返信を書いて 手順に分けて リスクを洗い出して 質問を五つ作って 箇条書きにして 短く言い換えて 数値を抜き出して "
    "優先順位を付けて 見出しを付けて 比較して JSONにして 期限を一覧にして 原因を推測して 改善案を出して "
    "宛先ごとに分けて 用語を説明して 合計を計算して 日付順に並べて"
)
LIMITS = str.split(
    "100字以内で 小学生にも分かるように 専門用語を使わずに 結論から先に 丁寧な言葉で 300字程度で 図を使わずに "
    "例を一つ添えて 三段落で 初めての担当者に向けて 役員に向けて 取引先に向けて 箇条書きで 根拠を添えて "
    "費用にも触れて 期限を明記して"
)
ENDS = ("ください。", "なさい。", "ほしいです。", "もらえますか。", "いただけますか。")


@dataclass(frozen=True)
class Config:
    """De-duplication at the size of self-instruct's own collection."""

    texts: int = 52_000
    checked: int = 600
    """of them, held against the plain rule"""
    json: bool = False
    """print the entries as one JSON list"""


def write(number: int, rng: random.Random) -> list[str]:
    """`number` instructions."""
    texts = []
    for _ in range(number):
        where, what, how = rng.choice(PLACES), rng.choice(THINGS), rng.choice(ACTS)
        limit = rng.choice(LIMITS) if rng.random() < 0.7 else ""
        more = f"なお、{rng.choice(THINGS)}の{rng.randint(2, 40)}番にも触れて" if rng.random() < 0.5 else ""
        texts.append(f"{where}の{what}を{limit}{how}{rng.choice(ENDS)}" + (more + "ください。" if more else ""))
    return texts


def plain_lcs(a: list[str], b: list[str]) -> int:
    """Longest common subsequence as self-instruct's ROUGE package computes it: the whole table in pure Python."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            if a[i - 1] == b[j - 1]:
                table[i][j] = table[i - 1][j - 1] + 1
            else:
                table[i][j] = max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def plain_score(a: list[str], b: list[str]) -> float:
    return 2 * plain_lcs(a, b) / (len(a) + len(b))


def check(texts: list[str], threshold: float) -> None:
    """Raises RuntimeError where `dedup` and the plain rule keep different ones."""
    tokens, kept = [SEGMENT[similarity.SEGMENTATION](text) for text in texts], list[int]()
    for i, some in enumerate(tokens):
        if all(plain_score(some, tokens[j]) <= threshold for j in kept):
            kept.append(i)
    ours = [i for i, fate in enumerate(similarity.dedup(texts, similarity.SEGMENTATION, threshold)) if fate is None]
    if ours != kept:
        raise RuntimeError(f"dedup keeps {len(ours)} of {len(texts)} texts, the plain rule {len(kept)}: not the same")


def rates(texts: list[str]) -> tuple[float, float, float]:
    """Pairs a second, ours and pure Python's, and the median of their ratios round by round."""
    known = similarity.Texts()
    for text in texts:
        known.add(text)
    some, tokens = texts[:200], [SEGMENT[similarity.SEGMENTATION](text) for text in texts[:3000]]
    pairs = []
    for begin in range(ROUNDS):
        started = time.perf_counter()
        known.scores(some)
        ours = len(some) * len(texts) / (time.perf_counter() - started)
        started = time.perf_counter()
        for other in tokens[begin * 500 : begin * 500 + 500]:
            plain_score(tokens[begin], other)
        pairs.append((ours, 500 / (time.perf_counter() - started)))
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second), statistics.median(a / b for a, b in pairs)


def measure_dedup(c: Config) -> list[dict[str, Any]]:
    """Entries of bench.json; where the peer's figure is the limit, a ratio above 1 is within it."""
    texts = write(c.texts, random.Random(0))
    for threshold in (similarity.THRESHOLD, 0.7):
        check(texts[: c.checked], threshold)
    started = time.perf_counter()
    fate = similarity.dedup(texts, similarity.SEGMENTATION, similarity.THRESHOLD)
    seconds = time.perf_counter() - started
    kept = sum(one is None for one in fate)
    print(f"dedup: {len(texts):,} instructions, {kept:,} kept, {seconds:.1f} s", file=sys.stderr, flush=True)
    ours, peer, ratio = rates(texts[:20_000])
    return [
        entry(f"dedup: {c.texts:,} instructions, against the limit", seconds, SECONDS, SECONDS / seconds, "seconds"),
        entry("dedup: ROUGE-L of all pairs, against pure Python", ours, peer, ratio, "pairs/s"),
    ]


def entry(name: str, ours: float, peer: float, ratio: float, unit: str) -> dict[str, Any]:
    print(f"{name}: {ours:,.4g} against {peer:,.4g} {unit}, ratio {ratio:.3f}", file=sys.stderr, flush=True)
    return {"name": name, "ours": round(ours, 4), "peer": round(peer, 4), "ratio": round(ratio, 4), "unit": unit}


def main() -> int:
    c = console.parse(Config, sys.argv[1:], "python bench_posttrain.py")
    if c.texts < 20_000 or not 1 <= c.checked <= c.texts:
        raise console.UserError(
            f"--texts {c.texts} --checked {c.checked}: give 20000 or more, and no more checked ones"
        )
    entries = measure_dedup(c)
    if c.json:
        print(json.dumps(entries, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    console.door(main)
