"""Words and hosts that a user does not want: matches of a word list in a text, hosts and top-level domains of a URL."""

import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ahocorasick_rs import AhoCorasick, MatchKind

from console import UserError

# Kana, kanji and stops: what `num_japanese_letters` in data/quality.py counts.
JAPANESE = re.compile("[ぁ-ゖァ-ヺ々〇〻㐀-鿿豈-\ufaff、，。．！？]+")
SCHEME = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//")
LONGEST_HOST = 253  # RFC 1035
# A run of letters and digits of a script that puts spaces between words: Latin, Greek, Cyrillic, not Japanese.
SPACED = re.compile(r"([^\W\u2e80-\U0010ffff]+)")
EDGE = "\ue000"  # private use: marks both edges of such a run, in words and texts alike, so that no match can cut one


@dataclass(frozen=True, eq=False)
class WordList:
    """Words to look for, made by `load` or `word_list`. An Aho-Corasick automaton reads 10,000 of them at some 20 MB/s
    where a regular expression of them reads 3 MB/s: that earned the dependency."""

    automaton: AhoCorasick
    lengths: tuple[int, ...]
    """Characters of each word."""


def load(path: Path | str) -> WordList:
    """The words of a UTF-8 text file, one a line; lines beginning with # and blank lines count for nothing.

    Raises UserError naming file and line: not UTF-8, no word at all, or a word of one character, which would match
    everywhere.
    """
    words = []
    for number, line in lines(path):
        word = normalise(line)
        if len(word) < 2:
            raise UserError(f"{path}:{number}: {line!r} is one character and would match everywhere: write whole words")
        words.append(word)
    if not words:
        raise UserError(f"{path}: no words in it: write one a line")
    return word_list(words)


def word_list(words: Collection[str]) -> WordList:
    """A WordList of `words`, each of two characters or more after normalisation."""
    known = sorted(set(map(normalise, words)))
    return WordList(AhoCorasick(map(edged, known), matchkind=MatchKind.LeftmostLongest), tuple(map(len, known)))


def hits(text: str, words: WordList) -> tuple[int, int]:
    """How many words `text` has and how many characters they cover: from the left, the longest, without overlap.

    Both sides are NFKC-normalised and in lower case. A word that begins or ends with a letter or digit of a script
    that puts spaces between words needs a border there ("ass" is not in "class"); Japanese matches anywhere.
    """
    marked = edged(normalise(text))
    try:
        found = words.automaton.find_matches_as_indexes(marked)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        found = words.automaton.find_matches_as_indexes(marked.encode(errors="replace").decode())
    return len(found), sum(words.lengths[word] for word, _, _ in found)


def statistics(text: str, lists: dict[str, WordList]) -> dict[str, float]:
    """`words_NAME_hits` and `words_NAME_fraction` (characters covered per Japanese letter, 0 where there is none)."""
    japanese = sum(map(len, JAPANESE.findall(text)))
    result = {}
    for name, words in lists.items():
        count, covered = hits(text, words)
        result[f"words_{name}_hits"] = float(count)
        result[f"words_{name}_fraction"] = covered / japanese if japanese else 0.0
    return result


def normalise(text: str) -> str:
    """`text` as words are compared: NFKC, lower case, no blanks around it."""
    return unicodedata.normalize("NFKC", text).lower().strip()


def edged(text: str) -> str:
    """`text` with EDGE before and after every run of SPACED."""
    return EDGE.join(SPACED.split(text))


def load_hosts(path: Path | str) -> frozenset[str]:
    """The hosts of a UTF-8 text file, one a line, as in the `domains` files of the UT1 blacklists.

    A leading "." or "*." is dropped, names in other scripts become punycode. Raises UserError naming file and line.
    """
    hosts = set()
    for number, line in lines(path):
        host = punycode(line.partition("#")[0].strip().removeprefix("*").removeprefix("."))
        if not host or any(mark in host for mark in "/:@ \t"):
            raise UserError(f"{path}:{number}: {line!r} is no host: write one host a line, such as example.com")
        hosts.add(host)
    if not hosts:
        raise UserError(f"{path}: no hosts in it: write one a line")
    return frozenset(hosts)


def blocked(url: str, hosts: Collection[str]) -> bool:
    """Whether the host of `url` or a domain above it is in `hosts`: 5ch.net blocks egg.5ch.net. A URL without a host
    that can be read is not blocked."""
    host = hostname(url)
    while host:
        if host in hosts:
            return True
        host = host.partition(".")[2]
    return False


def tld_allowed(url: str, tlds: Collection[str]) -> bool:
    """Whether the host of `url` ends in one of `tlds` (jp, .co.jp, みんな); a URL without a readable host does not."""
    return blocked(url, {punycode(tld.strip().removeprefix(".")) for tld in tlds})


def hostname(url: str) -> str:
    """The host of `url` in lower case and punycode, without user and port; empty where the URL is broken."""
    url = url.strip().strip("<>")  # some writers of WARC put the address in angle brackets
    try:
        host = urlsplit(url if SCHEME.match(url) else f"//{url}").hostname or ""
    except ValueError:
        return ""
    return punycode(host) if len(host) <= LONGEST_HOST else ""


def punycode(host: str) -> str:
    """`host` as it is looked up: lower case, no dot at its end, other scripts as xn--."""
    host = host.lower().rstrip(".")
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode().lower()
    except UnicodeError:
        return host


def lines(path: Path | str) -> Iterator[tuple[int, str]]:
    """Number and text of the lines of a UTF-8 file that are neither blank nor begin with #."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: name a text file with one entry a line") from None
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise UserError(f"{path}:{number}: not UTF-8: save the file as UTF-8") from None
        if text and not text.startswith("#"):
            yield number, text
