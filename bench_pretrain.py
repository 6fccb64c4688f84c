"""The training's part of `make bench`: `python bench_pretrain.py` measures it alone.

One pull beside transformers' Llama and the matrix product; many pulls together beside one after another; one rank
beside two; and what each trick of pretrain/README.md is worth. Peers are measured between our own rounds, on all cores;
the figure to read is the median of the round-by-round ratios. On a machine with a GPU the training is measured there.
"""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import console
from data import build, shards
from data.loader import TokenStream, ahead
from gacha import runs
from pretrain import optim
from pretrain.device import data_sheet_flops, keep_freed_memory, make_deterministic, measured_matmul_rate
from pretrain.model import HeadLoss, ModelConfig, Transformer
from pretrain.stability import Guard

DEVICE: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
SEQ_LEN = 256
SMALL = ModelConfig(2048, 128, 4, 4, 2, 352, SEQ_LEN, False, True, 10_000.0, 1e-6)
MEDIUM = ModelConfig(8192, 320, 8, 5, 5, 864, SEQ_LEN, False, True, 10_000.0, 1e-6)
BILLION = ModelConfig(32_768, 2048, 20, 16, 16, 5504, 2048, False, False, 10_000.0, 1e-6)  # 1.15B parameters, untied
SEQUENCES = {SMALL: 8, MEDIUM: 16, BILLION: 16}
LOG_EVERY = 2  # as in pretrain: what is logged is computed in these steps
TOGETHER = 8
SHORT, LONG = 200_704, 401_408  # tokens of a pull, whole batches
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1

Step = Callable[[int], Any]
Batch = Callable[[int, int, int], tuple[Tensor, Tensor]]  # of a step, a number of sequences and a seed


@dataclass(frozen=True)
class Config:
    """Training beside its peers."""

    rounds: int = 3
    """rounds of each comparison"""
    seconds: float = 3.0
    """of each side in a round"""
    json: bool = False
    """print the entries as one JSON list"""


# --- steps -----------------------------------------------------------------------------------------------------------
def pull_step(batch: Batch, config: ModelConfig, parts: int = 1, compiled: bool = False, bf16: bool = False) -> Step:
    """One update of all pulls of `config` as pretrain/together.py makes it, in `parts` micro-batches.

    Loss, gradient norms, clipping and AdamW; loss and norms are read and judged, and in every second step the logged
    statistics are computed too.
    """
    pulls = config.pulls
    model = Transformer(config)
    model.init_weights(list(range(pulls)))
    model.to(DEVICE)
    if compiled:
        model.compile_blocks()
    each = [optim.own_parameters(model, row) for row in range(pulls)]
    optimizers = [
        optim.make_optimizers(parameters, config, "adamw", betas=BETAS, eps=EPS, momentum=0.95, weight_decay=DECAY)
        for parameters in each
    ]
    guards = [Guard(steps=10_000) for _ in each]
    n_sequences = SEQUENCES[replace(config, pulls=1, document_start=None, checkpoint_activations=False)]

    def of_all(step: int) -> tuple[Tensor, Tensor]:
        found = [batch(step, n_sequences, seed) for seed in range(pulls)]
        ids, targets = (torch.stack(part) for part in zip(*found, strict=True))
        return ids, targets

    batches = ahead(of_all, range(10**9))

    def step(number: int) -> None:
        ids, targets = (part.to(DEVICE) for part in next(batches))
        counts, nll, top = (targets >= 0).sum((1, 2)), torch.zeros(pulls, device=DEVICE), None
        for part_ids, part_targets in zip(ids.chunk(parts, 1), targets.chunk(parts, 1), strict=True):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                objective, part_nll, top = model(part_ids, part_targets, 0.0, counts, number % LOG_EVERY == 0)
            objective.backward()
            nll += part_nll
        norms = optim.grad_norms(optim.parameter_norms(model))
        skipped = (~(nll.isfinite() & norms.isfinite())).float()
        for row in range(pulls):
            optim.hand_over(model, row, each[row])
            optim.clip(each[row], norms[row], 1.0)
            optim.set_learning_rate(optimizers[row], 1e-3)
            for optimizer in optimizers[row]:
                optimizer.found_inf = skipped[row]  # type: ignore[attr-defined]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if top is not None:
                optim.update_rms(optimizers[row])
        model.zero_grad(set_to_none=True)
        for guard, loss, norm in zip(guards, nll.tolist(), norms.tolist(), strict=True):
            guard.observe(number, loss, norm)

    return step


def llama_step(batch: Batch, config: ModelConfig) -> Step:
    """transformers' Llama of the same shape in a plain torch loop: same batches, AdamW, clipping and loss.item()."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            intermediate_size=config.d_ff,
            max_position_embeddings=SEQ_LEN,
            tie_word_embeddings=True,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )
    )
    model.to(DEVICE)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)

    def step(number: int) -> None:
        ids, targets = (part.to(DEVICE) for part in batch(number, SEQUENCES[config], 0))
        logits = model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def one_after_another(batch: Batch, config: ModelConfig, pulls: int) -> Step:
    """An update of each of `pulls` models of their own, in one process."""
    steps = [pull_step(batch, config) for _ in range(pulls)]

    def step(number: int) -> None:
        for one in steps:
            one(number)

    return step


# --- measuring -------------------------------------------------------------------------------------------------------
def rate(step: Step, first: int, seconds: float) -> tuple[float, int]:
    """Steps per second over `seconds`, and the number of the next step."""
    number, started = first, time.perf_counter()
    while time.perf_counter() - started < seconds:
        step(number)
        number += 1
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return (number - first) / (time.perf_counter() - started), number


def compare(c: Config, name: str, unit: str, ours: Step, peer: Step, amount: float = 1.0, peers: float = 0.0) -> dict:
    """An entry: `amount` (of the peer `peers`) a step, per second. A step that logs and one that does not warm up."""
    for number in range(LOG_EVERY):
        ours(number)
        peer(number)
    pairs, ours_at, peer_at = [], LOG_EVERY, LOG_EVERY
    for _ in range(c.rounds):
        a, ours_at = rate(ours, ours_at, c.seconds)
        b, peer_at = rate(peer, peer_at, c.seconds)
        pairs.append((a * amount, b * (peers or amount)))
    return entry(name, pairs, unit)


def entry(name: str, rounds: Sequence[tuple[float, float]], unit: str, less: bool = False) -> dict[str, Any]:
    """An entry of bench.json: the medians of our and the peer's figures, and of their ratios round by round.

    Where `less` is better the ratio is the peer's figure over ours.
    """
    mine, theirs = (statistics.median(side) for side in zip(*rounds, strict=True))
    ratio = statistics.median(b / a if less else a / b for a, b in rounds)
    print(f"{name}: {mine:,.4g} against {theirs:,.4g} {unit}, ratio {ratio:.3f}", file=sys.stderr, flush=True)
    return {
        "name": name,
        "ours": float(f"{mine:.6g}"),
        "peer": float(f"{theirs:.6g}"),
        "ratio": round(ratio, 4),
        "unit": unit,
    }


def build_shards(folder: Path, vocab_size: int) -> Batch:
    config = build.BuildConfig("inquiries", out=folder, documents=4000, vocab_size=vocab_size, baseline_tokens=0)
    with contextlib.redirect_stderr(io.StringIO()):
        manifest = build.build(config)
    return TokenStream(folder, manifest, "train", SEQ_LEN).batch


# --- what must hold --------------------------------------------------------------------------------------------------
def bench_one_pull(c: Config, small: Batch, medium: Batch) -> list[dict[str, Any]]:
    """Tokens/s of one pull against transformers' Llama, and its model FLOPs against the matrix product."""
    entries = []
    threads = f"fp32, {torch.get_num_threads()} threads"
    for label, config, batch in (("1M", SMALL, small), ("10M", MEDIUM, medium)):
        tokens = SEQUENCES[config] * SEQ_LEN
        eager, compiled, llama = (
            pull_step(batch, config),
            pull_step(batch, config, compiled=True),
            llama_step(batch, config),
        )
        name = f"pretrain {label}, {threads}, against transformers' Llama"
        entries.append(compare(c, name, "tokens/s", eager, llama, tokens))
        entries.append(compare(c, f"{name}, --compile", "tokens/s", compiled, llama, tokens))

        square = torch.ones(1024, 1024, device=DEVICE)

        def matmul(_: int, square: Tensor = square) -> None:
            torch.mm(square, square)

        flops, limit = Transformer(config).flops_per_token() * tokens / 1e9, 2 * 1024**3 / 1e9
        name = f"pretrain {label}, model FLOP/s, --compile, against a 1024 x 1024 matmul"
        entries.append(compare(c, name, "GFLOP/s", compiled, matmul, flops, limit))
    return entries


def bench_guard(c: Config, small: Batch) -> list[dict[str, Any]]:
    """The guard's time as a share of one step of the 1M pull; its limit is 1%."""
    step = pull_step(small, SMALL)
    step(0)
    step_seconds = 1 / rate(step, 1, c.seconds)[0]
    guard, losses = Guard(steps=10_000), np.random.default_rng(0).normal(3.0, 0.1, 5000).tolist()
    started = time.perf_counter()
    for number, loss in enumerate(losses):
        guard.observe(number, loss, 1.0)
    share = 100 * (time.perf_counter() - started) / len(losses) / step_seconds
    return [entry("guard, share of a 1M step, against 1%", [(share, 1.0)], "%", less=True)]


def door(out: Path, data: Path, *, ranks: int = 1, mode: str = "disabled", **flags: Any) -> float:
    """Seconds that `train.py pretrain` takes from its start to its end, on `ranks` ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    argv = [*launcher, "train.py", "pretrain", f"--data={data}", f"--out={out}"]
    argv += [f"--{name}={value}" for name, value in flags.items()]
    out.mkdir(parents=True, exist_ok=True)
    told = {**os.environ, "WANDB_MODE": mode, "WANDB_DIR": str(out), "OMP_NUM_THREADS": "1" if ranks > 1 else ""}
    told = {key: value for key, value in told.items() if value}
    started = time.perf_counter()
    done = subprocess.run(argv, env=told, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def bench_many_pulls(folder: Path, data: Path) -> list[dict[str, Any]]:
    """Tokens/s, through the door and start-up included, of 8 pulls of 1M together and one after another.

    Of the longer pulls' eight processes two are timed, and stand for all.
    """
    entries = []
    for tokens, timed in ((SHORT, TOGETHER), (LONG, 2)):
        common: dict[str, Any] = {"batch_tokens": 2048, "tokens": tokens, "val_every": 10**6, "checkpoint_every": 10**6}
        together = door(folder / f"together-{tokens}", data, pulls=TOGETHER, **common)
        alone = sum(door(folder / f"alone-{tokens}", data, seed=seed, **common) for seed in range(timed))
        pair = (TOGETHER * tokens / together, timed * tokens / alone)
        name = f"{TOGETHER} pulls of 1M together, {tokens:,} tokens each, start-up included, against a process each"
        entries.append(entry(name, [pair], "tokens/s"))
    return entries


def bench_many_on_gpu(c: Config, medium: Batch) -> dict[str, Any]:
    """Tokens/s of 16 pulls of 10M together against one alone, which is what 16 one after another reach."""
    tokens = SEQUENCES[MEDIUM] * SEQ_LEN
    many, one = pull_step(medium, replace(MEDIUM, pulls=16), bf16=True), pull_step(medium, MEDIUM, bf16=True)
    return compare(c, "16 pulls of 10M together, bf16, against one", "tokens/s", many, one, 16 * tokens, tokens)


def bench_billion(c: Config) -> list[dict[str, Any]]:
    """Model FLOP/s of a model of 1B parameters against the device's measured matmul rate and its data sheet's."""
    made = np.random.default_rng(0).integers(4, BILLION.vocab_size, (64, BILLION.seq_len + 1))
    ids, targets = (torch.from_numpy(part.copy()) for part in (made[:, :-1], made[:, 1:]))

    def batch(step: int, n_sequences: int, _: int) -> tuple[Tensor, Tensor]:
        some = np.arange(step * n_sequences, (step + 1) * n_sequences) % len(ids)
        return ids[some], targets[some]

    step = pull_step(batch, BILLION, compiled=True, bf16=True)
    for number in range(3):
        step(number)
    flops = Transformer(BILLION).flops_per_token() * SEQUENCES[BILLION] * BILLION.seq_len / 1e12
    reached = flops * rate(step, 3, 5 * c.seconds)[0]
    peaks = {"measured matmul": measured_matmul_rate(DEVICE, "bfloat16")}
    if sheet := data_sheet_flops(torch.cuda.get_device_name(), "bfloat16"):
        peaks["data sheet"] = sheet
    return [
        entry(f"pretrain 1B, bf16, --compile, model FLOP/s against the {name}", [(reached, peak / 1e12)], "TFLOP/s")
        for name, peak in peaks.items()
    ]


def bench_ranks(folder: Path, data: Path) -> list[dict[str, Any]]:
    """The largest relative difference of the loss between 1 and 2 ranks over a pull."""
    curves = []
    for ranks in (1, 2):
        out = folder / f"ranks-{ranks}"
        flags: dict[str, Any] = {
            "batch_tokens": 2048,
            "tokens": 2048 * 60,
            "lr": 2e-3,
            "log_every": 1,
            "val_every": 10**6,
        }
        door(out, data, ranks=ranks, mode="offline", device="cpu", **flags)
        curves.append(runs.read(out / "wandb")[0].history["train/loss"].value)
    apart = max(abs(a - b) / abs(a) for a, b in zip(*curves, strict=True))
    name = "loss on 1 and 2 ranks, largest relative difference in 60 steps, against 1e-5"
    return [entry(name, [(max(apart, 1e-12), 1e-5)], "1", less=True)]


# --- tricks, one at a time -------------------------------------------------------------------------------------------
def bench_tricks(c: Config, small: Batch, medium: Batch) -> list[dict[str, Any]]:
    """What each trick is worth: the same work with and without it. ratio: times as fast."""
    entries = []

    def trick(name: str, ours: Step, peer: Step) -> None:
        entries.append(compare(c, f"trick: {name}", "1/s", ours, peer))

    def backward(make: Callable[[], Tensor], *leaves: Tensor) -> Step:
        def step(_: int) -> None:
            make().backward()
            for leaf in leaves:
                leaf.grad = None

        return step

    n, d, vocab = 16 * SEQ_LEN, MEDIUM.d_model, MEDIUM.vocab_size
    hidden = torch.randn(1, n, d, device=DEVICE, requires_grad=True)
    head = (0.05 * torch.randn(vocab, d, device=DEVICE)).requires_grad_()
    targets, counts = torch.randint(0, vocab, (1, n), device=DEVICE), torch.full((1,), float(n), device=DEVICE)
    trick(
        "head and cross-entropy in chunks, gradient in the forward pass, against F.cross_entropy",
        backward(lambda: HeadLoss.apply(hidden, head, targets, counts, 0.0)[0].sum(), hidden, head),
        backward(lambda: F.cross_entropy(F.linear(hidden[0], head), targets[0]), hidden, head),
    )

    x = torch.randn(n, d, device=DEVICE, requires_grad=True)
    merged = (0.05 * torch.randn(3 * d, d, device=DEVICE)).requires_grad_()
    apart = [part.detach().clone().requires_grad_() for part in merged.split(d)]
    trick(
        "q, k, v merged, against three products",
        backward(lambda: F.linear(x, merged).sum(), x, merged),
        backward(lambda: torch.stack([F.linear(x, part).sum() for part in apart]).sum(), x, *apart),
    )

    masked = replace(MEDIUM, document_start=shards.BOS)
    trick("--doc_mask, against none", pull_step(medium, masked), pull_step(medium, MEDIUM))
    light = replace(MEDIUM, checkpoint_activations=True)
    trick("--checkpoint_activations, against none", pull_step(medium, light), pull_step(medium, MEDIUM))

    eight = replace(SMALL, pulls=TOGETHER)
    alone = one_after_another(small, SMALL, TOGETHER)
    trick(f"{TOGETHER} pulls of 1M in one batch, against one by one in one process", pull_step(small, eight), alone)
    trick(
        f"{TOGETHER} pulls of 1M in micro-batches of 512 tokens, against one by one in one process",
        pull_step(small, eight, parts=4),
        alone,
    )

    model = Transformer(MEDIUM).to(DEVICE)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    own = dict(model.named_parameters())
    trick(
        "gradient norm and clipping, against clip_grad_norm_",
        lambda _: optim.clip(own, optim.grad_norms(optim.parameter_norms(model))[0], 1.0),
        lambda _: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    )
    fused = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    plain = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=True)
    trick("fused AdamW, against foreach", lambda _: fused.step(), lambda _: plain.step())

    def computing(batches: Any) -> Step:
        def step(_: int) -> None:
            next(batches)
            torch.mm(head[:1024], head.T)  # some 30 ms on a core, while which the next batch can be made

        return step

    made = (medium(step, 64, 0) for step in range(10**9))
    early = ahead(lambda step: medium(step, 64, 0), range(10**9))
    with torch.no_grad():
        trick("batches made ahead by a thread, beside a product of 30 ms", computing(early), computing(made))
    return entries


def main() -> int:
    c = console.parse(Config, sys.argv[1:], "python bench_pretrain.py")
    keep_freed_memory()
    make_deterministic(DEVICE, 0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        small, medium = build_shards(folder / "2k", SMALL.vocab_size), build_shards(folder / "8k", MEDIUM.vocab_size)
        entries = bench_one_pull(c, small, medium)
        entries += bench_guard(c, small)
        entries += bench_many_pulls(folder, folder / "2k")
        entries += [bench_many_on_gpu(c, medium), *bench_billion(c)] if DEVICE == "cuda" else []
        entries += bench_ranks(folder, folder / "2k")
        entries += bench_tricks(c, small, medium)
    if c.json:
        print(json.dumps(entries, ensure_ascii=False))
        return 0
    width = max(len(one["name"]) for one in entries)
    for one in entries:
        print(
            f"{one['name']:<{width}}  {one['ours']:>12,.6g}  {one['peer']:>12,.6g}  {one['ratio']:>8.3f}  {one['unit']}"
        )
    return 0


if __name__ == "__main__":
    console.door(main)
