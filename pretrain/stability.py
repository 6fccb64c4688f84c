"""The guard: says online, from loss and gradient norm alone, whether a pull is healthy, spiking or lost.

Divergence here is a loss that leaves its trend and does not return, or is not finite. "Leaves" is measured in what the
pull had learned, not in sigmas: a 6-sigma rule fires on healthy runs at every bad batch, whereas a loss that stays
above its own best by a fifth of all progress made so far has never come back by itself in the public failures
(BigScience/LUMI "blowup" runs).
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

TREND_WINDOW = 64  # accepted losses that make the trend
TREND_MIN = 16  # losses before a z-score is worth anything
HIGH_Z = 6.0  # robust standard deviations above the trend
SCALE_FLOOR = 0.005  # of the trend: a memorised stretch must not make every step an outlier
SPIKE_STEPS = 3  # fewer high steps in a row are a bad batch, not a spike; as many normal ones end it
GIVEN_BACK = 0.2  # share of the progress made since the start that a diverged loss has lost again
RISE_FLOOR = 0.3  # nats/token: in the first steps there is little progress to give back
FALLING_BACK = 0.75  # of its peak: an excess that fell below this within one patience is given another
MAX_WAITS = 3  # patience is extended while the loss is falling back, at most to this multiple


@dataclass
class Verdict:
    """Why a pull was stopped; `onset_step` is the first step that its checkpoint should not be trusted from."""

    kind: Literal["nonfinite", "left_trend"]
    step: int
    onset_step: int
    evidence: dict[str, float | str]

    def __str__(self) -> str:
        facts = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.evidence.items())
        return f"diverged at step {self.step} ({self.kind}; left its trend at step {self.onset_step}; {facts})"


@dataclass
class Guard:
    """Feed it every step's loss (nats/token) and gradient norm before the update is applied; `steps` is the budget.

    Constant work per step, no look-ahead; `state()` goes into the checkpoint and `Guard(**state)` continues.
    """

    steps: int
    trend: list[float] = field(default_factory=list)  # last accepted losses
    recent: list[float] = field(default_factory=list)  # last losses, accepted or not
    start: float = math.nan  # loss of the first batch, before any update
    best: float = math.inf  # lowest level reached
    best_step: int = 0
    lost_since: int = -1  # first step whose loss was above `best` by more than is forgiven; -1: the level is not
    lost_peak: float = 0.0  # largest excess over `best` in the present patience
    waits: int = 0
    high_run: int = 0  # high losses in a row
    normal_run: int = 0
    high_since: int = -1  # first step of the present excursion; -1: none
    in_spike: bool = False
    spikes: int = 0
    loss_z: float = 0.0

    @property
    def patience(self) -> int:
        """Steps that a loss may stay away: 2% of the run, at least 16, at most 1,000."""
        return min(max(16, self.steps // 50), 1000)

    @property
    def suspect_since(self) -> int:
        """First step of the present excursion, -1 if the loss is on its trend: checkpoints before it are good."""
        open_since = [s for s in (self.high_since, self.lost_since) if s >= 0]
        return min(open_since, default=-1)

    @property
    def keep_before(self) -> int:
        """Step that a good checkpoint may be needed from before; -1: any will do.

        Until there are losses enough to judge by, only the initial weights are known to be good.
        """
        return self.suspect_since if len(self.recent) >= self.patience // 2 else 0

    @property
    def status(self) -> Literal["healthy", "spiking", "suspect"]:
        if self.lost_since >= 0:
            return "suspect"
        return "spiking" if self.in_spike else "healthy"

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def observe(self, step: int, loss: float, grad_norm: float) -> Verdict | None:
        """The verdict that ends the pull, or None. Call before the update: a non-finite one must not be applied."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            onset = self.suspect_since if self.suspect_since >= 0 else step
            self.loss_z = math.inf
            return Verdict("nonfinite", step, onset, {"loss": str(loss), "grad_norm": str(grad_norm)})
        self._follow_trend(step, loss)
        return self._judge_level(step, loss)

    def _follow_trend(self, step: int, loss: float) -> None:
        """z-score against the accepted losses; an excursion is not accepted, so that it cannot become its own trend."""
        if len(self.trend) < TREND_MIN:
            self.trend.append(loss)
            return
        centre = float(np.median(self.trend))
        scale = 1.4826 * float(np.median(np.abs(np.subtract(self.trend, centre))))
        self.loss_z = (loss - centre) / max(scale, SCALE_FLOOR * abs(centre), 1e-12)
        if self.loss_z > HIGH_Z:
            self.high_run, self.normal_run = self.high_run + 1, 0
            self.high_since = step if self.high_since < 0 else self.high_since
            self.in_spike |= self.high_run >= SPIKE_STEPS
        else:
            self.high_run, self.normal_run = 0, self.normal_run + 1
            self.trend = [*self.trend, loss][-TREND_WINDOW:]
            if self.high_since >= 0 and self.normal_run >= SPIKE_STEPS:
                self.spikes += self.in_spike
                self.in_spike, self.high_since = False, -1

    def _judge_level(self, step: int, loss: float) -> Verdict | None:
        """Has the level, a median over half a patience, given back a fifth of all progress, and does it stay so?"""
        self.recent = [*self.recent, loss][-(self.patience // 2) :]
        level = float(np.median(self.recent))
        if math.isnan(self.start):
            self.start = loss
        if level < self.best:
            self.best, self.best_step = level, step
        if len(self.recent) < self.patience // 2:
            return None
        forgiven = max(RISE_FLOOR, GIVEN_BACK * (self.start - self.best))
        excess = level - self.best
        if excess <= forgiven:
            if self.high_since >= 0 and step - self.high_since >= MAX_WAITS * self.patience:
                # A lasting rise too small to be a divergence (another mixture of data, say) becomes the new trend.
                self.trend, self.high_since, self.in_spike = self.recent[-TREND_MIN:], -1, False
            self.lost_since, self.waits, self.lost_peak = -1, 0, 0.0
            return None
        if self.lost_since < 0:
            # The median lags: the rise began after the lowest loss in its window.
            above = np.subtract(self.recent, self.best) > forgiven
            above[: 0 if above.all() else int(np.argmin(self.recent))] = False
            self.lost_since = step - len(above) + 1 + int(np.argmax(above))
        self.lost_peak = max(self.lost_peak, excess)
        if step - self.lost_since < self.patience * (self.waits + 1):
            return None
        if excess < FALLING_BACK * self.lost_peak and self.waits + 1 < MAX_WAITS:
            self.waits, self.lost_peak = self.waits + 1, excess
            return None
        return self._lost(step, level)

    def at_the_end(self, step: int) -> Verdict | None:
        """The verdict on a pull whose budget ends while its loss is away: it has not returned."""
        return self._lost(step, float(np.median(self.recent))) if self.lost_since >= 0 else None

    def _lost(self, step: int, level: float) -> Verdict:
        evidence: dict[str, float | str] = {"level": level, "best": self.best, "best_step": float(self.best_step)}
        return Verdict("left_trend", step, self.suspect_since, evidence)
