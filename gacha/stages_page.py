"""The report's section of post-training, and the head of a page that has nothing else.

The numbers are gacha/stages.py's, the tables gacha/stages_tables.py's. Every string that a run supplied passes
`escape`, or `literal` inside a figure.
"""

from html import escape
from typing import Any

from gacha import stages_tables
from gacha.pulls import brief
from gacha.pulls_page import setting
from gacha.stages_figures import dash_of, spoken
from gacha.stages_tables import kind_of
from gacha.stages_text import sentence
from webpage import duration, figure

LISTED = 60
"""Stages at most on the page; report.json has all."""
LINES = 8
"""Stages at most that have a line above the figures."""


def section(told: dict[str, Any], drawn: dict[str, Any]) -> str:
    """All of post-training: gains, scores apart, control, fields, base, frontier, curves, failures, runs."""
    groups = told["stages"][:LISTED]
    parts = [
        figure("stage_gains", drawn, "Gain of each stage, a dot a seed", GAINS),
        related(f"The verdicts, by {escape(spoken(told['main']))}", *stages_tables.gain_table(told, groups)),
        *(related(title, *table) for title, table in (
            ("Every score apart", stages_tables.score_table(told, groups)),
            ("Pretrained weights against random ones", stages_tables.control_table(told)),
            ("Fields", stages_tables.field_table(groups)),
            ("The base model's own text", stages_tables.base_table(groups)),
        ) if table),
    ]  # fmt: skip
    frontiers = figure("stage_reward", drawn, "Reward against KL", FRONTIER)
    frontiers += figure("stage_quality", drawn, f"Held-out {escape(spoken(told['main']))} against KL", QUALITY)
    names = dict.fromkeys(group["stage"] for group in told["stages"])
    curves = "".join(
        figure(f"stage_{name}", drawn, f"{name}: held-out {escape(spoken(told['main']))}", "") for name in names
    )
    parts += [
        f'<div class="pair">{some}</div>{note}'
        for some, note in ((frontiers, ""), (curves, f'<p class="caption">{CURVES}</p>'))
        if some
    ]
    if table := stages_tables.failure_table(told):
        parts.append(related("Failures", *table))
    parts.append(stages_tables.run_table(told))
    return f"""<section id="s-stages"><h2>Post-training: what each stage brought</h2>
{summary(told)}{legend(told)}{"".join(parts)}</section>"""


GAINS = (
    "Change from a run's own start to its end on the same held-out items, in percentage points where a score is a "
    "share. Large: mean over seeds with its 95% t interval, below it (diamonds) the same from samples at temperature "
    "1. Blue gain, vermilion harm, grey no gain, each after Holm's correction over the stages. A single seed has the "
    "interval of its items."
)
FRONTIER = (
    "A path a run, from its first update to its last (dot); up for little way to the right is good (after fig. 2 of "
    "Rafailov et al. 2023). The range is that of runs that finished."
)
QUALITY = "The same against the held-out task: where this falls while the reward rises, the reward is being gamed."
CURVES = "Thick: mean of a recipe's finished seeds, shade: their lowest to highest (of ten or more: middle 80%)."


def related(title: str, table: str, note: str) -> str:
    """A table with its heading and its note."""
    return f'<div class="related"><h3>{title}</h3>{table}<p class="caption">{note}</p></div>'


def summary(told: dict[str, Any]) -> str:
    """A line for each of the first stages that are no controls, its word first."""
    claims = [group for group in told["stages"] if not group["control"]]
    lines = []
    for group in claims[:LINES]:
        one = group["scores"].get(group["main"])
        word = one["verdict"] if one and one["n"] else "not measured"
        rest = sentence(group).removeprefix(f"{word}: ")
        said = f'<b class="{kind_of(word)}">{escape(word)}</b> {escape(rest)}'
        lines.append(f"<li><strong>{escape(name_of(group))}</strong> {said}</li>")
    if len(claims) > LINES:
        lines.append(f"<li>and {len(claims) - LINES:,} more: the first {LISTED} below, all in report.json</li>")
    return f'<ul class="brought">{"".join(lines)}</ul>'


def name_of(group: dict[str, Any]) -> str:
    """A stage in running text; its recipe where it has settings of its own."""
    apart = ", ".join(f"{key} {setting(value)}" for key, value in group["settings"].items())
    return f"{group['stage']}{' from random weights' * group['control']}{f' ({apart})' * bool(apart)}"


def legend(told: dict[str, Any]) -> str:
    """The colours of the recipes in the section's curves."""
    if len(told["stages"]) < 2:
        return ""
    listed = "".join(
        f'<li><i style="background:{dashes(i)}"></i>{escape(name_of(group))} '
        f"<code>{escape(brief(group['recipe'], 12))}</code></li>"
        for i, group in enumerate(told["stages"][:15])
    )
    return f'<ul class="legend">{listed}</ul>'


def dashes(i: int) -> str:
    """The CSS background of recipe number `i`'s line."""
    colour, gap = f"var(--{'ok' if i % 5 == 0 else f'recipe{i % 5}'})", {"solid": 0, "dash": 6, "dot": 2}[dash_of(i)]
    return f"repeating-linear-gradient(90deg,{colour} 0 {gap}px,transparent {gap}px {2 * gap}px)" if gap else colour


def hero(report: dict[str, Any]) -> str:
    """The head of a page of post-training alone: how many of its stages brought something."""
    told = report["stages"]
    claims = [group for group in told["stages"] if not group["control"]]
    words = [group["scores"][group["main"]]["verdict"] for group in claims if group["main"] in group["scores"]]
    won = words.count("gain")
    where = " · ".join(escape(name) for name in report["projects"]) or escape(report["source"])
    status = ", ".join(f"{n} {name}" for name, n in report["status"].items())
    took = report["cost"]["total"]["seconds"]
    counted = f"{len(told['runs'])} runs: {status}" + (f", {duration(took)} of device time" if took else "")
    verdict = f"<em>{won} of {len(claims)}</em> stage{'s' * (len(claims) != 1)} gain{'s' * (won == 1)}"
    return f"""<section class="hero"><p class="kicker">{where} — {counted}</p><h1>{verdict}</h1></section>"""
