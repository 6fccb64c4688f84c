"""`python -m pretrain.stability CURVE.csv`: the verdict on any exported loss curve, read whole.

The whole run is known here, so that a loss that came back has recovered, whatever the guard would have done; the
divergence that it would have stopped at stays in the evidence as `online_step`. Logs of few rows (LUMI's are averages
over 200 steps) are judged row by row against the best level so far, the others by the guard and their last level.
"""

import csv
import glob
import gzip
import math
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

import console
from pretrain import siblings, stability
from pretrain.stability import Event, Guard
from pretrain.trend import Facts

LOSSES = ("loss", "train_loss", "lm_loss", "training_loss")
STEPS = ("step", "_step", "global_step", "iteration", "iterations")
NORMS = ("grad_norm", "gradient_norm", "total_norm")
RATES = ("lr", "learning_rate")
PREFIXES = ("train", "stability", "trainer", "training", "optim")
FEW = 200  # rows; below, a row is an average or a rare sample, and no window is long enough for a guard
SPARSE = 10  # steps between rows, from which on a single row is a long time
BENDS = 6  # second differences that are enough to know the noise by
CERTAIN = 4.5  # standard errors
THIRD = 0.431  # of the absolute values of a standard normal distribution are below
MAD_OF_NORMAL = 0.6745  # median absolute deviation of a standard normal distribution
MOST = 0.75  # of the rows after the lowest one
LUCK = 6.0  # standard deviations that must be learned; half of that, lost: no median of three rows is as low by luck
SMOOTH = 0.015  # noise as a share of the loss, below which rows are averages
STUCK_LEVEL, STUCK_SHARE, STUCK_AFTER = 6.5, 0.64, 1000  # nats, of the start, steps: near the unigrams' entropy
STUCK_EARLY = 0.7  # nats above that level up to 1,000 steps, none from 3,000 on: masked models start on a plateau
REAL = 0.1  # share of the progress that a spike worth a verdict costs
SPIKE_SDS, SPIKE_WINDOW, SPIKE_WINDOW_MIN = 7.0, 1000, 128  # OLMo 2's score
FAR_ABOVE = 0.25  # share of the siblings' progress that a run must lack to have learned nothing


@dataclass(frozen=True)
class CurveConfig:
    curve: tyro.conf.Positional[str]
    """CSV, or CSV.GZ, with columns `step` and `loss`; `grad_norm` and `lr` if there are any"""
    siblings: str | None = None
    """other runs of the recipe or of its data order, as a pattern: tells bad batches from instability"""
    json: bool = False
    """print the verdict as one JSON object"""


class Curve(NamedTuple):
    """Rows in the order of their steps; `loss` in nats/token, NaN or infinite where the row says so.

    `grad_norm` and `lr` are NaN where nothing is known.
    """

    name: str
    step: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    lr: np.ndarray


def main(argv: list[str]) -> int:
    """Read the curve and its siblings, print the verdict."""
    c = console.parse(CurveConfig, argv, "python -m pretrain.stability")
    curve = read(c.curve)
    result = judge(curve)
    if c.siblings is not None:
        own = Path(c.curve).resolve()
        found = sorted(glob.glob(c.siblings, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        paths = [path for path in found if Path(path).resolve() != own]
        if not paths:
            raise console.UserError(f"--siblings {c.siblings}: no other file matches; quote the pattern")
        compare(result, curve, [read(path) for path in paths])
    if c.json:
        console.print_result(result, as_json=True)
        return 0
    print(f"{c.curve}: {result['verdict']}, {len(curve.step):,} rows, spike score {result['spike_score']:.3g}%")
    for event in result["events"]:
        facts = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in event["evidence"].items())
        warned = "" if event["warn_step"] is None else f", warned at {event['warn_step']}"
        back = "" if event["recovered_step"] is None else f", over at {event['recovered_step']}"
        print(f"step {event['step']}: {event['kind']}{warned}{back} ({facts})")
    return 0


# --- reading ----------------------------------------------------------------------------------------------------------
def read(path: str) -> Curve:
    """A curve from a CSV file, also gzipped. Raises UserError.

    Column names may carry a prefix (`train/loss`) or W&B's run name (`run - train/loss`). Rows without a loss are left
    out. Where the step goes back, as in a resumed log, later rows replace the earlier ones from that step on.
    """
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except FileNotFoundError:
        raise console.UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise console.UserError(f"{path} is a folder: name a CSV file in it") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise console.UserError(f"{path}: not a CSV file ({error})") from None
    table = csv.reader(text.splitlines())
    try:
        header = next(table, [])
        columns = {name: find(path, header, names) for name, names in COLUMNS.items()}
        steps: list[float] = []
        rows: list[list[float]] = []
        for number, cells in enumerate(table, 2):
            values = {name: cell(path, number, header, cells, at) for name, at in columns.items()}
            at, loss = values["step"], values["loss"]
            if at is None or loss is None:
                continue
            if not math.isfinite(at):
                raise console.UserError(f"{path}, line {number}: the step is {at}: give a number")
            while steps and steps[-1] >= at:
                steps.pop()
                rows.pop()
            steps.append(at)
            rows.append([math.nan if value is None else value for value in values.values()])
    except csv.Error as error:
        raise console.UserError(f"{path}: not a CSV file ({error})") from None
    if not rows:
        raise console.UserError(f"{path}: no row has a step and a loss")
    series = dict(zip(COLUMNS, np.array(rows).T, strict=True))
    # A loss scale that is too high at first skips some steps, as it should.
    lost = of_no_use(series["nan_steps"], series["step"], 0.0) | of_no_use(series["skipped_steps"], series["step"], 0.5)
    series["loss"][lost] = math.nan
    return Curve(Path(path).name, series["step"], series["loss"], series["grad_norm"], series["lr"])


COLUMNS = {
    "step": STEPS,
    "loss": LOSSES,
    "grad_norm": NORMS,
    "lr": RATES,
    "nan_steps": ("nan_steps", "number_of_nan_iterations", "nan_iterations"),
    "skipped_steps": ("skipped_steps", "number_of_skipped_iterations", "skipped_iterations"),
}


def plain(name: str) -> str:
    """`run - train/Loss` and `Train loss` as `train/loss` and `train_loss`."""
    return re.sub(r"[ -]+", "_", name.rsplit(" - ", 1)[-1].strip().lower())


def find(path: str, header: list[str], names: tuple[str, ...]) -> int | None:
    """The column that is called one of `names`, bare names first; None if there is none and none is needed."""
    wanted = [*names, *(f"{prefix}/{name}" for name in names for prefix in PREFIXES)]
    for one in wanted:
        found = [number for number, name in enumerate(header) if plain(name) == one]
        if len(found) > 1:
            several = ", ".join(repr(header[number]) for number in found)
            raise console.UserError(f"{path}: {len(found)} columns of {one}: {several}: keep one run in the file")
        if found:
            return found[0]
    if names in (STEPS, LOSSES):
        there = ", ".join(map(repr, header[:12])) or "none"
        raise console.UserError(f"{path}: no column {' or '.join(names[:3])}; its columns: {there}")
    return None


def cell(path: str, number: int, header: list[str], cells: list[str], at: int | None) -> float | None:
    """The number in one cell; None where there is none."""
    if at is None or at >= len(cells) or not cells[at].strip():
        return None
    try:
        return float(cells[at])
    except ValueError:
        raise console.UserError(
            f"{path}, line {number}: {header[at]} is {cells[at][:40]!r}: give a number, or leave the cell empty"
        ) from None


def of_no_use(count: np.ndarray, step: np.ndarray, share: float) -> np.ndarray:
    """Rows of which Megatron's counter of lost steps says that it took at least one step and this share of them.

    The counter is either per row, as Megatron prints it, or of the whole run: the latter if it never falls and outgrows
    the steps of a row.
    """
    count, spacing = np.nan_to_num(count), float(np.median(np.diff(step))) if len(step) > 1 else 1.0
    grown = np.diff(count, prepend=0.0)
    lost = grown if (grown >= 0).all() and count.max() > spacing else count
    return lost >= max(1.0, share * spacing)


# --- judging ----------------------------------------------------------------------------------------------------------
def judge(curve: Curve) -> dict[str, Any]:
    """{"verdict", "events", "spike_score"} of a curve alone; see the README for the verdicts."""
    finite = np.isfinite(curve.loss)
    step, loss = curve.step[finite], curve.loss[finite]
    events = not_finite(curve)
    few = len(loss) < FEW
    guard = Guard(max(1, len(loss)))
    shifted_at = -math.inf
    online: float | None = None
    if few:
        online = next((step[n - 1] for n in range(4, len(loss) + 1) if ending(step[:n], loss[:n])[0]), None)
    else:
        norms = [norm if math.isfinite(norm) else None for norm in curve.grad_norm[finite].tolist()]
        for at, value, norm in zip(step.tolist(), loss.tolist(), norms, strict=True):
            stop = guard.observe(int(at), value, norm)
            online = stop.step if stop and online is None else online
        events += guard.events
        shifted_at = max((one.step for one in guard.events if one.kind == "level_shift"), default=shifted_at)
    verdict, evidence = ending(step, loss, shifted_at)
    if few:
        events += rises(step, loss, verdict)
    kind = "divergence" if verdict == "diverged" else verdict
    for event in events:
        if event.kind in ("divergence", "not_learning") and event.recovered_step is None and event.kind != kind:
            event.recovered_step = int(step[-1])
    if verdict:
        same = next((one for one in reversed(events) if one.kind == kind and one.recovered_step is None), None)
        if same is None:
            same = Event(int(float(evidence["best_step"])), kind)
            events.append(same)
        same.evidence |= evidence | ({} if online is None else {"online_step": float(online)})
    if not finite[-1]:
        verdict = "nan"
    elif not verdict:
        verdict = "recovered" if any(came_back(one, few) for one in events) else "healthy"
    events.sort(key=lambda one: one.step)
    return {"verdict": verdict, "events": [asdict(one) for one in events], "spike_score": spike_score(loss)}


def came_back(event: Event, few: bool) -> bool:
    """Is this something that a run has recovered from, and that was worth a word?"""
    if event.kind == "nonfinite":
        return few or float(event.evidence["rows"]) >= stability.SPIKE_STEPS
    return event.kind == "divergence" or (event.kind == "spike" and float(event.evidence["of_progress"]) >= REAL)


def not_finite(curve: Curve) -> list[Event]:
    """An event for every stretch of rows whose loss is not finite."""
    events: list[Event] = []
    bad = ~np.isfinite(curve.loss)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], bad, [False])).astype(int)))
    for begin, end in edges.reshape(-1, 2).tolist():
        over = int(curve.step[end]) if end < len(bad) else None
        facts: Facts = {"rows": float(end - begin), "loss": str(curve.loss[begin])}
        events.append(Event(int(curve.step[begin]), "nonfinite", None, over, facts))
    return events


def noise_of(loss: np.ndarray) -> float:
    """Robust standard deviation of a row about its trend, from second differences: their variance is six times a row's.

    The lesser of the whole curve's and of that up to its lowest row, after which it may be the damage that is loud.
    """
    found: list[float] = []
    for part in (loss, loss[: int(np.argmin(loss)) + 1]):
        bends = np.diff(part, 2)
        if len(bends) >= (BENDS if found else 2):
            bends = bends[min(len(part) // 4, len(bends) - 2) :]
            found.append(float(np.quantile(np.abs(bends), 1 / 3) / THIRD / math.sqrt(6)))
    return min(found, default=math.inf)


def of_averages(step: np.ndarray, loss: np.ndarray) -> bool:
    """Does every row stand for many steps, so that one of them is a long time?"""
    return spacing_of(step) >= SPARSE and len(loss) < FEW and noise_of(loss) < SMOOTH * abs(float(np.median(loss)))


def ending(step: np.ndarray, loss: np.ndarray, since: float = -math.inf) -> tuple[str, Facts]:
    """ "diverged", "not_learning" or "" by where the curve ends; `since`: the last change of mixture.

    Diverged: the last level is above the best one by a fifth of the progress, as for the guard. Not learning: the later
    half of a run of 1,000 steps or more stays where unigrams are, far above what any trained model has.
    """
    if len(loss) < 4:
        return "", {}
    averages, noise = of_averages(step, loss), 1.25 * noise_of(loss)  # of a median, times the root of its rows
    start = min(float(loss[0]), float(np.median(loss[:3])) + stability.FIRST_DROP)
    width = min(max(len(loss) // 50, 3), 201) | 1
    while True:
        starts = np.arange(len(loss) - width, -1, -max(1, width // 2))[::-1]
        levels = np.median(np.lib.stride_tricks.sliding_window_view(loss, width)[starts], axis=1)
        at = step[starts + width // 2]
        best = min(start + stability.FIRST_RISE, float(levels.min()))
        if averages:
            best = min(best, float(loss.min()) + 2 * noise)
        forgiven = max(stability.RISE_FLOOR, stability.GIVEN_BACK * max(0.0, start - best))
        need = math.ceil(min((CERTAIN * noise / forgiven) ** 2, len(loss) / 3))  # rows whose median is so certain
        if need <= width:
            break
        width = need
    later = levels[at >= since] if (at >= since).any() else levels[-1:]
    reference = max(best, float(later.min())) if since > -math.inf else best
    evidence: Facts = {"best": best, "best_step": float(at[np.argmin(levels)]), "start": start}
    some = min(max(need, len(loss) // 200, 5 if len(loss) >= FEW else 3), width)
    for rows in (1, some) if averages else (some,):
        last = float(np.median(loss[-rows:]))
        if last - reference > max(forgiven, CERTAIN * noise / math.sqrt(rows)):
            return "diverged", {"level": last, **evidence}
    if spacing_of(step) >= SPARSE and len(loss) < FEW and (level := never_back(loss, start)):
        return "diverged", {"level": level, **evidence}
    tail = float(np.median(loss[step >= (step[0] + step[-1]) / 2]))
    span = float(step[-1] - step[0])
    enough = STUCK_LEVEL + STUCK_EARLY * min(1.0, max(0.0, 1.5 - span / (2 * STUCK_AFTER)))
    if span >= STUCK_AFTER and tail > max(enough, STUCK_SHARE * start) and float(levels.min()) > STUCK_LEVEL:
        return "not_learning", {"level": tail, **evidence}
    return "", {}


def never_back(loss: np.ndarray, start: float) -> float:
    """The level of all rows after the lowest one, where they stay a fifth of the progress above it; else 0.

    For logs of few rows, of which those after the damage are too loud for the noise before it to be known.
    """
    lowest = int(np.argmin(loss))
    after = loss[lowest + 1 :]
    if len(after) < 3:
        return 0.0
    level = float(np.median(after))
    noise = max(float(np.median(np.abs(after - level))) / MAD_OF_NORMAL, noise_of(loss))
    low = float(np.median(np.lib.stride_tricks.sliding_window_view(loss, 3), axis=1).min())  # one low row may be luck
    away = low + max(stability.RISE_FLOOR, stability.GIVEN_BACK * max(0.0, start - low))
    stays = float(np.median(after[-3:])) > away and float(np.mean(after > (low + away) / 2)) >= MOST
    return level if stays and level > away and min(start - low, 2 * (level - low)) > LUCK * noise else 0.0


def spacing_of(step: np.ndarray) -> float:
    """Steps from a row to the next, in the median."""
    return float(np.median(np.diff(step))) if len(step) > 1 else 1.0


def rises(step: np.ndarray, loss: np.ndarray, verdict: str) -> list[Event]:
    """Events of a log of few rows: stretches of rows that are far above the lowest before them."""
    if len(loss) < 4:
        return []
    averages, noise = of_averages(step, loss), noise_of(loss)
    medians = np.median(np.lib.stride_tricks.sliding_window_view(loss, 3), axis=1)
    smooth = loss if averages else np.concatenate((loss[:2], medians))
    lowest = np.minimum.accumulate(smooth)
    lowest = np.concatenate((lowest[:1], lowest[:-1]))
    progress = np.maximum(loss[0] - lowest, 0.0)
    high = loss - lowest > np.maximum(
        np.maximum(stability.RISE_FLOOR, stability.DRIFT * progress), (6 if averages else 9) * noise
    )
    events = []
    edges = np.flatnonzero(np.diff(np.concatenate(([False], high, [False])).astype(int)))
    for begin, end in edges.reshape(-1, 2).tolist():
        excess = loss[begin:end] - lowest[begin]
        facts: Facts = {"excess": float(excess.max()), "rows": float(end - begin)}
        facts["of_progress"] = float(min(excess.max() / max(progress[begin], 1e-9), 1e3))
        open_end = end == len(loss)
        kind = "spike" if averages or end - begin >= stability.SPIKE_STEPS else "outlier"
        if open_end and verdict == "diverged":
            kind = "divergence"
            facts["after"] = "spike" if loss[begin] - loss[begin - 1] > excess.max() / 2 else "slow"
            if facts["after"] == "slow":
                begin = int(np.argmin(loss[:begin])) + 1
        elif kind == "spike":
            facts["recovered"] = "not_wholly" if open_end else "fast" if end - begin == 1 else "slowly"
        events.append(Event(int(step[begin]), kind, None, None if open_end else int(step[end]), facts))
    return events


def spike_score(loss: np.ndarray) -> float:
    """OLMo 2's (arXiv 2501.00656): percentage of losses seven standard deviations or more from the last 1,000's mean.

    A loss counts once 128 are before it.
    """
    if len(loss) <= SPIKE_WINDOW_MIN:
        return 0.0
    centred = loss - float(np.median(loss))
    sums, squares = (np.concatenate(([0.0], np.cumsum(values))) for values in (centred, centred**2))
    at = np.arange(SPIKE_WINDOW_MIN, len(loss))
    begin = np.maximum(0, at - SPIKE_WINDOW)
    count = at - begin
    mean = (sums[at] - sums[begin]) / count
    variance = np.maximum((squares[at] - squares[begin]) / count - mean**2, 0.0)
    far = np.abs(centred[at] - mean) >= SPIKE_SDS * np.sqrt(variance) + 1e-12
    return float(100 * far.sum() / len(loss))


# --- siblings -------------------------------------------------------------------------------------------------------
def compare(result: dict[str, Any], curve: Curve, others: list[Curve]) -> None:
    """Put into `result` what the siblings say: which events are the data's, and whether the run is where they are."""
    mine, *theirs = (siblings.Curve(one.name, one.step, one.loss) for one in (curve, *others))
    learned = progress_of(theirs, float(curve.step[-1]))
    events, blamed = result["events"], []
    for found in siblings.bad_batches(mine, theirs):
        begin, end = found["step"], found["until"]
        same = [
            one
            for one in events
            if one["kind"] in ("outlier", "spike") and begin <= (one["recovered_step"] or end) and one["step"] <= end
        ]
        if not same and found["excess"] >= REAL * learned:
            same = [{"step": begin, "kind": "", "warn_step": None, "recovered_step": end + 1, "evidence": {}}]
            events += same
        for one in same:
            one["kind"] = "bad_batch"
            one["evidence"] |= {key: found[key] for key in ("excess", "siblings_hit", "siblings_with_step")}
            blamed += [one] if found["excess"] >= REAL * learned else []
    told = siblings.forecast(mine, theirs)
    if told["step"] is not None:
        facts = {key: told[key] for key in ("z", "excess_nats", "relative")}
        above = {"step": told["step"], "kind": "above_siblings", "warn_step": None, "recovered_step": None}
        events.append({**above, "evidence": facts | {"siblings": told["evidence"]["siblings"]}})
    events.sort(key=lambda one: one["step"])
    few = len(curve.loss) < FEW
    if result["verdict"] == "recovered" and not any(came_back(Event(**one), few) for one in events):
        result["verdict"] = "healthy"
    if result["verdict"] == "healthy":
        if told["step"] is not None and told["evidence"]["end_excess_nats"] > FAR_ABOVE * learned:
            result["verdict"] = "not_learning"
        elif blamed:
            result["verdict"] = "bad_batch"


def progress_of(curves: list[siblings.Curve], step: float) -> float:
    """Nats that the siblings have learned by `step`: the median of what each has."""
    learned = [0.0]
    for one in curves:
        some = one.loss[(one.step <= step) & np.isfinite(one.loss)]
        if len(some) >= 3:
            learned.append(float(np.median(some[:3]) - np.median(some[-max(3, len(some) // 50) :])))
    return max(learned[0], float(np.median(learned[1:] or learned)))
