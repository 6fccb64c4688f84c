"""The held-out score kept online: its best, and whether it has fallen by more than its items can explain."""

import math
from dataclasses import dataclass, field

from posttrain.limits import Limits
from pretrain.trend import Facts


@dataclass
class Reference:
    """A score that later ones are held against, and the evaluations in a row that are below it."""

    score: float
    items: int
    below: int = 0  # evaluations in a row
    since: int = -1  # step of the first of them
    total: float = 0.0  # of their scores, times their items
    heard: int = 0  # items of them

    def hear(self, step: int, score: float, items: int, least: float) -> bool:
        """Count this evaluation if it is `least` below, else start again."""
        if self.score - score < least:
            self.below, self.since, self.total, self.heard = 0, -1, 0.0, 0
            return False
        self.since = step if not self.below else self.since
        self.below += 1
        self.total, self.heard = self.total + score * items, self.heard + items
        return True


@dataclass
class HeldOut:
    """Scores are means of items in [0, 1]; others, and val/loss where there is no score, only tell the best step."""

    refs: dict[str, Reference] = field(default_factory=dict)  # the start, and the best two evaluations in a row
    score: float | None = None  # last one
    previous: float | None = None
    at: int = -1  # step of the last one
    before: int = -1  # of the one before it
    items: int = 0  # of it; 0: not known yet
    count: int = 0  # scores heard
    best_step: int = -1
    best: float | None = None  # highest score, or lowest val/loss
    by_loss: bool = True

    def __post_init__(self) -> None:
        self.refs = {name: Reference(**one) if isinstance(one, dict) else one for name, one in self.refs.items()}

    def hear_loss(self, step: int, loss: float) -> None:
        if self.by_loss and (self.best is None or loss < self.best):
            self.best, self.best_step = loss, step

    def hear(self, step: int, score: float, odd: bool, limits: Limits) -> Facts:
        """The facts of a fall if this evaluation proves one, else {}. `odd`: a training signal is a second witness."""
        if self.by_loss or self.best is None or score > self.best:
            self.best, self.best_step, self.by_loss = score, step, False
        if not 0.0 <= score <= 1.0:
            return {}
        self.items = self.items or limits.eval_n
        self.previous, self.score, self.count = self.score, score, self.count + 1
        self.before, self.at = self.at, step
        if self.previous is None:
            self.refs["start"] = Reference(score, self.items)
            return {}
        fallen = [facts for name in self.refs if (facts := self._fallen(name, step, score, odd, limits))]
        pair = (self.previous + score) / 2
        if "best" not in self.refs or pair > self.refs["best"].score:
            self.refs["best"] = Reference(pair, 2 * self.items)
        return fallen[0] if fallen else {}

    def _fallen(self, name: str, step: int, score: float, odd: bool, limits: Limits) -> Facts:
        ref, items = self.refs[name], self.items
        least = limits.fall_min if name == "start" else max(limits.fall_best, ref.score / 3)
        if not ref.hear(step, score, items, least):
            return {}
        more = 0.0 if name == "start" else limits.fall_best_z
        # The start is one evaluation, the best two are two; each has wandered too.
        own = limits.wander**2 / (1 if name == "start" else 2)
        once = z_of(ref.score, ref.items, score, items, own + limits.wander**2)
        z = z_of(ref.score, ref.items, ref.total / ref.heard, ref.heard, own + limits.wander**2 / ref.below)
        real = ref.below >= max(2, math.ceil(limits.fall_hold * self.count)) and z >= limits.fall_z + more
        real |= once >= limits.fall_z_once + more and score < ref.score / 2
        real |= odd and name == "start" and once >= limits.fall_z_odd
        return {"score": score, name: ref.score, "z": max(z, once), "since": float(ref.since)} if real else {}

    @property
    def solid(self) -> float:
        """The best two evaluations in a row, or the only one; 1 where there is none: nothing is known to be lost."""
        if ref := self.refs.get("best", self.refs.get("start")):
            return ref.score
        return 1.0

    def gained(self, limits: Limits) -> bool:
        """Are the last two scores above the start by more than noise?"""
        start = self.refs.get("start")
        if start is None or self.score is None or self.previous is None:
            return False
        score, pairs = (self.score, 1) if self.count == 2 else ((self.previous + self.score) / 2, 2)
        more = limits.wander**2 * (1 + 1 / pairs)
        return z_of(score, pairs * self.items, start.score, start.items, more) >= limits.gain_z


def z_of(high: float, n_high: int, low: float, n_low: int, more: float = 0.0) -> float:
    """Standard errors between two shares of n items, pooled; `more` is variance that is not the items'.

    A success and a failure are added to each: near 0 and 1 the plain error is too small (Agresti and Caffo 2000).
    """
    a, b = (high * n_high + 1) / (n_high + 2), (low * n_low + 1) / (n_low + 2)
    pooled = (high * n_high + low * n_low + 2) / (n_high + n_low + 4)
    return (a - b) / math.sqrt(pooled * (1 - pooled) * (1 / (n_high + 2) + 1 / (n_low + 2)) + more)
