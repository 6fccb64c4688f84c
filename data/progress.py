"""Progress of the data stages on stderr: a bar with rate and ETA on a terminal, else a plain line now and then."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

LINE_EVERY = 10.0  # seconds between lines where stderr is no terminal


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(line: str) -> None:
    """One line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(name: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """`advance(n)` while the block runs: a bar with rate and ETA on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        with Progress(*columns, TimeElapsedColumn(), Remaining(), console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total)
            yield lambda n: bar.advance(task, n)
        return
    done, begun = 0, time.monotonic()
    last = begun

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            eta = f", {(total - done) * (now - begun) / done:.0f} s left" if total and done else ""
            say(f"{name}: {done:,}{f' of {total:,}' if total else ''} {unit}, {done / (now - begun):,.0f}/s{eta}")

    yield advance
    say(f"{name}: {done:,} {unit} in {time.monotonic() - begun:.1f} s")
