"""Synthetic logs of post-training runs, good and bad, in the shapes and sizes of those measured on the office task.

`python -m tests.posttrain.traces --seeds 500` prints how the guard does on them. A trace is drawn from (kind, seed):
its stage, its budget of 20 to 5,000 steps, a row every 1 to 25 steps, an evaluation every 4% to 25% of the budget on 48
to 256 items, the noise, the speed, and cells that are missing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import console
from posttrain.guard import Guard, Stage, Verdict

Row = dict[str, float]


@dataclass
class Trace:
    """Rows in the order of their steps; `onset`: first step of the damage, None in a healthy run."""

    kind: str
    stage: Stage
    steps: int
    rows: list[tuple[int, Row]]
    onset: int | None = None
    visible: int = -1  # step of the second evaluation, or of the row, from which on the damage is plain to see
    names: tuple[str, ...] = ()  # what a verdict on it may be called


@dataclass
class Draw:
    """The random choices that all traces share; `at` is the share of the budget at every logged row."""

    rng: np.random.Generator
    few: int = 4  # rows and evaluations at least
    steps: int = field(init=False)
    at: np.ndarray = field(init=False)
    step: np.ndarray = field(init=False)
    eval_step: np.ndarray = field(init=False)
    eval_at: np.ndarray = field(init=False)
    n: int = field(init=False)
    tells_n: bool = field(init=False)

    def __post_init__(self) -> None:
        self.steps = int(np.exp(self.rng.uniform(math.log(20), math.log(5000))))
        every = min(int(self.rng.integers(1, 26)), max(1, self.steps // max(self.few, 8)))
        self.step = np.arange(every, self.steps + 1, every)
        self.at = self.step / self.steps
        evals = min(int(self.rng.integers(max(4, self.few), 26)), self.steps // 2)
        self.eval_step = np.unique(np.linspace(0, self.steps, evals + 1).astype(int))
        self.eval_at = self.eval_step / self.steps
        self.n = int(self.rng.choice([48, 64, 64, 128, 256]))
        self.tells_n = self.n != 64 or self.rng.random() < 0.5

    def u(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def noisy(self, curve: np.ndarray, share: float, floor: float = 0.0) -> np.ndarray:
        """Multiplicative noise with tails of Student's t, four degrees; a floor of additive noise."""
        noise = self.rng.standard_t(4, len(curve))
        return curve + noise * (share * np.abs(curve) + floor)

    def scored(self, p: np.ndarray) -> np.ndarray:
        """A score of n items, of a model whose quality also wanders by two points."""
        wander = np.zeros(len(p))
        for i in range(1, len(p)):
            wander[i] = 0.6 * wander[i - 1] + self.rng.normal(0, 0.016)
        return self.rng.binomial(self.n, np.clip(p + wander, 0, 1)) / self.n

    def trace(
        self, kind: str, stage: Stage, columns: dict[str, np.ndarray], p: np.ndarray | None, **more: Any
    ) -> Trace:
        """`p`: the held-out quality at every evaluation, None where nobody evaluates."""
        holes = self.u(0, 0.15) if self.rng.random() < 0.5 else 0.0
        rows: dict[int, Row] = {}
        for i, step in enumerate(self.step.tolist()):
            rows[step] = {k: float(v[i]) for k, v in columns.items() if self.rng.random() >= holes or v[i] != v[i]}
        if p is not None:
            for step, score in zip(self.eval_step.tolist(), self.scored(p).tolist(), strict=True):
                rows.setdefault(step, {})["eval/exact_match"] = score
                rows[step] |= {"eval/n": float(self.n)} if self.tells_n else {}
        return Trace(kind, stage, self.steps, sorted(rows.items()), **more)


def rise(at: np.ndarray, since: float, width: float) -> np.ndarray:
    """0 before `since`, 1 from `since + width` on, straight between."""
    return np.clip((at - since) / width, 0, 1)


def stage_of(d: Draw, *stages: Stage) -> Stage:
    return stages[int(d.rng.integers(len(stages)))]


# --- healthy ----------------------------------------------------------------------------------------------------------
def healthy_sft(d: Draw, kind: str) -> Trace:
    first, last, epochs = d.u(1.2, 7), d.u(0.3, 1.0), int(d.rng.integers(1, 7))
    loss = last + (first - last) * (1 + d.u(10, 60) * d.at) ** -d.u(0.7, 1.5)
    p, noise = d.u(0.3, 0.95) * rise(d.eval_at, d.u(0, 0.3), d.u(0.1, 0.6)), d.u(0.02, 0.12)
    if kind == "sft memorises":
        loss *= np.exp(-np.floor(epochs * d.at) * d.u(0.3, 1.0))
    elif kind == "sft continued":
        loss, p = last * (1 - d.u(0, 0.2) * rise(d.at, 0, 1)), np.full(len(d.eval_at), d.u(0.3, 0.95))
    loss = d.noisy(loss, noise)
    if kind == "sft bad batches":
        loss[d.rng.random(len(loss)) < 0.03] += d.u(1, 6)
    elif kind == "sft spike":
        loss += d.u(1, 3) * np.exp(-np.maximum(d.at - (at := d.u(0.2, 0.7)), 0) / 0.01) * (d.at >= at)
    columns = {"train/loss": np.maximum(loss, 0), "stability/grad_norm": d.noisy(np.full(len(loss), d.u(0.3, 3)), 0.2)}
    columns["policy/entropy"] = np.maximum(loss, 0) * 0.9
    return d.trace(kind, "sft", columns, p if d.rng.random() < 0.8 else None)


def healthy_reward(d: Draw, kind: str) -> Trace:
    loss = 0.69 - d.u(0.05, 0.6) * rise(d.at, 0, d.u(0.1, 1))
    columns = {"train/loss": np.abs(d.noisy(loss, 0.0, d.u(0.02, 0.12))), "stability/grad_norm": d.noisy(loss + 1, 0.3)}
    return d.trace(kind, "reward", columns, 0.5 + d.u(0.05, 0.45) * rise(d.eval_at, 0, 0.6))


def preferences(d: Draw, fall: np.ndarray, margin: float, entropy: float) -> dict[str, np.ndarray]:
    """DPO's dashboard: `fall` is what the chosen answers lose, in nats per sequence."""
    first = -d.u(0.3, 3) if d.rng.random() < 0.5 else -d.u(20, 400)
    grows = rise(d.at, 0, d.u(0.3, 1))
    scale = 1.0 if first > -10 else abs(first) / 8
    return {
        "train/loss": np.abs(d.noisy(0.69 - 0.25 * grows, 0.0, d.u(0.01, 0.08))),
        "dpo/margin": d.noisy(0.07 + margin * grows, 0.05, 0.05),
        "dpo/accuracy": np.clip(d.noisy(0.53 + 0.23 * grows, 0.05), 0, 1),
        "dpo/logp_chosen": d.noisy(first - scale * fall, d.u(0.01, 0.06), 0.1),
        "dpo/logp_rejected": d.noisy(first - scale * fall - 10 * margin * grows, 0.05),
        "policy/entropy": np.abs(d.noisy(d.u(0.05, 1) * (1 + (entropy - 1) * grows), 0.04)),
        "stability/grad_norm": np.abs(d.noisy(np.full(len(d.at), d.u(1, 20)), 0.2)),
    }


def healthy_preferences(d: Draw, kind: str) -> Trace:
    columns = preferences(d, d.u(-0.3, 1.5) * rise(d.at, 0, 1), d.u(0.1, 1.5), d.u(0.8, 1.25))
    p = d.u(0.2, 0.9) + d.u(-0.02, 0.08) * rise(d.eval_at, 0, 1)
    return d.trace(kind, stage_of(d, "dpo", "kto"), columns, p if d.rng.random() < 0.8 else None)


def rollouts(d: Draw, **given: np.ndarray) -> dict[str, np.ndarray]:
    """The dashboard of RL: reward, kl, entropy, length, clipped, zero_std, without noise, where a kind has its own."""
    one = np.ones(len(d.at))
    noise = d.u(0.01, 0.06)
    usual = {
        "reward": d.u(0.3, 1.5) + d.u(0.1, 0.5) * rise(d.at, 0, d.u(0.3, 1)),
        "kl": d.u(0.01, 0.08) * d.at ** d.u(0.5, 1.2),
        "entropy": d.u(0.05, 1.0) * (1 - d.u(0.1, 0.5) * rise(d.at, 0, 0.8)),
        "length": d.u(20, 400) * (1 + d.u(-0.1, 0.15) * rise(d.at, 0, 1)),
        "clipped": d.u(0, 0.1) * one,
        "zero_std": d.u(0.05, 0.4) + d.u(0, 0.3) * rise(d.at, 0.1, 0.8),
    } | given
    groups = 8 * int(d.rng.integers(1, 9))
    columns = {
        "train/loss": d.rng.normal(0, 0.01, len(d.at)),
        "stability/grad_norm": np.abs(d.noisy(one * d.u(0.1, 2), 0.3)),
        "policy/kl": np.maximum(d.noisy(usual["kl"], 0.15, 0.0005), 0),
        "policy/entropy": np.maximum(d.noisy(usual["entropy"], 0.06), 0),
        "policy/length": np.maximum(d.noisy(usual["length"], noise), 1),
        "policy/clipped": d.rng.binomial(groups * 4, np.clip(usual["clipped"], 0, 1)) / (groups * 4),
        "reward/mean": d.noisy(usual["reward"], noise, 0.02),
        "reward/std": np.abs(d.noisy(0.3 * one, 0.1)),
        "reward/zero_std": d.rng.binomial(groups, np.clip(usual["zero_std"], 0, 1)) / groups,
    }
    for name in ("policy/clipped", "reward/zero_std", "policy/kl", "policy/length"):
        if d.rng.random() < 0.1:
            del columns[name]
    return columns


def healthy_rl(d: Draw, kind: str) -> Trace:
    stage = stage_of(d, "grpo", "grpo", "rloo", "ppo")
    one, learnt = np.ones(len(d.at)), rise(d.at, d.u(0, 0.2), d.u(0.1, 0.6))
    start, gain = d.u(0.3, 0.85), d.u(0, 0.12)
    p = start + gain * rise(d.eval_at, 0, 0.8)
    given: dict[str, np.ndarray] = {}
    if kind == "rl weak start":  # the format is learnt: short answers become whole ones, KL moves, entropy falls
        p = 0.03 + d.u(0.2, 0.7) * rise(d.eval_at, 0.05, 0.4)
        given = {
            "length": d.u(4, 12) + d.u(20, 50) * learnt,
            "entropy": 1.2 - 1.0 * learnt,
            "kl": d.u(0.05, 0.2) * learnt,
        }
        given |= {"reward": 0.05 + 1.3 * learnt, "zero_std": 0.85 - 0.5 * learnt}
    elif kind == "rl thinks longer":  # as R1-Zero: answers grow tenfold, some are cut, entropy goes, quality rises
        p = 0.15 + d.u(0.35, 0.5) * rise(d.eval_at, 0, 0.5)
        given = {
            "length": 150 + 1400 * learnt,
            "clipped": 0.02 + d.u(0.05, 0.3) * learnt,
            "entropy": 0.8 - 0.7 * learnt,
        }
        given |= {"kl": d.u(0.02, 0.25) * learnt}
    elif kind == "rl solved":
        p = np.full(len(d.eval_at), d.u(0.92, 0.99))
        given = {"entropy": 0.06 * (1 - d.u(0.3, 0.9) * learnt), "reward": one * 2.1, "zero_std": 0.7 + 0.2 * learnt}
    elif kind == "rl mixed reward":  # a part of the reward that the task does not hear of
        p = np.full(len(d.eval_at), start)
        given = {"reward": 0.9 + d.u(0.3, 1.5) * learnt}
    elif kind == "rl never stops":  # a base model that has to learn to end
        given = {"clipped": 0.9 - 0.85 * learnt, "length": 250 - 150 * learnt}
    elif kind == "rl quiet stretch":
        given = {"zero_std": 0.4 + 0.58 * rise(d.at, 0.3, 0.02) - 0.5 * rise(d.at, 0.6, 0.02)}
    elif kind == "rl sparse":  # one prompt in ten teaches
        given = {"zero_std": 0.9 * one, "reward": 0.05 + 0.1 * learnt}
    columns = rollouts(d, **given)
    if kind == "rl k3 outliers" and "policy/kl" in columns:
        hit = d.rng.random(len(d.at)) < 0.02
        columns["policy/kl"][hit] += d.rng.uniform(1, 60, int(hit.sum()))
    return d.trace(kind, stage, columns, p if d.rng.random() < 0.8 else None)


def healthy_distill(d: Draw, kind: str) -> Trace:
    loss = d.noisy(d.u(0.02, 0.2) + d.u(0.3, 2) * (1 + 30 * d.at) ** -1.0, d.u(0.03, 0.15))
    columns = {"train/loss": np.abs(loss), "stability/grad_norm": np.abs(loss) + 0.1}
    columns |= {"policy/length": d.noisy(np.full(len(loss), 60.0) * d.u(0.8, 1.2), 0.04)}
    columns |= {"policy/entropy": np.abs(loss) * 0.8}
    return d.trace(kind, "distill", columns, d.u(0.1, 0.5) + d.u(0, 0.4) * rise(d.eval_at, 0, 0.8))


HEALTHY: dict[str, Callable[[Draw, str], Trace]] = {
    "sft": healthy_sft,
    "sft memorises": healthy_sft,
    "sft continued": healthy_sft,
    "sft bad batches": healthy_sft,
    "sft spike": healthy_sft,
    "reward": healthy_reward,
    "preferences": healthy_preferences,
    "rl": healthy_rl,
    "rl weak start": healthy_rl,
    "rl thinks longer": healthy_rl,
    "rl solved": healthy_rl,
    "rl mixed reward": healthy_rl,
    "rl never stops": healthy_rl,
    "rl quiet stretch": healthy_rl,
    "rl sparse": healthy_rl,
    "rl k3 outliers": healthy_rl,
    "distill": healthy_distill,
}


# --- failing ----------------------------------------------------------------------------------------------------------
def falling(d: Draw, since: float, width: float, start: float, left: float) -> tuple[np.ndarray, int]:
    """Held-out quality from `start` to `left`, and the second evaluation at which half of the fall is over."""
    p = start + (left - start) * rise(d.eval_at, since, width)
    seen = np.flatnonzero(d.eval_at >= since + width / 2)
    return p, int(d.eval_step[seen[min(1, len(seen) - 1)]])


def first_row(d: Draw, since: float) -> int:
    return int(np.flatnonzero(d.at >= since)[0])


def not_finite(d: Draw, kind: str) -> Trace:
    good = healthy_sft(d, "sft") if d.rng.random() < 0.5 else healthy_rl(d, "rl")
    rows = [step for step, row in good.rows if "stability/grad_norm" in row and "train/loss" in row]
    lost = rows[int(len(rows) * d.u(0.2, 0.9))]
    nan = math.nan if d.rng.random() < 0.7 else math.inf
    filtered = kind == "filtered nan"
    for step, row in good.rows:
        if step < lost:
            continue
        row["train/loss"] = 0.0 if filtered else nan
        row["stability/grad_norm"] = 0.0 if filtered and good.stage == "sft" and d.rng.random() < 0.5 else math.nan
    return Trace(kind, good.stage, good.steps, good.rows, lost, lost, ("nonfinite",))


def loss_diverges(d: Draw, kind: str) -> Trace:
    stage = stage_of(d, "sft", "sft", "distill")
    first, last, since = d.u(2, 7), d.u(0.1, 0.8), d.u(0.2, 0.75)
    loss = d.noisy(last + (first - last) * (1 + 60 * d.at) ** -1.0, d.u(0.02, 0.1))
    loss += d.u(0.6, 1.3) * (first - last) * rise(d.at, since, 0.01 if kind == "loss jumps" else d.u(0.05, 0.15))
    columns = {"train/loss": loss, "stability/grad_norm": np.abs(d.noisy(loss, 0.3))}
    seen = int(d.step[first_row(d, min(since + 0.1, 1.0))])
    return d.trace(kind, stage, columns, None, onset=int(since * d.steps), visible=seen, names=("loss_divergence",))


def kl_blows_up(d: Draw, kind: str) -> Trace:
    since, speed = d.u(0.05, 0.7), d.u(0.05, 0.25)
    kl = 0.03 * d.at + d.u(1.5, 8) * rise(d.at, since, speed) ** 2
    columns = rollouts(d, kl=kl)
    columns["policy/kl"] = np.maximum(d.noisy(kl, 0.15), 0)
    seen = int(d.step[first_row(d, min(since + speed, 1.0))])
    p = np.full(len(d.eval_at), 0.5) if d.rng.random() < 0.5 else None
    stage = stage_of(d, "grpo", "rloo", "ppo")
    return d.trace(kind, stage, columns, p, onset=int(since * d.steps), visible=seen, names=("kl_blowup",))


def dpo_collapses(d: Draw, kind: str) -> Trace:
    since, width = d.u(0, 0.5), d.u(0.1, 0.4)
    fall = d.u(14, 30) * rise(d.at, since, width)
    columns = preferences(d, fall, d.u(0.6, 2), d.u(1.6, 2.5))
    start = d.u(0.5, 0.9)
    p, seen = falling(d, since, width, start, start * d.u(0.05, 0.4))
    names = ("dpo_collapse", "entropy_collapse")
    if kind.endswith("unseen"):
        seen = int(d.step[first_row(d, since + width)])
        return d.trace(kind, "dpo", columns, None, onset=int(since * d.steps), visible=seen, names=names)
    return d.trace(kind, "dpo", columns, p, onset=int(since * d.steps), visible=seen, names=names)


def reward_hacked(d: Draw, kind: str) -> Trace:
    """Found at once, found late, or, as Gao et al. 2022 have it, after the quality has risen with the proxy."""
    since, width = (0.0 if kind == "hacked at once" else d.u(0.2, 0.6)), d.u(0.05, 0.25)
    first = d.u(0.3, 1.5)
    reward = first * (1 + d.u(0.6, 2) * rise(d.at, since, width))
    start = d.u(0.3, 0.85)
    p, seen = falling(d, since, width, start, start * d.u(0.0, 0.35))
    if kind == "hacked after a gain":
        reward += 0.2 * first * rise(d.at, 0, since)
        p += 0.1 * rise(d.eval_at, 0, since) * (d.eval_at < since + width)
    given = {"reward": reward, "kl": 0.02 * d.at + d.u(0.1, 1.5) * rise(d.at, since, width)}
    if d.rng.random() < 0.5:
        given |= {
            "length": 40 * (1 + d.u(0.5, 1.3) * rise(d.at, since, width)),
            "clipped": d.u(0, 0.8) * rise(d.at, since, 0.2),
        }
    stage = stage_of(d, "grpo", "rloo", "ppo")
    names = ("reward_hacking", "length_explosion", "kl_blowup")
    return d.trace(kind, stage, rollouts(d, **given), p, onset=int(since * d.steps), visible=seen, names=names)


def length_explodes(d: Draw, kind: str) -> Trace:
    since, width = d.u(0.05, 0.6), d.u(0.05, 0.3)
    share = 0.03 + d.u(0.65, 0.95) * rise(d.at, since, width)
    columns = rollouts(d, length=40 * (1 + 2 * rise(d.at, since, width)), clipped=share)
    columns["policy/clipped"] = np.clip(d.noisy(share, 0.08), 0, 1)
    seen = int(d.step[first_row(d, min(since + width, 1.0))])
    p = np.full(len(d.eval_at), d.u(0.2, 0.8)) if d.rng.random() < 0.6 else None
    stage = stage_of(d, "grpo", "rloo", "ppo", "distill")
    return d.trace(kind, stage, columns, p, onset=int(since * d.steps), visible=seen, names=("length_explosion",))


def entropy_collapses(d: Draw, kind: str) -> Trace:
    since, width, one = d.u(0.05, 0.5), d.u(0.05, 0.3), np.ones(len(d.at))
    gone = rise(d.at, since, width)
    columns = rollouts(d, entropy=d.u(0.1, 1) * (1 - d.u(0.9, 0.99) * gone), reward=one, zero_std=0.3 + 0.68 * gone)
    seen = int(d.step[first_row(d, min(since + width, 1.0))])
    p = np.full(len(d.eval_at), d.u(0.2, 0.7))
    names = ("entropy_collapse",)
    return d.trace(kind, "grpo", columns, p, onset=int(since * d.steps), visible=seen, names=names)


def no_signal(d: Draw, kind: str) -> Trace:
    one = np.ones(len(d.at))
    columns = rollouts(d, zero_std=one * d.u(0.985, 1.0), reward=one * 0.001, entropy=one * 0.5)
    columns["reward/zero_std"] = np.where(d.rng.random(len(d.at)) < 0.1, 0.9, 1.0)
    seen = int(d.step[min(max(8, first_row(d, 0.2)), len(d.step) - 1)])
    return d.trace(
        kind, "grpo", columns, one[:1] * np.zeros(len(d.eval_at)), onset=0, visible=seen, names=("no_signal",)
    )


def quality_falls(d: Draw, kind: str) -> Trace:
    since, width = d.u(0.0, 0.6), d.u(0.02, 0.3)
    start = d.u(0.4, 0.9)
    p, seen = falling(d, since, width, start, start * d.u(0.0, 0.4))
    good = d.rng.random() < 0.5
    stage = stage_of(d, "sft", "distill") if good else stage_of(d, "grpo", "ppo")
    one = np.ones(len(d.at))
    columns = {"train/loss": np.abs(d.noisy(0.3 * one, 0.08))} if good else rollouts(d, reward=one)
    names = ("quality_fall", "reward_hacking")  # a reward that stands still rises by chance
    return d.trace(kind, stage, columns, p, onset=int(since * d.steps), visible=seen, names=names)


FAILING: dict[str, Callable[[Draw, str], Trace]] = {
    "nan": not_finite,
    "filtered nan": not_finite,
    "loss jumps": loss_diverges,
    "loss climbs": loss_diverges,
    "kl": kl_blows_up,
    "dpo collapse": dpo_collapses,
    "dpo collapse unseen": dpo_collapses,
    "hacked at once": reward_hacked,
    "hacked later": reward_hacked,
    "hacked after a gain": reward_hacked,
    "length": length_explodes,
    "entropy": entropy_collapses,
    "no signal": no_signal,
    "quality": quality_falls,
}


def draw(kind: str, seed: int) -> Trace:
    """The same trace for the same kind and seed."""
    failing = kind in FAILING
    number = [*HEALTHY, *FAILING].index(kind)
    one = Draw(np.random.default_rng([seed, number]), few=12 if failing else 4)
    return (FAILING if failing else HEALTHY)[kind](one, kind)


def watch(trace: Trace) -> tuple[Verdict | None, Guard]:
    """The first verdict on it, and the guard as it was then."""
    guard = Guard(trace.stage, trace.steps)
    for step, row in trace.rows:
        if verdict := guard.observe(step, row):
            return verdict, guard
    return None, guard


@dataclass(frozen=True)
class Config:
    """The guard of post-training on synthetic logs."""

    seeds: int = 500
    """traces of each kind"""
    first: int = 30_000
    """seed of the first; the tests use those from 0, the limits were chosen on those from 1,000, 10,000 and 20,000"""


def main(argv: list[str]) -> int:
    c = console.parse(Config, argv, "python -m tests.posttrain.traces")
    seeds = range(c.first, c.first + c.seeds)
    print("delay: after the damage is plain, as a share of the budget")
    print(f"{'kind':<22}{'flagged':>9}{'early':>7}{'named':>8}{'delay: median':>15}{'90%':>7}")
    for kind in [*HEALTHY, *FAILING]:
        flagged, early, named, delays = 0, 0, 0, []
        for trace in (draw(kind, seed) for seed in seeds):
            verdict = watch(trace)[0]
            if not verdict:
                continue
            flagged += 1
            early += trace.onset is None or verdict.step < trace.onset
            named += verdict.kind in trace.names
            delays.append((verdict.step - trace.visible) / trace.steps)
        line = f"{kind:<22}{flagged / c.seeds:>9.1%}{early:>7}"
        if kind in FAILING and delays:
            line += f"{named / flagged:>8.1%}{np.median(delays):>15.3f}{np.quantile(delays, 0.9):>7.3f}"
        print(line)
    return 0


if __name__ == "__main__":
    import sys

    console.door(lambda: main(sys.argv[1:]))
