"""The guard: says online whether a pull is healthy, spiking or lost, and keeps what happened to it as events.

It hears of every update's loss (nats/token) and gradient norm and, when they are logged, of the update RMS and the
largest attention logit. Divergence here is a loss that leaves its trend and does not return, or is not finite. "Leaves"
is measured in what the pull had learned, not in sigmas: a 6-sigma rule fires on healthy runs at every bad batch,
whereas a loss that stays above its own best by a fifth of all progress made so far, and is not on its way down, has
never come back by itself in the public failures (BigScience/LUMI "blowup" runs). The one exception is another mixture
of data: a clean step to a new level, as quiet as the old one and worth less than two fifths of what was learned.

`python -m pretrain.stability CURVE.csv` judges any exported curve (pretrain/curve.py).
"""

import math
import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

import console
from pretrain.trend import LENGTH, LENGTH_MIN, Facts, Signals, Window

HIGH_Z = 6.0  # robust standard deviations above the trend
SCALE_FLOOR = 0.005  # of the trend: a memorised stretch must not make every step an outlier
SPIKE_STEPS = 3  # fewer high steps in a row are a bad batch, not a spike; as many normal ones end it
GIVEN_BACK = 0.2  # share of the progress made since the start that a diverged loss has lost again
RISE_FLOOR = 0.3  # nats/token: in the first steps there is little progress to give back
NOISE = 1.0  # nats/token of noise that are forgiven at most: the first losses fall too fast to tell
FIRST_RISE = 0.7  # nats/token above the first loss that an untrained model is forgiven on top of that
FIRST_DROP = 3.0  # nats/token of progress that the first two updates can count for
SHIFT = 0.4  # share of the progress that another mixture of data may cost
FALLING = 0.05  # of its excess that a loss on its way back loses from one half of a patience to the other
LONGEST = 6  # patiences that a falling loss is waited for; twice as many once half of its peak is gone
DRIFT = 0.05  # share of the progress whose slow loss is worth an event
LIMIT_Z, LIMIT_SHARE, LIMIT_FACTOR = 8.0, 0.1, 4.0  # what one update may have: sds, share of the progress, x gradient
STUCK, STUCK_START, STUCK_STEPS = 0.9, 6.0, 200  # of a start above 6 nats; no trained model is as bad
MAX_EVENTS = 200


@dataclass
class Event:
    """What happened from `step` on; `recovered_step` is None while it lasts.

    kind: nonfinite, outlier (a step or two), spike, divergence, not_learning, drift (a slow rise), level_shift (another
    mixture), warning (a signal out of its trend while the loss is on its own). `warn_step`: when a signal of this event
    came first, as BLOOM's gradient norm did four steps before its loss.
    """

    step: int
    kind: str
    warn_step: int | None = None
    recovered_step: int | None = None
    evidence: Facts = field(default_factory=dict)


@dataclass
class Verdict:
    """Why a pull was stopped; `onset_step` is the first step that its checkpoint should not be trusted from."""

    kind: Literal["nonfinite", "divergence", "not_learning"]
    step: int
    onset_step: int
    evidence: Facts

    def __str__(self) -> str:
        facts = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.evidence.items())
        return f"diverged at step {self.step} ({self.kind}; left its trend at step {self.onset_step}; {facts})"


@dataclass
class Guard:
    """Feed it every step's loss and gradient norm before the update is applied; `steps` is the budget.

    Constant work per step, no look-ahead; `state()` goes into the checkpoint and `Guard(**state)` continues.
    """

    steps: int
    seen: int = 0
    first: list[float] = field(default_factory=list)  # the first three losses
    trend: list[float] = field(default_factory=list)  # last accepted losses
    recent: list[float] = field(default_factory=list)  # losses of the last patience
    longer: list[float] = field(default_factory=list)  # losses of the last two patiences or more, for the level
    signals: Signals = field(default_factory=Signals)
    best: float = math.inf  # lowest level reached
    best_step: int = 0
    shifted: float = 0.0  # what other mixtures have cost since, and learning has not made good
    lost_since: int = -1  # first step of the present stretch above what is forgiven; -1: the level is not
    lost_count: int = 0  # losses heard in it
    lost_peak: float = 0.0  # its largest excess
    lost_first: float = 0.0  # the mean loss of its first steps
    above: list[float] = field(default_factory=list)  # last losses in a row above what is forgiven, at most SPIKE_STEPS
    above_since: int = -1  # their first step
    high_run: int = 0  # high losses in a row
    normal_run: int = 0
    high_since: int = -1  # first step of the present excursion; -1: none
    high_count: int = 0  # losses heard in it
    high_peak: float = 0.0  # its largest excess over the trend
    high_z: float = 0.0
    in_spike: bool = False
    spikes: int = 0
    loss_z: float = 0.0
    lr: float | None = None
    drift_since: int = -1
    drift_count: int = 0
    mark: float = math.inf  # level at the last look for learning
    mark_at: int = 0  # losses heard at that look
    finite_run: int = SPIKE_STEPS
    told: bool = False  # a verdict on the present stretch has been given
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.events = [Event(**one) if isinstance(one, dict) else one for one in self.events]
        self.signals = Signals(**self.signals) if isinstance(self.signals, dict) else self.signals
        self._trend = Window(self.trend)
        self._recent = Window(self.recent, self.patience)
        self._longer = Window(self.longer, min(max(2 * self.patience, 16), 500))

    @property
    def patience(self) -> int:
        """Steps that a loss may stay away without falling: half a percent of the run, at least 12, at most 500."""
        return min(max(12, self.steps // 200), 500)

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
        return self.suspect_since if self.seen >= self.patience else 0

    @property
    def status(self) -> Literal["healthy", "spiking", "suspect"]:
        if self.lost_since >= 0:
            return "suspect"
        return "spiking" if self.in_spike else "healthy"

    @property
    def start(self) -> float:
        """Loss of the untrained model, less what the first update mends of a huge one."""
        return min(self.first[0], sorted(self.first)[len(self.first) // 2] + FIRST_DROP) if self.first else math.nan

    @property
    def progress(self) -> float:
        """Nats learned so far."""
        return max(0.0, self.start - self.best) if self.first else 0.0

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def limits(self) -> tuple[float, float]:
        """Loss and gradient norm above which the next update is more than noise; inf while there is no trend yet."""
        loss = math.inf
        if len(self.trend) >= 2 * LENGTH_MIN:
            loss = self._trend.median + max(LIMIT_Z * self._scale(), LIMIT_SHARE * max(1.0, self.progress))
        return loss, self.signals.limit("grad_norm", LIMIT_Z, LIMIT_FACTOR)

    def observe(
        self,
        step: int,
        loss: float,
        grad_norm: float | None,
        *,
        update_rms: float | None = None,
        max_logit: float | None = None,
        lr: float | None = None,
    ) -> Verdict | None:
        """The verdict that ends the pull, once, or None. Call before the update: a non-finite one must not be applied.

        A resumed or lowered learning rate needs no hint: `lr` only goes into the evidence.
        """
        if not (math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm))):
            return self._not_finite(step, loss, grad_norm)
        if self.finite_run < SPIKE_STEPS:
            self.finite_run += 1
            if self.finite_run == SPIKE_STEPS:
                self._recover("nonfinite", step)
        self.seen += 1
        if len(self.first) < 3:
            self.first.append(loss)
            if self.seen == 1:
                self.best, self.best_step = loss + FIRST_RISE, step
        self.lr = lr
        self._follow_trend(step, loss)
        self._follow_signals(step, {"grad_norm": grad_norm, "update_rms": update_rms, "max_logit": max_logit})
        return self._judge_level(step, loss) or self._judge_learning(step)

    def at_the_end(self, step: int) -> Verdict | None:
        """The verdict on a pull whose budget ends while its loss is away: it has not returned."""
        if self.lost_since < 0 or self.told or self._recent.median <= self._forgiven():
            return None
        if self._fall()[1] and self._recent.median - self._level < self.lost_peak / 2:
            return None
        return self._lost(step)

    # --- the loss against its trend ------------------------------------------------------------------------------
    def _scale(self) -> float:
        return max(self._trend.scale, SCALE_FLOOR * abs(self._trend.median), 1e-12)

    def _follow_trend(self, step: int, loss: float) -> None:
        """z-score against the accepted losses; an excursion is not accepted, so that it cannot become its own trend."""
        if len(self.trend) < LENGTH_MIN:
            self._trend.push(loss)
            return
        centre = self._trend.median
        self.loss_z = (loss - centre) / self._scale()
        if self.loss_z > HIGH_Z:
            if self.high_since < 0:
                self.high_since, self.high_count, self.high_peak, self.high_z = step, 0, 0.0, 0.0
            self.high_run, self.normal_run = self.high_run + 1, 0
            self.in_spike |= self.high_run >= SPIKE_STEPS
            self.high_peak, self.high_z = max(self.high_peak, loss - centre), max(self.high_z, self.loss_z)
        else:
            self.high_run, self.normal_run = 0, self.normal_run + 1
            self._trend.push(loss)
        if self.high_since < 0:
            return
        self.high_count += 1
        if self.normal_run >= SPIKE_STEPS:
            self._end_excursion(step, "not_wholly" if self.loss_z > HIGH_Z / 2 else "")
        elif self.high_count >= 2 * self.patience and self.lost_since < 0:
            falling = self._fall()[1]
            if not falling or self.high_count >= LONGEST * self.patience:
                # A lasting rise too small to be a divergence becomes the new trend.
                self._adopt(step, "spike" if falling else "level_shift")

    def _end_excursion(self, step: int, how: str) -> None:
        evidence: Facts = {"excess": self.high_peak, "z": self.high_z, "of_progress": self._of_progress(self.high_peak)}
        evidence["steps"] = float(self.high_count - min(self.normal_run, self.high_count - 1))
        if self.in_spike:
            evidence["recovered"] = how or ("fast" if self.high_count <= self.patience else "slowly")
            self.spikes += 1
        kind = "spike" if self.in_spike else "outlier"
        self._record(Event(self.high_since, kind, self._warned(self.high_since), step, evidence))
        self.in_spike, self.high_since, self.high_run = False, -1, 0

    def _of_progress(self, nats: float) -> float:
        return min(nats / max(self.progress, 1e-9), 1e3)

    def _adopt(self, step: int, kind: str) -> None:
        """Take the level of the last patience as the trend; `best` keeps what was reached, `shifted` what it cost."""
        level = self._recent.median
        rise = level - self._trend.median
        since = self.high_since if self.high_since >= 0 else self.lost_since
        if kind == "spike":
            self._end_excursion(step, "not_wholly")
        else:
            evidence: Facts = {"rise": rise, "level": level, "of_progress": self._of_progress(rise)}
            self._record(Event(since, kind, self._warned(since), step, evidence))
        self.shifted = max(self.shifted, level - self.best)
        self._trend.replace(self.recent[-LENGTH_MIN:])
        self.in_spike, self.high_since, self.high_run, self.lost_since, self.above = False, -1, 0, -1, []

    # --- the level against the best -------------------------------------------------------------------------------
    @property
    def _level(self) -> float:
        """The level that the pull should not leave: its best, or that of the mixture that it learns from now."""
        return self.best + self.shifted

    def _forgiven(self) -> float:
        """The highest loss that is not away: a fifth of the progress above the level, beyond its noise."""
        noise = min(2 * self._trend.scale, NOISE) if len(self.trend) >= LENGTH_MIN else 0.0
        return self._level + max(RISE_FLOOR, GIVEN_BACK * self.progress) + noise

    def _fall(self) -> tuple[float, bool]:
        """Nats by which the loss fell from the older half of the last patience to the newer, and whether that is real.

        Real: more than two standard errors and a twentieth of its excess over the level.
        """
        values = np.asarray(self.recent)
        half = len(values) // 2
        older, newer = values[:half], values[half:]
        error = math.sqrt((older.var() + newer.var()) / max(1, half))
        fall = float(older.mean() - newer.mean())
        return fall, fall > max(2 * error, FALLING * (float(older.mean()) - self._level))

    def _judge_level(self, step: int, loss: float) -> Verdict | None:
        """Is the loss above what is forgiven for a patience, and not on its way back?"""
        self._recent.push(loss)
        self._longer.push(loss)
        if self.seen >= min(LENGTH_MIN, self.patience):
            level = self._longer.median
            if level < self.best:
                self.best, self.best_step, self.shifted = level, step, 0.0
            self.shifted = min(self.shifted, max(0.0, level - self.best))
            self._follow_drift(step, level)
        forgiven = self._forgiven()
        self.above_since = step if loss > forgiven and not self.above else self.above_since
        self.above = [*self.above, loss][-SPIKE_STEPS:] if loss > forgiven else []
        if self.lost_since < 0:
            if len(self.above) < SPIKE_STEPS:
                return None
            self.lost_since, self.lost_count, self.lost_peak = self.above_since, SPIKE_STEPS - 1, 0.0
            self.lost_first = sum(self.above) / SPIKE_STEPS
        self.lost_count += 1
        median = self._recent.median
        self.lost_peak = max(self.lost_peak, median - self._level)
        if self.lost_count < self.patience:
            return None
        if median <= forgiven:
            self.lost_since, self.above = -1, []
            if self.told:
                self.told = False
                self._recover("divergence", step)
            return None
        if self.told or len(self.above) < SPIKE_STEPS or self._recent.quantile(0.25) <= forgiven:
            return None
        fall, falling = self._fall()
        gone = median - self._level < self.lost_peak / 2
        if falling and self.lost_count < LONGEST * self.patience * (2 if gone else 1):
            return None
        if self._is_clean_step(fall, falling):
            self._adopt(step, "level_shift")
            return None
        return self._lost(step)

    def _is_clean_step(self, fall: float, falling: bool) -> bool:
        """Did the level step up at once, to stay as quiet as before and level, with gradients as before?"""
        scale, excess = self._scale(), self._recent.median - self._level
        if falling or self._recent.median - self.best > SHIFT * self.progress or len(self.trend) < LENGTH:
            return False
        at_once = abs(self.lost_first - self._recent.median) <= max(3 * scale, excess / 4)
        at_once &= self._recent.median - self._trend.median >= 0.7 * excess
        level = -fall <= max(3 * scale / math.sqrt(len(self.recent) / 2), FALLING * excess)
        quiet = self._recent.scale <= 2 * scale and self.signals.out_run.get("grad_norm", 0) < SPIKE_STEPS
        return at_once and level and quiet

    def _lost(self, step: int) -> Verdict:
        self.told = True
        onset, after = self.suspect_since, "spike" if self.high_since >= 0 else "slow"
        evidence: Facts = {"level": self._recent.median, "best": self.best, "best_step": float(self.best_step)}
        evidence |= {"after": after} | ({} if self.lr is None else {"lr": self.lr})
        self._record(Event(onset, "divergence", self._warned(onset), None, {**evidence, "online_step": float(step)}))
        return Verdict("divergence", step, onset, evidence)

    def _follow_drift(self, step: int, level: float) -> None:
        """An event where the level itself has been rising for two of its windows: too slow for any z-score."""
        noise = 3 * self._trend.scale if len(self.trend) >= LENGTH_MIN else 0.0
        allowed = max(RISE_FLOOR / 3, DRIFT * self.progress, noise)
        if level - self._level > allowed:
            self.drift_since = step if self.drift_since < 0 else self.drift_since
            self.drift_count += 1
            if self.drift_count == 2 * self._longer.size:
                evidence: Facts = {"rise": level - self._level, "level": level, "best": self.best}
                self._record(Event(self.drift_since, "drift", self._warned(self.drift_since), None, evidence))
        elif self.drift_since >= 0 and level - self._level < allowed / 2:
            if self.drift_count >= 2 * self._longer.size:
                self._recover("drift", step)
            self.drift_since, self.drift_count = -1, 0

    def _judge_learning(self, step: int) -> Verdict | None:
        """Looks at a tenth of the budget, a fifth, and so on: still at its start, and no lower than the last time?"""
        due = max(STUCK_STEPS // 2, self.steps // 10) if not self.mark_at else 2 * self.mark_at
        if self.seen < due:
            return None
        before, level = self.mark, self._longer.median
        self.mark, self.mark_at = level, self.seen
        stuck = self.start > STUCK_START and self.best > STUCK * self.start
        if not stuck and any(one.kind == "not_learning" and one.recovered_step is None for one in self.events):
            self.told = False
            self._recover("not_learning", step)
        stuck &= before - level < 0.01 * self.start
        if not stuck or math.isinf(before) or self.told:
            return None
        self.told = True
        evidence: Facts = {"level": level, "start": self.start, "best": self.best}
        self._record(Event(step, "not_learning", None, None, evidence))
        return Verdict("not_learning", step, 0, evidence)

    # --- other signals, events --------------------------------------------------------------------------------------
    def _follow_signals(self, step: int, values: dict[str, float | None]) -> None:
        """Remember when a signal left its trend: it warns of what the loss may do next."""
        facts = self.signals.follow(step, values, self.patience)
        if self.suspect_since >= 0:
            return
        if facts:
            self._record(Event(self.signals.since, "warning", None, None, facts))
        if self.signals.since >= 0 and step - self.signals.last > self.patience:
            self._recover("warning", step)
            self.signals.since = -1

    def _warned(self, since: int) -> int | None:
        return self.signals.since if 0 <= self.signals.since < since else None

    def _not_finite(self, step: int, loss: float, grad_norm: float | None) -> Verdict | None:
        onset = self.suspect_since if self.suspect_since >= 0 else step
        self.loss_z = math.inf
        known, self.finite_run = self.finite_run < SPIKE_STEPS, 0
        if known:
            return None
        evidence: Facts = {"loss": str(loss), "grad_norm": str(grad_norm)}
        self._record(Event(step, "nonfinite", self._warned(step), None, evidence))
        return Verdict("nonfinite", step, onset, evidence)

    def _recover(self, kind: str, step: int) -> None:
        """The last event of this kind is over."""
        for event in reversed(self.events):
            if event.kind == kind:
                event.recovered_step = step if event.recovered_step is None else event.recovered_step
                return

    def _record(self, event: Event) -> None:
        """Memory is bounded: the oldest outlier is forgotten first."""
        self.events.append(event)
        if len(self.events) > MAX_EVENTS:
            oldest = next((i for i, one in enumerate(self.events) if one.kind == "outlier"), 0)
            del self.events[oldest]


if __name__ == "__main__":
    from pretrain import curve

    console.door(lambda: curve.main(sys.argv[1:]))
