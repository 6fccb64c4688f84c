"""`python -m gacha odds FINALS.csv --group COL --value COL`: the statistics of repeated pulls, from a table of finals.

A row is a pull: a final that is not finite is one that diverged, an empty cell one that never got there, which counts
for nothing. With --run and --step a row is a point of a pull's curve, its last one the final, and how early a rank is
known and which stopping schedule buys the most are told too.
"""

import difflib
import math
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tyro

import console
from console import UserError

LOWER = {
    *("loss", "bpb", "bpc", "bits", "nll", "ppl", "perplexity", "entropy", "error", "err", "wer", "cer", "mse", "mae"),
    *("rmse", "fid", "time", "seconds", "latency", "cost"),
}
"""Words in the name of a value of which less is better; of any other, more is."""


@dataclass(frozen=True)
class Config:
    """Odds of repeated pulls: best of k, hits, divergence, price, when to stop; duels of recipes."""

    file: tyro.conf.Positional[str]
    """Table with a header: .csv, .tsv or .csv.gz."""
    value: str
    """Column with the result."""
    group: str = ""
    """Column with the recipe; without one all rows are of one recipe."""
    lower_is_better: bool = False
    """Less is better. Without either flag the value's name decides: loss, bpb, perplexity, error, time and the like."""
    higher_is_better: bool = False
    """More is better."""
    target: float | None = None
    """What a pull must reach."""
    cost: float | None = None
    """Of one pull, in units of the value; with --worth in money."""
    worth: float | None = None
    """Money that one unit of the value is worth."""
    detect: float = 1.0
    """Share of its cost after which a diverging pull is stopped."""
    false_alarm: float = 0.0
    """Share of the good pulls that are stopped with them."""
    confidence: float = 0.9
    """Of reaching the target, when its price is told."""
    duel: tuple[str, str] | None = None
    """Two recipes: which is better?"""
    scale: str = ""
    """Column with the scale (parameters, tokens), the odds being of the largest: do smaller ones rank recipes alike?"""
    split: tuple[str, str] | None = None
    """Columns with the seeds of initialisation and of data order: how much of the scatter is whose."""
    run: str = ""
    """Column with the pull, where a row is a point of a curve."""
    step: str = ""
    """Column with the step or the tokens, where a row is a point of a curve."""
    json: bool = False
    """Print one JSON object."""


@dataclass
class Group:
    """The pulls of one recipe: their finals in file order, and what else the file says of each."""

    values: list[float] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    seeds: list[tuple[str, str]] = field(default_factory=list)
    curves: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    diverged: int = 0
    missing: int = 0


def main(argv: Sequence[str]) -> int:
    """Print the odds of every recipe, and what else was asked for."""
    from gacha import finals_text

    config = console.parse(Config, argv, "python -m gacha odds")
    lower = check(config)
    scales = read(config)
    groups = scales[max(scales)]
    result: dict[str, Any] = {"value": config.value, "lower_is_better": lower}
    result["groups"] = {name: summarise(name, group, config, lower) for name, group in groups.items()}
    if config.duel:
        result["duel"] = fought(config, groups, lower)
    if config.scale:
        result["decisions"] = decisions(config, scales)
    if config.json:
        console.print_result(plain(result), as_json=True)
    else:
        print(finals_text.in_words(result, config))
    return 0


def check(config: Config) -> bool:
    """Whether less is better. Raises UserError for flags that cannot be meant; says on stderr what was guessed."""
    if config.lower_is_better and config.higher_is_better:
        raise UserError("--lower_is_better and --higher_is_better: give one")
    if config.cost is not None and not 0 < config.cost < math.inf:
        raise UserError(f"--cost {config.cost:g}: must be more than 0")
    if config.worth is not None and not 0 < config.worth < math.inf:
        raise UserError(f"--worth {config.worth:g}: must be more than 0")
    if config.worth is not None and config.cost is None:
        raise UserError("--worth: needs --cost, the money that one pull takes")
    if not 0 < config.detect <= 1:
        raise UserError(f"--detect {config.detect:g}: must be in (0, 1]")
    if not 0 <= config.false_alarm < 1:
        raise UserError(f"--false_alarm {config.false_alarm:g}: must be in [0, 1)")
    if not 0 < config.confidence < 1:
        raise UserError(f"--confidence {config.confidence:g}: must be between 0 and 1")
    if bool(config.run) != bool(config.step):
        raise UserError("--run and --step: curves need both")
    if config.duel and not config.group:
        raise UserError("--duel: needs --group, the column with the two recipes")
    if config.duel and config.duel[0] == config.duel[1]:
        raise UserError(f"--duel: {config.duel[0]!r} against itself")
    if config.lower_is_better or config.higher_is_better:
        return config.lower_is_better
    lower = guess_lower_is_better(config.value)
    end, flag = ("lower", "--higher_is_better") if lower else ("higher", "--lower_is_better")
    print(f"{config.value}: {end} is better, by its name; if not, give {flag}", file=sys.stderr)
    return lower


def guess_lower_is_better(column: str) -> bool:
    """Whether less of a value is better, by the words of its name: val_loss, val/bpb, testError."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column)
    return not LOWER.isdisjoint(re.split(r"[^a-z]+", words.lower()))


def read(config: Config) -> dict[float, dict[str, Group]]:
    """The groups of the file in the order of their names' first rows, by scale (0.0 where none was asked for)."""
    from gacha import csv_source

    table = csv_source.load(config.file)
    asked = [("--value", config.value), ("--group", config.group), ("--scale", config.scale)]
    asked += [("--run", config.run), ("--step", config.step), *(("--split", name) for name in config.split or ())]
    for flag, name in asked:
        if name and name not in table.columns:
            near = difflib.get_close_matches(name, table.columns, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{config.file}: no column {name!r} ({flag}); there are {', '.join(table.columns)}{meant}")
    values, rows = table.numbers(config.value), len(table.lines)
    missing = np.array([not text for text in table.columns[config.value]])
    names = table.columns[config.group] if config.group else ["all"] * rows
    scale = table.numbers(config.scale) if config.scale else np.zeros(rows)
    if not np.isfinite(scale).all():
        line = table.lines[int(np.flatnonzero(~np.isfinite(scale))[0])]
        raise UserError(f"{config.file}:{line}: no {config.scale} (--scale); every row needs one")
    seeds = [table.columns[name] for name in config.split or ()]
    members: dict[tuple[float, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in range(rows):
        run = table.columns[config.run][row] if config.run else str(row)
        members[float(scale[row]), names[row]][run].append(row)
    x = table.numbers(config.step) if config.step else np.zeros(rows)
    found: dict[float, dict[str, Group]] = defaultdict(dict)
    for (size, name), runs in members.items():
        group = found[size].setdefault(name, Group())
        for run, its in runs.items():
            ordered = sorted(its, key=lambda row: float(x[row]))
            if config.step and len(set(x[ordered].tolist())) < len(ordered):
                which = f"{config.file}:{table.lines[ordered[0]]}: run {run!r} of {name!r}"
                print(f"{which} has one {config.step} twice, as two runs would: left out as missing", file=sys.stderr)
                group.missing += 1
                continue
            last = ordered[-1]
            if config.step:
                kept = [row for row in ordered if not missing[row]]
                group.curves.append((x[kept], values[kept]))
            if missing[last]:
                group.missing += 1
            elif not math.isfinite(values[last]):
                group.diverged += 1
            else:
                group.values.append(float(values[last]))
                group.lines.append(table.lines[last])
                group.runs.append(run if config.run else "")
                group.seeds.append((seeds[0][last], seeds[1][last]) if seeds else ("", ""))
    return found


def summarise(name: str, group: Group, config: Config, lower: bool) -> dict[str, Any]:
    """The statistics of one recipe, as the JSON has them: None where a number does not exist."""
    from gacha import odds

    n = len(group.values)
    told: dict[str, Any] = {"n": n, "n_diverged": group.diverged, "n_missing": group.missing}
    told |= dict.fromkeys(("mean", "sd", "sd_lo", "sd_hi", "min", "median", "max"))
    told |= {"best_of": {}, "p_hit": {}, "reservation": None, "outliers": [], "p_one_sided": None}
    if n + group.diverged:
        p = odds.probability(group.diverged, n + group.diverged)
        told["p_diverge"] = {"p": p.value, "lo": p.lo, "hi": p.hi}
    if not n:
        return told
    spread = odds.spread(group.values)
    told |= {"mean": spread.mean, "sd": spread.sd, "sd_lo": spread.sd_lo, "sd_hi": spread.sd_hi}
    told |= {"min": spread.low, "median": spread.median, "max": spread.high}
    for i in odds.outliers(group.values):
        found = {"index": i, "line": group.lines[i], "value": group.values[i], "z": float(spread.z[i])}
        told["outliers"].append(found | ({"run": group.runs[i]} if config.run else {}))
    for best in odds.best_of_curve(group.values, lower_is_better=lower):
        told["best_of"][str(best.k)] = {key: value for key, value in best._asdict().items() if key != "k"}
    if config.target is not None:
        told |= of_target(group, told["best_of"], config, lower)
    if config.cost is not None:
        r = odds.reservation(group.values, config.cost / (config.worth or 1), lower, group.diverged)
        told |= {"reservation": r.value, "reservation_lo": r.lo, "reservation_hi": r.hi}
    if config.split:
        told["split"] = split(name, group, config)
    if config.step:
        told |= early(group, lower)
    return told


def of_target(group: Group, ks: dict[str, Any], config: Config, lower: bool) -> dict[str, Any]:
    """The odds of reaching the target, whether the mean does, and what a hit costs."""
    from gacha import odds

    n, target = len(group.values), config.target or 0.0
    hits = odds.hits_of(group.values, target, lower)
    chance = {k: odds.p_hit(hits, n, int(k)) for k in ks}
    decided, terms = n + group.diverged, (config.detect, config.false_alarm, config.confidence)
    paid = odds.price(hits / n, config.cost or 1.0, group.diverged / decided, *terms)
    return {
        "hits": hits,
        "p_hit": {k: {"p": one.value, "lo": one.lo, "hi": one.hi} for k, one in chance.items()},
        "p_one_sided": odds.p_one_sided(group.values, target, lower),
        "price": {key: value for key, value in paid._asdict().items() if "spend" not in key or config.cost},
    }


def split(name: str, group: Group, config: Config) -> dict[str, Any]:
    """The variance by seed, with its share of the whole. Raises UserError where the seeds cannot be told apart."""
    from gacha import noise

    try:
        init, data = zip(*group.seeds, strict=True)
        found = noise.variance_split(group.values, init, data)
    except ValueError as mistake:
        raise UserError(f"{config.file}: {name}: --split: {mistake}") from mistake
    whole = sum(one.value for one in found if not math.isnan(one.value))
    return {
        key: {"variance": one.value, "lo": one.lo, "hi": one.hi, "share": one.value / whole if whole else math.nan}
        for key, one in found._asdict().items()
    }


def early(group: Group, lower: bool) -> dict[str, Any]:
    """How early a rank is known and what stopping early buys; nothing for a group of too few pulls."""
    from gacha import stopping

    if len(group.curves) < 6 or len(group.values) < 2:
        return {}
    fractions, values = stopping.align(group.curves)
    if len(fractions) < 2:
        return {}
    outcomes = stopping.frontier(fractions, values, lower)
    return {
        "rank_known": [rank._asdict() for rank in stopping.rank_known(fractions, values, lower)],
        "frontier": [one._asdict() for one in outcomes],
        "buys_most": stopping.buys_most(outcomes)._asdict(),
    }


def fought(config: Config, groups: dict[str, Group], lower: bool) -> dict[str, Any]:
    """The duel that was asked for. Raises UserError for a recipe that is not there or has no finals."""
    from gacha import duel

    a, b = config.duel or ("", "")
    for name in (a, b):
        if name not in groups:
            near = difflib.get_close_matches(name, groups, n=2, cutoff=0.3) or list(groups)[:4]
            raise UserError(f"{config.file}: --duel: no group {name!r}; there are {', '.join(near)}")
        if not groups[name].values:
            raise UserError(f"{config.file}: --duel: {name!r} has no final")
    told = duel.duel(groups[a].values, groups[b].values, lower, (a, b))
    kept = told._asdict() | {"a": a, "b": b, "p_improvement": told.p_improvement.value}
    kept |= {"p_improvement_lo": told.p_improvement.lo, "p_improvement_hi": told.p_improvement.hi}
    return kept | {"n_diverged_a": groups[a].diverged, "n_diverged_b": groups[b].diverged}


def decisions(config: Config, scales: dict[float, dict[str, Group]]) -> dict[str, Any]:
    """Decision accuracy from every smaller scale to the largest."""
    from gacha import noise

    finals = {size: {k: g.values for k, g in groups.items() if g.values} for size, groups in scales.items()}
    largest = max(finals)
    told = {}
    for size in sorted(finals):
        try:
            if size < largest:
                told[f"{size:g}"] = noise.decision_accuracy(finals[size], finals[largest])._asdict()
        except ValueError as mistake:
            raise UserError(f"{config.file}: --scale: {config.scale} {size:g} to {largest:g}: {mistake}") from mistake
    return told


def plain(told: Any) -> Any:
    """For JSON: named tuples as objects, what is not finite as null."""
    if hasattr(told, "_asdict"):
        told = told._asdict()
    if isinstance(told, dict):
        return {key: plain(value) for key, value in told.items()}
    if isinstance(told, list):
        return [plain(value) for value in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told
