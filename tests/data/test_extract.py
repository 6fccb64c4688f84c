"""Bytes to main text: encodings found or declared wrongly, navigation dropped, pages made to stop us; and language."""

import subprocess
import sys
from pathlib import Path

import pytest

from data import extract, language

PROSE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。ガラスのコップを①つ、髙い棚に置いた。" * 4


def page(text: str, head: str = "") -> str:
    return f"<html><head>{head}<title>題</title></head><body><p>{text}</p></body></html>"


@pytest.mark.parametrize("codec", ["utf_8", "cp932", "euc_jp", "iso2022_jp"])
@pytest.mark.parametrize("declared", ["header", "meta", "nowhere", "wrong"])
def test_encodings(codec: str, declared: str) -> None:
    text = PROSE if codec in ("utf_8", "cp932") else PROSE.replace("①", "一").replace("髙", "高")
    name = {"utf_8": "utf-8", "cp932": "Shift_JIS", "euc_jp": "x-euc-jp", "iso2022_jp": "ISO-2022-JP"}[codec]
    wrong = {"utf_8": "shift_jis", "cp932": "utf-8", "euc_jp": "shift_jis", "iso2022_jp": "iso-8859-1"}[codec]
    meta = f'<meta http-equiv="Content-Type" content="text/html; charset={name}">' if declared == "meta" else ""
    charset = {"header": name.lower(), "wrong": wrong}.get(declared, "")
    html = page(text, meta)
    assert extract.decode(html.encode(codec), charset) == (html, codec)


def test_encodings_beyond_the_standards() -> None:
    nec_euc = "これは".encode("euc_jp") + b"\xad\xa1" + "番目の本です。".encode("euc_jp")
    assert extract.decode(nec_euc, "euc-jp")[0] == "これは①番目の本です。"
    half_width = b"\x1b(I\x36\x45\x1b(B and \x1b$B\x2d\x21\x1b(B"
    assert extract.decode(half_width + b"\x1b$B", "")[0] == "ｶﾅ and ①"
    french = page("déjà vu à Paris, où l'été fut très chaud et la forêt brûlée près de Nîmes. " * 5)
    french = french.replace("題", "a")
    assert extract.decode(french.encode("cp1252"), "iso-8859-1") == (french, "cp1252")
    assert extract.decode(french.encode("utf-8")[:-3], "")[1] == "utf_8"
    assert extract.decode(b"\xff\xfe" + "猫\0".encode("utf_16_le"), "") == ("猫", "utf_16_le")
    chinese = page("我们今天去公园看花，天气很好，大家都很高兴。" * 10)
    assert extract.decode(chinese.encode("gbk"), "gb2312")[0] == chinese


def test_broken_bytes_never_raise() -> None:
    for body in (b"", b"\xff" * 99, bytes(range(256)) * 9, b"\x1b$B\xff\x1b(I\x80", b"<meta charset=utf_7>+2AA-\xff"):
        for charset in ("", "shift_jis", "base64", "utf-7", "unicode_escape", "\udc80", "x" * 999):
            text, _ = extract.decode(body, charset)
            assert "\0" not in text
            text.encode()


def test_main_text_keeps_sentences_and_drops_navigation() -> None:
    links = "".join(f'<li><a href="{n}">項目の名前{n}</a></li>' for n in range(30))
    html = page(
        f'<div class="navheader"><a href="x">前へ</a></div><nav>案内</nav><div id="toc"><ul>{links}</ul></div>'
        f'<h1>見出し</h1><p><a href="m">Magazine</a> は <code>print</code> に <code>#f</code> を書く。{PROSE}</p>'
        "<dl><dt>用語</dt><dd>説明</dd></dl><table><tr><td>表の中</td></tr></table><pre>a\n  b</pre>"
        '<div class="footer">著作権表示</div>'
    )
    text = extract.main_text(html)
    assert "Magazine は print に #f を書く。吾輩は" in text
    assert all(kept in text for kept in ("見出し", "用語", "説明", "表の中", "a\n  b"))
    assert not any(dropped in text for dropped in ("前へ", "案内", "項目の名前", "著作権表示"))
    assert "\n\n" not in text


def test_prose_in_a_badly_named_box_stays() -> None:
    assert PROSE in extract.main_text(page(f'<div class="menu">{PROSE}</div>'))
    assert PROSE in extract.main_text(page(f"<nav>{PROSE}</nav>"))
    assert extract.main_text("") == "" and extract.main_text(page("")) == ""


STRAIN = """
import resource, sys
from data import extract
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
million = 1_000_000
for html in ("<div>" * million, "<" * 8 * million, "<a" * million, "<p>" + "\\0" * million,
             "<div a='" + "x" * 8 * million + "'>text</div>", "<table><tr><td>x</table>" * 100_000,
             "&#xD800;&bogus;&#0;" * 100_000, "<div class=nav>x<a>y</a>" * 20_000, "<nav>" * 100_000,
             "<p><b>" * 100_000, "<pre>" + " " * million + "x", "<svg><g>" * 100_000, "<!--" * million):
    text = extract.main_text(html)
    assert "\\0" not in text
    text.encode()
try:
    extract.main_text("<div " + " ".join(f"a{n}=1" for n in range(100_000)) + ">")
except extract.TooComplex:
    print("done")
"""


def test_strain() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STRAIN],
        cwd=Path(extract.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr[-500:]


def test_language() -> None:
    english = "The quick brown fox jumps over the lazy dog, and then it sleeps.\n" * 9
    chinese = "我们今天去公园看花，天气很好，大家都很高兴。" * 9
    assert [language.identify(text)[0] for text in (PROSE, english, chinese, "한국어 문장입니다. " * 9)] == [
        *("ja", "en", "zh", "ko")
    ]
    assert language.identify(" 123 !? \n") == ("und", 0.0) == language.identify("")
    code = "for i in range(10): value[i] = compute(x, y, option=i)  # 値を計算して配列に入れる\n" * 40
    assert language.identify(PROSE + code)[0] == "ja"


def test_japanese_fraction_is_swallows() -> None:
    assert language.japanese_fraction("あア漢々、。！abc") == pytest.approx(7 / 10)
    assert language.japanese_fraction("ー・「」１ｶ 𠮷") == 0.0 == language.japanese_fraction("")
