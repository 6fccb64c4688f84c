"""What `python -m gacha odds` prints for a person: a block per recipe, then the duel and the decisions."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gacha.finals import Config

SHOWN = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Of the best of k, the k that are told."""


def in_words(result: dict[str, Any], config: "Config") -> str:
    """The result for a person: a block per group, best group first."""
    sign = 1 if result["lower_is_better"] else -1
    groups = result["groups"]
    order = sorted(groups, key=lambda name: sign * groups[name]["mean"] if groups[name]["n"] else math.inf)
    blocks = ["\n".join([name, *(f"  {line}" for line in group_lines(groups[name], config))]) for name in order]
    if told := result.get("duel"):
        p = f"{told['p_improvement']:.0%} ({told['p_improvement_lo']:.0%} to {told['p_improvement_hi']:.0%})"
        beats = f"a run of {told['a']} beats one of {told['b']} with probability {p}"
        blocks.append(f"duel: {told['told']}\n  {beats}; permutation p = {told['permutation_p']:.2g}")
    for size, told in result.get("decisions", {}).items():
        averaged, single = (
            f"{one.value:.0%} ({one.lo:.0%} to {one.hi:.0%})" for one in (told["averaged"], told["single"])
        )
        pairs = f"{told['pairs']} pairs of {told['recipes']} recipes"
        blocks.append(f"{config.scale} {size}: of {pairs} {averaged} are in the final order, by one seed {single}")
    return "\n\n".join(blocks)


def group_lines(told: dict[str, Any], config: "Config") -> list[str]:
    """One group's block, without its name."""
    n = told["n"]
    counts = f"{n} final{'s' * (n != 1)}, {told['n_diverged']} diverged" + (
        f", {told['n_missing']} missing" if told["n_missing"] else ""
    )
    if not n:
        return [counts]
    if n == 1:
        # One pull says nothing of the next: no odds, price or stopping value that a reader could trust.
        return [f"{counts}: {told['mean']:.6g}, and nothing about the next pull"]
    scatter = f"sd {told['sd']:.3g} ({told['sd_lo']:.3g} to {told['sd_hi']:.3g})"
    lines = [f"{counts}: mean {told['mean']:.6g}, {scatter}, {told['min']:.6g} to {told['max']:.6g}"]
    if told["n_diverged"]:
        p = told["p_diverge"]
        lines.append(f"diverges {p['p']:.0%} ({p['lo']:.0%} to {p['hi']:.0%})")
    ks = [k for k in told["best_of"] if int(k) in SHOWN or int(k) == n]
    rows = [["best of", *ks], ["expected", *(f"{told['best_of'][k]['u']:.6g}" for k in ks)]]
    rows += [[end, *(f"{told['best_of'][k][key]:.6g}" for k in ks)] for end, key in (("from", "lo"), ("to", "hi"))]
    if told["p_hit"]:
        rows.append(["hits", *(f"{told['p_hit'][k]['p']:.1%}" for k in ks)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if any(not told["best_of"][k]["trusted"] for k in ks):
        lines.append(f"beyond best of {n // 2} the interval rests on a tail that {n} pulls hardly show")
    if config.target is not None:
        lines += target_lines(told, config)
    if told["reservation"] is not None:
        end = f"({told['reservation_lo']:.6g} to {told['reservation_hi']:.6g})"
        lines.append(f"stop pulling when you hold {told['reservation']:.6g} {end} or better")
    for found in told["outliers"]:
        run = f", run {found['run']}" if "run" in found else ""
        lines.append(f"outlier: {found['value']:.6g} (line {found['line']}{run}), robust z {found['z']:+.1f}")
    for key, one in told.get("split", {}).items():
        if not math.isnan(one["variance"]):
            ends = f"sd {one['variance'] ** 0.5:.3g} ({one['lo'] ** 0.5:.3g} to {one['hi'] ** 0.5:.3g})"
            lines.append(f"scatter from {key}: {ends}, {one['share']:.0%} of the variance")
    return lines + early_lines(told)


def target_lines(told: dict[str, Any], config: "Config") -> list[str]:
    """What the target costs."""
    price, hits = told["price"], f"{told['hits']} of {told['n']} reach {config.target:g}"
    p = "" if math.isnan(told["p_one_sided"]) else f", the mean does with p = {told['p_one_sided']:.2g}"
    if price["p"] == 0:
        return [f"{hits}{p}: no price from pulls that never did"]
    spend = f", {price['spend']:.6g} to spend" if "spend" in price else ""
    return [
        f"{hits}{p}; a hit with {config.confidence:.0%} takes {price['pulls']} pull{'s' * (price['pulls'] != 1)}{spend}"
    ]


def early_lines(told: dict[str, Any]) -> list[str]:
    """How early a rank is known, at four points, and the schedule that buys the most."""
    ranks = told.get("rank_known")
    if not ranks:
        return []
    points = [min(ranks, key=lambda one: abs(one["fraction"] - at)) for at in (0.2, 0.4, 0.6, 0.8)]
    known = ", ".join(f"{one['spearman'].value:+.2f} at {one['fraction']:.0%}" for one in points)
    best = told["buys_most"]
    saved, regret = (
        f"{one.value:.{digits}} ({one.lo:.{digits}} to {one.hi:.{digits}})"
        for one, digits in ((best["saved"], "0%"), (best["regret_sd"], "2f"))
    )
    schedule = f"{best['family']}, {best['parameter']} ({best['setting']})" if best["parameter"] else "stopping nobody"
    return [
        f"rank correlation with the final: {known}",
        f"at up to 0.1 sd of mean regret {schedule} saves most: {saved} of the compute, regret {regret} sd",
    ]
