"""How much memory a pull will take, before its first step, and what would fit where that is too much.

Counted are the tensors that exist at the fullest moment of an update or a validation of the model of model.py, and the
checkpoint that is being written meanwhile.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from console import UserError
from pretrain.model import LOGIT_CHUNK, ModelConfig
from pretrain.validate import BATCH_WINDOWS

GB = 1e9
SPARE = 0.95  # of the free memory may be asked for: other programs need some too
# What allocators lose between tensors that come and go: in glibc's heap each short-lived one leaves a hole of its size
# (measured; on a GPU it was not).
HOLES = {"cpu": 2.0, "cuda": 1.1}
KEPT_HOLES = 1.2


@dataclass(frozen=True)
class Setting:
    """What of a training configuration decides its memory, beside the model's shape."""

    batch_tokens: int
    """tokens of one update of one pull on this rank"""
    micro_batch_tokens: int
    """tokens of one forward and backward pass"""
    optimizer: Literal["adamw", "muon"]
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    compiled: bool = False
    world: int = 1
    """ranks"""
    sharding: Literal["ddp", "fsdp"] = "ddp"


@dataclass(frozen=True)
class Need:
    """Bytes on one rank at the fullest moment."""

    weights: float
    optimizer: float
    gradients: float
    activations: float
    working: float
    """logits, intermediate gradients, communication"""
    checkpoint: float
    """copies in the host's memory while they are written"""

    def on(self, device: Literal["cpu", "cuda"]) -> float:
        lasting = self.weights + self.optimizer + (self.checkpoint if device == "cpu" else 0.0)
        return lasting + KEPT_HOLES * (self.gradients + self.activations) + HOLES[device] * self.working

    def __str__(self) -> str:
        parts = sorted(vars(self).items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {size / GB:.3g}" for name, size in parts if size > 0.02 * self.on("cpu"))


def predict(c: ModelConfig, s: Setting) -> Need:
    """Bytes at the fullest of three moments.

    Between the forward and the backward pass there are all activations, the head's gradients and the gradients of
    earlier micro-batches; at the update all gradients, and Muon's stacked matrices; in a validation the weights and a
    batch of windows.
    """
    d, pulls, wide = c.d_model, c.pulls, 2 if s.dtype == "bfloat16" else 4  # bytes of what autocast multiplies
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    embedding = pulls * c.vocab_size * d
    block = pulls * (d * (2 * q + 2 * kv + 3 * c.d_ff + 2) + 2 * c.head_dim * c.qk_norm)
    hidden, outside = c.n_layers * block, embedding * (1 if c.tie_embeddings else 2) + pulls * d
    share = 1 / s.world if s.sharding == "fsdp" else 1.0
    weights = gradients = 4 * share * (hidden + outside)
    moments = 4 * share * (hidden + 2 * outside if s.optimizer == "muon" else 2 * (hidden + outside))

    tokens = pulls * s.micro_batch_tokens
    chunk = min(tokens if s.device == "cuda" else s.micro_batch_tokens, LOGIT_CHUNK[s.device])  # as in HeadLoss
    block_activations = tokens * activation_bytes(c, s.dtype, s.compiled)
    activations = c.n_layers * (4 * tokens * d if c.checkpoint_activations else block_activations)
    activations += tokens * (12 * d + 32)  # the embedded tokens, what the last norm makes of them, ids and targets
    activations += 4 * tokens * c.seq_len if c.document_start is not None and s.device == "cpu" else 0  # the mask
    head = wide * tokens * d + 2 * 4 * chunk * c.vocab_size
    # A block that is computed again leaves half as many holes as it keeps (measured).
    last_block = tokens * (2 * wide * c.d_ff + 4 * d) + 1.5 * block_activations * c.checkpoint_activations
    between = 4 * embedding + max(head, last_block) + (wide * hidden if s.dtype == "bfloat16" else 0)

    earlier = gradients if s.micro_batch_tokens < s.batch_tokens else 0.0
    stack = c.n_layers * d * max(2 * c.d_ff, 2 * q + 2 * kv)  # the matrices of one shape of one pull
    # Muon's directions, and of one shape the stack, the last update, the gram matrices and Newton-Schulz's terms.
    stacks = 4 * (hidden / pulls + 6.5 * stack) if s.optimizer == "muon" else 0.0
    windows = max(1, BATCH_WINDOWS // pulls) * pulls * c.seq_len
    validation = windows * (8 * d + wide * (3 * q + 3 * c.d_ff)) + 2 * 4 * LOGIT_CHUNK[s.device] * c.vocab_size
    held, kept, working = max(
        (earlier, activations, between), (gradients, 0.0, stacks), (0.0, 0.0, validation), key=sum
    )
    if s.world > 1:  # ddp's buckets hold all gradients once more; fsdp gathers what is outside the blocks, and two
        working += gradients if s.sharding == "ddp" else 8 * (outside + 2 * block)
    return Need(weights, moments, held, kept, working, weights + moments)


def activation_bytes(c: ModelConfig, dtype: str, compiled: bool) -> float:
    """Bytes that one block keeps of one token for the backward pass.

    The residual stream twice and what the two norms make of it; the merged projections, rotated queries and keys and
    attention's result; SwiGLU's two inputs, its gate and its product. Under autocast what is multiplied is bfloat16.
    Compiled, a block computes anew what is cheap: one step of each norm, and the gate.
    """
    wide, q, kv = 2 if dtype == "bfloat16" else 4, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    stream, norms = 2 * 4 * c.d_model, 2 * ((0 if compiled else 4) + wide) * c.d_model
    attention = wide * (3 * q + 3 * kv) + (8 if wide == 2 else 4) * (q + kv) * c.qk_norm
    statistics = 4 * (2 + c.n_heads + (c.n_heads + c.n_kv_heads) * c.qk_norm)
    return stream + norms + attention + (3 if compiled else 4) * wide * c.d_ff + statistics


def check(c: ModelConfig, s: Setting) -> Need:
    """What `predict` says, once it is known to fit. Raises UserError saying in one line what would."""
    need, free, host = predict(c, s), free_bytes(s.device), free_bytes("cpu")
    if fits(c, s, free) and (s.device == "cpu" or need.checkpoint < SPARE * host):
        return need
    there = "on the GPU" if s.device == "cuda" else "of memory"
    if need.on(s.device) < SPARE * free:
        raise UserError(f"a checkpoint of this model takes {need.checkpoint / GB:.3g} GB, {host / GB:.3g} GB are free")
    found = list(remedies(c, s, free))
    advice = " or ".join(found) if found else "nothing this deep would: lower --n_layers"
    raise UserError(
        f"training needs {need.on(s.device) / GB:.3g} GB {there} ({need}), {free / GB:.3g} GB are free; "
        f"what would fit: {advice}"
    )


def fits(c: ModelConfig, s: Setting, free: float) -> bool:
    return predict(c, s).on(s.device) < SPARE * free


def remedies(c: ModelConfig, s: Setting, free: float) -> Iterator[str]:
    """What to change, the mildest first: portions of the same batch, fewer pulls, and only then a narrower model."""
    sequences = s.micro_batch_tokens // c.seq_len
    portions = [n * c.seq_len for n in range(sequences, 0, -1) if s.batch_tokens % (n * c.seq_len) == 0]
    light = replace(c, checkpoint_activations=True)
    for config, flag in ((c, ""), (light, "--checkpoint_activations ")):
        if found := next((m for m in portions if fits(config, replace(s, micro_batch_tokens=m), free)), None):
            yield f"{flag}--micro_batch_tokens {found}"
            break
    for pulls in range(c.pulls - 1, 0, -1):
        if fits(replace(c, pulls=pulls), s, free):
            yield f"{pulls} of these {c.pulls} pulls at a time"
            return
    if found is None:
        least = replace(s, micro_batch_tokens=c.seq_len)
        for heads in range(c.n_heads - 1, 0, -1):
            width, d_ff = heads * c.head_dim, c.d_ff * heads // c.n_heads
            narrow = replace(light, pulls=1, d_model=width, d_ff=d_ff, n_heads=heads, n_kv_heads=heads)
            if fits(narrow, least, free):
                smallest = f"--checkpoint_activations --micro_batch_tokens {c.seq_len}"
                yield f"{smallest} --d_model {width} --n_heads {heads} --n_kv_heads {heads} --d_ff {d_ff}"
                return


def free_bytes(device: Literal["cpu", "cuda"]) -> float:
    """Memory that this rank may still take: the GPU's, or its share of what the host or its cgroup has left.

    macOS does not say what is free: all that is there.
    """
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if sys.platform != "linux":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_here
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024 * int(meminfo["MemAvailable"].split()[0])
    return min([free, *cgroup_headrooms(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]) / ranks_here


def cgroup_headrooms(own: Path, root: Path) -> list[int]:
    """Bytes left under each limit that the process's cgroups, version 1 or 2, and their parents set.

    Pages of files that nobody has used lately do not count as taken: the kernel drops them first.
    """
    found = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / controllers
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(base):
                break
            limit, used, statistics = place / names[0], place / names[1], place / "memory.stat"
            if limit.exists() and (most := limit.read_text().strip()) != "max":
                idle = dict(line.split() for line in statistics.read_text().splitlines())[names[2]]
                found.append(int(most) - int(used.read_text()) + int(idle))
    return found
