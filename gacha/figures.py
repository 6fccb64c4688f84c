"""The report's curves as plotly JSON. Colours are the light theme's; the page swaps them by webpage.PALETTE.

A figure is plotly's {data, layout}, and `more`: the pulls that report.js draws only when they are asked for.
"""

import base64
import itertools
import json
import math
from collections import defaultdict
from typing import Any

import numpy as np

from gacha import luck_figures
from gacha.luck_figures import BANDS, colour_of
from gacha.pulls import FINISHED
from gacha.runs import Run, Series
from webpage import C, blank, literal

BATCHES = 12
"""Bad batches marked at most: the worst of them."""
POINTS, POINTS_IN_ALL = 500, 24_000
"""Points drawn at most of a line and of a figure; each bucket keeps its lowest and highest, so no spike is lost."""
SIBLINGS = 8
"""Healthy pulls drawn behind a diverged one."""
GRID = 160
"""Points of the seed band and mean line."""
ALL, FEW = 24, 10
"""Up to ALL pulls each has its line; a band of FEW pulls or more leaves out the outer tenths."""
BANDED = 5
"""Recipes whose bands and best, median and worst pulls are drawn where not every pull is."""
LOST = 8
"""Diverged pulls drawn at most where not every pull is."""
Found = list[tuple[dict[str, Any], Series]]
"""Rows of the table of pulls with their curves."""


def build(report: dict[str, Any], pulls: list[Run]) -> dict[str, Any]:
    """Figure name to plotly figure (plain dicts and lists); a figure with nothing to show is left out."""
    runs_by_id = {run.id: run for run in pulls}
    rows = [(row, runs_by_id[row["run_id"]]) for row in report["pulls"]]
    order = {recipe["recipe"]: i for i, recipe in enumerate(report["recipes"])}
    value = report["value"]
    loss = curves("train/loss", "nats per token", rows, order, None)
    drawn = {
        "loss": loss and {**loss, "figure": mark_bad_batches(loss["figure"], report["siblings"])},
        "value": curves(value["metric"], value["unit"] or value["metric"], rows, order, report["baseline_bpb"]),
        "event": figure_of(event(rows)),
        **{name: figure_of(figure) for name, figure in luck_figures.build(report).items()},
    }
    return {
        name: json.loads(one["figure"].to_json()) | ({"more": one["more"]} if one["more"] else {})
        for name, one in drawn.items()
        if one is not None
    }


def figure_of(figure: Any) -> dict[str, Any] | None:
    """A figure that shows all it has."""
    return None if figure is None else {"figure": figure, "more": []}


def seed_name(row: dict[str, Any]) -> str:
    """A pull's short label, safe inside plotly's pseudo-HTML."""
    return literal(f"s{row['seed']}" if row["seed"] is not None else str(row["name"]))


def curve_of(run: Run, metric: str) -> Series | None:
    """The metric's rows with a known x: tokens, or W&B's step in runs that never log tokens."""
    series = run.history.get(metric)
    if series is None:
        return None
    tokens = series.tokens if np.isfinite(series.tokens).any() else series.step.astype(np.float64)
    keep = np.isfinite(tokens)
    return Series(series.step[keep], tokens[keep], series.value[keep]) if keep.any() else None


def thinned(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """About `points` of a line: the lowest and highest of each bucket, in order; values that are not finite dropped."""
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= points:
        return x, y
    share = np.linspace(0, 1, points // 2 + 1)
    # Few buckets would cut the corner of the steep beginning: there they are narrower.
    edges = (len(x) * (share if points >= 100 else share**1.7)).astype(int)
    chosen = {int(a + pick(y[a:b])) for a, b in itertools.pairwise(edges) for pick in (np.argmin, np.argmax) if b > a}
    at = np.array(sorted(chosen | {0, len(x) - 1}))
    return x[at], y[at]


def on_grid(series: Series, grid: np.ndarray) -> np.ndarray:
    """The line at `grid`'s tokens: rows averaged around each point where they are dense, interpolated where not."""
    keep = np.isfinite(series.value)
    x, y = series.tokens[keep], series.value[keep]
    if not len(x):
        return np.full(len(grid), np.nan)
    half = (grid[1] - grid[0]) / 2
    lo, hi = np.searchsorted(x, grid - half), np.searchsorted(x, grid + half)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    dense = hi - lo >= 2
    mean = np.divide(sums[hi] - sums[lo], hi - lo, out=np.interp(grid, x, y), where=dense)
    mean[(grid < x[0] - half) | (grid > x[-1] + half)] = np.nan
    return mean


def healthy_range(lines: list[Series], extra: float | None, whole: bool) -> tuple[float, float] | None:
    """y limits that hold the healthy lines, the steep first tenth of their tokens only if `whole`."""
    late = [line.value[line.tokens >= (0.0 if whole else 0.1) * line.tokens[-1]] for line in lines]
    values = np.concatenate([*late, [extra or math.nan]])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if whole and low > 0:
        return 0.95 * low, 1.3 * high
    pad = 0.06 * (high - low or abs(high) or 1.0)
    return low - pad, high + pad


def curves(metric: str, y_title: str, rows: list[Any], order: dict[str, int], baseline: float | None) -> Any:
    """Curves over tokens: a line per pull while they are few, and per recipe the band and mean of its finished seeds.

    Of many pulls only each banded recipe's best, median and worst and the first diverged ones have lines; the others
    wait in `more`.
    """
    found = [(row, curve) for row, run in rows if (curve := curve_of(run, metric)) is not None]
    if not any(len(curve.step) > 1 for _, curve in found):
        return None
    axis = (
        "tokens"
        if any(np.isfinite(run.history[metric].tokens).any() for _, run in rows if metric in run.history)
        else "step"
    )
    figure = blank(350, axis, literal(y_title, 40))
    figure.update_xaxes(tickformat="~s", fixedrange=False)
    # A label at the top edge would move the edge, and that the labels, without end.
    figure.update_yaxes(fixedrange=False, automargin="width")
    figure.update_layout(hovermode="closest", dragmode="zoom")
    healthy = [(row, curve) for row, curve in found if row["status"] in FINISHED] or [
        (row, curve) for row, curve in found if row["status"] != "diverged"
    ]
    limits = healthy_range([curve for _, curve in healthy or found], baseline, whole=metric == "train/loss")
    if limits and metric == "train/loss" and limits[0] > 0:
        # From ln V to the end in one picture: where a lost pull left its siblings is often the first hundred steps.
        shown = [m * 10.0**e for e in range(-3, 5) for m in (1, 1.5, 2, 3, 5, 7)]
        figure.update_yaxes(
            type="log", range=np.log10(limits), tickvals=shown, ticktext=[f"{tick:g}" for tick in shown]
        )
    else:
        figure.update_yaxes(range=limits)
    groups = banded(found, order, everyone=len(found) <= ALL)
    means = {name: add_band(figure, members, order.get(name, 0), name in order) for name, members in groups.items()}
    special = {row["run_id"]: "" for row, _ in found} if len(found) <= ALL else picked(groups, found)
    points = max(32, min(POINTS, POINTS_IN_ALL // len(found)))
    more, diverged = [], sum(row["status"] == "diverged" and row["run_id"] in special for row, _ in found)
    for row, curve in sorted(found, key=lambda pair: pair[0]["status"] == "diverged"):
        if row["run_id"] not in special:
            more.append(waiting(row, curve, order, points, limits))
            continue
        x, y = thinned(curve.tokens, curve.value, POINTS if len(found) > ALL else max(points, 100))
        bad = row["status"] == "diverged"
        if limits and bad:
            y = np.minimum(y, limits[1] + 10 * (limits[1] - limits[0]))  # drawn off the top, but not to 1e30
        add_line(figure, row, x, y, order, metric, special[row["run_id"]])
        if bad and len(x):
            mark_divergence(figure, row, x, y, limits, labelled=diverged < 3)
    for name, mean in means.items():
        if mean:
            told = f"<b>{'median' if mean[2] else 'mean'} of the seeds</b><br>%{{x:.3s}} tokens<br>{metric} %{{y:.4f}}"
            add_mean(figure, mean, order.get(name, 0), name in order, told + "<extra></extra>")
    if baseline:
        figure.add_hline(y=baseline, line={"color": C["muted"], "width": 1, "dash": "dash"})
        text = f"Kneser–Ney 5-gram {baseline:.3f}"
        figure.add_annotation(x=0, xref="paper", y=baseline, text=text, showarrow=False, xanchor="left", yanchor="top")
    return {"figure": figure, "more": more}


def banded(found: Found, order: dict[str, int], everyone: bool) -> dict[str, Found]:
    """Recipe to its finished pulls, worst recipe first, where there are two or more: all of them, or the BANDED best.

    Where no recipe has two, all finished pulls are one group under "".
    """
    groups: dict[str, Found] = defaultdict(list)
    for row, curve in found:
        if row["status"] in FINISHED:
            groups[row["recipe"]].append((row, curve))
    names = [name for name in order if len(groups.get(name, ())) > 1]
    finished = [pair for pair in found if pair[0]["status"] in FINISHED]
    if not names and not everyone and len(finished) > 1:
        return {"": finished}
    return {name: groups[name] for name in reversed(names if everyone else names[:BANDED])}


def picked(groups: dict[str, Found], found: Found) -> dict[str, str]:
    """Ids of the pulls that are drawn of many, and what each is: its group's best, median or worst, or diverged."""
    ids = {row["run_id"]: "" for row in [row for row, _ in found if row["status"] == "diverged"][:LOST]}
    for members in groups.values():
        ranked = [row["run_id"] for row, _ in members if math.isfinite(row["value"])]  # rows come best first
        for what, at in (("median", len(ranked) // 2), ("worst", -1), ("best", 0)):
            if ranked:
                ids[ranked[at]] = what
    return ids


def add_band(figure: Any, members: Found, which: int, grouped: bool) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """Shade where a recipe's seeds lie; returns their mean line (x, y), of FEW or more the median, and which it is."""
    import plotly.graph_objects as go

    if len(members) < 2:
        return None
    curves = [curve for _, curve in members]
    grid = np.linspace(max(c.tokens[0] for c in curves), min(c.tokens[-1] for c in curves), GRID)
    values = np.array([on_grid(curve, grid) for curve in curves])
    ok = np.isfinite(values).all(axis=0)
    x, values = grid[ok], values[:, ok]
    many = len(members) >= FEW
    low, high = np.quantile(values, (0.1, 0.9) if many else (0.0, 1.0), axis=0)
    group = f"r{which}" if grouped else None
    band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "legendgroup": group}
    figure.add_trace(go.Scatter(x=x, y=high, **band))
    figure.add_trace(go.Scatter(x=x, y=low, fill="tonexty", fillcolor=BANDS[which % len(BANDS)], **band))
    return x, np.median(values, axis=0) if many else values.mean(axis=0), many


def add_mean(figure: Any, mean: tuple[np.ndarray, np.ndarray, bool], which: int, grouped: bool, told: str) -> None:
    """The thick line through a band."""
    import plotly.graph_objects as go

    line = {"color": colour_of(which), "width": 2.2}
    group = f"r{which}" if grouped else None
    figure.add_trace(go.Scatter(x=mean[0], y=mean[1], mode="lines", line=line, hovertemplate=told, legendgroup=group))


def add_line(
    figure: Any, row: dict[str, Any], x: np.ndarray, y: np.ndarray, order: dict[str, int], metric: str, what: str
) -> None:
    """One pull; `what` it is of its recipe: best, median or worst, "" where each pull has its line."""
    import plotly.graph_objects as go

    finished, bad = row["status"] in FINISHED, row["status"] == "diverged"
    colour = C["diverged"] if bad else colour_of(order[row["recipe"]]) if finished else C["crashed"]
    dash = {"worst": "dash", "median": "dashdot"}.get(what, "solid" if finished or bad else "dot")
    line = {"color": colour, "width": 1.8 if bad or what == "best" else 1.1, "dash": dash}
    said = f", {what} of its recipe" if what else ""
    told = f"<b>{seed_name(row)}</b> {row['status']}{said}<br>%{{x:.3s}} tokens<br>{literal(metric)} %{{y:.4f}}"
    figure.add_trace(
        go.Scatter(
            x=x.astype(np.float32), y=y.astype(np.float32), mode="lines", line=line, meta=row["run_id"],
            opacity=1 if bad or what else 0.6 if finished else 0.8, hovertemplate=told + "<extra></extra>",
            legendgroup=f"r{order[row['recipe']]}",
        )
    )  # fmt: skip


def waiting(
    row: dict[str, Any], curve: Series, order: dict[str, int], points: int, limits: tuple[float, float] | None
) -> dict[str, Any]:
    """A pull that is not drawn at first, small: what report.js makes a line of."""
    x, y = thinned(curve.tokens, curve.value, points)
    if limits:
        y = np.minimum(y, limits[1] + 10 * (limits[1] - limits[0]))
    finished, bad = row["status"] in FINISHED, row["status"] == "diverged"
    colour = C["diverged"] if bad else colour_of(order[row["recipe"]]) if finished else C["crashed"]
    told = {"run": row["run_id"], "name": seed_name(row), "status": row["status"], "recipe": f"r{order[row['recipe']]}"}
    return told | {"color": colour, "dash": "solid" if finished or bad else "dot"} | packed(x, y)


def packed(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """x and y as plotly's typed arrays, single precision: half the size of digits."""
    return {
        name: {"dtype": "f4", "bdata": base64.b64encode(values.astype("<f4").tobytes()).decode()}
        for name, values in (("x", x), ("y", y))
    }


def mark_bad_batches(figure: Any, relations: dict[str, Any]) -> Any:
    """A dotted line at each batch of data that raised the loss of several pulls."""
    for batch in relations["bad_batches"][:BATCHES]:
        line = {"color": C["spiked"], "width": 1, "dash": "dot"}
        figure.add_vline(x=batch["tokens"], line=line, layer="below")
    return figure


def mark_divergence(
    figure: Any, row: dict[str, Any], x: np.ndarray, y: np.ndarray, limits: tuple[float, float] | None, labelled: bool
) -> None:
    """A cross where the pull whose line was just drawn was stopped, at the top edge when that left the picture."""
    import plotly.graph_objects as go

    at = row["diverged_at_tokens"] if math.isfinite(row["diverged_at_tokens"]) else float(x[-1])
    log = figure.layout.yaxis.type == "log"
    low, high = limits or (float(y[-1]), float(y[-1]))
    height = min(float(y[-1]), high * (low / high) ** 0.03 if log else high - 0.03 * (high - low))
    share = f" at {row['diverged_at']:.0%} of its budget" if math.isfinite(row["diverged_at"]) else ""
    marker = {"symbol": "x", "size": 10, "color": C["diverged"], "line": {"width": 1.5, "color": C["card"]}}
    told = f"<b>{seed_name(row)}</b> diverged{share}<extra></extra>"
    figure.add_trace(
        go.Scatter(
            x=[at], y=[height], mode="markers", marker=marker, meta=row["run_id"], hovertemplate=told,
            legendgroup=figure.data[-1].legendgroup,
        )
    )  # fmt: skip
    if not labelled:
        return
    figure.add_annotation(
        x=at, y=math.log10(height) if log else height, text=f"{seed_name(row)} diverged{share}",
        showarrow=False, xanchor="left", xshift=10,
        font={"color": C["diverged"]},
    )  # fmt: skip


def event(rows: list[Any]) -> Any:
    """Gradient norm and loss of the first diverged pull around its end, before its finished siblings."""
    import plotly.graph_objects as go

    panels = (("stability/grad_norm", "gradient norm"), ("train/loss", "nats per token"))
    for row, run in rows:
        at = row["diverged_at_tokens"]
        shown = [(metric, title) for metric, title in panels if curve_of(run, metric) is not None]
        if row["status"] == "diverged" and shown and math.isfinite(at):
            break
    else:
        return None
    span = row["tokens_budget"] if math.isfinite(row["tokens_budget"]) else 4 * at
    left, right = max(0.0, at - 0.15 * span), at + 0.03 * span
    figure = blank(250, "tokens", "")
    for i, (metric, title) in enumerate(shown, start=1):
        suffix = "" if i == 1 else str(i)
        inside = []
        siblings = [healthy for other, healthy in rows if other["status"] in FINISHED][:SIBLINGS]
        for sibling in siblings:
            curve = curve_of(sibling, metric)
            if curve is None:
                continue
            keep = (curve.tokens >= left) & (curve.tokens <= right) & np.isfinite(curve.value)
            inside.append(curve.value[keep])
            figure.add_trace(
                go.Scatter(
                    x=curve.tokens[keep], y=curve.value[keep], mode="lines", line={"color": C["ok"], "width": 1},
                    opacity=0.4, hoverinfo="skip", xaxis="x" + suffix, yaxis="y" + suffix,
                )
            )  # fmt: skip
        curve = curve_of(run, metric)
        assert curve is not None
        keep = (curve.tokens >= left) & (curve.tokens <= right) & np.isfinite(curve.value)
        told = f"<b>{seed_name(row)}</b><br>%{{x:.3s}} tokens<br>{title} %{{y:.3g}}<extra></extra>"
        figure.add_trace(
            go.Scatter(
                x=curve.tokens[keep], y=curve.value[keep], mode="lines+markers", marker={"size": 4},
                line={"color": C["diverged"], "width": 1.6}, xaxis="x" + suffix, yaxis="y" + suffix, hovertemplate=told,
            )
        )  # fmt: skip
        where = [0.0, 1.0] if len(shown) == 1 else [0.0, 0.45] if i == 1 else [0.55, 1.0]
        values = np.concatenate([*inside, curve.value[keep]])
        positive = bool((values > 0).all()) and bool(keep.any()) and float(values.max()) > 8 * float(values.min())
        axes: dict[str, dict[str, Any]] = {
            f"xaxis{suffix}": {"domain": where, "range": [left, right], "tickformat": "~s", "title": "tokens"},
            f"yaxis{suffix}": {"anchor": "x" + suffix, "type": "log" if positive else "linear", "title": title},
        }
        axes[f"xaxis{suffix}"] |= {"anchor": "y" + suffix, "fixedrange": True, "nticks": 6}
        axes[f"yaxis{suffix}"] |= {"fixedrange": True, "nticks": 5}
        if positive:  # plotly's own ticks read 2, 5, 10, 2: the last one is 20
            ticks = [m * 10.0**e for e in range(-8, 12) for m in (1, 3)]
            axes[f"yaxis{suffix}"] |= {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
        figure.update_layout(axes)
    figure.layout.shapes = [
        {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "xref": "x" + s, "yref": f"y{s} domain",
         "line": {"color": C["diverged"], "width": 1, "dash": "dot"}}
        for s in ["", "2"][: len(shown)]
    ]  # fmt: skip
    return figure
