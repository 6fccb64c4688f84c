"""What a pull does about divergence by itself (`--on_divergence`): how often it may, what it did, and what that cost.

skip      an update that is not finite, or far out of what the guard has seen, is not applied and its data is
          passed over (OLMo-core's skip-step optimizer; here with the guard's limits). A learning rate that leaps is
          held: it would cost the weights before any loss could show it
rewind    at a verdict the pull goes back to the last checkpoint from before it, and passes over the data from there
          to the verdict (PaLM, Chowdhery et al. 2022, section 5.1)
lower_lr  it goes back likewise and meets the same data again, at a lower learning rate (OPT, Zhang et al. 2022)
"""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pretrain import checkpoint

if TYPE_CHECKING:
    from pretrain.pull import Pull
    from pretrain.stability import Guard

GO_BACK = ("rewind", "lower_lr")
LEAP = 4.0  # times the largest learning rate so far: no warm-up makes such a step
SKIPPED_IN_A_ROW = 2  # of the guard's patience: by then it has spoken about what does not pass
EVENTS_KEPT = 1000
COLUMNS: list[str | int] = ["step", "tokens", "kind", "action", "warn_step", "recovered_step", "evidence"]


@dataclass
class Recovery:
    """What a pull has done about divergence, as its checkpoints hold it."""

    retries: int = 0
    reached: int = 0
    """updates that were made before the pull went back for the last time"""
    shift: int = 0
    """data steps that the data is ahead of the updates"""
    lr_factor: float = 1.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    largest_lr: float = 0.0
    """that was used so far"""
    holds: bool = False
    """the learning rate leaps, and is held at the largest one"""
    rewound_tokens: int = 0
    """trained on and forgotten again"""
    lost_seconds: float = 0.0
    """device time of what was rewound or skipped"""
    events: list[list[Any]] = field(default_factory=list)
    """rows of COLUMNS, newest EVENTS_KEPT"""

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def limits(self, guard: "Guard") -> tuple[float, float]:
        """Largest loss and gradient norm with which the next update is applied if it is finite.

        After so many skipped updates in a row one is applied whatever it is: then the guard's verdict decides.
        """
        return guard.limits() if self.skipped_in_a_row < self.longest_row(guard) else (math.inf, math.inf)

    def hold(self, lr: float) -> float:
        """`lr`, or the largest one so far where it leaps: the loss would show that only when the weights are lost."""
        self.holds = 0 < LEAP * self.largest_lr < lr
        if self.holds:
            return self.largest_lr
        self.largest_lr = max(self.largest_lr, lr)
        return lr

    def longest_row(self, guard: "Guard") -> int:
        """Updates in a row that may be skipped for being out of bounds."""
        return SKIPPED_IN_A_ROW * guard.patience

    def hear(self, skipped: bool, device_seconds: float) -> None:
        """Take note of whether an update was skipped, and of the time that it took."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self.skipped, self.lost_seconds = self.skipped + 1, self.lost_seconds + device_seconds

    def record(
        self, step: int, tokens: int, kind: str, action: str, evidence: dict[str, Any], warn_step: int | None = None
    ) -> None:
        """Add an event."""
        told = json.dumps(evidence, ensure_ascii=False)
        self.events = [*self.events, [step, tokens, kind, action, warn_step, None, told]][-EVENTS_KEPT:]

    def go_back(self, to: dict[str, Any], updates: int, data_steps: int, lowered: float | None) -> None:
        """Return from `updates` updates to the training state `to`.

        `lowered`: to the same data at the learning rate times this; None: to data from `data_steps` on.
        """
        then = Recovery(**to["recovery"])
        ahead = max(then.shift + updates, data_steps) - to["step"]
        self.shift = then.shift if lowered else ahead
        self.lr_factor *= lowered or 1.0
        self.largest_lr = then.largest_lr
        self.skipped_in_a_row = 0
        self.retries, self.reached = self.retries + 1, max(self.reached, updates)


def go_back(pull: "Pull") -> str:
    """Take a pull back to its last checkpoint from before its verdict's onset, and say so; `rejoin` goes on from there.

    The checkpoint is told what has been done so far, and later ones go. Killed at any moment, the same command
    comes to the same verdict again, or goes on from here.
    """
    assert pull.verdict
    mode, made = pull.config["on_divergence"], min(pull.verdict.step + 1, pull.guard.steps)
    every = checkpoint.folders(pull.folder)
    before = [folder for folder in every if checkpoint.step_of(folder) < max(1, pull.verdict.onset_step)]
    to = before[-1] if before else every[0]
    if pull.team.is_first:
        checkpoint.drop_since(pull.folder, checkpoint.step_of(to) + 1)
    state = checkpoint.verify(to)
    lost = (made - state["step"]) * pull.batch_tokens
    lowered = pull.config["retry_lr"] if mode == "lower_lr" else None
    pull.recovery.go_back(state, made, pull.data_step(made - 1) + 1, lowered)
    pull.recovery.rewound_tokens += lost
    pull.recovery.lost_seconds += pull.seconds - state["seconds"]
    next_data = state["step"] + pull.recovery.shift
    kind = pull.verdict.kind
    forgotten = [event for event in pull.guard.events if event.step >= state["step"]]
    pull.recovery.events += [pull.row_of(event) for event in forgotten if event.kind != kind]
    warnings = [event.step if event.kind == "warning" else event.warn_step for event in forgotten]
    warned = min((step for step in warnings if step is not None), default=None)
    evidence = {"verdict": str(pull.verdict), "to_step": state["step"], "lost_tokens": lost}
    evidence |= {"next_data_step": next_data, "lr_factor": pull.recovery.lr_factor}
    pull.recovery.record(pull.verdict.step, pull.verdict.step * pull.batch_tokens, kind, mode, evidence, warned)
    if pull.team.is_first:
        checkpoint.amend(to, {"recovery": pull.recovery.state(), "seconds": pull.seconds})
    how = f"learning rate times {pull.recovery.lr_factor:g}" if lowered else f"on with data step {next_data}"
    words = f"{pull.verdict}; back to step {state['step']}, {how} (retry {pull.recovery.retries})"
    pull.tracker.alert(f"went back ({mode})", f"{pull.name}: {words}")
    pull.guard.events = [event for event in pull.guard.events if event.step < state["step"]]
    pull.log_events()
    pull.step, pull.went_back = state["step"], True
    return words
