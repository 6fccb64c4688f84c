"""The crawl's decisions: a profile applied to stored annotations, the survivors' signatures, and the clean text.

Thresholds touch columns of numbers alone: no text is read until a page has passed, so another profile over the same
annotations takes seconds.
"""

import collections
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import console
from data import annotate, dedup, edits, overlap, privacy, profiles, words

READ_STEP = ("http_status", "not_html", "empty", "too_large", "bad_http", "bad_encoding", "cut_short", "damaged")
NEAREST = 5  # examples kept of a rule on each side of its threshold
EXCERPT = 160  # characters of an example
SAMPLES = 20  # masks and duplicate pairs shown
HOSTS = 200  # hosts counted by a task


def step_of(reason: str) -> str:
    """The step of the funnel at which `reason` drops a page."""
    if reason in READ_STEP:
        return "read"
    if reason in ("no_text", "too_complex"):
        return "extract"
    if reason in ("language", "host", "tld"):
        return "language"
    return reason if reason in ("dedup", "contamination") else "quality"


def verdicts(table: Any, profile: profiles.Profile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) reason ("" keeps the page), value and threshold (NaN where there is none) of each annotated row."""
    columns = {
        name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names if table[name].type == "double"
    }
    reason, value, threshold = profiles.judge_columns(profile, columns)
    lang = np.array(table["lang"].to_pylist(), object)
    spoken = profiles.speaks_columns(profile, lang, columns)
    reason[~spoken], threshold[~spoken] = "language", profile.min_probability
    value[~spoken] = columns["lang_probability"][~spoken]
    if profile.hosts or profile.tlds:
        blocklist = words.load_hosts(profile.hosts) if profile.hosts else None
        for row, url in enumerate(table["url"].to_pylist()):
            if blocklist is not None and words.blocked(url, blocklist):
                reason[row], value[row], threshold[row] = "host", np.nan, np.nan
            elif profile.tlds and not words.tld_allowed(url, profile.tlds):
                reason[row], value[row], threshold[row] = "tld", np.nan, np.nan
    unread = np.array([name or "" for name in table["reason"].to_pylist()], object)
    reason[unread != ""] = unread[unread != ""]
    value[unread != ""] = threshold[unread != ""] = np.nan
    return reason, value, threshold


def select(data: Any, rank: int, world_size: int, *, folder: str, work: str, profile: profiles.Profile) -> None:
    """Step of an executor: decide the rows of annotations `rank`, and write the signatures of those that are kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    del data, world_size
    begun = time.process_time()
    plan = annotate.read_plan(Path(folder))
    names = ["id", "url", "reason", "lang", "characters", *annotate.numbers(plan)]
    path = Path(folder) / "annotations" / f"{rank:05d}.parquet"
    table = pq.read_table(path, columns=names)
    reason, value, threshold = verdicts(table, profile)
    decided = time.process_time()
    kept = np.flatnonzero(reason == "")
    signatures, signed = [], []
    for row, text in texts(path, kept):
        signature = dedup.signature(text, profile.dedup)
        if signature is not None:
            signatures.append(signature)
            signed.append(row)
    block = np.array(signatures, np.uint32).reshape(-1, profile.dedup.bands * profile.dedup.rows)
    dedup.write_signatures(Path(work) / "signatures", rank, block, np.array(signed, np.uint32), profile.dedup)
    summary = {
        "characters": int(np.sum(np.array(table["characters"])[kept])),
        "reasons": tally(reason, np.array(table["characters"])),
        "examples": examples(path, table, reason, value, threshold, profile),
        "hosts": hosts(table["url"].to_pylist(), reason),
        "seconds": {"quality": decided - begun, "dedup": time.process_time() - decided},
    }
    home = Path(work) / "decisions"
    console.write_atomic(home / f"{rank:05d}.json", json.dumps(summary, ensure_ascii=False).encode())
    by_row: list[bytes | None] = [None] * len(reason)
    for row, sketch in zip(signed, block, strict=True):
        by_row[row] = sketch.astype("<u4").tobytes()
    rows = {"reason": reason.tolist(), "value": value, "threshold": threshold}
    decided_rows = pa.table(rows | {"signature": pa.array(by_row, pa.binary())})
    part = home / f".{rank:05d}.{os.getpid()}.part"
    with part.open("wb") as file, pq.ParquetWriter(file, decided_rows.schema, compression="zstd") as writer:
        first = 0
        for count in group_sizes(path):  # the annotations' own row groups: dedup reads the two side by side
            writer.write_table(decided_rows.slice(first, count))
            first += count
    part.replace(home / f"{rank:05d}.parquet")


def group_sizes(path: Path) -> list[int]:
    """Rows in each row group of a Parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def texts(path: Path, rows: Iterable[int]) -> Iterator[tuple[int, str]]:
    """(row, text) of ascending `rows`, a row group in memory at a time."""
    import pyarrow.parquet as pq

    wanted, first = np.asarray(list(rows), np.int64), 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            inside = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + count)]
            if len(inside):
                column = file.read_row_group(group, columns=["text"])["text"]
                for row in inside.tolist():
                    yield row, column[row - first].as_py() or ""
            first += count


def tally(reason: np.ndarray, characters: np.ndarray) -> dict[str, list[int]]:
    """Documents and characters by reason, "" being kept."""
    return {
        str(name): [int(np.sum(reason == name)), int(np.sum(characters[reason == name]))]
        for name in sorted(set(reason.tolist()))
    }


def hosts(urls: list[str], reason: np.ndarray) -> dict[str, list[int]]:
    """Pages read and pages kept by host, the largest HOSTS of this task."""
    seen: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for url, why in zip(urls, reason.tolist(), strict=True):
        if step_of(why) != "read" or not why:
            host = host_of(url)
            seen[host][0] += 1
            seen[host][1] += not why
    return dict(sorted(seen.items(), key=lambda item: (-item[1][0], item[0]))[:HOSTS])


def host_of(url: str | None) -> str:
    """The host of `url`, "" where it has none."""
    try:
        return urlsplit(url or "").hostname or ""
    except ValueError:
        return ""


def examples(
    path: Path,
    table: Any,
    reason: np.ndarray,
    value: np.ndarray,
    threshold: np.ndarray,
    profile: profiles.Profile,
) -> dict[str, Any]:
    """Of each rule, the NEAREST kept and dropped pages to its threshold, with the beginning of their masked text."""
    chosen: list[tuple[str, str, float, float, int]] = []
    for rule in profile.rules:
        if rule.statistic not in table.column_names:
            continue  # about a word list that nobody gave
        column = table[rule.statistic].to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(reason == rule.statistic)
        distance = np.abs(value[rows] - threshold[rows])
        near = rows[np.lexsort((rows, distance))[:NEAREST]].tolist()
        chosen += [(rule.statistic, "dropped", float(value[row]), float(threshold[row]), row) for row in near]
        rows = np.flatnonzero((reason == "") & ~np.isnan(column))
        for _, bound in profiles.bounds(rule):
            distance = np.abs(column[rows] - bound)
            near = rows[np.lexsort((rows, distance))[:NEAREST]].tolist()
            chosen += [(rule.statistic, "kept", float(column[row]), bound, row) for row in near]
    excerpts = dict(texts(path, sorted({row for *_, row in chosen})))
    ids = table["id"]
    found: dict[str, Any] = {}
    for rule_name, side, at, bound, row in chosen:
        text = privacy.mask(excerpts[row][: 2 * EXCERPT])[0][:EXCERPT]
        found.setdefault(rule_name, []).append([side, at, bound, ids[row].as_py(), text])
    return found


def edited(text: str, profile: profiles.Profile) -> str:
    """`text` after the profile's edits."""
    for name in profile.edits:
        text = edits.EDITS[name](text)
    return text


def rows(data: Any, rank: int, world_size: int, *, folder: str, work: str) -> Iterator[Any]:
    """Step of an executor: every row of annotations `rank` as a datatrove Document; text only where it is kept.

    All rows, so that their numbers are those of the signatures, for datatrove's MinhashDedupFilter.
    """
    import pyarrow.parquet as pq
    from datatrove.data import Document

    del data, world_size
    path = Path(folder) / "annotations" / f"{rank:05d}.parquet"
    reason = pq.read_table(Path(work) / "decisions" / f"{rank:05d}.parquet", columns=["reason"])["reason"].to_pylist()
    row = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            for record in file.read_row_group(group, columns=["id", "url", "text"]).to_pylist():
                kept = not reason[row]
                text = record["text"] if kept else ""
                yield Document(text, record["id"], metadata={"url": record["url"], "row": row, "kept": kept})
                row += 1


def write(
    data: Any,
    rank: int,
    world_size: int,
    *,
    work: str,
    profile: profiles.Profile,
    eval_sets: tuple[str, ...],
    eval_keys: tuple[str, ...],
) -> None:
    """Step of an executor: what is left of `data`, cleaned, checked against the evaluation sets, as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    del world_size
    home = Path(work) / "documents"
    evaluation = index(eval_sets, eval_keys) if eval_sets else None
    columns = pa.schema([("row", pa.int64()), ("id", pa.string()), ("url", pa.string()), ("text", pa.string())])
    count: collections.Counter[str] = collections.Counter()
    masks: collections.Counter[str] = collections.Counter()
    samples: dict[str, list[str]] = collections.defaultdict(list)
    hits: list[list[Any]] = []
    seconds = {"privacy": 0.0, "contamination": 0.0}
    batch: list[dict[str, Any]] = []
    held = 0
    part = home / f".{rank:05d}.{os.getpid()}.part"
    with part.open("wb") as file, pq.ParquetWriter(file, columns, compression="zstd") as writer:
        for document in data:
            if not document.metadata["kept"]:
                continue
            count["unique"] += 1
            count["unique_characters"] += len(document.text)
            begun = time.process_time()
            open_text = edited(document.text, profile)
            text, found = privacy.mask(open_text, profile.privacy)
            masks.update(mask.kind for mask in found)
            count["masked"] += bool(found)
            for mask, shown in zip(found, shapes(open_text, found), strict=True):
                if len(samples[mask.kind]) < SAMPLES:
                    samples[mask.kind].append(shown)
            cleaned = time.process_time()
            here = evaluation.hits(document.id, text) if evaluation else []
            seconds["privacy"] += cleaned - begun
            seconds["contamination"] += time.process_time() - cleaned
            hits += [[document.metadata["row"], len(text), dataclasses.asdict(hit)] for hit in here]
            count["documents"] += 1
            count["characters"] += len(text)
            row = {"row": document.metadata["row"], "id": document.id, "url": document.metadata["url"], "text": text}
            batch.append(row)
            held += len(text)
            if held >= annotate.GROUP_CHARACTERS:
                writer.write_table(pa.Table.from_pylist(batch, columns))
                batch, held = [], 0
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, columns))
    summary = {"count": count, "masks": masks, "samples": samples, "hits": hits, "seconds": seconds}
    console.write_atomic(home / f"{rank:05d}.json", json.dumps(summary, ensure_ascii=False).encode())
    part.replace(home / f"{rank:05d}.parquet")


@functools.cache
def index(eval_sets: tuple[str, ...], eval_keys: tuple[str, ...]) -> overlap.Index:
    """The evaluation sets' index, made once a process."""
    return overlap.Index.build(eval_sets, eval_keys)


def shapes(text: str, found: list[privacy.Mask]) -> Iterator[str]:
    """Each mask in its context, every personal datum as its shape (9 a digit, x a letter): seen, yet not told."""
    hidden = list(text)
    for mask in found:
        hidden[mask.begin : mask.end] = [
            "9" if c.isdigit() else "x" if c.isalpha() else c for c in text[mask.begin : mask.end]
        ]
    for mask in found:
        left, right = max(0, mask.begin - 30), mask.end + 30
        before, inside, after = hidden[left : mask.begin], hidden[mask.begin : mask.end], hidden[mask.end : right]
        yield f"{''.join(before)}【{''.join(inside)}】{''.join(after)}".replace("\n", " ")
