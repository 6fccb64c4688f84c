"""`python -m data contamination`: which documents hold evaluation items (data/overlap.py), and the corpus without."""

import csv
import dataclasses
import gzip
import io
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import console
import tracking
from console import UserError
from data import shards, sources
from data.overlap import FUZZY_NGRAM, Hit, Index, Rules, settled
from data.progress import progress

TABLE_ROWS = 1_000  # hits shown in W&B
STATES = ("clean", "dirty", "too_short", "indistinct")


@dataclass(frozen=True)
class ContaminationConfig:
    """Find evaluation items in a corpus, and write the corpus without the documents that hold them."""

    corpus: str
    """Source string of `data build`, or a shards folder that it made."""
    eval_sets: tuple[str, ...]
    """Source strings of the evaluation sets."""
    eval_keys: str = "text"
    """Keys of the items' texts, with commas between: question,answer. Each text is looked for on its own."""
    eval_id_key: str = "id"
    """Key of the items' names; '' numbers them by file and line."""
    text_key: str = "text"
    """Key or column of the corpus's text (jsonl, parquet, hf)."""
    id_key: str = "id"
    """Key or column of the corpus's names (jsonl, parquet, hf)."""
    ngram: int = 13
    """Characters of a gram, letters and digits alone."""
    overlap: float = 0.5
    """A document holds an item when it has this share of the item's grams,"""
    run: int = 50
    """or this many characters of it in one piece; an item shorter than this has to be there as a whole,"""
    jaccard: float = 0.35
    """or a stretch of the item's length with this Jaccard similarity of character 5-grams."""
    shortest: int = 20
    """Items of fewer characters are not looked for, and counted."""
    common: int = 10
    """Grams of more items than this are template text, and pieces in more documents common phrases: no hits."""
    out: Path | None = None
    """File to write the hits to: .jsonl, .csv or .parquet."""
    items: Path | None = None
    """JSON file to write: of every set, which items are clean, dirty, too_short and indistinct."""
    drop: Path | None = None
    """File to write the documents without a hit to: .jsonl, .jsonl.gz or .parquet; a source to build from."""
    json: bool = False
    """Print the result as one JSON object."""


def main(argv: list[str]) -> int:
    """`python -m data contamination`: counts on stdout; exit code 0 also where items were found."""
    config = console.parse(ContaminationConfig, argv, "python -m data contamination")
    check(config)
    begun, cpu = time.perf_counter(), time.process_time()
    fields = (field.name for field in dataclasses.fields(Rules))
    rules = Rules(**{name: getattr(config, name) for name in fields})
    index = Index.build(config.eval_sets, tuple(config.eval_keys.split(",")), config.eval_id_key, rules)
    found, counts = scan(config, index)
    hits = [hit for of_document in found.values() for hit in of_document]
    for hit in hits:
        index.states[hit.set][hit.item] = "dirty"
    verdicts = {
        name: {state: [item for item, s in items.items() if s == state] for state in STATES}
        for name, items in index.states.items()
    }
    if config.items:
        console.write_atomic(config.items, json.dumps(verdicts, ensure_ascii=False, indent=1).encode() + b"\n")
    if config.out:
        write_rows(config.out, [dataclasses.asdict(hit) for hit in hits], get_type_hints(Hit))
    if config.drop:
        columns = {"id": str, "text": str}
        kept = (document for number, document in enumerate(corpus(config)) if number not in found)
        write_rows(config.drop, ({"id": document.id, "text": document.text} for document in kept), columns)
    sets = {name: {state: len(items) for state, items in of.items()} for name, of in verdicts.items()}
    result: dict[str, Any] = {
        "items": sum(len(items) for items in index.states.values()),
        **{f"items_{state}": sum(of[state] for of in sets.values()) for state in STATES},
        "grams": len(index.grams),
        **counts,
        "hits": len(hits),
        "seconds": round(time.perf_counter() - begun, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }
    track(config, result, sets, hits)
    by_set = (
        {"sets": sets}
        if config.json
        else {name: ", ".join(f"{n} {s}" for s, n in of.items()) for name, of in sets.items()}
    )
    console.print_result({**result, **by_set}, config.json)
    return 0


def check(config: ContaminationConfig) -> None:
    """Raise UserError for a value that no search could use."""
    if not config.eval_sets:
        raise UserError("--eval_sets: name at least one source, such as 'jsonl:eval/*.jsonl'")
    for name in ("overlap", "jaccard"):
        if not 0 < getattr(config, name) <= 1:
            raise UserError(f"--{name} {getattr(config, name)}: a share above 0, up to 1")
    if config.ngram < FUZZY_NGRAM:
        raise UserError(f"--ngram {config.ngram}: at least {FUZZY_NGRAM} characters")
    for name in ("run", "shortest"):
        if getattr(config, name) < config.ngram:
            raise UserError(f"--{name} {getattr(config, name)}: at least the {config.ngram} characters of --ngram")
    if config.common < 1:
        raise UserError(f"--common {config.common}: at least 1")
    kinds = {"out": (".jsonl", ".csv", ".parquet"), "items": (".json",), "drop": (".jsonl", ".jsonl.gz", ".parquet")}
    for name, suffixes in kinds.items():
        path: Path | None = getattr(config, name)
        if path is not None and not path.name.endswith(suffixes):
            raise UserError(f"--{name} {path}: name a file that ends in {', '.join(suffixes)}")
        if path is not None and not path.parent.is_dir():
            raise UserError(f"--{name} {path}: there is no folder {path.parent}: make it first")


def corpus(config: ContaminationConfig) -> Iterator[sources.Document]:
    """The documents of the corpus, in its order."""
    folder = Path(config.corpus)
    if not folder.is_dir():
        yield from sources.read(config.corpus, text_key=config.text_key, id_key=config.id_key)
        return
    for part in shards.load(folder)["documents"]:
        yield from sources.read(f"parquet:{folder / part['file']}")


def scan(config: ContaminationConfig, index: Index) -> tuple[dict[int, list[Hit]], dict[str, int]]:
    """The settled hits by number of the document, and counts of documents and of their UTF-8 bytes."""
    found: dict[int, list[Hit]] = {}
    sizes: dict[int, int] = {}
    phrases: Counter[tuple[str, str, str]] = Counter()
    counts = {"documents": 0, "documents_hit": 0, "bytes": 0, "bytes_hit": 0}
    with progress("contamination", None, "documents") as advance:
        for number, document in enumerate(corpus(config)):
            size = len(document.text.encode("utf-8", "replace"))
            counts["documents"] += 1
            counts["bytes"] += size
            for hit in index.hits(document.id, document.text):
                phrases[hit.of()] += hit.by == "run"
                # One more than may stay is enough to settle it: so boilerplate does not fill the memory.
                if hit.by != "run" or phrases[hit.of()] <= config.common + 1:
                    found.setdefault(number, []).append(hit)
                    sizes[number] = size
            advance(1)
    if not counts["documents"]:
        raise UserError(f"--corpus {config.corpus}: no document in it")
    found = settled(found, config.common)
    counts |= {"documents_hit": len(found), "bytes_hit": sum(sizes[number] for number in found)}
    return found, counts | {"common_phrases": sum(times > config.common for times in phrases.values())}


def write_rows(path: Path, rows: Iterable[dict[str, Any]], columns: Mapping[str, type]) -> None:
    """Write `rows` of `columns` in the format that the suffix of `path` names; the file appears when it is whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as raw:
            if path.suffix == ".parquet":
                import pyarrow as pa
                import pyarrow.parquet as pq

                kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
                schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
                waiting = iter(rows)
                with pq.ParquetWriter(raw, schema, compression="zstd") as table:
                    while group := list(itertools.islice(waiting, 1_000)):
                        table.write_table(pa.Table.from_pylist(group, schema))
            else:
                # No name and no time in the header: the same rows give the same bytes.
                binary: Any = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else raw
                with io.TextIOWrapper(binary, "utf-8", errors="replace", newline="") as text:
                    if path.suffix == ".csv":
                        csv.DictWriter(text, list(columns)).writerows([{name: name for name in columns}, *rows])
                    else:
                        text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def track(
    config: ContaminationConfig, result: dict[str, Any], sets: dict[str, dict[str, int]], hits: list[Hit]
) -> None:
    """The search as a W&B run: its counts, a table of the sets and one of the first hits."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
    recipe = tracking.recipe_hash(flags, frozenset({"out", "items", "drop", "json"}))
    tracker = tracking.start(
        "data",
        flags,
        name=f"contamination-{recipe}",
        recipe=recipe,
        tags=["contamination"],
        x_axis=None,
        lineage={"corpus": config.corpus, "eval_sets": list(config.eval_sets)},
    )
    tracker.summary({"status": "ok", **result})
    tracker.table("contamination/sets", ["set", *STATES], [[name, *of.values()] for name, of in sets.items()], step=0)
    rows = [list(dataclasses.asdict(hit).values()) for hit in hits[:TABLE_ROWS]]
    tracker.table("contamination/hits", [field.name for field in dataclasses.fields(Hit)], rows, step=0)
    tracker.finish(0)
