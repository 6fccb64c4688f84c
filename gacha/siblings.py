"""The report's pulls among their siblings: bad batches, spikes of one pull alone, pulls that fail without a spike.

pretrain/siblings.py has the statistics; here is who is compared with whom.
"""

import math
from collections import defaultdict
from typing import Any

import numpy as np

from gacha.runs import Run
from pretrain import siblings
from pretrain.siblings import Curve

DATA_ORDER = ("data_seed", "seq_len", "batch_tokens")
"""With the same shards these make the same batch at the same step."""
SIZE = ("d_model", "n_layers", "seq_len", "batch_tokens", "tokens")
BOOKKEEPING = {
    *("data", "out", "val_every", "log_every", "checkpoint_every", "micro_batch_tokens", "checkpoint_activations"),
    *("device", "sharding", "compile", "hardware", "git_commit", "price_per_hour", "currency", "json"),
}
"""Fields that may differ between recipes without being a setting of what is trained."""
SIBLINGS = 16
"""Compared with one pull at most: more say nothing new."""
MATTERS = 0.02
"""Share of the loss by which a pull must be above another recipe's to be told: recipes may differ, and are meant to."""
TAIL = 0.1
"""Last share of a curve whose median says which recipe is best."""
LOOKED_AT = 128
"""Pulls examined at most for being above their siblings: those whose loss lies highest above theirs."""
BLOCKS = 24
"""Blocks of a group's steps over which that is asked."""


def compare(pulls: list[Run], recipes: dict[str, list[Run]], varied: list[str]) -> dict[str, Any]:
    """`bad_batches`, `alone` and `above`, each a list of dicts, largest excess first; empty where nobody has siblings.

    pulls are of one report, `recipes` the same by their recipe, `varied` the settings in which recipes differ.
    """
    curves = {run.id: curve for run in pulls if (curve := curve_of(run)) is not None}
    there = [run for run in pulls if run.id in curves]
    return {**spikes(there, curves), "above": above(there, curves, recipes, varied)}


def curve_of(run: Run) -> Curve | None:
    """The pull's training loss, or None if it logged none."""
    series = run.history.get("train/loss")
    if series is None or not np.isfinite(series.value).any():
        return None
    return Curve(run.name, series.step, series.value)


def shards_of(run: Run) -> Any:
    """Fingerprint of the token shards, None where the run does not say."""
    lineage = run.config.get("lineage")
    return lineage.get("shards") if isinstance(lineage, dict) else run.config.get("lineage.shards")


def spikes(pulls: list[Run], curves: dict[str, Curve]) -> dict[str, list[dict[str, Any]]]:
    """Bad batches, by the pulls that share their data order, and the spikes that only one of those has."""
    orders: dict[Any, list[Run]] = defaultdict(list)
    for run in pulls:
        order = (shards_of(run), *(run.config.get(name) for name in DATA_ORDER))
        # A pull that went back and passed over data has another batch at the same step from then on.
        if None not in order and not run.summary.get("stability/retries"):
            orders[repr(order)].append(run)
    shared, alone = [], []
    for members in orders.values():
        rests = {run.id: siblings.residuals(curves[run.id]) for run in members}
        found = []
        for run in members:
            others = [rests[other.id] for other in members if other is not run][:SIBLINGS]
            found += [(run, event) for event in siblings.attributed(rests[run.id], others)]
        found.sort(key=lambda pair: pair[1]["step"])
        batches: list[list[tuple[Run, dict[str, Any]]]] = []
        for run, event in found:
            if event["p"] >= siblings.CHANCE:
                if event["siblings_with_step"] and not event["siblings_hit"]:
                    alone.append({"run_id": run.id, "name": run.name, "tokens": tokens_at(run, event["step"]), **event})
            elif batches and event["step"] <= max(other["until"] for _, other in batches[-1]):
                batches[-1].append((run, event))
            else:
                batches.append([(run, event)])
        shared += [bad_batch(batch, members) for batch in batches]
    shared.sort(key=lambda batch: -batch["excess"])
    alone.sort(key=lambda event: -event["excess"])
    return {"bad_batches": shared, "alone": alone}


def bad_batch(batch: list[tuple[Run, dict[str, Any]]], members: list[Run]) -> dict[str, Any]:
    """One entry of the list: where, which pulls, of how many, median excess over them, probability of chance."""
    first, event = batch[0]
    names = sorted({run.name for run, _ in batch})
    return {
        "step": event["step"],
        "until": max(event["until"] for _, event in batch),
        "tokens": tokens_at(first, event["step"]),
        "excess": float(np.median([event["excess"] for _, event in batch])),
        "runs": names,
        "of": len(members),
        "p": min(event["p"] for _, event in batch),
    }


def tokens_at(run: Run, step: int) -> float:
    """Tokens trained on at a step of the training loss; the step itself in runs that log no tokens."""
    series = run.history["train/loss"]
    at = int(np.searchsorted(series.step, step))
    tokens = float(series.tokens[min(at, len(series.step) - 1)])
    return tokens if math.isfinite(tokens) else float(step)


def above(
    pulls: list[Run], curves: dict[str, Curve], recipes: dict[str, list[Run]], varied: list[str]
) -> list[dict[str, Any]]:
    """Pulls far above their recipe's other seeds, or else above those of recipes that differ in one setting.

    A pull that diverged is no silent failure, and nobody's measure.
    """
    healthy = {run.id for run in pulls if run.status != "diverged"}
    groups = {name: [run for run in members if run.id in healthy] for name, members in recipes.items()}
    rules = agreed(groups, curves, varied)
    examined = highest(groups, curves, rules)
    told = []
    for name, members in groups.items():
        rest = rules.get(name)
        for run in members:
            if run.id not in examined:
                continue
            mates = [curves[other.id] for other in members if other is not run][:SIBLINGS]
            got = siblings.forecast(curves[run.id], mates)
            by, setting = [name], None
            if got["step"] is None and rest:
                by, setting = rest
                others = [curves[other.id] for recipe in by for other in groups[recipe]][:SIBLINGS]
                got = siblings.forecast(curves[run.id], others)
                if got["step"] is None or got["relative"] < MATTERS or got["evidence"]["back"]:
                    continue
            if got["step"] is None:
                continue
            evidence = got["evidence"]
            told.append(
                {
                    "run_id": run.id,
                    "name": run.name,
                    "recipe": name,
                    "by": by,
                    "setting": setting,
                    "own": run.config.get(setting) if setting else None,
                    "theirs": [groups[recipe][0].config.get(setting) for recipe in by] if setting else None,
                    "siblings": evidence["siblings"],
                    "step": got["step"],
                    "tokens": tokens_at(run, got["step"]),
                    "share": share_of_budget(run, got["step"]),
                    "z": got["z"],
                    "excess_nats": got["excess_nats"],
                    "relative": got["relative"],
                    "end_excess_nats": evidence["end_excess_nats"],
                    "back": evidence["back"],
                }
            )
    return sorted(told, key=lambda row: -row["end_excess_nats"])


def highest(
    groups: dict[str, list[Run]], curves: dict[str, Curve], rules: dict[str, tuple[list[str], str]]
) -> set[str]:
    """Ids of the LOOKED_AT pulls furthest above the median of their recipe, or of the recipes that are its rule.

    By the mean loss of blocks of steps: what is far above its siblings for good is so in two neighbouring blocks.
    """
    if sum(map(len, groups.values())) <= LOOKED_AT:
        return {run.id for members in groups.values() for run in members}
    last = max(float(curves[run.id].step[-1]) for members in groups.values() for run in members)
    edges = np.linspace(0, last, BLOCKS + 1)
    levels = {
        name: np.array([block_means(curves[run.id], edges) for run in members]) for name, members in groups.items()
    }
    heights: dict[str, float] = {}
    for name, members in groups.items():
        for names in ([name] if len(members) > 1 else [], rules[name][0] if name in rules else []):
            if not names or not members:
                continue
            together = np.concatenate([levels[other] for other in names if len(levels[other])])
            known = np.isfinite(together).any(axis=0)
            centre = np.full(BLOCKS, np.nan)
            centre[known] = np.nanmedian(together[:, known], axis=0)
            excess = np.nan_to_num(levels[name] / centre - 1, nan=-1.0)
            for run, most in zip(members, np.minimum(excess[:, 1:], excess[:, :-1]).max(axis=1), strict=True):
                heights[run.id] = max(heights.get(run.id, -1.0), float(most))
    return set(sorted(heights, key=lambda one: -heights[one])[:LOOKED_AT])


def block_means(curve: Curve, edges: np.ndarray) -> np.ndarray:
    """Mean loss between neighbouring edges of steps, (edges - 1,); NaN where the curve has no row."""
    keep = np.isfinite(curve.loss)
    sums = np.concatenate([[0.0], np.cumsum(curve.loss[keep])])
    at = np.searchsorted(curve.step[keep], edges, side="right")
    counts = np.diff(at)
    return np.divide(np.diff(sums[at]), counts, out=np.full(len(counts), np.nan), where=counts > 0)


def agreed(
    groups: dict[str, list[Run]], curves: dict[str, Curve], varied: list[str]
) -> dict[str, tuple[list[str], str]]:
    """By recipe: those, best first, that differ from it in one setting, end lower, and are the rule for it; which one.

    The rule: most pulls that differ in this setting alone end within MATTERS of the best. Where they do not, as over a
    grid of learning rates, the setting is what is being studied, and a pull is where its setting puts it.
    """
    settings = [key for key in varied if key not in BOOKKEEPING]
    values: dict[str, tuple[str, ...]] = {}
    for name, members in groups.items():
        fixed = [shards_of(members[0]), *(members[0].config.get(key) for key in SIZE)] if members else [None]
        if None not in fixed:
            values[name] = (repr(fixed), *(repr(members[0].config.get(key)) for key in settings))
    ends = {name: end_loss(groups[name], curves) for name in values}
    told: dict[str, tuple[list[str], str]] = {}
    for place, setting in enumerate(settings, start=1):
        axes: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name, told_of in values.items():
            axes[(*told_of[:place], *told_of[place + 1 :])].append(name)
        for names in axes.values():
            names.sort(key=lambda name: (ends[name], name))
            limit = ends[names[0]] * (1 + MATTERS)
            near = [name for name in names if ends[name] <= limit]
            if 2 * sum(len(groups[name]) for name in near) > sum(len(groups[name]) for name in names):
                for name in names[len(near) :]:
                    told.setdefault(name, (near[:SIBLINGS], setting))
    return told


def end_loss(members: list[Run], curves: dict[str, Curve]) -> float:
    """Median over pulls of the last tenth of the training loss."""
    ends = [curves[run.id].loss[-max(1, int(TAIL * len(curves[run.id].loss))) :] for run in members]
    return float(np.median([np.median(end) for end in ends]))


def share_of_budget(run: Run, step: int) -> float:
    """Tokens at a step over the pull's budget; NaN where it has none."""
    budget = run.config.get("tokens")
    return tokens_at(run, step) / budget if isinstance(budget, int | float) and budget > 0 else math.nan
