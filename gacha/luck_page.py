"""The report's sections of luck: odds by recipe, the duel, when a pull could have been stopped, learning rates."""

import math
from html import escape
from typing import Any

import webpage
from gacha.luck_figures import CURVES, STRIPS, settings_of
from gacha.pulls import brief
from gacha.pulls_page import shown
from webpage import duration, figure

LISTED = 100
"""Recipes at most in the table of odds; report.json has all."""
SURE = 0.05


def percent(p: float) -> str:
    """A probability: whole percents, but never 0% or 100% of what is neither."""
    return f"{p:.0%}" if 0.01 <= p <= 0.99 or p in (0.0, 1.0) else "<1%" if p < 0.5 else ">99%"


def between(told: dict[str, Any], say: Any = shown) -> str:
    """An estimate's interval as text."""
    return f"{say(told['lo'])} to {say(told['hi'])}" if math.isfinite(told["lo"]) else ""


def paid(amount: float, unit: str, currency: str) -> str:
    """What something costs, in money or in device time."""
    if not math.isfinite(amount):
        return ""
    return f"{amount:,.3g} {escape(currency)}".strip() if unit == "money" else duration(amount)


def odds_section(report: dict[str, Any], drawn: dict[str, Any]) -> str:
    """Spread over seeds, what another pull is worth, the odds of the target and when to stop pulling."""
    if "strip" not in drawn:
        return ""
    value, several = report["value"], sum(recipe["n_finals"] > 0 for recipe in report["recipes"])
    dots = "One dot per finished pull, the best one ringed; below them mean ± sd."
    if several > STRIPS:
        dots += f" The first {STRIPS} of {several} recipes." if "best_of" in drawn else ""
    far = [name for recipe in report["recipes"][:STRIPS] for name in recipe["outliers"]]
    if far:
        dots += f" Far from the others (robust z above 3.5): {', '.join(map(escape, far[:8]))}{' …' * (len(far) > 8)}."
    many = sum(len(recipe["best_of"]) > 1 for recipe in report["recipes"])
    worth = "Mean best of all subsets of so many finished pulls (unbiased), a line per recipe"
    worth += f", the first {CURVES} of {many}" if many > CURVES else ""
    worth += ". Shade: its 95% interval; dotted where k is above half the pulls there are: there the interval rests on "
    worth += "the finals being normal."
    if any(recipe["n_diverged"] for recipe in report["recipes"]):
        worth += " The cost includes the diverged pulls met on the way."
    hit = ""
    if "p_hit" in drawn:
        hit = "Chance that at least one of so many finished pulls reaches "
        hit += f"{shown(value['target'])}, 95% interval exact (Clopper–Pearson)."
    wide = several > 4
    spread = figure("strip", drawn, "Spread over seeds", dots)
    return f"""<section id="s-luck"><h2>Luck</h2>{spread if wide else ""}<div class="pair">{"" if wide else spread}
{figure("best_of", drawn, "Expected best of so many pulls", worth)}
{figure("p_hit", drawn, "Odds of reaching the target", hit)}</div>
{odds_table(report)}</section>"""


def odds_table(report: dict[str, Any]) -> str:
    """A row per recipe: spread, best of few, divergence, and what was asked for (target, worth)."""
    recipes = [recipe for recipe in report["recipes"] if recipe["n_finals"]][:LISTED]
    value = report["value"]
    with_target, with_worth = math.isfinite(value["target"]), any(recipe["reservation"] for recipe in recipes)
    ks = [k for k in (4, 16, 64) if any(str(k) in recipe["best_of"] for recipe in recipes)]
    heads = ["Recipe", "#Finals", "#Mean", "#sd", *(f"#Best of {k}" for k in ks), "#Best", "#Diverged"]
    heads += ["#At the target", "#Pulls for 90%", "#Price of those", "#p, mean at target"] if with_target else []
    heads += ["#Stop at", "#95%"] if with_worth else []
    rows = []
    for recipe in recipes:
        p, sign = recipe["p_diverge"], value["lower_is_better"]
        lost = f"{p['k']} of {p['n']}" if p else ""
        row = [
            f'<th scope="row" title="{escape(recipe["recipe"])}">{escape(brief(recipe["recipe"], 36))}</th>',
            webpage.number(recipe["n_finals"]),
            webpage.number(recipe["mean"], shown(recipe["mean"])),
            number_or_none(recipe["sd"], shown),
            *(number_or_none(recipe["best_of"].get(str(k), {}).get("u", math.nan), shown) for k in ks),
            number_or_none(recipe["min" if sign else "max"], shown),
            webpage.number(p["p"] if p else None, lost),
        ]
        if with_target:
            price = recipe["to_target"]
            currency = recipe["per_finished"]["currency"]
            row += [
                webpage.number(price["hits"] / price["n"], f"{price['hits']} of {price['n']}"),
                number_or_none(price["pulls"], lambda pulls: f"{pulls:,.0f}"),
                number_or_none(
                    price["spend"], lambda x, price=price, currency=currency: paid(x, price["unit"], currency)
                ),
                number_or_none(recipe["p_one_sided"], lambda x: f"{x:.2g}"),
            ]
        if with_worth:
            stop = recipe["reservation"]
            row += [number_or_none(stop["value"], shown) if stop else webpage.number(None)]
            row += [webpage.number(stop["hi"] - stop["lo"], between(stop)) if stop else webpage.number(None)]
        rows.append(row)
    note = ""
    if with_target:
        note += (
            "Pulls and price: of pulls started, diverged ones stopped as they were here, until one reaches the target "
            f"with 90% certainty{known_range(recipes[0])}. p: one-sided t test that the mean is at the target or past "
            "it. "
        )
    if with_worth:
        note += (
            "Stop at: hold this or better and the mean gain of one more pull is below what it costs (Weitzman 1979), "
            f"one unit of the value being worth {value['worth']:,.6g}."
        )
    first = f" The first {LISTED} are shown." if len(recipes) == LISTED else ""
    said = f'<p class="caption">{note}{first}</p>' if note or first else ""
    listed = webpage.table("Odds by recipe", heads, rows, up="Mean" if value["lower_is_better"] else "")
    return f'<div class="related"><h3>Odds by recipe</h3>{listed}{said}</div>'


def known_range(recipe: dict[str, Any]) -> str:
    """How far the price of the first recipe is known."""
    price = recipe["to_target"]
    most = f"{price['pulls_lo']:,.0f}" if math.isfinite(price["pulls_lo"]) else "any number"
    return f" ({escape(brief(recipe['recipe'], 40))}: 95% {price['pulls_hi']:,.0f} to {most} pulls)"


def number_or_none(value: float, say: Any) -> str:
    """A cell of a number; what is not finite is not known."""
    return webpage.number(value, say(value)) if math.isfinite(value) else webpage.number(None)


def duel_section(report: dict[str, Any]) -> str:
    """Two recipes against each other in words and numbers; with more than two, every pair of the best."""
    told = report["duel"]
    if not told:
        return ""
    a, b = escape(brief(told["a"], 40)), escape(brief(told["b"], 40))
    difference, better = told["difference"], told["p_improvement"]

    def key(name: str, text: str, note: str) -> str:
        return f"<div><dt>{name}</dt><dd>{text}</dd><dd class='note'>{note}</dd></div>"

    needed = f"{told['n_needed']:,}" if told["n_needed"] else "–"
    keys = key("Difference of means", f"{difference['value']:+.4f}", f"{a} less {b}; 95% {between(difference)}")
    keys += key("A run of the first beats the second", percent(better["value"]), f"95% {between(better, percent)}")
    keys += key("Welch's p", f"{told['welch_p']:.2g}", f"permutation test {told['permutation_p']:.2g}")
    keys += key("Seeds each to settle it", needed, "for 80% power at 5%, were the difference the one seen")
    of = (
        "the two asked for"
        if told["asked"]
        else f"the two best of {told['of']}"
        if told["of"] > 2
        else "the two recipes"
    )
    every = matrix(told, report["value"]["lower_is_better"])
    said = told["told"].replace("no evidence", "No evidence", 1) if told["winner"] is None else told["told"]
    return f"""<section id="s-duel"><h2>Duel</h2><p class="caption">{a} against {b}, {of}</p>
<p class="lead">{escape(said)}.</p><dl class="keys">{keys}</dl>{every}</section>"""


def matrix(told: dict[str, Any], lower_is_better: bool) -> str:
    """Every pair: the chance that a run of the row's recipe beats one of the column's, sure ones marked."""
    names = told["recipes"]
    if len(names) < 3:
        return ""
    pairs = {(pair["a"], pair["b"]): pair for pair in told["pairs"]}
    head = "".join(
        f'<th scope="col" class="number" title="{escape(name)}">{i}</th>' for i, name in enumerate(names, start=1)
    )
    body = ""
    for i, one in enumerate(names, start=1):
        cells = ""
        for other in names:
            if one == other:
                cells += '<td class="self"></td>'
                continue
            pair = pairs.get((one, other)) or pairs[other, one]
            p = pair["p_improvement"]["value"] if (one, other) in pairs else 1 - pair["p_improvement"]["value"]
            sure = pair["holm_p"] < SURE
            mean = abs(pair["difference"]["value"])
            wins = sure and ((pair["difference"]["value"] < 0) == lower_is_better) == ((one, other) in pairs)
            title = f"means differ by {mean:.4f}, Welch's p {pair['welch_p']:.2g}, Holm {pair['holm_p']:.2g}"
            kind = ("wins" if wins else "loses") if sure else "open"
            mark = " ▲" if kind == "wins" else " ▼" if kind == "loses" else ""
            cells += f'<td class="number {kind}" title="{title}">{percent(p)}{mark}</td>'
        body += f'<tr><th scope="row" title="{escape(one)}">{i} · {escape(brief(one, 40))}</th>{cells}</tr>'
    rest = f" The {len(names)} best of {told['of']} recipes." if told["of"] > len(names) else ""
    return f"""<div class="related"><h3>Every pair</h3>
<div class="scroll" role="region" aria-label="Duels of every pair" tabindex="0"><table class="matrix">
<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p class="caption">Chance that a run of the row's recipe beats one of the column's. ▲ better, ▼ worse: Welch's test at
5% after Holm's correction for {len(told["pairs"])} duels; no mark: no evidence.{rest}</p></div>"""


def stopping_section(report: dict[str, Any], drawn: dict[str, Any]) -> str:
    """How early the rank is known, and what each rule of stopping saves and risks."""
    parts = [stopping_part(report, told, drawn, i) for i, told in enumerate(report["stopping"])]
    if not parts:
        return ""
    legend = "".join(
        f'<li><i style="background:var(--{colour})"></i>{family}</li>'
        for family, colour in (("halving", "recipe1"), ("hyperband", "recipe2"), ("learned", "ok"), ("none", "crashed"))
    )
    legend += "<li>filled: pulls side by side; open, dotted: one after the other</li>"
    return f"""<section id="s-stopping"><h2>Early stopping</h2><ul class="legend">{legend}</ul>{"".join(parts)}
<p class="caption">Measured on these pulls: others may save more, or lose by it.</p></section>"""


def stopping_part(report: dict[str, Any], told: dict[str, Any], drawn: dict[str, Any], place: int) -> str:
    """The figures and the table of one group of pulls: a recipe's, or all."""
    metric = escape(report["value"]["metric"])
    whose = f"pulls of recipe {brief(told['recipe'], 40)}" if told["recipe"] else "pulls of all recipes"
    known = (
        f"Spearman's rank correlation of {metric} at a share of the budget with the final one, over "
        f"{told['n']} {escape(whose)}; shade: its 95% interval."
    )
    saved = (
        "Each dot is one rule, judged on pulls that it did not learn from; lines: those of a family worth having, "
        "bars: 95% of random splits. Right and low is good. Regret: how far the best pull kept is behind the "
        "best of all."
    )
    most = told["buys_most"]
    rule = "stopping nobody" if most["family"] == "none" else f"the {most['family']} rule ({most['parameter']})"
    lead = (
        f"On the {told['n']} {whose} {rule} would have saved {most['saved']['value']:.0%} of the compute "
        f"({between(most['saved'], percent)} over splits) at a mean regret of "
        f"{most['regret_sd']['value']:.2f} sd of {told['sd_of']}: the most of all rules that lose at most "
        f"{most['allowed_sd']:g}."
    )
    rows = [
        [
            webpage.words(f"{one['family']} {one['parameter']}".strip()),
            f'<td class="text">{escape(one["setting"])}</td>',
            webpage.number(one["saved"]["value"], f"{one['saved']['value']:.0%}"),
            webpage.number(one["saved"]["hi"] - one["saved"]["lo"], between(one["saved"], lambda x: f"{x:.0%}")),
            webpage.number(one["regret"]["value"], f"{one['regret']['value']:.4f}"),
            webpage.number(one["regret"]["hi"] - one["regret"]["lo"], between(one["regret"])),
            webpage.number(one["regret_sd"]["value"], f"{one['regret_sd']['value']:.2f}"),
        ]
        for one in told["frontier"]
    ]
    heads = ["Rule", "Pulls run", "#Compute saved", "#95%", "#Regret", "#95%", "#Regret in sd"]
    return f"""<p class="lead">{escape(lead)}</p><div class="pair">
{figure(f"ranks{place}", drawn, "When the rank is known", known)}
{figure(f"frontier{place}", drawn, "Compute saved against regret", saved)}</div>
<details><summary>Every rule</summary>{webpage.table("Stopping rules", heads, rows, up="Regret")}</details>"""


def rate_section(report: dict[str, Any], drawn: dict[str, Any]) -> str:
    """Finals over the learning rate, and what a rate that is off costs."""
    told = report["learning_rates"]
    if not told:
        return ""
    field = escape(told["field"])
    rows = []
    for i, line in enumerate(told["lines"]):
        lost = sum(point["diverged"] for point in line["points"])
        rows.append(
            [
                f'<th scope="row"><i class="dot r{i % 5}"></i>{escape(settings_of(line["settings"]))}</th>',
                webpage.number(len(line["points"])),
                webpage.number(line["best_lr"], f"{line['best_lr']:.3g}"),
                webpage.number(line["best"], shown(line["best"])),
                number_or_none(line["sensitivity"], shown),
                webpage.number(lost),
                webpage.number(line["all_diverged"]),
            ]
        )
    heads = ["All but the learning rate", "#Rates", "#Best rate", "#Mean there", "#Sensitivity", "#Diverged pulls"]
    heads += ["#Rates where all did"]
    more = f" The {len(rows)} best of {told['of']} lines." if told["of"] > len(rows) else ""
    caption = (
        f"Mean final over {field} (star: the best), shade: lowest to highest seed, crosses: pulls that diverged there."
    )
    note = (
        "Sensitivity: mean over the rates with a finished pull of the final less the best rate's (after Wortsman et "
        "al. 2023); rates at which every pull diverged are counted beside it."
    )
    return f"""<section id="s-rates"><h2>Learning rate</h2>
{figure("learning_rates", drawn, "Final over learning rate", caption + more)}
<div class="related">{webpage.table("Learning rates", heads, rows)}<p class="caption">{note}</p></div></section>"""
