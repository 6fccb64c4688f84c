"""A live bar on a terminal, plain lines otherwise, and the same plain lines in the pull's log file."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_SECONDS = 5.0  # between plain lines on a pipe
LOG_SECONDS = 1.0  # between lines in the log file


class Progress:
    """Shows loss, bpb, tokens/s, ETA and the guard's verdict. `rate` is smoothed; the first steps warm caches up."""

    def __init__(self, log: Path, steps: int, start_step: int, batch_tokens: int) -> None:
        self.steps, self.batch_tokens, self.rate = steps, batch_tokens, 0.0
        self.log = log.open("a", encoding="utf-8", buffering=1)
        self.next_log = self.next_line = 0.0
        self.bar: Bar | None = None
        if sys.stderr.isatty():
            facts = TextColumn("{task.fields[facts]}")
            columns = (MofNCompleteColumn(), BarColumn(), facts, TimeRemainingColumn())
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("", total=steps, completed=start_step, facts="")
            self.bar.start()

    def say(self, line: str) -> None:
        """One line that stays: in the log, and above the bar or on stderr."""
        self.log.write(line + "\n")
        if self.bar:
            self.bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def update(self, step: int, loss: float, bpb: float | None, rate: float, verdict: str) -> None:
        """`rate` in tokens/s of the last step, `bpb` of the last validation (None before the first)."""
        self.rate = 0.9 * self.rate + 0.1 * rate if self.rate else rate
        now = time.monotonic()
        due_line = not self.bar and (now >= self.next_line or step == self.steps)
        if not (self.bar or due_line or now >= self.next_log or step == self.steps):
            return
        eta = (self.steps - step) * self.batch_tokens / self.rate
        bits = f"{bpb:.4f}" if bpb is not None else "-"
        facts = f"loss {loss:.3f}  bpb {bits}  {self.rate:,.0f} tok/s"
        line = f"step {step}/{self.steps}  {facts}  eta {int(eta // 60)}:{int(eta % 60):02d}  {verdict}"
        if now >= self.next_log or step == self.steps:
            self.log.write(line + "\n")
            self.next_log = now + LOG_SECONDS
        if self.bar:
            self.bar.update(self.task, completed=step, facts=f"{facts}  {verdict}")
        elif due_line:
            print(line, file=sys.stderr, flush=True)
            self.next_line = now + LINE_SECONDS

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        self.log.close()
