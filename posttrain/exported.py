"""`python -m posttrain.guard LOG --stage STAGE`: the guard's verdict on any exported log of a post-training run."""

import csv
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

import console
from posttrain.guard import FINITE, WATCHED, Guard, Stage
from posttrain.trl_names import TRL_NAMES, translate

STEPS = ("step", "_step", "global_step", "train/global_step")


@dataclass(frozen=True)
class ExportedConfig:
    log: tyro.conf.Positional[str]
    """CSV or JSONL, a row a logged step, with a column `step`; the other names as TRL or as this project writes them"""
    stage: Stage
    """what was trained"""
    steps: int = 0
    """budget in optimizer updates; 0: up to the log's last step"""
    judge: str = "eval/exact_match"
    """column of the held-out score, a mean of items in [0, 1]; their number is in `eval/n`"""
    json: bool = False
    """print the verdict as one JSON object"""


def main(argv: list[str]) -> int:
    """Read the log, feed the guard with it, print what it said."""
    c = console.parse(ExportedConfig, argv, "python -m posttrain.guard")
    if c.steps < 0:
        raise console.UserError(f"--steps {c.steps}: give the budget, or 0 for the log's last step")
    rows = read(c.log, c.stage)
    names = sorted({name for _, row in rows for name in row})
    if not {*names} & {*WATCHED, *FINITE, c.judge}:
        raise console.UserError(f"{c.log}: none of its columns is judged: {', '.join(names[:12]) or 'none'}")
    guard = Guard(c.stage, c.steps or max(1, rows[-1][0]), judge=c.judge)
    verdicts = [verdict for step, row in rows if (verdict := guard.observe(step, row))]
    result: dict[str, Any] = {
        "status": guard.status,
        "verdict": asdict(verdicts[0]) if verdicts else None,
        "best_step": guard.best_step,
        "events": [asdict(one) for one in guard.events],
    }
    if c.json:
        console.print_result(result, as_json=True)
        return 0
    print(f"{c.log}: {verdicts[0] if verdicts else guard.status}, {len(rows):,} rows, best step {guard.best_step}")
    if c.judge not in names:
        others = ", ".join(name for name in names if name.startswith("eval"))
        print(f"no column {c.judge}: quality is not judged" + (f"; --judge may name {others}" if others else ""))
    for one in guard.events:
        facts = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in one.evidence.items())
        over = "" if one.recovered_step is None else f", over at {one.recovered_step}"
        print(f"step {one.step}: {one.kind}{over} ({facts})")
    return 0


def read(path: str, stage: Stage) -> list[tuple[int, dict[str, float]]]:
    """(step, row) under our names, without empty cells. Raises UserError.

    Where the step goes back, as in a resumed log, later rows replace the earlier ones after that step.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except FileNotFoundError:
        raise console.UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise console.UserError(f"{path} is a folder: name a CSV or JSONL file in it") from None
    except UnicodeDecodeError as error:
        raise console.UserError(f"{path}: not a CSV or JSONL file ({error})") from None
    raw = from_json(path, text) if text.lstrip().startswith("{") else from_csv(path, text)
    rows: list[tuple[int, dict[str, float]]] = []
    for number, cells in raw:
        named = {plain(name): value for name, value in cells.items()}
        at = next((named[name] for name in STEPS if name in named), None)
        if at is None:
            continue
        if not math.isfinite(at):
            raise console.UserError(f"{path}, line {number}: the step is {at}: give a number")
        while rows and rows[-1][0] > at:
            rows.pop()
        rows.append((int(at), translate(named, stage)))
    if not rows:
        raise console.UserError(f"{path}: no row has a step: name that column `step`")
    return rows


def plain(name: str) -> str:
    """`run - train/kl`, as W&B exports what transformers logged, as `kl`; `eval/loss` as `eval_loss`."""
    name = name.rsplit(" - ", 1)[-1].strip()
    if name == "eval/loss":
        return "eval_loss"
    bare = name.removeprefix("train/")
    return bare if bare in TRL_NAMES or bare.startswith("rewards/") else name


def from_json(path: str, text: str) -> list[tuple[int, dict[str, float]]]:
    """The numbers of every line, NaN and Infinity as words among them."""
    rows: list[tuple[int, dict[str, float]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise console.UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise console.UserError(f"{path}, line {number}: give one JSON object a line")
        numbers = {name: number_in(value) for name, value in row.items()}
        rows.append((number, {name: value for name, value in numbers.items() if value is not None}))
    return rows


def from_csv(path: str, text: str) -> list[tuple[int, dict[str, float]]]:
    """The numbers of every row; a cell of words, as of a table or a video, is left out."""
    try:
        table = list(csv.DictReader(text.splitlines()))
    except csv.Error as error:
        raise console.UserError(f"{path}: not a CSV file ({error})") from None
    rows: list[tuple[int, dict[str, float]]] = []
    for number, cells in enumerate(table, 2):
        numbers = {name: number_in(cell) for name, cell in cells.items() if name}
        rows.append((number, {name: value for name, value in numbers.items() if value is not None}))
    return rows


def number_in(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
