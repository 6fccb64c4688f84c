"""The crawl's first stage: records to text, language and every statistic, one Parquet file a task.

What is dropped stays in the file with its reason, so that other thresholds can be tried without reading the crawl again
(`data/select.py`). A build that keeps no annotations stops at the first rule that rejects a page instead.
"""

import collections
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import console
import tracking
from data import extract, language, profiles, quality, sources, warc, words

FORMAT = 1
GROUP_CHARACTERS = 1_500_000  # text held before it is written as one row group
GROUP_ROWS = 2_000
BATCH = 32  # pages that pass a step before the next step begins: the language model then stays in the cache
EXCERPT = 500  # characters kept of a page that the early exit dropped, for the tables of examples
PLAUSIBLE = 0.1  # share of Japanese characters from which a page is measured whatever fastText calls it
KANA_CODE = re.compile(r"&#(?:12[345]\d\d|[xX]30[4-9a-fA-F])")  # kana written as numbers
HEARTBEAT = 1.0  # seconds between two signs of life of a task
STEPS = ("read", "extract", "language", "quality")
SLICE_BYTES, SLICES = 4_000_000, 1024
"""A file is cut into tasks of at least this many bytes, a source into about this many tasks at most."""


@dataclass(frozen=True)
class AnnotateConfig:
    """Every statistic of every page of a source, to be filtered again and again."""

    source: str
    """warc:GLOB, wet:GLOB, or any other source of `data build`."""
    out: Path
    """Folder of annotations to make, or to complete."""
    profile: str = "web_swallow_v1"
    """Profile whose language is measured, and whose word lists are counted."""
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
    executor: Literal["local", "ray"] = "local"
    """datatrove's executor."""
    workers: int = 0
    """Tasks at once; 0: one a core of this machine, on a cluster no limit."""
    json: bool = False
    """Print the result as one JSON object."""


def main(argv: list[str]) -> int:
    """`python -m data annotate`: the annotations of a source, made once; killed and called again it goes on."""
    from data import crawl, funnel

    config = console.parse(AnnotateConfig, argv, "python -m data annotate")
    begun = time.perf_counter()
    job = crawl.Job(
        config.source,
        profiles.load(config.profile),
        config.out,
        config.out,
        keep=True,
        text_key=config.text_key,
        id_key=config.id_key,
        documents=config.documents,
        seed=config.seed,
        max_documents=config.max_documents,
        executor=config.executor,
        workers=config.workers,
    )
    with console.terminable(), crawl.locked(config.out):
        crawl.run(job, last="annotate")
    plan, read = read_plan(config.out), list(funnel.ledgers(config.out / "annotations"))
    result: dict[str, Any] = {
        "pages": sum(one["pages"] for one in read),
        "characters": sum(one["characters"]["extract"] for one in read),
        "cpu_seconds": round(sum(funnel.total(one["seconds"] for one in read).values()), 2),
        "seconds": round(time.perf_counter() - begun, 2),
        "annotations": fingerprint(plan),
        "folder": str(config.out),
    }
    mark = fingerprint(plan)
    tracker = tracking.start(
        "data",
        {key: str(value) for key, value in asdict(config).items()},
        name=f"annotations-{mark}",
        recipe=mark,
        tags=[f"data:{mark}"],
        x_axis=None,
        lineage={"source": config.source, "inputs": len(plan["inputs"]), "extractor": plan["extractor"]},
    )
    tracker.summary({"status": "ok", **result, **{f"records/{k}": n for k, n in funnel.records(read).items()}})
    tracker.artifact(f"annotations-{mark}", "annotations", [config.out / "plan.json"], result)
    tracker.finish(0)
    console.print_result(result, config.json)
    return 0


def fingerprint(plan: dict[str, Any]) -> str:
    """hex16 of what annotations are made from."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


class Task(NamedTuple):
    """Bytes [begin, end) of one stored file; `path` is empty for a source that is no file."""

    path: str
    name: str
    begin: int
    end: int


def tasks(source: str, whole: bool) -> list[Task]:
    """The source as tasks, by its files alone: the same for any number of workers. `whole` makes it a single one."""
    scheme, _, rest = source.partition(":")
    if whole or scheme not in sources.ON_DISK:
        return [Task("", source, 0, 0)]
    filesystem, paths, root = sources.match(rest)
    sizes = [filesystem.size(path) for path in paths]
    # An archive can be entered at any record, the other formats only at their beginning.
    least = max(SLICE_BYTES, sum(sizes) // SLICES) if scheme in ("warc", "wet") else sum(sizes) + 1
    found = []
    for path, size in zip(paths, sizes, strict=True):
        cuts = np.linspace(0, size, max(1, round(size / least)) + 1).astype(int).tolist()
        url = path if "file" in filesystem.protocol else filesystem.unstrip_protocol(path)
        found += [Task(url, sources.short(path, root), *cut) for cut in itertools.pairwise(cuts)]
    return found


def read_plan(folder: Path) -> dict[str, Any]:
    """plan.json of an annotations folder. Raises UserError if there is none or it is of another version."""
    path = folder / "plan.json"
    try:
        plan = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise console.UserError(f"{folder}: no annotations (no plan.json): make them with `data annotate`") from None
    except ValueError:
        raise console.UserError(f"{path}: not JSON: delete {folder} and annotate again") from None
    if plan.get("format") != FORMAT:
        raise console.UserError(f"{path}: format {plan.get('format')}, this version reads {FORMAT}: annotate again")
    return plan


def schema(plan: dict[str, Any]) -> Any:
    """The Arrow schema of annotations: what was read, the text, a float64 for each statistic (null: not computed)."""
    import pyarrow as pa

    strings = [(name, pa.string()) for name in ("id", "url", "reason", "encoding", "lang", "text")]
    return pa.schema([*strings, ("characters", pa.int64()), *((name, pa.float64()) for name in numbers(plan))])


def numbers(plan: dict[str, Any]) -> list[str]:
    """Names of the columns that rules can be about."""
    listed = [f"words_{name}_{what}" for name in sorted(plan["words"]) for what in ("hits", "fraction")]
    return ["lang_probability", "kana", *quality.STATISTICS, *listed]


def annotate(data: Any, rank: int, world_size: int, *, folder: str) -> None:
    """Step of an executor: task `rank` of the plan in `folder`. Killed and run again, it writes the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    del data, world_size
    home = Path(folder) / "annotations"
    plan = read_plan(Path(folder))
    task, columns = Task(*plan["tasks"][rank]), schema(plan)
    early = profiles.from_dict(plan["early"]) if plan["early"] else None
    lists = {name: words.load(path) for name, path in plan["words"].items()}
    counts: collections.Counter[str] = collections.Counter()
    meter, beat = Meter(), heartbeat(Path(folder) / "progress" / f"{rank:05d}")
    rows: list[dict[str, Any]] = []
    held = number = 0
    part = home / f".{rank:05d}.{os.getpid()}.part"
    with part.open("wb") as file, pq.ParquetWriter(file, columns, compression="zstd") as writer:
        stream = extracted(pages(plan, task, counts), None if plan["whole"] else early, meter)
        while batch := list(filled(stream)):
            number += len(batch)
            for row in batch:
                identify(row, meter)
            for row in batch:
                measure(row, early, lists, plan["whole"], meter)
                rows.append(row)
                held += len(row["text"] or "")
                if held >= GROUP_CHARACTERS or len(rows) >= GROUP_ROWS:
                    writer.write_table(pa.Table.from_pylist(rows, columns))
                    rows, held = [], 0
            beat(max(0, offset(batch[-1]["id"]) - task.begin))
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, columns))
    meter.lap("read")
    ledger = {
        "name": task.name,
        "pages": number,
        "records": counts,
        "seconds": meter.seconds,
        "characters": meter.characters,
    }
    console.write_atomic(home / f"{rank:05d}.json", json.dumps(ledger, ensure_ascii=False).encode())
    part.replace(home / f"{rank:05d}.parquet")
    (Path(folder) / "progress" / f"{rank:05d}").unlink(missing_ok=True)


def pages(plan: dict[str, Any], task: Task, counts: collections.Counter[str]) -> Iterator[warc.Page]:
    """The task's records as pages; documents of other sources are pages of plain text."""
    scheme, _, rest = plan["source"].partition(":")
    if scheme in ("warc", "wet"):
        filesystem, paths, root = sources.match(task.path or rest)
        names = [task.name if task.path else sources.short(path, root) for path in paths]
        streams = (
            warc.pages(filesystem, path, name, task.begin, task.end or filesystem.size(path), counts)
            for path, name in zip(paths, names, strict=True)
        )
        yield from itertools.islice(itertools.chain.from_iterable(streams), plan["max_documents"] or None)
        return
    for document in sources.read(
        f"{scheme}:{task.path}" if task.path else plan["source"],
        documents=plan["documents"],
        seed=plan["seed"],
        text_key=plan["text_key"],
        id_key=plan["id_key"],
        max_documents=plan["max_documents"],
        root=task.path.removesuffix(task.name) if task.path else None,
    ):
        counts["records"] += 1
        url = str(document.facts.get("url", ""))
        yield warc.Page(document.id, url, document.text.encode("utf-8", "replace"), "utf-8", "text", None)


def filled(stream: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The next BATCH rows of `stream`, or as many as hold GROUP_CHARACTERS."""
    held = 0
    for row in itertools.islice(stream, BATCH):
        yield row
        held += row["characters"]
        if held >= GROUP_CHARACTERS:
            return


def extracted(pages: Iterable[warc.Page], early: profiles.Profile | None, meter: "Meter") -> Iterator[dict[str, Any]]:
    """A row for each page: its text, or the reason why there is none.

    With `early` a page of fewer kana than a Japanese profile asks for is not extracted: its text cannot have more.
    """
    for page in pages:
        row: dict[str, Any] = {"id": page.id, "url": page.url, "reason": page.reason, "text": None, "characters": 0}
        meter.lap("read")
        if page.kind == "html" and not page.reason:
            html, row["encoding"] = extract.decode(page.body, page.charset)
            if early and early.language == "ja" and language.kana(html) < early.min_kana and not KANA_CODE.search(html):
                row |= {"reason": "language", "lang": "und"}
            else:
                try:
                    row["text"] = extract.main_text(html)
                except extract.TooComplex:
                    row["reason"] = "too_complex"
        elif not page.reason:
            row["text"] = page.body.decode("utf-8", "replace")
        if row["text"] is not None and not row["text"].strip():
            row |= {"reason": "no_text", "text": None}
        row["characters"] = len(row["text"] or "")
        meter.lap("extract", row["characters"])
        yield row


def identify(row: dict[str, Any], meter: "Meter") -> None:
    """Add the language of the row's text."""
    if row["text"] is None:
        return
    text = row["text"]
    row["lang"], row["lang_probability"] = language.identify(text)
    row["kana"], row["japanese_fraction"] = float(language.kana(text)), language.japanese_fraction(text)
    meter.lap("language", len(text))


def measure(
    row: dict[str, Any],
    early: profiles.Profile | None,
    lists: dict[str, words.WordList],
    whole: bool,
    meter: "Meter",
) -> None:
    """Add the statistics of the row's text.

    With `early` they end at the first rule that rejects it; unless `whole`, little is kept of its text then.
    """
    text = row["text"]
    if text is None:
        return
    if early and not early.speaks(row["lang"], row["lang_probability"], row["japanese_fraction"], row["kana"]):
        row["text"] = text if whole else None
        return
    if not early and row["lang"] != "ja" and row["japanese_fraction"] < PLAUSIBLE:
        return
    row |= quality.cheap(text) | words.statistics(text, lists)
    if not early:
        row |= quality.repetition(text)
    elif not profiles.judge(early, row) and early.asked:
        row |= quality.repetition(text, early.asked)
    if early and not whole and profiles.judge(early, row):
        row["text"] = text[:EXCERPT]
    meter.lap("quality", len(text))


def offset(name: str) -> int:
    """Where in its stored file a page of this id begins; 0 for documents that are no pages."""
    at = name.rpartition(":")[2].partition("+")[0]
    return int(at) if at.isdigit() else 0


class Meter:
    """CPU seconds and characters by step: what the funnel shows."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self.characters = dict.fromkeys(STEPS, 0)
        self.last = time.process_time()

    def lap(self, step: str, characters: int = 0) -> None:
        """Charge what passed since the last lap to `step`."""
        now = time.process_time()
        self.seconds[step] += now - self.last
        self.characters[step] += characters
        self.last = now


def heartbeat(path: Path) -> Callable[[int], None]:
    """beat(done): leaves this process's id and the bytes done at `path`, at most once a second."""
    last = 0.0

    def beat(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= HEARTBEAT:
            last = now
            path.write_text(f"{os.getpid()} {done}")

    return beat
