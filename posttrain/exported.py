"""`python -m posttrain.guard LOG --stage STAGE`: the guard's verdict on any exported log of a post-training run."""

import csv
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

import console
from posttrain.guard import Guard, Stage
from posttrain.trl_names import translate

STEPS = ("step", "_step", "global_step", "train/global_step")


@dataclass(frozen=True)
class ExportedConfig:
    log: tyro.conf.Positional[str]
    """CSV or JSONL, one row a logged step, with a column `step`; names are TRL's or W&B's of this project"""
    stage: Stage
    """what was trained"""
    steps: int = 0
    """budget in optimizer updates; 0: the log's last step"""
    judge: str = "eval/exact_match"
    """column of the held-out score, a mean of items in [0, 1]"""
    json: bool = False
    """print the verdict as one JSON object"""


def main(argv: list[str]) -> int:
    """Read the log, feed the guard with it, print what it said."""
    c = console.parse(ExportedConfig, argv, "python -m posttrain.guard")
    rows = read(c.log, c.stage)
    guard = Guard(c.stage, c.steps or max(1, rows[-1][0]), judge=c.judge)
    verdicts = [verdict for step, row in rows if (verdict := guard.observe(step, row))]
    if c.json:
        events = [asdict(one) for one in guard.events]
        first = asdict(verdicts[0]) if verdicts else None
        console.print_result(
            {"status": guard.status, "verdict": first, "best_step": guard.best_step, "events": events}, True
        )
        return 0
    print(f"{c.log}: {verdicts[0] if verdicts else guard.status}, {len(rows):,} rows, best step {guard.best_step}")
    for one in guard.events:
        facts = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in one.evidence.items())
        over = "" if one.recovered_step is None else f", over at {one.recovered_step}"
        print(f"step {one.step}: {one.kind}{over} ({facts})")
    return 0


def read(path: str, stage: Stage) -> list[tuple[int, dict[str, float]]]:
    """(step, row) in the order of the file; names translated, empty cells left out. Raises UserError."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except FileNotFoundError:
        raise console.UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise console.UserError(f"{path} is a folder: name a CSV or JSONL file in it") from None
    except UnicodeDecodeError as error:
        raise console.UserError(f"{path}: not a CSV or JSONL file ({error})") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    as_json = bool(lines) and lines[0][1].lstrip().startswith("{")
    raw = from_json(path, lines) if as_json else from_csv(path, text)
    rows: list[tuple[int, dict[str, float]]] = []
    for cells in raw:
        step = next((cells[name] for name in STEPS if math.isfinite(cells.get(name, math.nan))), None)
        if step is not None:
            plain = {
                name.removeprefix("train/") if name[6:] != "loss" else name: value for name, value in cells.items()
            }
            rows.append((int(step), translate(plain, stage)))
    if not rows:
        raise console.UserError(f"{path}: no row has a step: name a column `step`")
    return rows


def from_json(path: str, lines: list[tuple[int, str]]) -> list[dict[str, float]]:
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise console.UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise console.UserError(f"{path}, line {number}: give one JSON object a line")
        rows.append({name: float(value) for name, value in row.items() if isinstance(value, (int, float))})
    return rows


def from_csv(path: str, text: str) -> list[dict[str, float]]:
    rows = []
    for number, cells in enumerate(csv.DictReader(text.splitlines()), 2):
        row = {}
        for name, cell in cells.items():
            if name is None or cell is None or not cell.strip():
                continue
            try:
                row[name.strip()] = float(cell)
            except ValueError:
                if name.strip() in STEPS:
                    raise console.UserError(f"{path}, line {number}: {name} is {cell[:40]!r}: give a number") from None
        rows.append(row)
    return rows
