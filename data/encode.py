"""Spooled documents to token shards: what the tokenizer learns from, how often each document goes in, the encoding."""

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data import mix, shards, spool
from data.progress import cores, progress, say


def training_sample(
    folder: Path, files: list[dict[str, Any]], train_bytes: int, most_bytes: int, val_fraction: float
) -> Iterator[str]:
    """Training texts of about `most_bytes` bytes (all, if they are fewer), chosen by hash: the same whatever their
    order, and spread over the whole corpus."""
    ceiling = val_fraction + (1 - val_fraction) * min(1.0, most_bytes / train_bytes)
    left = most_bytes
    with progress("tokenizer", min(train_bytes, most_bytes), "bytes") as advance:
        for group in spool.spooled(folder, files):
            for split, text, _ in group:
                raw = text.encode()
                if left <= 0:
                    return
                if split == "train" and spool.share(raw) <= ceiling:
                    left -= len(raw)
                    advance(len(raw))
                    yield text


def encode(
    folder: Path,
    files: list[dict[str, Any]],
    processor: Any,
    dtype: str,
    shard_tokens: int,
    val_fraction: float,
    bounds: list[int],
    repeats: list[float],
    document_ids: tuple[int, int],
) -> dict[str, list[dict[str, Any]]]:
    """Write the shards of both splits, in the source's order, on all cores. `document_ids` open and end a document.

    `bounds` says how many documents each part of a mix has, `repeats` how often its training documents go in. Copies
    come after all documents were written once, then again, so that the copies of a document lie far apart.
    """
    writers = {split: shards.Writer(folder, split, dtype, shard_tokens, *document_ids) for split in ("train", "val")}
    begun, passes = time.perf_counter(), max(1, *(math.ceil(repeat) for repeat in repeats))
    with progress("encoding", sum(bounds) * passes, "documents") as advance:
        for number in range(passes):
            owner = itertools.chain.from_iterable(itertools.repeat(*pair) for pair in zip(repeats, bounds, strict=True))
            for group in spool.spooled(folder, files):
                chosen = [
                    (split, text)
                    for (split, text, _), repeat in zip(group, owner, strict=False)
                    if number < copies(split, text, repeat, val_fraction)
                ]
                encoded = processor.encode([text for _, text in chosen], num_threads=cores())
                for (split, text), ids in zip(chosen, encoded, strict=True):
                    writers[split].add(ids, len(text.encode()))
                advance(len(group))
    written = {split: writer.close() for split, writer in writers.items()}
    tokens = sum(shard["tokens"] for split in written.values() for shard in split)
    say(f"encoded {tokens:,} tokens at {tokens / (time.perf_counter() - begun):,.0f} tokens/s")
    return written


def copies(split: str, text: str, repeats: float, val_fraction: float) -> int:
    """How often a document goes into the shards: validation documents once, others as the mix says."""
    if split == "val" or repeats == 1:
        return 1
    return mix.copies(repeats, (spool.share(text.encode()) - val_fraction) / (1 - val_fraction))
