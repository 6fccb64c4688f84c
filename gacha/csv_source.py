"""A CSV of results as runs: finals (a row a pull), curves (rows by step), or what W&B's web page exports of either.

Columns are known by their names; `by` and `value` name the two that matter where the guess is not what is meant.
"""

import csv
import gzip
import io
import math
import re
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from console import UserError
from gacha.runs import VERDICTS, Run, Series

RECIPES = (
    "recipe",
    "group",
    "recipe_hash",
    "experiment",
    "exp",
    "arm",
    "variant",
    "method",
    "condition",
    "dir",
    "config",
)
RUNS = ("run_id", "run", "id", "name", "run_name", "pull", "trial", "seed")
STEPS = ("step", "global_step", "iteration", "iter", "iterations", "steps", "update", "tokens", "train_tokens")
VALUES = (
    *(
        "val_bpb",
        "bpb",
        "val_loss",
        "final_val_loss",
        "validation_loss",
        "eval_loss",
        "test_loss",
        "final_loss",
        "loss",
    ),
    *("train_loss", "perplexity", "ppl", "accuracy", "acc", "score", "reward", "value"),
)
"""Names of columns in small letters with `_` for the rest; of several that are there the first one counts."""
RESULT = re.compile(r"(^|_)(bpb|loss|ppl|perplexity|acc|accuracy|score|reward|err|error)(_|$)")
RENAMED = {
    **dict.fromkeys(("tokens", "train_tokens"), "tokens"),
    **dict.fromkeys(("runtime", "seconds", "train_time_s", "cost_device_seconds"), "cost/device_seconds"),
    **dict.fromkeys(("cost", "money", "price", "cost_money"), "cost/money"),
    **dict.fromkeys(("flops", "cost_flops"), "cost/flops"),
}
"""What a pull took, by the names that other tables use: its summary tells it as our own runs do."""
BOOKKEEPING = {"status", "state", "notes", "user", "created", "updated", "end_time", "hostname", "tags", "sweep"}
"""Columns that are no setting of a pull."""
STATES = {"failed": "crashed", "killed": "stopped", **{verdict: verdict for verdict in (*VERDICTS, "running")}}
"""Words for a pull's end to ours; any other, such as W&B's `finished`, leaves the verdict to the value."""
MISSING = ("", "na", "n/a", "null", "none", "-")
SEED_IN_NAME = re.compile(r"(.+?)[-_. ](?:s|seed)[-_=]?(\d+)")
WIDE = re.compile(r"(.+) - (.+?)(?:__(?:MIN|MAX))?")
"""A column of a W&B chart's export: `name of the run - metric`, and its envelope."""


@dataclass
class Table:
    """Cells as text, missing ones as ""."""

    path: str
    columns: dict[str, list[str]]
    lines: list[int]
    """Of the file, where each row ends."""

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64, NaN where it is missing. Raises UserError, naming the line, for text."""
        try:
            return np.array([float(text) if text else math.nan for text in self.columns[name]])
        except ValueError:
            at = next(i for i, text in enumerate(self.columns[name]) if text and not is_number(text))
            text = self.columns[name][at][:40]
            raise UserError(f"{self.path}:{self.lines[at]}: {text!r} in column {name!r} is no number") from None


class Roles(NamedTuple):
    """Names of columns, "" where there is none, and every column that holds numbers."""

    value: str
    recipe: str
    run: str
    step: str
    numbers: dict[str, np.ndarray]


Pulls = dict[tuple[str, str], list[int]]
"""Row numbers by recipe and name of the pull."""


def read(path: str, by: str = "", value: str = "") -> list[Run]:
    """The pulls of a .csv, .tsv or .csv.gz file. Raises UserError where it is not clear what a column or a row means.

    by, value: the columns with the recipe and the result. A result that is not finite is a divergence and a missing one
    a crash, unless a column `status` or `state` says otherwise. What else a pull has one of is in its config, what it
    took in its summary, and what changes within it in its history.
    """
    table = load(path)
    return in_runs(table, roles(table, by, value))


def value_column(path: str, value: str = "") -> str:
    """The name of the column that `read` takes for the result."""
    return roles(load(path), "", value).value


def load(path: str) -> Table:
    """The file's cells; a W&B chart's export in long form. Raises UserError for what is no table."""
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if path.lower().endswith(".gz") else raw).decode("utf-8-sig")
    except UnicodeDecodeError as refusal:
        raise UserError(f"{path}: is not UTF-8 (byte {refusal.start}); save it as UTF-8") from refusal
    except (OSError, EOFError, zlib.error) as refusal:
        raise UserError(f"{path}: {getattr(refusal, 'strerror', None) or refusal}") from refusal
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",\t;", key=first.count))
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        names = [name.strip() for name in next(reader, [])]
        for row in reader:
            if len(row) == len(names):
                rows.append(row)
                lines.append(reader.line_num)
            elif any(cell.strip() for cell in row):
                raise UserError(f"{path}:{reader.line_num}: {len(row)} fields where the header has {len(names)}")
    except csv.Error as refusal:
        raise UserError(f"{path}:{reader.line_num}: {refusal}") from refusal
    if not rows:
        raise UserError(f"{path}: holds no rows" if any(names) else f"{path}: is empty")
    names = [name or f"column {i + 1}" for i, name in enumerate(names)]
    if double := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: two columns are named {double[0]!r}; rename one")
    columns = {name: [tidy(cell) for cell in cells] for name, cells in zip(names, zip(*rows, strict=True), strict=True)}
    table = Table(path, columns, lines)
    return long(table) if len(names) > 1 and all(map(WIDE.fullmatch, names[1:])) else table


def tidy(cell: str) -> str:
    cell = cell.strip()
    return "" if cell.lower() in MISSING else cell


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def scalar(text: str) -> int | float:
    """A number as it was written: whole ones whole."""
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def long(table: Table) -> Table:
    """A W&B chart's export, which has a column a run, with a row for each run and step. Envelopes are left out."""
    x, *others = table.columns
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for name in others:
        run, metric = WIDE.fullmatch(name).groups()  # type: ignore[union-attr]
        if metric != "_step" and not name.endswith(("__MIN", "__MAX")):
            for i, cell in enumerate(table.columns[name]):
                if cell:
                    rows.setdefault((run, i), {})[metric] = cell
    metrics = dict.fromkeys(metric for row in rows.values() for metric in row)
    columns = {
        x if plain(x) in STEPS else "step": [table.columns[x][i] for _, i in rows],
        "run": [run for run, _ in rows],
    }
    columns |= {metric: [row.get(metric, "") for row in rows.values()] for metric in metrics}
    if not rows:
        raise UserError(f"{table.path}: holds no values")
    return Table(table.path, columns, [table.lines[i] for _, i in rows])


@cache
def plain(name: str) -> str:
    """A column's name as the lists above spell it."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def known(names: Iterable[str], wanted: tuple[str, ...]) -> str:
    """The name that comes first in `wanted`, "" if none does."""
    found = {plain(name): name for name in reversed(list(names))}
    return next((found[name] for name in wanted if name in found), "")


def asked(table: Table, name: str, flag: str) -> str:
    """`name`, which a flag gives. Raises UserError with the choices if no column is called so."""
    if name and name not in table.columns:
        raise UserError(f"{flag} {name}: no such column in {table.path}; there are {', '.join(table.columns)}")
    return name


def roles(table: Table, by: str, value: str) -> Roles:
    """What each column is. Raises UserError, naming the flag or the line, where that is not clear."""
    names = list(table.columns)
    recipe = asked(table, by, "--by") or known(names, RECIPES)
    value = asked(table, value, "--value")
    step = known((name for name in names if name not in (recipe, value)), STEPS)
    run = known((name for name in names if name not in (recipe, value, step)), RUNS)
    if step and (run or recipe):  # a row a pull: then the step is where it ended
        told = {name: table.columns[name] for name in (recipe, run, step) if name}
        owners = set(zip(*(told[name] for name in (recipe, run) if name), strict=True))
        ends = set(zip(*told.values(), strict=True))
        if len(owners) == len(table.lines) if run else len(owners) == len(ends) < len(table.lines):
            step = ""
    numbers = {
        name: table.numbers(name)
        for name, cells in table.columns.items()
        if name != recipe
        and (name != run or plain(name) == "seed")
        and any(cells)
        and all(not text or is_number(text) for text in cells)
    }
    if not value and not (value := known((name for name in names if name not in (recipe, run, step)), VALUES)):
        others = [name for name in numbers if name not in (step, run) and plain(name) not in RENAMED]
        likely = [name for name in others if RESULT.search(plain(name))] or others
        if not likely:
            raise UserError(f"{table.path}: no column holds results in numbers; there are {', '.join(names)}")
        if len(likely) > 1:
            raise UserError(f"{table.path}: which column is the result? Choose with --value: {', '.join(likely)}")
        value = likely[0]
    numbers[value] = table.numbers(value)
    if step:
        numbers[step] = table.numbers(step)
        if not (whole := np.isfinite(numbers[step]) & (numbers[step] % 1 == 0)).all():
            line = table.lines[int(np.argmin(whole))]
            raise UserError(f"{table.path}:{line}: no whole number in column {step!r}, which orders the rows")
    return Roles(value, recipe, run, step, numbers)


def in_runs(table: Table, role: Roles) -> list[Run]:
    """The rows by pull, in the order in which the pulls first come."""
    file = Path(table.path).name.partition(".")[0]
    recipes = table.columns[role.recipe] if role.recipe else []
    if role.run:
        names = table.columns[role.run]
    else:
        names = (recipes or [file] * len(table.lines)) if role.step else [f"line {line}" for line in table.lines]
    if not recipes:  # our own runs are called RECIPE-sSEED
        seedless = {name: SEED_IN_NAME.fullmatch(name) for name in set(names)}
        recipes = [match[1] if all(seedless.values()) and (match := seedless[name]) else file for name in names]
    rows: Pulls = {}
    for i, owner in enumerate(zip(recipes, names, strict=True)):
        rows.setdefault(owner, []).append(i)
    rows = by_step(table, role, rows) if role.step else alone(table, role, rows)
    numbers = {name: values for name, values in role.numbers.items() if role.step and name != role.step}
    curves = [name for name, values in numbers.items() if name == role.value or varies(values, rows)]
    twice = len({name for _, name in rows}) < len(rows)
    written = Path(table.path).stat().st_mtime
    return [
        one_run(table, role, curves, at, owner, "/".join(owner) if twice else owner[1], written)
        for owner, at in rows.items()
    ]


def alone(table: Table, role: Roles, rows: Pulls) -> Pulls:
    """`rows` where every pull has one. Raises UserError for the first that has more."""
    for (_, name), at in rows.items():
        if len(at) > 1:
            first, again = (table.lines[i] for i in at[:2])
            raise UserError(
                f"{table.path}:{again}: {role.run} {name!r} comes again (first in line {first}): give each pull a name "
                "of its own, or a column 'step' if these are curves"
            )
    return rows


def by_step(table: Table, role: Roles, rows: Pulls) -> Pulls:
    """Each pull's rows in step order. Pulls with two different rows at one step are left out, which is said.

    Raises UserError when most of them are such: then several pulls go by one name.
    """
    steps, kept, torn = role.numbers[role.step].tolist(), {}, []
    cells = list(table.columns.values())
    for owner, at in rows.items():
        ranked = sorted(at, key=steps.__getitem__)
        again = [(i, j) for i, j in pairwise(ranked) if steps[i] == steps[j]]
        if two := next(((i, j) for i, j in again if any(column[i] != column[j] for column in cells)), None):
            torn.append((owner[1], *sorted(table.lines[i] for i in two)))
        else:
            kept[owner] = [i for i in ranked if i not in {j for _, j in again}]
    if torn:
        name, first, second = torn[0]
        told = f"{table.path}: {name!r} has two rows of one {role.step} (lines {first} and {second})"
        if 2 * len(torn) > len(rows):
            raise UserError(f"{told}: give each pull a name of its own in a column 'run'")
        others = f", and {len(torn) - 1} more pulls too" if len(torn) > 1 else ""
        print(f"warning: {told}{others}: left out", file=sys.stderr)
    return kept


def varies(values: np.ndarray, rows: Pulls) -> bool:
    """Whether any pull has more than one value."""
    some = ((at, values[at]) for at in rows.values() if len(at) > 1)
    return any(np.nanmin(found) < np.nanmax(found) for _, found in some if not np.isnan(found).all())


def one_run(
    table: Table, role: Roles, curves: list[str], at: list[int], owner: tuple[str, str], run_id: str, written: float
) -> Run:
    """The pull in the rows `at`, in step order; `curves` are the columns that change within pulls.

    written: the file's time in unix seconds, as no column is trusted to be the pull's.
    """
    recipe, name = owner
    config: dict[str, Any] = {"recipe": recipe}
    summary: dict[str, Any] = {}
    history: dict[str, Series] = {}
    for column, cells in table.columns.items():
        if column in (*curves, role.step, role.value) or plain(column) in BOOKKEEPING:
            continue
        if column == role.run and plain(column) != "seed":
            continue
        told = {cells[i] for i in at if cells[i]}
        if len(told) == 1:
            (text,) = told
            known_as = RENAMED.get(plain(column), "")
            if known_as and column in role.numbers:
                summary[known_as] = float(text)
            if not known_as.startswith("cost/"):
                config[column] = scalar(text) if column in role.numbers else text
    if role.step:
        step = role.numbers[role.step][at]
        axis = next((column for column in (role.step, *curves) if RENAMED.get(plain(column)) == "tokens"), "")
        tokens = role.numbers[axis][at] if axis else np.full(len(at), np.nan)
        if axis:
            summary["tokens"] = float(np.nanmax(tokens))
        for column in curves:
            there = np.array([bool(table.columns[column][i]) for i in at])
            if there.any():
                history[column] = Series(step[there].astype(np.int64), tokens[there], role.numbers[column][at][there])
    results = [i for i in at if table.columns[role.value][i]]
    judged = "crashed"
    if results:
        summary[role.value] = float(role.numbers[role.value][results[-1]])
        judged = "ok" if math.isfinite(summary[role.value]) else "diverged"
    end = known(table.columns, ("status", "state"))
    said = STATES.get(table.columns[end][at[-1]].lower(), "") if end else ""
    status = summary["status"] = judged if said in ("", "ok") else said
    return Run(
        id=run_id,
        name=name,
        group=recipe,
        job_type="pretrain",
        tags=[],
        sweep_id="",
        project="",
        config=config,
        summary=summary,
        history=history,
        tables={},
        state={"running": "running", "crashed": "crashed"}.get(status, "finished"),
        status=status,
        exit_code=None,
        started=written,
        paths=[Path(table.path)],
    )
