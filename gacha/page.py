"""The report as one HTML file (see webpage.py). Every string that a run supplied passes `escape`.

Here are the answer, the curves, siblings, cost and samples; pulls_page.py has the table, luck_page.py the odds,
stages_page.py post-training.
"""

import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import webpage
from gacha import figures, luck_page, pulls_page, runs, stages_figures, stages_page
from gacha.pulls import brief
from gacha.pulls_page import setting, settings_shown, shown
from gacha.runs import Run
from webpage import NONE, duration, figure, icon, si

HERE = Path(__file__).parent
LISTED = 12
"""Rows at most of a table of the siblings' section; report.json has all."""
SAMPLES = 6
"""At most this many rows of the best pull's table of samples are shown."""
LABELLED, WALL = 14, 120
"""Pulls up to which their capsules have labels, and capsules at most."""


def build(report: dict[str, Any], pulls: list[Run], tuned: Sequence[Run] = ()) -> str:
    """The page's HTML, given `report.summarise`'s numbers and the runs they came from; `tuned` those of its stages."""
    drawn = figures.build(report, pulls)
    stages = report.get("stages")
    if stages:
        drawn |= stages_figures.build(stages, tuned)
    sections = [
        ("s-pulls", "Pulls", pulls_page.table(report)),
        ("s-curves", "Curves", curve_section(report, drawn)),
        ("s-siblings", "Siblings", sibling_section(report)),
        ("s-stages", "Post-training", stages_page.section(stages, drawn) if stages else ""),
        ("s-luck", "Luck", luck_page.odds_section(report, drawn)),
        ("s-duel", "Duel", luck_page.duel_section(report)),
        ("s-stopping", "Early stopping", luck_page.stopping_section(report, drawn)),
        ("s-rates", "Learning rate", luck_page.rate_section(report, drawn)),
        ("s-cost", "Cost", cost_section(report)),
        ("s-samples", "What it writes", sample_section(report, pulls)),
    ]
    links = [(place, title) for place, title, said in sections if said]
    waiting = any("more" in one for one in drawn.values())
    body = [hero(report), pulls_page.bar(links, report, waiting), *(said for *_, said in sections), notes(report)]
    title = ", ".join(report["projects"]) or report["source"]
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return webpage.build(f"{title} · llm-gacha report", "\n".join(body), drawn, style, script)


def build_stages(report: dict[str, Any], tuned: Sequence[Run]) -> str:
    """The page of a folder with runs of post-training only; `report` is `stages.alone`'s."""
    told = report["stages"]
    drawn = stages_figures.build(told, tuned)
    foot = f"""<footer><p>Read from <code>{escape(report["source"])}</code>, {escape(report["generated"])}. The same
numbers are in report.json beside this page.</p></footer>"""
    body = [stages_page.hero(report), stages_page.section(told, drawn), cost_section(report), foot]
    title = ", ".join(report["projects"]) or report["source"]
    style = (HERE / "report.css").read_text(encoding="utf-8")
    return webpage.build(f"{title} · llm-gacha report", "\n".join(body), drawn, style)


def hero(report: dict[str, Any]) -> str:
    """The answer first: which pull to keep, how sure, and the tray of capsules."""
    best, rows = report["best"], report["pulls"]
    recipes = len(report["recipes"])
    told_apart = Counter((str(row["seed"]), row["recipe"]) for row in rows)
    where = " · ".join(escape(name) for name in report["projects"]) or escape(report["source"])
    if report["sweeps"]:
        where += " · sweep " + ", ".join(f"<code>{escape(sweep)}</code>" for sweep in report["sweeps"])
    counted = f"{len(rows)} pull{'s' * (len(rows) != 1)} of {recipes} recipe{'s' * (recipes != 1)}"
    if best is None:
        going = report["status"].get("running", 0)
        verdict = "Nothing to keep yet" if going else "No pull to keep"
        lead = f"No pull has finished with a {escape(report['value']['metric'])}" + (
            f"; {going} still running." if going else "."
        )
    else:
        verdict = f"Keep <em>{escape(short(best, told_apart))}</em>"
        lead = sureness(report)
    wall = len(rows) > LABELLED  # too many for labels: small capsules, their names on hover and in the table
    tray = "".join(
        f'<li class="{row["status"]}{" kept" if best and row["run_id"] == best["run_id"] else ""}" '
        f'title="{escape(str(row["name"]))}: {row["status"]}">{icon(row["status"])}'
        f"<b>{escape(short(row, told_apart))}</b><span>{row['status']}</span></li>"
        for row in rows[:WALL]
    )
    if len(rows) > WALL:
        rest = Counter(row["status"] for row in rows[WALL:])
        tray += f'<li class="rest">and {", ".join(f"{n:,} {status}" for status, n in rest.items())}</li>'
    return f"""<section class="hero">
<p class="kicker">{where} — {counted}</p>
<h1>{verdict}</h1>
<p class="lead">{lead}</p>
<ol class="tray{" wall" if wall else ""}" aria-label="The pulls, best first">{tray}</ol>
<dl class="keys">{"".join(key_numbers(report))}</dl>
</section>"""


def short(row: dict[str, Any], told_apart: Counter[tuple[str, str]]) -> str:
    """`s3` where seeds tell the pulls apart in what is shown, else the pull's full name."""
    alone = row["seed"] is not None and told_apart[str(row["seed"]), row["recipe"]] == 1
    return f"s{row['seed']}" if alone else str(row["name"])


def sureness(report: dict[str, Any]) -> str:
    """The lead over the second best in seed sd, and whether so much of a lead is anything special."""
    best = report["best"]
    recipe = next(r for r in report["recipes"] if r["recipe"] == best["recipe"])
    value = report["value"]
    reached = (
        f"{shown(best['value'])} {value['unit']}" if value["unit"] else f"{value['metric']} {shown(best['value'])}"
    )
    text = f"<strong>{escape(str(best['name']))}</strong> reaches {escape(reached)}"
    if best["runner_up"] is None:
        return text + "; it is its recipe's only finished pull, so nothing says how lucky it was."
    side = "below" if value["lower_is_better"] else "above"
    lead = best["lead"]
    text += f", {f'{lead:.4f}' if lead >= 5e-4 else f'{lead:.1g}'} {side} {escape(str(best['runner_up']))}."
    if math.isnan(best["lead_sd"]):
        return text + " Two finished pulls are too few to say whether that is much."
    n = recipe["n_finals"]
    text += f" That is {best['lead_sd']:.2f} of the spread between seeds (sd {recipe['sd']:.4f}, n = {n}); "
    share = best["lead_share"]
    said = f"{share:.0%} of sets of {n} equal, normally scattered pulls have a winner that leads by as much"
    if share > 0.2:
        return text + f"{said}: nothing says it is more than the luckiest of equals."
    return text + f"only {said}, so it stands out from its siblings."


def better(value: dict[str, Any]) -> str:
    """Which values are the better ones."""
    return "lower" if value["lower_is_better"] else "higher"


def key_numbers(report: dict[str, Any]) -> list[str]:
    """The row of large numbers: best, spread, divergence, cost."""
    best, main, total = report["best"], report["recipes"][0], report["cost"]["total"]

    def key(name: str, value: str, note: str) -> str:
        return f"<div><dt>{name}</dt><dd>{value}</dd><dd class='note'>{note}</dd></div>"

    base, value = report["baseline_bpb"], report["value"]
    told = []
    if best:
        if base:
            side = "below" if best["value"] < base else "above"
            note = f"{abs(1 - best['value'] / base):.1%} {side} a Kneser–Ney 5-gram ({base:.4f})"
        elif value["unit"] == "bits per byte":
            note = "bits per UTF-8 byte, lower is better"
        else:
            note = f"{value['unit'] or 'of all finished pulls'}, {better(value)} is better"
        told.append(key(f"Best {escape(value['metric'])}", shown(best["value"]), note))
    n = main["n_finals"]
    if n > 1:
        note = f"sd of {escape(value['metric'])} over {n} seeds, mean {shown(main['mean'])}; "
        note += f"95% {shown(main['sd_lo'])} to {shown(main['sd_hi'])}"
        told.append(key("Spread over seeds", shown(main["sd"]), note))
    rates = [r["p_diverge"] for r in report["recipes"] if r["p_diverge"]]
    if p := main["p_diverge"]:
        note = f"of recipe {escape(brief(main['recipe'], 40))}; 95% {p['lo']:.0%} to {p['hi']:.0%}"
        if len(rates) > 1:
            note += f" · all recipes: {sum(r['k'] for r in rates)} of {sum(r['n'] for r in rates)}"
        told.append(key("Diverged", f"{p['k']} of {p['n']}", note))
    if any(total["money"].values()) or total["seconds"] or total["flops"]:
        parts = [f"{duration(total['seconds'])} of device time"] if total["seconds"] else []
        note = ", ".join(parts + ([f"{si(total['flops'])}FLOPs"] if total["flops"] else []))
        told.append(
            key("Cost", money(total["money"]) if any(total["money"].values()) else duration(total["seconds"]), note)
        )
    return told


def curve_section(report: dict[str, Any], drawn: dict[str, Any]) -> str:
    """Curves over tokens and the diverged pull's last moments."""
    if not drawn.keys() & {"loss", "value", "event"}:
        return ""
    first = next((row for row in report["pulls"] if row["status"] == "diverged"), None)
    many = "more" in drawn.get("loss", {}) or "more" in drawn.get("value", {})
    if many:
        band = f"Thick: median of a recipe's finished seeds; shade: the middle 80% (under {figures.FEW}: all) of them. "
        band += "Lines: its best (solid), median (dash-dotted) and worst pull (dashed). "
        band += "The others come with their recipe, or all by the box above."
    else:
        band = "Thin: one pull. Thick: mean of a recipe's finished seeds; shade: their lowest to highest."
    off = " The vertical range is the healthy pulls'; a diverged pull leaves it at the top." if first else ""
    off += " Drag to zoom, double-click to come back."
    name = escape(str(first["name"])) if first else ""
    keys = settings_shown(report)
    legend = "".join(
        f'<li><i style="background:var(--{"ok" if i == 0 else f"recipe{i}"})"></i>'
        f"<code>{escape(brief(r['recipe']))}</code> "
        + ", ".join(f"{escape(key)} {escape(setting(r[key]))}" for key in keys)
        + "</li>"
        for i, r in enumerate(report["recipes"][: figures.BANDED])
        if r["n_finished"]
    )
    if first:
        legend += '<li><i style="background:var(--diverged)"></i>diverged</li>'
    if report["siblings"]["bad_batches"]:
        legend += '<li><i class="batch"></i>bad batch</li>'
    if {"crashed", "stopped", "running"} & report["status"].keys():
        legend += '<li><i class="dotted"></i>did not finish</li>'
    value = report["value"]
    if value["unit"] == "bits per byte":
        title, told = "Validation, bits per byte", "Comparable across tokenizers; lower is better."
    else:
        title = escape(value["metric"])
        told = f"What the pulls are judged by; {better(value)} is better."
    return f"""<section id="s-curves"><h2>Curves</h2><ul class="legend">{legend}</ul>
<div class="pair">{figure("loss", drawn, "Training loss", band + off)}
{figure("value", drawn, title, told + ("" if "loss" in drawn else " " + band + off))}</div>
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
    return f'<section id="s-siblings"><h2>Siblings</h2>{"".join(parts)}</section>'


def which(names: list[str], of: int) -> str:
    """The first four of the names, or all where they are."""
    return "all" if len(names) == of else ", ".join(names[:4]) + " …" * (len(names) > 4)


def related(title: str, heads: list[str], rows: list[list[str]], found: int, note: str) -> str:
    """One table of the siblings' section."""
    more = f" The {len(rows)} largest of {found:,} are shown." if found > len(rows) else ""
    return f"""<div class="related"><h3>{title}</h3>{webpage.table(title, heads, rows)}
<p class="caption">{note}{more}</p></div>"""


def cost_section(report: dict[str, Any]) -> str:
    """Where the money went."""
    lines = [
        ("total", "All pulls", ""),
        ("diverged", "Spent on pulls that diverged", "nothing to keep"),
        ("unfinished", "Spent on pulls that did not finish", "stopped or crashed; resumable from their checkpoint"),
        ("saved", "Saved by stopping diverged pulls", "the rest of their budget at their own rate"),
    ]
    if not any(report["cost"]["total"][key] for key in ("tokens", "flops", "seconds", "money")):
        return ""
    body = "".join(
        f'<tr class="{name}"><th scope="row">{label}<small>{note}</small></th><td class="number">{bill["pulls"]}</td>'
        f'<td class="number">{si(bill["tokens"]) if bill["tokens"] else NONE}</td>'
        f'<td class="number">{si(bill["flops"]) if bill["flops"] else NONE}</td>'
        f'<td class="number">{duration(bill["seconds"]) if bill["seconds"] else NONE}</td>'
        f'<td class="number">{money(bill["money"]) if any(bill["money"].values()) else NONE}</td></tr>'
        for name, label, note in lines
        if (bill := report["cost"][name])["pulls"]
    )
    heads = "".join(
        f"<th scope=col class=number>{h}</th>" for h in ("Pulls", "Tokens", "FLOPs", "Device time", "Money")
    )
    return f"""<section id="s-cost"><h2>Cost</h2>
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
    return f"""<section id="s-samples"><h2>What it writes</h2>
<p class="caption">{escape(str(best["name"]))}, prompts marked; sampled at the end of the pull, not selected.</p>
<div class="samples">{"".join(said)}</div></section>"""


def notes(report: dict[str, Any]) -> str:
    """How the numbers are made, and from what."""
    items = [
        "Only finished pulls (ok, spiked) count in spread and best-of; probabilities of divergence are of finished and "
        "diverged pulls, with the exact (Clopper–Pearson) 95% interval.",
        "Ranking is exact on this validation set. How far it carries to other text is not measured here.",
        "The sd's interval is the chi-square one, right if finals scatter normally.",
    ]
    if report["value"]["unit"] == "bits per byte":
        items.append("bpb: bits per UTF-8 byte of the validation text, all pieces and document ends scored.")
    if report["damaged"]:
        items.append(f"{report['damaged']} damaged stretches of the run files were skipped; what they held is missing.")
    listed = "".join(f"<li>{item}</li>" for item in items)
    return f"""<footer><h2>How to read this</h2><ul>{listed}</ul>
<p>Read from <code>{escape(report["source"])}</code>, {escape(report["generated"])}. The same numbers are in report.json
beside this page.</p></footer>"""


def money(amounts: dict[str, float]) -> str:
    """Sums by currency, three digits or whole units."""
    return " + ".join(
        escape(f"{amount:,.0f} {currency}" if amount >= 1000 else f"{amount:.3g} {currency}")
        for currency, amount in amounts.items()
    )
