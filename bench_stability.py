"""`python bench_stability.py`: the guard and three published rules on 200 seeded synthetic curves.

Half of the curves are healthy, recovered spikes among them, half diverge from a known step on. A rule finds a
divergence if its first alarm comes no earlier than that step; an alarm before, or on a healthy curve, is a false one.
The rules were made to skip or to count spikes, not to end a run. So each is read as generously as it can be: a
non-finite loss is an alarm, and of the numbers of flagged steps in a row that are taken for a divergence each rule has
the one that serves it best on curves of other seeds: the most divergences found less false alarms, and again the most
found where no more than 1% of the healthy runs may be ended, as the guard has to.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import console
from pretrain.stability import Guard

HEALTHY = (
    "plain",
    "small batches",
    "heavy tails",
    "learning rate steps",
    "cosine",
    "warm-up bump",
    "another mixture",
    "easier mixture",
    "resumption",
    "bad batches",
    "fast spikes",
    "slow spike",
    "memorised",
    "converged",
    "epochs",
)
DIVERGING = (
    "nonfinite",
    "explodes to nan",
    "spike, settles high",
    "climbs",
    "slow drift",
    "forgets",
    "oscillates",
    "forewarned",
)
SHORTEST, LONGEST = 500, 20_000  # steps
LATEST = 0.9  # share of the run by which a divergence has begun
IN_A_ROW = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 64)  # flagged steps that may be taken for a divergence
ALLOWED = 0.01  # of the healthy runs, with a false alarm
DEV_SEED, SEED = 1000, 5  # the rules are read on curves of the first, and measured on those of the second


@dataclass(frozen=True)
class Config:
    """Divergence detectors side by side."""

    curves: int = 200
    """half of them diverge"""
    seed: int = SEED
    """of the measured curves"""
    json: bool = False
    """print the entries as one JSON list"""


class Synthetic(NamedTuple):
    """A run that was never trained; `onset` is the step it diverges from, None if it is healthy."""

    kind: str
    loss: np.ndarray
    grad_norm: np.ndarray
    onset: int | None


# --- curves ---------------------------------------------------------------------------------------------------------
def noise_of(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Per-step noise of a loss: normal, correlated from step to step, or heavy-tailed, with an sd of .01 to .15."""
    sd, kind = float(np.exp(rng.uniform(math.log(0.01), math.log(0.15)))), rng.integers(3)
    if kind == 0:
        return rng.normal(0, sd, steps)
    if kind == 1:
        white, out, keep = rng.normal(0, sd, steps), np.empty(steps), float(rng.uniform(0.2, 0.8))
        last = 0.0
        for i, value in enumerate((white * math.sqrt(1 - keep**2)).tolist()):
            out[i] = last = keep * last + value
        return out
    return np.abs(rng.standard_t(float(rng.uniform(2.5, 5)), steps)) * sd / 2 + rng.normal(0, sd / 2, steps)


def learning(rng: np.random.Generator, steps: int) -> np.ndarray:
    """A power law from ln(vocabulary) to 1.8 to 3.5 nats, without noise."""
    start, end, power = rng.uniform(7, 12), rng.uniform(1.8, 3.5), rng.uniform(0.4, 0.9)
    speed = float(np.exp(rng.uniform(math.log(50), math.log(2000))))
    return end + (start - end) * (1 + speed * np.arange(steps) / steps) ** -power


def gradients(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Norms that fall at first and then wander, with a log-normal scatter and one outlier in some hundreds."""
    level = rng.uniform(0.2, 0.6) + 2 * np.exp(-np.arange(steps) / (steps / 40))
    norms = level * np.exp(rng.normal(0, rng.uniform(0.05, 0.25), steps))
    hit = rng.random(steps) < 1 / rng.uniform(200, 2000)
    norms[hit] *= rng.uniform(2, 8, int(hit.sum()))
    return norms


def healthy(kind: str, rng: np.random.Generator) -> Synthetic:
    steps = int(np.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
    base = learning(rng, steps)
    noise, norms = noise_of(rng, steps), gradients(rng, steps)
    at = int(rng.uniform(0.2, LATEST) * steps)
    later = np.arange(steps - at)
    if kind == "small batches":
        noise = rng.normal(0, rng.uniform(0.15, 0.4), steps)
    elif kind == "heavy tails":
        noise = rng.standard_t(rng.uniform(2, 3), steps) * rng.uniform(0.03, 0.1)
    elif kind == "learning rate steps":
        for where in np.sort(rng.uniform(0.2, LATEST, 3)):
            after = np.arange(steps - int(where * steps))
            base[int(where * steps) :] -= rng.uniform(0.05, 0.3) * (1 - np.exp(-after / (steps / 100)))
    elif kind == "cosine":
        base -= rng.uniform(0.1, 0.4) * (1 - np.cos(np.pi * np.arange(steps) / steps)) / 2
    elif kind == "warm-up bump":
        width = steps * rng.uniform(0.005, 0.02)
        base += rng.uniform(0.2, 0.8) * np.exp(-(((np.arange(steps) - 2.5 * width) / width) ** 2))
    elif kind == "another mixture":
        base[at:] += rng.uniform(0.05, 0.3) * (base[0] - base[at])
    elif kind == "easier mixture":
        base[at:] -= rng.uniform(0.05, 0.3) * base[at]
    elif kind == "resumption":
        size, width = rng.uniform(0.1, 1.0), rng.uniform(3, 10) + steps / 400
        base[at:] += size * np.exp(-later / width)
        norms[at:] *= 1 + 3 * np.exp(-later / width)
    elif kind == "bad batches":
        hit = rng.choice(np.arange(20, steps), max(3, steps // 200), replace=False)
        noise[hit] += rng.uniform(0.5, 5, len(hit))
        norms[hit] *= rng.uniform(1, 20, len(hit))
    elif kind == "fast spikes":
        for where in rng.uniform(0.1, 0.95, 4):
            begin, long = int(where * steps), int(rng.integers(3, 9))
            noise[begin : begin + long] += rng.uniform(0.5, 4)
            norms[begin : begin + long] *= rng.uniform(3, 30)
    elif kind == "slow spike":
        at = int(rng.uniform(0.2, 0.8) * steps)
        later = np.arange(steps - at)
        width = max(6.0, steps * rng.uniform(0.002, 0.02))
        base[at:] += rng.uniform(0.5, 1.0) * (base[0] - base[at]) * np.exp(-later / width)
        norms[at:] *= 1 + 10 * np.exp(-later / width)
    elif kind == "memorised":
        base[at:] *= np.exp(-later / (steps / 10))
        noise[at:] *= np.exp(-later / (steps / 10))
        base += 0.05
    elif kind == "converged":
        base = np.full(steps, rng.uniform(1.5, 4.0)) - 0.05 * np.arange(steps) / steps
    elif kind == "epochs":
        for where in (0.25, 0.5, 0.75):
            base[int(where * steps) :] -= rng.uniform(0.05, 0.25)
    return Synthetic(kind, np.maximum(base + noise, 0.0), norms, None)


def diverging(kind: str, rng: np.random.Generator) -> Synthetic:
    steps = int(np.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
    base = learning(rng, steps)
    noise, norms = noise_of(rng, steps), gradients(rng, steps)
    at = int(rng.uniform(0.05, LATEST) * steps)
    later = np.arange(steps - at)
    learned = float(base[0] - base[at])
    rough = np.where(np.arange(steps) >= at, rng.uniform(1, 5), 1.0)  # a lost run is often louder
    high = rng.uniform(0.4, 1.1) * learned
    away = np.zeros(len(later))
    if kind == "nonfinite":
        away[:] = math.nan
    elif kind == "explodes to nan":
        away = 0.1 * np.exp(np.minimum(later / rng.uniform(2, 10), 20))
        away[away > 1e4] = math.nan
    elif kind == "spike, settles high":
        away = high + rng.uniform(0.3, 1.0) * learned * np.exp(-later / (2 + steps * rng.uniform(0.001, 0.005)))
    elif kind == "climbs":
        away = high * np.minimum(1.0, later / (2 + steps * rng.uniform(0.001, 0.01)))
    elif kind == "slow drift":
        away = high * np.minimum(1.0, later / (steps * rng.uniform(0.03, 0.1)))
    elif kind == "forgets":
        away = 0.8 * base[0] - base[at:] + rng.normal(0, 0.1, len(later))
    elif kind == "oscillates":
        wave = np.sin(2 * np.pi * later / max(8.0, steps * rng.uniform(0.002, 0.01)))
        away = high * (1 - np.exp(-later / (1 + steps / 1000))) * (1 + 0.5 * wave)
    elif kind == "forewarned":
        lead = min(int(rng.integers(4, 30)), at)
        norms[at - lead :] *= np.minimum(20.0, 3 * 1.3 ** np.minimum(np.arange(steps - at + lead), 30))
        away = high * np.minimum(1.0, later / (1 + steps * rng.uniform(0.0005, 0.005)))
    norms[at:] *= 1 + 4 * np.minimum(1.0, np.nan_to_num(away, nan=9.0) / learned)
    loss = np.maximum(base + noise * rough, 0.0)
    loss[at:] += away
    onset = at
    if kind == "explodes to nan":  # it cannot be known before it is out of the noise
        onset = at + int(np.argmax(away > 0.3))
    return Synthetic(kind, loss, norms, onset)


def curves(count: int, seed: int) -> list[Synthetic]:
    """Half healthy, half diverging, each kind in turn."""
    made = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        if number % 2:
            made.append(diverging(DIVERGING[number // 2 % len(DIVERGING)], rng))
        else:
            made.append(healthy(HEALTHY[number // 2 % len(HEALTHY)], rng))
    return made


# --- rules ----------------------------------------------------------------------------------------------------------
def before(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, unbiased standard deviation and number of the up to `window` values before each."""
    centred = values - values[0]
    sums, squares = (np.concatenate(([0.0], np.cumsum(x))) for x in (centred, centred**2))
    at = np.arange(len(values))
    begin = np.maximum(0, at - window)
    n = np.maximum(at - begin, 1)
    mean = (sums[at] - sums[begin]) / n
    variance = np.maximum((squares[at] - squares[begin]) - n * mean**2, 0.0) / np.maximum(n - 1, 1)
    return mean + values[0], np.sqrt(variance), at - begin


def far_above(values: np.ndarray, window: int, least: int, sds: float) -> np.ndarray:
    mean, sd, n = before(values, window)
    return (n >= least) & (values - mean > sds * sd)


def olmo_core(one: Synthetic) -> np.ndarray:
    """OLMo-core's SkipStepOptimizer: loss or gradient norm over 6 sd of the last 128, once there are 64."""
    return far_above(one.loss, 128, 64, 6.0) | far_above(one.grad_norm, 128, 64, 6.0)


def olmo_2(one: Synthetic) -> np.ndarray:
    """OLMo 2 (arXiv 2501.00656): a loss or gradient norm 7 sd above the average of the last 1,000 is a spike."""
    return far_above(one.loss, 1000, 128, 7.0) | far_above(one.grad_norm, 1000, 128, 7.0)


def kill_loss_spike(one: Synthetic) -> np.ndarray:
    """llm-foundry's KillLossSpike without its patience: twice the running mean, or too long above its cap.

    The window is 5% of the run, at least 100 steps. Too long: after two windows, half of one is above the largest loss
    of the first window, which is taken for 10 where it is larger, as a loss of more is not learning.
    """
    window = max(100, len(one.loss) // 20)
    mean, _, n = before(one.loss, window)
    cap = min(float(one.loss[:window].max()), 10.0)
    over = np.concatenate(([0], np.cumsum(one.loss >= cap)))
    at = np.arange(1, len(one.loss) + 1)
    long = (over[at] - over[np.maximum(0, at - window)] >= window / 2) & (at >= 2 * window)
    return ((n >= window) & (one.loss >= 2 * mean)) | long


RULES: dict[str, Callable[[Synthetic], np.ndarray]] = {
    "OLMo-core's 6 sd over 128": olmo_core,
    "OLMo 2's 7 sd over 1,000": olmo_2,
    "MosaicML's KillLossSpike": kill_loss_spike,
}


def first_run(flags: np.ndarray, in_a_row: int) -> int | None:
    """The step at which so many steps in a row are flagged."""
    sums = np.concatenate(([0], np.cumsum(flags)))
    full = np.flatnonzero(sums[in_a_row:] - sums[:-in_a_row] == in_a_row)
    return int(full[0]) + in_a_row - 1 if len(full) else None


def alarms(rule: Callable[[Synthetic], np.ndarray], made: list[Synthetic]) -> dict[int, list[int | None]]:
    """For each number of flagged steps in a row: every curve's first alarm."""
    found: dict[int, list[int | None]] = {k: [] for k in IN_A_ROW}
    for one in made:
        finite = np.isfinite(one.loss)
        ends = len(finite) if finite.all() else int(np.argmin(finite))
        cut = Synthetic(one.kind, one.loss[:ends], one.grad_norm[:ends], one.onset)
        flags = rule(cut) if ends else np.zeros(0, bool)
        for k in IN_A_ROW:
            step = first_run(flags, k)
            found[k].append(ends if step is None and ends < len(finite) else step)
    return found


def guard_alarm(one: Synthetic) -> int | None:
    guard = Guard(len(one.loss))
    for step, (loss, norm) in enumerate(zip(one.loss.tolist(), one.grad_norm.tolist(), strict=True)):
        if guard.observe(step, loss, norm):
            return step
    end = guard.at_the_end(len(one.loss))
    return len(one.loss) - 1 if end else None


# --- figures ----------------------------------------------------------------------------------------------------------
class Figures(NamedTuple):
    """Shares: of divergences found, of healthy curves with an alarm, and of the run that the median alarm is late.

    A divergence that is not found is as late as the run is long from there on.
    """

    recall: float
    false_alarms: float
    delay: float
    mistakes: list[str]


def figures(made: list[Synthetic], alarm: list[int | None]) -> Figures:
    found, false, delays, mistakes = 0, 0, [], []
    lost = sum(one.onset is not None for one in made)
    for number, (one, step) in enumerate(zip(made, alarm, strict=True)):
        steps = len(one.loss)
        if one.onset is None:
            false += step is not None
            if step is not None:
                mistakes.append(f"{number} {one.kind} ({steps} steps): alarm at {step}")
            continue
        hit = step is not None and step >= one.onset
        found += hit
        delays.append(((step if hit and step is not None else steps) - one.onset) / steps)
        if not hit:
            mistakes.append(f"{number} {one.kind} ({steps} steps) from {one.onset}: {step}")
    return Figures(found / lost, false / (len(made) - lost), float(np.median(delays)), mistakes)


def measure(c: Config) -> tuple[Figures, dict[str, tuple[Figures, Figures]]]:
    """Ours, and each rule's: at its best number of flagged steps in a row, and at its best with few false alarms."""
    development, made = curves(c.curves, DEV_SEED), curves(c.curves, c.seed)
    ours = figures(made, [guard_alarm(one) for one in made])
    peers = {}
    for name, rule in RULES.items():
        tried = {k: figures(development, found) for k, found in alarms(rule, development).items()}
        best = max(tried, key=lambda k: tried[k].recall - tried[k].false_alarms)
        careful = min(tried, key=lambda k: (max(tried[k].false_alarms, ALLOWED), -tried[k].recall))
        measured = alarms(rule, made)
        peers[name] = (figures(made, measured[best]), figures(made, measured[careful]))
    return ours, peers


def main() -> int:
    c = console.parse(Config, sys.argv[1:], "python bench_stability.py")
    if c.curves < 2 * len(HEALTHY) or c.seed < 0:
        raise console.UserError(
            f"--curves {c.curves} --seed {c.seed}: give {2 * len(HEALTHY)} or more, and no negative"
        )
    ours, peers = measure(c)
    for line in ours.mistakes:
        print(f"the guard: curve {line}", file=sys.stderr)
    if c.json:
        entries: list[dict[str, Any]] = []
        for name, (best, careful) in peers.items():
            left = 100 * (1 - ours.false_alarms), 100 * (1 - best.false_alarms)
            late = 100 * ours.delay, 100 * careful.delay
            entries += [
                entry(f"divergences found, against {name}", 100 * ours.recall, 100 * best.recall, "%"),
                entry(f"healthy runs left alone, against {name}", *left, "%"),
                entry(f"median delay, against {name} with few false alarms", *late, "% of the run", less=True),
            ]
        print(json.dumps(entries, ensure_ascii=False))
        return 0
    rows = {"the guard": ours}
    for name, (best, careful) in peers.items():
        rows |= {name: best, f"{name}, few false alarms": careful}
    width = max(map(len, rows))
    print(f"{f'{c.curves} curves':<{width}}  recall  false alarms  median delay")
    for name, one in rows.items():
        print(f"{name:<{width}}  {one.recall:>6.1%}  {one.false_alarms:>12.1%}  {one.delay:>12.2%}")
    return 0


def entry(name: str, ours: float, peer: float, unit: str, less: bool = False) -> dict[str, Any]:
    """An entry of bench.json; where `less` is better the ratio is the peer's figure over ours."""
    above, below = (peer, ours) if less else (ours, peer)
    return {
        "name": f"guard: {name}",
        "ours": float(f"{ours:.6g}"),
        "peer": float(f"{peer:.6g}"),
        "ratio": round(above / max(below, 1e-9), 4),
        "unit": unit,
    }


if __name__ == "__main__":
    console.door(main)
