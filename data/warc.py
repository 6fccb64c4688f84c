"""Web archives: every readable page of a WARC or WET file, by byte range, and a reason for every page that is lost.

FastWARC says what a record means; where records begin and end is settled here, because its iterator (like warcio's)
ends silently at a cut or damaged member, and everything behind it would be lost unseen.
WARC 1.1: ISO 28500:2017. Common Crawl stores bodies with their encodings undone beside the headers that still name
them: a declared encoding that the body does not show is not an error.
"""

import collections
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from fastwarc.stream_io import BrotliReader
from fastwarc.warc import WarcRecord, has_block_digest

PAYLOAD_LIMIT = 8 << 20  # bytes of one record, as stored and decoded; Common Crawl cuts its own at 1 to 5 MB
HEAD_LIMIT = 32 << 10  # bytes of a WARC head, and of an HTTP head
STORED_BLOCK = 1 << 20  # bytes per read of the stored file
PIECE = 16 << 10  # compressed bytes per step; a piece inflates to at most 16 of them

HTML = ("text/html", "application/xhtml+xml")
OTHER_MAGIC = (b"%PDF-", b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"PK\x03\x04")  # often served as text/html
GZIP = b"\x1f\x8b\x08"
VERSION = re.compile(rb"WARC/\d\.\d{1,2}\r?\n")
START = re.compile(rb"\n\r?\n(?=WARC/\d\.\d{1,2}\r?\n)")
START_LENGTH = 32  # bytes that hold whatever START matches
NEWLINES = re.compile(rb"[\r\n]*")
HEAD_END = re.compile(rb"\r?\n\r?\n")
LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(\d{1,15})[ \t]*\r?$")
URL = re.compile(rb"(?im)^warc-target-uri:[ \t]*<?([^\s>]{1,4096})")
TYPE = re.compile(rb"(?im)^warc-type:[ \t]*[a-z]+[ \t]*\r?$")
# Names of headers are the same in any case (RFC 2822), but FastWARC knows one spelling.
NAMES = {name.lower(): name for name in (b"WARC-Type", b"WARC-Target-URI", b"WARC-Block-Digest", b"Content-Type")}
NAME = re.compile(rb"(?im)^(" + b"|".join(NAMES) + rb")(?=:)")
CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]{0,1000})?\r?\n")
SNIFF = re.compile(rb"(?i)<(?:html|!doctype\s+html)[\s>]")
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # ESC is text: ISO-2022-JP


@dataclass(frozen=True, slots=True)
class Page:
    """One HTML page, one WET text, or one thing that should have been a page and cannot be read.

    `id` is "NAME:OFFSET", the offset of the record (its gzip member) in the stored file; a record further inside a
    member is "NAME:OFFSET+T" with T its offset in the member's text. `body` is the HTTP payload with transfer- and
    content-encoding undone (WET: UTF-8 text), b"" where there is a `reason`: http_status (not 200), not_html, empty,
    too_large, bad_http, bad_encoding, cut_short, damaged. `charset` is HTTP's, lower case; `kind` is "html" or "text".
    """

    id: str
    url: str
    body: bytes
    charset: str
    kind: str
    reason: str | None


def pages(
    filesystem: Any, path: str, name: str, begin: int, end: int, counts: collections.Counter[str]
) -> Iterator[Page]:
    """The pages whose record (gzip member) starts in [begin, end) of `path`, in order; `name` goes into their ids.

    Consecutive ranges give exactly the pages of one pass. A damaged region is one page with a reason, given by the
    range that read what stood before it; reading goes on at the next record that can be found. `counts` gets
    "records" and every record by its type, damaged regions as "unreadable". text/plain responses are not read: they
    are mostly logs, mail and source code, and no rule of ours was measured on them. At most about 2 * PAYLOAD_LIMIT
    bytes are held. A web archive stored uncompressed inside a page may be taken for records of its own by a range
    that begins inside it, or after damage. Raises OSError if `path` cannot be opened or read; damage never raises.
    """
    with filesystem.open(path, "rb") as file:
        stored = Stored(file)
        if begin == 0 and not stored.at(0, 1):
            counts.update(("records", "unreadable"))
            yield Page(f"{name}:0", "", b"", "", "html", "cut_short")
        elif is_plain(stored, path):
            # The bytes before `begin` may hold the blank line that tells a record's start from page content.
            text = Text(stored, max(0, begin - 3), plain=True)
            while text.offset < begin and text.advance(None):
                pass
            yield from read_text(text, name, 0, end, counts)
        else:
            yield from read_members(stored, name, begin, end, counts)


def is_plain(stored: "Stored", path: str) -> bool:
    """Whether the file is not compressed, whatever its name says; a stray line may stand before the first member."""
    magic = stored.at(0, 5)
    if path.endswith(".gz"):
        return magic == b"WARC/" and find_member(stored, 1, STORED_BLOCK) == STORED_BLOCK
    return magic[:2] != GZIP[:2]


def read_members(stored: "Stored", name: str, begin: int, end: int, counts: collections.Counter[str]) -> Iterator[Page]:
    """The pages of the gzip members that start in [begin, end)."""
    found = begin > 0  # is `position` known to be a member of WARC text, or past the range?
    position = find_member(stored, begin, end) if found else 0
    while not (found and position >= end) and stored.at(position, 1):
        text = Text(stored, position, plain=False)
        text.skip_newlines()
        if not text.want(5).startswith(b"WARC/"):
            if text.trouble or text.buffer:
                counts.update(("records", "unreadable"))
                yield Page(f"{name}:{position}", "", b"", "", "html", text.trouble or "damaged")
                position, found = find_member(stored, position + 1, end), True
            else:
                position = text.position  # an empty member: some writers end a file so
            continue
        # Whoever read the last member looks one member further, so that garbage at a seam is told, and told once.
        if position >= end:
            return
        yield from read_text(text, name, position, end, counts)
        found = bool(text.trouble)
        position = find_member(stored, position + 1, end) if found else text.position


def find_member(stored: "Stored", position: int, end: int) -> int:
    """Where the next gzip member of WARC text starts, from `position` on; `end` if there is none before."""
    while position < end and (block := stored.at(position, STORED_BLOCK)):
        at = block.find(GZIP)
        while at >= 0 and position + at < end:
            text = Text(stored, position + at, plain=False)
            text.skip_newlines()
            if text.want(5).startswith(b"WARC/"):
                return position + at
            at = block.find(GZIP, at + 1)
        position += max(1, len(block) - len(GZIP) + 1)
    return end


def read_text(text: "Text", name: str, member: int, end: int, counts: collections.Counter[str]) -> Iterator[Page]:
    """The pages among the records of one text: a gzip member's, or a whole uncompressed file's."""
    while True:
        text.skip_newlines()
        if not text.want(START_LENGTH):
            return
        is_record = VERSION.match(text.buffer) is not None
        if is_record and text.plain and text.offset >= end:
            return
        inside = f"+{text.offset}" if text.offset else ""
        place = f"{name}:{text.offset}" if text.plain else f"{name}:{member}{inside}"
        head, length = read_head(text) if is_record else (b"", 0)
        if not head:
            named = URL.search(text.buffer, 0, HEAD_LIMIT) if is_record else None
            url = named[1].decode("utf-8", "replace") if named else ""
            garbage = not text.buffer.startswith(b"WARC/")
            text.drop(1)
            reason = "damaged" if text.advance(None) or garbage else text.shortfall
            counts.update(("records", "unreadable"))
            yield Page(place, url, b"", "", "html", reason)
            continue

        kept = length if length <= PAYLOAD_LIMIT else HEAD_LIMIT  # of a larger one the HTTP head, to say what it was
        text.want(len(head) + kept + START_LENGTH)
        content = bytes(memoryview(text.buffer)[len(head) : len(head) + kept])
        text.drop(len(head))
        start, reason = text.offset, ""
        if kept < length and text.advance(start + length):
            reason = "damaged"  # the next record begins before the length of this one is over
        elif text.offset + len(text.buffer) < start + length:
            reason = "damaged" if text.advance(None) else text.shortfall
        elif not ends_well(text, start + length - text.offset):
            text.advance(None)
            reason = "damaged"
        else:
            text.drop(start + length - text.offset)
            reason = text.trouble  # of a member that ends so, nothing vouches for the last record
        # A checksum vouches for a member that ended well; for any other record its digest has to.
        vouched = text.ended and not text.plain
        page = read_record(place, head, content, reason, kept < length, vouched, counts)
        if page:
            yield page


def read_head(text: "Text") -> tuple[bytes, int]:
    """The WARC head of the record at the front of `text` with its blank line, and its Content-Length; (b"", 0) if
    there is no blank line or no length."""
    for size in (4 << 10, HEAD_LIMIT):
        text.want(size)
        if blank := HEAD_END.search(text.buffer, 0, size):
            head = bytes(text.buffer[: blank.end()])
            length = LENGTH.search(head)
            return (head, int(length[1])) if length else (b"", 0)
    return b"", 0


def ends_well(text: "Text", at: int) -> bool:
    """Whether a record may end `at` characters into the buffer: a blank line follows it, as the standard says, or
    nothing does, as some writers have it; but not if its own last bytes are that blank line: its length is wrong."""
    text.want(at + START_LENGTH)
    tail = bytes(text.buffer[max(0, at - 4) : at])
    rest = bytes(text.buffer[at : at + START_LENGTH])
    gap = NEWLINES.match(rest)[0]  # type: ignore[index]
    if gap.startswith((b"\r\n\r\n", b"\n\n")):
        return True
    if rest[len(gap) :] and not VERSION.match(rest, len(gap)):
        return False
    return gap in (b"", b"\n", b"\r\n") and not (tail + gap).endswith((b"\r\n\r\n", b"\n\n"))


def read_record(
    place: str,
    head: bytes,
    content: bytes,
    reason: str,
    too_large: bool,
    vouched: bool,
    counts: collections.Counter[str],
) -> Page | None:
    """The page in a record, or None if its type is none of ours; `reason` is what went wrong up to here."""
    counts["records"] += 1
    head = NAME.sub(lambda found: NAMES[found[0].lower()], head)
    try:
        if not TYPE.search(head):
            raise OSError("no type")
        record = WarcRecord.from_reader(io.BytesIO(head + content), quirks_mode=True)
    except OSError:
        counts["unreadable"] += 1
        return Page(place, "", b"", "", "html", "damaged")
    url = (record.headers.get("WARC-Target-URI") or "").strip("<> ")
    type_name = "dns" if url.startswith("dns:") else str(record.record_type)
    counts[type_name] += 1
    if type_name not in ("response", "resource", "conversion"):
        return None
    kind = "text" if type_name == "conversion" else "html"
    if not (reason or too_large or vouched) and has_block_digest(record):
        reason = "" if record.verify_block_digest() else "damaged"
    if reason:
        return Page(place, url, b"", "", kind, reason)
    if type_name == "conversion":
        text = b"" if too_large else content
        return Page(place, url, text, "utf-8", kind, "too_large" if too_large else None if text.strip() else "empty")

    encodings, transfer = "", ""
    if type_name == "response":
        record.is_http = True
        try:
            record.parse_http(quirks_mode=True)
        except OSError:
            return Page(place, url, b"", "", kind, "bad_http")
        if record.http_headers.status_code is None:
            return Page(place, url, b"", "", kind, "bad_http")
        if record.http_headers.status_code != 200:
            return Page(place, url, b"", "", kind, "http_status")
        content_type, charset = record.http_content_type or "", record.http_charset or ""
        encodings = record.http_headers.get("Content-Encoding") or ""
        transfer = record.http_headers.get("Transfer-Encoding") or ""
    else:
        content_type, _, parameters = (record.headers.get("Content-Type") or "").partition(";")
        charset = parameters.partition("charset=")[2].partition(";")[0]
    body = record.reader.read()
    content_type, charset = content_type.strip().lower(), charset.strip("\"' ").lower()
    if content_type and content_type not in HTML:
        return Page(place, url, b"", charset, kind, "not_html")
    if too_large:
        return Page(place, url, b"", charset, kind, "too_large")
    try:
        body = undo_encodings(body, encodings.lower(), transfer.lower())
    except (ValueError, OSError, zlib.error):
        return Page(place, url, b"", charset, kind, "bad_encoding")
    if len(body) > PAYLOAD_LIMIT:
        return Page(place, url, b"", charset, kind, "too_large")
    if not body.strip():
        return Page(place, url, b"", charset, kind, "empty")
    if body.startswith(OTHER_MAGIC) or (not content_type and not SNIFF.search(body, 0, 1024)):
        return Page(place, url, b"", charset, kind, "not_html")
    return Page(place, url, body, charset, kind, None)


def undo_encodings(body: bytes, encodings: str, transfer: str) -> bytes:
    """`body` without its transfer- and content-encodings; a body longer than PAYLOAD_LIMIT stops just above it.

    Raises ValueError, OSError or zlib.error if an encoding is broken or unknown.
    """
    if "chunked" in transfer and CHUNK.match(body):
        body = join_chunks(body)
    for encoding in reversed([part.strip() for part in encodings.split(",")]):
        if body.startswith(GZIP):
            body = inflate(body, 31)
        elif encoding in ("", "identity", "none", "gzip", "x-gzip") or not CONTROL.search(body, 0, 512):
            continue  # undone already, by the crawler
        elif encoding == "deflate":
            is_zlib = body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0
            body = inflate(body, 15 if is_zlib else -15)
        elif encoding == "br":
            reader, body = BrotliReader(io.BytesIO(body)), b""
            while len(body) <= PAYLOAD_LIMIT and (piece := reader.read(PAYLOAD_LIMIT + 1 - len(body))):
                body += piece
        else:
            raise ValueError(encoding)
    return body


def join_chunks(body: bytes) -> bytes:
    """The payload of a chunked body (RFC 9112, section 7.1). Raises ValueError unless it is whole."""
    chunks: list[bytes] = []
    at = 0
    while head := CHUNK.match(body, at):
        size = int(head[1], 16)
        if size == 0:
            return b"".join(chunks)
        chunks.append(body[head.end() : head.end() + size])
        at = head.end() + size
        at += 2 if body[at : at + 2] == b"\r\n" else 1
    raise ValueError("chunk cut short")


def inflate(body: bytes, window: int) -> bytes:
    """`body` decompressed by zlib, up to one byte above PAYLOAD_LIMIT. Raises ValueError or zlib.error."""
    decompressor = zlib.decompressobj(window)
    text = decompressor.decompress(body, PAYLOAD_LIMIT + 1)
    if not decompressor.eof and len(text) <= PAYLOAD_LIMIT:
        raise ValueError("cut short")
    return text


class Stored:
    """The bytes of a stored file at any offset, read forward in blocks; only the last one or two are held."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.start, self.block = file, 0, b""

    def at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer only at the end of the file."""
        if not self.start <= offset <= self.start + len(self.block):
            self.start, self.block = offset, b""
            self.file.seek(offset)
        while self.start + len(self.block) < offset + size:
            more = self.file.read(STORED_BLOCK)
            if not more:
                break
            self.start, self.block = offset, self.block[offset - self.start :] + more
        return self.block[offset - self.start : offset - self.start + size]


class Text:
    """The text of one gzip member, or of an uncompressed file from `position` on, read forward through a buffer.

    buffer: what is held of it; offset: where the buffer begins (in a member's text, or in the uncompressed file);
    position: the next stored byte; ended: nothing follows the buffer; trouble: why it ended early, "" if it did not.
    """

    def __init__(self, stored: Stored, position: int, plain: bool) -> None:
        self.stored, self.position, self.plain = stored, position, plain
        self.buffer, self.offset, self.ended, self.trouble = bytearray(), position if plain else 0, False, ""
        self.decompressor = None if plain else zlib.decompressobj(31)

    @property
    def shortfall(self) -> str:
        """Why a record lacks its end: in a whole member only its length can be wrong."""
        return self.trouble or ("cut_short" if self.plain else "damaged")

    def want(self, size: int) -> bytearray:
        """The buffer, holding at least `size` bytes unless the text ends."""
        while len(self.buffer) < size and not self.ended:
            piece = self.stored.at(self.position, PIECE)
            if self.decompressor is None:
                self.buffer += piece
                self.position += len(piece)
                self.ended = not piece
            elif not piece:
                self.ended, self.trouble = True, "cut_short"
            else:
                self.decompress(piece, self.decompressor)
        return self.buffer

    def decompress(self, piece: bytes, decompressor: Any) -> None:
        """Append what `piece` inflates to; of a broken one whatever comes out before the break."""
        before = decompressor.copy()
        try:
            self.buffer += decompressor.decompress(piece, 16 * PIECE)
        except zlib.error:
            self.ended, self.trouble = True, "damaged"
            try:
                for byte in piece:
                    self.buffer += before.decompress(bytes((byte,)))
            except zlib.error:
                return
        # At the end of a member CPython keeps what is left under either name, or under both.
        rest = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
        self.position += len(piece) - len(rest)
        self.ended = decompressor.eof or self.ended

    def drop(self, size: int) -> None:
        """Let go of the first `size` bytes of the buffer."""
        size = min(size, len(self.buffer))
        del self.buffer[:size]
        self.offset += size

    def skip_newlines(self) -> None:
        """Let go of the newlines at the front."""
        while self.want(1) and self.buffer[0] in b"\r\n":
            self.drop(NEWLINES.match(self.buffer).end())  # type: ignore[union-attr]

    def advance(self, to: int | None) -> bool:
        """Let go of the text up to offset `to` (None: all of it) or up to what looks like the start of a record, if
        that comes first; whether it did."""
        while True:
            limit = len(self.buffer) if to is None else min(len(self.buffer), to - self.offset)
            if found := START.search(self.buffer, 0, limit):
                self.drop(found.end())
                return True
            if limit < len(self.buffer) or self.ended:
                self.drop(limit)
                return False
            self.drop(max(0, limit - START_LENGTH))
            self.want(START_LENGTH + 1)
