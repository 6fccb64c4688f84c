"""Runs as the rows of a report: what each pull reached, how far it came, what it cost, and which recipe it was of."""

import math
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from gacha.runs import Run

FINISHED = ("ok", "spiked")
"""Statuses of a pull that spent its whole budget: only its final counts in the statistics."""
METRIC = "val/bpb"
"""What a pull is judged by if nothing else is asked for."""
NOT_A_RECIPE = {"recipe", "seed", "init_seed", "data_seed", "sample_seed"}


class Measure(NamedTuple):
    """What pulls are judged by: a metric of the summary or the history, and which end of it is the good one."""

    metric: str = METRIC
    lower_is_better: bool = True

    @property
    def unit(self) -> str:
        """What the metric is counted in, "" where its name does not tell."""
        last = self.metric.rpartition("/")[2]
        return "bits per byte" if last == "bpb" else "nats per token" if last == "loss" else ""

    @property
    def sign(self) -> float:
        """Times the value, lower is better."""
        return 1.0 if self.lower_is_better else -1.0


def recipe_of(run: Run, by: str = "") -> str:
    """The recipe's name: the config field `by` (dots lead into nested ones), or its hash from the config or group."""
    if by:
        told = field(run.config, by)
        return "unknown" if told is None else f"{told:g}" if isinstance(told, float) else str(told)
    return str(run.config.get("recipe") or run.group or "unknown")


def brief(name: str, limit: int = 24) -> str:
    """A recipe's name cut to `limit`: of a path the end tells most."""
    return name if len(name) <= limit else "…" + name[1 - limit :]


def field(config: dict[str, Any], name: str) -> Any:
    """The value of a config field, None if there is none; `a.b` is b inside a."""
    if name in config:
        return config[name]
    first, _, rest = name.partition(".")
    inner = config.get(first)
    return field(inner, rest) if rest and isinstance(inner, dict) else None


def number(values: dict[str, Any], key: str) -> float:
    """A finite number under `key`, else NaN: other people's runs hold anything."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def last_finite(run: Run, metric: str) -> float:
    """The last finite value of a metric's history, or NaN."""
    values = run.history[metric].value if metric in run.history else np.empty(0)
    at = np.flatnonzero(np.isfinite(values))
    return float(values[at[-1]]) if len(at) else math.nan


def reached(run: Run, metric: str) -> float:
    """What a pull came to: the summary's value, else the last one logged, else NaN."""
    told = number(run.summary, metric)
    return told if math.isfinite(told) else last_finite(run, metric)


def varied_fields(recipes: dict[str, list[Run]], by: str = "") -> list[str]:
    """Config fields that tell recipes apart: one value within each, not the same in all; `lr` first if it is there.

    What also varies inside a recipe (output folders, seeds) is bookkeeping and no part of it; nor is what names it.
    """
    everyone = [run for members in recipes.values() for run in members]
    fields = []
    for key in dict.fromkeys(key for run in everyone for key in run.config):
        if key in NOT_A_RECIPE or key == by:
            continue
        if not all(isinstance(run.config.get(key), str | int | float | None) for run in everyone):
            continue
        values = [{repr(run.config.get(key)) for run in members} for members in recipes.values()]
        named = all(str(run.config.get(key)) == name for name, members in recipes.items() for run in members[:1])
        if len(set().union(*values)) > 1 and max(map(len, values)) == 1 and not named:
            fields.append(key)
    has_lr = by != "lr" and any("lr" in run.config for run in everyone)
    return (["lr"] if has_lr else []) + [key for key in fields if key != "lr"]


def row_of(run: Run, recipe: str, varied: list[str], measure: Measure) -> dict[str, Any]:
    """One line of the table of pulls."""
    budget = number(run.config, "tokens")
    tokens = number(run.summary, "tokens")
    ends = [series.tokens[at[-1]] for series in run.history.values() if len(at := np.flatnonzero(series.tokens > 0))]
    if ends:
        tokens = float(max(ends))
    diverged_at = number(run.summary, "diverged_at_tokens")
    if run.status == "diverged" and math.isnan(diverged_at):
        diverged_at = tokens
    seconds = number(run.summary, "cost/device_seconds")
    if math.isnan(seconds) and "perf/step_seconds" in run.history:
        seconds = float(np.nansum(run.history["perf/step_seconds"].value))
    if math.isnan(seconds):
        seconds = last_finite(run, "_runtime")
    low = number(run.summary, "val/loss.min")
    if math.isnan(low) and "val/loss" in run.history and np.isfinite(run.history["val/loss"].value).any():
        losses = run.history["val/loss"].value
        low = float(losses[np.isfinite(losses)].min())
    value = reached(run, measure.metric)
    return {
        "run_id": run.id,
        "name": run.name,
        "recipe": recipe,
        "seed": run.config.get("seed"),
        **{key: run.config.get(key) for key in varied},
        "status": run.status,
        "exit_code": run.exit_code,
        "value": value,
        **({"val_bpb": value} if measure.metric == METRIC else {}),
        "val_loss_min": low,
        "tokens": tokens,
        "tokens_budget": budget,
        "diverged_at_tokens": diverged_at,
        "diverged_at": diverged_at / budget if budget > 0 else math.nan,
        "seconds": seconds,
        "flops": number(run.summary, "cost/flops"),
        "money": number(run.summary, "cost/money"),
        "currency": str(run.config.get("currency") or ""),
        "estimated": [],
        "started": datetime.fromtimestamp(run.started, UTC).isoformat(timespec="seconds"),
        "path": str(run.paths[-1]) if run.paths else "",
        "fragments": len(run.paths),
    }


def price(rows: list[dict[str, Any]], cost: float) -> None:
    """Give the pulls that tell no money `cost` each, those that did not finish their share of it; in place."""
    for row in rows:
        if math.isnan(row["money"]):
            used = row["tokens"] / row["tokens_budget"] if row["tokens_budget"] > 0 else math.nan
            part = 1.0 if row["status"] in FINISHED or math.isnan(used) else min(used, 1.0)
            row["money"] = cost * part


def estimate_costs(rows: list[dict[str, Any]]) -> None:
    """Fill in place the cost a killed pull never wrote, at its siblings' rate, and say so in `estimated`.

    A money rate may be that of other recipes in the same currency: an hour costs the same whatever it computes.
    """
    for name, per in (("seconds", "tokens"), ("flops", "tokens"), ("money", "seconds")):
        sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for row in rows:
            if row[per] > 0 and row[name] >= 0:
                for whose in (row["recipe"], ""):
                    pair = sums[whose, row["currency"]]
                    pair[0] += row[name]
                    pair[1] += row[per]
        for row in rows:
            if not math.isnan(row[name]) or math.isnan(row[per]):
                continue
            for whose in (row["recipe"], "")[: 2 if name == "money" else 1]:
                if (whose, row["currency"]) in sums:
                    known, units = sums[whose, row["currency"]]
                    row[name] = row[per] * known / units
                    row["estimated"].append(name)
                    break


def costs(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What everything cost, what diverged and lost pulls wasted, and what stopping the diverged ones early saved."""
    diverged = [row for row in rows if row["status"] == "diverged"]
    lost = [row for row in rows if row["status"] in ("crashed", "stopped")]
    saved = []
    for row in diverged:
        left = (row["tokens_budget"] - row["tokens"]) / row["tokens"] if row["tokens"] > 0 else math.nan
        part = {key: row[key] * max(left, 0.0) for key in ("tokens", "flops", "seconds", "money")}
        saved.append(part | {"currency": row["currency"]})
    return {"total": bill(rows), "diverged": bill(diverged), "unfinished": bill(lost), "saved": bill(saved)}


def bill(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sums over pulls, unknown values left out; money by currency."""
    rows = list(rows)
    money: dict[str, float] = {}
    for row in rows:
        if math.isfinite(row["money"]):
            money[row["currency"]] = money.get(row["currency"], 0.0) + row["money"]
    sums = {key: sum(row[key] for row in rows if math.isfinite(row[key])) for key in ("tokens", "flops", "seconds")}
    return {"pulls": len(rows), **sums, "money": money}
