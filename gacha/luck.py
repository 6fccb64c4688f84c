"""What a report says of luck: per recipe its odds, between recipes their duels, over pulls when one could be stopped.

gacha/odds.py, duel.py and stopping.py have the statistics; here runs and rows become their plain arrays, and their
numbers plain dicts for the page and report.json.
"""

import itertools
import math
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gacha import odds, siblings
from gacha.pulls import FINISHED, NOT_A_RECIPE, Measure
from gacha.runs import Run

RATES = ("lr", "learning_rate", "peak_lr")
"""Config fields that name a learning rate; the first that is there counts."""
DUELLISTS = 12
"""Recipes at most, the best ones, of which every pair duels."""
LINES = 8
"""Lines at most of the learning-rate view: recipes but for their learning rate, the best ones."""
CURVES, ROWS = 8, 5
"""Pulls, and rows of the value in each, from which early stopping can be judged."""
ALIKE = 0.97
"""Share of the longest budget that all must have for pulls of several recipes to be judged together."""
REGRET = 0.1
"""Seed sd that the schedule which saves most may lose on average."""
JUDGED = 400
"""Pulls at most from which it is judged: more say nothing new."""
LEADING, SMALL = 5, 20
"""The first recipes of the report, and any of so few finals, have intervals of their best of k: they take a second."""
CONFIDENCE = 0.9
"""Of reaching the target, when its price is told."""


class Asked(NamedTuple):
    """What the reader of a report wants to know beyond the pulls."""

    target: float = math.nan
    """The value a pull must reach."""
    worth: float = math.nan
    """Money that one unit of the value is worth."""
    duel: tuple[str, ...] = ()
    """Two recipes; none: the two best."""


def recipe_summary(
    name: str, rows: list[dict[str, Any]], varied: list[str], measure: Measure, asked: Asked
) -> dict[str, Any]:
    """The statistics of one recipe's pulls; `best_of` and `p_hit` are keyed by the number of pulls."""
    finished = [row for row in rows if row["status"] in FINISHED]
    diverged = [row for row in rows if row["status"] == "diverged"]
    finals = [row for row in finished if math.isfinite(row["value"])]
    decided = len(finished) + len(diverged)
    told: dict[str, Any] = {"recipe": name} | {key: rows[0][key] for key in varied}
    told |= {"n": len(rows), "n_finished": len(finished), "n_diverged": len(diverged), "n_finals": len(finals)}
    told |= {"mean": math.nan, "sd": math.nan, "sd_lo": math.nan, "sd_hi": math.nan, "min": math.nan, "max": math.nan}
    told |= {"outliers": [], "best_of": {}, "p_diverge": None, "per_finished": {}}
    told |= {"p_hit": {}, "p_one_sided": None, "to_target": None, "reservation": None}
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
    if finals:
        values = np.array([row["value"] for row in finals])
        spread = odds.spread(values)
        told |= {"mean": spread.mean, "sd": spread.sd, "sd_lo": spread.sd_lo, "sd_hi": spread.sd_hi}
        told |= {"min": spread.low, "max": spread.high}
        if len(finals) >= 4:
            told["outliers"] = [finals[i]["name"] for i in odds.outliers(values)]
        told["best_of"] = best_of(values, measure, intervals=False)  # see `intervals`
        told |= of_target(finals, diverged, told["best_of"], measure, asked)
        cost = sum(row["money"] for row in finals + diverged) / (len(finals) + len(diverged)) / asked.worth
        if len(finals) > 1 and cost > 0:
            r = odds.reservation(values, cost, measure.lower_is_better, len(diverged))
            told["reservation"] = {"value": r.value, "lo": r.lo, "hi": r.hi, "cost": cost}
    return told


def best_of(values: ArrayLike, measure: Measure, intervals: bool) -> dict[str, dict[str, Any]]:
    """Expected best of k pulls by k."""
    told = odds.best_of_curve(values, lower_is_better=measure.lower_is_better, intervals=intervals)
    return {str(got.k): {"u": got.u, "v": got.v, "lo": got.lo, "hi": got.hi, "trusted": got.trusted} for got in told}


def intervals(recipes: list[dict[str, Any]], rows: list[dict[str, Any]], measure: Measure) -> None:
    """Give the best of k its interval, in place, in the LEADING recipes and all of SMALL numbers."""
    finals = finals_by_recipe(rows)
    for place, recipe in enumerate(recipes):
        if recipe["n_finals"] and (place < LEADING or recipe["n_finals"] <= SMALL):
            recipe["best_of"] = best_of(finals[recipe["recipe"]], measure, intervals=True)


def of_target(
    finals: list[dict[str, Any]],
    diverged: list[dict[str, Any]],
    best_of: dict[str, Any],
    measure: Measure,
    asked: Asked,
) -> dict[str, Any]:
    """The odds and the price of reaching the target; nothing without one.

    Of every pull that is started the observed share diverges, after the share of its budget that it did here.
    """
    if math.isnan(asked.target):
        return {}
    values = [row["value"] for row in finals]
    n, hits = len(values), odds.hits_of(values, asked.target, measure.lower_is_better)
    p_hit = {}
    for k in map(int, best_of):
        p = odds.p_hit(hits, n, k)
        p_hit[str(k)] = {"p": p.value, "lo": p.lo, "hi": p.hi}
    unit = "money" if all(row["money"] > 0 for row in finals) else "seconds"
    whole = float(np.mean([row[unit] for row in finals]))
    early = [row["diverged_at"] for row in diverged if math.isfinite(row["diverged_at"])]
    detect = min(1.0, float(np.mean(early))) if early else 1.0
    lost = len(diverged) / (len(diverged) + n)
    told: dict[str, Any] = {"hits": hits, "n": n, "confidence": CONFIDENCE, "unit": unit}
    for end, share in zip(("", "_lo", "_hi"), odds.probability(hits, n), strict=True):
        got = odds.price(share, 1.0, lost, detect, confidence=CONFIDENCE)  # in units of a whole pull's cost
        told |= {f"pulls{end}": got.pulls, f"spend{end}": got.spend * whole, f"spend_mean{end}": got.spend_mean * whole}
    one_sided = odds.p_one_sided(values, asked.target, measure.lower_is_better) if n > 1 else math.nan
    return {"p_hit": p_hit, "p_one_sided": one_sided, "to_target": told}


def finals_by_recipe(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The finals of each recipe's finished pulls."""
    found = defaultdict(list)
    for row in rows:
        if row["status"] in FINISHED and math.isfinite(row["value"]):
            found[row["recipe"]].append(row["value"])
    return dict(found)


def duels(rows: list[dict[str, Any]], order: list[str], measure: Measure, asked: Asked) -> dict[str, Any] | None:
    """The duel asked for, or that of the two first recipes of `order`; of DUELLISTS of them every pair.

    Recipes of two finals or more duel. None where no two of them are.
    """
    from gacha import duel

    finals = {name: np.array(values) for name, values in finals_by_recipe(rows).items() if len(values) > 1}
    best = [name for name in order if name in finals]
    pair = list(asked.duel or best[:2])
    if len(pair) < 2 or any(name not in finals for name in pair):
        return None
    a, b = pair
    kept = pair + [name for name in best if name not in pair][: DUELLISTS - 2]
    shown = [name for name in best if name in kept]
    pairs: list[dict[str, Any]] = []
    for one, other in itertools.combinations(shown, 2):
        difference, p = duel.welch(finals[one], finals[other])
        better = duel.p_better(finals[one], finals[other], measure.lower_is_better)
        pairs.append({"a": one, "b": other, "difference": difference._asdict(), "welch_p": p})
        pairs[-1]["p_improvement"] = better._asdict()
    for fought, p in zip(pairs, duel.holm([fought["welch_p"] for fought in pairs]), strict=True):
        fought["holm_p"] = p
    told = flat(duel.duel(finals[a], finals[b], measure.lower_is_better, (a, b)))
    return {"a": a, "b": b, "asked": bool(asked.duel), **told, "recipes": shown, "of": len(best), "pairs": pairs}


def flat(told: Any) -> dict[str, Any]:
    """A NamedTuple as a dict of plain values, its estimates as {value, lo, hi}."""
    return {
        key: value._asdict() if isinstance(value, odds.Estimate) else value for key, value in told._asdict().items()
    }


def stopping(pulls: list[Run], recipe: dict[str, str], order: list[str], measure: Measure) -> list[dict[str, Any]]:
    """How early a pull's rank is known, and what stopping others early saves and risks: in the largest recipe, in all.

    `recipe`: the recipe of each run's id, `order`: the recipes as the report has them. Judged are recipes of CURVES
    finished pulls with ROWS values, and all pulls together (recipe "") where there are several recipes and no budget is
    longer than another.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    ends: dict[str, list[float]] = defaultdict(list)
    finals: dict[str, list[float]] = defaultdict(list)
    for run in pulls:
        series = run.history.get(measure.metric)
        if series is None or run.status not in (*FINISHED, "diverged"):
            continue
        x = series.tokens if np.isfinite(series.tokens).any() else series.step.astype(np.float64)
        known = np.isfinite(x) & np.isfinite(series.value)
        if known.sum() >= ROWS or (run.status == "diverged" and known.any()):
            found[recipe[run.id]].append((x[known], series.value[known]))
            if run.status in FINISHED:
                ends[recipe[run.id]].append(float(x[known][-1]))
                finals[recipe[run.id]].append(float(series.value[known][-1]))
    told = []
    name = max(order, key=lambda one: len(ends[one]))
    if len(ends[name]) >= CURVES:
        told.append(judged(name, found[name], measure))
    last = [end for group in ends.values() for end in group]
    if len(found) > 1 and len(last) >= CURVES and min(last) >= ALIKE * max(last):
        told.append(judged("", [curve for curves in found.values() for curve in curves], measure, seed_sd(finals)))
    return told


def seed_sd(finals: dict[str, list[float]]) -> float | None:
    """The sd of seeds within recipes, pooled; None where no recipe was pulled twice."""
    groups = [np.array(group) for group in finals.values() if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(sum(((group - group.mean()) ** 2).sum() for group in groups) / freedom) if freedom else None


def judged(
    name: str, curves: list[tuple[np.ndarray, np.ndarray]], measure: Measure, sd: float | None = None
) -> dict[str, Any]:
    """Ranks and stopping rules of one group of curves, JUDGED of them spread over the group; regret also in `sd`."""
    from gacha import stopping as rules

    chosen = np.unique(np.linspace(0, len(curves) - 1, min(JUDGED, len(curves))).round().astype(int))
    fractions, values = rules.align([curves[i] for i in chosen])
    outcomes = rules.frontier(fractions, values, measure.lower_is_better, sd)
    return {
        "recipe": name,
        "n": len(values),
        "sd_of": "seeds" if name or sd is not None else "these pulls",
        "rank_known": [flat(rank) for rank in rules.rank_known(fractions, values, measure.lower_is_better)],
        "frontier": [flat(outcome) for outcome in outcomes],
        "buys_most": flat(rules.buys_most(outcomes, REGRET)) | {"allowed_sd": REGRET},
    }


def learning_rates(
    pulls: list[Run], rows: list[dict[str, Any]], varied: list[str], measure: Measure
) -> dict[str, Any] | None:
    """Finals over the learning rate, a line for each recipe but for its learning rate; None for a single rate.

    sensitivity of a line: mean over its rates of the mean final less the best rate's (Wortsman et al. 2023, whose cap
    at the loss of initialization needs pulls that reached it: rates at which all diverged are counted beside it).
    """
    field = next((name for name in RATES if any(name in run.config for run in pulls)), None)
    rate = {run.id: run.config.get(field) for run in pulls} if field else {}
    rates = {value for value in rate.values() if isinstance(value, int | float) and 0 < value < math.inf}
    if len(rates) < 2:
        return None
    kept = [key for key in varied if key not in siblings.BOOKKEEPING | NOT_A_RECIPE | set(RATES)]
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if rate[row["run_id"]] in rates:
            lines[repr([row[key] for key in kept])].append(row)
    told = [line_of(members, rate, kept, measure) for members in lines.values()]
    told = [line for line in told if len(line["points"]) > 1 and line["best_lr"] is not None]
    told.sort(key=lambda line: measure.sign * line["best"])
    return {"field": field, "lines": told[:LINES], "of": len(told)} if told else None


def line_of(rows: list[dict[str, Any]], rate: dict[str, Any], kept: list[str], measure: Measure) -> dict[str, Any]:
    """One line of the learning-rate view, its points by increasing rate."""
    by_rate: dict[float, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_rate[float(rate[row["run_id"]])].append(row)
    points = []
    for lr, members in sorted(by_rate.items()):
        finals = [row["value"] for row in members if row["status"] in FINISHED and math.isfinite(row["value"])]
        mean = float(np.mean(finals)) if finals else math.nan
        ends = (min(finals), max(finals)) if finals else (math.nan, math.nan)
        lost = sum(row["status"] == "diverged" for row in members)
        points.append({"lr": lr, "n": len(finals), "mean": mean, "lo": ends[0], "hi": ends[1], "diverged": lost})
    known = [point for point in points if point["n"]]
    best = min(known, key=lambda point: measure.sign * point["mean"], default=None)
    sensitivity = math.nan
    if best and len(known) > 1:
        sensitivity = float(np.mean([measure.sign * (point["mean"] - best["mean"]) for point in known]))
    return {
        "settings": {key: rows[0][key] for key in kept},
        "points": points,
        "best_lr": best["lr"] if best else None,
        "best": best["mean"] if best else math.nan,
        "sensitivity": sensitivity,
        "all_diverged": sum(not point["n"] and point["diverged"] > 0 for point in points),
    }
