"""What became of each run of a sweep, kept in its folder so that nothing but the line being written can be lost.

`state.jsonl` is append-only: {time, run_id, event: assigned | started | ended, ...}. `agent.lock` is held while an
agent serves; each run inherits the lock on `<run_id>.lock`, so the lock says whether the run lives, also when its
agent was killed and the process id has since gone to somebody else.
"""

import contextlib
import fcntl
import json
import os
import secrets
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from console import EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_TERMINATED, UserError, write_atomic
from gacha.definition import Sweep, short_id

STATUSES = ("finished", "diverged", "failed", "interrupted", "running", "waiting")
KILLED_PATIENCE = 10  # seconds that the system gets to bury a process after SIGKILL


@dataclass
class Pull:
    """One run of the sweep, as far as the agent knows it."""

    index: int
    """Place in the grid, from 0."""
    run_id: str
    """W&B run id, the same on every start."""
    params: dict[str, Any]
    """Parameters of this point, nested as in the definition."""
    folder: Path
    """wandb/sweep-<id>, where state and logs are."""
    status: str = "waiting"
    """One of STATUSES."""
    returncode: int | None = None
    """Of the last attempt; negative after a signal."""
    seconds: float = 0.0
    """Over all attempts that an agent saw end."""
    pid: int | None = None
    """Process and process group of the attempt that runs, or ran when its agent was killed."""
    began: float = 0.0
    """time.monotonic() at the start of that attempt."""
    log_from: int = 0
    """Where its output starts in the log, which older attempts share."""

    @property
    def log(self) -> Path:
        return self.folder / f"{self.run_id}.log"

    @property
    def config(self) -> Path:
        """The parameters as W&B's own agent writes them, for `wandb.init`."""
        return self.folder / f"config-{self.run_id}.yaml"

    @property
    def elapsed(self) -> float:
        """Seconds over all attempts, the running one included."""
        return self.seconds + (time.monotonic() - self.began if self.status == "running" else 0.0)


def replay(sweep: Sweep, folder: Path) -> list[Pull]:
    """All runs of the sweep in serving order, each with what `folder`/state.jsonl remembers of it."""
    salt = sweep_salt(folder)
    ids = [short_id(f"{sweep.sweep_id}/{salt}/{index}") for index in range(len(sweep.points))]
    pulls = [
        Pull(index, run_id, params, folder)
        for index, (run_id, params) in enumerate(zip(ids, sweep.points, strict=True))
    ]
    known = {pull.run_id: pull for pull in pulls}
    path = folder / "state.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            pull = known.get(event["run_id"])
            if pull is None:
                continue  # served under a larger run_cap
            if event["event"] == "started":
                # Stands if no end follows: the agent was killed, the run perhaps not.
                pull.status, pull.pid = "interrupted", event["pid"]
            elif event["event"] == "ended":
                pull.status, pull.returncode, pull.pid = event["status"], event["returncode"], None
                pull.seconds += event["seconds"]
        except (ValueError, KeyError, TypeError):
            if line.endswith(b"}"):  # or else it was cut short by a power failure: that event is lost, no more
                raise UserError(f"{path}:{number}: damaged; move {folder} away to start afresh") from None
    return pulls


def sweep_salt(folder: Path) -> str:
    """Drawn once per sweep folder: run ids are the same on every start here, and other people's in another folder.

    Without it, two people who serve the same definition and sync to one project would overwrite each other's runs.
    """
    path = folder / "salt"
    if not path.is_file() and folder.is_dir():
        write_atomic(path, secrets.token_hex(8).encode())
    return path.read_text() if path.is_file() else ""


def remember(pull: Pull, event: str, **facts: Any) -> None:
    """Append an event of `pull` to the state; on disk before this returns."""
    row = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "run_id": pull.run_id, "event": event, **facts}
    with (pull.folder / "state.jsonl").open("a+b") as file:
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def settle(pull: Pull, code: int, stopped: bool) -> None:
    """Record the end of the running attempt of `pull` with exit code `code`; `stopped`: the agent asked for it."""
    seconds = time.monotonic() - pull.began
    if code in (0, EXIT_DIVERGED):
        pull.status = "diverged" if code else "finished"
    elif code < 0 or stopped or code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        pull.status = "interrupted"
    else:
        pull.status = "failed"
    pull.returncode, pull.pid = code, None
    pull.seconds += seconds
    remember(pull, "ended", status=pull.status, returncode=code, seconds=round(seconds, 3))


# ---- locks


def locked(file: int) -> bool:
    """Whether this process now holds the lock on the open `file`."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def only_agent(folder: Path) -> Iterator[None]:
    """Hold the sweep: raises UserError if another agent serves it. A killed agent's hold ends with it."""
    with (folder / "agent.lock").open("a+") as file:
        if not locked(file.fileno()):
            file.seek(0)
            raise UserError(
                f"{folder}: another agent (process {file.read().strip()}) serves this sweep; let it or end it"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def hold(pull: Pull, patience: float) -> int:
    """The lock on `pull` as an open file for its next attempt to inherit, after ending an attempt that still runs.

    Such an orphan, left by a killed agent, gets SIGTERM, `patience` seconds to save, then SIGKILL.
    """
    file = os.open(pull.folder / f"{pull.run_id}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    for signum, seconds in ((None, 0.0), (signal.SIGTERM, patience), (signal.SIGKILL, KILLED_PATIENCE)):
        if signum is not None:
            send(pull.pid, signum)
        until = time.monotonic() + seconds
        while not (mine := locked(file)) and time.monotonic() < until:
            time.sleep(0.05)
        if mine:
            return file
    os.close(file)
    raise UserError(f"{pull.run_id}: a run of a killed agent still holds {pull.log.with_suffix('.lock')}; end it first")


def send(group: int | None, signum: int) -> None:
    """Signal a whole process group: a launcher and its workers alike. Gone already, or never there, is fine."""
    if not group:
        return  # to killpg, 0 is ourselves
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)
