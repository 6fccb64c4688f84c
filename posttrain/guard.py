"""The guard of post-training: says online whether a stage learns what it should, and stops what only looks as if.

Post-training fails with healthy dashboards. TRL prints a loss that is not a number as 0.0; DPO's margins rise while the
model forgets how to answer (huggingface/trl#1884); a reward rises while its loophole is being used (trl#322). So two
kinds of rule stand side by side. The hard ones hear the training signals: not finite, KL, clipped completions, the
chosen answers' log-probability, the loss. The other asks the held-out task, which is told from noise by its binomial
error, and the signals then only name the cause. A signal that is merely odd is an event and halves the proof that a
fall needs; no rule rests on a reward alone, which rises in good runs and in bad ones.

`python -m posttrain.guard LOG.csv --stage grpo` judges any exported log (posttrain/exported.py).
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, get_args

import console
from posttrain.heldout import HeldOut
from posttrain.limits import Limits
from posttrain.series import Series
from pretrain.trend import Facts

Stage = Literal["sft", "reward", "dpo", "kto", "grpo", "rloo", "ppo", "distill"]
Kind = Literal[
    "nonfinite",
    "loss_divergence",
    "kl_blowup",
    "dpo_collapse",
    "reward_hacking",
    "length_explosion",
    "entropy_collapse",
    "no_signal",
    "quality_fall",
]
STAGES: tuple[Stage, ...] = get_args(Stage)
RL, PREFERENCES = ("grpo", "rloo", "ppo"), ("dpo", "kto")
FINITE = ("train/loss", "val/loss", "stability/grad_norm", "policy/kl")  # never otherwise in a run that goes on
WATCHED = (
    "train/loss",
    "policy/kl",
    "policy/entropy",
    "policy/length",
    "policy/clipped",
    "reward/mean",
    "reward/zero_std",
    "dpo/margin",
    "dpo/logp_chosen",
)
# Kinds that are events before they are verdicts, in order of how much they say: second witnesses of a fall.
ODD: tuple[Kind, ...] = ("dpo_collapse", "length_explosion", "kl_blowup", "entropy_collapse")
TOLD = {  # beside a fall
    "reward": "reward/mean",
    "margin": "dpo/margin",
    "logp_chosen": "dpo/logp_chosen",
    "kl": "policy/kl",
    "length": "policy/length",
}
MAX_EVENTS = 200


@dataclass
class Event:
    """What happened from `step` on; `recovered_step` is None while it lasts.

    kind: a verdict's. An event that came to a verdict has `verdict_step` in its evidence, any other is a warning.
    """

    step: int
    kind: Kind
    evidence: Facts = field(default_factory=dict)
    recovered_step: int | None = None


@dataclass
class Verdict:
    """Why a stage should stop or go back; `onset_step` is the first step whose weights are not to be trusted."""

    kind: Kind
    step: int
    onset_step: int
    evidence: Facts

    def __str__(self) -> str:
        facts = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.evidence.items())
        return f"lost at step {self.step} ({self.kind}; since step {self.onset_step}; {facts})"


@dataclass
class Guard:
    """Feed it every logged row and every evaluation; `steps` is the budget in optimizer updates.

    Constant work per row, no look-ahead; `state()` is JSON and `Guard(**state)` continues. The held-out score `judge`
    is a mean of items in [0, 1]. Evaluate it before the first step and at least twenty times in the budget: a fall is
    believed at the second evaluation that shows it.
    """

    stage: Stage
    steps: int
    limits: Limits = field(default_factory=Limits)
    judge: str = "eval/exact_match"
    series: dict[str, Series] = field(default_factory=dict)
    runs: dict[str, list[int]] = field(default_factory=dict)  # of each rule: first step, rows beyond, rows back
    held_out: HeldOut = field(default_factory=HeldOut)
    zero_std_sum: float = 0.0
    zero_std_rows: int = 0
    signal_asked: bool = False
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage {self.stage!r}: one of {', '.join(STAGES)}")
        self.limits = Limits(**self.limits) if isinstance(self.limits, dict) else self.limits
        self.series = {k: Series(**one) if isinstance(one, dict) else one for k, one in self.series.items()}
        self.held_out = HeldOut(**self.held_out) if isinstance(self.held_out, dict) else self.held_out
        self.events = [Event(**one) if isinstance(one, dict) else one for one in self.events]

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def best_step(self) -> int:
        """Step of the best evaluation so far, by the judge or, without one, by val/loss; -1: none yet."""
        return self.held_out.best_step

    @property
    def status(self) -> Literal["healthy", "warning", "lost"]:
        lasting = [one for one in self.events if one.recovered_step is None]
        if any("verdict_step" in one.evidence for one in lasting):
            return "lost"
        return "warning" if lasting else "healthy"

    def observe(self, step: int, row: Mapping[str, float]) -> Verdict | None:
        """The verdict on the stage when it is due, once, or None. `row`: any of the W&B names; others are not read."""
        if (count := row.get("eval/n", math.nan)) >= 1:
            self.held_out.items = int(count)
        if verdict := self._judge_finite(step, row):
            return verdict
        early = int(self.limits.baseline_share * self.steps)
        heard = [name for name in WATCHED if math.isfinite(row.get(name, math.nan))]
        for name in heard:
            if name not in self.series:
                self.series[name] = Series()
            self.series[name].push(step, float(row[name]), early)  # a tensor's or numpy's number would not be JSON
        found: list[Verdict | None] = []
        if "train/loss" in heard and self.stage not in RL:
            found.append(self._judge_loss(step, row))
        if "policy/kl" in heard:
            found.append(self._judge_kl(step))
        if "dpo/logp_chosen" in heard and self.stage in PREFERENCES:
            found.append(self._judge_logp(step))
        if "policy/length" in heard or "policy/clipped" in heard:
            found.append(self._judge_length(step))
        if "policy/entropy" in heard and self.stage in RL + PREFERENCES:
            found.append(self._judge_entropy(step))
        if "reward/zero_std" in heard:
            found.append(self._judge_signal(step))
        found.append(self._judge_held_out(step, row))
        return next((one for one in found if one), None)

    # --- not finite ---------------------------------------------------------------------------------------------------
    def _judge_finite(self, step: int, row: Mapping[str, float]) -> Verdict | None:
        bad: Facts = {name: str(float(row[name])) for name in FINITE if name in row and not math.isfinite(row[name])}
        losses = self.series.get("train/loss")
        # A loss of RL is near 0 by design, and exactly 0 where all rewards are equal.
        if not bad and losses and "train/loss" in row and self.stage not in RL:
            usual = median(map(abs, losses.last))
            zero = row["train/loss"] == row.get("stability/grad_norm", 0.0) == 0.0 and usual > self.limits.zero_loss
            if self._held("zero_loss", step, zero, 2):  # one such row may be a batch without labels
                bad = {"train/loss": "0.0 where NaN is filtered", "usual": usual}
        if bad:
            self._open("nonfinite", self.runs["zero_loss"][0] if "usual" in bad else step, bad)
            return self._verdict("nonfinite", step, bad)
        if "train/loss" in row or "stability/grad_norm" in row:
            self._close("nonfinite", step)
        return None

    # --- training signals ---------------------------------------------------------------------------------------------
    def _judge_loss(self, step: int, row: Mapping[str, float]) -> Verdict | None:
        """Far above its lowest level for long, and not on its way down? Or is there nothing left that could learn?"""
        one, limits = self.series["train/loss"], self.limits
        # A learning rate that kills a model at once leaves a finite, level loss, which no loss before it is below.
        still = row.get("stability/grad_norm", 1.0) == 0.0 and one.last[-1] > limits.zero_loss
        if self._held("no_gradient", step, still, limits.hold_rows):
            dead: Facts = {"loss": one.level, "grad_norm": 0.0}
            self._open("loss_divergence", self.runs["no_gradient"][0], dead)
            return self._verdict("loss_divergence", step, dead)
        forgiven = limits.loss_floor + limits.loss_share * max(0.0, one.first[0] - one.low) + limits.loss_sds * one.sd
        rows = min(max(3, math.ceil(limits.loss_hold_share * self.steps / one.spacing)), 30)
        facts: Facts = {"loss": one.level, "lowest": one.low, "forgiven": forgiven}
        if not self._odd("loss_divergence", step, one.last[-1] > one.low + forgiven, facts, rows):
            return None
        held = self.runs["loss_divergence"][1]
        falls = one.level - one.low < 0.8 * (one.high - one.low) and held < 4 * rows
        return None if falls or one.level <= one.low + forgiven else self._verdict("loss_divergence", step, facts)

    def _judge_kl(self, step: int) -> Verdict | None:
        one = self.series["policy/kl"]
        kl = one.last[-1]
        facts: Facts = {"kl": one.level, "start": one.start}
        rows = self._rows(one)
        far = self._held("kl_max", step, kl > self.limits.kl_max, rows)
        odd = self._odd("kl_blowup", step, kl > self.limits.kl_warn, facts, rows)
        return self._verdict("kl_blowup", step, facts) if odd and far else None

    def _judge_logp(self, step: int) -> Verdict | None:
        """Do the chosen answers become unlikely while the margins grow?"""
        one, margin, limits = self.series["dpo/logp_chosen"], self.series.get("dpo/margin"), self.limits
        rows, size = self._rows(one), abs(one.start)
        facts: Facts = {"logp_chosen": one.level, "start": one.start}
        if margin:
            facts |= {"margin": margin.level, "margin_start": margin.start}
        most = max(limits.logp_fall_alone, limits.logp_fall_alone_share * size)
        far = self._held("logp_alone", step, self._forgets(most), rows)
        some = max(limits.logp_fall, limits.logp_fall_share * size)
        odd = self._odd("dpo_collapse", step, self._forgets(some), facts, rows)
        return self._verdict("dpo_collapse", step, facts) if odd and far and self.held_out.score is None else None

    def _forgets(self, nats: float) -> bool:
        """Have the chosen answers lost so many nats, beyond noise, while the margins did not shrink?"""
        one, margin = self.series.get("dpo/logp_chosen"), self.series.get("dpo/margin")
        if one is None or (margin and margin.level < margin.start - 2 * margin.sd):
            return False
        return one.start - one.last[-1] > nats + 4 * one.sd

    def _judge_length(self, step: int) -> Verdict | None:
        length, clipped, limits = self.series.get("policy/length"), self.series.get("policy/clipped"), self.limits
        facts: Facts = {}
        if length:
            facts |= {"length": length.level, "length_start": length.start}
        if not clipped:
            assert length
            long = length.last[-1] > limits.length_factor_odd * length.start
            self._odd("length_explosion", step, long, facts, self._rows(length))
            return None
        share, rise = clipped.last[-1], clipped.last[-1] - clipped.start
        facts |= {"clipped": clipped.level, "clipped_start": clipped.start}
        rows = self._rows(clipped)
        far = self._held("clipped_max", step, share > limits.clipped_max and rise > limits.clipped_rise, rows)
        long = share > limits.clipped_warn and rise > 2 / 3 * limits.clipped_warn
        odd = self._odd("length_explosion", step, long, facts, rows)
        lost = odd and far and not self.held_out.gained(limits)
        return self._verdict("length_explosion", step, facts) if lost else None

    def _judge_entropy(self, step: int) -> Verdict | None:
        one, limits = self.series["policy/entropy"], self.limits
        facts: Facts = {"entropy": one.level, "start": one.start}
        rows = self._rows(one)
        if self.stage in PREFERENCES:
            self._odd("entropy_collapse", step, one.last[-1] > limits.entropy_high * one.start, facts, rows)
            return None
        same = self.series.get("reward/zero_std")
        if not self._odd("entropy_collapse", step, one.last[-1] < limits.entropy_low * one.start, facts, rows):
            return None
        # A task that is solved or being learnt needs less exploring: two evaluations since must say that it is neither.
        explores = same is not None and same.level < limits.zero_std_warn
        good = self.held_out.gained(limits) or self._risen() or self.held_out.solid >= limits.solved
        since = self.runs["entropy_collapse"][0]
        soon = self.held_out.before < since or step - since < limits.entropy_hold_share * self.steps
        return None if explores or good or soon else self._verdict("entropy_collapse", step, facts)

    def _judge_signal(self, step: int) -> Verdict | None:
        """Do all completions of a prompt earn the same, and did they from the first row on?"""
        one, limits = self.series["reward/zero_std"], self.limits
        self.zero_std_sum += one.last[-1]
        self.zero_std_rows += 1
        mean = self.zero_std_sum / self.zero_std_rows
        facts: Facts = {"zero_std": one.level, "mean": mean}
        self._odd("no_signal", step, one.last[-1] >= limits.zero_std_warn, facts, 2 * self._rows(one))
        due = step >= limits.no_signal_share * self.steps and self.zero_std_rows >= limits.no_signal_rows
        if self.signal_asked or not due:
            return None
        self.signal_asked = True
        if mean < limits.zero_std_lost:
            return None
        self._open("no_signal", one.step, facts)
        return self._verdict("no_signal", step, facts)

    def _risen(self) -> bool:
        """Is the reward above its start by more than noise, and has it kept half of what it won?"""
        one = self.series.get("reward/mean")
        if not one or one.level - one.start <= self.limits.reward_sds * one.sd:
            return False
        return one.level - one.start >= (one.high - one.start) / 2

    # --- the held-out task --------------------------------------------------------------------------------------------
    def _judge_held_out(self, step: int, row: Mapping[str, float]) -> Verdict | None:
        """Has the score fallen? What fell is named by what else has moved."""
        if math.isfinite(loss := float(row.get("val/loss", math.nan))):
            self.held_out.hear_loss(step, loss)
        if not math.isfinite(score := float(row.get(self.judge, math.nan))):
            return None
        odd: Kind | None = next((kind for kind in ODD if self._lasting(kind)), None)
        if odd == "entropy_collapse" and self.stage in RL:
            odd = None  # entropy falls in good runs too
        facts = self.held_out.hear(step, score, odd is not None, self.limits)
        known = [event for event in self.events if "judge" in event.evidence and event.recovered_step is None]
        if not facts or known:
            for event in known if not facts else []:
                event.recovered_step = step
            return None
        length = self.series.get("policy/length")
        kind: Kind = "quality_fall"
        if self.stage in RL and self._risen():
            kind = "reward_hacking"
        elif self.stage in PREFERENCES and self._forgets(self.limits.logp_fall):
            kind = "dpo_collapse"
        elif odd:
            kind = odd
        elif length and length.level > self.limits.length_factor * length.start:
            kind = "length_explosion"
        moved = {short: self.series[name] for short, name in TOLD.items() if name in self.series}
        facts |= {"judge": self.judge} | {short: f"{one.start:.4g} -> {one.level:.4g}" for short, one in moved.items()}
        self._open(kind, int(float(facts["since"])), facts)
        return self._verdict(kind, step, facts)

    # --- events -------------------------------------------------------------------------------------------------------
    def _rows(self, one: Series) -> int:
        """Rows in a row that are no accident, by how often this signal is logged."""
        rows = math.ceil(self.limits.hold_share * self.steps / one.spacing)
        return min(max(self.limits.hold_rows, rows), self.limits.hold_rows_most)

    def _held(self, rule: str, step: int, beyond: bool, rows: int) -> bool:
        """Has this rule been beyond its limit for so many rows, and not been back for as many?"""
        run = self.runs.setdefault(rule, [step, 0, 0])
        if beyond:
            run[0] = run[0] if run[1] else step
            run[1], run[2] = run[1] + 1, 0
        elif run[1]:
            run[2] += 1
            if run[1] < rows or run[2] >= rows:
                run[1], run[2] = 0, 0
        return run[1] >= rows

    def _odd(self, kind: Kind, step: int, beyond: bool, facts: Facts, rows: int) -> bool:
        """`_held`, and an event while it lasts."""
        if held := self._held(kind, step, beyond, rows):
            self._open(kind, self.runs[kind][0], facts)
        else:
            self._close(kind, step)
        return held

    def _lasting(self, kind: Kind) -> Event | None:
        return next((one for one in reversed(self.events) if one.kind == kind and one.recovered_step is None), None)

    def _open(self, kind: Kind, step: int, facts: Facts) -> None:
        if not self._lasting(kind):
            self.events.append(Event(step, kind, dict(facts)))
            del self.events[:-MAX_EVENTS]

    def _close(self, kind: Kind, step: int) -> None:
        event = self._lasting(kind)
        if event and "judge" not in event.evidence:  # else the held-out task says when it is over
            event.recovered_step = step

    def _verdict(self, kind: Kind, step: int, facts: Facts) -> Verdict | None:
        """The verdict on an event that lasts, unless it has been given."""
        event = self._lasting(kind)
        if event is None or "verdict_step" in event.evidence:
            return None
        event.evidence |= {**facts, "verdict_step": float(step)}
        return Verdict(kind, step, event.step, dict(facts))


if __name__ == "__main__":
    from posttrain import exported

    console.door(lambda: exported.main(sys.argv[1:]))
