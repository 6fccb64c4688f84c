"""Where documents come from: one generator over the embedded corpus, files, JSON lines, Parquet, web archives and
Hugging Face."""

import collections
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from console import UserError

GENERATOR = (
    "inquiries.py",
    "paperwork.py",
    "office.py",
    "lexicon.py",
)  # the files that `inquiries` documents come from
SCHEMES = "inquiries, files:GLOB, jsonl:GLOB, parquet:GLOB, warc:GLOB, wet:GLOB, hf:NAME[:CONFIG][:SPLIT]"
ON_DISK = ("files", "jsonl", "parquet", "warc", "wet")
CUT_SHORT = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


@dataclass(frozen=True, slots=True)
class Document:
    """One text as its source has it (not yet normalised), and the facts it states, where the source knows them."""

    id: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


def read(
    source: str,
    *,
    documents: int = 20_000,
    seed: int = 0,
    text_key: str = "text",
    id_key: str = "id",
    max_documents: int = 0,
    root: str | None = None,
) -> Iterator[Document]:
    """Stream the documents of `source`, in a fixed order: files sorted by path, records as they stand.

    `documents` and `seed` are for `inquiries` alone; `max_documents` stops after that many (0: all); `root` is the
    folder below which documents are named (None: the fixed part of the glob). Of web archives it gives the main text of
    every page that can be read; the crawl stages say what became of the others.
    Raises UserError naming file, line or byte of whatever cannot be read.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "inquiries" and not rest:
        stream = read_inquiries(documents, seed)
    elif scheme == "files" and rest:
        stream = read_files(rest, root)
    elif scheme == "jsonl" and rest:
        stream = read_jsonl(rest, root, text_key, id_key)
    elif scheme == "parquet" and rest:
        stream = read_parquet(rest, root, text_key, id_key)
    elif scheme in ("warc", "wet") and rest:
        stream = read_web(rest, root)
    elif scheme == "hf" and rest:
        stream = read_hf(rest, text_key, id_key)
    else:
        raise unknown(source)
    yield from itertools.islice(stream, max_documents or None)


def unknown(source: str) -> UserError:
    """The error for a `source` that no reader takes."""
    return UserError(f"--source {source}: unknown source; choose one of {SCHEMES}")


def inputs(source: str) -> list[dict[str, Any]]:
    """What `source` reads, as `{"path", "bytes"}` without the folders above it: is it still what was built from?"""
    scheme, _, rest = source.partition(":")
    if scheme == "inquiries" and not rest:
        parts = {name: Path(__file__).with_name(name).read_bytes() for name in GENERATOR}
        return [{"path": n, "bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in parts.items()]
    if scheme in ON_DISK and rest:
        filesystem, paths, root = match(rest)
        return [{"path": short(path, root), "bytes": filesystem.size(path)} for path in paths]
    if scheme == "hf" and rest:
        folder = Path(rest.split(":")[0])
        found = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        return [{"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size} for path in found]
    raise unknown(source)


def read_inquiries(documents: int, seed: int) -> Iterator[Document]:
    """The embedded corpus: `documents` Japanese office documents of generator seed `seed`, with their facts."""
    from data import inquiries

    for document in inquiries.documents(documents, seed):
        yield Document(document.id, document.text, {"kind": document.kind, **document.facts})


def read_files(pattern: str, root: str | None) -> Iterator[Document]:
    """One document per UTF-8 text file; its id is the path below the fixed part of the glob."""
    filesystem, paths, root = match(pattern, root)
    for path in paths:
        with opened(filesystem, path) as file:
            raw = file.read()
        yield Document(short(path, root), decode(raw, path, 0).removeprefix("\ufeff"))


def read_jsonl(pattern: str, root: str | None, text_key: str, id_key: str) -> Iterator[Document]:
    """One document per line that is a JSON object with a string under `text_key`."""
    filesystem, paths, root = match(pattern, root)
    for path in paths:
        offset = 0
        with opened(filesystem, path) as file:
            for number, raw in enumerate(file, 1):
                where = f"{path}:{number}"
                line = decode(raw, where, offset).removeprefix("\ufeff").strip()
                offset += len(raw)
                if not line:
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not JSON ({error}): give one JSON object per line") from None
                if not isinstance(record, dict):
                    raise UserError(f"{where}: a JSON {type(record).__name__}, not an object with a {text_key!r} key")
                yield from_record(record, text_key, id_key, where, f"{short(path, root)}:{number}")


def read_parquet(pattern: str, root: str | None, text_key: str, id_key: str) -> Iterator[Document]:
    """One document per row, read row group by row group; a null text counts as blank."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, paths, root = match(pattern, root)
    for path in paths:
        with filesystem.open(path, "rb") as raw:
            try:
                file = pq.ParquetFile(raw)
            except pa.ArrowInvalid as error:
                raise UserError(f"{path}: not a Parquet file, or cut short ({first_line(error)})") from None
            names = file.schema_arrow.names
            if text_key not in names:
                raise UserError(f"{path}: no column {text_key!r}: choose --text_key from {', '.join(names)}")
            kind = file.schema_arrow.field(text_key).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{path}: column {text_key!r} holds {kind}, not strings: choose another --text_key")
            columns = [text_key, id_key] if id_key in names else [text_key]
            row = 0
            try:
                for batch in file.iter_batches(batch_size=256, columns=columns):
                    for record in batch.to_pylist():
                        row += 1
                        record[text_key] = record[text_key] or ""
                        where = f"{path}, row {row}"
                        yield from_record(record, text_key, id_key, where, f"{short(path, root)}:{row}")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, after row {row}: not UTF-8 ({error.reason}): convert it first") from None
            except (pa.ArrowInvalid, OSError) as error:
                if getattr(error, "errno", None):
                    raise
                raise UserError(f"{path}, after row {row}: damaged ({first_line(error)}): copy it again") from None


def read_hf(rest: str, text_key: str, id_key: str) -> Iterator[Document]:
    """A dataset of the Hugging Face hub or of a local folder, streamed: NAME, NAME:CONFIG, NAME::SPLIT, all three."""
    if rest.count(":") > 2:
        raise UserError(f"--source hf:{rest}: too many colons; write hf:NAME[:CONFIG][:SPLIT]")
    import datasets
    import huggingface_hub

    name, config, split = [*rest.split(":"), "", ""][:3]
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # its retries would bury our one line
    row = 0
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row, record in enumerate(stream, 1):
            yield from_record(dict(record), text_key, id_key, f"hf:{rest}, row {row}", f"{name}:{row}")
    except (UserError, GeneratorExit, MemoryError):
        raise
    except Exception as error:  # datasets has no common base for "missing", "no network", "bad config", "bad data"
        where = f"after row {row}" if row else "cannot be opened"
        hint = "" if row else ": check the name, hf:NAME:CONFIG, hf:NAME::SPLIT, and the network"
        raise UserError(f"--source hf:{rest}: {where} ({type(error).__name__}: {first_line(error)}){hint}") from None


def from_record(record: dict[str, Any], text_key: str, id_key: str, where: str, default_id: str) -> Document:
    """The document in `record`. Raises UserError at `where` if it has no text or the text is no string."""
    if text_key not in record:
        keys = ", ".join(list(record)[:8]) or "none at all"
        raise UserError(f"{where}: no key {text_key!r}; its keys: {keys} (choose with --text_key)")
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f"{where}: {text_key!r} holds {type(text).__name__}, not a string")
    name = record.get(id_key)
    return Document(default_id if name is None else str(name), text)


def read_web(pattern: str, root: str | None) -> Iterator[Document]:
    """The main text of every readable page of WARC and WET files."""
    from data import extract, warc

    filesystem, paths, root = match(pattern, root)
    for path in paths:
        name = short(path, root)
        for page in warc.pages(filesystem, path, name, 0, filesystem.size(path), collections.Counter()):
            if page.reason:
                continue
            with contextlib.suppress(extract.TooComplex):
                html, _ = extract.decode(page.body, page.charset)
                text = extract.main_text(html) if page.kind == "html" else page.body.decode("utf-8", "replace")
                if text.strip():
                    yield Document(page.id, text, {"url": page.url})


def match(pattern: str, root: str | None = None) -> tuple[Any, list[str], str]:
    """The filesystem, the sorted files that `pattern` names, and `root` or else the folder its fixed part names."""
    import fsspec
    from fsspec.utils import stringify_path

    try:
        filesystem, path = fsspec.core.url_to_fs(stringify_path(pattern))
    except (ValueError, ImportError) as error:
        raise UserError(f"{pattern}: cannot be reached ({first_line(error)})") from None
    # A file whose name holds [ or * is itself, not a pattern.
    paths = [path] if filesystem.isfile(path) else sorted(p for p in filesystem.glob(path) if filesystem.isfile(p))
    if not paths:
        hint = ": it is a folder, add /* to read its files" if filesystem.isdir(path) else ": check the path"
        raise UserError(f"{pattern}: no file there{hint}")
    fixed = path if len(paths) == 1 and paths[0] == path else path[: min((path + "*").find(c) % 10**9 for c in "*?[")]
    return filesystem, paths, fixed.rpartition("/")[0] + "/" if root is None else root


def short(path: str, root: str) -> str:
    """`path` below `root`: what a document is called, wherever the corpus lies."""
    return path.removeprefix(root)


@contextlib.contextmanager
def opened(filesystem: Any, path: str) -> Iterator[IO[bytes]]:
    """The file at `path`, binary, decompressed by suffix. Raises UserError if the stream is damaged."""
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    with filesystem.open(path, "rb") as raw:
        try:
            if path.endswith(".zst"):
                import pyarrow as pa  # fsspec would need one package more for this

                yield io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
            else:
                suffix = infer_compression(path)
                yield io.BufferedReader(compr[suffix](raw, mode="rb")) if suffix else raw
        except (*CUT_SHORT, OSError) as error:
            # Decompressors raise OSErrors of their own without an errno; the machine's have one.
            if isinstance(error, OSError) and error.errno:
                raise
            raise UserError(f"{path}: cut short or damaged ({first_line(error)}): copy it again") from None


def decode(raw: bytes, where: str, offset: int) -> str:
    """`raw` as UTF-8. Raises UserError with the byte offset in the file (after decompression)."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}): convert the file first"
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, so that an error stays one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
