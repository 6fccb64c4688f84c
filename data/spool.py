"""A build's documents on disk: normalised, split by the hash of their text, as Parquet that is read by row groups."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from console import UserError
from data import sources, tokenizer
from data.progress import progress

ROW_GROUP_BYTES = 4_000_000  # documents spooled, and later encoded, at a time
DOCUMENTS_FILE_BYTES = 1_000_000_000  # text per documents-*.parquet


def spool(
    folder: Path,
    source: str,
    streams: list[Iterator[sources.Document]],
    total: int | None,
    normalize: str,
    val_fraction: float,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, int]]]:
    """Write the documents of `streams`, one after another, into documents-*.parquet of `folder`.

    Returns counts by split, the files written, and of each stream its `documents` and `train_bytes`. `total` is how
    many documents are to come, if that is known, and `source` says where from. Raises UserError for a document that is
    no Unicode text, and for none at all.
    """
    counts: dict[str, Any] = {s: {"documents": 0, "bytes": 0, "characters": 0} for s in ("train", "val")}
    counts["blank"] = 0
    sizes = [{"documents": 0, "train_bytes": 0} for _ in streams]
    files: list[dict[str, Any]] = []
    rows: list[dict[str, str]] = []
    rows_bytes = 0
    with contextlib.ExitStack() as open_file:
        write: Callable[[list[dict[str, str]], int], None] | None = None
        numbered = ((number, document) for number, stream in enumerate(streams) for document in stream)
        with progress("documents", total, "documents") as advance:
            for number, document in numbered:
                advance(1)
                text = tokenizer.normalise(document.text, normalize)
                if not text.strip():
                    counts["blank"] += 1
                    continue
                try:
                    raw = text.encode()
                except UnicodeEncodeError as error:
                    raise UserError(
                        f"document {document.id!a}: character {error.start} is half a surrogate pair: mend the source"
                    ) from None
                split = "val" if share(raw) < val_fraction else "train"
                counts[split]["documents"] += 1
                counts[split]["bytes"] += len(raw)
                counts[split]["characters"] += len(text)
                sizes[number]["documents"] += 1
                sizes[number]["train_bytes"] += len(raw) if split == "train" else 0
                facts = normalised(document.facts, normalize)
                name = document.id.encode("utf-8", "replace").decode()
                rows.append({"id": name, "text": text, "split": split, "facts": json.dumps(facts, ensure_ascii=False)})
                rows_bytes += len(raw)
                if rows_bytes >= ROW_GROUP_BYTES:
                    if write is None or files[-1]["bytes"] >= DOCUMENTS_FILE_BYTES:
                        open_file.close()
                        write = open_file.enter_context(documents_file(folder, files))
                    write(rows, rows_bytes)
                    rows, rows_bytes = [], 0
        if rows:
            write = write or open_file.enter_context(documents_file(folder, files))
            write(rows, rows_bytes)
    if not files:
        what = f"{counts['blank']} blank documents and nothing else" if counts["blank"] else "no document"
        raise UserError(f"{source}: empty corpus, {what}")
    for split, other, change in (("val", "train", "raise"), ("train", "val", "lower")):
        if not counts[split]["documents"]:
            raise UserError(
                f"no {split} documents: all {counts[other]['documents']} fell to {other} at --val_fraction "
                f"{val_fraction}: {change} it or add documents"
            )
    return counts, files, sizes


@contextlib.contextmanager
def documents_file(folder: Path, files: list[dict[str, Any]]) -> Iterator[Callable[[list[dict[str, str]], int], None]]:
    """The next documents-*.parquet, as a function that appends rows as one row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in ("id", "text", "split", "facts")])
    entry: dict[str, Any] = {"file": f"documents-{len(files):05d}.parquet", "documents": 0, "bytes": 0}
    files.append(entry)

    def write(rows: list[dict[str, str]], text_bytes: int) -> None:
        writer.write_table(pa.Table.from_pylist(rows, schema))
        entry["documents"] += len(rows)
        entry["bytes"] += text_bytes

    # A Python file, so that a full disk is an OSError with its errno.
    with (folder / entry["file"]).open("wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        yield write


def spooled(folder: Path, files: list[dict[str, Any]]) -> Iterator[list[tuple[str, str, str]]]:
    """The spooled documents as lists of (split, text, id), a row group at a time."""
    import pyarrow.parquet as pq

    for entry in files:
        with pq.ParquetFile(folder / entry["file"]) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["split", "text", "id"])
                yield list(zip(*(table[name].to_pylist() for name in ("split", "text", "id")), strict=True))


def first(groups: Iterator[list[tuple[str, str, str]]], n: int) -> Iterator[tuple[str, str, str]]:
    """The first `n` documents of `groups`."""
    for group in groups:
        yield from group[:n]
        n -= len(group)
        if n <= 0:
            return


def share(raw: bytes) -> float:
    """Where the hash of a document's text falls in [0, 1): the same text always at the same place."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8]) / 2**64


def normalised(facts: Any, how: str) -> Any:
    """`facts` with every string normalised as its text was, so that it still stands there."""
    if isinstance(facts, str):
        return tokenizer.normalise(facts, how)
    if isinstance(facts, dict):
        return {key: normalised(value, how) for key, value in facts.items()}
    return [normalised(value, how) for value in facts] if isinstance(facts, list | tuple) else facts
