"""Does tuning wreck the base? Bits per byte of the base's own corpus, before and after."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import console
from data import shards
from data.loader import TokenStream

BPB_WINDOW = 256  # tokens


@torch.no_grad()
def base_bpb(model: Any, folder: str, tokens: int) -> float:
    """Bits per byte of the val split of shards, in windows of BPB_WINDOW tokens: does tuning wreck the base?"""
    manifest = shards.load(Path(folder))
    if model.get_input_embeddings().num_embeddings < manifest["vocab_size"]:
        raise console.UserError(
            f"--base_data {folder}: its vocabulary is not the model's: build it with the model's own"
        )
    stream = TokenStream(Path(folder), manifest, "val", BPB_WINDOW)
    sizes = torch.from_numpy(np.load(Path(folder) / "token_bytes.npy").astype(np.int64))
    windows = max(1, min(stream.n_windows, tokens // BPB_WINDOW))
    nats, size, device, training = 0.0, 0, next(model.parameters()).device, model.training
    model.eval()
    for at in range(0, windows, 16):
        ids, targets = stream.windows(np.arange(at, min(at + 16, windows)))
        logits = model(input_ids=ids.to(device)).logits.float().flatten(0, 1)
        nats += float(F.cross_entropy(logits, targets.to(device).flatten(), ignore_index=-1, reduction="sum"))
        size += int(sizes[targets[targets >= 0]].sum())
    model.train(training)
    return nats / size / math.log(2)
