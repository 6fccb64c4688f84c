"""Offline W&B runs read back: the one module that reads wandb's files, as tracking.py is the one that writes them.

A `run-<id>.wandb` file is a LevelDB log of protobuf records. Nothing here asks a server, imports torch or writes.
"""

import json
import math
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import console

MAGIC = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
BLOCK, HEAD = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
SILENT_SECONDS = 60.0
"""A run without an exit record that wrote nothing for so long is taken for killed (wandb flushes every 1 to 15 s)."""
VERDICTS = ("ok", "spiked", "diverged", "stopped", "crashed")
STATUS_OF_EXIT = {0: "ok", 3: "diverged", 130: "stopped", 143: "stopped"}


class Series(NamedTuple):
    """One metric's rows in step order, three arrays of one length; `tokens` is NaN where its row had none."""

    step: np.ndarray
    tokens: np.ndarray
    value: np.ndarray


@dataclass
class Run:
    """One pull, its fragments merged."""

    id: str
    name: str
    group: str
    job_type: str
    tags: list[str]
    sweep_id: str
    project: str
    config: dict[str, Any]
    summary: dict[str, Any]
    """Nested keys joined by a dot: a `val/loss` with summary=min is `val/loss.min`."""
    history: dict[str, Series]
    tables: dict[str, Path]
    """Table name to its newest file, readable by `table`."""
    state: str
    """finished (has an exit record) | running | crashed"""
    status: str
    """ok | spiked | diverged | stopped | crashed | running: the run's own verdict, or ours where it left none."""
    exit_code: int | None
    started: float
    """Unix seconds of the first fragment's start."""
    paths: list[Path]
    damaged: int = 0
    """Corrupt chunks skipped; what a kill tears off the end is no damage."""


@dataclass
class Fragment:
    """What one `.wandb` file holds; values stay JSON text until they are needed."""

    path: Path
    record: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    columns: dict[str, tuple[list[int], list[str]]] = field(default_factory=dict)
    tables: dict[str, Path] = field(default_factory=dict)
    exit_code: int | None = None
    """None without an exit record, and with one that the process did not ask for."""
    abandoned: bool = False
    """wandb-core closed the log because its process was gone."""
    damaged: int = 0


def read(folder: str | Path, now: float | None = None) -> list[Run]:
    """All runs below `folder` (or in one `.wandb` file), oldest first. Raises UserError when there are none.

    Fragments of one run id are merged in start order: a later fragment replaces everything from its first step on.
    Files that cannot be read are named on stderr and skipped. `now`: unix seconds that silence is measured from.
    """
    folder = Path(folder)
    if not folder.exists():
        raise console.UserError(f"{folder}: no such folder; give the folder that holds offline-run-*/run-*.wandb")
    found: dict[tuple[str, str], list[Fragment]] = {}
    for path in log_files(folder):
        try:
            fragment = read_fragment(path)
        except console.UserError as mistake:
            print(f"warning: {mistake}; skipped", file=sys.stderr)
            continue
        if fragment.record is None:
            print(f"warning: {path}: holds no run record (killed at once?); skipped", file=sys.stderr)
            continue
        found.setdefault((fragment.record.project, fragment.record.run_id), []).append(fragment)
    if not found:
        raise console.UserError(f"{folder}: no W&B runs (offline-run-*/run-*.wandb) in it; give the folder they are in")
    moment = time.time() if now is None else now
    return sorted((merge(fragments, moment) for fragments in found.values()), key=lambda run: (run.started, run.id))


def log_files(folder: Path) -> list[Path]:
    """Every `.wandb` log below `folder`, sorted; `latest-run` links, hidden folders and environments left out."""
    if folder.is_file():
        return [folder]
    paths = []
    for place, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if (name == ".wandb" or name[0] != ".")
            and name not in ("node_modules", "__pycache__")
            and not Path(place, name, "pyvenv.cfg").exists()
        ]
        paths += [Path(place, name) for name in files if name.startswith("run-") and name.endswith(".wandb")]
    return sorted(paths)


def payloads(data: bytes) -> Iterator[bytes | None]:
    """Record bytes of a LevelDB log in order, each chunk's CRC checked; None once per damaged stretch.

    After a bad chunk reading goes on at the next 32 KiB block, where a chunk always starts. A torn tail ends quietly.
    """
    position, end, parts, open_record = HEAD, len(data), b"", False
    unpack, crc32 = struct.Struct("<IHB").unpack_from, zlib.crc32
    seeds = [crc32(bytes([kind])) for kind in range(5)]
    while position + HEAD <= end:
        left = BLOCK - position % BLOCK
        if left < HEAD:
            position += left
            continue
        checksum, size, kind = unpack(data, position)
        if kind == 0 and size == 0 and checksum == 0:
            position += left
            continue
        start, stop = position + HEAD, position + HEAD + size
        fits = 1 <= kind <= 4 and HEAD + size <= left
        if fits and stop > end:
            return
        if not fits or crc32(data[start:stop], seeds[kind]) != checksum:
            parts, open_record = b"", False
            position += left
            if position < end:
                yield None
            continue
        position = stop
        if kind == FULL:
            yield data[start:stop]
            open_record = False
        elif kind == FIRST:
            parts, open_record = data[start:stop], True
        elif open_record:  # the rest of a record whose beginning was lost is dropped with it
            parts += data[start:stop]
            if kind == LAST:
                yield parts
                open_record = False


def read_fragment(path: Path) -> Fragment:
    """One `.wandb` file, as far as it can be read. Raises UserError when it is not one or its version is unknown."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    try:
        data = path.read_bytes()
    except OSError as refusal:
        raise console.UserError(f"{path}: {refusal.strerror}") from refusal
    if not data.startswith(MAGIC):
        torn = len(data) < HEAD and MAGIC.startswith(data)
        why = "is empty or cut inside its header" if torn else "is no W&B log, or of a version this reader is not for"
        raise console.UserError(f"{path}: {why}")
    part = Fragment(path)
    parse, columns = Record.FromString, part.columns
    for payload in payloads(data):
        if payload is None:
            part.damaged += 1
            continue
        try:
            record = parse(payload)
        except DecodeError:
            part.damaged += 1
            continue
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row, tables = len(part.steps), []
            step = record.history.step.num
            for item in record.history.item:
                nested = item.nested_key
                depth = len(nested)
                key = nested[0] if depth else item.key
                if depth > 1:
                    if nested[-1] == "_type" and item.value_json == '"table-file"':
                        tables.append(key)
                    key = ".".join(nested)
                if key == "_step":
                    step = int(float(item.value_json))
                elif (column := columns.get(key)) is None:
                    columns[key] = ([row], [item.value_json])
                else:
                    column[0].append(row)
                    column[1].append(item.value_json)
            part.steps.append(step)
            for table in tables:
                keep_table(part, table)
        elif kind == "summary":
            # Each record brings only what changed, so all are looked at; their JSON is parsed once, at the end.
            for update in record.summary.update:
                nested = update.nested_key
                key = nested[0] if len(nested) == 1 else update.key or ".".join(nested)
                part.summary[key] = update.value_json
            for removed in record.summary.remove:
                part.summary.pop(removed.key or ".".join(removed.nested_key), None)
        elif kind == "run":
            part.record = record.run
            configure(part.config, record.run.config)
        elif kind == "config":
            configure(part.config, record.config)
        elif kind == "exit" and record.control.mailbox_slot:
            # A wandb-core shared with a living parent closes a SIGKILLed child's log with "exit code 0". Only a process
            # that really finishes waits for an answer, so only its exit record names a mailbox.
            part.exit_code = record.exit.exit_code
        elif kind == "exit":
            part.abandoned = True
    part.summary = dict(leaves({key: from_json(text) for key, text in part.summary.items()}))
    return part


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, their keys joined by dots."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def configure(config: dict[str, Any], record: Any) -> None:
    """Apply one ConfigRecord to `config`; wandb's own `_wandb` entry is left out."""
    for update in record.update:
        *parents, key = list(update.nested_key) or [update.key]
        if (parents or [key])[0] == "_wandb":
            continue
        place = config
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[key] = from_json(update.value_json)
    for removed in record.remove:
        config.pop(removed.key, None)


def keep_table(part: Fragment, name: str) -> None:
    """Remember the file of the table that was just logged under `name`, if it lies inside the run's own folder."""
    files = (part.path.parent / "files").resolve()
    told = from_json(part.columns.get(f"{name}.path", ([], [""]))[1][-1])
    if isinstance(told, str) and (file := (files / told).resolve()).is_relative_to(files):
        part.tables[name] = file


def merge(fragments: list[Fragment], now: float) -> Run:
    """Fragments of one run id as one Run: rows from a later fragment's first step on replace the earlier ones."""
    # A copy of the same fragment (a backup, a synced folder) starts at the same instant: the longest one counts.
    newest = {start_of(part): part for part in sorted(fragments, key=lambda part: part.path.stat().st_size)}
    parts = [newest[start] for start in sorted(newest)]
    last = parts[-1]
    ends = [math.inf] * len(parts)
    for i in range(len(parts) - 2, -1, -1):
        ends[i] = min([ends[i + 1], *parts[i + 1].steps])
    rows = [series(part, end) for part, end in zip(parts, ends, strict=True)]
    history = {
        key: Series(*map(np.concatenate, zip(*(row[key] for row in rows if key in row), strict=True)))
        for key in dict.fromkeys(key for row in rows for key in row)
    }
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    tables: dict[str, Path] = {}
    for part in parts:
        # A verdict holds for the fragment that spoke it: one resumed after "stopped" and then killed has none.
        summary = {key: value for key, value in summary.items() if key not in ("status", "diverged_at_tokens")}
        config |= part.config
        summary |= part.summary
        tables |= part.tables
    if len(parts) > 1:
        for key in summary:
            metric, _, how = key.rpartition(".")
            if how in ("min", "max") and metric in history and np.isfinite(history[metric].value).any():
                finite = history[metric].value[np.isfinite(history[metric].value)]
                summary[key] = float(finite.min() if how == "min" else finite.max())
    if last.exit_code is not None:
        state = "finished"
    elif last.abandoned:
        state = "crashed"
    else:
        state = "crashed" if now - last.path.stat().st_mtime > SILENT_SECONDS else "running"
    status = summary.get("status")
    if status not in VERDICTS:
        status = state if last.exit_code is None else STATUS_OF_EXIT.get(last.exit_code, "crashed")
    run = last.record
    return Run(
        id=run.run_id,
        name=run.display_name or run.run_id,
        group=run.run_group,
        job_type=run.job_type,
        tags=list(run.tags),
        sweep_id=run.sweep_id,
        project=run.project,
        config=config,
        summary=summary,
        history=history,
        tables={name: path for name, path in tables.items() if path.is_file()},
        state=state,
        status=status,
        exit_code=last.exit_code,
        started=start_of(parts[0]),
        paths=[part.path for part in parts],
        damaged=sum(part.damaged for part in parts),
    )


def start_of(part: Fragment) -> float:
    """Unix seconds at which the fragment started."""
    return part.record.start_time.seconds + part.record.start_time.nanos / 1e9


def series(part: Fragment, end: float) -> dict[str, Series]:
    """The fragment's numeric columns, rows before step `end` only; text, media and mixed columns are left out."""
    steps = np.array(part.steps, dtype=np.int64)
    columns = {}
    for key, (rows, texts) in part.columns.items():
        values = numbers(texts)
        if values is not None:
            columns[key] = (np.array(rows, dtype=np.int64), values)
    tokens = np.full(len(steps), np.nan)
    if "tokens" in columns:
        tokens[columns["tokens"][0]] = columns["tokens"][1]
    kept = {}
    for key, (at, values) in columns.items():
        keep = steps[at] < end
        if keep.any():
            kept[key] = Series(steps[at][keep], tokens[at][keep], values[keep])
    return kept


def numbers(texts: list[str]) -> np.ndarray | None:
    """JSON texts as float64, or None when any is no number. One parse for the column: ten times one per value."""
    try:
        parsed = json.loads("[" + ",".join(texts) + "]")
        if any(isinstance(value, str) for value in parsed):
            parsed = [float(value) if value in ("NaN", "Infinity", "-Infinity") else value for value in parsed]
        if not all(isinstance(value, int | float) for value in parsed):
            return None
        return np.array(parsed, dtype=np.float64)
    except (ValueError, OverflowError):
        return None


def from_json(text: str) -> Any:
    """One JSON value; text that is not JSON (a damaged record that kept its checksum) stays text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def table(path: Path) -> list[dict[str, Any]]:
    """Rows of a `.table.json` file as dicts by column name; empty when the file is unreadable."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        return [dict(zip(loaded["columns"], row, strict=False)) for row in loaded["data"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
