"""What a person sees of a training process: a live bar on a terminal, plain lines otherwise."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_SECONDS = 5.0  # between plain lines on a pipe


def span(values: list[float], digits: int) -> str:
    """`2.314`, or `2.314 to 2.402` for several pulls."""
    if not values:
        return "-"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if len(values) == 1 else f"{low} to {high}"


class Progress:
    """Shows loss, bpb, tokens/s, ETA and the guards' verdict. `rate` is smoothed; the first steps warm caches up."""

    def __init__(self, steps: int, start_step: int, batch_tokens: int, shown: bool = True) -> None:
        self.steps, self.batch_tokens, self.rate, self.next_line = steps, batch_tokens, 0.0, 0.0
        self.shown = shown
        self.bar: Bar | None = None
        if shown and sys.stderr.isatty():
            facts = TextColumn("{task.fields[facts]}")
            columns = (MofNCompleteColumn(), BarColumn(), facts, TimeRemainingColumn())
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("", total=steps, completed=start_step, facts="")
            self.bar.start()

    def say(self, line: str) -> None:
        """One line that stays, above the bar or on stderr."""
        if self.bar:
            self.bar.console.print(line, highlight=False, markup=False)
        elif self.shown:
            print(line, file=sys.stderr, flush=True)

    def keep_pace(self, tokens_per_second: float) -> None:
        """Take in the rate of one more step, in tokens/s of each pull."""
        self.rate = 0.9 * self.rate + 0.1 * tokens_per_second if self.rate else tokens_per_second

    def text(self, step: int, losses: list[float], bpbs: list[float], verdict: str) -> str:
        """One line about the pulls whose losses and last bpbs these are."""
        eta = (self.steps - step) * self.batch_tokens / self.rate
        pulls = f"{len(losses)} pulls  " if len(losses) > 1 else ""
        rate = f"{self.rate * len(losses):,.0f} tok/s  eta {int(eta // 60)}:{int(eta % 60):02d}"
        facts = f"{pulls}loss {span(losses, 3)}  bpb {span(bpbs, 4)}  {rate}  {verdict}"
        return f"step {step}/{self.steps}  {facts}"

    def show(self, step: int, losses: list[float], bpbs: list[float], verdict: str) -> None:
        """The line of all pulls, if it is time for one."""
        now = time.monotonic()
        if self.bar:
            facts = self.text(step, losses, bpbs, verdict).partition("  ")[2]
            self.bar.update(self.task, completed=step, facts=facts)
        elif self.shown and (now >= self.next_line or step == self.steps):
            print(self.text(step, losses, bpbs, verdict), file=sys.stderr, flush=True)
            self.next_line = now + LINE_SECONDS

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
