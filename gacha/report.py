"""`python -m gacha report SRC`: offline W&B runs in; report.html (one file, no network), report.json, a summary out.

This file turns runs into the numbers of the report; gacha/figures.py draws them, gacha/page.py writes the page.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import console
from console import UserError
from gacha import odds, runs, siblings
from gacha.runs import Run

FINISHED = ("ok", "spiked")
"""Statuses of a pull that spent its whole budget: only its final counts in the statistics."""


@dataclass(frozen=True)
class Config:
    """Read offline W&B runs and write a page that shows which pull to keep, how sure that is and what it cost."""

    source: Annotated[str, tyro.conf.Positional] = "wandb"
    """Folder with offline-run-*/run-*.wandb somewhere below it."""
    out: str = "report.html"
    """The page to write; the same numbers go beside it as .json."""
    sweep: str = ""
    """Only runs of this W&B sweep id."""
    group: str = ""
    """Only runs of this group (a recipe's hash)."""
    json: bool = False
    """Print report.json on stdout instead of the summary."""


def main(argv: Sequence[str]) -> int:
    """Write the report of `argv`'s source; returns 0. Raises UserError when there is nothing to report on."""
    config = console.parse(Config, argv, "python -m gacha report")
    out = Path(config.out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UserError(f"--out {config.out}: give a file name that ends in .html")
    pulls = select(load(config.source), config.sweep, config.group)
    report = summarise(pulls, config.source)

    from gacha import page  # brings plotly

    out.parent.mkdir(parents=True, exist_ok=True)
    console.write_atomic(out, page.build(report, pulls).encode())
    text = json.dumps(plain(report), ensure_ascii=False, indent=1, allow_nan=False)
    console.write_atomic(out.with_suffix(".json"), (text + "\n").encode())
    if config.json:
        console.print_result(plain(report) | {"page": str(out)}, as_json=True)
    else:
        console.print_result(headline(report) | {"page": str(out)}, as_json=False)
    return 0


def load(source: str) -> list[Run]:
    """The runs below `source`. Raises UserError for sources that are no folder."""
    if source.lower().endswith((".csv", ".csv.gz")):
        raise UserError(f"{source}: CSV sources come in a later version; give a folder of offline W&B runs")
    if not Path(source).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", source):
        raise UserError(
            f"{source}: no such folder, and reading ENTITY/PROJECT from a W&B server comes in a later version; "
            "give a folder of offline W&B runs"
        )
    return runs.read(source)


def select(found: list[Run], sweep: str, group: str) -> list[Run]:
    """The pretraining pulls of one sweep and group ("" for all). Raises UserError, naming the choices, if none fit."""
    kept = [run for run in found if run.job_type == "pretrain"]
    if not kept:
        types = ", ".join(sorted({run.job_type or "(none)" for run in found}))
        raise UserError(f"no pretrain runs among {len(found)} found: their job types are {types}")
    for flag, wanted, name in (("--sweep", sweep, "sweep_id"), ("--group", group, "group")):
        if wanted:
            known = sorted({getattr(run, name) for run in kept if getattr(run, name)})
            kept = [run for run in kept if getattr(run, name) == wanted]
            if not kept:
                raise UserError(f"{flag} {wanted}: no such run; there are {', '.join(known) or 'none at all'}")
    return kept


def summarise(pulls: list[Run], source: str) -> dict[str, Any]:
    """Everything the page and report.json say, from runs to plain values (NaN where something is not known)."""
    recipes: dict[str, list[Run]] = {}
    for run in pulls:
        recipes.setdefault(recipe_of(run), []).append(run)
    varied = varied_fields(recipes)
    rows = [row_of(run, varied) for run in pulls]
    for members in recipes.values():
        estimate_costs([row for row, run in zip(rows, pulls, strict=True) if run in members], rows)
    rows.sort(key=lambda row: (row["status"] not in FINISHED, not math.isfinite(row["val_bpb"]), row["val_bpb"]))
    told = [recipe_summary(name, [row for row in rows if row["recipe"] == name], varied) for name in recipes]
    told.sort(key=lambda recipe: (-recipe["n_finished"], recipe["mean"] if recipe["n_finals"] else math.inf))
    return {
        "generated": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source,
        "projects": sorted({run.project for run in pulls if run.project}),
        "sweeps": sorted({run.sweep_id for run in pulls if run.sweep_id}),
        "status": dict(Counter(row["status"] for row in rows)),
        "varied": varied,
        "recipes": told,
        "pulls": rows,
        "best": best_pull(rows),
        "baseline_bpb": next((x for run in pulls if math.isfinite(x := number(run.summary, "baseline/kn5_bpb"))), None),
        "cost": costs(rows),
        "siblings": siblings.compare(pulls, recipes, varied),
        "damaged": sum(run.damaged for run in pulls),
    }


def recipe_of(run: Run) -> str:
    """The recipe's hash, from the config or the group."""
    return str(run.config.get("recipe") or run.group or "unknown")


def number(values: dict[str, Any], key: str) -> float:
    """A finite number under `key`, else NaN: other people's runs hold anything."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def last_finite(run: Run, metric: str) -> float:
    """The last finite value of a metric's history, or NaN."""
    values = run.history[metric].value if metric in run.history else np.empty(0)
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else math.nan


def varied_fields(recipes: dict[str, list[Run]]) -> list[str]:
    """Config fields that tell recipes apart: one value within each, not the same in all; `lr` first if it is there.

    What also varies inside a recipe (output folders, seeds) is bookkeeping and no part of it.
    """
    everyone = [run for members in recipes.values() for run in members]
    fields = []
    for key in dict.fromkeys(key for run in everyone for key in run.config):
        values = [{repr(run.config.get(key)) for run in members} for members in recipes.values()]
        scalar = all(isinstance(run.config.get(key), str | int | float | None) for run in everyone)
        if key not in ("recipe", "seed") and scalar and len(set().union(*values)) > 1 and max(map(len, values)) == 1:
            fields.append(key)
    has_lr = any("lr" in run.config for run in everyone)
    return (["lr"] if has_lr else []) + [key for key in fields if key != "lr"]


def row_of(run: Run, varied: list[str]) -> dict[str, Any]:
    """One line of the table of pulls."""
    budget = number(run.config, "tokens")
    tokens = number(run.summary, "tokens")
    reached = [series.tokens for series in run.history.values() if np.isfinite(series.tokens).any()]
    if reached:
        tokens = max(float(np.nanmax(np.where(np.isfinite(t), t, np.nan))) for t in reached)
    diverged_at = number(run.summary, "diverged_at_tokens")
    if run.status == "diverged" and math.isnan(diverged_at):
        diverged_at = tokens
    seconds = number(run.summary, "cost/device_seconds")
    if math.isnan(seconds) and "perf/step_seconds" in run.history:
        seconds = float(np.nansum(run.history["perf/step_seconds"].value))
    if math.isnan(seconds):
        seconds = last_finite(run, "_runtime")
    bpb = number(run.summary, "val/bpb")
    low = number(run.summary, "val/loss.min")
    if math.isnan(low) and "val/loss" in run.history and np.isfinite(run.history["val/loss"].value).any():
        low = float(
            np.min(run.history["val/loss"].value, where=np.isfinite(run.history["val/loss"].value), initial=9e9)
        )
    return {
        "run_id": run.id,
        "name": run.name,
        "recipe": recipe_of(run),
        "seed": run.config.get("seed"),
        **{key: run.config.get(key) for key in varied},
        "status": run.status,
        "exit_code": run.exit_code,
        "val_bpb": bpb if math.isfinite(bpb) else last_finite(run, "val/bpb"),
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
        "path": str(run.paths[-1]),
        "fragments": len(run.paths),
    }


def estimate_costs(rows: list[dict[str, Any]], everyone: list[dict[str, Any]]) -> None:
    """Fill in place the cost a killed pull never wrote, at its siblings' rate, and say so in `estimated`."""
    for field, per in (("seconds", "tokens"), ("flops", "tokens"), ("money", "seconds")):
        for row in rows:
            if not math.isnan(row[field]) or math.isnan(row[per]):
                continue
            for others in (rows, everyone if field == "money" else []):
                same = [o for o in others if o["currency"] == row["currency"] and o[per] > 0 and o[field] >= 0]
                if same:
                    row[field] = row[per] * sum(o[field] for o in same) / sum(o[per] for o in same)
                    row["estimated"].append(field)
                    break


def recipe_summary(name: str, rows: list[dict[str, Any]], varied: list[str]) -> dict[str, Any]:
    """The statistics of one recipe's pulls; `best_of` is keyed by the number of pulls."""
    finished = [row for row in rows if row["status"] in FINISHED]
    diverged = [row for row in rows if row["status"] == "diverged"]
    finals = [row for row in finished if math.isfinite(row["val_bpb"])]
    decided = len(finished) + len(diverged)
    told: dict[str, Any] = {"recipe": name} | {key: rows[0][key] for key in varied}
    told |= {"n": len(rows), "n_finished": len(finished), "n_diverged": len(diverged), "n_finals": len(finals)}
    told |= {"mean": math.nan, "sd": math.nan, "sd_lo": math.nan, "sd_hi": math.nan, "min": math.nan, "max": math.nan}
    told |= {"outliers": [], "best_of": {}, "p_diverge": None, "per_finished": {}}
    if finals:
        values = [row["val_bpb"] for row in finals]
        spread = odds.spread(values)
        told |= {"mean": spread.mean, "sd": spread.sd, "sd_lo": spread.sd_lo, "sd_hi": spread.sd_hi}
        told |= {"min": spread.low, "max": spread.high}
        if len(finals) >= 4:
            far = np.abs(spread.z) > odds.OUTLIER_Z
            told["outliers"] = [row["name"] for row, is_far in zip(finals, far, strict=True) if is_far]
        for k in range(1, len(finals) + 1):
            got = odds.best_of(values, k, bootstraps=odds.BOOTSTRAPS if len(finals) <= 20 else 2000)
            told["best_of"][str(k)] = {"u": got.value, "lo": got.lo, "hi": got.hi}
    if decided:
        p = odds.probability(len(diverged), decided)
        told["p_diverge"] = {"k": len(diverged), "n": decided, "p": p.value, "lo": p.lo, "hi": p.hi}
    if finished:
        # What a finished pull really costs: the diverged ones were paid for on the way to it.
        paid = finished + diverged
        told["per_finished"] = {
            "seconds": sum(row["seconds"] for row in paid) / len(finished),
            "money": sum(row["money"] for row in paid) / len(finished),
            "currency": finished[0]["currency"],
        }
    return told


def best_pull(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The finished pull with the lowest val/bpb and its lead over the next one of its recipe; None if none finished."""
    ranked = [row for row in rows if row["status"] in FINISHED and math.isfinite(row["val_bpb"])]
    if not ranked:
        return None
    best = ranked[0]
    told = {key: best[key] for key in ("run_id", "name", "recipe", "seed", "val_bpb", "path")}
    told |= {"runner_up": None, "lead": math.nan, "lead_sd": math.nan, "lead_share": math.nan}
    mates = [row for row in ranked if row["recipe"] == best["recipe"]]
    if len(mates) > 1:
        told |= {"runner_up": mates[1]["name"], "lead": mates[1]["val_bpb"] - best["val_bpb"]}
    if len(mates) > 2 and told["lead"] > 0:
        told["lead_sd"], told["lead_share"] = odds.lead([row["val_bpb"] for row in mates])
    return told


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


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """The summary for stdout."""
    main_recipe, best = report["recipes"][0], report["best"]
    told: dict[str, Any] = {"pulls": ", ".join(f"{n} {status}" for status, n in report["status"].items())}
    if best is None:
        told["best pull"] = "none: no pull has finished with a val/bpb"
    else:
        told["best pull"] = f"{best['name']} (run {best['run_id']}): val/bpb {best['val_bpb']:.4f}"
        if math.isfinite(best["lead_sd"]):
            told["its lead"] = f"{best['lead']:.4f} over {best['runner_up']}, {best['lead_sd']:.2f} seed sd"
    if report["baseline_bpb"]:
        told["kneser-ney 5-gram"] = f"val/bpb {report['baseline_bpb']:.4f}"
    n = main_recipe["n_finals"]
    if n > 1:
        spread = f"sd {main_recipe['sd']:.4f} (95% {main_recipe['sd_lo']:.4f} to {main_recipe['sd_hi']:.4f})"
        told["seed spread"] = f"mean {main_recipe['mean']:.4f}, {spread}, n = {n}, recipe {main_recipe['recipe']}"
        told["best of 1..n"] = "  ".join(f"{k}: {got['u']:.4f}" for k, got in list(main_recipe["best_of"].items())[:8])
    for recipe in report["recipes"]:
        if p := recipe["p_diverge"]:
            told[f"diverged {recipe['recipe']}"] = (
                f"{p['k']} of {p['n']} ({p['p']:.0%}, 95% {p['lo']:.0%} to {p['hi']:.0%})"
            )
    relations = report["siblings"]
    if met := relations["bad_batches"]:
        told["bad batches"] = "at steps " + ", ".join(str(step) for step in sorted(batch["step"] for batch in met[:8]))
    for row in [row for row in relations["above"] if not row["back"]][:8]:
        told[f"above its siblings {row['name']}"] = (
            f"from step {row['step']}, {row['end_excess_nats']:+.3f} nats at its end"
        )
    total = report["cost"]["total"]
    money = " + ".join(f"{amount:.4g} {currency}" for currency, amount in total["money"].items())
    told["cost"] = f"{total['flops']:.3g} FLOPs, {total['seconds']:,.0f} device seconds" + (money and f", {money}")
    return told


def plain(value: Any) -> Any:
    """`value` as strict JSON holds it: what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
