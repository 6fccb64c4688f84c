"""`python -m data build`: documents to token shards, in one pass over the source and with flat memory."""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import console
import tracking
from console import UserError
from data import ngram, shards, sources, tokenizer

ROW_GROUP_BYTES = 4_000_000  # documents spooled, and later encoded, at a time
DOCUMENTS_FILE_BYTES = 1_000_000_000  # text per documents-*.parquet
PROBED_DOCUMENTS = 200
LINE_EVERY = 10.0  # seconds between progress lines where stderr is no terminal


@dataclass(frozen=True)
class BuildConfig:
    """Documents to token shards: spool, tokenizer, shards, manifest."""

    source: str
    """inquiries, files:GLOB, jsonl:GLOB, parquet:GLOB or hf:NAME[:CONFIG][:SPLIT]; .gz, .bz2 and .zst by suffix."""
    out: Path
    """Folder to make. One that holds the same build is left as it is."""
    documents: int = 20_000
    """Documents that `inquiries` generates."""
    seed: int = 0
    """Seed of `inquiries`."""
    max_documents: int = 0
    """Stop reading the source after this many documents; 0: read all."""
    text_key: str = "text"
    """Key or column of the text (jsonl, parquet, hf)."""
    id_key: str = "id"
    """Key or column of the document's name, where there is one (jsonl, parquet, hf)."""
    normalize: Literal["nfkc", "none"] = "nfkc"
    """Unicode normalisation of every document."""
    val_fraction: float = 0.02
    """Share of documents kept for validation, chosen by the hash of their text."""
    tokenizer: Path | None = None
    """Tokenizer folder of an earlier build to reuse; the tokenizer fields below then count for nothing."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece model to train, on the training split alone."""
    vocab_size: int = 8_000
    """Pieces in the vocabulary, 259 reserved ones included."""
    max_piece_length: int = 16
    """Longest piece in characters: short ones keep field boundaries that extraction needs."""
    tokenizer_bytes: int = 50_000_000
    """UTF-8 bytes of training text that the tokenizer sees at most, sampled by document hash."""
    shard_tokens: int = 100_000_000
    """Tokens per shard file, give or take one document."""
    baseline_tokens: int = 5_000_000
    """Training tokens of the Kneser–Ney 5-gram baseline; 0: none."""
    json: bool = False
    """Print the result as one JSON object."""


def main(argv: list[str]) -> int | None:
    """`python -m data build`: the result on stdout, exit code 0 also where it was already built."""
    config = console.parse(BuildConfig, argv, "python -m data build")
    was_there = (config.out / "manifest.json").is_file()
    manifest = build(config)
    result = summary(config, manifest)
    if not was_there:
        track(config, manifest, result)
    console.print_result(result, config.json)
    return 0


def build(config: BuildConfig) -> dict[str, Any]:
    """Build `config.out` and return its manifest, or return the one there if it was built from the same.

    Raises UserError for bad input; `config.out` then does not exist, or is as it was.
    """
    check(config)
    begun = time.perf_counter()
    identity = identify(config)
    if (existing := already(config, identity)) is not None:
        say(f"{config.out} is already built")
        return existing
    with shards.part_folder(config.out) as part:
        counts, files = spool(config, part)
        if config.tokenizer is None:
            sample = training_sample(config, part, files, counts["train"]["bytes"])
            model = tokenizer.train(sample, config.model_type, config.vocab_size, config.max_piece_length)
            say(f"tokenizer trained, {time.perf_counter() - begun:.1f} s so far")
        else:
            model = (tokenizer_folder(config.tokenizer) / "tokenizer.model").read_bytes()
        tokenizer.write_folder(model, part / "tokenizer")
        tokenizer.probe(part / "tokenizer", (text for _, text, _ in first(spooled(part, files), PROBED_DOCUMENTS)))
        processor = tokenizer.load(part / "tokenizer")
        vocab = processor.get_piece_size()
        manifest: dict[str, Any] = {
            "format": shards.FORMAT,
            "fingerprint": "",
            "source": config.source,
            "config": identity["config"],
            "inputs": identity["inputs"],
            "normalize": config.normalize,
            "vocab_size": vocab,
            "dtype": "<u2" if vocab <= 1 << 16 else "<u4",
            "documents": files,
            "skipped_blank": counts["blank"],
        }
        tokens_path = part / "token_bytes.npy"
        with tokens_path.open("wb") as file:
            np.save(file, tokenizer.token_bytes(processor), allow_pickle=False)
        written = encode(config, part, files, processor, manifest["dtype"], counts)
        manifest["splits"] = {
            split: counts[split]
            | {"tokens": sum(shard["tokens"] for shard in written[split]), "shards": written[split]}
            for split in ("train", "val")
        }
        total = {key: sum(manifest["splits"][s][key] for s in ("train", "val")) for key in ("bytes", "tokens")}
        manifest["bytes_per_token"] = total["bytes"] / total["tokens"]
        manifest["tokenizer"] = {
            "file": "tokenizer.model",
            "sha256": hashlib.sha256(model).hexdigest(),
            "model_type": tokenizer.kind(processor),
            "vocab_size": vocab,
        }
        manifest["baseline"] = None
        if config.baseline_tokens:
            manifest["baseline"] = ngram.baseline(part, manifest, 5, config.baseline_tokens)
            say(f"5-gram baseline: {manifest['baseline']['val_bpb']:.4f} bits per byte")
        manifest["fingerprint"] = shards.fingerprint(manifest)
        manifest["seconds"] = round(time.perf_counter() - begun, 2)
        console.write_atomic(
            part / "manifest.json", json.dumps(manifest, ensure_ascii=False, indent=1).encode() + b"\n"
        )
    return manifest


def summary(config: BuildConfig, manifest: dict[str, Any]) -> dict[str, Any]:
    """What `build` prints: counts over both splits; bytes_per_token counts `<s>` and `</s>` as tokens."""
    train, val = (manifest["splits"][split] for split in ("train", "val"))
    baseline = manifest["baseline"]
    return {
        "documents": train["documents"] + val["documents"],
        "skipped_blank": manifest["skipped_blank"],
        "bytes": train["bytes"] + val["bytes"],
        "tokens": train["tokens"] + val["tokens"],
        "bytes_per_token": round(manifest["bytes_per_token"], 4),
        "vocab_size": manifest["vocab_size"],
        "val_documents": val["documents"],
        "val_share": round(val["bytes"] / (train["bytes"] + val["bytes"]), 4),
        "baseline_bpb": round(baseline["val_bpb"], 4) if baseline else None,
        "seconds": manifest["seconds"],
        "fingerprint": manifest["fingerprint"],
        "folder": str(config.out),
    }


def track(config: BuildConfig, manifest: dict[str, Any], result: dict[str, Any]) -> None:
    """The build as a W&B run: its counts, and corpus, tokenizer and shards as artifacts that stay where they are."""
    fingerprint = manifest["fingerprint"]
    tracker = tracking.start(
        "data",
        {"out": str(config.out), **manifest["config"]},
        name=f"data-{fingerprint}",
        recipe=fingerprint,
        tags=[f"data:{fingerprint}"],
        x_axis=None,
        lineage={"source": config.source, "inputs": len(manifest["inputs"])},
    )
    tracker.summary({"status": "ok", **result})
    made = {
        "corpus": sorted(config.out.glob("documents-*.parquet")),
        "tokenizer": [config.out / "tokenizer"],
        "shards": [config.out / "manifest.json", *sorted(config.out.glob("*.npy"))],
    }
    for kind, paths in made.items():
        tracker.artifact(f"{kind}-{fingerprint}", kind, paths, result)
    tracker.finish(0)


def check(config: BuildConfig) -> None:
    """Raise UserError for a value that no build could use."""
    if not 0 < config.val_fraction < 1:
        raise UserError(f"--val_fraction {config.val_fraction}: a share between 0 and 1, such as 0.02")
    for name in ("documents", "vocab_size", "max_piece_length", "tokenizer_bytes", "shard_tokens"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: at least 1")
    for name in ("max_documents", "baseline_tokens", "seed"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} {getattr(config, name)}: 0 or more")


def tokenizer_folder(folder: Path) -> Path:
    """`folder`, or the tokenizer inside it if it is a shards folder."""
    return folder / "tokenizer" if (folder / "tokenizer" / "tokenizer.model").is_file() else folder


def identify(config: BuildConfig) -> dict[str, Any]:
    """All that decides what a build holds and can be known before it: the flags and the source's files."""
    flags = dataclasses.asdict(config)
    del flags["out"], flags["json"]
    if config.source != "inquiries":
        del flags["documents"], flags["seed"]
    if config.tokenizer is not None:
        path = tokenizer_folder(config.tokenizer) / "tokenizer.model"
        tokenizer.load(path.parent)
        flags["tokenizer"] = hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ("model_type", "vocab_size", "max_piece_length", "tokenizer_bytes"):
            del flags[name]
    return {"config": flags, "inputs": sources.inputs(config.source)}


def already(config: BuildConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished build of the same at `config.out`; None if nothing is there.

    Raises UserError if something else is there, and says what differs.
    """
    if not config.out.exists() or (config.out.is_dir() and not any(config.out.iterdir())):
        return None
    if not (config.out / "manifest.json").is_file():
        raise UserError(f"--out {config.out} exists and is no shards folder: choose another --out")
    manifest = shards.load(config.out)
    then, now = manifest["config"], identity["config"]
    changed = [f"{k} {then.get(k)} then, {now.get(k)} now" for k in {**then, **now} if then.get(k) != now.get(k)]
    if not changed and manifest["inputs"] != identity["inputs"]:
        old, new = ({entry["path"]: entry for entry in part} for part in (manifest["inputs"], identity["inputs"]))
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        changed = [f"input {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} changed"]
    if changed:
        raise UserError(f"--out {config.out} holds another build ({'; '.join(changed)}): delete it or choose another")
    return manifest


def spool(config: BuildConfig, part: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Stream the source once into documents-*.parquet; returns counts by split and the files written."""
    counts: dict[str, Any] = {s: {"documents": 0, "bytes": 0, "characters": 0} for s in ("train", "val")}
    counts["blank"] = 0
    files: list[dict[str, Any]] = []
    rows: list[dict[str, str]] = []
    rows_bytes = 0
    with contextlib.ExitStack() as open_file:
        write: Callable[[list[dict[str, str]], int], None] | None = None
        total = config.max_documents or (config.documents if config.source == "inquiries" else None)
        with progress("documents", total, "documents") as advance:
            for document in sources.read(
                config.source,
                documents=config.documents,
                seed=config.seed,
                text_key=config.text_key,
                id_key=config.id_key,
                max_documents=config.max_documents,
            ):
                advance(1)
                text = tokenizer.normalise(document.text, config.normalize)
                if not text.strip():
                    counts["blank"] += 1
                    continue
                try:
                    raw = text.encode()
                except UnicodeEncodeError as error:
                    raise UserError(
                        f"document {document.id!a}: character {error.start} is half a surrogate pair: mend the source"
                    ) from None
                split = "val" if share(raw) < config.val_fraction else "train"
                counts[split]["documents"] += 1
                counts[split]["bytes"] += len(raw)
                counts[split]["characters"] += len(text)
                facts = normalised(document.facts, config.normalize)
                name = document.id.encode("utf-8", "replace").decode()
                rows.append({"id": name, "text": text, "split": split, "facts": json.dumps(facts, ensure_ascii=False)})
                rows_bytes += len(raw)
                if rows_bytes >= ROW_GROUP_BYTES:
                    if write is None or files[-1]["bytes"] >= DOCUMENTS_FILE_BYTES:
                        open_file.close()
                        write = open_file.enter_context(documents_file(part, files))
                    write(rows, rows_bytes)
                    rows, rows_bytes = [], 0
        if rows:
            write = write or open_file.enter_context(documents_file(part, files))
            write(rows, rows_bytes)
    if not files:
        what = f"{counts['blank']} blank documents and nothing else" if counts["blank"] else "no document"
        raise UserError(f"--source {config.source}: empty corpus, {what}")
    for split, other, change in (("val", "train", "raise"), ("train", "val", "lower")):
        if not counts[split]["documents"]:
            raise UserError(
                f"no {split} documents: all {counts[other]['documents']} fell to {other} at --val_fraction "
                f"{config.val_fraction}: {change} it or add documents"
            )
    return counts, files


@contextlib.contextmanager
def documents_file(part: Path, files: list[dict[str, Any]]) -> Iterator[Callable[[list[dict[str, str]], int], None]]:
    """The next documents-*.parquet, as a function that appends rows as one row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in ("id", "text", "split", "facts")])
    entry: dict[str, Any] = {"file": f"documents-{len(files):05d}.parquet", "documents": 0, "bytes": 0}
    files.append(entry)

    def write(rows: list[dict[str, str]], text_bytes: int) -> None:
        writer.write_table(pa.Table.from_pylist(rows, schema))
        entry["documents"] += len(rows)
        entry["bytes"] += text_bytes

    # A Python file, so that a full disk is an OSError with its errno.
    with (part / entry["file"]).open("wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        yield write


def spooled(part: Path, files: list[dict[str, Any]]) -> Iterator[list[tuple[str, str, str]]]:
    """The spooled documents as lists of (split, text, id), a row group at a time."""
    import pyarrow.parquet as pq

    for entry in files:
        with pq.ParquetFile(part / entry["file"]) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["split", "text", "id"])
                yield list(zip(*(table[name].to_pylist() for name in ("split", "text", "id")), strict=True))


def first(groups: Iterator[list[tuple[str, str, str]]], n: int) -> Iterator[tuple[str, str, str]]:
    """The first `n` documents of `groups`."""
    for group in groups:
        yield from group[:n]
        n -= len(group)
        if n <= 0:
            return


def training_sample(config: BuildConfig, part: Path, files: list[dict[str, Any]], train_bytes: int) -> Iterator[str]:
    """Training texts of about `tokenizer_bytes` bytes (all, if they are fewer), chosen by hash: the same whatever
    their order, and spread over the whole corpus."""
    ceiling = config.val_fraction + (1 - config.val_fraction) * min(1.0, config.tokenizer_bytes / train_bytes)
    left = config.tokenizer_bytes
    with progress("tokenizer", min(train_bytes, config.tokenizer_bytes), "bytes") as advance:
        for group in spooled(part, files):
            for split, text, _ in group:
                raw = text.encode()
                if left <= 0:
                    return
                if split == "train" and share(raw) <= ceiling:
                    left -= len(raw)
                    advance(len(raw))
                    yield text


def encode(
    config: BuildConfig,
    part: Path,
    files: list[dict[str, Any]],
    processor: Any,
    dtype: str,
    counts: dict[str, Any],
) -> dict[str, list[dict[str, Any]]]:
    """Write the shards of both splits, in the source's order, with SentencePiece on all cores."""
    writers = {split: shards.Writer(part, split, dtype, config.shard_tokens) for split in ("train", "val")}
    total = counts["train"]["documents"] + counts["val"]["documents"]
    begun, tokens = time.perf_counter(), 0
    with progress("encoding", total, "documents") as advance:
        for group in spooled(part, files):
            encoded = processor.encode([text for _, text, _ in group], num_threads=os.cpu_count() or 1)
            for (split, text, _), ids in zip(group, encoded, strict=True):
                writers[split].add(ids, len(text.encode()))
                tokens += len(ids) + 2
            advance(len(group))
    say(f"encoded {tokens:,} tokens at {tokens / (time.perf_counter() - begun):,.0f} tokens/s")
    return {split: writer.close() for split, writer in writers.items()}


def share(raw: bytes) -> float:
    """Where the hash of a document's text falls in [0, 1): the same text always at the same place."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8]) / 2**64


def normalised(facts: Any, how: str) -> Any:
    """`facts` with every string normalised as its text was, so that it still stands there."""
    if isinstance(facts, str):
        return tokenizer.normalise(facts, how)
    if isinstance(facts, dict):
        return {key: normalised(value, how) for key, value in facts.items()}
    return [normalised(value, how) for value in facts] if isinstance(facts, list | tuple) else facts


def say(line: str) -> None:
    """One line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(name: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """`advance(n)` while the block runs: a bar with rate and ETA on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        with Progress(*columns, TimeElapsedColumn(), Remaining(), console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total)
            yield lambda n: bar.advance(task, n)
        return
    done, begun = 0, time.monotonic()
    last = begun

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            eta = f", {(total - done) * (now - begun) / done:.0f} s left" if total and done else ""
            say(f"{name}: {done:,}{f' of {total:,}' if total else ''} {unit}, {done / (now - begun):,.0f}/s{eta}")

    yield advance
    say(f"{name}: {done:,} {unit} in {time.monotonic() - begun:.1f} s")
