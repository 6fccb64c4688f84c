"""Batches of token windows whose order depends on the seed and the global step alone.

Nothing is remembered between steps: batch k is a pure function of (seed, k), so a resumed pull, or any rank of a larger
job, asks for the same batch and gets it.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.shards import document_ids, open_split

T = TypeVar("T")
FEISTEL_ROUNDS = 4  # enough that the order looks random to statistical tests (Luby & Rackoff 1988: 3 suffice in theory)


def permuted(index: np.ndarray, n: int, key: list[int]) -> np.ndarray:
    """A keyed permutation of range(n) applied to `index` (int64), in O(1) memory whatever n is.

    A Feistel network over the next power of four, walked along its cycle until it lands below n (Black & Rogaway 2002).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)

    def scramble(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for k in keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << half) | right

    with np.errstate(over="ignore"):
        out = scramble(index.astype(np.uint64))
        while (outside := out >= n).any():
            out[outside] = scramble(out[outside])
    return out.astype(np.int64)


class TokenStream:
    """The token shards of one split as one memory-mapped sequence, cut into windows of `seq_len` predicted tokens."""

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str, seq_len: int) -> None:
        self.shards = [tokens for tokens, _ in open_split(folder, manifest, split)]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.seq_len = seq_len
        self.bos_id, self.eos_id = document_ids(manifest)
        self.n_tokens = int(self.ends[-1])

    @property
    def n_windows(self) -> int:
        return (self.n_tokens - 1) // self.seq_len

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64, across shard boundaries."""
        parts = []
        first = int(np.searchsorted(self.ends, start, side="right"))
        for shard, end in zip(self.shards[first:], self.ends[first:], strict=True):
            offset = int(end) - len(shard)
            parts.append(shard[max(0, start - offset) : stop - offset])
            if end >= stop:
                break
        return np.concatenate(parts).astype(np.int64)

    def windows(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (len(indices), seq_len) int64; a document's opening `<s>` is no target (-1).

        Unless it is also what ends the document before it.
        """
        rows = np.stack([self.slice(i * self.seq_len, (i + 1) * self.seq_len + 1) for i in indices.tolist()])
        targets = rows[:, 1:].copy()
        if self.bos_id != self.eos_id:
            targets[targets == self.bos_id] = -1
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets)

    def batch_indices(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """Window numbers of global batch `step`."""
        return self.ordered(np.arange(step * batch_size, (step + 1) * batch_size), seed)

    def ordered(self, position: np.ndarray, seed: int) -> np.ndarray:
        """Window numbers at places of the order that `seed` gives: every epoch another permutation of all windows."""
        indices = np.empty(len(position), dtype=np.int64)
        for epoch in np.unique(position // self.n_windows):
            chosen = position // self.n_windows == epoch
            indices[chosen] = permuted(position[chosen] % self.n_windows, self.n_windows, key=[seed, int(epoch)])
        return indices

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Global batch `step` of the order that `seed` gives."""
        return self.windows(self.batch_indices(step, batch_size, seed))


def ahead(make: Callable[[int], T], steps: Iterable[int]) -> Iterator[T]:
    """`make(step)` for each of `steps`, the next one made by a thread while the last is in use."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for step in steps:
            made, waiting = waiting, thread.submit(make, step)
            if made:
                yield made.result()
        if waiting:
            yield waiting.result()
