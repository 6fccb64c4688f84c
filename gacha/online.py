"""Runs read from a W&B server, whole: the same Run objects that gacha/runs.py makes of files.

Every logged row is read (W&B's scan_history), never the 500 points that its `history()` draws from them. Tables stay
on the server: no number of the report needs them.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import console
import tracking
from console import UserError
from gacha.fragments import leaves
from gacha.runs import VERDICTS, Run, Series

TIMEOUT = 30  # seconds that the server has for one answer
STALLED = 120.0  # seconds without one more run read, after which the server is given up
THREADS = 8  # most of a run's time is waiting for pages; W&B limits an account's requests a minute
PAGE = 1_000  # rows asked for at once
STATE = {"finished": "finished", "failed": "finished", "killed": "finished", "crashed": "crashed"} | dict.fromkeys(
    ("running", "pending", "preempting"), "running"
)
STATUS = {"finished": "ok", "failed": "crashed", "killed": "stopped", "preempted": "stopped"}
WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read(path: str) -> list[Run]:
    """All runs of `ENTITY/PROJECT` or `ENTITY/PROJECT/SWEEP`, oldest first.

    Raises UserError, one line, when there is no key, no such project or sweep, no run in it, or no answer in time.
    """
    entity, project, *sweep = path.split("/")
    api = connect(path)
    filters = {"sweep": sweep[0]} if sweep else {}
    with told_in_one_line(path, api.settings["base_url"]):
        listed = list(api.runs(f"{entity}/{project}", filters=filters, lazy=False))
    if not listed:
        which = f"sweep {sweep[0]}" if sweep else "project"
        raise UserError(f"{path}: the {which} has no runs on {api.settings['base_url']}; check the name")
    found: list[Run] = []
    pool = ThreadPoolExecutor(THREADS)
    waiting: set[Future[Run]] = {pool.submit(whole, run, path) for run in listed}
    with told_in_one_line(path, api.settings["base_url"]), shown(path, len(listed)) as tell:
        try:
            while waiting:
                done, waiting = wait(waiting, STALLED, FIRST_COMPLETED)
                if not done:
                    console.skip_exit_hooks = True  # they would wait for the threads that wait for the server
                    raise TimeoutError
                found += [future.result() for future in done]
                tell(len(found))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return sorted(found, key=lambda run: (run.started, run.id))


def connect(path: str) -> Any:
    """W&B's public API with a key and a server that answers. Raises UserError without; never asks on the terminal."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    settings = wandb.setup().settings
    if not tracking.has_key(settings):
        raise UserError(
            f"{path}: no folder here, and no W&B key to look on {settings.base_url}: wandb login, or WANDB_API_KEY"
        )
    # Its own patience is hours.
    settings.x_graphql_retry_max = settings.x_graphql_retry_max or 4
    settings.x_graphql_timeout_seconds = settings.x_graphql_timeout_seconds or TIMEOUT
    with told_in_one_line(path, settings.base_url):
        return wandb.Api(timeout=TIMEOUT)


@contextlib.contextmanager
def told_in_one_line(path: str, url: str) -> Iterator[None]:
    """What the server or W&B's client refuses in the block, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # wandb raises its own, requests' and plain ValueErrors for one and the same thing
        said = " ".join(str(error).split())
        if isinstance(error, TimeoutError) or "in time" in said or "timed out" in said:
            said = "no answer in time; check the network and WANDB_BASE_URL"
        elif "Could not find project" in said:
            said = "no such project, or the key may not see it"
        raise UserError(f"{path}: {url}: {said or type(error).__name__}") from None


@contextlib.contextmanager
def shown(name: str, total: int) -> Iterator[Any]:
    """`tell(n)` while the block runs: a counter on a terminal, else a line now and then, on stderr."""
    terminal, last = sys.stderr.isatty(), time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        if terminal:
            print(f"\r{name}: {done} of {total} runs read", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{name}: {done} of {total} runs read", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if terminal:
            print(file=sys.stderr)


def whole(run: Any, path: str) -> Run:
    """One run of the public API with its full history."""
    attributes = run._attrs
    counted = attributes.get("historyLineCount") or 0
    steps, columns = history_columns(run, counted)
    history = series(steps, columns)
    if len(steps) < counted:
        print(f"warning: {path}: {run.id}: the server gave {len(steps)} of {counted} rows", file=sys.stderr)
    summary = {key: from_words(value) for key, value in leaves(run.summary_metrics) if key.split(".")[0] != "_wandb"}
    server_state = str(run.state).lower()
    state = STATE.get(server_state, "crashed")
    # A run that goes on after it was stopped still carries that verdict.
    verdict = summary.get("status") if state != "running" else None
    return Run(
        id=run.id,
        name=run.name or run.id,
        group=attributes.get("group") or "",
        job_type=attributes.get("jobType") or "",
        tags=list(attributes.get("tags") or []),
        sweep_id=attributes.get("sweepName") or "",
        project=run.project,
        config=dict(run.config),
        summary=summary,
        history=history,
        tables={},
        state=state,
        status=verdict if verdict in VERDICTS else STATUS.get(server_state, state),
        exit_code=0 if server_state == "finished" else None,
        started=started(history, attributes.get("createdAt")),
        paths=[Path(run.entity, run.project, "runs", run.id)],
    )


def history_columns(run: Any, counted: int) -> tuple[np.ndarray, dict[str, tuple[list[int], list[Any]]]]:
    """Steps of all rows in order, and by key the numbers of its rows and their values."""
    last = run.lastHistoryStep
    if last < 0:
        return np.empty(0, dtype=np.int64), {}
    # A page is a range of steps: runs that log every hundredth step are asked for a hundred times as many.
    page = max(PAGE, math.ceil(PAGE * (last + 1) / counted) if counted else 0)
    rows = sorted(run.scan_history(page_size=page, use_cache=False), key=lambda row: row["_step"])
    columns: dict[str, tuple[list[int], list[Any]]] = {}
    for number, row in enumerate(rows):
        numbers = {key: value for key, value in row.items() if not (isinstance(value, dict) and "_type" in value)}
        for key, value in leaves(numbers):
            if key != "_step" and value is not None:
                at, values = columns.setdefault(key, ([], []))
                at.append(number)
                values.append(from_words(value))
    return np.array([row["_step"] for row in rows], dtype=np.int64), columns


def series(steps: np.ndarray, columns: dict[str, tuple[list[int], list[Any]]]) -> dict[str, Series]:
    """The numeric columns; text, media and mixed ones are left out, as from files."""
    numeric = {
        key: (np.array(at), np.array(values, dtype=np.float64))
        for key, (at, values) in columns.items()
        if all(isinstance(value, int | float) for value in values)
    }
    tokens = np.full(len(steps), np.nan)
    if "tokens" in numeric:
        tokens[numeric["tokens"][0]] = numeric["tokens"][1]
    return {key: Series(steps[at], tokens[at], values) for key, (at, values) in numeric.items()}


def from_words(value: Any) -> Any:
    """W&B's spelling of what JSON has no number for, as a float."""
    return WORDS.get(value, value) if isinstance(value, str) else value


def started(history: dict[str, Series], created: str | None) -> float:
    """Unix seconds of the run's start: by its first row, as a synced run was created when it was synced."""
    if "_timestamp" in history and "_runtime" in history:
        return float(history["_timestamp"].value[0] - history["_runtime"].value[0])
    if not created:
        return 0.0
    moment = datetime.fromisoformat(created)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
