"""Post-mortem of a pull that left its trend: what moved first, and which documents were in its batches.

A pull writes it at every verdict, before it stops or goes back: postmortem.json and postmortem.html in its folder, and
the W&B table stability/postmortem. `python -m pretrain.postmortem PULL_FOLDER` draws the page again.

A series has left its trend where it is FAR robust standard deviations from what its own past lets expect: the median of
its last WINDOW rows, or their line, whichever is nearer, so that neither a level nor a steady rise counts. Where the
loss has long been above its best, a series that has moved by DRIFT since then counts as well, however steadily. All
series are compared as logarithms.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

import console

if TYPE_CHECKING:
    from pretrain.trace import Trace

FORMAT = 1
WINDOW, LEAST = 64, 16  # rows that make a trend, and before which there is none
LEVEL = 16  # rows after which what lies off the trend is another level
FAR = 6.0  # robust standard deviations
LOSS_FLOOR, FLOOR = 0.005, 0.03  # least robust standard deviation, as a share of the value: of the loss, of all else
CLOSED = 3  # rows on the trend again that end an excursion
DRIFT = 2.0  # times its value when the loss was at its best
STRONG = 4.0  # times FAR: an excursion of a single row counts
NEAR = 8  # updates before the onset: an excursion that ended earlier has nothing to do with it


@dataclass(frozen=True)
class PostmortemConfig:
    pull: tyro.conf.Positional[str]
    """folder of a pull"""
    out: str | None = None
    """the page to write; None: postmortem.html in the pull's folder"""
    json: bool = False
    """print the post-mortem as one JSON object"""


def main(argv: list[str]) -> int:
    """Draw the page of a pull's post-mortem again, and say what moved first."""
    c = console.parse(PostmortemConfig, argv, "python -m pretrain.postmortem")
    record = read(Path(c.pull))
    page = Path(c.out) if c.out else Path(c.pull) / "postmortem.html"
    draw(record, page)
    if c.json:
        console.print_result({**record, "page": str(page)}, as_json=True)
        return 0
    for event in record["events"]:
        print(event["verdict"])
        for mover in event["movers"][:10]:
            print(f"  left its trend at step {mover['left_step']}  z {mover['z']}  {mover['series']}")
        print(f"  {event['batches']['says']}")
    print(f"page: {page}")
    return 0


def read(folder: Path) -> dict[str, Any]:
    """postmortem.json of a pull. Raises UserError."""
    path = folder / "postmortem.json"
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        what = "no postmortem.json: a pull that stays healthy has none" if folder.is_dir() else "no such folder"
        raise console.UserError(f"{folder}: {what}; give the folder of a pull that diverged") from None
    except ValueError as error:
        raise console.UserError(f"{path}: not JSON ({error}): restore the file") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise console.UserError(f"{path}: is of another version of this program: draw it with that")
    return record


def write(folder: Path, name: str, event: dict[str, Any]) -> dict[str, Any]:
    """Add a post-mortem to those of a pull, in place of what a killed process said of the same verdict."""
    path = folder / "postmortem.json"
    said = read(folder)["events"] if path.is_file() else []
    said = [other for other in said if (other["retry"], other["step"]) != (event["retry"], event["step"])]
    record = {"format": FORMAT, "pull": name, "events": [*said, event]}
    console.write_atomic(path, json.dumps(record, ensure_ascii=False).encode())
    draw(record, folder / "postmortem.html")
    return record


def draw(record: dict[str, Any], page: Path) -> None:
    """Write the page of a pull's post-mortems."""
    import webpage
    from pretrain import postmortem_page

    console.write_atomic(page, webpage.build(*postmortem_page.build(record)).encode())


def examine(trace: "Trace", verdict: str, step: int, onset: int, retry: int) -> dict[str, Any]:
    """What `trace` says of a verdict of update `step` that dates the beginning to `onset`; nothing of the batches."""
    updates = np.array(trace.updates, np.float64).reshape(-1, 4)
    updates[np.isnan(updates)] = math.inf
    rows = np.array(trace.rows, np.float64).reshape(-1, 1 + len(trace.columns))
    best = best_step(updates[updates[:, 0] <= onset])
    found = departures(["loss", "grad_norm"], updates[:, 0], updates[:, 1:3], onset, best)
    found += departures(trace.columns, rows[:, 0], rows[:, 1:], onset, best)
    found.sort(key=lambda mover: (mover["left_step"], -mover["z"]))
    loss_left = next((mover["left_step"] for mover in found if mover["series"] == "loss"), onset)
    for mover in found:
        mover["before_loss"] = loss_left - mover["left_step"]
        mover["z"] = plain(mover["z"])
    columns = {name: plain(rows[:, 1 + i]) for i, name in enumerate(trace.columns)}
    kept = {"step": updates[:, 0].astype(int).tolist(), "data_step": updates[:, 3].astype(int).tolist()}
    return {
        "retry": retry,
        "step": step,
        "onset_step": onset,
        "loss_left_step": loss_left,
        "best_step": best,
        "verdict": verdict,
        "judged": bool((updates[:, 0] < onset).sum() > LEAST),
        "movers": found,
        "updates": {**kept, "loss": plain(updates[:, 1]), "grad_norm": plain(updates[:, 2])},
        "rows": {"step": rows[:, 0].astype(int).tolist(), **columns},
    }


def best_step(updates: np.ndarray) -> int:
    """Step at which the loss of `updates`, a median over LEAST of them, was lowest; of fewer, the last one."""
    if len(updates) < LEAST:
        return int(updates[-1, 0]) if len(updates) else 0
    levels = np.median(np.lib.stride_tricks.sliding_window_view(updates[:, 1], LEAST), axis=1)
    return int(updates[LEAST - 1 + int(levels.argmin()), 0])


def departures(
    names: Sequence[str], steps: np.ndarray, values: np.ndarray, onset: int, best: int
) -> list[dict[str, Any]]:
    """Which of the series `values` (rows, series) had left their trend around `onset`, since when and how far.

    `best` is the step at which the loss was at its best; `drifts`: compared with then. `z` is the largest distance from
    the trend and `peak` the value there. Only an update RMS may also fall.
    """
    x = np.log(np.clip(values, 1e-30, 1e30))
    near = int(np.searchsorted(steps, onset - NEAR))
    found = []
    for i, name in enumerate(names):
        floor = LOSS_FLOOR if name == "loss" else FLOOR
        either = name.startswith("update_rms")
        since_best = drift(
            x[:, i], floor, int(np.searchsorted(steps, best, side="right")), near, name == "loss", either
        )
        left = since_best or departure(x[:, i], floor, near, either)
        if left is None:
            continue
        start, stop, centre, scale = left
        away = np.abs(x[start:stop, i] - centre)
        at = start + int(np.nanargmax(away))
        found.append(
            {
                "series": name,
                "left_step": int(steps[start]),
                "drifts": since_best is not None,
                "z": float(away[at - start] / scale) if np.isfinite(values[at, i]) else math.inf,
                "before": plain(math.exp(centre)),
                "peak": plain(float(values[at, i])),
                "peak_step": int(steps[at]),
            }
        )
    return found


def trends(x: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """What the rows before each row of `x` (rows,) let expect there, and how far they themselves stray from it.

    A value between the past's median and its line is expected. NaN for the first rows.
    """
    centre, scale = np.full_like(x, math.nan), np.full_like(x, math.nan)
    for t in range(LEAST, len(x)):
        past = x[max(0, t - WINDOW) : t]
        line, level = straight(past), middle(past)
        centre[t] = min(max(x[t], min(level, line[-1])), max(level, line[-1]))
        scale[t] = max(1.4826 * middle(np.abs(past - line[:-1])), floor)
    return centre, scale


def straight(past: np.ndarray) -> np.ndarray:
    """The line through the medians of the earlier and the later half of `past` (rows,), and one row on (rows + 1,)."""
    half = len(past) // 2
    early, late = middle(past[:half]), middle(past[half:])
    slope = 2 * (late - early) / len(past)  # their places are half the past apart
    return late + slope * (np.arange(len(past) + 1) - (half + len(past) - 1) / 2)


def middle(values: np.ndarray) -> float:
    """The median: numpy's own spends ten times as long on its other cases."""
    return float(np.partition(values, len(values) // 2)[len(values) // 2])


def departure(x: np.ndarray, floor: float, near: int, either: bool) -> tuple[int, int, float, float] | None:
    """Of one series (rows,): the excursion that it is on in row `near` or later, None where there is none.

    First row, end row, and centre and scale of the trend that it left. An excursion lasts until CLOSED rows are on that
    trend. One that began LEVEL rows before `near` is another level, whose own trend counts from then on.
    """
    centre, scale = trends(x, floor)
    t = LEAST
    while t < len(x):
        z = (x[t] - centre[t]) / scale[t]
        sign = -1.0 if z < 0 and either else 1.0
        if not sign * z >= FAR:
            t += 1
            continue
        out = sign * (x[t:] - centre[t]) >= FAR * scale[t]
        on_trend = np.lib.stride_tricks.sliding_window_view(~out, CLOSED).all(1) if len(out) >= CLOSED else out[:0]
        stop = t + int(on_trend.argmax()) if on_trend.any() else len(x)
        if near - t > LEVEL and stop - t > LEVEL:
            centre[t:], scale[t:] = trends(x[t:], floor)
            t += LEAST
        elif stop >= near and (out[:CLOSED].sum() >= min(2, len(out)) or sign * z >= STRONG * FAR):
            return t, stop, centre[t], scale[t]
        else:
            t = stop
    return None


def drift(
    x: np.ndarray, floor: float, best: int, near: int, any_size: bool, either: bool
) -> tuple[int, int, float, float] | None:
    """As `departure`, from the level of the last rows before row `best`; None where it is on that in row `near`."""
    past = x[max(0, best - LEAST) : best]
    if len(past) < LEAST // 2 or near - best < LEAST or near >= len(x):
        return None
    line = straight(past)
    centre, scale = middle(past), max(1.4826 * middle(np.abs(past - line[:-1])), floor)
    sign = -1.0 if either and middle(x[best:near]) < centre else 1.0
    out = sign * (x - centre) >= FAR * scale
    if middle(sign * (x[near:] - centre)) < (FAR * scale if any_size else max(FAR * scale, math.log(DRIFT))):
        return None
    back = [t for t in range(best, near - CLOSED + 1) if not out[t : t + CLOSED].any()]
    return (back[-1] + CLOSED if back else best), len(x), centre, scale


def plain(value: Any) -> Any:
    """Numbers for JSON, to five digits; what is not finite is "inf" and what was not measured None."""
    if isinstance(value, np.ndarray):
        return [plain(one) for one in value.tolist()]
    if math.isnan(value):
        return None
    return "inf" if math.isinf(value) else float(f"{value:.5g}")


def table(record: dict[str, Any]) -> tuple[list[str | int], list[list[Any]]]:
    """Columns and rows of the W&B table: of each verdict what moved, in order, then the windows of the batch."""
    columns: list[str | int] = ["verdict_step", "retry", "what", "name", "step", "z", "before", "peak", "nats", "text"]

    def number(value: float | str | None) -> float | None:
        return math.inf if isinstance(value, str) else value

    rows: list[list[Any]] = []
    for event in record["events"]:
        head = [event["step"], event["retry"]]
        for mover in event["movers"]:
            far = [number(mover[key]) for key in ("z", "before", "peak")]
            rows.append([*head, "series", mover["series"], mover["left_step"], *far, None, ""])
        for window in event["batches"]["windows"]:
            name = "planted" if window["window"] is None else f"train window {window['window']}"
            nats = number(next(iter(window["losses"].values()), None))
            rows.append([*head, "window", name, window["step"], None, None, None, nats, window["text"]])
    return columns, rows


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
