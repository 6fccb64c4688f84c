"""Runs of a sweep that share a process: pulls of our own `train.py pretrain` that differ in FIELDS alone.

On one thread, eight pulls of 1M parameters take two thirds of the CPU time that they take one by one. The process gets
the flags that its runs share and `--each FILE`, one line a run; it appends a line to FILE.ended when a run ends. All
else about a run (id, parameter file, lock, log, events) is as if it had a process of its own.
"""

import heapq
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from console import EXIT_DIVERGED, write_atomic
from gacha.board import last_error
from gacha.definition import Sweep
from gacha.ledger import Pull
from gacha.locks import Hold

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
FIELDS = ("seed", "init_seed", "data_seed", "sample_seed", "lr", "weight_decay")  # pretrain's grid.OF_A_PULL
COMMAND = ("${interpreter}", "${program}", "pretrain")
MOST_ON_CPU, MOST_ON_GPU = 8, 16  # beyond that the gain is flat, and more is lost with one process
FIXED_COST = 0.6  # seconds of a step that do not grow with its pulls, in units of those that one pull adds (measured)


@dataclass
class Pack:
    """The runs of one process: one, unless several may share it."""

    pulls: list[Pull]
    slot: int = 0
    """Which of its agent's slots it occupies."""
    holds: list[Hold] = field(default_factory=list)
    """The locks of its runs, until the process has them."""
    argv: list[str] = field(default_factory=list)
    child: subprocess.Popen[bytes] | None = None
    log_from: int = 0
    """Where its output starts in `log`."""
    told: int = 0
    """Bytes of FILE.ended that have been read."""

    @property
    def alone(self) -> bool:
        return len(self.pulls) == 1

    @property
    def log(self) -> Path:
        """What the process says: a lone run's log, or one beside the logs in which each run of several has its own."""
        first = self.pulls[0]
        return first.log if self.alone else first.folder / f"pack-{first.run_id}.log"

    @property
    def each(self) -> Path:
        return self.log.with_suffix(".jsonl")

    @property
    def ended(self) -> Path:
        return Path(f"{self.each}.ended")

    @property
    def open(self) -> list[Pull]:
        """Runs that are not known to have ended."""
        return [pull for pull in self.pulls if pull.status == "running"]

    def poll(self) -> int | None:
        """Exit code of the process; None while it lives."""
        return self.child.poll() if self.child else None

    @property
    def pid(self) -> int | None:
        """Process and process group, while it lives."""
        return self.child.pid if self.child and self.child.returncode is None else None

    @property
    def varying(self) -> list[str]:
        """Which of FIELDS differ between the runs."""
        first, *others = [pull.params for pull in self.pulls]
        return [name for name in FIELDS if any(point.get(name) != first.get(name) for point in others)]

    @property
    def shared(self) -> dict[str, Any]:
        """The parameters that its runs have in common: the flags of the process."""
        return {name: value for name, value in self.pulls[0].params.items() if name not in self.varying}

    def write_each(self, path: Path) -> None:
        """FILE, as `path`: of each run what is its own, its W&B id and parameters, and where its log lines belong."""
        varying = self.varying
        rows = [
            {name: pull.params[name] for name in varying}
            | {"run_id": pull.run_id, "sweep_params": str(pull.config), "log": str(pull.log)}
            for pull in self.pulls
        ]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def told_ends(self) -> list[tuple[Pull, int]]:
        """Runs that FILE.ended newly tells of, with their exit codes."""
        if self.alone or not self.ended.exists():
            return []
        with self.ended.open("rb") as file:
            file.seek(self.told)
            lines = [line for line in file if line.endswith(b"\n")]
        self.told += sum(map(len, lines))
        codes = {row["run_id"]: row["exit_code"] for row in map(json.loads, lines)}
        return [(pull, codes[pull.run_id]) for pull in self.open if pull.run_id in codes]

    def ends_with(self, code: int) -> list[tuple[Pull, int]]:
        """Runs that end with the process, whose exit code is `code`, and the exit code of each."""
        if self.alone:
            return [(pull, code) for pull in self.open]
        if code in (0, EXIT_DIVERGED):
            code = 1  # for a run whose end it has not told of
        for pull in self.open:
            with pull.log.open("a", encoding="utf-8") as log:
                log.write(f"its process ended with exit code {code}, see {self.log}:\n{self.last_error()}\n")
        return [(pull, code) for pull in self.open]

    def release(self) -> None:
        """Let go of the locks here; a process that was started with them keeps them."""
        for hold in self.holds:
            hold.close()
        self.holds = []

    def last_error(self) -> str:
        return last_error(self.log, self.log_from)

    def halves(self) -> list["Pack"]:
        """Those of its runs that have not ended, to be served anew as two packs, or alone if it is one."""
        left = self.open
        for pull in left:
            pull.status, pull.pid = "waiting", None
        cut = len(left) // 2
        return [Pack(half) for half in (left[:cut], left[cut:]) if half]


def ours(sweep: Sweep) -> bool:
    """Whether the sweep's program is this repository's train.py, whose flags are known here."""
    return "program" in sweep.definition and Path(sweep.definition["program"]).resolve() == TRAIN


def possible(sweep: Sweep) -> bool:
    """Whether runs of the sweep can share a process: those of our own `pretrain`, started without a launcher."""
    words = [str(word) for word in sweep.definition.get("command") or []]
    starts = any(tuple(words[place : place + 3]) == COMMAND for place in range(len(words)))
    return ours(sweep) and starts and "${args}" in words and not {"pulls", "each"} & set(sweep.definition["parameters"])


def plan(pulls: list[Pull], jobs: int, most: int, running: Sequence[int] = ()) -> list[Pack]:
    """`pulls` in packs of `most` at most, in the order of their first runs; preempted ones are behind.

    The size is the one with which `jobs` slots are done first, if a process of n runs takes FIXED_COST + n and those
    that run (`running`: how many runs each has) have just begun; of equal ones the smaller, since its results come
    sooner. What does not fit into memory is found out by `halves`.
    """
    groups: dict[str, list[Pull]] = {}
    for pull in sorted(pulls, key=place):
        numbers = {name: value for name, value in pull.params.items() if name in FIELDS and type(value) in (int, float)}
        kept = {name: value for name, value in pull.params.items() if name not in numbers}
        # By status too: interrupted runs go on from another step than new ones begin at.
        groups.setdefault(json.dumps([pull.status, kept, sorted(numbers)], sort_keys=True), []).append(pull)

    def packs(size: int) -> list[Pack]:
        cut = [
            Pack(group[len(group) * part // parts : len(group) * (part + 1) // parts])
            for group in groups.values()
            for parts in [-(-len(group) // size)]
            for part in range(parts)
        ]
        return sorted(cut, key=lambda pack: place(pack.pulls[0]))

    def done(size: int) -> float:
        slots = [FIXED_COST + n for n in running] + [0.0] * (jobs - len(running))
        heapq.heapify(slots)
        for pack in packs(size):
            heapq.heapreplace(slots, slots[0] + FIXED_COST + len(pack.pulls))
        return max(slots)

    return packs(min(range(1, most + 1), key=done)) if pulls else []


def place(pull: Pull) -> tuple[int, int]:
    """Where a run stands in the queue: preempted ones behind those that wait, as W&B's server requeues them."""
    return pull.preempted, pull.index
