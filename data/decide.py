"""`python -m data decide`: one JSON line a document, what the pipeline would do with it and why."""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import console
from data.progress import say


@dataclass(frozen=True)
class DecideConfig:
    """What a profile would do with every document of a source."""

    source: str
    """warc:GLOB, wet:GLOB, or any other source of `data build`."""
    profile: str = "auto"
    """A bundled profile or a YAML file; auto: domain for web archives, none (keep all) for other sources."""
    thresholds: tuple[str, ...] = ()
    """Changes to the profile, such as max_sentence_length.max=250; also spelled --max_sentence_length.max 250."""
    annotations: Path | None = None
    """Keep every statistic in this folder, or take them from it if it was made from the same source."""
    documents: int = 20_000
    """Documents that `inquiries` generates."""
    seed: int = 0
    """Seed of `inquiries`."""
    max_documents: int = 0
    """Stop reading the source after this many records; 0: read all."""
    text_key: str = "text"
    """Key or column of the text (jsonl, parquet, hf)."""
    id_key: str = "id"
    """Key or column of the document's name (jsonl, parquet, hf)."""
    workers: int = 0
    """Processes; 0: one a core."""


def main(argv: list[str]) -> int:
    """`python -m data decide`: the decisions on stdout, progress on stderr."""
    from data import crawl, profiles

    config = console.parse(DecideConfig, profiles.spell_thresholds(argv), "python -m data decide")
    chosen = profiles.choose(config.profile, config.source)
    profile = profiles.with_thresholds(chosen or profiles.Profile("none", language="", privacy=()), config.thresholds)
    with console.terminable(), tempfile.TemporaryDirectory(prefix="decide-") as scratch:
        job = crawl.Job(
            config.source,
            profile,
            config.annotations or Path(scratch, "annotated"),
            Path(scratch),
            keep=config.annotations is not None,
            whole=True,
            text_key=config.text_key,
            id_key=config.id_key,
            documents=config.documents,
            seed=config.seed,
            max_documents=config.max_documents,
            workers=config.workers,
        )
        crawl.run(job, last="cluster" if chosen else "select")
        kept = total = 0
        for line in decisions(job):
            kept, total = kept + line["kept"], total + 1
            print(json.dumps(line, ensure_ascii=False))
        sys.stdout.flush()
    say(f"{kept:,} of {total:,} documents kept by {profile.name}")
    return 0


def decisions(job: Any) -> Iterator[dict[str, Any]]:
    """Every document in the source's order with its decision; the text as the corpus would hold it, before NFKC."""
    import pyarrow.parquet as pq

    from data import dedup, privacy, select

    originals = {dropped: (kept, jaccard) for kept, dropped, jaccard in dedup.pairs(job.work / "verified")}
    names: dict[tuple[int, int], str] = {}
    wanted = {kept for kept, _ in originals.values()}
    for path in sorted((job.annotations / "annotations").glob("[0-9]*.parquet")):
        rank, row = int(path.stem), 0
        decided = pq.read_table(job.work / "decisions" / f"{rank:05d}.parquet").to_pylist()
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["id", "url", "lang", "text"])
                for record in table.to_pylist():
                    verdict = decided[row]
                    if (rank, row) in wanted:
                        names[rank, row] = record["id"]
                    twin = originals.get((rank, row))
                    text = privacy.mask(select.edited(record["text"] or "", job.profile), job.profile.privacy)[0]
                    line = {
                        "id": record["id"],
                        "url": record["url"],
                        "lang": record["lang"] or "und",
                        "kept": not verdict["reason"] and not twin,
                        "reason": "dedup" if twin else verdict["reason"] or None,
                    }
                    if twin:
                        line |= {"duplicate_of": names[twin[0]], "value": round(twin[1], 4)}
                        line |= {"threshold": job.profile.dedup.jaccard}
                    elif verdict["value"] is not None and verdict["value"] == verdict["value"]:
                        line |= {"value": verdict["value"], "threshold": verdict["threshold"]}
                    yield line | {"text": text}
                    row += 1
