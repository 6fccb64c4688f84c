"""Offline W&B runs read back: the one module that reads wandb's files, as tracking.py is the one that writes them.

gacha/fragments.py reads one file; here the fragments of a run become one Run. Nothing asks a server or writes.
"""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import console
from gacha.fragments import Fragment, read_fragment

SILENT_SECONDS = 60.0
"""A run without an exit record that wrote nothing for so long is taken for killed (wandb flushes every 1 to 15 s)."""
WORTH_FORKING = 32 << 20
"""Bytes of logs, a fifth of a second's work."""
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


def read(folder: str | Path, now: float | None = None) -> list[Run]:
    """All runs below `folder` (or in one `.wandb` file), oldest first. Raises UserError when there are none.

    Fragments of one run id are merged in start order: a later fragment replaces everything from its first step on.
    Files that cannot be read are named on stderr and skipped. `now`: unix seconds that silence is measured from.
    """
    folder = Path(folder)
    if not folder.exists():
        raise console.UserError(f"{folder}: no such folder; give the folder that holds offline-run-*/run-*.wandb")
    found: dict[tuple[str, str], list[Fragment]] = {}
    for part in read_fragments(log_files(folder)):
        if isinstance(part, console.UserError):
            print(f"warning: {part}; skipped", file=sys.stderr)
        elif not part.head.run_id:
            print(f"warning: {part.path}: holds no run record (killed at once?); skipped", file=sys.stderr)
        else:
            found.setdefault((part.head.project, part.head.run_id), []).append(part)
    if not found:
        raise console.UserError(f"{folder}: no W&B runs (offline-run-*/run-*.wandb) in it; give the folder they are in")
    moment = time.time() if now is None else now
    return sorted((merge(fragments, moment) for fragments in found.values()), key=lambda run: (run.started, run.id))


def read_fragments(paths: list[Path]) -> Iterator[Fragment | console.UserError]:
    """Each file's fragment in order, or why it is none; many megabytes of them in one process a core.

    Forked, which is safe only while this process has no other thread, and so on Linux only.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    workers = min(cores, 8, len(paths))
    if (
        threading.active_count() > 1
        or workers < 2
        or sum(path.stat().st_size for path in paths if path.exists()) < WORTH_FORKING
    ):
        yield from map(attempt, paths)
        return
    context = multiprocessing.get_context("fork")
    pipes = []
    for i in range(workers):
        receive, send = context.Pipe(duplex=False)
        context.Process(target=read_share, args=(paths[i::workers], send), daemon=True).start()
        send.close()  # so that a worker's end is the end of its pipe
        pipes.append(receive)
    for i, path in enumerate(paths):
        try:
            part = pipes[i % workers].recv()
        except EOFError:
            part = attempt(path)
        yield part


def attempt(path: Path) -> Fragment | console.UserError:
    """`read_fragment` with its refusal as a value."""
    try:
        return read_fragment(path)
    except console.UserError as mistake:
        return mistake


def read_share(paths: list[Path], send: Connection) -> None:
    """A worker's part of `read_fragments`: it only sends, so it cannot outlive who listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        for path in paths:
            send.send(attempt(path))


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


def merge(fragments: list[Fragment], now: float) -> Run:
    """Fragments of one run id as one Run: rows from a later fragment's first step on replace the earlier ones."""
    # A copy of the same fragment (a backup, a synced folder) starts at the same instant: the longest one counts.
    newest = {part.head.started: part for part in sorted(fragments, key=lambda part: part.path.stat().st_size)}
    parts = [newest[start] for start in sorted(newest)]
    last = parts[-1]
    ends = [math.inf] * len(parts)
    for i in range(len(parts) - 2, -1, -1):
        ends[i] = min([ends[i + 1], *parts[i + 1].steps.tolist()])
    rows = [series(part, end) for part, end in zip(parts, ends, strict=True)]
    history = rows[0] if len(rows) == 1 else joined(rows)
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
    head = last.head
    return Run(
        id=head.run_id,
        name=head.name or head.run_id,
        group=head.group,
        job_type=head.job_type,
        tags=list(head.tags),
        sweep_id=head.sweep_id,
        project=head.project,
        config=config,
        summary=summary,
        history=history,
        tables={name: path for name, path in tables.items() if path.is_file()},
        state=state,
        status=status,
        exit_code=last.exit_code,
        started=parts[0].head.started,
        paths=[part.path for part in parts],
        damaged=sum(part.damaged for part in parts),
    )


def series(part: Fragment, end: float) -> dict[str, Series]:
    """The fragment's columns, rows before step `end` only; those with the same rows share their steps and tokens."""
    steps = part.steps
    tokens = np.full(len(steps), np.nan)
    if "tokens" in part.columns:
        at, values = part.columns["tokens"]
        tokens[at] = values
    axes: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray | None]] = {}
    kept = {}
    for key, (at, values) in part.columns.items():
        if id(at) not in axes:
            before = steps[at] < end
            axes[id(at)] = (steps[at][before], tokens[at][before], None if before.all() else before)
        step, token, some = axes[id(at)]
        if len(step):
            kept[key] = Series(step, token, values if some is None else values[some])
    return kept


def joined(parts: list[dict[str, Series]]) -> dict[str, Series]:
    """Histories that follow each other as one."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {
        key: Series(*map(np.concatenate, zip(*(part[key] for part in parts if key in part), strict=True)))
        for key in keys
    }


def table(path: Path) -> list[dict[str, Any]]:
    """Rows of a `.table.json` file as dicts by column name; empty when the file is unreadable."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        return [dict(zip(loaded["columns"], row, strict=False)) for row in loaded["data"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
