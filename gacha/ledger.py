"""What became of each run of a sweep, kept in its folder so that nothing but the line being written can be lost.

`state.jsonl` is append-only, one line an event: {time, run_id, event, agent, ...}. Every agent reads what is new,
decides and appends in its turn (locks.py), so that all see the same order of events and no two take the same run.

    proposed   index, params: the search has named the next point (sweeps whose points are not listed in advance)
    assigned   an agent has taken the run; it is that agent's until it ends or the agent dies
    started    pid, machine, argv, slot: written by the run's own process, just before it becomes the program
    stopping   early termination has named the run: however it ends, it is not resumed
    ended      status, returncode, seconds, again: whether it is to be run again at once
    requeued   an agent that starts takes up what was interrupted, and with --retry_failed what had failed
"""

import json
import os
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from console import EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_TERMINATED, UserError, write_atomic
from gacha import locks
from gacha.definition import Sweep, short_id

STATUSES = ("finished", "diverged", "stopped", "failed", "interrupted", "running", "waiting")
OLDER = "an older version"  # whose journals name no agent
IDLE_ATTEMPTS = 5  # preempted attempts in a row without a new step, after which a run waits for the next agent


@dataclass
class Pull:
    """One run of the sweep, as far as the agent knows it."""

    index: int
    """Place in the sweep, from 0."""
    run_id: str
    """W&B run id, the same on every start."""
    params: dict[str, Any]
    """Parameters of this point, nested as in the definition."""
    folder: Path
    """wandb/sweep-<id>, where state and logs are."""
    status: str = "waiting"
    """One of STATUSES."""
    ready: bool = True
    """Whether an agent may take it."""
    agent: str = ""
    """Name of the agent that has it in hand."""
    machine: str = ""
    """Where the last attempt ran (locks.machine)."""
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
    stopping: bool = False
    """Named by early termination."""
    preempted: int = 0
    """How often it was; such runs are served behind what waits."""
    idle: int = 0
    """Preempted attempts in a row that logged no new step."""
    step: int = -1
    """The last step logged by a preempted attempt."""

    @property
    def log(self) -> Path:
        return self.folder / f"{self.run_id}.log"

    @property
    def lock(self) -> Path:
        """Held by the run's process."""
        return self.folder / f"{self.run_id}.lock"

    @property
    def config(self) -> Path:
        """The parameters as W&B's own agent writes them, for `wandb.init`."""
        return self.folder / f"config-{self.run_id}.yaml"

    @property
    def elapsed(self) -> float:
        """Seconds over all attempts, the running one included."""
        return self.seconds + (time.monotonic() - self.began if self.status == "running" else 0.0)

    def apply(self, event: dict[str, Any]) -> None:
        """Take in one event of the journal."""
        kind = event["event"]
        if kind == "assigned":
            self.agent, self.ready = event.get("agent") or OLDER, False
        elif kind == "started":
            self.status, self.ready, self.pid, self.stopping = "running", False, event["pid"], False
            self.agent, self.machine = event.get("agent") or OLDER, event.get("machine", "")
            ago = datetime.now(UTC) - datetime.fromisoformat(event["time"])
            self.began = time.monotonic() - max(0.0, ago.total_seconds())
        elif kind == "stopping":
            self.stopping = True
        elif kind == "ended":
            self.status, self.returncode, self.pid, self.agent = event["status"], event["returncode"], None, ""
            self.seconds += event["seconds"]
            self.ready = event.get("again", False)
            if event.get("preempted"):
                step = event.get("step")
                self.idle = 0 if step is not None and step > self.step else self.idle + 1
                self.step, self.preempted = max(self.step, -1 if step is None else step), self.preempted + 1
        elif kind == "requeued":
            self.status, self.ready, self.idle = "interrupted", True, 0


class Ledger:
    """All runs of a sweep in serving order, and the journal that they are known from."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        self.sweep, self.folder, self.path = sweep, folder, folder / "state.jsonl"
        self.agent = ""
        """Name of the agent that writes."""
        self.offset = self.lines = 0
        self.pulls: list[Pull] = []
        self.known: dict[str, Pull] = {}
        self.salt = sweep_salt(folder)
        for params in sweep.points:
            self.add(params)
        self.read()

    def add(self, params: dict[str, Any]) -> Pull:
        """The next pull of the sweep."""
        index = len(self.pulls)
        pull = Pull(index, short_id(f"{self.sweep.sweep_id}/{self.salt}/{index}"), params, self.folder)
        self.pulls.append(pull)
        self.known[pull.run_id] = pull
        return pull

    def propose(self, params: dict[str, Any]) -> Pull:
        """The next pull of a sweep that is not listed, remembered before it starts; in one's turn, with all read."""
        index = len(self.pulls)
        run_id = short_id(f"{self.sweep.sweep_id}/{self.salt}/{index}")
        self.write(Pull(index, run_id, params, self.folder), "proposed", index=index, params=params)
        return self.pulls[index]

    def read(self) -> None:
        """Take in what was appended since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            lines = [line for line in file if line.endswith(b"\n")]
        for line in lines:
            self.lines += 1
            self.offset += len(line)
            try:
                self.apply(json.loads(line))
            except json.JSONDecodeError as error:
                # Cut short by a power failure: that event is lost, no more.
                if line.rstrip().endswith(b"}") and error.pos < len(line.rstrip()):
                    raise self.damaged() from None
            except (ValueError, KeyError, TypeError):
                raise self.damaged() from None

    def damaged(self) -> UserError:
        return UserError(f"{self.path}:{self.lines}: damaged; move {self.folder} away to start afresh")

    def apply(self, event: dict[str, Any]) -> None:
        run_id, params = event["run_id"], event.get("params")
        if event["event"] == "proposed" and not self.sweep.listed:
            pull = self.add(event["params"])
            if pull.run_id != run_id or event["index"] != pull.index:
                raise ValueError
            return
        if run_id not in self.known:
            return  # served under a larger run_cap
        if params is not None and json.dumps(params, sort_keys=True) != json.dumps(
            self.known[run_id].params, sort_keys=True
        ):
            raise UserError(
                f"{self.path}:{self.lines}: run {run_id} had other parameters: this folder belongs to another "
                "definition; serve that one, or give this one a --sweep_id of its own"
            )
        self.known[run_id].apply(event)

    def write(self, pull: Pull, event: str, **facts: Any) -> None:
        """Append an event of `pull`; on disk before this returns. To be called in one's turn, with all read."""
        row = self.row(pull, event, **facts)
        with self.path.open("a+b") as file:
            torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * torn + row + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.read()

    def row(self, pull: Pull, event: str, **facts: Any) -> bytes:
        """A line of the journal, without its end."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        told = {"time": now, "run_id": pull.run_id, "event": event, "agent": self.agent, **facts}
        return json.dumps(told, ensure_ascii=False).encode()

    def look(self, cards: dict[str, locks.Card], machine: str) -> None:
        """See, in one's turn, which runs dead agents have left; `cards` are the agents that live."""
        for pull in self.pulls:
            if not pull.agent or pull.agent in cards:
                continue
            if locks.held(pull.lock) and pull.machine not in ("", machine):
                pull.ready, pull.status = False, "running"  # its process lives on another host, and may come to its end
            elif pull.stopping and not locks.held(pull.lock):
                self.write(pull, "ended", status="stopped", returncode=None, seconds=0.0)
            else:
                pull.ready = True
                pull.status = "interrupted" if pull.status == "running" else pull.status

    def settle(self, pull: Pull, code: int, leaving: bool, preempting: bool = False, step: int | None = None) -> None:
        """Record, in one's turn, the end of the running attempt of `pull` with exit code `code`.

        `leaving`: the agent is being stopped and has ended it: another may take it up at once. `preempting`: the run
        has told W&B that it was preempted; `step` is the last that it logged.
        """
        seconds = round(time.monotonic() - pull.began, 3)
        facts: dict[str, Any] = {}
        if code in (0, EXIT_DIVERGED):
            status = "diverged" if code else "finished"
        elif pull.stopping:
            status = "stopped"
        elif leaving:
            status, facts = "interrupted", {"again": True}
        elif preempting:
            idle = 0 if step is not None and step > pull.step else pull.idle + 1
            status, facts = "interrupted", {"again": idle < IDLE_ATTEMPTS, "preempted": True, "step": step}
        else:
            status = "interrupted" if code < 0 or code in (EXIT_INTERRUPTED, EXIT_TERMINATED) else "failed"
        self.write(pull, "ended", status=status, returncode=code, seconds=seconds, **facts)


def sweep_salt(folder: Path) -> str:
    """Drawn once per sweep folder: run ids are the same on every start here, and other people's in another folder.

    Without it, two people who serve the same definition and sync to one project would overwrite each other's runs. To
    be called in one's turn where the folder exists.
    """
    path = folder / "salt"
    if not path.is_file() and folder.is_dir():
        write_atomic(path, secrets.token_hex(8).encode())
    return path.read_text() if path.is_file() else ""
