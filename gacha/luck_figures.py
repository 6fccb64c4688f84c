"""The report's figures of luck as plotly JSON: spread, best of n, odds of a target, early stopping, learning rates."""

import math
from typing import Any

import numpy as np

from gacha.pulls import FINISHED, brief
from webpage import C, blank, literal

RECIPES = [C["ok"], C["recipe1"], C["recipe2"], C["recipe3"], C["recipe4"]]
BANDS = [C[f"band{i}"] for i in range(5)]
STRIPS, CURVES = 10, 5
"""Recipes at most in the spread, and in the odds."""
FAMILIES = {"halving": C["recipe1"], "hyperband": C["recipe2"], "learned": C["ok"], "none": C["crashed"]}
SYMBOLS = {"parallel": "circle", "sequential": "circle-open"}


def build(report: dict[str, Any]) -> dict[str, Any]:
    """Figure name to plotly figure, None where there is nothing to show."""
    stopping = {f"{name}{i}": one for i, one in enumerate(report["stopping"]) for name in ("ranks", "frontier")}
    return {
        "strip": strip(report),
        "best_of": best_of(report),
        "p_hit": p_hit(report),
        **{
            name: ranks(one) if name.startswith("ranks") else frontier(one, report["value"])
            for name, one in stopping.items()
        },
        "learning_rates": learning_rates(report) if report["learning_rates"] else None,
    }


def colour_of(which: int) -> str:
    """The colour of the report's recipe number `which`."""
    return RECIPES[which % len(RECIPES)]


def axis_title(value: dict[str, Any]) -> str:
    """The value and its unit."""
    return literal(value["metric"], 40) + (f", {value['unit']}" if value["unit"] else "")


def strip(report: dict[str, Any]) -> Any:
    """Finished pulls' values, one row of dots per recipe, mean and sd below each; where no recipe has two, one row."""
    import plotly.graph_objects as go

    shown = [(i, recipe) for i, recipe in enumerate(report["recipes"]) if recipe["n_finals"]]
    if not shown:
        return None
    together = len(shown) > STRIPS and all(recipe["n_finals"] == 1 for _, recipe in shown)
    shown = shown[: 1 if together else STRIPS]
    high = 110 if len(shown) < 4 else 76 if len(shown) < 7 else 54
    figure = blank(150 + high * len(shown), axis_title(report["value"]), "")
    best = report["best"]["run_id"] if report["best"] else None
    ticks = []
    for place, (which, recipe) in enumerate(shown):
        rows = [
            row for row in report["pulls"]
            if (together or row["recipe"] == recipe["recipe"])
            and row["status"] in FINISHED and math.isfinite(row["value"])
        ]  # fmt: skip
        few = len(rows) <= (12 if len(shown) == 1 else 5)
        # A fixed zigzag keeps neighbours apart; the height means nothing.
        heights = [(0.0, 0.13, -0.13)[j % 3] if few else 0.5 * (j * 0.618 % 1) - 0.2 for j in range(len(rows))]
        edge = [C["ink"] if row["run_id"] == best else C["card"] for row in rows]
        names = [label(row) for row in rows]
        figure.add_trace(
            go.Scatter(
                x=[row["value"] for row in rows], y=[height - place for height in heights],
                mode="markers+text" if few else "markers", text=names if few else None,
                textposition=[("bottom center", "top center")[j % 3 == 1] for j in range(len(rows))],
                marker={"size": 14 if few else 9, "color": colour_of(which), "opacity": 1 if few else 0.75,
                        "line": {"width": 2 if few else 1, "color": edge}},
                hovertemplate="<b>%{customdata}</b> %{x:.4f}<extra></extra>", customdata=names,
                legendgroup=f"r{which}",
            )
        )  # fmt: skip
        if recipe["n_finals"] > 1:
            figure.add_trace(
                go.Scatter(
                    x=[recipe["mean"]], y=[-place - 0.36], mode="markers",
                    marker={"symbol": "line-ns", "size": 14, "line": {"width": 2.5, "color": C["ink"]}},
                    error_x={"type": "constant", "value": recipe["sd"], "color": C["ink"], "thickness": 1.3},
                    hovertemplate=f"mean {recipe['mean']:.4f}, sd {recipe['sd']:.4f}<extra></extra>",
                    legendgroup=f"r{which}",
                )
            )  # fmt: skip
        ticks.append("all" if together else literal(brief(recipe["recipe"]), 24))
    target = report["value"]["target"]
    if math.isfinite(target):
        figure.add_vline(x=target, line={"color": C["spiked"], "width": 1.4, "dash": "dash"})
    figure.update_yaxes(
        tickvals=[-i for i in range(len(shown))], ticktext=ticks, range=[-len(shown) + 0.4, 0.45], showgrid=False
    )
    figure.update_xaxes(showgrid=True, gridcolor=C["grid"], nticks=6)
    figure.update_layout(hovermode="closest")
    return figure


def label(row: dict[str, Any]) -> str:
    """A pull's short label, safe inside plotly's pseudo-HTML."""
    return literal(f"s{row['seed']}" if row["seed"] is not None else str(row["name"]))


def odds_of(report: dict[str, Any], key: str) -> list[tuple[int, dict[str, Any]]]:
    """The recipes, with their places in the report, whose numbers under `key` make a line: CURVES at most."""
    return [(i, recipe) for i, recipe in enumerate(report["recipes"]) if len(recipe[key]) > 1][:CURVES]


def prices(recipe: dict[str, Any], ks: list[int]) -> list[str]:
    """What k finished pulls of a recipe cost, as text."""
    per = recipe["per_finished"]
    if per["money"] > 0:
        return [f"{k * per['money']:.3g} {literal(per['currency'])}".strip() for k in ks]
    return [f"{k * per['seconds']:,.0f} s" if math.isfinite(per["seconds"]) else "" for k in ks]


def axis_of_pulls(figure: Any, recipe: dict[str, Any], ks: list[int]) -> None:
    """Numbers of pulls below, and what they cost at `recipe`'s price."""
    near = [k for k in np.unique(np.linspace(1, ks[-1], 6).round()) if len(ks) > 8]
    shown = [min(ks, key=lambda one: abs(one - k)) for k in near] or ks
    shown = list(dict.fromkeys(shown))
    text = [f"<b>{k}</b><br>{cost}" for k, cost in zip(shown, prices(recipe, shown), strict=True)]
    span = ks[-1] - 1
    if not any(prices(recipe, shown)):
        figure.update_xaxes(title_text="pulls")
    figure.update_xaxes(tickvals=shown, ticktext=text, range=[1 - 0.04 * span - 0.2, ks[-1] + 0.03 * span + 0.2])
    figure.update_layout(hovermode="closest")


def line_of_odds(figure: Any, which: int, ks: list[int], bars: list[list[float]], said: dict[str, Any]) -> None:
    """A recipe's line with its band, from [value, lo, hi] per k; dashed where `said["trusted"]` is not."""
    import plotly.graph_objects as go

    y, lo, hi = (np.array(column) for column in zip(*bars, strict=True))
    band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "legendgroup": f"r{which}"}
    known = np.isfinite(lo) & np.isfinite(hi)
    x = np.array(ks)
    if known.any():
        figure.add_trace(go.Scatter(x=x[known], y=hi[known], **band))
        figure.add_trace(
            go.Scatter(x=x[known], y=lo[known], fill="tonexty", fillcolor=BANDS[which % len(BANDS)], **band)
        )
    trusted = np.array(said["trusted"], dtype=bool)
    last = int(trusted.sum()) if trusted.any() else 1
    for span, dash in ((slice(0, last), "solid"), (slice(last - 1, len(ks)), "dot")):
        if len(ks[span]) < (1 if dash == "solid" else 2):
            continue
        figure.add_trace(
            go.Scatter(
                x=ks[span], y=y[span], mode="lines+markers" if len(ks) <= 30 else "lines",
                line={"color": colour_of(which), "width": 2.4, "dash": dash}, marker={"size": 7},
                customdata=said["extra"][span], hovertemplate=said["hover"], legendgroup=f"r{which}",
            )
        )  # fmt: skip


def best_of(report: dict[str, Any]) -> Any:
    """Expected best value of k pulls with its interval, a line per recipe; money under each k."""
    shown = odds_of(report, "best_of")
    if not shown:
        return None
    figure = blank(320, "pulls, and what so many finished ones cost", f"expected best {axis_title(report['value'])}")
    hover = (
        "<b>best of %{x}</b> %{y:.4f}<br>95% %{customdata[0]:.4f} to %{customdata[1]:.4f}<br>"
        "%{customdata[2]} · %{customdata[3]}<extra></extra>"
    )
    for which, recipe in reversed(shown):
        told = recipe["best_of"]
        ks = [int(k) for k in told]
        paid = prices(recipe, ks)
        name = literal(brief(recipe["recipe"], 40), 40)
        bars = [[got[key] for key in ("u", "lo", "hi")] for got in told.values()]
        extra = [[lo, hi, cost, name] for (_, lo, hi), cost in zip(bars, paid, strict=True)]
        trusted = [got["trusted"] for got in told.values()]
        line_of_odds(figure, which, ks, bars, {"trusted": trusted, "extra": extra, "hover": hover})
    longest = max((recipe for _, recipe in shown), key=lambda recipe: recipe["n_finals"])
    axis_of_pulls(figure, longest, [int(k) for k in longest["best_of"]])
    told = [got for _, recipe in shown for got in recipe["best_of"].values()]
    if len(shown) > 1 and any(
        got["trusted"] for got in told
    ):  # one outlier's interval at k = n would flatten all the others
        inside = [got[key] for got in told for key in ("u", "lo", "hi") if key == "u" or got["trusted"]]
        pad = 0.08 * (max(inside) - min(inside))
        figure.update_yaxes(range=[min(inside) - pad, max(inside) + pad])
    if math.isfinite(target := report["value"]["target"]):
        figure.add_hline(y=target, line={"color": C["spiked"], "width": 1.4, "dash": "dash"})
    return figure


def p_hit(report: dict[str, Any]) -> Any:
    """Probability that one of k pulls hits the target, a line per recipe."""
    shown = odds_of(report, "p_hit")
    if not shown:
        return None
    figure = blank(320, "pulls, and what so many finished ones cost", "probability of a hit")
    hover = "<b>one of %{x}</b> %{y:.0%}<br>95% %{customdata[0]:.0%} to %{customdata[1]:.0%}<br>%{customdata[2]}"
    for which, recipe in reversed(shown):
        told = recipe["p_hit"]
        bars = [[got[key] for key in ("p", "lo", "hi")] for got in told.values()]
        extra = [[lo, hi, literal(brief(recipe["recipe"], 40), 40)] for _, lo, hi in bars]
        ks = [int(k) for k in told]
        said = {"trusted": [True] * len(ks), "extra": extra, "hover": hover + "<extra></extra>"}
        line_of_odds(figure, which, ks, bars, said)
    longest = max((recipe for _, recipe in shown), key=lambda recipe: recipe["n_finals"])
    axis_of_pulls(figure, longest, [int(k) for k in longest["p_hit"]])
    figure.update_yaxes(range=[-0.02, 1.04], tickformat=".0%")
    return figure


def frontier(stopping: dict[str, Any], value: dict[str, Any]) -> Any:
    """Regret over the share of compute saved: a dot per rule, and per family a line along those worth having."""
    import plotly.graph_objects as go

    figure = blank(360, "compute saved", f"regret, {value['unit'] or literal(value['metric'], 40)}")
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for outcome in stopping["frontier"]:
        families.setdefault((outcome["family"], outcome["setting"]), []).append(outcome)
    for (family, setting), found in families.items():
        colour = FAMILIES[family]
        told = [
            f"<b>{literal(family)}</b> {literal(one['parameter'], 60)}, {literal(one['setting'])}<br>"
            f"saved {one['saved']['value']:.0%} ({one['saved']['lo']:.0%} to {one['saved']['hi']:.0%} of splits)<br>"
            f"regret {one['regret']['value']:.4f} ({one['regret']['lo']:.4f} to {one['regret']['hi']:.4f}), "
            f"{one['regret_sd']['value']:.2f} sd"
            for one in found
        ]
        figure.add_trace(
            go.Scatter(
                x=[one["saved"]["value"] for one in found], y=[one["regret"]["value"] for one in found], mode="markers",
                customdata=told, hovertemplate="%{customdata}<extra></extra>",
                marker={"size": 8, "color": colour, "symbol": SYMBOLS[setting] if family != "none" else "diamond"},
            )
        )  # fmt: skip
        line = worth_having(found)
        figure.add_trace(
            go.Scatter(
                x=[one["saved"]["value"] for one in line], y=[one["regret"]["value"] for one in line],
                line={"color": colour, "width": 1.8, "dash": "solid" if setting == "parallel" else "dot"},
                error_y=reach(line, "regret", colour), mode="lines", hoverinfo="skip", opacity=0.55,
            )
        )  # fmt: skip
    figure.update_xaxes(tickformat=".0%", showgrid=True, gridcolor=C["grid"])
    most = max((one["regret"]["value"] for one in stopping["frontier"]), default=0.0)
    figure.update_yaxes(range=[-0.04 * most, 1.2 * most] if most > 0 else None, exponentformat="none")
    figure.update_layout(hovermode="closest")
    return figure


def worth_having(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no other both saves more and regrets less than, by increasing saving."""
    kept: list[dict[str, Any]] = []
    for one in sorted(outcomes, key=lambda one: (-one["saved"]["value"], one["regret"]["value"])):
        if not kept or one["regret"]["value"] < kept[-1]["regret"]["value"]:
            kept.append(one)
    return kept[::-1]


def reach(outcomes: list[dict[str, Any]], key: str, colour: str) -> dict[str, Any]:
    """plotly's error bars of an estimate."""
    up, down = ([abs(one[key][end] - one[key]["value"]) for one in outcomes] for end in ("hi", "lo"))
    return {"type": "data", "array": up, "arrayminus": down, "color": colour, "thickness": 0.7, "width": 0}


def ranks(stopping: dict[str, Any]) -> Any:
    """Rank correlation of the value at a share of the budget with the final one."""
    import plotly.graph_objects as go

    found = stopping["rank_known"]
    figure = blank(360, "share of the budget", "rank correlation with the finals")
    x = [one["fraction"] for one in found]
    y, lo, hi = ([one["spearman"][key] for one in found] for key in ("value", "lo", "hi"))
    band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(x=x, y=hi, **band))
    figure.add_trace(go.Scatter(x=x, y=lo, fill="tonexty", fillcolor=C["band0"], **band))
    told = [
        f"<b>{one['fraction']:.0%} of the budget</b><br>Spearman {one['spearman']['value']:.2f} "
        f"(95% {one['spearman']['lo']:.2f} to {one['spearman']['hi']:.2f})<br>Kendall {one['kendall']['value']:.2f}<br>"
        f"the best then is the best in the end: {one['p_best_is_best']:.0%}"
        for one in found
    ]
    figure.add_trace(
        go.Scatter(
            x=x, y=y, mode="lines+markers", line={"color": C["ok"], "width": 2.2}, marker={"size": 5},
            customdata=told, hovertemplate="%{customdata}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(tickformat=".0%", range=[0, 1.02])
    figure.update_yaxes(range=[min(-0.05, *(v for v in lo if math.isfinite(v)), 0), 1.04])
    figure.update_layout(hovermode="closest")
    return figure


def learning_rates(report: dict[str, Any]) -> Any:
    """Finals over the learning rate: a line and the range of its seeds per recipe; all that diverged at the top."""
    import plotly.graph_objects as go

    lines = report["learning_rates"]["lines"]
    figure = blank(380, literal(report["learning_rates"]["field"], 40), axis_title(report["value"]))
    known = [point for line in lines for point in line["points"] if point["n"]]
    low, high = min(point["lo"] for point in known), max(point["hi"] for point in known)
    down = report["value"]["lower_is_better"]
    edge = (1.0 if down else -1.0) * (0.1 * (high - low) or 0.05 * abs(high) or 1.0)
    lost_at = (high if down else low) + edge
    for i, line in enumerate(lines):
        colour, name = colour_of(i), literal(settings_of(line["settings"]), 80)
        points = [point for point in line["points"] if point["n"]]
        x = [point["lr"] for point in points]
        band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(x=x, y=[point["hi"] for point in points], **band))
        figure.add_trace(
            go.Scatter(x=x, y=[point["lo"] for point in points], fill="tonexty", fillcolor=BANDS[i % 5], **band)
        )
        reach: dict[str, Any] = {
            "type": "data",
            "array": [point["hi"] - point["mean"] for point in points],
            "color": colour,
        }
        reach |= {"arrayminus": [point["mean"] - point["lo"] for point in points], "thickness": 1, "width": 0}
        told = [
            f"<b>{name}</b><br>{point['mean']:.4f}, {point['n']} finished"
            + (f", {point['diverged']} diverged" if point["diverged"] else "")
            for point in points
        ]
        best = [point["lr"] == line["best_lr"] for point in points]
        figure.add_trace(
            go.Scatter(
                x=x, y=[point["mean"] for point in points], mode="lines+markers", customdata=told,
                line={"color": colour, "width": 2}, hovertemplate="%{customdata}<br>at %{x:.3g}<extra></extra>",
                marker={"size": [13 if one else 7 for one in best], "symbol": ["star" if b else "circle" for b in best],
                        "color": colour},
                error_y=reach,
            )
        )  # fmt: skip
        lost = [point for point in line["points"] if point["diverged"]]
        figure.add_trace(
            go.Scatter(
                x=[point["lr"] for point in lost], y=[lost_at] * len(lost), mode="markers",
                marker={"symbol": "x", "size": 9, "color": C["diverged"]},
                customdata=[f"<b>{name}</b><br>{point['diverged']} diverged, {point['n']} finished" for point in lost],
                hovertemplate="%{customdata}<br>at %{x:.3g}<extra></extra>",
            )
        )  # fmt: skip
    rates = sorted({point["lr"] for line in lines for point in line["points"]})
    figure.update_xaxes(type="log")
    if len(rates) <= 9:
        figure.update_xaxes(tickvals=rates, ticktext=[f"{rate:.3g}" for rate in rates])
    figure.update_layout(hovermode="closest")
    return figure


def settings_of(settings: dict[str, Any]) -> str:
    """The settings that tell a line of the learning-rate view from the others, short."""
    told = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in settings.items()
    )
    return told or "all pulls"
