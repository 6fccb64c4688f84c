"""What a person sees while a sweep is served: a live table on a terminal, plain lines in a file."""

import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gacha.definition import flat, same
from gacha.ledger import STATUSES, Ledger, Pull

REDRAW_SECONDS, HEARTBEAT_SECONDS = 0.5, 15.0
COLOURS = {"finished": "green", "diverged": "yellow", "stopped": "yellow", "failed": "red"}
COLOURS |= {"interrupted": "magenta", "running": "cyan"}


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


class Board:
    """Shows the pulls of a sweep on stderr; a context manager, told of starts and ends, and ticked by the agent."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.labels = labels(ledger.pulls)
        self.screen = Console(stderr=True)
        self.live = Live(console=self.screen, auto_refresh=False, transient=True) if self.screen.is_terminal else None
        self.due = time.monotonic()

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        else:
            self.due += HEARTBEAT_SECONDS
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def label(self, pull: Pull) -> str:
        if len(self.labels) != len(self.ledger.pulls):
            self.labels = labels(self.ledger.pulls)
        return self.labels[pull.index]

    def tell(self, pull: Pull, news: str) -> None:
        """A start or an end: a line in a file; on a terminal the table shows it."""
        if not self.live:
            sweep = self.ledger.sweep
            total = len(sweep.points) if sweep.listed else sweep.definition.get("run_cap")
            say(f"[{pull.index + 1}{f'/{total}' if total else ''}] {pull.run_id} {news}")

    def tick(self) -> None:
        """Redraw, or repeat where each running pull of this agent is, when it is time."""
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + (REDRAW_SECONDS if self.live else HEARTBEAT_SECONDS)
        if self.live:
            self.live.update(self.table(), refresh=True)
        for pull in self.ledger.pulls:
            if pull.status == "running" and pull.agent == self.ledger.agent:
                self.tell(pull, f"{clock(pull.elapsed)}  {last_line(pull.log, pull.log_from)}")

    def table(self) -> Table:
        """The pulls as rows; where the terminal is too short, those that run and those that ended last."""
        counts = Counter(pull.status for pull in self.ledger.pulls)
        title = "  ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
        table = Table(title=title, title_justify="left", expand=True, box=None)
        for name in ("#", "run", "parameters", "status", "time"):
            table.add_column(name, no_wrap=True, justify="right" if name in ("#", "time") else "left")
        table.add_column("last line", no_wrap=True, overflow="ellipsis", ratio=1)
        room = max(4, self.screen.height - 4)
        # Waiting pulls are served from the front, ended ones matter from the back.
        waiting = [pull for pull in self.ledger.pulls if pull.status == "waiting"]
        others = [pull for pull in self.ledger.pulls if pull.status != "waiting"]
        others.sort(key=lambda pull: (pull.status != "running", -pull.index))
        shown = (others[: max(room // 2, room - len(waiting))] + waiting)[:room]
        for pull in sorted(shown, key=lambda pull: pull.index):
            line = (last_error if pull.status == "failed" else last_line)(pull.log, pull.log_from)
            status = Text(pull.status, style=COLOURS.get(pull.status, "dim"))
            time_spent = clock(pull.elapsed) if pull.elapsed else ""
            row = (str(pull.index + 1), pull.run_id, self.label(pull))
            table.add_row(*map(Text, row), status, Text(time_spent), Text(line))
        return table


def labels(pulls: list[Pull]) -> list[str]:
    """Each pull's parameters that differ between pulls, as `name=value ...`."""
    rows = [flat(pull.params) for pull in pulls]
    first = {name: same(value) for name, value in rows[0].items()} if rows else {}
    varying = {name for row in rows for name, value in row.items() if same(value) != first.get(name)}
    return ["  ".join(f"{name}={value}" for name, value in row.items() if name in varying) for row in rows]


def lines_of(log: Path, start: int, most: int) -> list[str]:
    """The last lines of `log` after byte `start`, cleaned for a terminal, without those of wandb itself."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - most))
            text = file.read(most).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    cleaned = ("".join(c if c.isprintable() else " " for c in line).strip() for line in re.split(r"[\r\n]+", text))
    return [line for line in cleaned if line and not line.startswith("wandb:")]


def last_line(log: Path, start: int = 0) -> str:
    """How far a run is: its last line `step ...` after byte `start` of its log, or else what it said last."""
    said = lines_of(log, start, 4096)
    return ([line for line in said if re.match(r"step \d", line)] or said or [""])[-1]


def last_error(log: Path, start: int = 0) -> str:
    """The last line of a run that names an error (`error: ...`, `ValueError: ...`), or else what it said last."""
    said = lines_of(log, start, 65536)
    errors = [line for line in said if re.match(r"[\w.]*(error|exception|exit)\b", line, re.IGNORECASE)]
    return (errors or said or ["it said nothing"])[-1]


def clock(seconds: float) -> str:
    """Seconds as 0:35 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def result(sweep_id: str, folder: Path, pulls: list[Pull]) -> dict[str, Any]:
    """What `--json` prints: the runs in serving order and how many ended how."""
    counts = Counter(pull.status for pull in pulls)
    runs = [
        {
            "run_id": pull.run_id,
            "params": pull.params,
            "status": pull.status,
            "returncode": pull.returncode,
            "seconds": round(pull.seconds, 3),
        }
        for pull in pulls
    ]
    return {
        "sweep_id": sweep_id,
        "folder": str(folder),
        "runs": runs,
        "counts": {status: counts[status] for status in STATUSES},
    }


def print_pulls(sweep_id: str, folder: Path, pulls: list[Pull]) -> None:
    """The same for a person, on stdout."""
    for pull, label in zip(pulls, labels(pulls), strict=True):
        print(f"{pull.index + 1:>4}  {pull.run_id}  {pull.status:<11}  {clock(pull.seconds):>7}  {label}")
    counts = Counter(pull.status for pull in pulls)
    print(f"sweep {sweep_id} in {folder}: " + ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s]))
