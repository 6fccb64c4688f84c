"""Who is alive in a sweep's folder, and whose turn it is: agents of one or several hosts share the folder and no more.

Everything is asked of locks, which the system lets fall with whoever held them: `state.lock` for the few milliseconds
in which an agent reads the journal, decides and writes; `agents/NAME.lock` for as long as an agent lives;
`<run_id>.lock`, inherited by a run's process, for as long as that lives, also when its agent was killed and the process
id has since gone to somebody else.

The locks are flock's. Over NFS, Linux makes byte-range locks of them, which the server keeps for all hosts, and opening
a file anew brings what other hosts have written and closed: the journal is opened anew in every turn. A host that is
cut off loses its locks after its lease (90 s by default). Lustre wants the mount option `flock`; `localflock` is for
one host only.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import random
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from console import UserError

TURN_SECONDS = 60.0  # a turn takes milliseconds, with a Bayesian proposal seconds: beyond this the wait is told
KILLED_PATIENCE = 10  # seconds that the system gets to bury a process after SIGKILL


def locked(file: int) -> bool:
    """Whether this process now holds the lock on the open `file`. Never waits: NFS clients look for one rarely."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise UserError(
                f"the file system of the sweep's folder has no locks ({error.strerror}): set WANDB_DIR to one that has"
            ) from None
        raise
    return True


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Be the only agent that reads and writes the state in `folder`, for the few milliseconds of the block."""
    file = os.open(folder / "state.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        since, told = time.monotonic(), False
        while not locked(file):
            time.sleep(random.uniform(0.001, 0.02))
            if not told and time.monotonic() > since + TURN_SECONDS:
                told = True
                print(f"waiting: another agent has held {folder}/state.lock for {TURN_SECONDS:.0f} s", file=sys.stderr)
        yield
    finally:
        os.close(file)


def machine() -> str:
    """What process ids are unique in: this host since it booted, and in it this container."""
    facts = [platform.node()]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(facts)


@dataclass(frozen=True)
class Card:
    """What an agent tells the others of itself, in the file that it holds locked."""

    name: str
    host: str
    machine: str
    pid: int
    jobs: int
    slots: tuple[int, ...]
    """One number per job, distinct among the agents that share devices (or cores, where there are no devices)."""
    devices: tuple[str, ...]
    """Visible CUDA devices."""
    cores: tuple[int, ...]
    """CPU cores that it may use."""

    def shares(self, other: "Card") -> bool:
        """Whether the two get in each other's way."""
        one, two = (self.devices, other.devices) if self.devices else (self.cores, other.cores)
        return self.machine == other.machine and bool(set(one) & set(two))


def cards(folder: Path) -> dict[str, Card]:
    """The agents that live, by name; to be called in one's turn. Removes the files of dead ones."""
    found = {}
    for path in sorted((folder / "agents").glob("*.lock")):
        file = os.open(path, os.O_RDWR)
        try:
            if locked(file):
                path.unlink()
            else:
                told: dict[str, Any] = json.loads(path.read_text())
                told |= {key: tuple(told[key]) for key in ("slots", "devices", "cores")}
                found[told["name"]] = Card(**told)
        finally:
            os.close(file)
    return found


@contextlib.contextmanager
def alive(folder: Path, jobs: int, devices: list[str], cores: list[int]) -> Iterator[Card]:
    """Be an agent of the sweep in `folder` with `jobs` slots of its own, seen by the others until the block is left."""
    name = f"{platform.node()}-{os.getpid()}-{secrets.token_hex(2)}"
    path = folder / "agents" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with turn(folder):
        others = cards(folder).values()
        card = Card(name, platform.node(), machine(), os.getpid(), jobs, (), tuple(devices), tuple(cores))
        taken = {slot for other in others if card.shares(other) for slot in other.slots}
        free = [slot for slot in range(len(taken) + jobs) if slot not in taken]
        card = Card(**{**asdict(card), "slots": tuple(free[:jobs])})
        # Not inherited by runs: else they would keep the agent alive in the eyes of the others.
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        locked(file)
        os.write(file, json.dumps(asdict(card)).encode())
    try:
        yield card
    finally:
        with turn(folder):
            path.unlink(missing_ok=True)
            os.close(file)


class Hold:
    """The lock on a run for its next attempt to inherit, after the end of an attempt that a killed agent left behind.

    `path` is the run's lock, `group` the process group that held it, of this machine; `patience` the seconds between
    SIGTERM and SIGKILL.
    """

    def __init__(self, path: Path, group: int | None, patience: float) -> None:
        self.path, self.group = path, group
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.mine = False
        now = time.monotonic()
        self.due = [(now, signal.SIGTERM), (now + patience, signal.SIGKILL)]
        self.until = now + patience + KILLED_PATIENCE

    def poll(self) -> bool:
        """Whether the lock is ours now; else signals the orphan when it is time. Raises UserError if nothing helps."""
        self.mine = self.mine or locked(self.file)
        if self.mine:
            return True
        while self.due and time.monotonic() >= self.due[0][0]:
            send(self.group, self.due.pop(0)[1])
        if time.monotonic() > self.until:
            raise UserError(f"{self.path}: still held by a run of a killed agent; end that process first")
        return False

    def close(self) -> None:
        os.close(self.file)


def held(path: Path) -> bool:
    """Whether a process holds the lock `path`; to be called in one's turn, since looking takes it for a moment."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not locked(file)
    finally:
        os.close(file)


def send(group: int | None, signum: int) -> None:
    """Signal a whole process group: a launcher and its workers alike. Gone already, or never there, is fine."""
    if not group:
        return  # to killpg, 0 is ourselves
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)
