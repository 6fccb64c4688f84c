"""`python -m gacha serve SRC`: offline W&B runs in trackio's dashboard, on 127.0.0.1, without any network.

W&B's files stay the record; what trackio shows is copied from them into SQLite files in SRC/trackio (or --out), which
may be deleted at any time. A run's rows are added as they come; a run whose past has changed, as after a resume from an
older checkpoint, is copied anew.
"""

import contextlib
import io
import json
import math
import os
import sys
import time
import urllib.parse
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import console
import tracking
from console import UserError
from gacha import runs
from gacha.fragments import Fragment
from gacha.runs import Run

POLL_SECONDS = 2.0
RESERVED = ("project", "run", "timestamp", "step", "time", "metrics")  # names that trackio keeps for itself


@dataclass(frozen=True)
class Config:
    """Show offline W&B runs in a local dashboard (trackio); Ctrl-C ends it."""

    source: Annotated[str, tyro.conf.Positional] = "wandb"
    """Folder with offline-run-*/run-*.wandb somewhere below it."""
    port: int = 0
    """Port on 127.0.0.1; 0 takes the first free one from 7860 on."""
    project: str = ""
    """Name that all runs are shown under; by default each run's own W&B project."""
    out: str = ""
    """Folder for trackio's files; by default SRC/trackio."""
    live: bool = False
    """Go on reading, so that running pulls grow in the dashboard."""


def main(argv: Sequence[str]) -> int:
    """Copy, serve until Ctrl-C. Raises UserError without trackio or runs, or when the port is taken."""
    config = console.parse(Config, argv, "python -m gacha serve")
    if not 0 <= config.port < 65536:
        raise UserError(f"--port {config.port}: must be 0 to 65535")
    source = Path(config.source)
    found = Followed(source)
    pulls = found.changed()
    if not pulls:
        raise UserError(f"{source}: no W&B runs (offline-run-*/run-*.wandb) in it; give the folder they are in")
    folder = Path(config.out) if config.out else (source if source.is_dir() else source.parent) / "trackio"
    trackio = load(folder)
    names = [copy(run, config.project) for run in pulls]
    shown = urllib.parse.quote(max(names, key=names.count))
    app, url = serve(trackio, config.port)
    try:
        print(f"{len(names)} runs in {', '.join(sorted(set(names)))}: {url}?project={shown}")
        print("Ctrl-C ends it" + ("" if config.live else "; --live follows running pulls"), flush=True)
        while True:
            time.sleep(POLL_SECONDS)
            for run in found.changed() if config.live else ():
                copy(run, config.project)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        app.close()
    return 0


def load(folder: Path) -> Any:
    """The trackio package, told to keep its files in `folder` and to ask nobody."""
    os.environ["TRACKIO_DIR"] = str(folder.resolve())  # read when it is imported
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import trackio
    except ImportError:
        raise UserError("the dashboard needs trackio: pip install -e '.[serve]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    return trackio


def serve(trackio: Any, port: int) -> tuple[Any, str]:
    """Start the dashboard; what stops it, and its address."""
    with contextlib.redirect_stdout(io.StringIO()):  # it would print a link that lets whoever has it delete runs
        try:
            app, url, *_ = trackio.show(
                host="127.0.0.1", server_port=port or None, open_browser=False, block_thread=False, share=False
            )
        except OSError:
            free = "7860 to 7959 are all taken" if not port else f"{port} is taken"
            raise UserError(f"--port {port}: {free} on 127.0.0.1; give another one") from None
    return app, url


# ---- what has changed


class Followed:
    """The runs below a folder, read again where their files have grown."""

    def __init__(self, source: Path) -> None:
        if not source.exists():
            raise UserError(f"{source}: no such folder; give the folder that holds offline-run-*/run-*.wandb")
        self.source = source
        self.sizes: dict[Path, tuple[int, int]] = {}
        self.parts: dict[tuple[str, str], dict[Path, Fragment]] = {}
        self.states: dict[tuple[str, str], str] = {}

    def changed(self) -> list[Run]:
        """Runs that are new, have grown, ended or fallen silent since the last call; those of reports left out."""
        sizes = {}
        for path in runs.log_files(self.source):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                sizes[path] = (stat.st_size, stat.st_mtime_ns)
        touched = [path for path, size in sizes.items() if self.sizes.get(path) != size]
        self.sizes = sizes
        for path, part in zip(touched, runs.read_fragments(touched), strict=True):
            # What cannot be read now may be tomorrow: a file is empty for its first second.
            if isinstance(part, Fragment) and part.head.run_id and part.head.job_type != "report":
                self.parts.setdefault((part.head.project, part.head.run_id), {})[path] = part
        found = []
        for key, mine in self.parts.items():
            grown = not mine.keys().isdisjoint(touched)
            there = [part for path, part in mine.items() if path in sizes]  # wandb clean takes files away
            if there and (grown or self.states[key] == "running"):
                run = runs.merge(there, time.time())
                if grown or run.state != "running":
                    found.append(run)
                self.states[key] = run.state
        return sorted(found, key=lambda run: (run.started, run.id))


# ---- copying


def copy(run: Run, project: str) -> str:
    """Bring trackio's copy of a run up to date; the project that it is in."""
    from trackio.sqlite_storage import SQLiteStorage

    project = project or run.project or tracking.PROJECT
    name = f"{run.name} ({run.id})"  # pulls of one recipe and seed share a name
    rows, steps, times = table(run)
    if not rows:
        return project
    facts = {**run.config, "status": run.status, "_Group": run.group or None, "_Created": iso(run.started)}
    facts |= {"job_type": run.job_type, "tags": ", ".join(run.tags), "sweep": run.sweep_id or None}
    facts |= {f"final {key}": value for key, value in run.summary.items() if is_number(value) and key[0] != "_"}
    facts = {key: value for key, value in facts.items() if value is not None}
    marks = [zlib.crc32(json.dumps(row).encode(), step) for row, step in zip(rows, steps, strict=True)]
    try:
        SQLiteStorage.validate_project_name(project)
        told = json.loads(SQLiteStorage.get_project_metadata(project, f"copied {run.id}") or "{}")
        done = told.get("rows", 0)
        if digest(marks[:done]) != told.get("digest", digest([])) or done > len(rows):
            SQLiteStorage.delete_run(project, name, run_id=run.id)
            done = 0
        if done == len(rows) and told.get("facts") == plain(facts):
            return project
        done = min(done, len(rows) - 1)  # the facts travel with a row; a row that is there already is not added again
        SQLiteStorage.bulk_log(
            project,
            name,
            rows[done:],
            steps=steps[done:],
            timestamps=times[done:],
            config=facts,
            log_ids=[f"{run.id}/{step}" for step in steps[done:]],
            run_id=run.id,
        )
        told = {"rows": len(rows), "digest": digest(marks), "facts": plain(facts)}
        SQLiteStorage.set_project_metadata(project, f"copied {run.id}", json.dumps(told))
    except ValueError as error:
        raise UserError(f"project {project}: {error}; give another one with --project") from None
    return project


def digest(marks: list[int]) -> int:
    """One number for a run's rows so far."""
    return zlib.crc32(np.array(marks, dtype=np.uint32).tobytes())


def plain(facts: dict[str, Any]) -> int:
    """One number for what is known of a run beside its rows."""
    return zlib.crc32(json.dumps(facts, sort_keys=True, default=str).encode())


def table(run: Run) -> tuple[list[dict[str, float]], list[int], list[str]]:
    """A run's history by row: values by key, steps, times (ISO 8601)."""
    by_step: dict[int, dict[str, float]] = {}
    for key, (at, _, values) in run.history.items():
        # A step is trackio's own, and ours is the same; of a table W&B logs the size.
        if key != "step" and key.rpartition(".")[0] not in run.tables:
            name = f"__{key}" if key in RESERVED else key
            for step, value in zip(at.tolist(), values.tolist(), strict=True):
                by_step.setdefault(step, {})[name] = value
    steps = sorted(by_step)
    rows = [by_step[step] for step in steps]
    times = [iso(row.pop("_timestamp", run.started)) for row in rows]
    for row in rows:
        row.pop("_runtime", None)
    return rows, steps, times


def iso(seconds: float) -> str:
    """Unix seconds as ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
