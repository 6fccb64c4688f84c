"""`python -m pretrain.signatures RUNS`: which bug did a pull resume with?

Each leaves its own mark on what is logged anyway. Of AdamW's update, in units of the learning rate, the first ones
after the resumption are known in advance:

- step count back to 0, moments kept: the bias corrections divide a second time, so that the update t steps later is
  sqrt(1 - beta2^t) / (1 - beta1^t) times its size: 2.2 at first with betas .9 and .95, .3 with .9 and .999.
  BigScience's 104B run had the corrections of a first step, [.1, .05], after each resume.
- moments dropped: the first update has every element at +-1, so its RMS is 1 whatever it was, and it falls as more
  gradients average out: u^2 = rho + (1 - rho) (1 - beta1) / (1 + beta1) (1 + beta1^t) / (1 - beta1^t) for gradients
  correlated by rho.
- sampler restarted: the loss goes up and down as it did when the same batches came the first time.
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from scipy import stats

import console
from gacha import fragments, runs
from gacha.runs import Run
from pretrain.siblings import Curve, centred_median, finite

PLANTED = re.compile(r"(forget_moments|forget_count|restart_data)@(\d+)")
KINDS = ("none", "optimizer_dropped", "count_reset", "sampler_restarted")
BEFORE = 20
"""Updates before the resumption whose update RMS is the usual one."""
AFTER = 15
"""Updates after it in which Adam's state shows."""
BETA2 = (0.9, 0.95, 0.98, 0.99, 0.999)
MORE = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
"""Correlation that gradients of the first steps may have beyond that of the usual update, as a share of the rest."""
NOISE = 0.05
"""Least sd of the update RMS's logarithm around its trend."""
SURE = 3.0
"""Sd that it must be away from its trend, averaged over the first updates, to be no healthy resumption."""
REPEATED = 20
"""Updates that must be logged after the resumption to recognise the batches of an earlier time."""
LONGEST = 300
"""Of them that are compared."""
CHANCE = 1e-4
"""Probability below which a correlation with an earlier time is none of chance's, over all times looked at."""


@dataclass(frozen=True)
class SignaturesConfig:
    """Say of each pull which resume bug it shows, from loss and update RMS around the update it was resumed at."""

    runs: tyro.conf.Positional[str]
    """folder of offline W&B runs"""
    resumed_at: int = 0
    """updates done before the resumption; 0: where a pull's later fragment begins or its planted fault says, or else
    where the others were resumed"""
    json: bool = False
    """print the result as one JSON object"""


def main(argv: Sequence[str]) -> int:
    """Print every pull's signature and how often which was taken for which."""
    c = console.parse(SignaturesConfig, argv, "python -m pretrain.signatures")
    pulls = [run for run in runs.read(c.runs) if run.job_type == "pretrain" and "train/loss" in run.history]
    known = {run.id: c.resumed_at or resumed_at(run) for run in pulls}
    others = sorted({at for at in known.values() if at})
    if not others:
        raise console.UserError(f"{c.runs}: no pull says where it was resumed: give --resumed_at UPDATE")
    told = []
    for run in pulls:
        for at in [known[run.id]] if known[run.id] else others:
            found = of_run(run, at)
            told.append({"run_id": run.id, "name": run.name, "resumed_at": at, "fault": planted(run)[0], **found})
    table: dict[str, dict[str, int]] = {}
    for row in told:
        counts = table.setdefault(row["fault"], dict.fromkeys(KINDS, 0))
        counts[row["kind"]] += 1
    if c.json:
        console.print_result({"pulls": told, "table": table}, as_json=True)
        return 0
    for row in told:
        print(f"{row['name']:<24} resumed at {row['resumed_at']:>6}  {row['kind']:<18} {said(row['evidence'])}")
    width = max(len("fault"), *map(len, table))
    print(f"\n{'fault':<{width}}  " + "  ".join(f"{kind:>18}" for kind in KINDS))
    for fault, counts in sorted(table.items()):
        print(f"{fault:<{width}}  " + "  ".join(f"{counts[kind]:>18}" for kind in KINDS))
    return 0


def planted(run: Run) -> tuple[str, int]:
    """The resume bug that was planted in a pull and the updates done before it; `none` and 0 without one."""
    fault = PLANTED.search(str(run.config.get("fault") or ""))
    return (fault[1], int(fault[2])) if fault else ("none", 0)


def resumed_at(run: Run) -> int:
    """Updates done when a pull was resumed, by its planted fault or its last fragment; 0 if neither says."""
    steps = fragments.read_fragment(run.paths[-1]).steps.tolist() if len(run.paths) > 1 else []
    return planted(run)[1] or max(0, min(steps, default=0) - 1)


def of_run(run: Run, at: int) -> dict[str, Any]:
    """`signature` of a pull's history; what it has not logged is NaN."""
    loss = run.history["train/loss"]

    def aligned(metric: str) -> np.ndarray:
        series = run.history.get(metric)
        values = dict(zip(series.step.tolist(), series.value.tolist(), strict=True)) if series else {}
        return np.array([values.get(step, math.nan) for step in loss.step.tolist()])

    betas = [run.config.get(name) for name in ("beta1", "beta2")]
    beta1, beta2 = (beta if isinstance(beta, float) else None for beta in betas)
    norms, rms = aligned("stability/grad_norm"), aligned("stability/update_rms")
    return signature(loss.step, loss.value, norms, rms, at, beta1=beta1, beta2=beta2)


def signature(
    step: np.ndarray,
    loss: np.ndarray,
    grad_norm: np.ndarray,
    update_rms: np.ndarray,
    resumed_at: int,
    *,
    beta1: float | None = None,
    beta2: float | None = None,
) -> dict[str, Any]:
    """`kind`, one of KINDS, and `evidence` for it; arrays of one length, NaN where nothing was logged.

    `step` counts updates done, so rows with step > resumed_at came after the resumption. Unknown betas are taken from
    the usual ones, whichever fit.
    """
    step = np.asarray(step, dtype=np.float64)
    evidence: dict[str, Any] = {"resumed_at": resumed_at}
    adam = adam_state(step, np.asarray(update_rms, dtype=np.float64), resumed_at, beta1, beta2)
    evidence |= adam | repetition(Curve("", step, np.asarray(loss, dtype=np.float64)), resumed_at)
    for name, values in (("loss", loss), ("grad_norm", grad_norm)):
        evidence[f"{name}_ratio"] = jump(step, np.asarray(values, dtype=np.float64), resumed_at)
    kind = evidence.pop("adam")
    if kind == "none" and evidence["repeats_from"] is not None:
        kind = "sampler_restarted"
    return {"kind": kind, "evidence": evidence}


def count_reset(t: np.ndarray, before: int, beta1: float, beta2: float) -> np.ndarray:
    """Size of the update t steps after Adam's count went from `before` back to 0, relative to the usual.

    Each moment holds 1 - beta^(before + t) of what it is an average of, and is divided by 1 - beta^t.
    """
    first, second = ((1 - beta ** (before + t)) / (1 - beta**t) for beta in (beta1, beta2))
    return first / np.sqrt(second)


def moments_dropped(t: np.ndarray, rho: float, beta1: float) -> np.ndarray:
    """RMS of the update t steps after both moments were dropped, gradients being correlated by rho."""
    averaged = (1 - beta1) / (1 + beta1) * (1 + beta1**t) / (1 - beta1**t)
    return np.sqrt(rho + (1 - rho) * averaged)


def adam_state(
    step: np.ndarray, rms: np.ndarray, resumed_at: int, beta1: float | None, beta2: float | None
) -> dict[str, Any]:
    """`adam`: none, optimizer_dropped or count_reset, by which law the update RMS follows after the resumption.

    Without a bug it stays at its usual size or on its trend. update_rms_ratio is of the first logged update to the
    usual one, update_rms itself; misfit are root mean squares of log ratios to each law. The laws differ in the first
    ten updates, so a log of every tenth tells nothing.
    """
    logged = np.isfinite(rms) & (rms > 0)
    before = (step > resumed_at - BEFORE) & (step <= resumed_at) & logged
    here = (step > resumed_at) & (step <= resumed_at + AFTER) & logged
    if before.sum() < 4 or here.sum() < 2:
        return {"adam": "none", "update_rms": None, "update_rms_ratio": None, "misfit": None}
    t, b1 = step[here] - resumed_at, beta1 or 0.9
    line = np.polynomial.Polynomial.fit(step[before], np.log(rms[before]), 1)
    noise = max(NOISE, 1.4826 * float(np.median(np.abs(np.log(rms[before]) - line(step[before])))))
    usual, got = float(np.median(np.log(rms[before][-5:]))), np.log(rms[here])
    healthy = [np.full(len(t), usual), line(step[here])]
    # What is correlated over a whole memory is so over the first steps too, and more than that.
    averaged = (1 - b1) / (1 + b1)
    least = max(0.0, (math.exp(2 * usual) - averaged) / (1 - averaged))
    rhos = [least + more * (1 - least) for more in MORE]
    factors = [np.log(count_reset(t, resumed_at, b1, b)) for b in ([beta2] if beta2 else BETA2)]
    laws = {
        "none": healthy,
        "optimizer_dropped": [np.log(moments_dropped(t, rho, b1)) for rho in rhos],
        "count_reset": [base + factor for base in healthy for factor in factors],
    }
    misfit = {kind: min(float(np.sqrt(np.mean((got - law) ** 2))) for law in curves) for kind, curves in laws.items()}
    best = "none" if misfit["none"] < SURE * noise else min(misfit, key=misfit.__getitem__)
    first = math.exp(got[0])
    return {"adam": best, "update_rms": first, "update_rms_ratio": first / math.exp(usual), "misfit": misfit}


def repetition(curve: Curve, resumed_at: int) -> dict[str, Any]:
    """`repeats_from`: the step whose batches came again after the resumption, None if none is recognised.

    The loss less its trend is mostly the batch's own difficulty, which is still there when the batch comes again: it is
    correlated with itself at every earlier time (`correlation`; `p` is for all of them together). `drop` is how many
    nats batches that come again are below the line through the updates before, their difficulty counted: what was
    remembered of them. None without repetition.
    """
    nothing = {"repeats_from": None, "correlation": None, "p": None, "drop": None}
    curve = finite(curve)
    every = float(np.median(np.diff(curve.step))) if len(curve.step) > 1 else 1.0
    start = int(np.searchsorted(curve.step, resumed_at, side="right"))
    n = min(start, len(curve.step) - start, LONGEST)
    if n < REPEATED:
        return nothing
    parts = curve.loss[:start], curve.loss[start:]
    window = max(5, min(21, n // 4 | 1))
    old, new = (part - centred_median(part, window) for part in parts)
    # Heavy tails: ranks, so that one hard batch on either side decides nothing.
    new = stats.rankdata(new[:n])
    best, at = -1.0, 0
    tried = start - n + 1
    for first in range(tried):
        r = float(np.corrcoef(new, stats.rankdata(old[first : first + n]))[0, 1])
        if r > best:
            best, at = r, first
    p = min(1.0, tried * float(stats.norm.sf(math.atanh(min(best, 1 - 1e-12)) * math.sqrt(n - 3))))
    if p >= CHANCE:
        return nothing | {"correlation": best, "p": p}
    begin, there = start - 2 * REPEATED, slice(start, start + REPEATED)
    line = np.polynomial.Polynomial.fit(curve.step[max(0, begin) : start], curve.loss[max(0, begin) : start], 1)
    drop = float(np.median(line(curve.step[there]) + old[at : at + REPEATED] - curve.loss[there]))
    return {"repeats_from": int(curve.step[at] - every), "correlation": best, "p": p, "drop": drop}


def jump(step: np.ndarray, values: np.ndarray, resumed_at: int) -> float | None:
    """The largest of the AFTER updates after the resumption over the median of those before; None if not logged."""
    before = values[(step > resumed_at - BEFORE) & (step <= resumed_at) & np.isfinite(values)]
    after = values[(step > resumed_at) & (step <= resumed_at + AFTER) & np.isfinite(values)]
    if not len(before) or not len(after) or not np.median(before):
        return None
    return float(after.max() / np.median(before))


def said(evidence: dict[str, Any]) -> str:
    """The evidence that decides, in one line."""
    ratio, r = evidence["update_rms_ratio"], evidence["correlation"]
    parts = [f"update RMS x {ratio:.2f}"] if ratio else ["no update RMS around it"]
    if r is not None:
        again = evidence["repeats_from"]
        parts.append(f"batches correlated by {r:.2f} with earlier ones")
        if again is not None:
            parts.append(f"those from update {again} on, {evidence['drop']:+.3f} nats below its line")
    return ", ".join(parts)


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
