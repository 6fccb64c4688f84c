"""`python -m data build`: documents to token shards, in one pass over the source and with flat memory."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import console
import tracking
from console import UserError
from data import encode, foreign, mix, ngram, page, shards, sources, spool, tokenizer
from data.progress import say

PROBED_DOCUMENTS = 200
# Flags that say where and by whom a build is made, not what it holds.
WHERE = (
    "out",
    "json",
    "annotations",
    "executor",
    "workers",
    "slurm_partition",
    "slurm_time",
    "slurm_mem_gb",
    "slurm_env",
)


@dataclass(frozen=True)
class BuildConfig:
    """Documents to token shards: spool, tokenizer, shards, manifest."""

    source: str = ""
    """inquiries, files:GLOB, jsonl:GLOB, parquet:GLOB, warc:GLOB, wet:GLOB or hf:NAME[:CONFIG][:SPLIT]; .gz, .bz2 and
    .zst by suffix. Empty with --mix."""
    out: Path = dataclasses.field(kw_only=True)
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
    """Tokenizer to reuse: the folder of an earlier build, of `data extend`, or of a model with tokenizer.json, or a
    GGUF file; the tokenizer fields below then count for nothing."""
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
    """Training tokens of the Kneser–Ney 5-gram baseline; 0: none. For tokenizers of this project."""
    profile: str = "auto"
    """What is worth keeping: a bundled profile or a YAML file; auto: domain, which drops what nobody wants and no more,
    for web archives, and none (every document as it is) for other sources."""
    thresholds: tuple[str, ...] = ()
    """Changes to the profile, such as max_sentence_length.max=250; also spelled --max_sentence_length.max 250."""
    annotations: Path | None = None
    """Keep every statistic of every page in this folder, or take them from it if it was made from the same source."""
    mix: Path | None = None
    """YAML of sources with weights and epochs, in place of --source."""
    eval_sets: tuple[str, ...] = ()
    """Sources of evaluation items whose copies are looked for in the corpus (with a profile)."""
    eval_keys: tuple[str, ...] = ("text",)
    """Keys of an evaluation item that hold its texts."""
    drop_contaminated: bool = False
    """Leave out documents that hold an evaluation item."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """datatrove's executor for the stages before the tokenizer (with a profile)."""
    workers: int = 0
    """Tasks at once; 0: one a core of this machine, on a cluster no limit."""
    slurm_partition: str = ""
    """Partition that Slurm jobs go to."""
    slurm_time: str = "24:00:00"
    """Time limit of a Slurm task."""
    slurm_mem_gb: int = 4
    """Memory of a Slurm task, GiB."""
    slurm_env: str = ""
    """Shell commands before each Slurm task, such as `module load gcc`."""
    json: bool = False
    """Print the result as one JSON object."""


def main(argv: list[str]) -> int | None:
    """`python -m data build`: the result on stdout, exit code 0 also where it was already built."""
    from data import profiles

    config = console.parse(BuildConfig, profiles.spell_thresholds(argv), "python -m data build")
    was_there = (config.out / "manifest.json").is_file()
    if config.executor == "slurm" and not was_there:
        console.print_result(submit(config), config.json)
        return 0
    with console.terminable():
        manifest = build(config)
        result = summary(config, manifest)
        if not was_there:
            track(config, manifest, result)
    console.print_result(result, config.json)
    return 0


def build(config: BuildConfig) -> dict[str, Any]:
    """Build `config.out` and return its manifest, or return the one there if it was built from the same.

    Raises UserError for bad input; `config.out` then does not exist, or is as it was. What a profile's stages have done
    stays beside `out` until the build is complete, so that the same command goes on after a kill.
    """
    check(config)
    begun = time.perf_counter()
    identity, work = identify(config), work_folder(config.out)
    if (existing := already(config, identity)) is not None:
        say(f"{config.out} is already built")
        shutil.rmtree(work, ignore_errors=True)  # of a build that was killed at its very end
        return existing
    parts = parts_of(config)
    jobs = [job(config, part, work / str(number)) for number, part in enumerate(parts)]
    if not any(jobs):
        return shard(config, identity, parts, jobs, begun)
    from data import crawl

    with crawl.locked(work):
        try:
            for one in filter(None, jobs):
                crawl.run(one)
            manifest = shard(config, identity, parts, jobs, begun)
        except UserError:
            if not any(work.rglob("completions/*")):
                shutil.rmtree(work)  # nothing is in it that anybody paid for
            raise
        shutil.rmtree(work)
    return manifest


def shard(
    config: BuildConfig, identity: dict[str, Any], parts: list[mix.Part], jobs: list[Any], begun: float
) -> dict[str, Any]:
    """The second half of a build: documents to Parquet, tokenizer, shards, baseline, manifest."""
    with shards.part_folder(config.out) as part:
        streams = [stream(config, *pair) for pair in zip(parts, jobs, strict=True)]
        named = f"--mix {config.mix}" if config.mix else f"--source {config.source}"
        if any(jobs):
            named += " (what its profile keeps)"
        expected = config.max_documents or (config.documents if config.source == "inquiries" else None)
        counts, files, sizes = spool.spool(part, named, streams, expected, config.normalize, config.val_fraction)
        repeats = mix.plan(parts, [size["train_bytes"] for size in sizes])
        if config.tokenizer is None:
            train_bytes = counts["train"]["bytes"]
            sample = encode.training_sample(part, files, train_bytes, config.tokenizer_bytes, config.val_fraction)
            model = tokenizer.train(sample, config.model_type, config.vocab_size, config.max_piece_length)
            say(f"tokenizer trained, {time.perf_counter() - begun:.1f} s so far")
            tokenizer.write_folder(model, part / "tokenizer")
        else:
            source = tokenizer_folder(config.tokenizer)
            copy = foreign.copy_folder if foreign.is_foreign(source) else tokenizer.copy_folder
            copy(source, part / "tokenizer")
        probes = (text for _, text, _ in spool.first(spool.spooled(part, files), PROBED_DOCUMENTS))
        processor, made, lengths = foreign.opened(part / "tokenizer", probes)
        vocab, document_ids = made["vocab_size"], (made["bos_id"], made["eos_id"])
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
            "tokenizer": made,
        }
        if config.mix is not None:
            manifest["mix"] = [
                {"source": one.source, "repeats": repeat, **size}
                for one, repeat, size in zip(parts, repeats, sizes, strict=True)
            ]
        tokens_path = part / "token_bytes.npy"
        with tokens_path.open("wb") as file:
            np.save(file, lengths, allow_pickle=False)
        bounds = [size["documents"] for size in sizes]
        limits = (config.shard_tokens, config.val_fraction)
        written = encode.encode(part, files, processor, manifest["dtype"], *limits, bounds, repeats, document_ids)
        manifest["splits"] = {
            split: counts[split]
            | {key: sum(shard[key] for shard in written[split]) for key in ("documents", "bytes")}
            | {"tokens": sum(shard["tokens"] for shard in written[split]), "shards": written[split]}
            for split in ("train", "val")
        }
        total = {key: sum(manifest["splits"][s][key] for s in ("train", "val")) for key in ("bytes", "tokens")}
        manifest["bytes_per_token"] = total["bytes"] / total["tokens"]
        manifest["baseline"] = None
        if config.baseline_tokens and document_ids == (shards.BOS, shards.EOS):
            manifest["baseline"] = ngram.baseline(part, manifest, 5, config.baseline_tokens)
            say(f"5-gram baseline: {manifest['baseline']['val_bpb']:.4f} bits per byte")
        manifest["fingerprint"] = shards.fingerprint(manifest)
        found = records(jobs)
        manifest["seconds"] = round(time.perf_counter() - begun, 2)
        console.write_atomic(part / "funnel.json", json.dumps(found, ensure_ascii=False).encode())
        html = page.build(found, manifest, summary(config, manifest))
        console.write_atomic(part / "report.html", html.encode())
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
        "page": str(config.out / "report.html"),
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
    found = json.loads((config.out / "funnel.json").read_bytes())
    for number, one in enumerate(found):
        from data import funnel

        for name, columns, rows in funnel.tables(one):
            tracker.table(f"{number}/{name}" if len(found) > 1 else name, columns, rows, step=0)
    tracker.summary({"status": "ok", **result})
    made = {
        "corpus": [
            *sorted(config.out.glob("documents-*.parquet")),
            config.out / "funnel.json",
            config.out / "report.html",
        ],
        "tokenizer": [config.out / "tokenizer"],
        "shards": [config.out / "manifest.json", *sorted(config.out.glob("*.npy"))],
    }
    for kind, paths in made.items():
        tracker.artifact(f"{kind}-{fingerprint}", kind, paths, result)
    tracker.finish(0)


def parts_of(config: BuildConfig) -> list[mix.Part]:
    """The parts of the mix; a single source is a mix of one."""
    return mix.read(config.mix) if config.mix is not None else [mix.Part(config.source)]


def work_folder(out: Path) -> Path:
    """Where the stages before the tokenizer keep what they have done, beside `out`."""
    out = Path(os.path.abspath(out))  # noqa: PTH100 - as in shards.part_folder
    return out.with_name(f".{out.name}.work")


def job(config: BuildConfig, part: mix.Part, work: Path) -> Any:
    """The crawl.Job of a part; None where its profile is "none" and documents are taken as they are."""
    from data import profiles

    profile = profiles.choose(part.profile or config.profile, part.source)
    if profile is None:
        if config.thresholds or config.annotations or config.eval_sets:
            raise UserError("--thresholds, --annotations and --eval_sets need a --profile, such as domain")
        return None
    from data import crawl

    return crawl.Job(
        part.source,
        profiles.with_thresholds(profile, config.thresholds),
        config.annotations or work / "annotated",
        work,
        keep=config.annotations is not None,
        text_key=part.text_key or config.text_key,
        id_key=part.id_key or config.id_key,
        documents=config.documents,
        seed=config.seed,
        max_documents=config.max_documents,
        eval_sets=config.eval_sets,
        eval_keys=config.eval_keys,
        drop_contaminated=config.drop_contaminated,
        executor=config.executor,
        workers=config.workers,
        slurm=crawl.Slurm(config.slurm_partition, config.slurm_time, config.slurm_mem_gb, config.slurm_env),
    )


def stream(config: BuildConfig, part: mix.Part, crawled: Any) -> Iterator[sources.Document]:
    """The documents of a part, from its crawl's last stage or straight from its source."""
    if crawled is not None:
        from data import crawl

        return crawl.documents(crawled)
    return sources.read(
        part.source,
        documents=config.documents,
        seed=config.seed,
        text_key=part.text_key or config.text_key,
        id_key=part.id_key or config.id_key,
        max_documents=config.max_documents,
    )


def submit(config: BuildConfig) -> dict[str, Any]:
    """Send the build's stages to Slurm: the id of the last job, which completes the build, and where it writes."""
    check(config)
    already(config, identify(config))
    if not config.slurm_partition:
        raise UserError("--executor slurm: name a --slurm_partition, such as one that sinfo lists")
    work = work_folder(config.out)
    jobs = [job(config, part, work / str(number)) for number, part in enumerate(parts_of(config))]
    if len(jobs) != 1 or jobs[0] is None:
        raise UserError("--executor slurm: for one --source with a --profile")
    from data import slurm

    local = dataclasses.replace(config, executor="local", workers=0)
    log = work.with_name(f"{config.out.name}.log")
    last = slurm.submit(jobs[0], ["build", *flags_of(local)], log)
    return {"job": last, "log": str(log), "logs_of_tasks": str(slurm.logs(jobs[0]) / "JOB_TASK.out")}


def flags_of(config: BuildConfig) -> list[str]:
    """`config` as a command line: the flags that differ from their defaults."""
    flags: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            flags += [f"--{field.name}", *map(str, value)] if isinstance(value, tuple) else [f"--{field.name}={value}"]
    return flags


def records(jobs: list[Any]) -> list[dict[str, Any]]:
    """What became of each crawled part, for W&B and the page."""
    if not any(jobs):
        return []
    from data import funnel

    return [funnel.record(one) for one in jobs if one]


def check(config: BuildConfig) -> None:
    """Raise UserError for a value that no build could use."""
    if bool(config.source) == bool(config.mix):
        raise UserError("give --source, such as --source inquiries, or --mix FILE.yaml: one of the two")
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
    return folder / "tokenizer" if (folder / "tokenizer" / "tokenizer.json").is_file() else folder


def identify(config: BuildConfig) -> dict[str, Any]:
    """All that decides what a build holds and can be known before it: the flags and the source's files."""
    flags = dataclasses.asdict(config)
    for name in (*WHERE, "profile", "thresholds", "mix"):
        del flags[name]
    parts = parts_of(config)
    if all(part.source != "inquiries" for part in parts):
        del flags["documents"], flags["seed"]
    if not config.eval_sets:
        del flags["eval_sets"], flags["eval_keys"], flags["drop_contaminated"]
    if config.mix is not None:
        flags["mix"] = [dataclasses.asdict(part) for part in parts]
    made = [job(config, part, Path()) for part in parts]
    if any(made):
        from data import profiles

        flags["profiles"] = [profiles.describe(one.profile) if one else None for one in made]
    if config.tokenizer is not None:
        folder = tokenizer_folder(config.tokenizer)
        if foreign.is_foreign(folder):
            path = foreign.identity(folder)
        else:
            path = folder / "tokenizer.model"
            tokenizer.load(folder)
        flags["tokenizer"] = shards.hash_files(path)
        for name in ("model_type", "vocab_size", "max_piece_length", "tokenizer_bytes"):
            del flags[name]
    inputs = [entry for part in parts for entry in sources.inputs(part.source)]
    inputs += [entry for source in config.eval_sets for entry in sources.inputs(source)]
    # As JSON has it, since it is compared with what a manifest holds.
    return json.loads(json.dumps({"config": flags, "inputs": inputs}))


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
