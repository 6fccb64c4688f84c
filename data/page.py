"""The page of a build as one HTML file (see webpage.py): what was kept, what was dropped and why, example by example.

Every string of a document, its address or a profile passes `escape`. The funnel's numbers are those of data/funnel.py.
"""

import collections
from html import escape
from pathlib import Path
from typing import Any

import webpage
from data import examples
from webpage import NONE, bar, duration, figure, number, share, si, table, words

HERE = Path(__file__).parent
COLOURS = {  # of the step that drops a page; names of webpage.PALETTE
    "read": "crashed",
    "extract": "recipe4",
    "language": "recipe3",
    "quality": "stopped",
    "dedup": "recipe1",
    "contamination": "diverged",
}
REASONS = {
    "http_status": "the server answered something else than 200",
    "not_html": "an image, a PDF or other data",
    "empty": "no body",
    "too_large": "above the limit of one page",
    "bad_http": "no HTTP answer that can be read",
    "bad_encoding": "compressed or chunked, and broken",
    "cut_short": "the file ends inside it",
    "damaged": "the file is broken here",
    "no_text": "no main text",
    "too_complex": "its markup would take the parser seconds",
    "language": "not in the profile's language",
    "host": "a blocked host",
    "tld": "not an allowed top-level domain",
    "dedup": "a near-duplicate of a page kept",
    "contamination": "holds an item of an evaluation set",
}
FILES = 200
"""Rows of the table of files."""


def build(records: list[dict[str, Any]], manifest: dict[str, Any], result: dict[str, Any]) -> str:
    """The page's HTML.

    records: `funnel.record` of each part that went through a profile, maybe none; manifest: the shards folder's;
    result: `build.summary`.
    """
    drawn: dict[str, Any] = {}
    parts = [part(record, n, len(records) > 1, manifest, drawn) for n, record in enumerate(records)]
    body = [hero(records, manifest, result), mix(manifest), *parts, shards(manifest, result), config(manifest)]
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return webpage.build(f"{source_of(records, manifest)} · llm-gacha data", "\n".join(body), drawn, style)


def source_of(records: list[dict[str, Any]], manifest: dict[str, Any]) -> str:
    """What was built from."""
    return manifest["source"] or " + ".join(part["source"] for part in manifest.get("mix", records))


def noun(records: list[dict[str, Any]]) -> str:
    """What the documents of these sources are called."""
    return "pages" if all(record["source"].startswith(("warc:", "wet:")) for record in records) else "documents"


def hero(records: list[dict[str, Any]], manifest: dict[str, Any], result: dict[str, Any]) -> str:
    """The answer first: how much was kept, what it is in tokens, what it cost, and what took the rest."""
    tokens = f"{compact(result['tokens'])} tokens"
    splits = manifest["splits"].values()
    told = f"{escape(source_of(records, manifest))} — "
    profiles = dict.fromkeys(f"profile {escape(record['profile']['name'])}" for record in records)
    told += ", ".join(profiles) or "every document as it is"
    told += f" — build <code>{escape(result['fingerprint'])}</code>"
    bpb = result["baseline_bpb"]
    keys = [
        ("Tokens", compact(result["tokens"]), f"{result['bytes_per_token']:.2f} bytes each, <s> and </s> counted"),
        ("5-gram baseline", f"{bpb:.4f}" if bpb else NONE, "bits per UTF-8 byte of the validation split, Kneser–Ney"),
    ]
    if not records:
        characters = compact(sum(split["characters"] for split in splits))
        head = f"<em>{result['documents']:,}</em> documents in shards"
        lead = f"<strong>{characters} characters, {tokens}</strong>; no profile, so that nothing was dropped."
        keys.insert(0, ("Text", characters, f"characters, {result['bytes']:,} bytes of UTF-8"))
        keys.append(("Time", duration(result["seconds"]), "from the first document to the last shard"))
    else:
        word = noun(records)
        read, kept = (sum(record["funnel"][at]["documents"] for record in records) for at in (0, -1))
        characters = sum(record["funnel"][-1]["characters"] for record in records)
        seconds = sum(row["seconds"] for record in records for row in record["funnel"])
        head = f"<em>{kept:,}</em> of {read:,} {word} kept"
        lead = f"<strong>{compact(characters)} characters, {tokens}</strong>"
        if manifest.get("mix"):
            lead += f" with all parts of the mix, {result['documents']:,} documents with their repeats"
        rate = ""
        if seconds > 0:
            hourly = [compact(n * 3600 / seconds) for n in (kept, characters)]
            lead += f"; {hourly[0]} {word} or {hourly[1]} characters kept per CPU-hour"
            rate = f"{read / seconds:,.0f} {word} a second and core; tokenizer and shards not counted"
        gone: collections.Counter[str] = collections.Counter()
        for record in records:
            gone.update({name: found["documents"] for name, found in record["reasons"].items()})
        largest = ", ".join(f"<code>{escape(name)}</code> ({n:,})" for name, n in gone.most_common(3))
        lead += f". Most of the rest went by {largest}." if largest else "."
        keys.insert(0, ("Kept", f"{share(kept, read):.1%}", f"of {read:,} {word}; {compact(characters)} characters"))
        keys.insert(1, ("CPU time", duration(seconds), rate))
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{n}</dd><dd class=note>{escape(note)}</dd></div>" for name, n, note in keys
    )
    return f"""<section class="hero"><p class="kicker">{told}</p>
<h1>{head}</h1><p class="lead">{lead}</p><dl class="keys">{shown}</dl></section>"""


def part(record: dict[str, Any], n: int, several: bool, manifest: dict[str, Any], drawn: dict[str, Any]) -> str:
    """All that is known of one source that went through a profile; its figures are added to `drawn`."""
    drawn |= {f"funnel{n}": funnel_figure(record), f"reasons{n}": reasons_figure(record)}
    title = f"<h2 class=part>{escape(record['source'])}</h2>" if several else ""
    profile = record["profile"]
    settled = [
        ("profile", f"<b>{escape(profile['name'])}</b> {escape(profile['about'])}"),
        ("text by", f"<code>{escape(record['extractor'])}</code>"),
    ]
    keys = ("language", "tlds", "hosts", "words", "edits", "privacy", "dedup")
    settled += [(key, listed(profile[key])) for key in keys]
    sections = [
        title + funnel(record, n, drawn, {} if several or manifest.get("mix") else manifest["splits"]),
        dropped(record, n, drawn),
        examples.rules(record, n),
        examples.duplicates(record),
        examples.masks(record),
        examples.contamination(record),
        hosts(record),
        files(record),
        f"<h2>Profile</h2>{facts(settled)}",
    ]
    return "\n".join(f"<section>{section}</section>" for section in sections if section)


def funnel(record: dict[str, Any], n: int, drawn: dict[str, Any], splits: dict[str, Any]) -> str:
    """What was left after each step; `splits` of a build that is this source alone."""
    steps = [*record["funnel"]]
    if splits:
        counts = {key: sum(split[key] for split in splits.values()) for key in ("documents", "characters")}
        steps.append({"step": "shards", **counts, "seconds": None})
    seconds, first = sum(row["seconds"] for row in record["funnel"]), steps[0]["documents"]
    before, rows = 0, list[list[str]]()
    for row in steps:
        left = row["documents"]
        gone = before - left if rows else 0
        rows.append(
            [
                words(row["step"]),
                number(left, f"{bar(share(left, first), 'ok')}{left:,}"),
                number(gone or None, f"−{gone:,}"),
                number(share(gone, before) if gone else None, f"{share(gone, before):.1%}"),
                number(row["characters"]),
                number(row["seconds"] or None, f"{row['seconds'] or 0:,.2f}"),
                number(share(row["seconds"] or 0, seconds) or None, f"{share(row['seconds'] or 0, seconds):.0%}"),
            ]
        )
        before = left
    heads = ["After the step", "#Documents", "#Dropped", "#of those before", "#Characters", "#CPU s", "#Share of CPU"]
    caption = (
        "Blue: left after the step; in colour: dropped by it. Read: HTML or text that can be read; extract: with a "
        "main text; quality: past the profile's rules. CPU time is the sum over all processes."
    )
    return f"""<h2>The funnel</h2>{figure(f"funnel{n}", drawn, "Documents after each step", caption)}
{table("Funnel", heads, rows)}"""


def funnel_figure(record: dict[str, Any]) -> Any:
    """A bar a step: what is left after it, and what it dropped."""
    rows = record["funnel"]
    left = [row["documents"] for row in rows]
    gone = [max(0, was - now) for was, now in zip([left[0], *left], left, strict=False)]
    told = [
        f"<b>{webpage.literal(row['step'])}</b><br>{row['documents']:,} documents, {n:,} dropped<br>"
        + ("" if row["characters"] is None else f"{row['characters']:,} characters<br>")
        + f"{row['seconds']:,.2f} CPU s"
        for row, n in zip(rows, gone, strict=True)
    ]
    blue = ["ok"] * len(rows)
    return webpage.bars(
        "documents",
        [row["step"] for row in rows],
        told,
        [(left, blue, 1.0), (gone, [of_step(row["step"]) for row in rows], 0.55)],
    )


def reasons_figure(record: dict[str, Any]) -> Any:
    """A bar a reason, coloured by its step."""
    found = record["reasons"]
    told = [
        f"<b>{webpage.literal(name, 60)}</b><br>{one['documents']:,} documents<br>{one['characters']:,} characters"
        for name, one in found.items()
    ]
    counts, colours = ([one["documents"] for one in found.values()], [of_step(one["step"]) for one in found.values()])
    return webpage.bars("documents", list(found), told, [(counts, colours, 1.0)])


def dropped(record: dict[str, Any], n: int, drawn: dict[str, Any]) -> str:
    """Why pages went, largest reason first."""
    gone = sum(found["documents"] for found in record["reasons"].values())
    rows = [
        [
            words(name, REASONS.get(name) or examples.rule_text(record["profile"]["rules"].get(name, {}))),
            number(found["documents"]),
            number(share(found["documents"], gone), f"{share(found['documents'], gone):.1%}"),
            f'<td data-v="{escape(found["step"])}"><i class=dot style="background:var(--{of_step(found["step"])})"></i>'
            f"{escape(found['step'])}</td>",
            number(found["characters"]),
        ]
        for name, found in record["reasons"].items()
    ]
    if not rows:
        return ""
    caption = "Coloured by the step that dropped them. A page counts for the first reason that it meets."
    heads = ["Reason", "#Documents", "#of all dropped", "Step", "#Characters"]
    return f"""<h2>Why they were dropped</h2>{figure(f"reasons{n}", drawn, f"{gone:,} dropped, by reason", caption)}
{table("Reasons", heads, rows, down="Documents")}"""


def hosts(record: dict[str, Any]) -> str:
    """The largest hosts and what was kept of them, before duplicates."""
    rows = []
    for name, read, kept in record["hosts"]:
        of = share(kept, read)
        rows.append([words(name or "(none)"), number(read), number(kept), number(of, f"{bar(of, 'ok')}{of:.0%}")])
    if not any(name for name, *_ in record["hosts"]):
        return ""
    return f"""<h2>Hosts</h2>{table("Hosts", ["Host", "#Pages read", "#Kept", "#Share"], rows, down="Pages read")}
<p class="caption">The {len(rows)} largest; kept is counted before near-duplicates.</p>"""


def files(record: dict[str, Any]) -> str:
    """Records by type and what could not be read, file by file; the damaged ones first."""
    found = sorted(record["files"].items(), key=lambda item: (-item[1].get("unreadable", 0), item[0]))
    if not found:
        return ""
    kinds = [name for name in record["records"] if name not in ("records", "unreadable")]
    rows = []
    for name, counts in found[:FILES]:
        bad = counts.get("unreadable")
        cells = [number(counts.get("records", 0)), number(bad, f"<b class=damage>{bad}</b>")]
        rows.append([words(name), *cells, *(number(counts.get(kind)) for kind in kinds)])
    heads = ["File", "#Records", "#Unreadable", *(f"#{kind}" for kind in kinds)]
    bad = sum("unreadable" in counts for _, counts in found)
    told = f"{bad:,} of {len(found):,} damaged" if bad else f"{len(found):,}, none damaged"
    cut = f"<p class=caption>The first {FILES}; all are in funnel.json.</p>" if len(found) > FILES else ""
    return f"<h2>Files: {told}</h2>{table('Files', heads, rows, down='Unreadable')}{cut}"


def mix(manifest: dict[str, Any]) -> str:
    """The parts of a mix and how often each went in."""
    parts = manifest.get("mix")
    if not parts:
        return ""
    total = sum(one["repeats"] * one["train_bytes"] for one in parts)
    rows = []
    for one in parts:
        of = share(one["repeats"] * one["train_bytes"], total)
        counts = [number(one["documents"]), number(one["train_bytes"]), number(one["repeats"], f"{one['repeats']:.3g}")]
        rows.append([words(one["source"]), *counts, number(of, f"{bar(of, 'ok')}{of:.1%}")])
    heads = ["Source", "#Documents", "#Training bytes, once", "#Epochs", "#Share of the mix"]
    return f"<section><h2>The mix</h2>{table('Mix', heads, rows)}</section>"


def shards(manifest: dict[str, Any], result: dict[str, Any]) -> str:
    """The tokenizer and the shards by split."""
    made, base = manifest["tokenizer"], manifest["baseline"]
    rows = [
        [
            words(name),
            *(number(split[key]) for key in ("documents", "characters", "bytes", "tokens")),
            number(split["bytes"] / split["tokens"], f"{split['bytes'] / split['tokens']:.3f}"),
            number(len(split["shards"])),
        ]
        for name, split in manifest["splits"].items()
    ]
    heads = ["Split", "#Documents", "#Characters", "#Bytes", "#Tokens", "#Bytes per token", "#Files"]
    told = [
        ("tokenizer", f"{escape(made['model_type'])}, {made['vocab_size']:,} pieces"),
        ("its sha256", f"<code>{escape(made['sha256'])}</code>"),
        ("bytes per token", f"{manifest['bytes_per_token']:.4f}"),
        ("5-gram", f"{base['val_bpb']:.4f} bits per byte, fitted on {base['train_tokens']:,} tokens" if base else ""),
        ("blank, left out", f"{result['skipped_blank']:,}"),
        ("fingerprint", f"<code>{escape(manifest['fingerprint'])}</code>"),
    ]
    return f"<section><h2>Tokenizer and shards</h2>{table('Splits', heads, rows)}{facts(told)}</section>"


def facts(told: list[tuple[str, str]]) -> str:
    """Names and what they are (HTML), one a line; empty ones left out."""
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in told if value)
    return f"<dl class=facts>{listed}</dl>"


def config(manifest: dict[str, Any]) -> str:
    """All that decides what the build holds, and where its numbers are."""
    # Profiles have a section of their own.
    told = [(escape(key), listed(value)) for key, value in manifest["config"].items() if key not in ("profiles", "mix")]
    return f"""<footer><h2>How to make it again</h2>{facts(told)}
<p>The numbers of this page are in funnel.json and manifest.json of the shards folder. Texts are shown with their
personal data masked.</p></footer>"""


def listed(value: Any) -> str:
    """A setting on one line, escaped; nothing set gives an empty string."""
    if isinstance(value, dict):
        return ", ".join(f"{escape(str(key))} {escape(str(item))}" for key, item in value.items())
    return (
        ", ".join(escape(str(item)) for item in value)
        if isinstance(value, list)
        else escape("" if value is None else str(value))
    )


def of_step(step: str) -> str:
    """The palette's name for a step."""
    return COLOURS.get(step, "running")


def compact(n: float) -> str:
    """Three digits and an SI prefix, as a number alone: 4 M."""
    return si(n).strip()
