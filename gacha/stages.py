"""What post-training brought: the gain of each stage over its seeds, with its interval and a word for it.

Runs in, plain values out; gacha/stages_page.py makes them HTML, gacha/stages_figures.py curves. A stage is the runs of
one job type and one recipe. Each of them scored its start and its end on the same held-out items, so gains are paired.
"""

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from gacha import duel, pulls, siblings
from gacha.finals import guess_lower_is_better
from gacha.gains import items_error, paired, share, word
from gacha.pulls import FINISHED, Measure
from gacha.runs import Run, table

STAGES = ("sft", "reward", "dpo", "kto", "grpo", "rloo", "ppo", "distill")
"""Job types of post-training, in the order in which a road usually takes them."""
SCORES = ("exact_match", "field_accuracy", "valid", "sampled_exact_match", "sampled_field_accuracy", "sampled_valid")
"""Scores of the held-out task in the page's order; of each, more is better."""
SPREAD = "sampled_sd"
"""Scatter of one item's repeated samples: told, never judged, since a model that is always wrong has none."""
OTHERS = 4
"""Scores of other names at most, such as a reward model's accuracy."""
DECIDED = (*FINISHED, "diverged")
"""Statuses that say what a stage did; a run that was killed or asked to stop says nothing."""
BEHIND = 0.5
"""Share of the median final of its siblings below which a run has collapsed, though it lies above its start."""
FIELDS = 40
"""Fields of the task at most."""
SETTINGS = 4
"""Settings named at most of a recipe among those of its stage."""
EVIDENCE = (
    *("policy/kl", "policy/entropy", "policy/length", "reward/mean", "reward/zero_std", "dpo/margin"),
    *("dpo/logp_chosen", "stability/grad_norm", "train/loss"),
)
"""What is shown, first and last, of a run that failed, beside its score."""
EVENTS, LAST = ("stability/events", "guard/events"), 3
"""W&B tables in which the guard writes down what it saw, and how many of a failed run's rows are told."""


def of(found: list[Run], sweep: str = "", group: str = "") -> list[Run]:
    """The post-training runs among `found` that are of this sweep and group ("" for all)."""
    return [run for run in found if run.job_type in STAGES and sweep in ("", run.sweep_id) and group in ("", run.group)]


def summarise(tuned: list[Run], everyone: list[Run], by: str = "", main: str = "") -> dict[str, Any] | None:
    """All that page and report.json say of post-training; None without runs. NaN where something is not known.

    tuned: the runs of `of`; everyone: all that were read, among which the runs that stages started from are looked up.
    by: config field that names a recipe, as in the report. main: score that the stages are judged by; "" for exact
    match, or what is there in its place.
    """
    members: dict[tuple[str, bool, str], list[Run]] = defaultdict(list)
    for run in tuned:
        members[run.job_type, bool(run.config.get("control")), pulls.recipe_of(run, by)].append(run)
    if not members:
        return None
    kept = {key: once(runs) for key, runs in members.items()}
    repeated = len(tuned) - sum(map(len, kept.values()))
    scores = scores_of(tuned)
    main = main if main in scores else scores[0] if scores else "exact_match"
    by_name = {run.name: run for run in everyone}
    groups, rows = [], []
    for key in sorted(kept, key=lambda key: (STAGES.index(key[0]), key[1], key[2])):
        told, own = group_of(key, kept[key], scores, main)
        groups.append(told | {"from": starts_of(kept[key], by_name, by), "settings": {}})
        rows += own
    for stage in {group["stage"] for group in groups}:
        name_settings([group for group in groups if group["stage"] == stage], kept, by)
    judge(groups, scores)
    return {
        "main": main,
        "scores": scores,
        "status": dict(Counter(row["status"] for row in rows)),
        "stages": groups,
        "controls": controls(groups, kept),
        "failures": [failure(row, run, scores) for row, run in failed(rows, kept)],
        "repeated": repeated,
        "cost": pulls.costs(bills(kept)),
        "runs": rows,
    }


def once(runs: list[Run]) -> list[Run]:
    """One run of each seed and start, the newest decided one: a seed pulled twice is no second piece of evidence."""
    newest: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (run.status in DECIDED, run.started)):
        seed, lineage = run.config.get("seed"), run.config.get("lineage")
        start = lineage.get("model") if isinstance(lineage, dict) else None
        newest[repr((seed, start)) if seed is not None else run.id] = run
    return sorted(newest.values(), key=lambda run: (run.started, run.id))


def scores_of(runs: list[Run]) -> list[str]:
    """Scores that some run has of its start, the known ones first."""
    names = {key.removeprefix("eval_before/") for run in runs for key in run.summary if key.startswith("eval_before/")}
    names = {name for name in names if not name.startswith("field/") and name != "n"}
    names |= {name for name in SCORES if any(math.isfinite(before(run, name)) for run in runs)}
    known = [name for name in (*SCORES, SPREAD) if name in names]
    others = sorted(names - {*SCORES, SPREAD})[:OTHERS]
    return ([] if not known or known == [SPREAD] else known) + others + ([SPREAD] if known == [SPREAD] else [])


def before(run: Run, score: str) -> float:
    """A score of the model that the run started from: as it says at its end, or measured at step 0; else NaN."""
    told = pulls.number(run.summary, f"eval_before/{score}")
    series = run.history.get(f"eval/{score}")
    if math.isnan(told) and series is not None and len(series.step) and series.step[0] == 0:
        return float(series.value[0]) if math.isfinite(series.value[0]) else math.nan
    return told


def row_of(run: Run, recipe: str, scores: list[str]) -> dict[str, Any]:
    """One run: its scores at its start and at its end."""
    reason = run.summary.get("stop_reason")
    steps = [int(series.step[-1]) for series in run.history.values() if len(series.step)]
    return {
        "run_id": run.id,
        "name": run.name,
        "stage": run.job_type,
        "recipe": recipe,
        "control": bool(run.config.get("control")),
        "seed": run.config.get("seed"),
        "status": run.status,
        "stop_reason": str(reason) if reason else "",
        "collapse": "",
        "steps": max(steps, default=0),
        "items": pulls.number(run.summary, "eval/n"),
        "before": {score: before(run, score) for score in scores},
        "after": {score: pulls.reached(run, f"eval/{score}") for score in scores},
        "bpb_before": pulls.number(run.summary, "base/bpb_before"),
        "bpb": pulls.number(run.summary, "base/bpb"),
        "kl": pulls.last_finite(run, "policy/kl"),
        "reward": pulls.last_finite(run, "reward/mean"),
        "path": str(run.paths[-1]) if run.paths else "",
    }


def group_of(
    key: tuple[str, bool, str], runs: list[Run], scores: list[str], main: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One stage's numbers, and the rows of its runs."""
    stage, control, recipe = key
    rows = [row_of(run, recipe, scores) for run in runs]
    decided = [row for row in rows if row["status"] in DECIDED]
    items = float(np.nanmedian(known)) if (known := [row["items"] for row in rows if row["items"] > 0]) else math.nan
    told = {score: change(decided, score, items) for score in scores}
    judged = main if told.get(main, {}).get("n") else next((name for name in scores if told[name]["n"]), main)
    find_collapses(decided, judged)
    sign = -1 if judged in told and told[judged]["lower_is_better"] else 1
    gains = [sign * one["change"] for one in told[judged]["seeds"]] if judged in told else []
    fields = sorted({name for run in runs for name in run.summary if name.startswith("eval/field/")})[:FIELDS]
    told_of, by_field = [run for run in runs if run.status in DECIDED], {}
    for field in (name.removeprefix("eval/field/") for name in fields):
        names = (f"eval_before/field/{field}", f"eval/field/{field}")
        pairs = [(pulls.number(run.summary, names[0]), pulls.number(run.summary, names[1])) for run in told_of]
        by_field[field] = paired(pairs, items)
        ends = [end for _, end in pairs if math.isfinite(end)]
        if not by_field[field]["n"] and ends:
            by_field[field]["after"] = float(np.mean(ends))  # which field is broken shows without its start too
    return {
        "stage": stage,
        "recipe": recipe,
        "control": control,
        "n": len(rows),
        "n_decided": len(decided),
        "n_diverged": sum(row["status"] == "diverged" for row in decided),
        "items": items,
        "main": judged,
        "scores": told,
        "gained": share(sum(gain > 0 for gain in gains), len(gains)),
        "collapsed": share(sum(bool(row["collapse"]) for row in decided), len(decided)),
        "fields": by_field,
        "base": paired((row["bpb_before"], row["bpb"]) for row in decided) | {"lower_is_better": True},
    }, rows


def change(decided: list[dict[str, Any]], score: str, items: float) -> dict[str, Any]:
    """How a score changed over the runs that have both ends of it, with each seed's own."""
    both = [row for row in decided if math.isfinite(row["before"][score]) and math.isfinite(row["after"][score])]
    pairs = [(row["before"][score], row["after"][score]) for row in both]
    bounded = all(0 <= value <= 1 for pair in pairs for value in pair) and score != SPREAD
    told = paired(pairs, items if bounded else math.nan)
    told |= {"lower_is_better": guess_lower_is_better(score), "share": bounded, "verdict": ""}
    told["seeds"] = [
        {"seed": row["seed"], "run_id": row["run_id"], "before": one, "after": other, "change": other - one}
        for row, (one, other) in zip(both, pairs, strict=True)
    ]
    return told


def find_collapses(decided: list[dict[str, Any]], score: str) -> None:
    """Say of each row, in place, whether its run collapsed, and how: diverged, below its start, far below its siblings.

    The last two need a score that is a share of known items, and a distance beyond what those items scatter.
    """
    finals = [row["after"].get(score, math.nan) for row in decided]
    for i, row in enumerate(decided):
        start, end, items = row["before"].get(score, math.nan), finals[i], row["items"]
        others = [value for j, value in enumerate(finals) if j != i and 0 <= value <= 1]
        middle = float(np.median(others)) if len(others) > 1 else math.nan
        if row["status"] == "diverged":
            row["collapse"] = "diverged"
        elif items > 0 and 0 <= end <= 1 and 0 <= start <= 1 and items_error(start, end, items).hi < 0:
            row["collapse"] = "below its start"
        elif items > 0 and 0 <= end < BEHIND * middle and items_error(middle, end, items).hi < 0:
            row["collapse"] = "far below its siblings"


def starts_of(runs: list[Run], by_name: dict[str, Run], by: str) -> str:
    """What a stage's runs started from, as text: the stage and recipe of that run, or its name, or the model's own."""
    found = set()
    for run in runs:
        lineage = run.config.get("lineage")
        lineage = lineage if isinstance(lineage, dict) else {}
        name = str(lineage.get("model_run") or "")
        if run.config.get("control"):
            found.add("random weights")
        elif name in by_name and by_name[name] is not run:
            found.add(f"{by_name[name].job_type} {pulls.recipe_of(by_name[name], by)}")
        elif name or lineage.get("model"):
            found.add(name or f"model {str(lineage['model'])[:8]}")
    return next(iter(found)) if len(found) == 1 else f"{len(found)} models" if found else ""


def name_settings(groups: list[dict[str, Any]], kept: dict[tuple[str, bool, str], list[Run]], by: str) -> None:
    """Give the stages of one job type, in place, the settings in which they differ."""
    recipes = {
        f"{group['control']} {group['recipe']}": kept[group["stage"], group["control"], group["recipe"]]
        for group in groups
    }
    told = siblings.BOOKKEEPING | {"control", "model", "name", "stage"}
    fields = [key for key in pulls.varied_fields(recipes, by) if key not in told]
    config = {name: runs[0].config for name, runs in recipes.items()}
    fields = [key for key in fields if len({repr(one.get(key)) for one in config.values()}) > 1][:SETTINGS]
    for group, one in zip(groups, config.values(), strict=True):
        group["settings"] = {key: one.get(key) for key in fields}


def judge(groups: list[dict[str, Any]], scores: list[str]) -> None:
    """Give each change, in place, its p after Holm's correction over the stages, and its word.

    Controls are no claims: they are outside the correction, and have the word of their own p.
    """
    told = [[group["scores"][score] for group in groups] for score in scores if score != SPREAD]
    for changes in [*told, [group["base"] for group in groups]]:
        for one in changes:
            one |= {"holm_p": math.nan}
        claims = [one for group, one in zip(groups, changes, strict=True) if not group["control"]]
        for one, p in zip(claims, duel.holm([one["p"] for one in claims]), strict=True):
            one["holm_p"] = p
        for group, one in zip(groups, changes, strict=True):
            p = one["p"] if group["control"] else one["holm_p"]
            one["verdict"] = word(one, p, one["lower_is_better"])


def controls(groups: list[dict[str, Any]], kept: dict[tuple[str, bool, str], list[Run]]) -> list[dict[str, Any]]:
    """Finals of each stage from random weights against those of its kin from pretrained ones, by Welch's interval."""
    told = []
    for control in (group for group in groups if group["control"]):
        own = kept[control["stage"], True, control["recipe"]][0].config
        kin = [group for group in groups if group["stage"] == control["stage"] and not group["control"]]
        if not kin:
            continue

        def apart(group: dict[str, Any], own: dict[str, Any] = own) -> tuple[int, int]:
            other = kept[group["stage"], False, group["recipe"]][0].config
            keys = (own.keys() | other.keys()) - siblings.BOOKKEEPING - pulls.NOT_A_RECIPE
            return sum(repr(own.get(key)) != repr(other.get(key)) for key in keys), -group["n_decided"]

        nearest, found = min(kin, key=apart), {}
        for score, change in nearest["scores"].items():
            arms = [np.array([one["after"] for one in group["scores"][score]["seeds"]]) for group in (nearest, control)]
            if min(map(len, arms)):
                difference, p = duel.welch(arms[0], arms[1])
                found[score] = {"mean": float(arms[0].mean()), "control": float(arms[1].mean())}
                found[score] |= difference._asdict() | {"p": p, "n": len(arms[0]), "n_control": len(arms[1])}
                found[score] |= {"share": change["share"]}
        told.append({"stage": control["stage"], "recipe": nearest["recipe"], "control": control["recipe"]})
        told[-1] |= {"scores": found}
    return told


def failed(
    rows: list[dict[str, Any]], kept: dict[tuple[str, bool, str], list[Run]]
) -> list[tuple[dict[str, Any], Run]]:
    """Runs that the guard spoke about, that ended early, or that collapsed."""
    by_id = {run.id: run for runs in kept.values() for run in runs}
    healthy = ("ok", "running")
    return [
        (row, by_id[row["run_id"]])
        for row in rows
        if row["status"] not in healthy or row["stop_reason"] or row["collapse"]
    ]


def failure(row: dict[str, Any], run: Run, scores: list[str]) -> dict[str, Any]:
    """What is known of why: the guard's verdict and events, and first and last of what it judges by."""
    names = [*(f"{kind}/{score}" for score in scores[:1] for kind in ("watch", "eval")), *EVIDENCE]
    ends = {}
    for name in names:
        series = run.history.get(name)
        if series is not None and len(series.value) > 1:
            ends[name] = [float(series.value[0]), float(series.value[-1])]
    events = [
        {key: event.get(key) for key in ("step", "kind", "evidence")}
        for name in EVENTS
        for event in (table(run.tables[name]) if name in run.tables else [])
    ]
    told = {key: row[key] for key in ("run_id", "name", "stage", "recipe", "seed", "status", "stop_reason", "collapse")}
    told |= {"steps": row["steps"], "verdict": str(run.summary.get("verdict") or "")}
    return told | {"events": events[-LAST:], "evidence": ends}


def bills(kept: dict[tuple[str, bool, str], list[Run]]) -> list[dict[str, Any]]:
    """The runs as `pulls.costs` takes them."""
    rows = [pulls.row_of(run, key[2], [], Measure("eval/exact_match", False)) for key in kept for run in kept[key]]
    pulls.estimate_costs(rows)
    return rows


def alone(told: dict[str, Any], source: str, tuned: list[Run], generated: str) -> dict[str, Any]:
    """A report of post-training only, with the keys that every report has."""
    return {
        "generated": generated,
        "source": source,
        "projects": sorted({run.project for run in tuned if run.project}),
        "sweeps": sorted({run.sweep_id for run in tuned if run.sweep_id}),
        "status": told["status"],
        "varied": [],
        "recipes": [],
        "pulls": [],
        "best": None,
        "cost": told["cost"],
        "damaged": sum(run.damaged for run in tuned),
        "stages": told,
    }
