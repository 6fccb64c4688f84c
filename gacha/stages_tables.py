"""The tables of the report's section of post-training: verdicts, scores, control, fields, base, failures, runs."""

import math
import statistics
from html import escape
from typing import Any

import webpage
from gacha.gains import SURE
from gacha.luck_page import number_or_none
from gacha.pulls import brief
from gacha.pulls_page import MEANING, setting
from gacha.stages import SPREAD
from gacha.stages_figures import spoken
from gacha.stages_text import interval, level, plain_number, points
from webpage import NONE, icon

RUNS, FAILURES, CONTROLS = 200, 60, 80
"""Rows at most of those tables; report.json has all."""
SAID = 240
"""Characters at most of what the guard said."""
COLUMNS = 8
"""Stages at most in the table of fields."""
BROKEN = 0.15
"""How far a field lies below the median of its stage's fields to be marked."""
MARKS = {"gain": " ▲", "harm": " ▼"}
OF_BASE = {"gain": "better", "harm": "worse", "no gain": "no change shown"}


def head_cell(group: dict[str, Any], place: int, with_start: bool = False) -> str:
    """The cell that names a row's stage, and what it started from."""
    notes = [" · ".join([brief(group["recipe"]), *(f"{k} {setting(v)}" for k, v in group["settings"].items())])]
    notes += [f"from {brief(group['from'], 30)}"] * (with_start and bool(group["from"]))
    lines = "".join(f"<small>{escape(note)}</small>" for note in notes)
    random = " from random weights" * (group["control"] and not with_start)
    return (
        f'<th scope="row" title="{escape(group["recipe"])}"><i class="dot r{place % 5}"></i>'
        f"{escape(group['stage'])}{random}{lines}</th>"
    )


def text_cell(text: str, kind: str = "text") -> str:
    """A cell of plain text."""
    return f'<td class="{kind}">{escape(text)}</td>'


def level_cell(value: float, is_share: bool) -> str:
    """A cell of a score."""
    return number_or_none(value, lambda x: level(x, is_share))


def points_cell(value: float, is_share: bool) -> str:
    """A cell of a change of a score."""
    return number_or_none(value, lambda x: moved(x, is_share))


def moved(value: float, is_share: bool) -> str:
    """A change of a score without its unit, which the note tells."""
    return points(value, is_share).removesuffix(" points")


def verdict_cell(verdict: str, say: str | None = None) -> str:
    """The word, coloured; `say` in its place."""
    said = verdict if say is None else say
    return f'<td class="{kind_of(verdict)}">{escape(said)}{MARKS.get(verdict, "")}</td>'


def kind_of(verdict: str) -> str:
    """The class that colours a verdict."""
    return verdict if verdict in MARKS else "open"


def gain_table(told: dict[str, Any], groups: list[dict[str, Any]]) -> tuple[str, str]:
    """A row a stage: its main score before and after, gain, certainty, failures, word."""
    several = len({group["main"] for group in groups}) > 1
    heads = [
        "Stage",
        "Verdict",
        "#Seeds",
        *["Score"] * several,
        "#Before",
        "#After",
        "#Gain",
        "#p",
        "#95% by its items",
    ]
    heads += ["#Gained", "#Collapsed"]
    rows = []
    for place, group in enumerate(groups):
        one = group["scores"].get(group["main"])
        head = head_cell(group, place, with_start=True)
        score = [text_cell(spoken(group["main"]))] * several
        if one is None or not one["n"]:
            cells = [verdict_cell("not measured"), webpage.number(group["n"]), *score, *[webpage.number(None)] * 6]
            rows.append([head, *cells, rate(group["collapsed"])])
            continue
        p, corrected = one["p"], one["holm_p"]
        of_items = interval({"lo": one["items_lo"], "hi": one["items_hi"]}, one["share"])
        rows.append(
            [
                head,
                verdict_cell(one["verdict"]),
                webpage.number(one["n"], f"{one['n']}" + f" of {group['n']}" * (one["n"] < group["n"])),
                *score,
                level_cell(one["before"], one["share"]),
                level_cell(one["after"], one["share"]),
                below(one["change"], moved(one["change"], one["share"]), bare(interval(one, one["share"]))),
                below(p, f"{p:.2g}", "" if math.isnan(corrected) else f"Holm {corrected:.2g}"),
                f'<td class="number">{escape(bare(of_items)) or NONE}</td>',
                rate(group["gained"]),
                rate(group["collapsed"]),
            ]
        )
    note = (
        "Gain: mean over seeds of end less start of the same run, paired by seed, with its 95% interval: one-sample t; "
        "of a single seed the interval is that of its items. "
        f"Verdict: p below {SURE:g} after Holm's correction over the stages; else no gain. By its items: what as many "
        "other items could have made of it (Newcombe), wider than the truth as both ends saw the same items. Shares "
        "with their exact (Clopper–Pearson) 95% interval. Collapsed: diverged, below its start by more than its "
        "items scatter, or below half the median of its siblings. "
        "Gained: seeds that ended above their start. Runs that diverged count in the gain where their "
        "end was scored; those that crashed or were asked to stop do not."
    )
    if told["repeated"]:
        note += f" {told['repeated']} runs that repeat a seed from the same start are left out: the newest counts."
    return webpage.table("What each stage brought", heads, rows), note


def bare(told: str) -> str:
    """An interval without its brackets."""
    return told.removeprefix(" (95% ").removesuffix(")")


def below(value: float, text: str, *notes: str, kind: str = "open") -> str:
    """A cell of a number with notes under it, the first in the colour of `kind`."""
    if not math.isfinite(value):
        return webpage.number(None)
    lines = "".join(
        f'<small class="{kind if i == 0 else "open"}">{escape(note)}</small>' for i, note in enumerate(notes)
    )
    return f'<td class="number" data-v="{value}">{escape(text)}{lines}</td>'


def rate(told: dict[str, Any] | None) -> str:
    """k of n with its interval."""
    if told is None:
        return webpage.number(None)
    return below(told["p"], f"{told['k']} of {told['n']}", f"{told['lo']:.0%} to {told['hi']:.0%}")


def score_table(told: dict[str, Any], groups: list[dict[str, Any]]) -> tuple[str, str] | None:
    """A row a stage, a column a score: where it ended, and its change."""
    if not told["scores"]:
        return None
    rows = []
    for place, group in enumerate(groups):
        row = [head_cell(group, place)]
        for score in told["scores"]:
            one = group["scores"][score]
            if not one["n"]:
                row.append(webpage.number(None))
                continue
            kind = kind_of(one["verdict"]) if score != SPREAD else "open"
            change = moved(one["change"], one["share"]) + (MARKS[kind] if kind != "open" else "")
            lines = (change, bare(interval(one, one["share"])))
            row.append(below(one["after"], level(one["after"], one["share"]), *lines, kind=kind))
        rows.append(row)
    heads = ["Stage", *(f"#{'sampling sd' if score == SPREAD else spoken(score)}" for score in told["scores"])]
    note = (
        "Mean at the end, below it the change in points with its 95% interval. ▲ gain, ▼ harm after Holm's correction "
        "over the stages of each column. sampled: at temperature 1, the others greedy. Sampling sd: mean over items of "
        "the sd of repeated samples' exact match: how far the same question gets different answers."
    )
    return webpage.table("Every score apart", heads, rows), note


def control_table(told: dict[str, Any]) -> tuple[str, str] | None:
    """The stage from pretrained weights against the same from random ones, a row a score."""
    rows = []
    for one in told["controls"]:
        for score, found in one["scores"].items():
            p = found["p"]
            sure = p < SURE
            verdict = ("gain" if found["value"] > 0 else "harm") if sure and score != SPREAD else "open"
            said = {"gain": "pretraining helps", "harm": "pretraining hurts"}.get(verdict, "no evidence")
            said = "one seed: not known" if math.isnan(p) else "" if score == SPREAD else said
            rows.append(
                [
                    webpage.words(
                        f"{one['stage']}: {spoken(score)}", brief(one["recipe"]) + " · " + brief(one["control"])
                    ),
                    webpage.number(found["n"], f"{found['n']} and {found['n_control']}"),
                    level_cell(found["mean"], found["share"]),
                    level_cell(found["control"], found["share"]),
                    points_cell(found["value"], found["share"]),
                    f'<td class="number">{escape(bare(interval(found, found["share"]))) or NONE}</td>',
                    number_or_none(p, lambda x: f"{x:.2g}"),
                    verdict_cell(verdict, said),
                ]
            )
    if not rows:
        return None
    heads = ["Score", "#Seeds", "#Pretrained", "#Random", "#Difference", "#95%", "#p", ""]
    note = "The same stage on the same data from random weights. Difference of finals with Welch's interval."
    return webpage.table("Pretrained against random", heads, rows[:CONTROLS]), note


def field_table(groups: list[dict[str, Any]]) -> tuple[str, str] | None:
    """A row a field, a column a stage: where the field ended; the broken ones marked."""
    with_fields = [(i, group) for i, group in enumerate(groups) if group["fields"]]
    shown = with_fields[:COLUMNS]
    names = list(dict.fromkeys(name for _, group in shown for name in group["fields"]))
    if not names:
        return None
    middle = {
        i: statistics.median([value for one in group["fields"].values() if math.isfinite(value := one["after"])] or [0])
        for i, group in shown
    }
    rows = []
    for name in names:
        row = [webpage.words(brief(name, 40))]
        for i, group in shown:
            one = group["fields"].get(name)
            if one is None or not math.isfinite(one["after"]):
                row.append(webpage.number(None))
                continue
            low = one["after"] < middle[i] - BROKEN
            fell = one["hi"] < 0
            note = moved(one["change"], True) if one["n"] else ""
            part = webpage.bar(min(max(one["after"], 0.0), 1.0), "diverged" if low else "ok")
            row.append(
                f'<td class="number" data-v="{one["after"]}">{part}<span class="{"harm" if low else ""}">'
                f'{level(one["after"], True)}</span><small class="{"harm" if fell else "open"}">{note}</small></td>'
            )
        rows.append(row)
    heads = [
        "Field",
        *(f"#{group['stage']}{' random' * group['control']} {brief(group['recipe'], 9)}" for _, group in shown),
    ]
    note = (
        "Share of items whose field is right, mean over seeds, and its change below. Vermilion: "
        f"{100 * BROKEN:.0f} points or more below the median field of the stage, or a change whose 95% interval lies "
        "below 0 (not corrected)."
    )
    if len(with_fields) > len(shown):
        note += f" The first {len(shown)} of {len(with_fields)} stages."
    return webpage.table("Fields", heads, rows), note


def base_table(groups: list[dict[str, Any]]) -> tuple[str, str] | None:
    """bits per byte of the base corpus before and after."""
    rows = []
    for place, group in enumerate(groups):
        one = group["base"]
        if one["n"]:
            rows.append(
                [
                    head_cell(group, place),
                    webpage.number(one["n"]),
                    number_or_none(one["before"], plain_number),
                    number_or_none(one["after"], plain_number),
                    number_or_none(one["change"], lambda x: f"{x:+.4f}"),
                    f'<td class="number">{escape(bare(interval(one, False))) or NONE}</td>',
                    number_or_none(one["change"] / one["before"] if one["before"] else math.nan, lambda x: f"{x:+.1%}"),
                    verdict_cell(one["verdict"], OF_BASE.get(one["verdict"], one["verdict"])),
                ]
            )
    if not rows:
        return None
    heads = ["Stage", "#Seeds", "#bpb before", "#After", "#Change", "#95%", "#Of it", "Verdict"]
    note = "Bits per byte of the base corpus' validation text: higher means that tuning costs what pretraining learned."
    return webpage.table("Base model", heads, rows), note


def failure_table(told: dict[str, Any]) -> tuple[str, str] | None:
    """Each run that failed: the guard's verdict, how it collapsed, first and last of what is judged."""
    found = told["failures"]
    rows = []
    for one in found[:FAILURES]:
        why = [one["stop_reason"].replace("_", " "), one["collapse"] if one["collapse"] != "diverged" else ""]
        said = [one["verdict"][:SAID]] if one["verdict"] else []
        said += [f"{event['kind']} at {event['step']}: {str(event['evidence'])[:SAID]}" for event in one["events"]]
        said += [", ".join(f"{name} {end(pair[0])} → {end(pair[1])}" for name, pair in one["evidence"].items())]
        badge = f'<span class="badge" title="{MEANING[one["status"]]}">{icon(one["status"])}{one["status"]}</span>'
        rows.append(
            [
                webpage.words(str(one["name"]), f"{one['stage']} · seed {one['seed']}"),
                f'<td class="{one["status"]}">{badge}</td>',
                text_cell(", ".join(part for part in why if part) or "–"),
                webpage.number(one["steps"]),
                f'<td class="text evidence">{"<br>".join(map(escape, filter(None, said)))}</td>',
            ]
        )
    if not rows:
        return None
    note = "What the guard said and saw, and first → last logged value of what it judges by."
    note += f" {len(rows)} of {len(found)} are shown." if len(found) > len(rows) else ""
    return webpage.table("Failures", ["Run", "Status", "Why", "#Updates", "Evidence"], rows), note


def end(value: float) -> str:
    """A value of a history, short."""
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def run_table(told: dict[str, Any]) -> str:
    """Every run's main score, folded away."""
    main, rows = told["main"], []
    for one in told["runs"][:RUNS]:
        start, after = (one[end].get(main, math.nan) for end in ("before", "after"))
        is_share = all(0 <= value <= 1 for value in (start, after) if math.isfinite(value))
        badge = f'<span class="badge" title="{MEANING[one["status"]]}">{icon(one["status"])}{one["status"]}</span>'
        rows.append(
            [
                webpage.words(str(one["name"])),
                text_cell(one["stage"] + " from random weights" * one["control"]),
                text_cell(str(one["seed"]), "number"),
                f'<td class="{one["status"]}">{badge}</td>',
                webpage.number(one["steps"]),
                level_cell(start, is_share),
                level_cell(after, is_share),
                number_or_none(one["kl"], lambda x: f"{x:.3g}"),
            ]
        )
    heads = ["Run", "Stage", "#Seed", "Status", "#Updates", "#Before", "#After", "#KL"]
    first = f" (the first {RUNS})" if len(told["runs"]) > RUNS else ""
    listed = webpage.table("Runs of post-training", heads, rows)
    return f"<details><summary>All {len(told['runs']):,} runs{first}</summary>{listed}</details>"
