"""The page of a pull's post-mortem (see webpage.py). Every string of a pull or a document passes `escape`."""

import json
import math
from html import escape
from typing import Any

import numpy as np

from webpage import C, blank, figure, number, table, words

MEASURES = {"max_attn_logit": "Attention logits", "grad_norm": "Gradient norm", "update_rms": "Update RMS"}
BEFORE = 128  # updates before the beginning that the curves show
MOVERS, DOCUMENTS = 40, 4  # rows of the table; documents named of a window
STYLE = """th small{display:block;font-size:12px;color:var(--muted);font-weight:400}
.window{margin:20px 0 0;padding:22px 26px}
.window{background:var(--card);border:1px solid var(--rule);border-radius:14px}
.window .at{margin:0 0 10px;color:var(--muted);font-size:13px}
.window .text{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext}
.window .text{max-height:20em;overflow:auto}
.lead+.lead{margin-top:-18px}
.maps figure+figure{margin-top:40px}
@media print{.window .text{max-height:none}.window{break-inside:avoid}}"""


def build(record: dict[str, Any]) -> tuple[str, str, dict[str, Any], str]:
    """Title, body, figures and style, for `webpage.build`; the last verdict comes first."""
    drawn: dict[str, Any] = {}
    events = list(enumerate(record["events"]))[::-1]
    body = "\n".join(section(record, event, number, drawn) for number, event in events)
    return f"{record['pull']} · llm-gacha post-mortem", body + notes(), drawn, STYLE


def section(record: dict[str, Any], event: dict[str, Any], n: int, drawn: dict[str, Any]) -> str:
    """All that is known of one verdict; its figures are added to `drawn`."""
    drawn |= figures(event, n)
    again = f", after {event['retry']} retr{'y' if event['retry'] == 1 else 'ies'}" if event["retry"] else ""
    hero = "hero" if n == len(record["events"]) - 1 else "event"
    movers = event["movers"]
    keys = [
        ("Began", f"update {event['onset_step']:,}", "by the guard, which judges the loss"),
        ("Verdict", f"update {event['step']:,}", escape(event["verdict"])),
    ]
    if movers:
        first = movers[0]
        keys.append(("First to move", f"update {first['left_step']:,}", escape(human(first["series"]))))
        keys.append(("Left their trend", f"{len(movers)}", f"of {2 + len(event['rows']) - 1} series"))
    told = "".join(
        f"<div><dt>{name}</dt><dd>{shown}</dd><dd class=note>{note}</dd></div>" for name, shown, note in keys
    )
    marks = "Lines: what moved first (dotted), where the guard dates the beginning (dashed), the verdict."
    own = "against its own median before anything moved"
    captions = {
        "logit": "Of each layer, in updates that were logged. Towards 1e4 attention collapses (Wortsman et al. 2023).",
        "update": f"Of each parameter group, {own}: the step in units of the learning rate.",
        "group": f"Of each parameter group, {own}.",
    }
    titles = {"logit": "Largest attention logit", "update": "Update RMS", "group": "Gradient norm"}
    maps = "".join(figure(f"{name}{n}", drawn, titles[name], captions[name]) for name in titles)
    return f"""<section class="{hero}"><p class="kicker">{escape(record["pull"])}{again}</p>
<h1>{headline(event)}</h1><p class="lead">{lead(event)}</p><p class="lead">{escape(event["batches"]["says"])}</p>
<dl class="keys">{told}</dl></section>
<section><h2>Around the beginning</h2><div class="pair">
{figure(f"loss{n}", drawn, "Loss", f"Nats per token in every update. {marks}")}
{figure(f"grad{n}", drawn, "Gradient norm", "In every update, before clipping.")}</div></section>
{moved(event)}
<section class="maps"><h2>Layer by layer</h2>{maps}</section>
{batches(event)}"""


def headline(event: dict[str, Any]) -> str:
    if event["batches"]["hard_step"] is not None:
        return f"A hard batch, in update <em>{event['batches']['hard_step']:,}</em>"
    if event["movers"]:
        return f"<em>{escape(human(event['movers'][0]['series']))}</em> moved first"
    return "Nothing had left its trend" if event["judged"] else "Too early to tell"


def lead(event: dict[str, Any]) -> str:
    """What moved, in which order, in a sentence or two."""
    hard = event["batches"]["hard_step"]
    movers = [
        mover for mover in event["movers"] if hard is None or mover["left_step"] >= min(hard, event["onset_step"])
    ]
    if not movers:
        if event["judged"]:
            return "No series that was recorded is outside what its own past lets expect."
        return "The pull was lost before its series had a past to be compared with."
    first = movers[0]
    also = [other for other in movers[1:] if other["left_step"] == first["left_step"]]
    what = "the level that it had when the loss was at its best" if first["drifts"] else "its trend"
    text = f"<strong>{escape(human(first['series']))}</strong> left {what} in update {first['left_step']:,}"
    lost = first["z"] == "inf"
    text += " by no longer being finite" if lost else f", from {shown(first['before'])} to {shown(first['peak'])}"
    if also:
        more = f" and {len(also) - 4} more" if len(also) > 4 else ""
        text += f"; in the same update so did {escape(', '.join(human(other['series']) for other in also[:4]))}{more}"
    ahead = first["before_loss"]
    if first["series"] != "loss" and ahead > 0:
        text += f". That is {ahead:,} updates before the loss"
    elif first["series"] == "loss":
        text += ". Nothing that was recorded moved before the loss"
    return text + "."


def moved(event: dict[str, Any]) -> str:
    """The table of who moved first."""
    rows = []
    for mover in event["movers"][:MOVERS]:
        far = mover["z"] == "inf"
        rows.append(
            [
                words(human(mover["series"]), "off its level at the loss's best" if mover["drifts"] else ""),
                number(mover["left_step"]),
                number(mover["before_loss"], f"{mover['before_loss']:+,}"),
                number(mover["before"], shown(mover["before"])),
                number(1e30 if mover["peak"] == "inf" else mover["peak"], shown(mover["peak"])),
                number(mover["peak_step"]),
                number(1e30 if far else mover["z"], "not finite" if far else f"{mover['z']:.1f}"),
            ]
        )
    if not rows:
        return ""
    heads = ["Series", "#Left its trend", "#Updates before the loss", "#Before", "#Peak", "#Peak at", "#z"]
    more = len(event["movers"]) - len(rows)
    cut = f" {more} more, later ones, are in postmortem.json." if more else ""
    note = f"z: robust standard deviations from what the series' own last 64 rows let expect.{cut}"
    return f"""<section><h2>Who moved first</h2>{table("Who moved first", heads, rows, up="Left its trend")}
<p class="caption">{note}</p></section>"""


def batches(event: dict[str, Any]) -> str:
    """How hard the batches were, and their documents."""
    found = event["batches"]
    if not found["batches"]:
        return ""
    names = list(found["batches"][0]["losses"])
    rows = [
        [
            words(f"update {row['step']:,}", "harder than its neighbours" if row["step"] == found["hard_step"] else ""),
            number(row["data_step"]),
            *(number(None) if row["losses"][name] in (None, "inf") else number(row["losses"][name]) for name in names),
        ]
        for row in found["batches"]
    ]
    heads = ["Batch", "#Data step", *(f"#Nats for {name}" for name in names)]
    by = f" Hardest first, for {escape(names[0])}." if names else ""
    texts = "".join(window(one) for one in found["windows"])
    return f"""<section><h2>The batches</h2>{table("The batches", heads, rows)}</section>
<section><h2>What was in them</h2><p class="caption">Windows as the model saw them.{by}</p>{texts}</section>"""


def window(one: dict[str, Any]) -> str:
    """One window's place, losses and text."""
    at = [f"update {one['step']:,}", f"data step {one['data_step']:,}"]
    at.append("planted by --fault" if one["window"] is None else f"window {one['window']:,} of the train split")
    for document in one["documents"][:DOCUMENTS]:
        named = f" ({document['id']})" if document["id"] else ""
        at.append(f"document {document['document']:,} of {document['shard']}{printable(named)}")
    if len(one["documents"]) > DOCUMENTS:
        at.append(f"and {len(one['documents']) - DOCUMENTS} documents more")
    at += [f"{shown(nats)} nats for {name}" for name, nats in one["losses"].items()]
    return f"""<div class="window"><p class="at">{escape(" · ".join(at))}</p>
<p class="text" dir="auto">{escape(printable(one["text"]))}</p></div>"""


def printable(text: str) -> str:
    """Text in which nothing is invisible but white space: control and format characters by their numbers."""
    return "".join(c if c.isprintable() or c in "\n\t\u3000 " else f"\\u{ord(c):04x}" for c in text)


def human(series: str) -> str:
    """`grad_norm layer 2 qkv` as a person says it."""
    measure, _, place = series.partition(" ")
    if not place:
        return {"loss": "Loss", "grad_norm": "Gradient norm"}[series]
    return f"{MEASURES[measure]} of {'the ' if 'layer' not in place else ''}{place}"


def shown(value: float | str | None) -> str:
    if value is None:
        return "–"
    return "not finite" if isinstance(value, str) else f"{value:,.4g}"


# ---- figures


def figures(event: dict[str, Any], n: int) -> dict[str, Any]:
    """Plotly figures as plain values, by name; empty ones are left out."""
    rows = event["rows"]
    named = {name: series for name, series in rows.items() if name != "step"}
    found = {f"loss{n}": curve(event, "loss", "nats per token"), f"grad{n}": curve(event, "grad_norm", "norm")}
    if len(rows["step"]) > 1:
        logits = {name.removeprefix("max_attn_logit "): s for name, s in named.items() if name.startswith("max_attn")}
        found[f"logit{n}"] = heat(event, logits, against=False)
        for short, measure in (("update", "update_rms"), ("group", "grad_norm")):
            groups = {name.removeprefix(f"{measure} "): s for name, s in named.items() if name.startswith(measure)}
            found[f"{short}{n}"] = heat(event, groups, against=True)
    return {name: json.loads(drawn.to_json()) for name, drawn in found.items() if drawn is not None}


def finite(series: list[float | str | None], cap: float = math.nan) -> np.ndarray:
    """Numbers; NaN for what was not measured, `cap` for what is not finite."""
    return np.array([math.nan if v is None else cap if v == "inf" else v for v in series], np.float64)


def mark(drawn: Any, event: dict[str, Any]) -> None:
    """Lines at what moved first, at the beginning and at the verdict."""
    first = [event["movers"][0]["left_step"]] if event["movers"] else []
    for at, colour, dash in (*((step, "ok", "dot") for step in first), (event["onset_step"], "spiked", "dash")):
        drawn.add_vline(x=at, line={"color": C[colour], "width": 1.5, "dash": dash})
    drawn.add_vline(x=event["step"], line={"color": C["diverged"], "width": 1.5})


def curve(event: dict[str, Any], name: str, unit: str) -> Any:
    """One series of every update, from some time before the beginning."""
    import plotly.graph_objects as go

    steps = np.array(event["updates"]["step"])
    if not len(steps):
        return None
    keep = steps >= min(event["onset_step"], event["movers"][0]["left_step"] if event["movers"] else math.inf) - BEFORE
    values = finite(event["updates"][name])[keep]
    drawn = blank(300, "update", unit)
    points = [None if not math.isfinite(value) or value <= 0 else value for value in values.tolist()]
    line = {"color": C["ink"], "width": 1.6}
    told = "update %{x}<br>%{y:.5g}<extra></extra>"
    marker = {"mode": "lines+markers", "marker": {"size": 3, "color": C["ink"]}}
    drawn.add_trace(go.Scatter(x=steps[keep].tolist(), y=points, line=line, hovertemplate=told, **marker))
    mark(drawn, event)
    ticks = [m * 10.0**e for e in range(-6, 9) for m in (1, 2, 3, 5, 7)]
    drawn.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return drawn


def heat(event: dict[str, Any], series: dict[str, list], against: bool) -> Any:
    """Rows of `series` over logged updates as log10, each `against` its own median before anything moved, or as is."""
    import plotly.graph_objects as go

    if not series:
        return None
    steps = np.array(event["rows"]["step"])
    values = np.array([finite(one, cap=1e30) for one in series.values()])
    began = min([event["onset_step"], *(mover["left_step"] for mover in event["movers"])])
    logs = np.log10(np.clip(values, 1e-30, 1e30))
    known = ~np.isnan(logs).all(0)
    steps, values, logs = steps[known], values[:, known], logs[:, known]
    ends: tuple[float, float]
    if against:
        before = logs[:, steps < began][:, -64:] if (steps < began).any() else logs[:, :1]
        logs = logs - np.median(before, axis=1, keepdims=True)
        ends, ticks, names = (-1.0, 1.0), [-1, 0, 1], ["÷ 10", "same", "× 10"]
        scale = [[0, C["ok"]], [0.5, C["card"]], [1, C["diverged"]]]
    else:
        ends = (min(0.0, float(np.nanmin(logs))), max(4.0, float(np.nanmin(logs)) + 1))
        ticks, names = [0, 1, 2, 3, 4], ["1", "10", "100", "1e3", "1e4"]
        scale = [[0, C["card"]], [0.5, C["spiked"]], [1, C["diverged"]]]
    text = [["not finite" if v >= 1e30 else f"{v:.4g}" for v in row] for row in values.tolist()]
    drawn = blank(max(160, 70 + 17 * len(series)), "update", "")
    drawn.add_trace(
        go.Heatmap(
            x=steps.tolist(), y=list(series), z=np.clip(logs, *ends).round(3).tolist(), zmin=ends[0], zmax=ends[1],
            colorscale=scale, customdata=text, hovertemplate="%{y}<br>update %{x}: %{customdata}<extra></extra>",
            colorbar={"tickvals": ticks, "ticktext": names, "thickness": 10, "outlinewidth": 0},
        )
    )  # fmt: skip
    drawn.update_yaxes(autorange="reversed", showgrid=False)
    mark(drawn, event)
    return drawn


def notes() -> str:
    return """<footer><h2>How to read this</h2><ul>
<li>Loss and gradient norm are of every update, all else of those that were logged (--log_every): what moved between two
rows shows in the later one.</li>
<li>The loss of an update is that of its batch before the update is applied. It is high for a hard batch, or for weights
that earlier updates have damaged; weights from before the beginning tell these two apart.</li>
<li>The numbers are in postmortem.json beside this page.</li></ul></footer>"""
