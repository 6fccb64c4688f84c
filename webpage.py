"""What every page that we write shares: one HTML file, everything inlined, nothing requested, readable without
JavaScript, safe to print; the palette of both themes; plotly, packed; figures and numbers in one style.

A content security policy forbids the network and all scripts but ours. Text from outside is escaped by who puts it in.
"""

import base64
import gzip
import hashlib
import json
import math
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PALETTE = {
    # name: (light, dark); blue, green, purple, ochre and vermilion keep apart for colour-blind readers
    "paper": ("#fbfaf7", "#15171c"),
    "card": ("#ffffff", "#1c1f26"),
    "ink": ("#20242c", "#e9e7e2"),
    "muted": ("#6a6f79", "#9aa0ab"),
    "rule": ("#e4e1da", "#30343d"),
    "grid": ("#efece6", "#262a32"),
    "ok": ("#1f6fa8", "#62b3ea"),
    "spiked": ("#b57a00", "#eab54a"),
    "diverged": ("#cc4a1c", "#ff8e63"),
    "stopped": ("#7a6aa6", "#b3a4de"),
    "crashed": ("#5d636e", "#a3a9b5"),
    "running": ("#0d8a78", "#4bc7b1"),
    "recipe1": ("#11806b", "#46c0a6"),
    "recipe2": ("#8b5c9f", "#c79bd9"),
    "recipe3": ("#946f00", "#dcb145"),
    "recipe4": ("#4d5b7c", "#9fb0d6"),
    "band0": ("rgba(31,111,168,0.14)", "rgba(98,179,234,0.18)"),
    "band1": ("rgba(17,128,107,0.14)", "rgba(70,192,166,0.18)"),
    "band2": ("rgba(139,92,159,0.14)", "rgba(199,155,217,0.18)"),
    "band3": ("rgba(148,111,0,0.14)", "rgba(220,177,69,0.18)"),
    "band4": ("rgba(77,91,124,0.14)", "rgba(159,176,214,0.18)"),
}
C = {name: light for name, (light, _) in PALETTE.items()}
FONT = "system-ui, -apple-system, 'Segoe UI', 'Hiragino Sans', 'Noto Sans CJK JP', sans-serif"
NONE = '<span class="none">–</span>'


def build(title: str, body: str, drawn: dict[str, Any], style: str = "", script: str = "") -> str:
    """The page's HTML: `body` (HTML) under the house's header. `title` is plain text.

    drawn: plotly figures as plain JSON values, by the names that `figure` gave them a place for. style and script are
    added to those of every page.
    """
    import plotly

    bundle = (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    style = theme_css() + (HERE / "webpage.css").read_text(encoding="utf-8") + style
    script = (HERE / "webpage.js").read_text(encoding="utf-8") + script
    packed = base64.b64encode(gzip.compress(bundle.encode(), 9, mtime=0)).decode()
    allowed = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" for code in (script, bundle)
    )
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {allowed}"
    data = {"figures": drawn, "dark": dict(PALETTE.values())}
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
<noscript><style>.plot{{min-height:0!important}}</style></noscript>
</head>
<body>
{(HERE / "webpage.svg").read_text(encoding="utf-8")}
<header class="top"><p class="brand">{icon("ok")}<span>llm-gacha</span></p>
<button type="button" id="theme" hidden>Dark</button></header>
<main>
{body}
</main>
<script type="application/json" id="data">{for_script(data)}</script>
<script type="text/plain" id="plotly">{packed}</script>
<script>{script}</script>
</body>
</html>
"""


def for_script(value: Any) -> str:
    """JSON that no content can break out of a script element with."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def theme_css() -> str:
    """The palette as CSS variables: light, dark by the reader's system, and either one by choice."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in PALETTE.items()) for i in (0, 1))
    return (
        f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{{dark}}}}}\n"
    )


def figure(name: str, drawn: dict[str, Any], title: str, caption: str) -> str:
    """A figure's place, its height kept before the script fills it; empty when it was not drawn."""
    if name not in drawn:
        return ""
    height = drawn[name]["layout"]["height"]
    return f"""<figure><h3>{title}</h3><div class="plot" data-figure="{name}" style="min-height:{height}px">
<noscript>Figures need JavaScript; their numbers are in the tables and in the JSON beside this page.</noscript></div>
<figcaption>{caption}</figcaption></figure>"""


def icon(status: str) -> str:
    """The status's capsule, decorative: the word always stands beside it."""
    return f'<svg class="capsule" aria-hidden="true" viewBox="0 0 32 32"><use href="#c-{status}"/></svg>'


def blank(height: int, x_title: str, y_title: str) -> Any:
    """An empty figure in the page's style."""
    import plotly.graph_objects as go

    axis = {"gridcolor": C["grid"], "zeroline": False, "linecolor": C["rule"], "automargin": True, "ticks": ""}
    axis |= {"title": {"font": {"size": 12, "color": C["muted"]}, "standoff": 10}}
    label = {"bgcolor": C["card"], "bordercolor": C["rule"], "font": {"family": FONT, "size": 12, "color": C["ink"]}}
    template = go.layout.Template(
        layout={
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": FONT, "size": 12, "color": C["muted"]},
            "xaxis": axis | {"showgrid": False, "showline": True},
            "yaxis": axis,
            "hoverlabel": label | {"align": "left"},
            "showlegend": False,
            "margin": {"l": 8, "r": 16, "t": 14, "b": 8},
            "dragmode": False,
        }
    )
    figure = go.Figure(layout={"template": template, "height": height})
    figure.update_xaxes(title_text=x_title, fixedrange=True)
    figure.update_yaxes(title_text=y_title, fixedrange=True)
    return figure


def bars(x_title: str, names: list[str], told: list[str], stacks: list[tuple[list[int], list[str], float]]) -> Any:
    """Stacked horizontal bars, the first name on top; a stack is counts, colours of the palette, and opacity.

    `told` is what each bar says under the pointer, in plotly's pseudo-HTML: see `literal`.
    """
    import plotly.graph_objects as go

    drawn = blank(60 + 28 * len(names), x_title, "")
    for counts, colours, opacity in stacks:
        drawn.add_trace(
            go.Bar(
                x=counts, y=list(range(len(names))), orientation="h", customdata=told,
                hovertemplate="%{customdata}<extra></extra>", textposition="auto",
                text=[f"{n:,}" if n and opacity == 1 else "" for n in counts], insidetextanchor="end", cliponaxis=False,
                marker={"color": [C[colour] for colour in colours], "opacity": opacity},
            )
        )  # fmt: skip
    labels = [literal(name, 28) for name in names]
    drawn.update_layout(barmode="stack", bargap=0.28, hovermode="closest")
    drawn.update_yaxes(autorange="reversed", showgrid=False, tickvals=list(range(len(names))), ticktext=labels)
    drawn.update_xaxes(showgrid=True, gridcolor=C["grid"], tickformat="~s", showline=False)
    return json.loads(drawn.to_json())


def literal(text: str, limit: int = 24) -> str:
    """Text that plotly draws as it stands, cut to `limit`: its labels know tags, links among them."""
    return escape(text[:limit])


def si(value: float) -> str:
    """Three digits and an SI prefix: 4.00M; nothing known gives an empty string."""
    if not math.isfinite(value):
        return ""
    for power, prefix in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if not math.isfinite(seconds):
        return ""
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"


def table(label: str, heads: list[str], rows: list[list[str]], down: str = "", up: str = "") -> str:
    """A table that scrolls; `heads` that begin with # are of numbers, `rows` hold cells (`number`, `words`).

    Its headings sort if the column is named that it is sorted by: `down` from the largest, `up` from the smallest.
    """
    cells = []
    for head in heads:
        name = head.removeprefix("#")
        kind = " class=number" if name != head else ""
        order = "descending" if name == down else "ascending" if name == up else "none"
        shown = f'<button type="button">{escape(name)}</button>' if down or up else escape(name)
        cells.append(f"<th scope=col{kind}{f' aria-sort={order}' if down or up else ''}>{shown}</th>")
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    tall = " tall" if len(rows) > 16 else ""
    return f"""<div class="scroll{tall}" role="region" aria-label="{escape(label)}" tabindex="0"><table>
<thead><tr>{"".join(cells)}</tr></thead><tbody>{body}</tbody></table></div>"""


def number(value: float | None, shown: str | None = None) -> str:
    """A cell of a number; None is not known, or nothing."""
    if value is None:
        return f'<td class="number" data-v="">{NONE}</td>'
    return f'<td class="number" data-v="{value}">{f"{value:,}" if shown is None else shown}</td>'


def words(text: str, note: str = "") -> str:
    """The cell of a row's name (plain text), with a note under it."""
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<th scope="row" data-v="{escape(text)}">{escape(text)}{small}</th>'


def bar(part: float, colour: str) -> str:
    """A share of 1 as a small bar in a colour of the palette."""
    inner = f'<i style="width:{part * 100:.1f}%"></i>'
    return f'<span class="bar" aria-hidden="true" style="--s:var(--{colour})">{inner}</span>'


def share(some: float, of: float) -> float:
    """A part of a whole, 0 of nothing."""
    return some / of if of else 0.0
