"""The page of `python -m pretrain.sensitivity`: loss over learning rate, attention logits over updates, two tables."""

import json
import math
from html import escape
from typing import TYPE_CHECKING, Any

import webpage
from gacha import runs

if TYPE_CHECKING:
    from pretrain.sensitivity import Variant

COLOURS = (("recipe4", "band4"), ("recipe1", "band1"), ("recipe3", "band3"), ("recipe2", "band2"), ("ok", "band0"))
VARIANTS = [
    "Variant",
    "#Seeds",
    "#S",
    "#95%",
    "#Less the first's",
    "#95%",
    "#Best lr",
    "#Loss there",
    "#Less the first's",
]
VARIANTS += ["#Lost", "#Logit first", "#Ahead by"]
CELLS = ["Variant", "#lr", "#Loss", "#Over seeds", "#Lost", "#Diverged", "#Spiked", "#Largest logit", "#Update RMS"]


def draw(result: dict[str, Any], variants: "list[Variant]", source: str) -> tuple[str, dict[str, Any]]:
    """The page's body and figures."""
    drawn = {"loss": loss_figure(variants)}
    if any(pull.logits is not None for variant in variants for pull in variant.pulls.values()):
        drawn["logits"] = logit_figure(variants)
    first = result["variants"][0]
    steadiest = min(result["variants"], key=lambda row: row["sensitivity"][0])
    lrs = f"Over learning rates from {result['lrs'][0]:g} to {result['lrs'][-1]:g}"
    lead = f"{lrs} {first['name']} is on average {spoken(first['sensitivity'])} nats per token above its best."
    if steadiest is not first:
        lead += f" Least of all {steadiest['name']}: {spoken(steadiest['sensitivity'])}."
    keys = "".join(
        f"<div><dt>{escape(row['name'])}</dt><dd>{row['sensitivity'][0]:.3f}</dd>"
        f"<dd class=note>S, nats per token, {row['sensitivity'][1]:.3f} to {row['sensitivity'][2]:.3f}</dd></div>"
        for row in result["variants"]
    )
    rows = [
        [
            webpage.words(row["name"]),
            webpage.number(row["seeds"]),
            webpage.number(row["sensitivity"][0], f"{row['sensitivity'][0]:.3f}"),
            interval_cell(row["sensitivity"]),
            webpage.number(*difference(row["against_first"])),
            interval_cell(row["against_first"]),
            webpage.number(row["best_lr"], f"{row['best_lr']:g}"),
            webpage.number(row["best_loss"], f"{row['best_loss']:.4f}"),
            webpage.number(*difference(row["best_loss_against_first"])),
            webpage.number(row["lost"], f"{row['lost']} of {row['pulls']}"),
            webpage.number(row["logit_first"], f"{row['logit_first']} of {row['lost']}"),
            webpage.number(row["median_lead"], f"{row['median_lead']:g}" if row["median_lead"] else None),
        ]
        for row in result["variants"]
    ]
    cells = [
        [
            webpage.words(cell["variant"]),
            webpage.number(cell["lr"], f"{cell['lr']:g}"),
            webpage.number(cell["loss"], f"{cell['loss']:.4f}"),
            webpage.number(cell["loss_low"], f"{cell['loss_low']:.3f} to {cell['loss_high']:.3f}"),
            webpage.number(cell["lost"], webpage.bar(cell["lost"], "diverged") + f"{cell['lost']:.0%}"),
            webpage.number(cell["diverged"], f"{cell['diverged']:.0%}"),
            webpage.number(cell["spiked"], f"{cell['spiked']:.0%}"),
            webpage.number(cell["max_logit"], shown(cell["max_logit"])),
            webpage.number(cell["update_rms"], shown(cell["update_rms"])),
        ]
        for cell in result["cells"]
    ]
    loss_caption = (
        "Final validation loss over the peak learning rate, both logarithmic; the mean over seeds, and their range. "
        "A loss above that at initialization, or none, counts as that at initialization."
    )
    logit_caption = (
        "Largest attention logit by update, a line per pull. Lost are pulls that diverged, and those at more than the "
        "best learning rate that end without a fifth of what can be learned."
    )
    body = f"""<section class="hero"><p class="kicker">{escape(source)}</p><h1>Learning-rate sensitivity</h1>
<p class="lead">{escape(lead)}</p><dl class="keys">{keys}</dl></section>
<section><div class="pair">{webpage.figure("loss", drawn, "Loss over learning rate", loss_caption)}
{webpage.figure("logits", drawn, "Largest attention logit", logit_caption)}</div></section>
<section><h2>Variants</h2>{webpage.table("Variants", VARIANTS, rows)}
<p class="caption">S: mean over the learning rates of the loss less the lowest one (Wortsman et al. 2023). Intervals:
bootstrap over seeds, expanded percentiles (Hesterberg 2015). Logit first: lost pulls whose largest attention logit was
{result["times"]:g} times that of the same seed at the best learning rate before their loss left that seed's for good;
ahead by how many updates, in the median.</p></section>
<section><h2>By learning rate</h2>{webpage.table("By learning rate", CELLS, cells)}
<p class="caption">Largest logit: of the whole pull; update RMS: in units of the learning rate, at its end; both
the median of the seeds.</p></section>"""
    return body, drawn


def interval_cell(numbers: list[float] | None) -> str:
    return webpage.number(numbers[1], f"{numbers[1]:.3f} to {numbers[2]:.3f}") if numbers else webpage.number(None)


def difference(numbers: list[float] | None) -> tuple[float | None, str | None]:
    return (numbers[0], f"{numbers[0]:+.3f}") if numbers else (None, None)


def shown(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def loss_figure(variants: "list[Variant]") -> dict[str, Any]:
    """Final loss over learning rate: a line for each variant's mean, a band for the range of its seeds."""
    import plotly.graph_objects as go

    drawn = webpage.blank(460, "learning rate", "validation loss, nats per token")
    lrs = variants[0].lrs
    for number, variant in enumerate(variants):
        (colour, band), loss = COLOURS[number % len(COLOURS)], variant.curve.loss
        edge = {"x": lrs, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        drawn.add_trace(go.Scatter(**edge, y=loss.min(1).tolist()))
        drawn.add_trace(go.Scatter(**edge, y=loss.max(1).tolist(), fill="tonexty", fillcolor=webpage.C[band]))
        line = {"color": webpage.C[colour], "width": 2, "dash": "solid" if number < len(COLOURS) else "dot"}
        label = webpage.literal(variant.name, 40)
        drawn.add_trace(
            go.Scatter(x=lrs, y=loss.mean(1).tolist(), mode="lines+markers", line=line, name=label, marker={"size": 6})
        )
    drawn.update_xaxes(type="log", tickvals=lrs, ticktext=[f"{lr:g}" for lr in lrs])
    drawn.update_yaxes(type="log", dtick="D1", minor={"showgrid": False})
    drawn.update_layout(
        showlegend=True, legend={"orientation": "h", "y": -0.2, "traceorder": "normal"}, hovermode="closest"
    )
    return plain(drawn)


def logit_figure(variants: "list[Variant]") -> dict[str, Any]:
    """Largest attention logit over updates, a line per pull, coloured by what became of it."""
    import plotly.graph_objects as go

    drawn = webpage.blank(460, "update", "largest attention logit")
    named: set[str] = set()
    for variant in variants:
        for (lr, seed), pull in variant.pulls.items():
            if pull.logits is None:
                continue
            lost = variant.lost(lr, seed)
            step, value = thinned(pull.logits)
            label = "lost" if lost else "not lost"
            told = webpage.literal(f"{variant.name}, lr {lr:g}, seed {seed}", 80)
            line = {"color": webpage.C["diverged" if lost else "ok"], "width": 1}
            drawn.add_trace(
                go.Scatter(
                    x=step, y=value, mode="lines", line=line, opacity=0.7 if lost else 0.35, name=label,
                    legendgroup=label, showlegend=label not in named, hovertemplate=f"{told}<extra></extra>",
                )
            )  # fmt: skip
            named.add(label)
    drawn.update_yaxes(type="log", dtick=1)
    drawn.update_layout(
        showlegend=True, legend={"orientation": "h", "y": -0.2, "traceorder": "normal"}, hovermode="closest"
    )
    return plain(drawn)


def thinned(series: runs.Series) -> tuple[list[int], list[float | None]]:
    """About a hundred points of a series, three digits each; what is not finite, or not above 0, is a gap."""
    every = max(1, len(series.step) // 100)
    kept = [float(f"{v:.3g}") if math.isfinite(v) and v > 0 else None for v in series.value[::every].tolist()]
    return series.step[::every].tolist(), kept


def plain(drawn: Any) -> dict[str, Any]:
    """A plotly figure as plain JSON values."""
    found: dict[str, Any] = json.loads(drawn.to_json())
    return found


def spoken(numbers: list[float]) -> str:
    """`0.345 (0.312 to 0.377)`."""
    value, low, high = (f"{number:.3f}" for number in numbers)
    return f"{value} ({low} to {high})"


def told_of_logits(row: dict[str, Any]) -> str:
    """What the largest attention logit said of a variant's lost pulls, in words."""
    others = f"out of the ordinary in {row['others_left']} of {row['others']} others at more than the best rate"
    if not row["lost"]:
        return f"no pull lost; the largest attention logit {others}"
    ahead = f", by {row['median_lead']:g} updates in the median" if row["logit_first"] else ""
    first = f"{row['logit_first']} of {row['lost']} lost pulls the largest attention logit grew before the loss left"
    return f"in {first}{ahead}; {others}"
