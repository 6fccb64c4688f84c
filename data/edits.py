"""What a profile changes in the texts that it keeps: plain functions from a text to a text, by name in EDITS."""

import re
from collections.abc import Callable

# What a comma or full stop of Japanese prose follows: a Japanese letter or a closing bracket.
AFTER_JAPANESE = r"(?<=[）」』］〕】〉》ぁ-ゖァ-ヺ々〇〻\u3400-\u9fff\uf900-\ufaff])"
KANA = re.compile(r"[ぁ-ゖゝ-ゟァ-ヺー-ヿㇰ-ㇿｦ-ﾝ]")
URL = re.compile(r"https?://[!-;=?-~]+")
ASCII_RUN = re.compile(r"[\t -\x7f]{100,}")

FOOTER_LINES, FOOTER_SHARE = 10, 0.30
FOOTER_WORDS = (
    "Copyright",
    "copyright",
    "COPYRIGHT",
    "(C)",
    "(c)",
    "©",
    "All Rights Reserved",
    "All rights reserved",
    "ALL RIGHTS RESERVED",
    "Powered by",
    "Privacy Policy",
    "Facebook",
    "Instagram",
    "LINE",
    "RSS",
    "HOME",
    "TOP",
    "著作権",
    "無断転載",
    "無断複製",
    "転載禁止",
    "個人情報保護方針",
    "個人情報の取り扱い",
    "プライバシー",
    "ポリシー",
    "利用規約",
    "特定商取引法",
    "免責事項",
    "運営会社",
    "会社概要",
    "採用情報",
    "お問い合わせ",
    "お問合せ",
    "サイトマップ",
    "ホームに戻る",
    "トップへ戻る",
    "トップページ",
    "ページの先頭へ",
    "このページの上へ",
    "前のページ",
    "次のページ",
    "前の記事",
    "次の記事",
    "関連記事",
    "人気記事",
    "新着記事",
    "記事一覧",
    "アーカイブ",
    "トラックバック",
    "コメントする",
    "コメントを書く",
    "サイト内検索",
    "シェア",
    "ツイート",
    "いいね",
    "フォロー",
    "はてなブックマーク",
    "ログイン",
    "ログアウト",
    "会員登録",
    "マイページ",
    "ランキング",
    "スポンサーリンク",
    "もっと見る",
    "続きを読む",
)
FOOTER_WORD = re.compile("|".join(re.escape(word) for word in sorted(FOOTER_WORDS, key=len, reverse=True)))


def western_punctuation(text: str) -> str:
    """、 for ，and 。 for ．, each only if more of the western marks than of the Japanese ones end Japanese words.

    A mark behind a full-width digit or Latin letter stays. Okazaki et al., arXiv:2404.17733, section 3.5.
    """
    for western, japanese in (("，", "、"), ("．", "。")):
        counts = [len(re.findall(f"{AFTER_JAPANESE}{mark}", text)) for mark in (japanese, western)]
        if counts[0] < counts[1]:
            text = re.sub(f"(?<=[^０-９Ａ-Ｚａ-ｚ]){western}", japanese, text)
    return text


def footer(text: str) -> str:
    """`text` up to the first of its last 10 lines of which more than 30% are words of page footers.

    The rule of Okazaki et al., arXiv:2404.17733, with a word list of our own.
    """
    lines = text.split("\n")
    for number in range(max(0, len(lines) - FOOTER_LINES), len(lines)):
        words = sum(map(len, FOOTER_WORD.findall(lines[number])))
        if words > FOOTER_SHARE * len(lines[number]):
            return "\n".join(lines[:number])
    return text


def kana_lines(text: str) -> str:
    """The lines of `text` that have a kana, as llm-jp-corpus v1 keeps them (theirs also joins them into one)."""
    return "\n".join(line for line in text.split("\n") if KANA.search(line))


def strip_urls(text: str) -> str:
    """`text` without web addresses (llm-jp-corpus v1; ours end at the first letter that is not ASCII)."""
    return URL.sub("", text)


def strip_ascii_runs(text: str) -> str:
    """`text` without runs of 100 or more ASCII characters within a line (llm-jp-corpus v1)."""
    return ASCII_RUN.sub("", text)


EDITS: dict[str, Callable[[str], str]] = {
    "western_punctuation": western_punctuation,
    "footer": footer,
    "kana_lines": kana_lines,
    "strip_urls": strip_urls,
    "strip_ascii_runs": strip_ascii_runs,
}
