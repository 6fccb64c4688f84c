"""One pull: its folder, its W&B run, its guard and its clock, from the first look at the disk to result.json.

A pull lives in OUT/[SWEEP/]NAME. Several may be trained by one process; each opens, judges, records and closes itself.
"""

import fcntl
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

import console
import tracking
from data.loader import TokenStream
from pretrain import checkpoint, faults, optim
from pretrain.ranks import ALONE, Ranks
from pretrain.responses import COLUMNS, GO_BACK, Recovery
from pretrain.stability import Event, Guard, Verdict
from pretrain.trace import Trace

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
    planted: list[faults.Fault] = field(default_factory=list)

    result: dict[str, Any] | None = None  # of a pull that has ended
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    step: int = 0
    start_step: int = 0
    seconds: float = 0.0
    seconds_before: float = 0.0
    computed_before: int = 0  # tokens, rewound ones too, when this process took it over
    saved_step: int = -1
    heard: int = 0  # updates that the guard has heard of
    recovery: Recovery = field(default_factory=Recovery)
    trace: Trace = field(default_factory=Trace)
    went_back: bool = False
    last_event: Event | None = None
    opened: float = 0.0  # Unix seconds
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
        # W&B names an offline run's folder by second and id: one that went back at once would meet its own.
        time.sleep(max(0.0, math.floor(self.opened) + 1 - time.time()))
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
        self.run_id, self.opened = self.tracker.id, time.time()
        self.tracker.summary({**self.summary, **self._told()})
        paths = [self.folder / "train.log", self.log_copy] if self.team.is_first else []
        self.logs: list[TextIO] = [path.open("a", encoding="utf-8", buffering=1) for path in paths if path]

    @property
    def tokens(self) -> int:
        return self.step * self.batch_tokens

    @property
    def computed(self) -> int:
        """Tokens that were paid for: those trained on, and those that were rewound."""
        return self.tokens + self.recovery.rewound_tokens

    @property
    def may_go_back(self) -> bool:
        """Whether a verdict sends the pull back instead of ending it."""
        if self.verdict and self.verdict.kind == "not_learning":
            return False  # it was no better before
        return self.config["on_divergence"] in GO_BACK and self.recovery.retries < self.config["max_retries"]

    @property
    def keep_before(self) -> int:
        """Step that a checkpoint from before it must be kept for; -1: none."""
        if self.config["on_divergence"] not in GO_BACK:
            return self.guard.keep_before
        # A verdict may name an onset that was no suspect yet while it passed.
        recent = max(0, self.step - self.guard.patience)
        return min(recent, self.guard.keep_before) if self.guard.keep_before >= 0 else recent

    def data_step(self, update: int) -> int:
        """Which batch of its data the pull is trained on in an update."""
        return update + self._shift(update)

    def _shift(self, update: int) -> int:
        restarted = faults.restarted(self.planted, update, max(self.start_step, self.recovery.reached))
        return self.recovery.shift if restarted is None else -restarted

    def lr(self, update: int) -> float:
        """Learning rate of the next update: the schedule's, changed by responses and by planted faults."""
        c = self.config
        shape = {"schedule": c["schedule"], "warmup": c["warmup"], "decay": c["decay"], "final": c["final_lr"]}
        planned = optim.learning_rate(update, self.guard.steps, peak=c["lr"], **shape)
        recovery = self.recovery
        lr = planned * recovery.lr_factor * faults.lr_factor(self.planted, update, recovery.reached)
        if c["on_divergence"] != "skip":
            return lr
        held_before, used = recovery.holds, recovery.hold(lr)
        if recovery.holds and not held_before:
            recovery.record(update, self.tokens, "lr_leap", "hold_lr", {"lr": lr, "used": used})
            self._announce("held the learning rate", f"update {update} at learning rate {used:.4g}, not {lr:.4g}")
        return used

    def observe(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        skipped: bool = False,
        seconds: float = 0.0,
        **signals: float | None,
    ) -> str | None:
        """Show the guard the loss of update `step` (0-based). The words of a verdict, when it is first spoken.

        `skipped`: the update, which took so many device seconds, was not applied. `signals` are what else the guard
        looks at, where it is known.
        """
        self.loss, self.heard = loss, step + 1
        verdict = self.guard.observe(step, loss, grad_norm, **signals)
        if self.config["on_divergence"] == "skip":
            self.recovery.hear(skipped, seconds)
            if verdict and verdict.kind == "nonfinite":
                verdict = None  # for it was skipped
            if skipped:
                verdict = self._tell_skipped(step, loss, grad_norm) or verdict
        for event in self._news():
            self.write_log(f"guard: {event.kind} at step {event.step}, {event.evidence}")
        return self._take(verdict or self._away(step, self.guard.patience), step * self.batch_tokens)

    def _away(self, step: int, patience: int) -> Verdict | None:
        """A verdict on a loss that has been away for so many steps, where the pull may go back.

        The guard waits for one that is falling again; the way back from a checkpoint is shorter.
        """
        guard = self.guard
        if not self.may_go_back or guard.status != "suspect" or guard.lost_count < patience:
            return None
        evidence: dict[str, float | str] = {"loss": self.loss, "best": guard.best, "away": float(guard.lost_count)}
        return Verdict("divergence", step, guard.suspect_since, evidence)

    def _tell_skipped(self, step: int, loss: float, grad_norm: float) -> Verdict | None:
        """Record it. A verdict on a pull that skips on and on: its losses are not finite, or one would be applied."""
        in_a_row = self.recovery.skipped_in_a_row
        seen = {"loss": loss, "grad_norm": grad_norm, "in_a_row": float(in_a_row)}
        evidence: dict[str, float | str] = {k: v if math.isfinite(v) else str(v) for k, v in seen.items()}
        self.recovery.record(step, step * self.batch_tokens, "out_of_bounds", "skip", evidence)
        if in_a_row == 1:
            self._announce("skipped an update", f"update {step}: loss {loss:.4g}, gradient norm {grad_norm:.4g}")
        on_and_on = in_a_row > self.recovery.longest_row(self.guard)
        return Verdict("nonfinite", step, step - in_a_row + 1, evidence) if on_and_on else None

    def _announce(self, title: str, words: str) -> None:
        self.write_log(f"{title}: {words}")
        self.tracker.alert(title, f"{self.name}: {words}")
        self.log_events()

    def _news(self) -> list[Event]:
        """What the guard has come to see since this was last asked."""
        known, events = self.last_event, self.guard.events
        self.last_event = events[-1] if events else None
        return [] if self.last_event is known else events[next((n for n, e in enumerate(events, 1) if e is known), 0) :]

    def log_events(self) -> None:
        """What was done and what the guard saw so far as a W&B table, if there is any."""
        seen = [self.row_of(event) for event in self.guard.events]
        if rows := sorted(self.recovery.events + seen, key=lambda row: row[0]):
            self.tracker.table("stability/events", COLUMNS, rows, step=max(self.heard, self.step))

    def row_of(self, event: Event) -> list[Any]:
        told = json.dumps(event.evidence, ensure_ascii=False)
        tokens = event.step * self.batch_tokens
        return [event.step, tokens, event.kind, "", event.warn_step, event.recovered_step, told]

    def judge_end(self) -> str | None:
        """The guard's last word on a pull whose budget is spent: a loss that is away then has not returned."""
        if self.verdict:
            return None
        return self._take(self.guard.at_the_end(self.step) or self._away(self.step, 0), self.tokens)

    def _take(self, verdict: Verdict | None, tokens: int) -> str | None:
        self.verdict = verdict or self.verdict
        if not verdict or self.diverged_at >= 0 or self.may_go_back:
            return None
        self.diverged_at = tokens
        self.tracker.alert("diverged", f"{self.name}: {verdict}")
        self.tracker.summary(self._told())
        return str(verdict)

    def _told(self) -> dict[str, Any]:
        return {"diverged_at_tokens": self.diverged_at, "verdict": str(self.verdict)} if self.diverged_at >= 0 else {}

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
            "verdict": asdict(self.verdict) if self.verdict else None,  # of one that is ignored, and spoken once
            "diverged_at": self.diverged_at,
            "trace": self.trace.state(),
            "recovery": {**self.recovery.state(), "shift": self._shift(self.step - 1)},
            "loader": {**loader, "next_step": self.data_step(self.step)},
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
        self.recovery = Recovery(**state["recovery"])
        self.verdict = Verdict(**state["verdict"]) if state["verdict"] else None
        self.diverged_at = state["diverged_at"]
        self.trace = Trace.restored(state["trace"])
        self.seconds = self.seconds_before = state["seconds"]
        self.start_step = self.saved_step = self.step
        self.computed_before = self.computed
        self._news()
        if state["ranks"] == self.team.world:
            # Sums are split by thread: another number would change the last bits.
            torch.set_num_threads(state["threads"])

    def rejoin(self) -> None:
        """Be as a pull that was killed and that the same command goes on with."""
        self.result, self.verdict, self.val, self.went_back = None, None, None, False
        self.parameters, self.optimizers = {}, []

    def close(self, status: str, exit_code: int, flops: float) -> int:
        """End the W&B run and write down what became of the pull; `flops` are of one of its tokens. The exit code."""
        exit_code = EXIT_CODE.get(status, exit_code)
        costs = {
            "cost/flops": flops * self.computed,
            "cost/device_seconds": self.seconds,
            "cost/money": self.seconds / 3600 * self.config["price_per_hour"],
            "cost/lost_tokens": self.recovery.rewound_tokens + self.recovery.skipped * self.batch_tokens,
            "cost/lost_device_seconds": self.recovery.lost_seconds,
        }
        responses = {"stability/retries": self.recovery.retries, "stability/skipped_updates": self.recovery.skipped}
        # val/loss is left alone: W&B keeps its minimum there.
        bpb = {"val/bpb": self.val["val/bpb"]} if self.val else {}
        self.tracker.summary({"status": status, "tokens": self.tokens, **bpb, **costs, **responses})
        if not self.went_back:
            self.log_events()
        self.tracker.finish(exit_code)
        for log in self.logs:
            log.close()
        kept = checkpoint.folders(self.folder)
        trained = (self.computed - self.computed_before) * self.team.world  # seconds are of every device
        self.result = {
            "name": self.name,
            "status": status,
            "val/bpb": self.val["val/bpb"] if self.val and math.isfinite(self.val["val/bpb"]) else None,
            **self.summary,
            **{name: number for name, number in responses.items() if number},
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


def batch_of(
    pulls: Sequence[Pull], update: int, stream: TokenStream, n_sequences: int, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of an update, (pulls, this rank's share of n_sequences, seq_len): what each has come to."""
    places = [(pull.config["data_seed"], pull.data_step(update)) for pull in pulls]
    share, found = pulls[0].team.share(n_sequences), {}
    for seed, data_step in set(places):
        bad = faults.bad_batch(pulls[0].planted, data_step, n_sequences, stream, vocab_size)
        if bad:
            found[seed, data_step] = bad[0][share], bad[1][share]
        else:
            found[seed, data_step] = stream.windows(stream.batch_indices(data_step, n_sequences, seed)[share])
    ids, targets = (torch.stack(part) for part in zip(*(found[place] for place in places), strict=True))
    return ids, targets
