"""Validation on fixed windows, in bits per UTF-8 byte, and sample texts."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data.loader import TokenStream
from pretrain.model import Transformer
from pretrain.ranks import ALONE, Ranks

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

    def evaluate(self, model: Transformer, team: Ranks = ALONE) -> list[dict[str, float]]:
        """For each pull val/loss and val/bpb, see `score`."""
        return self.score(model.token_nll, model.config.pulls, model.lm_head.weight.device, team)

    @torch.no_grad()
    def score(
        self, token_nll: Callable[[Tensor, Tensor], Tensor], pulls: int, device: torch.device, team: Ranks = ALONE
    ) -> list[dict[str, float]]:
        """For each pull val/loss in nats per scored token, and val/bpb in bits per UTF-8 byte of the tokens' text.

        A document's end is scored and spells nothing; its opening `<s>` is not scored. A window sees only itself.
        `token_nll` gives the nats of every target from ids and targets (pulls, batch, length). The ranks of `team` take
        turns with the batches.
        """
        nats, tokens, text_bytes = torch.zeros(pulls, dtype=torch.float64), 0, 0
        batch = max(1, BATCH_WINDOWS // pulls)
        for first in range(0, self.n_windows, team.world * batch):
            start = first + team.rank * batch
            indices = np.arange(start, min(start + batch, self.n_windows))
            ids, targets = self.stream.windows(indices if len(indices) else np.zeros(1, dtype=np.int64))
            if not len(indices):  # under fsdp every rank computes as often as the others, here nothing that counts
                targets = torch.full_like(targets, -1)
            scored = targets >= 0
            every = (x.to(device).expand(pulls, -1, -1) for x in (ids, targets))
            nats += token_nll(*every).double().sum((1, 2)).cpu()
            tokens += int(scored.sum())
            text_bytes += int(self.token_bytes[targets[scored]].sum())
        sums = torch.cat((nats, torch.tensor([tokens, text_bytes], dtype=torch.float64)))
        *each, tokens_seen, bytes_seen = team.sum_(sums.to(device)).tolist()
        return [{"val/loss": n / tokens_seen, "val/bpb": n / math.log(2) / bytes_seen} for n in each]

    def openings(self, n: int, eos_id: int) -> list[list[int]]:
        """The first tokens of the first `n` validation documents, from their `<s>`."""
        tokens = self.stream.slice(0, min(self.stream.n_tokens, 200_000))
        starts = np.flatnonzero(tokens == self.stream.bos_id)[:n]
        rows = [tokens[s : s + OPENING].tolist() for s in starts]
        return [row[: row.index(eos_id, 1)] if eos_id in row[1:] else row for row in rows]


def sample_texts(
    model: Transformer, validation: Validation, tokenizer_folder: Path, eos_id: int, seeds: list[int]
) -> list[list[tuple[str, str]]]:
    """For each pull (prompt, prompt and continuation): a document from nothing, then openings of validation documents.

    `seeds` has one for each pull.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    texts: list[list[tuple[str, str]]] = [[] for _ in seeds]
    for number, prompt in enumerate([[validation.stream.bos_id], *validation.openings(3, eos_id)]):
        each = [seed + number for seed in seeds]
        for rows, ids in zip(
            texts, model.generate(prompt, SAMPLE_TOKENS, eos_id, SAMPLE_TEMPERATURE, each), strict=True
        ):
            rows.append((tokenizer.decode(prompt), tokenizer.decode(ids)))
    return texts
