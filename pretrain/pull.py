"""One pull: its folder, its W&B run, its guard and its clock, from the first look at the disk to result.json.

A pull lives in OUT/[SWEEP/]NAME. Several may be trained by one process; each opens, judges, records and closes itself.
"""

import fcntl
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

import console
import tracking
from pretrain import checkpoint
from pretrain.ranks import ALONE, Ranks
from pretrain.stability import Guard, Verdict

EXIT_CODE = {"ok": 0, "spiked": 0, "diverged": console.EXIT_DIVERGED}  # of the states that are final
LOG_SECONDS = 1.0  # between lines in the log file


@dataclass
class Pull:
    """`config` is what W&B records of it; `step` counts its updates, `seconds` the device time that it has paid for."""

    name: str
    recipe: str
    config: dict[str, Any]
    folder: Path
    batch_tokens: int
    guard: Guard
    run_id: str | None = None
    sweep_params: Path | None = None
    log_copy: Path | None = None
    """file that gets the lines of train.log as well (--each)"""
    told: Path | None = None
    """file that a line is added to when the pull ends (--each)"""
    team: Ranks = ALONE
    """the processes that train it, of which the first alone writes"""

    result: dict[str, Any] | None = None  # of a pull that has ended
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    step: int = 0
    start_step: int = 0
    seconds: float = 0.0
    seconds_before: float = 0.0
    saved_step: int = -1
    verdict: Verdict | None = None
    diverged_at: int = -1
    loss: float = math.nan
    val: dict[str, float] | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    next_log: float = 0.0
    lock: TextIO | None = None

    def claim(self) -> None:
        """Make the folder and take its lock. Raises UserError."""
        if not self.team.is_first:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            out = self.config["out"]
            raise console.UserError(f"--out {out}: no folder can be made there ({error.strerror})") from None
        self.lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = f"{self.folder} is being trained by another process: wait for it, or change --out"
            raise console.UserError(busy) from None

    def release(self) -> None:
        """Let another process have the folder."""
        if self.lock:
            self.lock.close()

    def look(self) -> None:
        """`result` is set if the pull has ended before."""
        if (self.folder / "result.json").is_file():
            self.result = json.loads((self.folder / "result.json").read_bytes())

    def open(self, stage: str, tags: list[str], lineage: dict[str, Any], hardware: str | None, alone: bool) -> None:
        """Start the W&B run, or go on with that of the checkpoint; `alone`: no other pull is in this process."""
        self.tracker = tracking.start(
            stage,
            self.config,
            name=self.name,
            recipe=self.recipe,
            tags=tags,
            x_axis="tokens",
            run_id=self.run_id,
            sweep_params=self.sweep_params,
            alone=alone,
            lineage=lineage,
            hardware=hardware,
        )
        self.run_id = self.tracker.id
        self.tracker.summary(self.summary)
        paths = [self.folder / "train.log", self.log_copy] if self.team.is_first else []
        self.logs: list[TextIO] = [path.open("a", encoding="utf-8", buffering=1) for path in paths if path]

    @property
    def tokens(self) -> int:
        return self.step * self.batch_tokens

    def observe(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Show the guard the loss of update `step` (0-based). The words of a verdict, when it is first spoken."""
        self.loss = loss
        return self._take(self.guard.observe(step, loss, grad_norm), step * self.batch_tokens)

    def judge_end(self) -> str | None:
        """The guard's last word on a pull whose budget is spent: a loss that is away then has not returned."""
        return None if self.verdict else self._take(self.guard.at_the_end(self.step), self.tokens)

    def _take(self, verdict: Verdict | None, tokens: int) -> str | None:
        self.verdict = verdict or self.verdict
        if not verdict or self.diverged_at >= 0:
            return None
        self.diverged_at = tokens
        self.tracker.alert("diverged", f"{self.name}: {verdict}")
        self.tracker.summary({"diverged_at_tokens": tokens, "verdict": str(verdict)})
        return str(verdict)

    def write_log(self, line: str, now: bool = True) -> None:
        """A line into train.log; not `now`: only if the last one is a second old."""
        if now or time.monotonic() >= self.next_log:
            for log in self.logs:
                log.write(line + "\n")
            self.next_log = time.monotonic() + LOG_SECONDS

    def state(self, loader: dict[str, Any], bos_id: int, eos_id: int) -> dict[str, Any]:
        """training_state.json of this moment: what the same command needs to go on."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "guard": self.guard.state(),
            "loader": {**loader, "next_step": self.step},
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "ranks": self.team.world,
            "run_id": self.run_id,
            "config": self.config,
            "bos_id": bos_id,
            "eos_id": eos_id,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Take over what `state` says; weights and optimizers are put back by the stage."""
        self.guard, self.step, self.run_id = Guard(**state["guard"]), state["step"], state["run_id"]
        self.seconds = self.seconds_before = state["seconds"]
        self.start_step = self.saved_step = self.step
        if state["ranks"] == self.team.world:
            # Sums are split by thread: another number would change the last bits.
            torch.set_num_threads(state["threads"])

    def close(self, status: str, exit_code: int, flops: float) -> int:
        """End the W&B run and write down what became of the pull; `flops` are of one of its tokens. The exit code."""
        exit_code = EXIT_CODE.get(status, exit_code)
        costs = {
            "cost/flops": flops * self.tokens,
            "cost/device_seconds": self.seconds,
            "cost/money": self.seconds / 3600 * self.config["price_per_hour"],
        }
        # val/loss is left alone: W&B keeps its minimum there.
        bpb = {"val/bpb": self.val["val/bpb"]} if self.val else {}
        self.tracker.summary({"status": status, "tokens": self.tokens, **bpb, **costs})
        self.tracker.finish(exit_code)
        for log in self.logs:
            log.close()
        kept = checkpoint.folders(self.folder)
        trained = (self.step - self.start_step) * self.batch_tokens * self.team.world  # seconds are of every device
        self.result = {
            "name": self.name,
            "status": status,
            "val/bpb": self.val["val/bpb"] if self.val and math.isfinite(self.val["val/bpb"]) else None,
            **self.summary,
            "tokens": self.tokens,
            "device_seconds": round(self.seconds, 1),
            "tokens_per_second": round(trained / max(1e-9, self.seconds - self.seconds_before)),
            "checkpoint": str(kept[-1]) if kept else None,
            "run_id": self.run_id,
        }
        if status in EXIT_CODE and self.team.is_first:
            data = json.dumps(self.result, ensure_ascii=False).encode()
            console.write_atomic(self.folder / "result.json", data)
        return exit_code

    def report_end(self, exit_code: int) -> None:
        """Tell whoever asked for several pulls that this one has ended."""
        if self.told and self.result and self.team.is_first:
            line = {name: self.result[name] for name in ("run_id", "name", "status")} | {"exit_code": exit_code}
            with self.told.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def home(out: str, name: str) -> Path:
    """Where the pull `name` lives: in a sweep, in that sweep's own folder."""
    return Path(out) / os.environ.get("WANDB_SWEEP_ID", "") / name
