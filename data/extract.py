"""A page's bytes to its main text: which encoding it is in, and what of it is navigation.

Resiliparse parses the HTML and writes the text. Its own `main_content` is not used: on Japanese manuals it
loses short text between links and inline code (the particle in "LinuxMagazine は Projects"), lists of links and some
headings: F1 0.77 on 257 pages weighted to 820, against 0.93 on the 820 for all the text without the elements that name
themselves navigation. Which names those are was settled on the same manuals: on other sites expect less.
"""

import codecs
import functools
import importlib.metadata
import re
from typing import Any

import numpy as np
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import HTMLTree

EXTRACTOR = f"resiliparse-{importlib.metadata.version('resiliparse')}/main-1"  # count up when the rules below change

SMALL_SHARE = 0.3  # an element that names itself navigation goes if it holds at most this share of the page's text,
LINK_SHARE = 0.5  # or if at least this share of its own text is links: never the page's prose under a sloppy name
LEAST_TEXT = 20  # characters; a page that would be left with less is taken whole, for the quality rules to judge
ATTRIBUTE_COST = 400_000_000  # sum of squares of attributes a tag: the parser's time, 1.3 ns each
LONG_TAG = 4_096  # characters; attributes of shorter tags are not counted
TEXT_BUDGET = 30  # times the page may be read to weigh its elements, against names nested a thousand deep

# Tags, roles and names by which pages mark what is not their text. Names are whole class or id names.
NAVIGATION = (
    "nav,footer,aside:not([class*=footnote]),[role=navigation],[role=search],[role=contentinfo],[role=banner],dialog"
)
SAYS_SO = (b"<nav", b"<footer", b"<aside", b"<dialog", b"role")
NAMED = re.compile(
    r"""(?ix)
    .*nav(bar|igation|header|footer|links?|list|menu|items?|table|panel|path)?([-_].*)?
    |(.*[-_])?(toc|tocframe|table[-_]?of[-_]?contents)([-_].*)?
    |(.*[-_])?bread[-_]?crumbs?([-_].*)?|path
    |(.*[-_])?(sphinx)?side[-_]?(bar|nav|menu)(wrapper)?([-_].*)?
    |((page|site|global|main)[-_]?)?footer([-_].*)?|(page|site|global)[-_]?header|masthead|banner
    |(.*[-_])?menu([-_]?bar)?
    |pager|pagination|prev[-_]?next|related
    |headerlink|anchor[-_]?link|permalink|(mw[-_])?edit[-_]?section|back[-_]?to[-_]?top
    |skip([-_]?(link|nav|to[-_]?content))?|sr[-_]only|visually[-_]?hidden|screen[-_]reader([-_].*)?
    |cookies?([-_].*)?|shar(e|ing)([-_].*)?|social([-_].*)?|search([-_]?(box|form|bar))?
    |lang(uage)?s?([-_]?(switch(er)?|select(or)?|list|links))?
    """
)
# Class and id names, in lower case: the few that name navigation are then asked for, not all elements. Two expressions,
# since one that begins with a literal is found ten times faster.
NAMES = tuple(re.compile(rb"""%b\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""" % what) for what in (b"class", b"id"))
PLAIN_NAME = re.compile(r"[\w-]+")
MOST_NAMES, MOST_SUSPECTS = 50, 5_000
LINK, TAG = re.compile(r"<a\b[^>]*>(.*?)</a>", re.DOTALL), re.compile(r"<[^>]*>")
LISTS = ("table", "ul")
BOXES = {"div", "ul", "ol", "dl", "table", "tr", "td", "p", "span", "a", "form", "header", "li", "details", "center"}
BLANK_LINES = re.compile(r"\n\s*\n")

BOMS = ((codecs.BOM_UTF8, "utf_8"), (codecs.BOM_UTF16_LE, "utf_16_le"), (codecs.BOM_UTF16_BE, "utf_16_be"))
META = re.compile(rb"(?i)<(?:meta\b[^>]{0,300}?\bcharset|\?xml\b[^>]{0,200}?\bencoding)\s*=\s*[\"']?\s*([\w.:-]{2,40})")
META_BYTES = 8_192
JIS_ESCAPE = re.compile(rb"\x1b(\$[@B]|\([BJI])([^\x1b]*)")
CODECS = {"shift_jis": "cp932", "euc-jp": "euc_jp", "gb2312": "gb18030", "gbk": "gb18030", "euc-kr": "cp949"}
JAPANESE = ("cp932", "euc_jp")
SINGLE_BYTE = re.compile(r"(?i)(windows|iso)-?(8859-?)?\d|macintosh|us-ascii|koi8|ibm866|x-mac|x-user-defined")
BROKEN_SHARE = 0.01  # of the non-ASCII characters may be unreadable: pages are cut, and spliced together
ASCII = re.compile(r"[\x00-\x7f]+")
SAMPLE = 50_000  # non-ASCII characters tell which Japanese encoding it is
KANA = re.compile(r"[\u3040-\u30ff\u3001\u3002]")
UNLIKELY = re.compile(r"[\ufffd\uff61-\uff9f\ue000-\uf8ff\x80-\x9f]")  # what the wrong Japanese codec turns text into


class TooComplex(ValueError):
    """The parser would need seconds for this page: it is broken, or made to stop us."""


def main_text(html: str) -> str:
    """The page's text without navigation, a line per block, no blank lines; "" if it has none.

    Raises TooComplex. Nesting is no matter: the parser does not recurse.
    """
    raw = html.encode("utf-8", "surrogatepass").lower()  # of bytes: ten times as fast as of Japanese text
    if attribute_cost(raw) > ATTRIBUTE_COST:
        raise TooComplex("tags with thousands of attributes")
    tree = HTMLTree.parse(html)
    if tree.body is None:
        return ""
    drop_navigation(tree.body, raw)
    text = extract_plain_text(tree, main_content=False, alt_texts=False)
    if len(text) < LEAST_TEXT:  # a page of nothing but links, or prose in a badly named box
        whole = extract_plain_text(html, main_content=False, alt_texts=False)
        text = whole if len(whole) >= LEAST_TEXT else text
    return BLANK_LINES.sub("\n", text.replace("\0", "")).strip()


def drop_navigation(body: Any, raw: bytes) -> None:
    """Take the elements that say they are navigation out of the tree; `raw` is the page's HTML in lower case."""
    if any(mark in raw for mark in SAYS_SO):
        for element in body.query_selector_all(NAVIGATION).values():
            element.decompose()
    values = {value for name in NAMES for found in set(name.findall(raw)) for value in found if value}
    known = {name.decode("utf-8", "replace") for value in values for name in value.split()}
    named = sorted(name for name in known if named_navigation(name))
    if not named:
        return
    page = len(body.text or "")
    budget = TEXT_BUDGET * page
    suspects = body.query_selector_all(",".join(f"[class~='{name}' i],[id='{name}' i]" for name in named[:MOST_NAMES]))
    for element in suspects.values() if len(suspects) < MOST_SUSPECTS else []:
        if element.tag not in BOXES or (element.tag in LISTS and not any(map(named_navigation, names(element)))):
            continue
        size = len((element.text or "").strip())
        budget -= size
        if budget < 0:
            return
        if size <= SMALL_SHARE * page or mostly_links(element, size):
            element.decompose()


def mostly_links(element: Any, size: int) -> bool:
    """Whether at least LINK_SHARE of the `size` characters of an element's text are links.

    Told from its HTML, which the parser wrote and which is well-formed: a Python object for each link takes longer.
    """
    return sum(len(TAG.sub("", link).strip()) for link in LINK.findall(element.html)) >= LINK_SHARE * size


def names(element: Any) -> list[str]:
    """The class names and the id of a list or table; "menu" aside, by which Texinfo calls its list of chapters."""
    return [
        name for name in [*(element.class_name or "").lower().split(), (element.id or "").lower()] if name != "menu"
    ]


@functools.lru_cache(1 << 14)
def named_navigation(name: str) -> bool:
    """Whether a class or id names navigation."""
    return len(name) < 64 and bool(PLAIN_NAME.fullmatch(name) and NAMED.fullmatch(name))


def attribute_cost(raw: bytes) -> int:
    """The sum over long tags of their attributes squared, roughly; `raw` is the page's HTML in lower case."""
    closes = np.flatnonzero(np.frombuffer(raw, np.uint8) == ord(">"))
    if np.diff(closes, prepend=0, append=len(raw)).max() <= LONG_TAG:
        return 0
    cost = 0
    for part in raw.split(b">"):
        if len(part) > LONG_TAG and (start := re.search(b"<[a-z]", part)):
            tag = re.sub(rb"\"[^\"]*\"|'[^']*'", b"", part[start.start() :])
            cost += (len(tag.split()) + tag.count(b"/")) ** 2
    return cost


def decode(body: bytes, charset: str) -> tuple[str, str]:
    """`body` as text, and the Python codec that read it; `charset` is HTTP's, "" if it named none. Never raises.

    In turn: byte order mark, ISO-2022-JP escapes, valid UTF-8, then what HTTP or a meta tag declares, then Shift_JIS
    (as cp932) or EUC-JP if the text then looks Japanese, then Resiliparse's detector. What is declared counts only as
    far as the bytes bear it out.
    """
    text, codec = decode_raw(body, charset)
    return text.replace("\0", "").removeprefix("\ufeff"), codec


def decode_raw(body: bytes, charset: str) -> tuple[str, str]:
    """`decode`, with NULs and byte order marks still in the text."""
    for bom, codec in BOMS:
        if body.startswith(bom):
            return body.decode(codec, "replace"), codec
    if b"\x1b$" in body and not any(byte > 0x7F for byte in body[:META_BYTES]):
        return from_jis(body), "iso2022_jp"
    text = body.decode("utf_8", "replace")
    if broken(text) <= BROKEN_SHARE:
        return text, "utf_8"

    declared = [charset]
    if found := META.search(body, 0, META_BYTES):
        declared.append(found[1].decode("ascii", "replace"))
    readings = {codec: read_japanese(body, codec) for codec in JAPANESE}
    best = max(JAPANESE, key=lambda codec: likely_japanese(readings[codec]))
    for name in filter(None, declared):
        codec = python_codec(name)
        if not codec or codec in ("utf_8", "iso2022_jp") or SINGLE_BYTE.match(name):
            continue  # UTF-8 it is not, and single bytes can be read from anything: decided below
        if codec in JAPANESE:
            if broken(readings[best]) <= BROKEN_SHARE or likely_japanese(readings[best]) > 0:
                return readings[best], best
        elif likely_japanese(readings[best]) <= 0.5 and broken(text := body.decode(codec, "replace")) <= BROKEN_SHARE:
            return text, codec
    if likely_japanese(readings[best]) > 0.5:
        return readings[best], best
    for name in filter(None, declared):
        codec = python_codec(name)
        if codec and SINGLE_BYTE.match(name):
            return body.decode(codec, "replace"), codec
    codec = python_codec(detect_encoding(body) or "") or "utf_8"
    return (readings[codec] if codec in readings else body.decode(codec, "replace")), codec


def python_codec(name: str) -> str:
    """The Python codec for a declared encoding, by WHATWG's table of what browsers take the name for; "" if none."""
    html5 = map_encoding_to_html5(name.strip(), fallback_utf8=False) or "" if name.isascii() else ""
    try:
        codec = codecs.lookup(CODECS.get(html5.lower(), html5))
    except LookupError:
        return ""
    # Some Python codecs turn bytes into bytes.
    return codec.name.replace("-", "_") if codec._is_text_encoding else ""


def broken(text: str) -> float:
    """The share of a text's non-ASCII characters that could not be read."""
    unread = text.count("\ufffd")
    return unread / (len(text) - len(text.encode("ascii", "ignore"))) if unread else 0.0


def likely_japanese(text: str) -> float:
    """The share of kana and Japanese full stops among non-ASCII characters, less twice that of unlikely ones."""
    sample = ASCII.sub("", text)[:SAMPLE]
    return (len(KANA.findall(sample)) - 2 * len(UNLIKELY.findall(sample))) / max(1, len(sample))


def read_japanese(body: bytes, codec: str) -> str:
    """`body` in cp932 or EUC-JP, the latter with NEC's and IBM's rows, as browsers read it."""
    return body.decode(codec, "replace") if codec == "cp932" else body.decode(codec, "cp51932")


def from_jis(body: bytes) -> str:
    """ISO-2022-JP (RFC 1468) with half-width katakana and NEC's rows, through EUC-JP: the same tables, shifted."""

    def shift(found: re.Match[bytes]) -> bytes:
        if found[1] in (b"(B", b"(J"):
            return found[2]
        high = found[2].translate(TO_HIGH)
        return high if found[1] != b"(I" else b"".join(b"\x8e" + bytes((byte,)) for byte in high)

    return JIS_ESCAPE.sub(shift, body).decode("euc_jp", "cp51932")


TO_HIGH = bytes(byte | 0x80 if 0x21 <= byte <= 0x7E else byte for byte in range(256))


def from_cp932(error: UnicodeError) -> tuple[str, int]:
    """Error handler: two EUC-JP bytes that JIS X 0208 does not have, looked up where cp932 keeps them."""
    assert isinstance(error, UnicodeDecodeError)
    first, second = (*error.object[error.start : error.start + 2], 0)[:2]
    if not (first >= 0xA1 and second >= 0xA1):
        return "\ufffd", error.start + 1
    row, cell = first - 0x80, second - 0x80
    lead = (row + 1) // 2 + (0x70 if row < 0x5F else 0xB0)
    trail = cell + 0x7E if row % 2 == 0 else cell + (0x1F if cell < 0x60 else 0x20)
    try:
        return bytes((lead, trail)).decode("cp932"), error.start + 2
    except UnicodeDecodeError:
        return "\ufffd", error.start + 2


codecs.register_error("cp51932", from_cp932)
