"""The report's table of pulls, and the bar above it with which report.js filters table and figures."""

import math
from html import escape
from typing import Any

from gacha import siblings
from gacha.pulls import FINISHED, brief
from webpage import NONE, duration, icon, si

MEANING = {
    "ok": "finished, loss healthy to the end",
    "spiked": "finished; the loss left its trend and came back",
    "diverged": "stopped: the loss left its trend for good, or was not finite",
    "stopped": "asked to stop before the end, everything saved",
    "crashed": "killed or failed: no exit record",
    "running": "still writing",
}
SETTINGS = 6
"""Columns at most of settings in which recipes differ; report.json has all."""
CHOICES = 300
"""Recipes at most that the bar offers, the first of the report."""


def shown(value: float) -> str:
    """A value as the page prints it: four decimals, or five digits where it is large."""
    return "" if not math.isfinite(value) else f"{value:.4f}" if abs(value) < 1000 else f"{value:.5g}"


def setting(value: Any) -> str:
    """A configuration value, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:40]


def settings_shown(report: dict[str, Any]) -> list[str]:
    """The settings that the table and the legend name: those of the training first, SETTINGS of them."""
    return sorted(report["varied"], key=lambda key: key in siblings.BOOKKEEPING)[:SETTINGS]


def bar(sections: list[tuple[str, str]], report: dict[str, Any], waiting: bool) -> str:
    """Links to the sections (id, title), and what filters: recipe, text, curves that wait until they are asked for."""
    links = "".join(f'<a href="#{place}">{title}</a>' for place, title in sections)
    recipes, rows, tools = report["recipes"], report["pulls"], ""
    if len(recipes) > 1:
        options = "".join(
            f'<option value="r{i}">{escape(brief(recipe["recipe"], 40))} ({recipe["n"]})</option>'
            for i, recipe in enumerate(recipes[:CHOICES])
        )
        tools += (
            f'<label>Recipe <select id="recipe"><option value="">all {len(recipes)}</option>{options}</select></label>'
        )
    if len(rows) > 12:
        tools += '<label>Find <input type="search" id="find" placeholder="name, status, lr 0.003"></label>'
    if waiting:
        tools += '<label><input type="checkbox" id="every"> every pull&#8217;s curve</label>'
    tools = f'<div class="tools" id="tools" hidden>{tools}</div>' if tools else ""
    return f'<nav class="sections" aria-label="Sections">{links}{tools}</nav>'


def columns(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(key of a row, heading) of the columns that some pull fills."""
    rows = report["pulls"]
    currencies = {row["currency"] for row in rows if row["currency"]}
    unit = f" ({escape(next(iter(currencies)))})" if len(currencies) == 1 else ""
    told = [("name", "Pull"), ("recipe", "Recipe"), ("seed", "Seed")]
    told += [(key, escape(key)) for key in settings_shown(report)]
    told += [("status", "Status"), ("value", escape(report["value"]["metric"])), ("val_loss_min", "val/loss min")]
    told += [("tokens", "Tokens"), ("used", "Budget used"), ("diverged_at", "Diverged at"), ("seconds", "Time")]
    told += [("flops", "FLOPs"), ("money", f"Money{unit}")]
    always, counted = ("name", "recipe", "status", "value"), ("tokens", "used", "seconds", "flops", "money")
    return [
        (key, head)
        for key, head in told
        if key in always or any(known(value := value_of(row, key)) and (value or key not in counted) for row in rows)
    ]


def value_of(row: dict[str, Any], key: str) -> Any:
    """What a column sorts by."""
    if key == "used":
        return row["tokens"] / row["tokens_budget"] if row["tokens_budget"] > 0 else math.nan
    if key == "status":
        return list(MEANING).index(row["status"])
    if key == "value":
        return row["value"] if row["status"] in FINISHED else math.nan
    return row[key]


def known(value: Any) -> bool:
    """Is there anything to show?"""
    return value is not None and value != "" and not (isinstance(value, float) and not math.isfinite(value))


def table(report: dict[str, Any]) -> str:
    """The pulls, one per row; the headings sort, report.js shortens a long one and filters."""
    rows, told = report["pulls"], columns(report)
    order = "ascending" if report["value"]["lower_is_better"] else "descending"
    head = "".join(
        f'<th scope="col" aria-sort="{order if key == "value" else "none"}"'
        f'{"" if key in ("name", "recipe", "status") else " class=number"}><button type="button">{name}</button></th>'
        for key, name in told
    )
    best = report["best"]["run_id"] if report["best"] else None
    which = {recipe["recipe"]: i for i, recipe in enumerate(report["recipes"])}
    mixed = len({row["currency"] for row in rows if row["currency"]}) > 1
    keys = [key for key, _ in told]
    body = "".join(table_row(row, keys, row["run_id"] == best, which[row["recipe"]], mixed) for row in rows)
    caption = f"{escape(report['value']['metric'])} of a pull that did not finish is its last one measured, and counts "
    caption += "in no statistic. "
    if any(row["estimated"] for row in rows):
        caption += "≈ is estimated at its siblings' rate: a killed pull leaves no bill. "
    caption += "A row that is pointed at or focused (arrow keys) stands out in the figures."
    tall = " tall" if len(rows) > 16 else ""
    return f"""<section id="s-pulls"><h2>The pulls</h2>
<div class="scroll{tall}" role="region" aria-label="Table of pulls" tabindex="0"><table id="pulls">
<caption class="unseen">Pulls, best first, with status, result and cost</caption>
<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p class="tools" id="length" hidden><output id="count"></output> <button type="button" id="whole">Show all</button></p>
<p class="caption">{caption}</p></section>"""


def table_row(row: dict[str, Any], keys: list[str], kept: bool, which: int, mixed: bool) -> str:
    """One pull's row; `data-v` carries what a column sorts by, where it is not the cell's text."""
    name = escape(str(row["name"]))
    cells = [f'<th scope="row" title="run {escape(row["run_id"])}">{name}{KEEP if kept else ""}</th>']
    if kept:
        cells = [cells[0].replace("<th ", f'<th data-v="{name}" ', 1)]
    for key in keys[1:]:
        value = value_of(row, key)
        if key == "value" and row["status"] not in FINISHED and math.isfinite(row["value"]):
            text = f'<td class="number partial" data-v="" title="last measured, not a final">{shown(row["value"])}</td>'
        elif not known(value):
            text = f'<td class="number" data-v="">{NONE}</td>'
        else:
            text = cell(row, key, value, mixed)
        cells.append(text)
    classes = f"{row['status']}{' kept' if kept else ''}"
    return f'<tr class="{classes}" data-run="{escape(row["run_id"])}" data-recipe="r{which}">{"".join(cells)}</tr>\n'


KEEP = ' <span class="keep">keep</span>'


def cell(row: dict[str, Any], key: str, value: Any, mixed: bool) -> str:
    """A cell of something known."""
    rough = "≈ " if key in row["estimated"] else ""
    kind, raw = "number", escape(str(value))
    if key == "recipe":
        return f'<td data-v="{raw}"><code title="{raw}">{escape(brief(value))}</code></td>'
    if key == "status":
        status = row["status"]
        return f'<td data-v="{raw}"><span class="badge" title="{MEANING[status]}">{icon(status)}{status}</span></td>'
    if key in ("value", "val_loss_min"):
        text = shown(value)
    elif key in ("tokens", "flops"):
        text = rough + si(value)
    elif key == "used":
        kind = "number used"
        bar = f'<span class="bar" aria-hidden="true"><i style="width:{min(value, 1) * 100:.1f}%"></i></span>'
        raw, text = f"{value:.4f}", bar + f"{value:.0%}"
    elif key == "diverged_at":
        text = f"{value:.1%}"
    elif key == "seconds":
        text = rough + duration(value)
    elif key == "money":
        text = rough + f"{value:.3g}" + (f" {escape(row['currency'])}" if mixed else "")
    else:
        text = escape(setting(value))
    return f'<td class="{kind}"{"" if text == raw else f" data-v={chr(34)}{raw}{chr(34)}"}>{text}</td>'
