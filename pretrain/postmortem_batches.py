"""The batches around the beginning of a divergence: how hard each was, and the documents in it."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import shards
from data.loader import TokenStream
from pretrain import checkpoint, faults, postmortem
from pretrain.model import Transformer, load_hugging_face_weights
from pretrain.postmortem import plain
from pretrain.pull import Pull
from pretrain.validate import BATCH_WINDOWS

BEFORE, AFTER = 4, 1  # updates around the beginning whose batches are looked at
WINDOWS = 256  # of these batches together that are scored: a forward pass each, by two sets of weights
HARD_NATS, HARD_Z = 0.3, 5.0  # by which a batch is harder than its neighbours, for weights from before
LOOKED_THROUGH = 2_000_000  # documents: a second or two
SHOWN, CHARACTERS = 8, 1200  # windows whose text is kept, and how much of it


class Batch(NamedTuple):
    """What a pull was trained on in one update: ids and targets (windows, seq_len)."""

    ids: Tensor
    targets: Tensor
    windows: np.ndarray | None
    """their numbers in the train split; None for a planted batch, which is in no shard"""


def explain(
    pull: Pull,
    model: Transformer | None,
    autocast: Callable[[], AbstractContextManager],
    stream: TokenStream,
    data: Path,
    manifest: dict[str, Any],
) -> None:
    """Write the post-mortem of a pull's verdict into its folder and its W&B run; see `look` for `model`."""
    verdict = pull.verdict
    assert verdict
    event = postmortem.examine(pull.trace, str(verdict), verdict.step, verdict.onset_step, retry=pull.recovery.retries)
    event["batches"] = look(pull, event, model, autocast, stream, data, manifest)
    record = postmortem.write(pull.folder, pull.name, event)
    pull.tracker.table("stability/postmortem", *postmortem.table(record), step=pull.heard)


def look(
    pull: Pull,
    event: dict[str, Any],
    model: Transformer | None,
    autocast: Callable[[], AbstractContextManager],
    stream: TokenStream,
    data: Path,
    manifest: dict[str, Any],
) -> dict[str, Any]:
    """What the batches around the beginning of `event` (from `postmortem.examine`) were, and whether one was hard.

    They are scored by `model`, the pull's weights now, and by its last checkpoint from before the beginning: a batch
    that is hard for that is itself the matter. By neither where no rank has the whole `model` (None).
    """
    first = min(event["onset_step"], event["loss_left_step"])
    data_steps = dict(zip(event["updates"]["step"], event["updates"]["data_step"], strict=True))
    steps = [step for step in range(first - BEFORE, first + AFTER + 1) if step in data_steps]
    batches = {step: batch(pull, data_steps[step], stream, WINDOWS // max(1, len(steps)), manifest) for step in steps}
    losses, before = {}, None
    if model:
        older = [folder for folder in checkpoint.folders(pull.folder) if 0 < checkpoint.step_of(folder) < first]
        if older:
            before = f"the weights of step {checkpoint.step_of(older[-1])}"
            then = Transformer(replace(model.config, pulls=1))
            load_hugging_face_weights(then, 0, checkpoint.load(older[-1])[1])
            losses[before] = scored(then.to(model.lm_head.weight.device), batches, autocast)
        losses[f"the weights of step {event['step']}"] = scored(model, batches, autocast)
    hard = hard_batch(next(iter(losses.values()), {}))
    table = [
        {
            "step": step,
            "data_step": data_steps[step],
            "losses": {name: plain(float(found[step].mean())) for name, found in losses.items()},
        }
        for step in steps
    ]
    chosen = [step for step in ([first - 1, first] if hard is None else [hard]) if step in batches]
    ranked = [(step, window) for step in chosen for window in range(len(batches[step].ids))]
    for found in list(losses.values())[:1]:
        ranked.sort(key=lambda place: -np.nan_to_num(found[place[0]][place[1]], nan=-math.inf))
    tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    windows = []
    for step, row in ranked[:SHOWN]:
        ids, targets, numbers = batches[step]
        last = [token for token in targets[row, -1:].tolist() if token >= 0]
        number = None if numbers is None else int(numbers[row])
        windows.append(
            {
                "step": step,
                "data_step": data_steps[step],
                "window": number,
                "documents": [] if number is None else documents(data, manifest, number, stream.seq_len),
                "losses": {name: plain(float(found[step][row])) for name, found in losses.items()},
                "text": tokenizer.decode([*ids[row].tolist(), *last], skip_special_tokens=False)[:CHARACTERS],
            }
        )
    named = names(data, manifest, {number for window in windows for *_, number in window["documents"]})
    for window in windows:
        window["documents"] = [
            {"shard": shard, "document": place, "id": named.get(number)} for shard, place, number in window["documents"]
        ]
    return {"says": conclusion(table, hard, before), "hard_step": hard, "batches": table, "windows": windows}


def batch(pull: Pull, data_step: int, stream: TokenStream, most: int, manifest: dict[str, Any]) -> Batch:
    """The first windows, at most so many, of the global batch of a data step, as the pull got it."""
    n_sequences = pull.batch_tokens // stream.seq_len
    bad = faults.bad_batch(pull.planted, data_step, n_sequences, stream, manifest["vocab_size"])
    if bad:
        return Batch(bad[0][:most], bad[1][:most], None)
    windows = stream.batch_indices(data_step, n_sequences, pull.config["data_seed"])[:most]
    return Batch(*stream.windows(windows), windows)


def scored(
    model: Transformer, batches: dict[int, Batch], autocast: Callable[[], AbstractContextManager]
) -> dict[int, np.ndarray]:
    """Nats per scored token of each window (windows,) of each batch."""
    device, found = model.lm_head.weight.device, {}
    for step, (ids, targets, _) in batches.items():
        parts = []
        with autocast():
            for some in zip(ids.split(BATCH_WINDOWS), targets.split(BATCH_WINDOWS), strict=True):
                part_ids, part_targets = (x[None].to(device) for x in some)
                nats = model.token_nll(part_ids, part_targets)[0].double().sum(1)
                parts.append((nats / (part_targets[0] >= 0).sum(1)).cpu())
        found[step] = torch.cat(parts).numpy()
    return found


def hard_batch(losses: dict[int, np.ndarray]) -> int | None:
    """The update whose batch is harder than its neighbours, beyond what the scatter of their windows explains."""
    means = {step: float(found.mean()) for step, found in losses.items()}
    if len(means) < 3:
        return None
    hardest = max(means, key=lambda step: means[step])
    others = np.concatenate([found for step, found in losses.items() if step != hardest])
    middle = float(np.median(others))
    scatter = 1.4826 * float(np.median(np.abs(others - middle))) / math.sqrt(len(losses[hardest]))
    return hardest if means[hardest] - middle > max(HARD_NATS, HARD_Z * scatter) else None


def conclusion(table: list[dict[str, Any]], hard: int | None, before: str | None) -> str:
    """Whether the data is to blame, in one sentence: `hard` for the first weights of `table`.

    Weights from after the beginning can tell that a batch was hard, but not that none was: they may be damaged.
    """
    if hard is None:
        if before:
            return f"For {before} no batch here is harder than its neighbours: the documents are not what moved it."
        return "No weights that had learned something are left from before: whether a batch was hard cannot be told."
    row = next(row for row in table if row["step"] == hard)
    name = next(iter(row["losses"]))
    others = float(np.median([other["losses"][name] for other in table if other is not row]))
    return (
        f"The batch of update {hard} (data step {row['data_step']}) is hard in itself: {row['losses'][name]:.2f} nats "
        f"per token against {others:.2f} of its neighbours, for {name}. Look at its documents."
    )


def documents(data: Path, manifest: dict[str, Any], window: int, seq_len: int) -> list[tuple[str, int, int]]:
    """The documents that the tokens of a window of the train split belong to: shard, number in it and in the split."""
    low, high, before, found = window * seq_len, (window + 1) * seq_len, 0, []
    parts = zip(manifest["splits"]["train"]["shards"], shards.open_split(data, manifest, "train"), strict=True)
    for entry, (tokens, starts) in parts:
        if high > 0 and low < len(tokens):
            one = int(np.searchsorted(starts, max(0, low), side="right")) - 1
            end = int(np.searchsorted(starts, min(high, len(tokens))))
            found += [(entry["file"], place, before + place) for place in range(one, end)]
        low, high, before = low - len(tokens), high - len(tokens), before + len(starts) - 1
    return found


def names(data: Path, manifest: dict[str, Any], numbers: set[int]) -> dict[int, str]:
    """What the source calls the train split's documents of these `numbers`.

    Nothing where documents were repeated, which mixes their order, or where they are too many to look through.
    """
    import pyarrow.parquet as pq

    repeated = any(part["repeats"] != 1 for part in manifest.get("mix", []))
    if repeated or manifest["splits"]["train"]["documents"] > LOOKED_THROUGH:
        return {}
    found: dict[int, str] = {}
    number = 0
    for part in manifest.get("documents", []):
        with pq.ParquetFile(data / part["file"]) as file:
            for group in range(file.num_row_groups):
                if len(found) == len(numbers):
                    return found
                rows = file.read_row_group(group, columns=["split", "id"])
                ids = [
                    i for s, i in zip(*(rows[key].to_pylist() for key in ("split", "id")), strict=True) if s == "train"
                ]
                found |= {n: ids[n - number] for n in numbers if number <= n < number + len(ids)}
                number += len(ids)
    return found
