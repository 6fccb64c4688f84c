"""The report as a W&B run of its own, job_type `report`: its tables, its headline figures and the page itself.

Offline like every run, until `wandb sync`. It is written beside the pulls and is none: the report reads pulls by their
job_type. What goes wrong here is said and costs the report nothing.
"""

import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tracking


def log_report(report: Mapping[str, Any], page: Path, source: str) -> str | None:
    """Write the report's W&B run; one line that says where it is, or None where W&B could not or may not take it.

    `report` is what gacha/report.py summarises, `page` its HTML file, `source` what was read. Never raises.
    """
    if os.environ.get("WANDB_MODE") == "disabled":
        return None
    try:
        return write(report, page, source)
    except Exception as error:  # the report is on disk: whatever wandb raises, it is no reason to fail
        print(f"W&B: the report was not recorded ({' '.join(str(error).split())})", file=sys.stderr, flush=True)
        return None


def write(report: Mapping[str, Any], page: Path, source: str) -> str | None:
    """Open the run, fill it, end it."""
    found = report.get("projects") or []
    entity, project = None, found[0] if len(found) == 1 else tracking.PROJECT
    if not Path(source).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", source):
        entity, project = source.split("/")[:2]
    config = {key: report[key] for key in ("sweeps", "projects", "varied") if key in report}
    read = [*report["pulls"], *(report.get("stages") or {"runs": []})["runs"]]
    config |= {"source": source, "page": str(page), "runs": list(dict.fromkeys(row["run_id"] for row in read))}
    tracker = tracking.start(
        "report",
        config,
        name=f"report {report['generated']}",
        recipe="report",
        tags=["report"],
        x_axis=None,
        project=project,
        entity=entity,
    )
    for name, listed in tables(report).items():
        if listed:
            tracker.table(name, *table(listed), step=0)
    tracker.page("page", page, step=0)
    tracker.summary(headline(report))
    tracker.finish(0)
    if tracker.stuck or tracker.dropped:
        return None
    if tracker.mode == "online":
        return str(tracker.run.url)
    return f"run {tracker.id} in {Path(os.environ.get('WANDB_DIR', '.'), 'wandb')} (wandb sync sends it)"


def tables(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The report's lists by their table's name: pulls, recipes, odds of best of k, duels, early stopping, stages."""
    recipes, duel = report["recipes"], report.get("duel") or {}
    odds = [
        {"recipe": recipe["recipe"], "k": int(k), **told, "p_hit": recipe.get("p_hit", {}).get(k, {})}
        for recipe in recipes
        for k, told in recipe.get("best_of", {}).items()
    ]
    judged = report.get("stopping") or []
    stopping = [{"recipe": group["recipe"], **outcome} for group in judged for outcome in group["frontier"]]
    listed = {"pulls": report["pulls"], "recipes": recipes, "best_of": odds, "duels": duel.get("pairs", [])}
    return listed | {"stopping": stopping, "stages": stages(report)}


def stages(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each stage of post-training and each of its scores."""
    told = (report.get("stages") or {}).get("stages", [])
    return [
        {key: group[key] for key in ("stage", "recipe", "control", "from", "n")}
        | {"score": score}
        | {key: value for key, value in change.items() if key != "seeds"}
        for group in told
        for score, change in group["scores"].items()
    ]


def table(listed: Iterable[Mapping[str, Any]]) -> tuple[list[str | int], list[list[Any]]]:
    """Columns and rows of a W&B table: nested values under dotted names, each column of one type, as W&B asks."""
    rows = [dict(flat(row)) for row in listed]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for key in columns:
        kinds = {kind(row.get(key)) for row in rows} - {"nothing"}
        for row in rows:
            value = row.get(key)
            row[key] = str(value) if len(kinds) > 1 and value is not None else value
    return list(columns), [[row[key] for key in columns] for row in rows]


def kind(value: Any) -> str:
    """What W&B takes `value` for."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "truth"
    return "number" if isinstance(value, int | float) else "text"


def flat(row: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of a row; lists as one text, numpy's numbers as Python's."""
    for key, value in row.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            # Curves, by their k, have a table of their own.
            yield from () if all(inner.isdecimal() for inner in value) else flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            yield name, ", ".join(map(str, value))
        else:
            plain = value.item() if hasattr(value, "item") else value
            yield name, plain if kind(plain) != "text" else str(plain)


def headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that a table of report runs should show: the best pull, the leading recipe's odds, what it cost."""
    told: dict[str, Any] = {"status": "ok", "pulls/n": len(report["pulls"])}
    told |= {f"pulls/{status}": n for status, n in report.get("status", {}).items()}
    duel = {key: value for key, value in (report.get("duel") or {}).items() if key not in ("pairs", "recipes")}
    for name, part in (("best", report.get("best")), ("recipe", next(iter(report["recipes"]), None)), ("duel", duel)):
        told |= {f"{name}/{key}": value for key, value in flat(part or {})}
    total = report.get("cost", {}).get("total", {})
    told |= {f"cost/{key.replace('.', '/')}": value for key, value in flat(total)}
    return {
        key: value
        for key, value in told.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }
