"""Web archives: what is read, what is told instead, and that damage costs no record but the damaged one."""

import collections
import gzip
import itertools
import random
import zlib
from pathlib import Path

import fsspec
import pytest

from data import warc

Counts = collections.Counter[str]
HTML = b"<html><body>" + "日本語の本文です。".encode() * 20 + b"</body></html>"


def record(number: int, content: bytes, kind: str = "response", length: int | None = None, extra: str = "") -> bytes:
    """One WARC record of URL http://NUMBER.example/ with its closing blank line."""
    content_type = "application/http; msgtype=response" if kind == "response" else "text/plain"
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://{number}.example/\r\n{extra}"
    size = len(content) if length is None else length
    return f"{head}Content-Type: {content_type}\r\nContent-Length: {size}\r\n\r\n".encode() + content + b"\r\n\r\n"


def http(body: bytes, headers: str = "Content-Type: text/html", status: str = "200 OK") -> bytes:
    """An HTTP response."""
    return f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode() + body


def read(path: Path, data: bytes, begin: int = 0, end: int = 1 << 60) -> tuple[list[warc.Page], Counts]:
    """The pages of `data` stored at `path`, and the counts."""
    path.write_bytes(data)
    counts: Counts = collections.Counter()
    return list(warc.pages(fsspec.filesystem("file"), str(path), "w", begin, end, counts)), counts


def told(pages: list[warc.Page]) -> list[tuple[str, str | None]]:
    """Host number and reason of each page."""
    return [(page.url.removeprefix("http://").removesuffix(".example/"), page.reason) for page in pages]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.warc.gz"


@pytest.fixture
def members() -> list[bytes]:
    """Twelve records of different sizes; every third one is a request."""
    texts = []
    for number in range(12):
        noise = random.Random(number).randbytes(number * 900).hex().encode()
        kind = "request" if number % 3 == 2 else "response"
        texts.append(record(number, http(HTML + noise), kind))
    return texts


def test_pages_and_counts(file: Path, members: list[bytes]) -> None:
    zipped = [gzip.compress(text) for text in members]
    pages, counts = read(file, b"".join(zipped))
    assert told(pages) == [(str(n), None) for n in range(12) if n % 3 != 2]
    assert counts == {"records": 12, "response": 8, "request": 4}
    assert pages[1].id == f"w:{len(zipped[0])}" and pages[0].body.startswith(HTML) and pages[0].kind == "html"


@pytest.mark.parametrize("stored", ["members", "plain", "garbage", "plain garbage"])
def test_consecutive_ranges_give_one_pass(file: Path, members: list[bytes], stored: str) -> None:
    parts = [text if "plain" in stored else gzip.compress(text) for text in members]
    if "garbage" in stored:
        parts[4:4] = [b"\x1f\x8b\x08 no member\r\n\r\n"]
        parts[8] = parts[8][:-30] if "plain" in stored else parts[8][:-3]
    path, data = file if "plain" not in stored else file.with_suffix(""), b"".join(parts)
    whole, counts = read(path, data)
    assert len([page for page in whole if page.reason is None]) >= 7
    random.seed(5)
    for _ in range(60):
        cuts = [0, *sorted(random.sample(range(1, len(data)), 3)), len(data)]
        pieces = [read(path, data, begin, end) for begin, end in itertools.pairwise(cuts)]
        assert [page for piece in pieces for page in piece[0]] == whole, cuts
        assert sum((piece[1] for piece in pieces), collections.Counter()) == counts


def test_one_member_of_many_records(file: Path, members: list[bytes]) -> None:
    pages, _ = read(file, gzip.compress(b"".join(members)))
    assert told(pages) == [(str(n), None) for n in range(12) if n % 3 != 2]
    assert pages[0].id == "w:0" and pages[1].id == f"w:0+{len(members[0])}"
    assert not read(file, gzip.compress(b"".join(members)), 5)[0]


def test_every_cut_is_noticed_and_costs_one_record(file: Path) -> None:
    zipped = [gzip.compress(record(n, http(HTML))) for n in range(3)]
    for size in range(len(zipped[2])):
        pages, _ = read(file, b"".join(zipped)[: len(zipped[0] + zipped[1]) + size])
        assert told(pages)[:2] == [("0", None), ("1", None)]
        assert [page.reason for page in pages[2:]] == ["cut_short"] * bool(size)


@pytest.mark.parametrize("form", ["members", "one member", "plain"])
@pytest.mark.parametrize("change", [-40, -1, 1, 3, 77, 10**6, 10**12])
def test_wrong_length_costs_one_record(file: Path, form: str, change: int) -> None:
    content = http(HTML)
    texts = [record(n, content, length=len(content) + change * (n == 1)) for n in range(4)]
    parts = [gzip.compress(text) for text in texts] if form == "members" else [b"".join(texts)]
    data = gzip.compress(parts[0]) if form == "one member" else b"".join(parts)
    pages, _ = read(file if form != "plain" else file.with_suffix(""), data)
    assert told(pages) == [("0", None), ("1", "damaged"), ("2", None), ("3", None)]


def test_damage_is_skipped(file: Path) -> None:
    zipped = [gzip.compress(record(n, http(HTML + bytes([n]) * 3000))) for n in range(6)]
    zipped[1] = zipped[1][:-8] + bytes(8)  # checksum
    zipped[2] = zipped[2][:60]  # cut; the next member follows at once
    zipped[4] = b"not gzip at all" + zipped[4]
    zipped.append(gzip.compress(b"WARC/1.0\r\nWARC-Target-URI: http://6.example/\r\n\r\n"))
    pages, _ = read(file, b"".join(zipped))
    reasons = dict(told(pages))
    assert [n for n in "0345" if reasons.get(n) is None] == list("0345")
    assert [page.reason for page in pages] == [None, "damaged", "damaged", None, "damaged", None, None, "damaged"]
    assert pages[-1].url == "http://6.example/"


def test_digest_vouches_where_no_checksum_does(file: Path) -> None:
    good = record(0, http(HTML), extra="WARC-Block-Digest: sha1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\r\n")
    assert told(read(file, gzip.compress(good))[0]) == [("0", None)]
    assert told(read(file.with_suffix(""), good)[0]) == [("0", "damaged")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (http(b"gone", status="404 Not Found"), "http_status"),
        (http(b"\x89PNG", "Content-Type: image/png"), "not_html"),
        (http(b"%PDF-1.4 "), "not_html"),
        (http(b"text", "Content-Type: text/plain"), "not_html"),
        (http(b"{}", "Server: x"), "not_html"),
        (http(b" \r\n "), "empty"),
        (b"no head", "bad_http"),
        (http(gzip.compress(HTML, mtime=0)[:-20], "Content-Type: text/html\r\nContent-Encoding: gzip"), "bad_encoding"),
        (http(b"5\r\nhello\r\n9\r\nx", "Content-Type: text/html\r\nTransfer-Encoding: chunked"), "bad_encoding"),
        (http(b"\x01\x02\x03", "Content-Type: text/html\r\nContent-Encoding: br"), "bad_encoding"),
    ],
)
def test_reasons(file: Path, content: bytes, reason: str) -> None:
    pages, _ = read(file, gzip.compress(record(0, content)) + gzip.compress(record(1, http(HTML))))
    assert told(pages) == [("0", reason), ("1", None)]
    assert pages[0].body == b""


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (HTML, "Content-Encoding: gzip"),  # undone by the crawler
        (HTML, "Transfer-Encoding: chunked"),
        (gzip.compress(HTML, mtime=0), "Content-Encoding: gzip"),  # the time would be in the test's name
        (zlib.compress(HTML), "Content-Encoding: deflate"),
        (zlib.compress(HTML)[2:-4], "Content-Encoding: deflate"),
        (b"%x\r\n%s\r\n3;a=b\r\n%s\r\n0\r\n\r\n" % (len(HTML) - 3, HTML[:-3], HTML[-3:]), "Transfer-Encoding: chunked"),
    ],
)
def test_encodings_are_undone(file: Path, body: bytes, headers: str) -> None:
    content = http(body, f'Content-Type: text/html; charset="Shift_JIS"\r\n{headers}')
    (page,), _ = read(file, gzip.compress(record(0, content)))
    assert (page.body, page.charset, page.reason) == (HTML, "shift_jis", None)


def test_content_type_is_guessed_where_missing(file: Path) -> None:
    assert told(read(file, gzip.compress(record(0, http(HTML, "Server: x"))))[0]) == [("0", None)]


def test_bombs_are_not_held(file: Path) -> None:
    huge = b"<html>" + bytes(3 * warc.PAYLOAD_LIMIT)
    data = gzip.compress(record(0, http(huge)), 1)
    data += gzip.compress(record(1, http(gzip.compress(huge), "Content-Type: text/html\r\nContent-Encoding: gzip")))
    data += gzip.compress(record(2, http(huge, status="404 No")), 1) + gzip.compress(record(3, http(HTML)))
    pages, _ = read(file, data)
    assert told(pages) == [("0", "too_large"), ("1", "too_large"), ("2", "http_status"), ("3", None)]


def test_wet_text(file: Path) -> None:
    (page, empty), counts = read(
        file, gzip.compress(record(0, "本文".encode(), "conversion") + record(1, b"", "conversion"))
    )
    assert (page.body.decode(), page.kind, page.charset, empty.reason) == ("本文", "text", "utf-8", "empty")
    assert counts["conversion"] == 2


def test_random_damage_never_raises_and_keeps_what_it_spares(file: Path) -> None:
    zipped = [gzip.compress(record(n, http(HTML + random.Random(n).randbytes(500).hex().encode()))) for n in range(8)]
    for seed in range(150):
        chance = random.Random(seed)
        hurt = sorted(chance.sample(range(8), 2))
        parts = [bytearray(part) for part in zipped]
        for n in hurt:
            at = chance.randrange(len(parts[n]) - 20)
            parts[n][at : at + 20] = chance.randbytes(chance.randrange(40))
        pages, _ = read(file, b"".join(parts))
        kept = {page.url for page in pages if page.reason is None}
        assert {f"http://{n}.example/" for n in range(8) if n not in hurt} <= kept, seed
        assert len(pages) - len(kept) >= 1 or len(kept) == 8


def test_missing_files_raise(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        list(warc.pages(fsspec.filesystem("file"), str(tmp_path / "none.warc.gz"), "w", 0, 9, collections.Counter()))
    assert [page.reason for page in read(tmp_path / "empty.warc.gz", b"")[0]] == ["cut_short"]
