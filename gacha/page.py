"""The report as one HTML file (see webpage.py). Every string that a run supplied passes `escape`."""

import math
from html import escape
from pathlib import Path
from typing import Any

import webpage
from gacha import figures, runs
from gacha.runs import Run
from webpage import NONE, duration, figure, icon, si

HERE = Path(__file__).parent
LISTED = 12
"""Rows at most of a table of the siblings' section; report.json has all."""
SAMPLES = 6
"""At most this many rows of the best pull's table of samples are shown."""
MEANING = {
    "ok": "finished, loss healthy to the end",
    "spiked": "finished; the loss left its trend and came back",
    "diverged": "stopped: the loss left its trend for good, or was not finite",
    "stopped": "asked to stop before the end, everything saved",
    "crashed": "killed or failed: no exit record",
    "running": "still writing",
}


def build(report: dict[str, Any], pulls: list[Run]) -> str:
    """The page's HTML, given `report.summarise`'s numbers and the runs they came from."""
    drawn = figures.build(report, pulls)
    body = "\n".join(
        (
            hero(report),
            table(report),
            curve_section(report, drawn),
            sibling_section(report),
            odds_section(report, drawn),
            cost_section(report),
            sample_section(report, pulls),
            notes(report),
        )
    )
    title = ", ".join(report["projects"]) or report["source"]
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return webpage.build(f"{title} · llm-gacha report", body, drawn, style, script)


def hero(report: dict[str, Any]) -> str:
    """The answer first: which pull to keep, how sure, and the tray of capsules."""
    best, rows = report["best"], report["pulls"]
    recipes = len(report["recipes"])
    where = " · ".join(escape(name) for name in report["projects"]) or escape(report["source"])
    if report["sweeps"]:
        where += " · sweep " + ", ".join(f"<code>{escape(sweep)}</code>" for sweep in report["sweeps"])
    counted = f"{len(rows)} pull{'s' * (len(rows) != 1)} of {recipes} recipe{'s' * (recipes != 1)}"
    if best is None:
        going = report["status"].get("running", 0)
        verdict = "Nothing to keep yet" if going else "No pull to keep"
        lead = "No pull has finished with a validation score" + (f"; {going} still running." if going else ".")
    else:
        verdict = f"Keep <em>{escape(short(best, rows))}</em>"
        lead = sureness(report)
    wall = len(rows) > 14  # too many for labels: small capsules, their names on hover and in the table
    tray = "".join(
        f'<li class="{row["status"]}{" kept" if best and row["run_id"] == best["run_id"] else ""}" '
        f'title="{escape(str(row["name"]))}: {row["status"]}">{icon(row["status"])}'
        f"<b>{escape(short(row, rows))}</b><span>{row['status']}</span></li>"
        for row in rows[:500]
    )
    return f"""<section class="hero">
<p class="kicker">{where} — {counted}</p>
<h1>{verdict}</h1>
<p class="lead">{lead}</p>
<ol class="tray{" wall" if wall else ""}" aria-label="The pulls, best first">{tray}</ol>
<dl class="keys">{"".join(key_numbers(report))}</dl>
</section>"""


def short(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """`s3` where seeds tell the pulls apart in what is shown, else the pull's full name."""
    same = [other for other in rows if other["seed"] == row["seed"] and other["recipe"] == row["recipe"]]
    return f"s{row['seed']}" if row["seed"] is not None and len(same) == 1 else str(row["name"])


def sureness(report: dict[str, Any]) -> str:
    """The lead over the second best in seed sd, and whether so much of a lead is anything special."""
    best = report["best"]
    recipe = next(r for r in report["recipes"] if r["recipe"] == best["recipe"])
    text = f"<strong>{escape(str(best['name']))}</strong> reaches {best['val_bpb']:.4f} bits per byte"
    if best["runner_up"] is None:
        return text + "; it is its recipe's only finished pull, so nothing says how lucky it was."
    text += f", {best['lead']:.4f} below {escape(str(best['runner_up']))}."
    if math.isnan(best["lead_sd"]):
        return text + " Two finished pulls are too few to say whether that is much."
    n = recipe["n_finals"]
    text += f" That is {best['lead_sd']:.2f} of the spread between seeds (sd {recipe['sd']:.4f}, n = {n}); "
    share = best["lead_share"]
    said = f"{share:.0%} of sets of {n} equal, normally scattered pulls have a winner that leads by as much"
    if share > 0.2:
        return text + f"{said}: nothing says it is more than the luckiest of equals."
    return text + f"only {said}, so it stands out from its siblings."


def key_numbers(report: dict[str, Any]) -> list[str]:
    """The row of large numbers: best, spread, divergence, cost."""
    best, main, total = report["best"], report["recipes"][0], report["cost"]["total"]

    def key(name: str, value: str, note: str) -> str:
        return f"<div><dt>{name}</dt><dd>{value}</dd><dd class='note'>{note}</dd></div>"

    base = report["baseline_bpb"]
    told = []
    if best:
        if base:
            side = "below" if best["val_bpb"] < base else "above"
            note = f"{abs(1 - best['val_bpb'] / base):.1%} {side} a Kneser–Ney 5-gram ({base:.4f})"
        else:
            note = "bits per UTF-8 byte, lower is better"
        told.append(key("Best val/bpb", f"{best['val_bpb']:.4f}", note))
    n = main["n_finals"]
    if n > 1:
        note = f"sd of val/bpb over {n} seeds, mean {main['mean']:.4f}; 95% {main['sd_lo']:.4f} to {main['sd_hi']:.4f}"
        told.append(key("Spread over seeds", f"{main['sd']:.4f}", note))
    rates = [r["p_diverge"] for r in report["recipes"] if r["p_diverge"]]
    if p := main["p_diverge"]:
        note = f"of recipe {escape(main['recipe'])}; 95% {p['lo']:.0%} to {p['hi']:.0%}"
        if len(rates) > 1:
            note += f" · all recipes: {sum(r['k'] for r in rates)} of {sum(r['n'] for r in rates)}"
        told.append(key("Diverged", f"{p['k']} of {p['n']}", note))
    note = f"{duration(total['seconds'])} of device time, {si(total['flops'])}FLOPs"
    told.append(key("Cost", money(total["money"]) if total["money"] else duration(total["seconds"]), note))
    return told


def table(report: dict[str, Any]) -> str:
    """The pulls, one per row; report.js makes the headings sort."""
    rows, varied = report["pulls"], report["varied"]
    currencies = {row["currency"] for row in rows if row["currency"]}
    unit = f" ({escape(next(iter(currencies)))})" if len(currencies) == 1 else ""
    heads = [
        "Pull",
        "Recipe",
        "Seed",
        *map(escape, varied),
        "Status",
        "val/bpb",
        "val/loss min",
        "Tokens",
        "Budget used",
    ]
    heads += ["Diverged at", "Time", "FLOPs", f"Money{unit}"]
    text = {"Pull", "Recipe", "Status"}
    head = "".join(
        f'<th scope="col" aria-sort="{"ascending" if name == "val/bpb" else "none"}"'
        f'{"" if name in text else " class=number"}><button type="button">{name}</button></th>'
        for name in heads
    )
    body = "".join(table_row(row, varied, report["best"], len(currencies) > 1) for row in rows)
    rough = any(row["estimated"] for row in rows)
    caption = "val/bpb of a pull that did not finish is its last one measured, and counts in no statistic. "
    caption += "≈ is estimated at its siblings' rate: a killed pull leaves no bill." if rough else ""
    tall = " tall" if len(rows) > 16 else ""
    return f"""<section><h2>The pulls</h2>
<div class="scroll{tall}" role="region" aria-label="Table of pulls" tabindex="0"><table id="pulls">
<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p class="caption">{caption}</p></section>"""


def table_row(row: dict[str, Any], varied: list[str], best: dict[str, Any] | None, mixed: bool) -> str:
    """One pull's row; `data-v` carries what a column sorts by."""
    kept = best is not None and row["run_id"] == best["run_id"]
    finished = row["status"] in ("ok", "spiked")

    def cell(value: Any, shown: str, kind: str = "number") -> str:
        raw = "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value
        return f'<td class="{kind}" data-v="{escape(str(raw))}">{NONE if raw == "" else shown}</td>'

    def rough(field: str, shown: str) -> str:
        return ("≈ " if field in row["estimated"] else "") + shown

    used = row["tokens"] / row["tokens_budget"] if row["tokens_budget"] > 0 else math.nan
    bar = f'<span class="bar" aria-hidden="true"><i style="width:{min(used, 1) * 100:.1f}%"></i></span>{used:.0%}'
    status = row["status"]
    badge = f'<span class="badge {status}" title="{MEANING[status]}">{icon(status)}{status}</span>'
    name = escape(str(row["name"])) + (' <span class="keep">keep</span>' if kept else "")
    bpb = f"{row['val_bpb']:.4f}"
    paid = rough("money", f"{row['money']:.3g}" + (f" {escape(row['currency'])}" if mixed else ""))
    cells = [
        f'<th scope="row" data-v="{escape(str(row["name"]))}" title="run {escape(row["run_id"])}">{name}</th>',
        cell(row["recipe"], f"<code>{escape(row['recipe'][:16])}</code>", "text"),
        cell(row["seed"], escape(str(row["seed"]))),
        *(cell(row[key], escape(setting(row[key]))) for key in varied),
        cell(list(MEANING).index(row["status"]), badge, "text"),
        cell(row["val_bpb"] if finished else math.nan, bpb)
        if finished or math.isnan(row["val_bpb"])
        else f'<td class="number partial" data-v="" title="last measured, not a final">{bpb}</td>',
        cell(row["val_loss_min"], f"{row['val_loss_min']:.4f}"),
        cell(row["tokens"], si(row["tokens"])),
        cell(used, bar if math.isfinite(used) else "", "number used"),
        cell(row["diverged_at"], "" if math.isnan(row["diverged_at"]) else f"{row['diverged_at']:.1%}"),
        cell(row["seconds"], rough("seconds", duration(row["seconds"]))),
        cell(row["flops"], rough("flops", si(row["flops"]))),
        cell(row["money"], paid),
    ]
    classes = f"{row['status']}{' kept' if kept else ''}"
    return f'<tr class="{classes}" data-run="{escape(row["run_id"])}">{"".join(cells)}</tr>'


def curve_section(report: dict[str, Any], drawn: dict[str, Any]) -> str:
    """Curves over tokens and the diverged pull's last moments."""
    if not drawn.keys() & {"loss", "bpb", "event"}:
        return ""
    first = next((row for row in report["pulls"] if row["status"] == "diverged"), None)
    band = "Thin: one pull. Thick: mean of a recipe's finished seeds; shade: their lowest to highest."
    off = " The vertical range is the healthy pulls'; a diverged pull leaves it at the top." if first else ""
    off += " Drag to zoom, double-click to come back."
    name = escape(str(first["name"])) if first else ""
    legend = "".join(
        f'<li><i style="background:var(--{"ok" if i == 0 else f"recipe{i}"})"></i>'
        f"<code>{escape(r['recipe'][:16])}</code> "
        + ", ".join(f"{escape(key)} {escape(setting(r[key]))}" for key in report["varied"])
        + "</li>"
        for i, r in enumerate(report["recipes"][:5])
        if r["n_finished"]
    )
    if first:
        legend += '<li><i style="background:var(--diverged)"></i>diverged</li>'
    if report["siblings"]["bad_batches"]:
        legend += '<li><i class="batch"></i>bad batch</li>'
    if {"crashed", "stopped", "running"} & report["status"].keys():
        legend += '<li><i class="dotted"></i>did not finish</li>'
    return f"""<section><h2>Curves</h2><ul class="legend">{legend}</ul>
<div class="pair">{figure("loss", drawn, "Training loss", band + off)}
{figure("bpb", drawn, "Validation, bits per byte", "Comparable across tokenizers; lower is better.")}</div>
{figure("event", drawn, "The moment it diverged", f"{name} before it was stopped; its finished siblings in blue.")}
</section>"""


def sibling_section(report: dict[str, Any]) -> str:
    """What only shows beside sibling runs: bad batches, spikes of one pull alone, failures without a spike."""
    relations = report["siblings"]
    parts = []
    if found := relations["above"]:
        rows = []
        for row in found[:LISTED]:
            by = f"{row['siblings']} other seed{'s' * (row['siblings'] != 1)} of its recipe"
            if row["setting"] is not None:
                theirs = ", ".join(map(setting, row["theirs"][:4])) + " …" * (len(row["theirs"]) > 4)
                by = f"{row['siblings']} pulls with {row['setting']} {theirs}, not {setting(row['own'])}"
            share = f" · {row['share']:.0%}" if math.isfinite(row["share"]) else ""
            rows.append(
                [
                    webpage.words(str(row["name"])),
                    f'<td class="text">{escape(by)}</td>',
                    webpage.number(row["step"], f"{row['step']:,}{share}"),
                    webpage.number(row["z"], f"{row['z']:.1f}"),
                    webpage.number(row["excess_nats"], f"{row['excess_nats']:+.3f}"),
                    webpage.number(row["end_excess_nats"], f"{row['end_excess_nats']:+.3f}" + " back" * row["back"]),
                ]
            )
        heads = ["Pull", "Above", "#Known at step", "#z", "#Nats then", "#Nats at its end"]
        note = (
            "Training loss against that of the siblings at the same step, in blocks of the run: known where a CUSUM "
            "of the excess, in sd of what a further sibling would scatter, passes 5. No spike is needed for it."
        )
        parts.append(related("Far above their siblings", heads, rows, len(found), note))
    if found := relations["bad_batches"]:
        rows = [
            [
                webpage.number(batch["step"], f"{batch['step']:,}"),
                webpage.number(batch["until"], f"{batch['until']:,}"),
                webpage.number(batch["excess"], f"{batch['excess']:+.3f}"),
                webpage.number(len(batch["runs"]), f"{len(batch['runs'])} of {batch['of']}"),
                webpage.number(batch["p"], f"{batch['p']:.1e}"),
                f'<td class="text">{escape(which(batch["runs"], batch["of"]))}</td>',
            ]
            for batch in found[:LISTED]
        ]
        heads = ["#Step", "#Until", "#Nats above the trend", "#Pulls", "#By chance", "Which"]
        note = (
            "A spike at the same step of pulls that share their data order belongs to the batch, not to the training; "
            "step n met the batch of data step n - 1. "
            "By chance: how likely the coincidence is, given how often these pulls have such outliers anyway."
        )
        parts.append(related("Bad batches", heads, rows, len(found), note))
    if found := relations["alone"]:
        rows = [
            [
                webpage.words(str(event["name"])),
                webpage.number(event["step"], f"{event['step']:,}"),
                webpage.number(event["until"], f"{event['until']:,}"),
                webpage.number(event["excess"], f"{event['excess']:+.3f}"),
                webpage.number(event["siblings_with_step"], f"0 of {event['siblings_with_step']}"),
            ]
            for event in found[:LISTED]
        ]
        heads = ["Pull", "#Step", "#Until", "#Nats above its trend", "#Siblings too"]
        note = "The same batch left every sibling on its trend: these spikes are of the pull, not of the data."
        parts.append(related("Spikes of one pull alone", heads, rows, len(found), note))
    if not parts:
        return ""
    return f"<section><h2>Siblings</h2>{''.join(parts)}</section>"


def which(names: list[str], of: int) -> str:
    """The first four of the names, or all where they are."""
    return "all" if len(names) == of else ", ".join(names[:4]) + " …" * (len(names) > 4)


def related(title: str, heads: list[str], rows: list[list[str]], found: int, note: str) -> str:
    """One table of the siblings' section."""
    more = f" The {len(rows)} largest of {found:,} are shown." if found > len(rows) else ""
    return f"""<div class="related"><h3>{title}</h3>{webpage.table(title, heads, rows)}
<p class="caption">{note}{more}</p></div>"""


def odds_section(report: dict[str, Any], drawn: dict[str, Any]) -> str:
    """Spread over seeds and what another pull is worth."""
    if "strip" not in drawn:
        return ""
    recipe = report["recipes"][0]
    n = recipe["n_finals"]
    dots = "One dot per finished pull, the best one ringed; below them mean ± sd."
    if recipe["outliers"]:
        dots += f" Far from the others (robust z above 3.5): {', '.join(map(escape, recipe['outliers']))}."
    worth = (
        f"Mean best of all subsets of the {n} finished pulls of <code>{escape(recipe['recipe'][:16])}</code> "
        "(unbiased). Shade: 95% percentile interval of a bootstrap over runs"
    )
    worth += "; with so few pulls it is crude, and never reaches below the best one seen." if n < 10 else "."
    if recipe["n_diverged"]:
        worth += " The cost includes the diverged pulls met on the way."
    return f"""<section><h2>Luck</h2><div class="pair">
{figure("strip", drawn, "Spread over seeds", dots)}
{figure("best_of", drawn, "Expected best of so many pulls", worth)}</div></section>"""


def cost_section(report: dict[str, Any]) -> str:
    """Where the money went."""
    lines = [
        ("total", "All pulls", ""),
        ("diverged", "Spent on pulls that diverged", "nothing to keep"),
        ("unfinished", "Spent on pulls that did not finish", "stopped or crashed; resumable from their checkpoint"),
        ("saved", "Saved by stopping diverged pulls", "the rest of their budget at their own rate"),
    ]
    body = "".join(
        f'<tr class="{name}"><th scope="row">{label}<small>{note}</small></th><td class="number">{bill["pulls"]}</td>'
        f'<td class="number">{si(bill["tokens"])}</td><td class="number">{si(bill["flops"])}</td>'
        f'<td class="number">{duration(bill["seconds"])}</td>'
        f'<td class="number">{money(bill["money"]) or NONE}</td></tr>'
        for name, label, note in lines
        if (bill := report["cost"][name])["pulls"]
    )
    heads = "".join(
        f"<th scope=col class=number>{h}</th>" for h in ("Pulls", "Tokens", "FLOPs", "Device time", "Money")
    )
    return f"""<section><h2>Cost</h2>
<div class="scroll" role="region" aria-label="Cost" tabindex="0"><table class="cost">
<thead><tr><th scope="col"></th>{heads}</tr></thead><tbody>{body}</tbody></table></div></section>"""


def sample_section(report: dict[str, Any], pulls: list[Run]) -> str:
    """What the best pull writes."""
    best = report["best"]
    run = next((run for run in pulls if best and run.id == best["run_id"]), None)
    rows = runs.table(run.tables["samples"]) if run and "samples" in run.tables else []
    if not rows or best is None:
        return ""
    newest = [row for row in rows if row.get("step") == rows[-1].get("step")][:SAMPLES]
    said = []
    for row in newest:
        prompt, text = (str(row.get(key) or "") for key in ("prompt", "text"))
        text = text.removeprefix(prompt)
        said.append(f'<blockquote lang="ja"><p><mark>{escape(prompt)}</mark>{escape(text)}</p></blockquote>')
    return f"""<section><h2>What it writes</h2>
<p class="caption">{escape(str(best["name"]))}, prompts marked; sampled at the end of the pull, not selected.</p>
<div class="samples">{"".join(said)}</div></section>"""


def notes(report: dict[str, Any]) -> str:
    """How the numbers are made, and from what."""
    items = [
        "Only finished pulls (ok, spiked) count in spread and best-of; probabilities of divergence are of finished and "
        "diverged pulls, with the exact (Clopper–Pearson) 95% interval.",
        "Ranking is exact on this validation set. How far it carries to other text is not measured here.",
        "The sd's interval is the chi-square one, right if finals scatter normally.",
        "bpb: bits per UTF-8 byte of the validation text, all pieces and document ends scored.",
    ]
    if report["damaged"]:
        items.append(f"{report['damaged']} damaged stretches of the run files were skipped; what they held is missing.")
    listed = "".join(f"<li>{item}</li>" for item in items)
    return f"""<footer><h2>How to read this</h2><ul>{listed}</ul>
<p>Read from <code>{escape(report["source"])}</code>, {escape(report["generated"])}. The same numbers are in report.json
beside this page.</p></footer>"""


def setting(value: Any) -> str:
    """A configuration value, short."""
    return f"{value:g}" if isinstance(value, float) else str(value)[:40]


def money(amounts: dict[str, float]) -> str:
    """Sums by currency, three digits or whole units."""
    return " + ".join(
        escape(f"{amount:,.0f} {currency}" if amount >= 1000 else f"{amount:.3g} {currency}")
        for currency, amount in amounts.items()
    )
