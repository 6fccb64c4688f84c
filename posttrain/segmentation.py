"""Japanese instructions cut into tokens that are compared: four ways, of which calibration.py chooses one."""

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Any, Literal

import console

Segmentation = Literal["chars", "script", "content", "sudachi"]
RUN = re.compile(r"[a-z]+|[0-9]+(?:[.,][0-9]+)*|[ァ-ヺー]+|[々〇㐀-䶿一-鿿豈-\ufaff]+|[ぁ-ゖー]+|[^\W_]")
# Particles, auxiliaries, the polite ends of requests: what instructions share whatever they ask for.
FUNCTION = frozenset(
    str.split(
        "を に は が の で と も へ や か から まで より など として について に関する に対して によって による "
        "において ための ため する して した し します しました せよ される された され させる なる なり なって "
        "なった です ます でした ました だ である ください てください でください いただけますか くださいませんか "
        "なさい ましょう お ご いる ある あり あって れる られる ない なく という といった ような ように この その "
        "それ これ それぞれ ここ もの こと とき ところ また または および なお できる できます でき たい て た ば "
        "だけ ずつ ほど くらい べき うえで ながら つつ"
    )
)
KANA = re.compile("(" + "|".join(sorted(FUNCTION, key=len, reverse=True)) + ")")
# Words of instructions about instructions, and the stems of verbs that ask for any text whatever.
HOLLOW = frozenset(str.split("次 以下 下記 上記 文章 文 内容 場合 例 形 形式 作成 下 上 中 後 方 何 説明 用意 提案"))
ASKING = frozenset("書考作教挙出示答述行見使用読返立付入当直整言思知分選並")
NUMERALS = {kanji: str(number) for number, kanji in enumerate("〇一二三四五六七八九")}


def normalise(text: str) -> str:
    """NFKC and lower case."""
    return unicodedata.normalize("NFKC", text).lower()


def is_kanji(run: str) -> bool:
    return run[0] in "々〇" or "㐀" <= run[0] <= "鿿" or "豈" <= run[0] <= "\ufaff"


def is_hiragana(run: str) -> bool:
    return "ぁ" <= run[:1] <= "ゖ"


def pieces(run: str) -> list[str]:
    """A run of hiragana cut at its function words."""
    return [piece for piece in KANA.split(run) if piece]


def chars(text: str) -> list[str]:
    """Letters, kana, kanji and digits, each a token."""
    return [c for c in normalise(text) if c.isalnum() or c == "ー"]


def script(text: str) -> list[str]:
    """Runs of one script, cut further: kanji two by two (most compounds), hiragana at its function words."""
    tokens: list[str] = []
    for run in RUN.findall(normalise(text)):
        if is_kanji(run):
            tokens += [run[at : at + 2] for at in range(0, len(run), 2)]
        else:
            tokens += pieces(run) if is_hiragana(run) else [run]
    return tokens


def content(text: str) -> list[str]:
    """What an instruction is about: each kanji, and whole runs of katakana, Latin letters and digits.

    Without function words, the endings of verbs, hollow words and verbs of asking; as `script` where nothing else is
    there. Kanji one by one, since a compound is often shortened or extended (見積, 見積書, 見積依頼).
    """
    whole, tokens, before = normalise(text), [], ""
    for match in RUN.finditer(whole):
        run, after = match.group(), whole[match.end() : match.end() + 1]
        if is_hiragana(run):
            inflected = before == whole[match.start() - 1 : match.start()] and before != "" and is_kanji(before)
            tokens += [p for p in pieces(run)[inflected:] if len(p) > 1 and p not in FUNCTION]
        elif is_kanji(run):
            asks = run in ASKING and is_hiragana(after)
            tokens += [] if asks or run in HOLLOW else [NUMERALS.get(run, run)] if len(run) == 1 else list(run)
        else:
            tokens.append(run)
        before = run[-1]
    return tokens or script(text)


@functools.cache
def sudachi_analyser() -> Any:
    try:
        from sudachipy import Dictionary, SplitMode
    except ImportError:
        raise console.UserError("--segmentation sudachi: pip install sudachipy sudachidict_core") from None
    return Dictionary().create(mode=SplitMode.C)


def sudachi(text: str) -> list[str]:
    """Normalised forms of Sudachi's longest units, without particles, auxiliaries and symbols; needs its packages."""
    morphemes = list(sudachi_analyser().tokenize(normalise(text)))
    kept = [m for m in morphemes if m.part_of_speech()[0] not in ("助詞", "助動詞", "補助記号", "空白")]
    return [m.normalized_form() for m in kept or morphemes]


SEGMENT: dict[str, Callable[[str], list[str]]] = {
    "chars": chars,
    "script": script,
    "content": content,
    "sudachi": sudachi,
}
