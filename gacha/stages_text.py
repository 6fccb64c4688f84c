"""What post-training brought, in words: the lines for stdout, and how page and lines print a score."""

import math
from typing import Any

from gacha import pulls
from gacha.gains import SURE


def headline(told: dict[str, Any], limit: int = 20) -> dict[str, str]:
    """A line a stage for stdout, and one for each control."""
    lines = {}
    for group in told["stages"][:limit]:
        name = f"{group['stage']}{' control' * group['control']} {pulls.brief(group['recipe'])}"
        lines[name] = sentence(group)
    if len(told["stages"]) > limit:
        lines["more stages"] = f"{len(told['stages']) - limit:,}, in report.json"
    for one in told["controls"][:limit]:
        if (score := one["scores"].get(told["main"]) and told["main"]) is None:
            continue
        found = one["scores"][score]
        said = f"pretrained {points(found['value'], found['share'])} against random weights on {score}"
        said += interval(found, found["share"]) + f", {found['n']} and {found['n_control']} seeds"
        lines[f"control {one['stage']} {pulls.brief(one['control'])}"] = said
    return lines


def sentence(group: dict[str, Any]) -> str:
    """What a stage did to its main score, and how often it failed."""
    one = group["scores"].get(group["main"])
    if not one or not one["n"]:
        text = "not measured: no run has a score before and after"
    else:
        ends = f"{level(one['before'], one['share'])} to {level(one['after'], one['share'])}"
        text = f"{one['verdict']}: {group['main']} {ends}, {points(one['change'], one['share'])}"
        text += interval(one, one["share"]) + (" by its items alone" if one["n"] == 1 else f", {one['n']} seeds")
        if one["verdict"] == "no gain" and one["p"] < SURE:
            text += f"; p {one['p']:.2g} alone, {one['holm_p']:.2g} among the stages (Holm)"
    lost = group["collapsed"]
    return text + (f"; {lost['k']} of {lost['n']} collapsed" if lost and lost["k"] else "")


def level(value: float, as_share: bool) -> str:
    """A score: percent where it is a share."""
    return "" if not math.isfinite(value) else f"{value:.1%}" if as_share else plain_number(value)


def points(value: float, as_share: bool) -> str:
    """A change of a score, in percentage points where it is a share."""
    return f"{100 * value:+.1f} points" if as_share else plain_number(value, "+")


def interval(one: dict[str, Any], as_share: bool) -> str:
    """(95% a to b), or nothing where it is not known."""
    if not math.isfinite(one["lo"]):
        return ""
    ends = [f"{100 * x:+.1f}" if as_share else plain_number(x, "+") for x in (one["lo"], one["hi"])]
    return f" (95% {ends[0]} to {ends[1]})"


def plain_number(value: float, sign: str = "") -> str:
    """A number of no unit."""
    return format(value, f"{sign}.4f" if abs(value) < 1000 else f"{sign}.5g")
