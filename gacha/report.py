"""`python -m gacha report SRC`: runs in; report.html (one file, no network), report.json, a summary out.

This file is the door, and puts the numbers together; gacha/pulls.py makes runs rows, gacha/luck.py has the statistics,
gacha/stages.py those of post-training, gacha/page.py and its neighbours write the page.
"""

import difflib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

import console
from console import UserError
from gacha import csv_source, luck, odds, pulls, runs, siblings, stages, stages_text
from gacha.finals import guess_lower_is_better
from gacha.luck import Asked
from gacha.pulls import FINISHED, METRIC, Measure
from gacha.runs import Run

ENOUGH = 8
"""Finished pulls with which a recipe is told among those that have the most, by its mean."""
TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
ELSE = ("val/loss", "val_loss", "eval/loss", "eval_loss", "test/loss", "loss")
"""Metrics that pulls without a val/bpb are judged by, the first that is there."""
TASK = "eval/exact_match"
"""What pulls of a stage of post-training are judged by."""


@dataclass(frozen=True)
class Config:
    """Read runs and write a page: which pull to keep, how sure that is, what it cost, what the next would bring."""

    source: Annotated[str, tyro.conf.Positional] = "wandb"
    """Folder with offline-run-*/run-*.wandb below it, a CSV of finals or curves, or ENTITY/PROJECT[/SWEEP]."""
    out: str = "report.html"
    """The page to write; the same numbers go beside it as .json."""
    sweep: str = ""
    """Only runs of this W&B sweep id."""
    group: str = ""
    """Only runs of this group (a recipe's hash)."""
    job_type: str = "pretrain"
    """Only runs of this job type; runs that have none at all are taken as they are."""
    by: str = ""
    """Config field or CSV column that names the recipe; empty: the recipe's hash, or a CSV's column that looks so."""
    value: str = ""
    """Metric or CSV column that pulls are judged by; empty: val/bpb, or what is there in its place."""
    higher_is_better: bool = False
    """The larger the value the better; with neither flag the metric's name tells."""
    lower_is_better: bool = False
    """The smaller the value the better."""
    target: float | None = None
    """A value to reach: adds the odds of it and its price."""
    cost: float | None = None
    """Money of a pull, where the runs do not tell theirs."""
    worth: float | None = None
    """Money that one unit of the value is worth: adds when to stop pulling."""
    duel: tuple[str, str] | None = None
    """Two recipes to compare; otherwise the two best."""
    log: bool = True
    """Record the report as a W&B run with job_type=report."""
    json: bool = False
    """Print report.json on stdout instead of the summary."""


def main(argv: Sequence[str]) -> int:
    """Write the report of `argv`'s source; returns 0. Raises UserError when there is nothing to report on."""
    config = console.parse(Config, argv, "python -m gacha report")
    out = Path(config.out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UserError(f"--out {config.out}: give a file name that ends in .html")
    found = load(config.source, config.by, config.value)
    tuned = stages.of(found, config.sweep, config.group)
    if tuned and config.job_type == Config.job_type and not any(fits(run, config) for run in found):
        return write(report_of_stages(config, tuned, found), config, out, [], tuned)
    kept = select(found, config.sweep, config.group, config.job_type)
    table = is_table(config.source)
    measure = measure_of(kept, config, csv_source.value_column(config.source, config.value) if table else config.value)
    asked = Asked(
        target=math.nan if config.target is None else config.target,
        worth=math.nan if config.worth is None else config.worth,
        duel=config.duel or (),
    )
    report = summarise(kept, config.source, measure, "" if table else config.by, asked, config.cost)
    report["stages"] = stages.summarise(tuned, found, config.by)
    return write(report, config, out, kept, tuned)


def write(report: dict[str, Any], config: Config, out: Path, kept: list[Run], tuned: list[Run]) -> int:
    """Page, JSON, the report's own run, and the summary on stdout; `kept` are its pulls, `tuned` runs of its stages."""
    from gacha import page  # brings plotly

    out.parent.mkdir(parents=True, exist_ok=True)
    built = page.build(report, kept, tuned) if kept else page.build_stages(report, tuned)
    console.write_atomic(out, built.encode())
    text = json.dumps(plain(report), ensure_ascii=False, indent=1, allow_nan=False)
    console.write_atomic(out.with_suffix(".json"), (text + "\n").encode())
    places = {"page": str(out)}
    if config.log:
        from gacha import report_run

        if where := report_run.log_report(report, out, config.source):
            places["recorded"] = where
    console.print_result((plain(report) if config.json else headline(report)) | places, as_json=config.json)
    return 0


def fits(run: Run, config: Config) -> bool:
    """Is it a pull of the job type, sweep and group asked for?"""
    return run.job_type == config.job_type and config.sweep in ("", run.sweep_id) and config.group in ("", run.group)


def report_of_stages(config: Config, tuned: list[Run], found: list[Run]) -> dict[str, Any]:
    """The report where there is post-training only. Raises UserError for what only pulls of one stage can answer."""
    for flag in ("target", "worth", "duel", "cost"):
        if getattr(config, flag) is not None:
            known = ", ".join(dict.fromkeys(run.job_type for run in tuned))
            raise UserError(f"--{flag} asks about the pulls of one stage: name it by --job_type, one of {known}")
    told = stages.summarise(tuned, found, config.by, config.value.removeprefix("eval/"))
    assert told is not None
    if config.value and told["main"] != config.value.removeprefix("eval/"):
        known = ", ".join(told["scores"]) or "none at all"
        raise UserError(f"--value {config.value}: no run has it before and after; there are {known}")
    return stages.alone(told, config.source, tuned, datetime.now(UTC).isoformat(timespec="seconds"))


def is_table(source: str) -> bool:
    """Is it a CSV or one of its kin?"""
    return source.lower().endswith(TABLES)


def load(source: str, by: str = "", value: str = "") -> list[Run]:
    """The runs of a folder, a CSV or a project on a W&B server; `by` and `value` name a CSV's columns."""
    if is_table(source):
        return csv_source.read(source, by, value)
    if not Path(source).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", source):
        from gacha import online

        return online.read(source)
    return runs.read(source)


def select(found: list[Run], sweep: str, group: str, job_type: str = "pretrain") -> list[Run]:
    """The pulls of one job type, sweep and group ("" for all). Raises UserError, naming the choices, if none fit.

    Where no run has a job type, as in a CSV, none is asked for; reports recorded before are no pulls.
    """
    found = [run for run in found if run.job_type != "report" or job_type == "report"]
    types = sorted({run.job_type for run in found})
    kept = [run for run in found if run.job_type == job_type or types == [""]]
    if not kept:
        raise UserError(
            f"no {job_type} runs among {len(found)} found: their job types are "
            f"{', '.join(name or '(none)' for name in types) or 'all report'}; choose one with --job_type"
        )
    for flag, wanted, name in (("--sweep", sweep, "sweep_id"), ("--group", group, "group")):
        if wanted:
            known = sorted({getattr(run, name) for run in kept if getattr(run, name)})
            kept = [run for run in kept if getattr(run, name) == wanted]
            if not kept:
                raise UserError(f"{flag} {wanted}: no such run; there are {', '.join(known) or 'none at all'}")
    return kept


def measure_of(kept: list[Run], config: Config, asked: str) -> Measure:
    """What these pulls are judged by: `asked`, or what they have. Raises UserError for a metric that no pull has."""
    known = sorted({key for run in kept for key in (*run.summary, *run.history)})
    usual = (METRIC, *ELSE) if not all(run.job_type in stages.STAGES for run in kept) else (TASK, METRIC, *ELSE)
    metric = asked or next((name for name in usual if name in known), METRIC)
    if asked and metric not in known:
        near = difflib.get_close_matches(metric, known, n=3, cutoff=0.4) or known[:8]
        raise UserError(f"--value {metric}: no pull has it; there are {', '.join(near) or 'no metrics at all'}")
    if config.higher_is_better and config.lower_is_better:
        raise UserError("--higher_is_better and --lower_is_better: give one of them")
    if config.higher_is_better or config.lower_is_better:
        return Measure(metric, config.lower_is_better)
    return Measure(metric, guess_lower_is_better(metric))


def summarise(
    kept: list[Run],
    source: str,
    measure: Measure = Measure(),  # noqa: B008  (immutable)
    by: str = "",
    asked: Asked = Asked(),  # noqa: B008
    cost: float | None = None,
) -> dict[str, Any]:
    """Everything the page and report.json say, from runs to plain values (NaN where something is not known).

    Raises UserError when `by` names a field that no run has, or the duel a recipe that has no two finals.
    """
    recipes: dict[str, list[Run]] = defaultdict(list)
    recipe: dict[str, str] = {}
    for run in kept:
        recipe[run.id] = pulls.recipe_of(run, by)
        recipes[recipe[run.id]].append(run)
    if by and set(recipes) == {"unknown"}:
        known = sorted({key for run in kept for key in run.config})
        near = difflib.get_close_matches(by, known, n=3) or known[:8]
        raise UserError(f"--by {by}: no run's config has it; there are {', '.join(near) or 'no fields at all'}")
    varied = pulls.varied_fields(recipes, by)
    rows = [pulls.row_of(run, recipe[run.id], varied, measure) for run in kept]
    if cost is not None:
        pulls.price(rows, cost)
    pulls.estimate_costs(rows)
    rows.sort(
        key=lambda row: (row["status"] not in FINISHED, not math.isfinite(row["value"]), measure.sign * row["value"])
    )
    of_recipe = defaultdict(list)
    for row in rows:
        of_recipe[row["recipe"]].append(row)
    told = [luck.recipe_summary(name, members, varied, measure, asked) for name, members in of_recipe.items()]
    most = max(one["n_finished"] for one in told)
    told.sort(
        key=lambda one: (
            # A recipe of few pulls may owe its mean to luck: it does not lead those of many.
            -one["n_finished"] if one["n_finished"] < min(most / 2, ENOUGH) else -most,
            measure.sign * one["mean"] if one["n_finals"] else math.inf,
        )
    )
    luck.intervals(told, rows, measure)
    for name in asked.duel:
        if not any(one["recipe"] == name and one["n_finals"] > 1 for one in told):
            fit = [one["recipe"] for one in told if one["n_finals"] > 1]
            near = difflib.get_close_matches(name, fit, n=4) or fit[:8]
            raise UserError(
                f"--duel {name}: no recipe of two finals by this name; there are {', '.join(near) or 'none'}"
            )
    return {
        "generated": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source,
        "projects": sorted({run.project for run in kept if run.project}),
        "sweeps": sorted({run.sweep_id for run in kept if run.sweep_id}),
        "value": measure._asdict() | {"unit": measure.unit, "by": by, "target": asked.target, "worth": asked.worth},
        "status": dict(Counter(row["status"] for row in rows)),
        "varied": varied,
        "recipes": told,
        "pulls": rows,
        "best": best_pull(rows, measure),
        "baseline_bpb": baseline(kept) if measure.metric == METRIC else None,
        "cost": pulls.costs(rows),
        "siblings": siblings.compare(kept, recipes, varied),
        "duel": luck.duels(rows, [one["recipe"] for one in told], measure, asked),
        "stopping": luck.stopping(kept, recipe, [one["recipe"] for one in told], measure),
        "learning_rates": luck.learning_rates(kept, rows, varied, measure),
        "damaged": sum(run.damaged for run in kept),
    }


def baseline(kept: list[Run]) -> float | None:
    """bpb of the Kneser-Ney 5-gram that the runs were told of, if they were."""
    return next((x for run in kept if math.isfinite(x := pulls.number(run.summary, "baseline/kn5_bpb"))), None)


def best_pull(rows: list[dict[str, Any]], measure: Measure) -> dict[str, Any] | None:
    """The finished pull with the best value and its lead over the next one of its recipe; None if none finished."""
    ranked = [row for row in rows if row["status"] in FINISHED and math.isfinite(row["value"])]
    if not ranked:
        return None
    best = ranked[0]
    told: dict[str, Any] = {
        key: best[key] for key in ("run_id", "name", "recipe", "seed", "value", "val_bpb", "path") if key in best
    }
    told |= {"runner_up": None, "lead": math.nan, "lead_sd": math.nan, "lead_share": math.nan}
    mates = [row for row in ranked if row["recipe"] == best["recipe"]]
    if len(mates) > 1:
        told |= {"runner_up": mates[1]["name"], "lead": measure.sign * (mates[1]["value"] - best["value"])}
    if len(mates) > 2 and told["lead"] > 0:
        draws = min(20_000, 2_000_000 // len(mates))
        finals = [row["value"] for row in mates]
        told["lead_sd"], told["lead_share"] = odds.lead(finals, measure.lower_is_better, draws)
    return told


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """The summary for stdout."""
    brought = stages_text.headline(report["stages"]) if report.get("stages") else {}
    if not report["recipes"]:
        counted = {"runs": ", ".join(f"{n} {status}" for status, n in report["status"].items())}
        return counted | brought | {"cost": bill(report)}
    main_recipe, best, metric = report["recipes"][0], report["best"], report["value"]["metric"]
    told: dict[str, Any] = {"pulls": ", ".join(f"{n} {status}" for status, n in report["status"].items())}
    if best is None:
        told["best pull"] = f"none: no pull has finished with a {metric}"
    else:
        told["best pull"] = f"{best['name']} (run {best['run_id']}): {metric} {best['value']:.4f}"
        if math.isfinite(best["lead_sd"]):
            told["its lead"] = f"{best['lead']:.4f} over {best['runner_up']}, {best['lead_sd']:.2f} seed sd"
    if report["baseline_bpb"]:
        told["kneser-ney 5-gram"] = f"val/bpb {report['baseline_bpb']:.4f}"
    if main_recipe["n_finals"] > 1:
        told["seed spread"] = (
            f"mean {main_recipe['mean']:.4f}, sd {main_recipe['sd']:.4f} (95% {main_recipe['sd_lo']:.4f} to "
            f"{main_recipe['sd_hi']:.4f}), n = {main_recipe['n_finals']}, recipe {main_recipe['recipe']}"
        )
    if main_recipe["n_finals"] > 1:
        shown = list(main_recipe["best_of"].items())
        told["best of 1..n"] = "  ".join(f"{k}: {got['u']:.4f}" for k, got in shown[:8])
    if priced := main_recipe["to_target"]:
        told["target"] = f"{report['value']['target']:g}: {priced['hits']} of {priced['n']} reach it"
        if priced["hits"]:
            told["target"] += f"; {priced['pulls']} pulls for {priced['confidence']:.0%}"
    if fought := report["duel"]:
        told["duel"] = fought["told"]
    for group in report["stopping"]:
        most = group["buys_most"]
        told[f"early stopping {pulls.brief(group['recipe']) or 'all'}"] = (
            f"{most['family']} {most['parameter']}".strip()
            + f" would have saved {most['saved']['value']:.0%} at a regret of {most['regret_sd']['value']:.2f} sd of "
            + group["sd_of"]
        )
    lossy = [one for one in report["recipes"] if one is main_recipe or (one["p_diverge"] and one["p_diverge"]["k"])]
    for recipe in lossy[:8]:
        if p := recipe["p_diverge"]:
            told[f"diverged {pulls.brief(recipe['recipe'])}"] = (
                f"{p['k']} of {p['n']} ({p['p']:.0%}, 95% {p['lo']:.0%} to {p['hi']:.0%})"
            )
    relations = report["siblings"]
    if met := relations["bad_batches"]:
        told["bad batches"] = "at steps " + ", ".join(str(step) for step in sorted(batch["step"] for batch in met[:8]))
    for row in [row for row in relations["above"] if not row["back"]][:8]:
        told[f"above its siblings {row['name']}"] = (
            f"from step {row['step']}, {row['end_excess_nats']:+.3f} nats at its end"
        )
    return told | brought | {"cost": bill(report)}


def bill(report: dict[str, Any]) -> str:
    """What all of it cost."""
    total = report["cost"]["total"]
    money = " + ".join(f"{amount:.4g} {currency}" for currency, amount in total["money"].items())
    return f"{total['flops']:.3g} FLOPs, {total['seconds']:,.0f} device seconds" + (money and f", {money}")


def plain(value: Any) -> Any:
    """`value` as strict JSON holds it: what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
