"""What became of a crawl, from the ledgers of its tasks: the funnel, the examples of every rule, duplicates, masks."""

import collections
import dataclasses
import functools
import heapq
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data import annotate, crawl, dedup, duplicates, privacy, profiles, select

HITS = 500  # rows of the table of contamination
HOSTS = 100  # rows of the table of hosts
DIFFERENCE = 600  # characters of a duplicate pair's difference


def record(job: crawl.Job) -> dict[str, Any]:
    """Everything that the W&B run and the page of a build show, as plain JSON values.

    `funnel`: documents, characters and CPU seconds after each step. `reasons`: documents and characters by why they
    were dropped. `examples`: by rule, the kept and dropped pages nearest to its threshold.
    """
    plan = annotate.read_plan(job.annotations)
    # Read again for each table: a snapshot has a ledger for each of 90,000 archives.
    read, chosen, written = (
        functools.partial(ledgers, folder)
        for folder in (job.annotations / "annotations", job.work / "decisions", job.work / "documents")
    )
    reasons: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for name, (documents, characters) in itertools.chain.from_iterable(one["reasons"].items() for one in chosen()):
        reasons[name][0] += documents
        reasons[name][1] += characters
    count = total(one["count"] for one in written())
    seconds: dict[str, float] = dict(total(one["seconds"] for one in itertools.chain(read(), chosen(), written())))
    seconds["dedup"] = seconds.get("dedup", 0.0)
    seconds["dedup"] += sum(float(path.read_text()) for path in (job.work / "seconds").iterdir())
    reasons["dedup"] = [reasons[""][0] - count["unique"], reasons[""][1] - count["unique_characters"]]
    hits = crawl.contaminated(job)
    if job.eval_sets:
        gone = list(hits.values()) if job.drop_contaminated else []
        reasons["contamination"] = [len(gone), sum(one.characters for one in gone)]
    return {
        "source": plan["source"],
        "extractor": plan["extractor"],
        "profile": profiles.describe(job.profile),
        "records": records(read()),
        "funnel": funnel(reasons, count, seconds),
        "reasons": {
            name: {"step": select.step_of(name), "documents": found[0], "characters": found[1]}
            for name, found in sorted(reasons.items(), key=lambda item: (-item[1][0], item[0]))
            if name and found[0]
        },
        "examples": examples(chosen()),
        "duplicates": twins(job),
        "masked_documents": count["masked"],
        "masks": dict(total(one["masks"] for one in written())),
        "mask_samples": [[kind, shape] for kind in privacy.KINDS for shape in samples(written(), kind)],
        "contaminated_documents": len(hits),
        "contamination": [dataclasses.asdict(hit) for one in hits.values() for hit in one.hits][:HITS],
        "hosts": hosts(chosen()),
        "files": files(read()),
    }


def samples(written: Iterator[dict[str, Any]], kind: str) -> list[str]:
    """The first masks of a kind, as their shapes."""
    return list(
        itertools.islice(itertools.chain.from_iterable(one["samples"].get(kind, []) for one in written), select.SAMPLES)
    )


def records(read: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Records of the source by type."""
    return dict(sorted(total(one["records"] for one in read).items()))


def ledgers(folder: Path) -> Iterator[dict[str, Any]]:
    """The ledgers of a stage's tasks, in order."""
    for path in sorted(folder.glob("[0-9]*.json")):
        yield json.loads(path.read_bytes())


def total(counts: Any) -> collections.Counter[str]:
    """The sum of many mappings of names to numbers."""
    result: collections.Counter[str] = collections.Counter()
    for one in counts:
        result.update(one)
    return result


def funnel(reasons: dict[str, list[int]], count: dict[str, int], seconds: dict[str, float]) -> list[dict[str, Any]]:
    """A row a step: what was left after it, and the CPU seconds that it took."""
    later = ("dedup", "contamination")  # counted again by "", which is what the thresholds kept
    documents = sum(found[0] for name, found in reasons.items() if name not in later)
    characters = sum(found[1] for name, found in reasons.items() if name not in later)
    rows: list[tuple[str, int, int | None]] = [("records", documents, None)]
    for step in ("read", "extract", "language", "quality", "dedup"):
        gone = [found for name, found in reasons.items() if name and select.step_of(name) == step]
        documents -= sum(found[0] for found in gone)
        characters -= sum(found[1] for found in gone)
        rows.append((step, documents, None if step == "read" else characters))
    rows.append(("privacy", count["documents"], count["characters"]))
    if "contamination" in reasons:
        gone = [reasons["contamination"]]
        rows.append(("contamination", count["documents"] - gone[0][0], count["characters"] - gone[0][1]))
    names = ("step", "documents", "characters")
    return [dict(zip(names, row, strict=True)) | {"seconds": round(seconds.get(row[0], 0.0), 3)} for row in rows]


def examples(chosen: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Of each rule, the NEAREST of all tasks' examples on either side of each threshold."""
    by_rule: dict[str, dict[tuple[str, float], list[Any]]] = {}
    for one in chosen:
        for rule, found in one["examples"].items():
            sides = by_rule.setdefault(rule, {})
            for side, value, threshold, name, text in found:
                near = sides.setdefault((side, threshold), [])
                near.append((abs(value - threshold), name, value, text))
                if len(near) > 100:
                    near[:] = heapq.nsmallest(select.NEAREST, near)
    return {
        rule: [
            {"side": side, "value": value, "threshold": threshold, "id": name, "text": text}
            for (side, threshold), found in sorted(sides.items())
            for _, name, value, text in heapq.nsmallest(select.NEAREST, found)
        ]
        for rule, sides in sorted(by_rule.items())
    }


def twins(job: crawl.Job) -> dict[str, Any]:
    """How many documents were near-duplicates, and the pairs nearest to the threshold with their difference."""
    verified = job.work / "verified"
    nearest = heapq.nsmallest(select.SAMPLES, dedup.pairs(verified), key=lambda pair: (pair[2], pair[:2]))
    shown = []
    for kept, dropped, jaccard in nearest:
        one, other = (read_row(job.annotations, *place) for place in (kept, dropped))
        texts = [privacy.mask(document["text"])[0] for document in (one, other)]
        difference = duplicates.difference(texts[0], texts[1], DIFFERENCE)
        shown.append(
            {"kept": one["id"], "dropped": other["id"], "jaccard": round(jaccard, 4), "difference": difference}
        )
    return {"pairs": sum(1 for _ in dedup.pairs(verified)), "examples": shown}


def read_row(folder: Path, rank: int, row: int) -> dict[str, str]:
    """The id and the text of one annotated row."""
    import pyarrow.parquet as pq

    path = folder / "annotations" / f"{rank:05d}.parquet"
    text = next(text for _, text in select.texts(path, [row]))
    name = pq.read_table(path, columns=["id"])["id"][row].as_py()
    return {"id": name, "text": text}


def hosts(chosen: Iterable[dict[str, Any]]) -> list[list[Any]]:
    """[host, pages read, pages kept before duplicates] of the largest hosts."""
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for one in chosen:
        for host, (seen, kept) in one["hosts"].items():
            found[host][0] += seen
            found[host][1] += kept
    largest = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))[:HOSTS]
    return [[host, *counts] for host, counts in largest]


def files(read: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By file, its records by type and what was damaged: the ledger of the archive."""
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for one in read:
        found[one["name"]].update(one["records"])
    return {name: dict(counts) for name, counts in sorted(found.items())}


def tables(found: dict[str, Any]) -> Iterator[tuple[str, list[str | int], list[list[Any]]]]:
    """`record` as W&B tables: name, columns, rows."""
    yield "funnel", ["step", "documents", "characters", "cpu_seconds"], [list(row.values()) for row in found["funnel"]]
    reasons = [[name, *row.values()] for name, row in found["reasons"].items()]
    yield "reasons", ["reason", "step", "documents", "characters"], reasons
    for rule, rows in found["examples"].items():
        columns: list[str | int] = ["side", "value", "threshold", "id", "text"]
        yield f"rule/{rule}", columns, [[row[str(name)] for name in columns] for row in rows]
    columns = ["kept", "dropped", "jaccard", "difference"]
    yield "duplicates", columns, [[row[str(name)] for name in columns] for row in found["duplicates"]["examples"]]
    yield "masks", ["kind", "shape"], found["mask_samples"]
    yield "hosts", ["host", "pages", "kept"], found["hosts"]
    if found["contamination"]:
        columns = list(found["contamination"][0])
        yield "contamination", columns, [[row[str(name)] for name in columns] for row in found["contamination"]]
