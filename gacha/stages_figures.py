"""The figures of post-training as plotly JSON: gains by seed, held-out scores over updates, reward against KL."""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gacha import figures
from gacha.luck_figures import colour_of
from gacha.pulls import FINISHED, brief
from gacha.runs import Run, Series
from webpage import C, blank, literal

ROWS = 14
"""Stages at most whose gains are drawn; the table has more."""
DOTS = 40
"""Seeds drawn at most of a stage, spread over all."""
PANELS = (("exact_match", "exact match"), ("field_accuracy", "field accuracy"), ("valid", "valid format"))
BANDED = 5
"""Recipes of a stage whose curves are drawn, the best ones."""
LINES = 24
"""Runs of a stage up to which each has its own thin line."""
PATHS, POINTS = 60, 40
"""Paths of the frontier at most, and points of each."""
WORDS = {"gain": C["ok"], "harm": C["diverged"]}


def build(told: dict[str, Any], tuned: Sequence[Run]) -> dict[str, Any]:
    """Figure name to plotly figure, those with nothing to show left out. `told` is `stages.summarise`'s."""
    by_id = {run.id: run for run in tuned}
    groups = [(i, group, runs_of(told, group, by_id)) for i, group in enumerate(told["stages"])]
    main = told["main"]
    drawn = {"stage_gains": gains(told)}
    for stage in dict.fromkeys(group["stage"] for group in told["stages"]):
        drawn[f"stage_{stage}"] = curves([one for one in groups if one[1]["stage"] == stage], main)
    drawn["stage_reward"] = frontier(groups, "reward/mean", "mean reward", False)
    is_share = any(group["scores"].get(main, {}).get("share") for _, group, _ in groups)
    drawn["stage_quality"] = frontier(groups, f"eval/{main}", spoken(main), is_share)
    return {name: json.loads(figure.to_json()) for name, figure in drawn.items() if figure is not None}


def runs_of(told: dict[str, Any], group: dict[str, Any], by_id: dict[str, Run]) -> list[tuple[dict[str, Any], Run]]:
    """The rows of one stage with their runs."""
    key = ("stage", "control", "recipe")
    return [(row, by_id[row["run_id"]]) for row in told["runs"] if all(row[name] == group[name] for name in key)]


def spoken(score: str) -> str:
    """A score's name for a person."""
    return score.replace("_", " ")


def title_of(group: dict[str, Any], limit: int = 22) -> str:
    """A stage's name in a figure."""
    control = " from random" if group["control"] else ""
    return literal(f"{group['stage']}{control} {brief(group['recipe'], 12)}", limit)


def gains(told: dict[str, Any]) -> Any:
    """A row a stage, a panel a score: each seed's change, and their mean with its interval; sampled ones below."""
    import plotly.graph_objects as go

    shown = [group for group in told["stages"] if any(one["n"] for one in group["scores"].values())][:ROWS]
    panels = [
        (score, title) for score, title in PANELS
        if any(group["scores"].get(name, {}).get("n") for group in shown for name in (score, f"sampled_{score}"))
    ] or [(told["main"], literal(spoken(told["main"]), 30))]  # fmt: skip
    if not shown:
        return None
    figure = blank(96 + 58 * len(shown), "", "")
    gap, width = 0.04, (1 - 0.04 * (len(panels) - 1)) / len(panels)
    for place, (score, title) in enumerate(panels):
        suffix = "" if place == 0 else str(place + 1)
        where = {"xaxis": "x" + suffix, "yaxis": "y" + suffix}
        for row, group in enumerate(shown):
            for name, offset, symbol in ((score, 0.0, "circle"), (f"sampled_{score}", 0.36, "diamond-open")):
                one = group["scores"].get(name)
                if not one or not one["n"]:
                    continue
                colour, scale = WORDS.get(one["verdict"], C["crashed"]), 100 if one["share"] else 1
                picked = np.unique(np.linspace(0, one["n"] - 1, min(DOTS, one["n"])).round().astype(int))
                seeds = [one["seeds"][i] for i in picked]
                said = [
                    f"seed {literal(str(seed['seed']))}: {scale * seed['before']:.3g} to {scale * seed['after']:.3g}"
                    for seed in seeds
                ]
                # A fixed zigzag keeps neighbours apart; the height means nothing.
                heights = [-row - offset - 0.13 + (0.0, 0.06, -0.06)[j % 3] for j in range(len(seeds))]
                figure.add_trace(
                    go.Scatter(
                        x=[scale * seed["change"] for seed in seeds], y=heights, mode="markers", customdata=said,
                        marker={"size": 6, "color": colour, "opacity": 0.5, "symbol": symbol}, **where,
                        hovertemplate="%{customdata}<extra>" + literal(spoken(name)) + "</extra>",
                    )
                )  # fmt: skip
                figure.add_trace(mean_of(one, colour, symbol, -row - offset, scale, title_of(group), where))
        left = place * (width + gap)
        axes: dict[str, dict[str, Any]] = {
            f"xaxis{suffix}": {"domain": [left, left + width], "anchor": "y" + suffix, "fixedrange": True,
                               "title": title, "showgrid": True, "gridcolor": C["grid"], "zeroline": True,
                               "zerolinecolor": C["muted"], "zerolinewidth": 1.4, "showline": False},
            f"yaxis{suffix}": {"anchor": "x" + suffix, "fixedrange": True, "showgrid": False, "ticks": "",
                               "range": [-len(shown) + 0.35, 0.45], "showticklabels": place == 0,
                               "tickvals": [-i - 0.15 for i in range(len(shown))],
                               "ticktext": [title_of(group) for group in shown]},
        }  # fmt: skip
        figure.update_layout(axes)
    figure.update_layout(hovermode="closest")
    return figure


def mean_of(
    one: dict[str, Any], colour: str, symbol: str, height: float, scale: float, title: str, where: dict[str, str]
) -> Any:
    """The mean change with its interval; hollow and without the t interval where one seed is all there is."""
    import plotly.graph_objects as go

    known = math.isfinite(one["lo"])
    error = {"type": "data", "symmetric": False, "color": colour, "thickness": 1.6, "width": 5, "visible": known}
    error |= {"array": [scale * (one["hi"] - one["change"])], "arrayminus": [scale * (one["change"] - one["lo"])]}
    told = f"<b>{title}</b> {one['verdict']}<br>{scale * one['change']:+.3g}"
    told += f", 95% {scale * one['lo']:+.3g} to {scale * one['hi']:+.3g}" if known else ""
    return go.Scatter(
        x=[scale * one["change"]], y=[height], mode="markers", error_x=error if known else None,
        marker={"size": 10, "color": colour, "symbol": symbol, "line": {"width": 2, "color": colour}}, **where,
        hovertemplate=told + f"<br>{one['n']} seed{'s' * (one['n'] != 1)}<extra></extra>",
    )  # fmt: skip


def score_curve(row: dict[str, Any], run: Run, score: str) -> Series | None:
    """A held-out score over updates, from the start at step 0: on the items watched in training, where there are any.

    Those under `eval/` are measured before and after alone.
    """
    if (watched := figures.curve_of(run, f"watch/{score}")) is not None:
        return Series(watched.step.astype(np.float64), watched.step.astype(np.float64), watched.value)
    curve = figures.curve_of(run, f"eval/{score}")
    if curve is None:
        return None
    # Updates are what stages of any length share, also where a run counts tokens as well.
    step, value = curve.step.astype(np.float64), curve.value
    start = row["before"].get(score, math.nan)
    if step[0] > 0 and math.isfinite(start):
        step, value = np.concatenate([[0.0], step]), np.concatenate([[start], value])
    return Series(step, step, value)


def curves(groups: list[tuple[int, dict[str, Any], list[tuple[dict[str, Any], Run]]]], score: str) -> Any:
    """A score over one stage's updates: per recipe the band and mean of its finished seeds, and few runs' own lines."""
    import plotly.graph_objects as go

    ranked = sorted(groups, key=lambda one: -known(one[1]["scores"].get(score, {}).get("after")))[:BANDED]
    found = [
        (i, [(row, curve) for row, run in members if (curve := score_curve(row, run, score)) is not None])
        for i, _, members in ranked
    ]
    if not any(len(curve.step) > 1 for _, members in found for _, curve in members):
        return None
    figure = blank(300, "updates", literal(spoken(score), 40))
    figure.update_xaxes(tickformat="~s")
    if all(group["scores"][score]["share"] for _, group, _ in ranked if score in group["scores"]):
        figure.update_yaxes(tickformat=".3~p")
    drawn = sum(len(members) for _, members in found)
    for i, members in found:
        finished = [(row, curve) for row, curve in members if row["status"] in FINISHED and len(curve.step) > 1]
        mean = figures.add_band(figure, finished, i, True)
        for row, curve in members if drawn <= LINES else [pair for pair in members if pair[0]["status"] == "diverged"]:
            if len(curve.step) > 1:
                x, y = figures.thinned(curve.tokens, curve.value, POINTS)
                lost = row["status"] == "diverged"
                colour = C["diverged"] if lost else colour_of(i) if row["status"] in FINISHED else C["crashed"]
                line = {"color": colour, "width": 1.6 if lost or len(members) == 1 else 1, "dash": dash_of(i)}
                said = f"<b>{figures.seed_name(row)}</b> {row['status']}<br>update %{{x}}<br>%{{y:.3f}}<extra></extra>"
                figure.add_trace(
                    go.Scatter(x=x, y=y, mode="lines", line=line, opacity=0.6, hovertemplate=said)
                )  # fmt: skip
        if mean:
            kind = "median" if mean[2] else "mean"
            figures.add_mean(figure, mean, i, True, f"<b>{kind} of the seeds</b><br>update %{{x:.0f}}<br>%{{y:.3f}}")
            figure.data[-1].line.dash = dash_of(i)
    figure.update_layout(hovermode="closest")
    return figure


def known(value: float | None) -> float:
    """For sorting: what is not known comes last."""
    return value if value is not None and math.isfinite(value) else -math.inf


def dash_of(i: int) -> str:
    """The dash that tells recipes of one colour apart."""
    return ("solid", "dash", "dot")[i // 5 % 3]


def path_of(row: dict[str, Any], run: Run, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """A run's way through (KL, metric) in order of its updates, starting at KL 0 where the start was scored.

    KL is measured on each batch and scatters: each point has the mean KL since the point before it, and of many
    updates neighbours are averaged.
    """
    scored, watched = metric.startswith("eval/"), metric.replace("eval/", "watch/", 1)
    metric = watched if watched in run.history else metric
    kl, other = run.history.get("policy/kl"), run.history.get(metric)
    if kl is None or other is None:
        return np.empty(0), np.empty(0)
    at, values = kl.step[np.isfinite(kl.value)], kl.value[np.isfinite(kl.value)]
    step, y = other.step[np.isfinite(other.value)], other.value[np.isfinite(other.value)]
    start = row["before"].get(metric.removeprefix("eval/"), math.nan) if scored else math.nan
    if len(step) and step[0] == 0 and scored:
        start, step, y = float(y[0]), step[1:], y[1:]
    if not len(at) or not len(step):
        return np.empty(0), np.empty(0)
    ends = np.unique(np.linspace(0, len(step), min(POINTS, len(step)) + 1).round().astype(int))
    y = np.array([y[a:b].mean() for a, b in itertools.pairwise(ends)])
    last = step[ends[1:] - 1]
    sums = np.concatenate([[0.0], np.cumsum(values)])
    until = np.searchsorted(at, last, side="right")
    since = np.concatenate([[0], until[:-1]])
    x = np.divide(sums[until] - sums[since], until - since, out=np.interp(last, at, values), where=until > since)
    if math.isfinite(start):
        x, y = np.concatenate([[0.0], x]), np.concatenate([[start], y])
    return x, y


def frontier(
    groups: list[tuple[int, dict[str, Any], list[tuple[dict[str, Any], Run]]]], metric: str, title: str, as_share: bool
) -> Any:
    """What was won for how much distance from the reference: each run a path that ends in a dot (Rafailov et al. 2023).

    Of many runs PATHS are drawn, as many of each recipe. The range is that of the finished ones.
    """
    import plotly.graph_objects as go

    found = [
        (i, group, [(row, *path) for row, run in members if len((path := path_of(row, run, metric))[0]) > 1])
        for i, group, members in groups
    ]
    found = [one for one in found if one[2]]
    if not found:
        return None
    each = max(1, PATHS // len(found))
    figure = blank(360, "KL to the reference, nats per token", literal(title, 40))
    if as_share:
        figure.update_yaxes(tickformat=".3~p")
    reach = []
    for i, group, paths in found[:PATHS]:
        picked = np.unique(np.linspace(0, len(paths) - 1, min(each, len(paths))).round().astype(int))
        for row, x, y in (paths[j] for j in picked):
            lost = row["status"] == "diverged"
            if row["status"] in FINISHED:
                reach.append(float(x.max()))
            colour = C["diverged"] if lost else colour_of(i)
            sizes = [0.0] * (len(x) - 1) + [9.0]
            said = f"<b>{title_of(group)} {figures.seed_name(row)}</b> {row['status']}"
            figure.add_trace(
                go.Scatter(
                    x=x.astype(np.float32), y=y.astype(np.float32), mode="lines+markers", opacity=0.8,
                    line={"color": colour, "width": 1.3, "dash": dash_of(i)},
                    marker={"size": sizes, "color": colour, "symbol": "x" if lost else "circle", "line": {"width": 0}},
                    hovertemplate=said + "<br>KL %{x:.3g}<br>%{y:.3g}<extra></extra>",
                )
            )  # fmt: skip
    if reach:
        figure.update_xaxes(range=[-0.02 * max(reach), 1.08 * max(reach)])
    figure.update_layout(hovermode="closest")
    return figure
