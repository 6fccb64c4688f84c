"""What runs in progress have logged so far, read from their growing `.wandb` files: each byte once.

A poll of a run costs one stat when nothing is new. W&B flushes every second (tracking.py), so that is how old it is.
"""

import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from gacha import fragments, leveldb

FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")
"""A run's folder: when it started, in local time, and its id."""
CLOCK_TICK = 0.5
"""Seconds in which a file system may give two changes of a folder the same time."""


@dataclass
class Tail:
    """One `.wandb` file as far as it was read."""

    path: Path
    position: int = leveldb.HEAD
    steps: list[int] = field(default_factory=list)
    """Of the rows that have the metric."""
    values: list[float] = field(default_factory=list)
    first: float = math.inf
    """Lowest step of any row."""
    last: int | None = None
    preempting: bool = False

    def read(self, metric: str | None) -> None:
        """Take in what was appended since the last call."""
        try:
            if self.path.stat().st_size <= self.position:
                return
            with self.path.open("rb") as file:
                if not file.read(leveldb.HEAD).startswith(leveldb.MAGIC):
                    return
                file.seek(self.position)
                data = file.read()
        except OSError:  # a run being deleted has nothing more to tell
            return
        payloads, taken = leveldb.split(data, self.position)
        self.position += taken
        for payload in payloads:
            if payload is None or (record := fragments.parse(payload)) is None:
                continue
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = {fragments.key_of(item): item.value_json for item in record.history.item}
                step = int(float(row.get("_step", record.history.step.num)))
                self.first, self.last = min(self.first, step), step
                value = fragments.numbers([row[metric]]) if metric in row else None
                if value is not None:
                    self.steps.append(step)
                    self.values.append(float(value[0]))
            elif kind == "preempting":
                self.preempting = True


class Follower:
    """Follows any number of runs in one folder: `wandb_dir` is the one that holds offline-run-* and run-* folders."""

    def __init__(self, wandb_dir: Path, metric: str | None = None) -> None:
        self.wandb_dir, self.metric = Path(wandb_dir), metric
        self.folders: dict[str, list[str]] = {}
        self.tails: dict[str, Tail] = {}
        self.changed, self.looked, self.sure = -1, -math.inf, False

    def history(self, run_id: str) -> list[float]:
        """The metric's logged values so far, NaN and infinities too, in order; a resumed run's repeated steps once."""
        values: list[float] = []
        until = math.inf
        for tail in reversed(self.fragments(run_id)):
            values[:0] = [value for step, value in zip(tail.steps, tail.values, strict=True) if step < until]
            until = min(until, tail.first)
        return values

    def step(self, run_id: str) -> int | None:
        """The last logged step; None before the first."""
        return next((tail.last for tail in reversed(self.fragments(run_id)) if tail.last is not None), None)

    def preempting(self, run_id: str) -> bool:
        """Whether the run's newest fragment has called `mark_preempting`."""
        parts = self.fragments(run_id)
        return bool(parts) and parts[-1].preempting

    def fragments(self, run_id: str) -> list[Tail]:
        """The run's files in start order, read up to now."""
        self.look()
        parts = []
        for folder in self.folders.get(run_id, ()):
            if folder not in self.tails:
                self.tails[folder] = Tail(self.wandb_dir / folder / f"run-{run_id}.wandb")
            tail = self.tails[folder]
            tail.read(self.metric)
            parts.append(tail)
        return parts

    def look(self) -> None:
        """List the folder again if it has changed."""
        try:
            changed = self.wandb_dir.stat().st_mtime_ns
            now = time.monotonic()
            if changed == self.changed and (self.sure or now - self.looked < CLOCK_TICK):
                return
            found: dict[str, list[tuple[str, str]]] = {}
            with os.scandir(self.wandb_dir) as entries:
                for entry in entries:
                    if match := FOLDER.fullmatch(entry.name):
                        found.setdefault(match[2], []).append((match[1], entry.name))
        except FileNotFoundError:  # before the first run
            return
        self.folders = {run_id: [name for _, name in sorted(places)] for run_id, places in found.items()}
        # A folder made within the clock's tick of this listing would leave the same time: list again later.
        self.sure = abs(time.time() - changed / 1e9) > 2
        self.changed, self.looked = changed, now
