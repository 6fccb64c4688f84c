"""The page of a build, document by document: what lies at every rule's threshold, duplicates, masks, contamination.

Every string of a document, its address or a profile passes `escape`.
"""

import math
from html import escape
from typing import Any

from webpage import number, share, table

BOUNDS = {"min": "≥", "max": "≤", "below": "<"}
SIDES = ("dropped", "kept")


def rules(record: dict[str, Any], n: int) -> str:
    """The profile's rules with what each dropped, and the pages on either side of every threshold."""
    if not record["profile"]["rules"]:
        return ""
    judged = next(row["documents"] for row in record["funnel"] if row["step"] == "language")
    rows, shown = [], []
    for order, (name, limits) in enumerate(record["profile"]["rules"].items(), start=1):
        gone = record["reasons"].get(name, {"documents": 0})["documents"]
        near = {(side, kind): nearest(record, name, limits[kind], side) for side in SIDES for kind in limits}
        firsts = [[near[side, kind][0]["value"] for kind in limits if near[side, kind]] for side in SIDES]
        link = f'<th scope=row data-v="{escape(name)}"><a href="#rule{n}-{order}">{escape(name)}</a></th>'
        counts = [number(gone), number(share(gone, judged), f"{share(gone, judged):.1%}")]
        edges = [number(found[0] if found else None, ", ".join(f"{one:.4g}" for one in found)) for found in firsts]
        bound = number(next(iter(limits.values())), escape(rule_text(limits)))
        rows.append([link, bound, *counts, *edges, number(order)])
        shown.append((gone, rule_examples(f"rule{n}-{order}", name, limits, near, gone)))
    shown.sort(key=lambda pair: -pair[0])
    heads = ["Rule", "#Keeps", "#Dropped", f"#of {judged:,} judged", "#Nearest dropped", "#Nearest kept", "#Tried"]
    return f"""<h2>The rules and their thresholds</h2>{table("Rules", heads, rows, up="Tried")}
<p class="caption">Rules are tried in this order, and a page counts for the first that rejects it: one that a loosened
rule lets pass may still fall to a later one. Below, by rule, the pages nearest to its threshold on either side: good
text among the dropped asks for a looser threshold, bad text among the kept for a tighter one. What another one keeps in
all, <code>python -m data filter</code> counts in seconds over the folder of <code>--annotations</code>.</p>
{"".join(block for _, block in shown)}"""


def nearest(record: dict[str, Any], name: str, limit: float, side: str) -> list[dict[str, Any]]:
    """A rule's examples on one side of a threshold, the nearest first."""
    found = [one for one in record["examples"].get(name, []) if (one["side"], one["threshold"]) == (side, limit)]
    return sorted(found, key=lambda one: abs(one["value"] - limit))


def rule_examples(anchor: str, name: str, limits: dict[str, float], near: dict[Any, Any], gone: int) -> str:
    """One rule, folded: dropped and kept side by side, and how to try another threshold."""
    blocks = []
    for kind, limit in limits.items():
        columns, hint = [], ""
        for side in SIDES:
            listed = "".join(
                f"<li><p class=at><b>{one['value']:.4g}</b> {escape(str(one['id']))}</p>"
                f'<blockquote lang="ja">{one_line(one["text"])}</blockquote></li>'
                for one in near[side, kind]
            )
            shown = f"<ol>{listed}</ol>" if listed else "<p class=caption>none</p>"
            columns.append(f'<div class="{side}"><h3>{side}</h3>{shown}</div>')
        if found := near["dropped", kind]:
            freed = outward(found[-1]["value"], kind)
            flag = f"--{escape(name)}.{kind} {freed}"
            hint = f"<p class=caption>With <code>{flag}</code> this rule lets the {len(found)} shown pass.</p>"
        title = f"<h3>{escape(name)} {escape(rule_text({kind: limit}))}</h3>" if len(limits) > 1 else ""
        blocks.append(f"{title}<div class=sides>{''.join(columns)}</div>{hint}")
    summary = f"<b>{escape(name)}</b> {escape(rule_text(limits))}<span>{gone:,} dropped</span>"
    return f'<details id="{anchor}"><summary>{summary}</summary>{"".join(blocks)}</details>'


def outward(value: float, kind: str) -> str:
    """`value` in four digits, rounded so that a bound of `kind` there lets it pass."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 3)
    whole = math.floor(value / step) if kind == "min" else math.ceil(value / step) + (kind == "below")
    return f"{whole * step:.6g}"


def duplicates(record: dict[str, Any]) -> str:
    """The pairs nearest to the threshold, with their difference."""
    found = record["duplicates"]
    if not found["pairs"]:
        return ""
    shown = []
    for pair in found["examples"]:
        lines = "".join(
            f"<{tag}>{escape(line)}</{tag}>"
            for line in pair["difference"].split("\n")
            for tag in [{"-": "del", "+": "ins"}.get(line[:1], "span")]
        )
        shown.append(
            f"<details><summary><b>{pair['jaccard']:.3f}</b> {escape(str(pair['dropped']))} "
            f"<span>of {escape(str(pair['kept']))}</span></summary>"
            f'<div class=difference lang="ja">{lines or "<span>the same text</span>"}</div></details>'
        )
    at = record["profile"]["dedup"]["jaccard"]
    least = f"at a Jaccard index of {at:g} or more" if at else "by a shared band, without an exact check"
    return f"""<h2>Near-duplicates</h2><p class="lead">{found["pairs"]:,} were dropped as copies of one kept, {least}.
Nearest to the threshold first:</p>
{"".join(shown)}
<p class="caption">In front: the Jaccard index of their character n-grams. <del>− only in the one kept</del>,
<ins>+ only in the one dropped</ins>, … the same in both.</p>"""


def masks(record: dict[str, Any]) -> str:
    """Personal data by kind, and the shapes of what was masked."""
    if not record["masks"]:
        return ""
    shapes: dict[str, list[str]] = {kind: [] for kind in record["masks"]}
    for kind, shape in record["mask_samples"]:
        shapes.setdefault(kind, []).append(escape(shape).replace("【", "<mark>【").replace("】", "】</mark>"))
    shown = "".join(
        f"<details><summary><b>{escape(kind)}</b><span>{record['masks'].get(kind, 0):,} masked</span></summary>"
        f'<ul class=shapes lang="ja">{"".join(f"<li>{shape}</li>" for shape in of_kind)}</ul></details>'
        for kind, of_kind in sorted(shapes.items(), key=lambda item: -record["masks"].get(item[0], 0))
    )
    return f"""<h2>Personal data</h2><p class="lead">Masked: {sum(record["masks"].values()):,}, in
{record["masked_documents"]:,} of {record["funnel"][-1]["documents"]:,} documents.</p>{shown}
<p class="caption">What was masked stands in 【】 as its shape, 9 for a digit and x for a letter.</p>"""


def contamination(record: dict[str, Any]) -> str:
    """Documents that hold an item of the evaluation sets."""
    hits = record["contamination"]
    if not any(row["step"] == "contamination" for row in record["funnel"]):
        return ""
    gone = record["reasons"].get("contamination", {"documents": 0})["documents"]
    lead = f"Documents that hold an evaluation item: {record['contaminated_documents']:,}; dropped for it: {gone:,}."
    shown = ""
    if hits:
        numbers = {key for key, value in hits[0].items() if isinstance(value, int | float)}
        heads = [f"{'#' * (key in numbers)}{key.replace('_', ' ')}" for key in hits[0]]
        rows = [
            [
                number(value, f"{value:.3g}")
                if key in numbers
                else f"<td{' class=text' * key.startswith('excerpt')}>{escape(str(value))}</td>"
                for key, value in hit.items()
            ]
            for hit in hits
        ]
        shown = table("Contamination", heads, rows)
    return f"<h2>Contamination</h2><p class=lead>{lead}</p>{shown}"


def rule_text(limits: dict[str, float]) -> str:
    """The bounds as signs, plain text: ≥ 20, ≤ 90."""
    return ", ".join(f"{BOUNDS[kind]} {limit:g}" for kind, limit in limits.items())


def one_line(text: str) -> str:
    """`text`, escaped, with a sign for every line end: menus take no screen each."""
    return escape(text).replace("\n", "<i> ⏎ </i>")
