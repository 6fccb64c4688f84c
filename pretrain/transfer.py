"""`python -m pretrain.transfer RUNS`: does the best learning rate stay where it is when the model grows?

Reads finished pulls over width, learning rate and seed (sweeps/mup_transfer.yaml) under SP and μP, and says by how many
octaves the best learning rate moves from the smallest to the largest width, and what it costs the largest model to be
trained with the smallest one's best learning rate (the question of Yang et al. 2022, figure 1).
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy import stats

import console
import webpage
from gacha import runs

BOOTSTRAPS = 2000
NAMES = {"sp": "SP", "mup": "μP"}
# What every pull of one study has in common.
SAME = ("n_layers", "tokens", "batch_tokens", "optimizer", "weight_decay", "schedule", "qk_norm", "base_width")
COLOURS = ("recipe4", "recipe1", "recipe3", "recipe2", "ok", "diverged")


@dataclass(frozen=True)
class TransferConfig:
    runs: tyro.conf.Positional[str]
    """folder of offline W&B runs"""
    out: str = "transfer.html"
    """the page to write"""
    json: bool = False
    """print the result as one JSON object"""


@dataclass(frozen=True)
class Curve:
    """Final validation loss in nats per token, `loss` (learning rates, seeds), at `x` = log2 of the learning rate."""

    x: np.ndarray
    loss: np.ndarray


def main(argv: list[str]) -> int:
    """Read the pulls, say where the best learning rate goes, write the page."""
    c = console.parse(TransferConfig, argv, "python -m pretrain.transfer")
    curves = collect(runs.read(c.runs), c.runs)
    result = summarise(curves)
    console.write_atomic(Path(c.out), webpage.build("Transfer · llm-gacha", *draw(result, curves, c.runs)).encode())
    if c.json:
        console.print_result({**result, "page": c.out}, as_json=True)
        return 0
    print("parametrization  width  seeds  log2 of the best lr, 95%       lowest loss")
    for cell in result["cells"]:
        edge = "  (at the edge of the grid)" if cell["at_edge"] else ""
        print(
            f"{cell['parametrization']:<15}  {cell['width']:>5}  {cell['seeds']:>5}  "
            f"{interval(cell['log2_lr']):<29}  {cell['loss']:.4f}{edge}"
        )
    for name in result["move"]:
        print(f"{name}: the best lr moves by {interval(result['move'][name])} octaves")
        print(f"{name}: the smallest width's best lr costs the largest {interval(result['paid'][name])} nats")
    if result["ratio"]:
        print(f"ratio of the moves, SP over muP: {interval(result['ratio'])}")
    print(f"page: {c.out}")
    return 0


def collect(pulls: list[runs.Run], folder: str) -> dict[tuple[str, int], Curve]:
    """(parametrization, width) to its curve. Raises UserError for pulls that make no study.

    A seed counts where every learning rate of its curve has it, a learning rate where every seed's loss is finite.
    """
    found: dict[tuple[str, int], dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    first, unfinished = None, 0
    for run in pulls:
        config = run.config
        if run.job_type != "pretrain" or "parametrization" not in config:
            continue
        losses = run.history.get("val/loss")
        steps = config["tokens"] // config["batch_tokens"]
        if run.state != "finished" or losses is None or losses.tokens[-1] < steps * config["batch_tokens"]:
            unfinished += 1
            continue
        first = first or run
        for name in SAME:
            if config[name] != first.config[name]:
                differ = f"{run.name} has {name} {config[name]}, {first.name} {first.config[name]}"
                raise console.UserError(f"{folder}: {differ}: give a folder with one study's pulls")
        found[config["parametrization"], config["d_model"]][config["lr"]][config["seed"]] = float(losses.value[-1])
    if unfinished:
        print(f"{unfinished} pulls without a final validation loss are left out", file=sys.stderr)
    curves = {}
    for (parametrization, width), by_lr in sorted(found.items(), key=lambda item: (item[0][0] != "sp", item[0][1])):
        finite = {lr: losses for lr, losses in sorted(by_lr.items()) if all(map(math.isfinite, losses.values()))}
        seeds = sorted(set.intersection(*map(set, finite.values()))) if finite else []
        if len(finite) < 3 or len(seeds) < 2:
            had = f"{len(finite)} learning rates with {len(seeds)} seeds in common"
            raise console.UserError(f"{folder}: {parametrization}, width {width}: {had}; needs three and two")
        loss = np.array([[losses[seed] for seed in seeds] for losses in finite.values()])
        curves[parametrization, width] = Curve(np.log2(list(finite)), loss)
    if len({width for _, width in curves}) < 2:
        raise console.UserError(f"{folder}: no finished pulls of two widths (sweeps/mup_transfer.yaml makes them)")
    return curves


def vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """The parabola through the lowest point and its neighbours: where its minimum is, how low, half its curvature.

    A lowest point at the edge of the grid is given as it is, with NaN for the curvature.
    """
    best = int(y.argmin())
    if best in (0, len(y) - 1):
        return float(x[best]), float(y[best]), math.nan
    (x0, x1, x2), (y0, y1, y2) = x[best - 1 : best + 2].tolist(), y[best - 1 : best + 2].tolist()
    slope = (y1 - y0) / (x1 - x0)
    curvature = ((y2 - y1) / (x2 - x1) - slope) / (x2 - x0)  # positive: y1 is the first of the lowest
    at = (x0 + x1) / 2 - slope / (2 * curvature)
    return at, y0 + (at - x0) * (slope + curvature * (at - x1)), curvature


def estimate(of: Callable[..., float], *curves: Curve) -> list[float]:
    """[value, low, high] of a function of the curves' mean losses, bootstrapped over the seeds of each curve.

    Expanded percentiles (Hesterberg 2015): the tails are those of Student's t for the smallest number of seeds, which
    for three of them means all that resampling can give.
    """
    generator = np.random.default_rng(0)
    value = of(*[curve.loss.mean(1) for curve in curves])
    counts = [curve.loss.shape[1] for curve in curves]
    draws = [generator.integers(n, size=(BOOTSTRAPS, n)) for n in counts]
    again = [
        of(*[curve.loss[:, draw[i]].mean(1) for curve, draw in zip(curves, draws, strict=True)])
        for i in range(BOOTSTRAPS)
    ]
    n = min(counts)
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    low, high = np.quantile(again, [tail, 1 - tail], method="nearest")
    return [round(float(number), 4) for number in (value, low, high)]


def summarise(curves: dict[tuple[str, int], Curve]) -> dict[str, Any]:
    """Best learning rates, their moves, the ratio of the moves, and what not moving costs; see the fields' names.

    Every interval is [value, low, high]; an end that is not finite is None.
    """
    result: dict[str, Any] = {"cells": [], "move": {}, "paid": {}, "ratio": None}
    for (parametrization, width), curve in curves.items():
        mean = curve.loss.mean(1)
        result["cells"].append(
            {
                "parametrization": parametrization,
                "width": width,
                "seeds": curve.loss.shape[1],
                "log2_lr": estimate(lambda y, x=curve.x: vertex(x, y)[0], curve),
                "loss": round(float(mean.min()), 4),
                "at_edge": int(mean.argmin()) in (0, len(mean) - 1),
            }
        )
    ends: dict[str, tuple[Curve, Curve]] = {}
    for parametrization in NAMES:
        widths = [width for name, width in curves if name == parametrization]
        if len(widths) < 2:
            continue
        small, large = ends[parametrization] = curves[parametrization, widths[0]], curves[parametrization, widths[-1]]
        result["move"][parametrization] = estimate(mover(small, large), small, large)
        result["paid"][parametrization] = estimate(payer(small, large), small, large)
    if len(ends) == 2:
        sp, mup = mover(*ends["sp"]), mover(*ends["mup"])

        def ratio(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> float:
            moved = abs(mup(c, d))
            return abs(sp(a, b)) / moved if moved else math.inf

        told = estimate(ratio, *ends["sp"], *ends["mup"])
        result["ratio"] = [number if math.isfinite(number) else None for number in told]
    return result


def mover(small: Curve, large: Curve) -> Callable[[np.ndarray, np.ndarray], float]:
    """Octaves from the best learning rate of one curve to that of the other, given their mean losses."""
    return lambda low, high: vertex(large.x, high)[0] - vertex(small.x, low)[0]


def payer(small: Curve, large: Curve) -> Callable[[np.ndarray, np.ndarray], float]:
    """Nats that the large model loses with the small one's best learning rate.

    The loss there is the parabola's between the points that it goes through, and interpolated over log2 lr elsewhere;
    beyond the grid it is the edge's, which is too little.
    """

    def paid(low: np.ndarray, high: np.ndarray) -> float:
        here, (at, lowest, curvature) = vertex(small.x, low)[0], vertex(large.x, high)
        best = int(high.argmin())
        if best not in (0, len(high) - 1) and large.x[best - 1] <= here <= large.x[best + 1]:
            return curvature * (here - at) ** 2
        return float(np.interp(here, large.x, high)) - lowest

    return paid


def interval(numbers: list[float | None]) -> str:
    """`-3.05 (-3.21 to -2.93)`."""
    value, low, high = ("inf" if number is None else f"{number:.2f}" for number in numbers)
    return f"{value} ({low} to {high})"


def draw(result: dict[str, Any], curves: dict[tuple[str, int], Curve], source: str) -> tuple[str, dict[str, Any]]:
    """The page's body and figures."""
    drawn = {name: figure(name, curves) for name in result["move"]}
    rows = []
    for cell in result["cells"]:
        value, low, high = cell["log2_lr"]
        note = "at the edge of the grid" if cell["at_edge"] else ""
        rows.append(
            [
                webpage.words(f"{NAMES[cell['parametrization']]}, width {cell['width']}", note),
                webpage.number(cell["seeds"]),
                webpage.number(value, f"{value:.2f}"),
                webpage.number(low, f"{low:.2f} to {high:.2f}"),
                webpage.number(round(2**value, 6), f"{2**value:.2e}"),
                webpage.number(cell["loss"], f"{cell['loss']:.4f}"),
            ]
        )
    heads = ["Model", "#Seeds", "#log2 of best lr", "#95%", "#Best lr", "#Lowest loss"]
    keys = []
    for name, move in result["move"].items():
        keys.append((f"{NAMES[name]}: octaves moved", f"{move[0]:+.2f}", f"{move[1]:+.2f} to {move[2]:+.2f}"))
        paid = result["paid"][name]
        note = f"nats, {paid[1]:.2f} to {paid[2]:.2f}: the largest model with the smallest one's best lr"
        keys.append((f"{NAMES[name]}: paid for not moving", f"{paid[0]:.2f}", note))
    told = "".join(
        f"<div><dt>{head}</dt><dd>{value}</dd><dd class=note>{note}</dd></div>" for head, value, note in keys
    )
    lead = "From the smallest to the largest width."
    if result["ratio"] and result["ratio"][1] is not None:  # the upper end says little where μP's move may be none
        least = result["ratio"][1]
        lead = f"Under SP the best learning rate moves at least {least:.1f} times as far as under μP (95%)."
    caption = (
        "Final validation loss in nats per token over the peak learning rate, both logarithmic in steps of two. A line "
        "per width, a dot per seed, a ring at the parabola's minimum."
    )
    places = "".join(webpage.figure(name, drawn, NAMES[name], caption) for name in drawn)
    body = f"""<section class="hero"><p class="kicker">{escape(source)}</p><h1>Learning rate over width</h1>
<p class="lead">{lead}</p><dl class="keys">{told}</dl></section>
<section><div class="pair">{places}</div></section>
<section><h2>Best learning rates</h2>{webpage.table("Best learning rates", heads, rows)}
<p class="caption">Intervals: bootstrap over seeds, expanded percentiles (Hesterberg 2015).</p></section>"""
    return body, drawn


def figure(parametrization: str, curves: dict[tuple[str, int], Curve]) -> dict[str, Any]:
    """Loss over learning rate, one line per width; every parametrization on the same axes."""
    import plotly.graph_objects as go

    drawn = webpage.blank(420, "learning rate", "validation loss")
    lowest = min(float(curve.loss.min()) for curve in curves.values())
    ticks = sorted({float(x) for curve in curves.values() for x in curve.x})
    mine = {width: curve for (name, width), curve in curves.items() if name == parametrization}
    for number, (width, curve) in enumerate(mine.items()):
        colour, mean = webpage.C[COLOURS[number % len(COLOURS)]], curve.loss.mean(1)
        line = {"color": colour, "width": 2}
        x = curve.x.tolist()
        drawn.add_trace(go.Scatter(x=x, y=mean.tolist(), name=f"width {width}", mode="lines", line=line))
        dots = {"x": np.repeat(curve.x, curve.loss.shape[1]).tolist(), "y": curve.loss.ravel().tolist()}
        marker = {"color": colour, "size": 5, "opacity": 0.6}
        drawn.add_trace(go.Scatter(**dots, mode="markers", marker=marker, showlegend=False, name=f"width {width}"))
        at, low, _ = vertex(curve.x, mean)
        ring = {"color": colour, "size": 13, "symbol": "circle-open", "line": {"width": 2}}
        drawn.add_trace(go.Scatter(x=[at], y=[low], mode="markers", marker=ring, showlegend=False, name="minimum"))
    drawn.update_xaxes(
        tickvals=ticks, ticktext=[f"2^{tick:g}" for tick in ticks], range=[ticks[0] - 0.3, ticks[-1] + 0.3]
    )
    drawn.update_yaxes(range=[lowest - 0.1, lowest + 1.6])
    drawn.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2}, hovermode="closest")
    plain: dict[str, Any] = json.loads(drawn.to_json())
    return plain


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
