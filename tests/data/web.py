"""Web archives of our own making: Japanese prose that no two pages share, as HTML, as WARC records, as gzip members."""

import gzip
import random
import zlib

SUBJECTS, TOPICS, VERBS, ADVERBS, ENDS = (
    line.split()
    for line in """\
担当者 利用者 図書館 市役所 研究班 工場長 編集部 管理人 運転士 料理長 技術者 写真家 農家 店主 学生 医師
昨日の会議 新しい手順 古い記録 駅前の工事 春の行事 機械の点検 地域の歴史 港の天気 学校の予算 山道の案内
読み直した 書き写した 確かめた 片付けた 比べてみた 持ち帰った 直しておいた 見せてくれた 並べ替えた 受け取った
丁寧に ゆっくり 念のため いつものように 思いがけず 手早く 静かに 何度も みんなで ひとりで
結果は翌週の集まりで知らせる 理由はまだ分かっていない 費用はそれほどかからなかった 続きは次の章で述べる
""".splitlines()
)
KANJI = (
    "山川海空木花草石土水火金銀鉄紙布糸竹米麦豆茶酒塩油薬鳥魚虫犬猫馬牛羊車船橋道門窓"
    "机箱本文字絵音声色形光影風雨雪星月日年時村町国島森林谷池泉浜"
)
KATAKANA = "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロ"


def mark(seed: int) -> str:
    """A word that stands in one page and in no other."""
    return "".join(random.Random(f"mark {seed}").choices(KATAKANA, k=12))


def prose(seed: int, sentences: int = 14) -> str:
    """A page's text: plain Japanese with `mark(seed)` in the middle, a paragraph every few sentences."""
    rng = random.Random(f"prose {seed}")

    def thing() -> str:
        return "".join(rng.choices(KANJI, k=3))

    made = [
        f"{rng.choice(SUBJECTS)}は{rng.choice(TOPICS)}のあと、{rng.choice(ADVERBS)}{thing()}と{thing()}を"
        f"{rng.choice(VERBS)}が、{thing()}については{rng.choice(ENDS)}。"
        for _ in range(sentences)
    ]
    made[sentences // 2] = f"この品は{mark(seed)}と呼ばれ、{rng.choice(SUBJECTS)}が{thing()}と一緒に届けた。"
    return "\n".join("".join(made[i : i + 4]) for i in range(0, sentences, 4))


def html(text: str, head: str = "") -> str:
    """`text` as a page, a paragraph a line."""
    paragraphs = "".join(f"<p>{line}</p>\n" for line in text.split("\n"))
    return f"<!DOCTYPE html><html><head><title>頁</title>{head}</head><body>\n{paragraphs}</body></html>"


def record(
    url: str,
    body: bytes,
    headers: str = "Content-Type: text/html; charset=UTF-8",
    status: str = "200 OK",
    kind: str = "response",
    length: object = None,
) -> bytes:
    """One WARC record, uncompressed; `length` is what its Content-Length says, the truth if it is None."""
    http = f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode("utf-8", "surrogateescape") if kind == "response" else b""
    block = http + body
    content = "application/http; msgtype=response" if kind == "response" else "text/plain"
    number = zlib.crc32(url.encode("utf-8", "replace"))
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{number:032x}>\r\n"
        f"WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Target-URI: {url}\r\nContent-Type: {content}\r\n"
        f"Content-Length: {len(block) if length is None else length}\r\n\r\n"
    )
    return head.encode("utf-8", "surrogateescape") + block + b"\r\n\r\n"


def page(seed: int, **more: object) -> bytes:
    """The record of the page `seed`."""
    return record(f"http://example.jp/{seed}.html", html(prose(seed)).encode(), **more)  # type: ignore[arg-type]


def member(raw: bytes) -> bytes:
    """One gzip member, the same bytes at any time."""
    return gzip.compress(raw, 6, mtime=0)
