"""Validation on fixed windows, in bits per UTF-8 byte, and sample texts."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from data import shards
from data.loader import TokenStream
from pretrain.model import Transformer

BATCH_WINDOWS = 16  # sequences of one forward pass: small enough for any model that trains here
OPENING = 12  # tokens of a validation document that a sample continues
SAMPLE_TOKENS = 120
SAMPLE_TEMPERATURE = 0.7


class Validation:
    """The first `val_tokens` of the val split, in the same windows at every step of every pull of every recipe."""

    def __init__(self, folder: Path, manifest: dict[str, Any], val_tokens: int, seq_len: int) -> None:
        split = manifest["splits"]["val"]
        self.stream = TokenStream(folder, manifest, "val", seq_len)
        self.token_bytes = torch.from_numpy(np.load(folder / "token_bytes.npy", allow_pickle=False).astype(np.int64))
        self.n_windows = min(self.stream.n_windows, max(1, val_tokens // seq_len))
        self.is_whole_split = val_tokens >= split["tokens"]

    @torch.no_grad()
    def evaluate(self, model: Transformer) -> dict[str, float]:
        """val/loss in nats per scored token and val/bpb in bits per UTF-8 byte of the text those tokens spell.

        A document's end is scored and spells nothing; its opening `<s>` is not scored. A window sees only itself.
        """
        device = model.lm_head.weight.device
        nats, tokens, text_bytes = 0.0, 0, 0
        for start in range(0, self.n_windows, BATCH_WINDOWS):
            indices = np.arange(start, min(start + BATCH_WINDOWS, self.n_windows))
            ids, targets = self.stream.windows(indices)
            scored = targets >= 0
            nats += model.token_nll(ids.to(device), targets.to(device)).double().sum().item()
            tokens += int(scored.sum())
            text_bytes += int(self.token_bytes[targets[scored]].sum())
        return {"val/loss": nats / tokens, "val/bpb": nats / math.log(2) / text_bytes}

    def openings(self, n: int, eos_id: int) -> list[list[int]]:
        """The first tokens of the first `n` validation documents, from their `<s>`."""
        tokens = self.stream.slice(0, min(self.stream.n_tokens, 200_000))
        starts = np.flatnonzero(tokens == shards.BOS)[:n]
        rows = [tokens[s : s + OPENING].tolist() for s in starts]
        return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def sample_texts(
    model: Transformer, validation: Validation, tokenizer_folder: Path, eos_id: int, seed: int
) -> list[tuple[str, str]]:
    """(prompt, prompt and continuation): one document from nothing, then openings of validation documents."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    prompts = [[shards.BOS], *validation.openings(3, eos_id)]
    texts = []
    for number, prompt in enumerate(prompts):
        ids = model.generate(prompt, SAMPLE_TOKENS, eos_id, SAMPLE_TEMPERATURE, seed=seed + number)
        texts.append((tokenizer.decode(prompt), tokenizer.decode(ids)))
    return texts
