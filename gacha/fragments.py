"""One `.wandb` file read: what a run, or the part of it between two resumes, has written down.

A `run-<id>.wandb` file is a LevelDB log of protobuf records; gacha/leveldb.py has the framing, gacha/records.py what is
worth decoding in bulk. Everything else goes through wandb's generated protobuf classes, imported here only.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import console
from gacha.leveldb import HEAD, MAGIC, split
from gacha.records import decode

PIECE = 1 << 20
"""Bytes read at a time."""


class Head(NamedTuple):
    """What a run's newest record says of it."""

    run_id: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    sweep_id: str = ""
    project: str = ""
    started: float = 0.0
    """Unix seconds."""


@dataclass
class Fragment:
    """What one `.wandb` file holds."""

    path: Path
    head: Head = field(default_factory=Head)
    """Empty where the file holds no run record."""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    steps: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Of every row."""
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Numeric keys: the rows that have it, as indices, and its values there."""
    tables: dict[str, Path] = field(default_factory=dict)
    exit_code: int | None = None
    """None without an exit record, and with one that the process did not ask for."""
    abandoned: bool = False
    """wandb-core closed the log because its process was gone."""
    damaged: int = 0


def read_fragment(path: Path) -> Fragment:
    """One `.wandb` file, as far as it can be read. Raises UserError when it is not one or its version is unknown."""
    part, rows = Fragment(path), Rows()
    try:
        with path.open("rb") as file:
            start = file.read(HEAD)
            if start != MAGIC:
                torn = MAGIC.startswith(start)
                why = "empty or cut inside its header" if torn else "no W&B log, or of a version this reader is not for"
                raise console.UserError(f"{path}: is {why}")
            position, size = HEAD, PIECE
            while data := file.read(size):
                payloads, taken = split(data, position)
                take(part, rows, payloads)
                if len(data) < size:
                    break
                size = size if taken else 2 * size
                position += taken
                file.seek(position)
    except OSError as refusal:
        raise console.UserError(f"{path}: {refusal.strerror}") from refusal
    part.summary = dict(leaves({key: from_json(text) for key, text in part.summary.items()}))
    part.steps, part.columns = rows.finish()
    return part


@dataclass
class Rows:
    """History as it is being read, in pieces; a row goes by the number of its record until all are known."""

    seen: int = 0
    """Records before this piece."""
    records: list[np.ndarray] = field(default_factory=list)
    steps: list[np.ndarray] = field(default_factory=list)
    columns: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    words: set[str] = field(default_factory=set)
    """Keys that once held no number."""

    def finish(self) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """Fragment's steps and columns. Columns with the same rows share one array of them."""
        if not self.records:
            return np.empty(0, np.int64), {}
        records, steps = np.concatenate(self.records), np.concatenate(self.steps)
        order = np.argsort(records)
        records = records[order]
        shared: dict[bytes, np.ndarray] = {}
        columns = {}
        for key, pieces in self.columns.items():
            if key not in self.words:
                at = np.searchsorted(records, np.concatenate([record for record, _ in pieces]))
                values = np.concatenate([value for _, value in pieces])
                if (np.diff(at) < 0).any():
                    rank = np.argsort(at, kind="stable")
                    at, values = at[rank], values[rank]
                columns[key] = shared.setdefault(at.tobytes(), at), values
        return steps[order], columns


def take(part: Fragment, rows: Rows, payloads: list[bytes | None]) -> None:
    """Add what the next records of its file say to `part` and `rows`."""
    whole = [payload for payload in payloads if payload is not None]
    part.damaged += len(payloads) - len(whole)
    decoded = decode(whole)
    rows.records.append(decoded.records + rows.seen)
    rows.steps.append(decoded.steps)
    for column in decoded.columns:
        if (key := key_in(column.key)) != "_step":
            rows.columns.setdefault(key, []).append((column.record + rows.seen, column.value))
    loose: dict[str, tuple[list[int], list[str]]] = {}
    at, steps = [], []
    updates = [(i, (key, text)) for i, key, text in decoded.summary]
    for i, update in sorted([*updates, *((int(i), None) for i in decoded.rest)], key=lambda pair: pair[0]):
        if update:
            part.summary[key_in(update[0])] = update[1].decode(errors="replace")
        elif (record := parse(whole[i])) is None:
            part.damaged += 1
        elif (kind := record.WhichOneof("record_type")) == "history":
            row = {key_of(item): item.value_json for item in record.history.item}
            told = numbers([row.pop("_step", "null")])
            at.append(i + rows.seen)
            steps.append(record.history.step.num if told is None or not np.isfinite(told[0]) else int(told[0]))
            for key, text in row.items():
                numbered = loose.setdefault(key, ([], []))
                numbered[0].append(at[-1])
                numbered[1].append(text)
                if text == '"table-file"' and key.endswith("._type"):
                    name = key.removesuffix("._type")
                    keep_table(part, name, from_json(row.get(f"{name}.path", "null")))
        elif kind == "summary":
            part.summary |= {key_of(item): item.value_json for item in record.summary.update}
            for item in record.summary.remove:
                part.summary.pop(key_of(item), None)
        else:
            take_other(part, kind, record)
    rows.records.append(np.array(at, np.int64))
    rows.steps.append(np.array(steps, np.int64))
    for key, (where, texts) in loose.items():
        values = numbers(texts)
        if values is None:
            rows.words.add(key)
        else:
            rows.columns.setdefault(key, []).append((np.array(where, np.int64), values))
    rows.seen += len(whole)


def take_other(part: Fragment, kind: str, record: Any) -> None:
    """Add a record that is neither history nor summary to `part`."""
    if kind == "run":
        run = record.run
        started = run.start_time.seconds + run.start_time.nanos / 1e9
        names = (run.run_id, run.display_name, run.run_group, run.job_type)
        part.head = Head(*names, tuple(run.tags), run.sweep_id, run.project, started)
        configure(part.config, run.config)
    elif kind == "config":
        configure(part.config, record.config)
    elif kind == "exit" and record.control.mailbox_slot:
        # A wandb-core shared with a living parent closes a SIGKILLed child's log with "exit code 0". Only a process
        # that really finishes waits for an answer, so only its exit record names a mailbox.
        part.exit_code = record.exit.exit_code
    elif kind == "exit":
        part.abandoned = True


def parse(payload: bytes) -> Any:
    """The Record of a payload; None where it is damaged and its checksum does not tell."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    try:
        return Record.FromString(payload)
    except DecodeError:
        return None


def key_of(item: Any) -> str:
    """The key of a history or summary item, nested ones joined by dots."""
    return ".".join(item.nested_key) or item.key


def key_in(text: bytes) -> str:
    """The key of an item whose key field alone is given."""
    from wandb.proto.wandb_internal_pb2 import HistoryItem  # type: ignore[attr-defined]

    return key_of(HistoryItem.FromString(text))


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


def keep_table(part: Fragment, name: str, told: Any) -> None:
    """Remember the file, `told` beside the table logged under `name`, if it lies inside the run's own folder."""
    files = (part.path.parent / "files").resolve()
    if isinstance(told, str) and (file := (files / told).resolve()).is_relative_to(files):
        part.tables[name] = file


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
