"""Word lists and host lists of a user: what matches, what does not, and what is said of a file that is wrong."""

import random
import re
from pathlib import Path

import pytest

from console import UserError
from data import words


def save(folder: Path, content: str | bytes) -> Path:
    path = folder / "list.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_list_is_read_normalised_without_comments(tmp_path: Path) -> None:
    listed = words.load(save(tmp_path, "\ufeff# 有害語\n\n  ばか \r\nＡＳＳ\nﾊﾞｶ野郎\nC#\n"))
    assert words.hits("ばか、ASS。バカ野郎! c#", listed) == (4, 2 + 3 + 4 + 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "list.txt: no words"),
        ("# 注釈だけ\n\n", "list.txt: no words"),
        ("ばか\n死\n", "list.txt:2: '死' is one character"),
        ("ばか\n".encode() + "阿呆\n".encode("cp932"), "list.txt:2: not UTF-8"),
    ],
)
def test_a_wrong_list_is_one_line_that_names_it(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        words.load(save(tmp_path, content))


def test_a_list_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt"):
        words.load(tmp_path / "none.txt")
    with pytest.raises(UserError, match=re.escape(tmp_path.name)):
        words.load_hosts(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("class assess ass_ 1ass asses", (0, 0)),
        ("Ass. ASS! (ass)", (3, 9)),
        ("これはassです", (1, 3)),
        ("bad  wordとbad word", (1, 8)),
        ("bad words", (0, 0)),
        ("大ばか者め", (1, 3)),
        ("ばかばか者ばか", (3, 2 + 3 + 2)),
        ("エロCD、エロCDs", (1, 4)),
        ("ёж ёжик", (1, 2)),
        ("方", (0, 0)),
        ("", (0, 0)),
        ("\ud800ばか", (1, 2)),
    ],
)
def test_latin_at_borders_and_japanese_anywhere(text: str, expected: tuple[int, int]) -> None:
    listed = words.word_list(["ass", "bad word", "ばか", "ばか者", "エロCD", "ёж", "方法論"])
    assert words.hits(text, listed) == expected


def test_matches_are_the_leftmost_longest_ones() -> None:
    """Against the definition, character by character, on random texts of few letters."""
    rng = random.Random(5)
    for _ in range(300):
        known = {"".join(rng.choices("あい亜a b", k=rng.randint(2, 5))).strip() for _ in range(12)}
        known = {word for word in known if len(word) > 1}
        text = "".join(rng.choices("あい亜a b", k=60)).strip()
        count = covered = at = 0
        while at < len(text):
            fits = [w for w in known if text.startswith(w, at) and not cuts_latin(text, at, at + len(w))]
            longest = max(map(len, fits), default=0)
            count, covered, at = count + (longest > 0), covered + longest, at + (longest or 1)
        assert words.hits(text, words.word_list(known)) == (count, covered), (text, known)


def cuts_latin(text: str, begin: int, end: int) -> bool:
    return any(0 < at < len(text) and text[at - 1] in "ab" and text[at] in "ab" for at in (begin, end))


def test_statistics_are_per_list_and_per_japanese_letter() -> None:
    lists = {"ng": words.word_list(["ばか"]), "en": words.word_list(["damn"])}
    expected = {"words_ng_hits": 1.0, "words_ng_fraction": 2 / 8, "words_en_hits": 1.0, "words_en_fraction": 4 / 8}
    assert words.statistics("ばかだ、damn、漢字。", lists) == expected
    nothing = dict.fromkeys(["words_ng_hits", "words_ng_fraction", "words_en_fraction"], 0.0)
    assert words.statistics("damn 123", lists) == {**nothing, "words_en_hits": 1.0}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://5ch.net/", True),
        ("http://egg.5ch.net/test/read.cgi", True),
        ("http://user:pass@EGG.5CH.NET.:8080/x", True),
        ("http://5ch.net:port/", True),
        ("//5ch.net/a", True),
        ("egg.5ch.net/a//b", True),
        ("<http://5ch.net/>", True),
        ("http://例え.jp/", True),
        ("http://xn--r8jz45g.jp/", True),
        ("http://93.184.216.34/", True),
        ("http://x5ch.net/", False),
        ("http://5ch.net.example.jp/", False),
        ("http://example.jp/5ch.net", False),
        ("http://5ch.net@example.jp/", False),
        ("http://[::1", False),
        ("http://", False),
        ("", False),
        ("http://" + "a." * 100_000 + "5ch.net", False),
    ],
)
def test_a_host_blocks_what_is_below_it(tmp_path: Path, url: str, expected: bool) -> None:
    listed = words.load_hosts(save(tmp_path, "# UT1\n.5ch.net\n*.Example.COM  # all\n例え.jp\n93.184.216.34\n\n"))
    assert words.blocked(url, listed) is expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\n", "list.txt: no hosts"),
        ("a.jp\nhttp://b.jp/\n", "list.txt:2: 'http://b.jp/' is no host"),
        ("0.0.0.0 a.jp\n", "list.txt:1: '0.0.0.0 a.jp' is no host"),
        (b"a.jp\n\xff\n", "list.txt:2: not UTF-8"),
    ],
)
def test_a_wrong_host_list_is_one_line_that_names_it(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        words.load_hosts(save(tmp_path, content))


def test_top_level_domains() -> None:
    assert words.tld_allowed("https://www.example.co.jp/", ["jp"])
    assert words.tld_allowed("https://EXAMPLE.JP.:443/", [".jp"])
    assert words.tld_allowed("https://example.みんな/", ["みんな", "jp"])
    assert not words.tld_allowed("https://example.com/jp", ["jp", "co.jp"])
    assert not words.tld_allowed("http://[", ["jp"])
