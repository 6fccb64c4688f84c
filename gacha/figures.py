"""The report's figures as plotly JSON. Colours are the light theme's; the page swaps them by webpage.PALETTE."""

import itertools
import json
import math
from typing import Any

import numpy as np

from gacha.runs import Run, Series
from webpage import C, blank, literal

RECIPES = [C["ok"], C["recipe1"], C["recipe2"], C["recipe3"], C["recipe4"]]
BANDS = [C[f"band{i}"] for i in range(5)]
BATCHES = 12
"""Bad batches marked at most: the worst of them."""
POINTS, POINTS_IN_ALL = 500, 24_000
"""Points drawn at most of a line and of a figure; each bucket keeps its lowest and highest, so no spike is lost."""
SIBLINGS = 8
"""Healthy pulls drawn behind a diverged one."""
GRID = 160
"""Points of the seed band and mean line."""


def build(report: dict[str, Any], pulls: list[Run]) -> dict[str, Any]:
    """Figure name to plotly figure (plain dicts and lists); a figure with nothing to show is left out."""
    runs_by_id = {run.id: run for run in pulls}
    rows = [(row, runs_by_id[row["run_id"]]) for row in report["pulls"]]
    colours = {recipe["recipe"]: i % len(RECIPES) for i, recipe in enumerate(report["recipes"])}
    drawn = {
        "loss": mark_bad_batches(curves("train/loss", "nats per token", rows, colours, None), report["siblings"]),
        "bpb": curves("val/bpb", "bits per byte", rows, colours, report["baseline_bpb"]),
        "event": event(rows),
        "strip": strip(report),
        "best_of": best_of(report["recipes"][0]),
    }
    return {name: json.loads(figure.to_json()) for name, figure in drawn.items() if figure is not None}


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
    edges = np.linspace(0, len(x), points // 2 + 1).astype(int)
    chosen = {int(a + pick(y[a:b])) for a, b in itertools.pairwise(edges) for pick in (np.argmin, np.argmax)}
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


def curves(metric: str, y_title: str, rows: list[Any], colours: dict[str, int], baseline: float | None) -> Any:
    """One line per pull over tokens, and per recipe the band (min to max) and mean of its finished seeds."""
    import plotly.graph_objects as go

    found = [(row, curve) for row, run in rows if (curve := curve_of(run, metric)) is not None]
    if not found:
        return None
    figure = blank(350, "tokens", y_title)
    figure.update_xaxes(tickformat="~s", fixedrange=False)
    figure.update_yaxes(fixedrange=False)
    figure.update_layout(hovermode="closest", dragmode="zoom")
    healthy = [(row, curve) for row, curve in found if row["status"] in ("ok", "spiked")] or [
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
    ends, diverged = {}, sum(row["status"] == "diverged" for row, _ in found)
    for recipe, which in reversed(colours.items()):
        members = [curve for row, curve in healthy if row["recipe"] == recipe and row["status"] in ("ok", "spiked")]
        if len(members) > 1:
            stop = min(curve.tokens[-1] for curve in members)
            grid = np.linspace(max(curve.tokens[0] for curve in members), stop, GRID)
            values = np.array([on_grid(curve, grid) for curve in members])
            ok = np.isfinite(values).all(axis=0)
            x, values = grid[ok], values[:, ok]
            band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
            figure.add_trace(go.Scatter(x=x, y=values.max(axis=0), **band))
            figure.add_trace(go.Scatter(x=x, y=values.min(axis=0), fill="tonexty", fillcolor=BANDS[which], **band))
            ends[recipe] = (x, values.mean(axis=0))
    for row, curve in sorted(found, key=lambda pair: pair[0]["status"] == "diverged"):
        finished, bad = row["status"] in ("ok", "spiked"), row["status"] == "diverged"
        colour = C["diverged"] if bad else RECIPES[colours[row["recipe"]]] if finished else C["crashed"]
        x, y = thinned(curve.tokens, curve.value, max(100, min(POINTS, POINTS_IN_ALL // len(found))))
        if limits and bad:
            y = np.minimum(y, limits[1] + 10 * (limits[1] - limits[0]))  # drawn off the top, but not to 1e30
        line = {"color": colour, "width": 1.8 if bad else 1.1, "dash": "solid" if finished or bad else "dot"}
        told = f"<b>{seed_name(row)}</b> {row['status']}<br>%{{x:.3s}} tokens<br>{metric} %{{y:.4f}}<extra></extra>"
        alpha = 1 if bad else 0.8 if not finished else 0.6 if len(found) < 25 else 0.25
        figure.add_trace(
            go.Scatter(
                x=x.astype(np.float32), y=y.astype(np.float32), mode="lines", line=line, opacity=alpha,
                meta=row["run_id"], hovertemplate=told,
            )
        )  # fmt: skip
        if bad and len(x):
            mark_divergence(figure, row, x, y, limits, labelled=diverged < 3)
    for recipe, (x, y) in ends.items():
        which = colours[recipe]
        told = f"<b>mean of the seeds</b><br>%{{x:.3s}} tokens<br>{metric} %{{y:.4f}}<extra></extra>"
        line = {"color": RECIPES[which], "width": 2.2}
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines", line=line, hovertemplate=told))
    if baseline:
        figure.add_hline(y=baseline, line={"color": C["muted"], "width": 1, "dash": "dash"})
        text = f"Kneser–Ney 5-gram {baseline:.3f}"
        figure.add_annotation(x=0, xref="paper", y=baseline, text=text, showarrow=False, xanchor="left", yanchor="top")
    return figure


def mark_bad_batches(figure: Any, relations: dict[str, Any]) -> Any:
    """A dotted line at each batch of data that raised the loss of several pulls."""
    for batch in relations["bad_batches"][:BATCHES] if figure is not None else ():
        line = {"color": C["spiked"], "width": 1, "dash": "dot"}
        figure.add_vline(x=batch["tokens"], line=line, layer="below")
    return figure


def mark_divergence(
    figure: Any, row: dict[str, Any], x: np.ndarray, y: np.ndarray, limits: tuple[float, float] | None, labelled: bool
) -> None:
    """A cross where the pull was stopped, at the top edge when its line has left the picture."""
    import plotly.graph_objects as go

    at = row["diverged_at_tokens"] if math.isfinite(row["diverged_at_tokens"]) else float(x[-1])
    log = figure.layout.yaxis.type == "log"
    low, high = limits or (float(y[-1]), float(y[-1]))
    height = min(float(y[-1]), high * (low / high) ** 0.03 if log else high - 0.03 * (high - low))
    share = f" at {row['diverged_at']:.0%} of its budget" if math.isfinite(row["diverged_at"]) else ""
    marker = {"symbol": "x", "size": 10, "color": C["diverged"], "line": {"width": 1.5, "color": C["card"]}}
    told = f"<b>{seed_name(row)}</b> diverged{share}<extra></extra>"
    figure.add_trace(
        go.Scatter(x=[at], y=[height], mode="markers", marker=marker, meta=row["run_id"], hovertemplate=told)
    )
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
        siblings = [healthy for other, healthy in rows if other["status"] in ("ok", "spiked")][:SIBLINGS]
        for sibling in siblings:
            curve = curve_of(sibling, metric)
            if curve is None:
                continue
            keep = (curve.tokens >= left) & (curve.tokens <= right) & np.isfinite(curve.value)
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
        positive = bool((curve.value[keep] > 0).all()) and bool(keep.any())
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


def strip(report: dict[str, Any]) -> Any:
    """Finished pulls' val/bpb, one row of dots per recipe, mean and sd below each."""
    import plotly.graph_objects as go

    recipes = [recipe for recipe in report["recipes"] if recipe["n_finals"]]
    if not recipes:
        return None
    figure = blank(150 + 110 * len(recipes), "val/bpb, bits per byte", "")
    ticks = []
    for i, recipe in enumerate(recipes):
        colour = RECIPES[report["recipes"].index(recipe) % len(RECIPES)]
        rows = [
            row for row in report["pulls"]
            if row["recipe"] == recipe["recipe"] and row["status"] in ("ok", "spiked") and math.isfinite(row["val_bpb"])
        ]  # fmt: skip
        few = len(rows) <= 12
        # A fixed zigzag keeps neighbours apart; the height means nothing.
        heights = [-i + (0.0, 0.13, -0.13)[j % 3] for j in range(len(rows))]
        best = report["best"]["run_id"] if report["best"] else None
        edge = [C["ink"] if row["run_id"] == best else C["card"] for row in rows]
        figure.add_trace(
            go.Scatter(
                x=[row["val_bpb"] for row in rows], y=heights, mode="markers+text" if few else "markers",
                text=[seed_name(row) for row in rows] if few else None,
                textposition=[("bottom center", "top center")[j % 3 == 1] for j in range(len(rows))],
                marker={"size": 14, "color": colour, "line": {"width": 2, "color": edge}},
                hovertemplate="<b>%{customdata}</b> %{x:.4f}<extra></extra>", customdata=[seed_name(r) for r in rows],
            )
        )  # fmt: skip
        if recipe["n_finals"] > 1:
            figure.add_trace(
                go.Scatter(
                    x=[recipe["mean"]], y=[-i - 0.36], mode="markers",
                    marker={"symbol": "line-ns", "size": 14, "line": {"width": 2.5, "color": C["ink"]}},
                    error_x={"type": "constant", "value": recipe["sd"], "color": C["ink"], "thickness": 1.3},
                    hovertemplate=f"mean {recipe['mean']:.4f}, sd {recipe['sd']:.4f}<extra></extra>",
                )
            )  # fmt: skip
        ticks.append(literal(recipe["recipe"]))
    figure.update_yaxes(
        tickvals=[-i for i in range(len(recipes))], ticktext=ticks, range=[-len(recipes) + 0.4, 0.45], showgrid=False
    )
    figure.update_xaxes(showgrid=True, gridcolor=C["grid"], nticks=6)
    figure.update_layout(hovermode="closest")
    return figure


def best_of(recipe: dict[str, Any]) -> Any:
    """Expected best val/bpb of k pulls with its bootstrap interval; money under each k."""
    import plotly.graph_objects as go

    told = recipe["best_of"]
    if len(told) < 2:
        return None
    ks = [int(k) for k in told]
    u, lo, hi = (np.array([got[key] for got in told.values()]) for key in ("u", "lo", "hi"))
    per = recipe["per_finished"]
    paid = per["money"] if math.isfinite(per.get("money", math.nan)) else None
    price = [
        f"{k * paid:.3g} {literal(per['currency'])}" if paid is not None else f"{k * per['seconds']:,.0f} s" for k in ks
    ]
    figure = blank(300, "pulls, and what so many finished ones cost", "expected best val/bpb")
    band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(x=ks, y=hi, **band))
    figure.add_trace(go.Scatter(x=ks, y=lo, fill="tonexty", fillcolor=C["band0"], **band))
    extra = [[a, b, c, f"{k * per['seconds']:,.0f}"] for k, a, b, c in zip(ks, lo, hi, price, strict=True)]
    hover = (
        "<b>best of %{x}</b> %{y:.4f}<br>95% %{customdata[0]:.4f} to %{customdata[1]:.4f}<br>"
        "%{customdata[2]} · %{customdata[3]} device s<extra></extra>"
    )
    figure.add_trace(
        go.Scatter(
            x=ks, y=u, mode="lines+markers" if len(ks) <= 30 else "lines", line={"color": C["ok"], "width": 2.4},
            marker={"size": 8}, customdata=extra, hovertemplate=hover,
        )
    )  # fmt: skip
    shown = [k for k in ks if len(ks) <= 8 or k in (1, len(ks)) or k % (len(ks) // 5) == 0]
    figure.update_xaxes(
        tickvals=shown, ticktext=[f"<b>{k}</b><br>{price[k - 1]}" for k in shown], range=[0.7, len(ks) + 0.3]
    )
    figure.update_layout(hovermode="closest")
    return figure
