"""`make bench`: ratios against peers and limits, each measured in one run, alternating. Writes bench.json.

A machine's speed drifts and its neighbours come and go, so a peer is always measured between our own rounds and the
figure to read is the median of the round-by-round ratios. ratio > 1: ours is better.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import console
from data import build
from data.loader import TokenStream
from gacha import runs
from pretrain import optim
from pretrain.model import ModelConfig, Transformer
from pretrain.stability import Guard

ROUNDS = 7
SECONDS_PER_ROUND = 4.0
SIZES = {
    # vocab, d_model, n_layers, n_heads, n_kv_heads, d_ff, sequences of 256 tokens
    "1M": (2048, 128, 4, 4, 2, 352, 8),
    "10M": (8192, 320, 8, 5, 5, 864, 16),
}
SEQ_LEN = 256
LOG_EVERY = 2  # as in pretrain: what is logged is computed in these steps
HYPER: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def pull_step(stream: TokenStream, size: tuple[int, ...]) -> Callable[[int], None]:
    """One update as pretrain/pretrain.py makes it: loader, loss, clipping, guard, AdamW, and the logged statistics."""
    vocab, d_model, n_layers, n_heads, n_kv_heads, d_ff, batch = size
    model = Transformer(
        ModelConfig(vocab, d_model, n_layers, n_heads, n_kv_heads, d_ff, SEQ_LEN, False, True, 10_000.0, 1e-6)
    )
    model.init_weights(0)
    optimizers = optim.make_optimizers(model, "adamw", momentum=0.95, **HYPER)
    optim.set_learning_rate(optimizers, 1e-3)
    guard = Guard(steps=10_000)

    def step(number: int) -> None:
        ids, targets = stream.batch(number, batch, seed=0)
        probe: list[torch.Tensor] | None = [] if number % LOG_EVERY == 0 else None
        objective, nll = model.loss(ids, targets, 0.0, probe)
        objective.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert guard.observe(number, nll.item(), grad_norm.item()) is None
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if probe is not None:
            optim.update_rms(optimizers)
            max(logit.item() for logit in probe)

    return step


def llama_step(stream: TokenStream, size: tuple[int, ...]) -> Callable[[int], None]:
    """transformers' Llama of the same shape in a plain torch loop: same batches, AdamW, clipping and loss.item()."""
    vocab, d_model, n_layers, n_heads, n_kv_heads, d_ff, batch = size
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=d_model,
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            intermediate_size=d_ff,
            max_position_embeddings=SEQ_LEN,
            tie_word_embeddings=True,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, **HYPER)

    def step(number: int) -> None:
        ids, targets = stream.batch(number, batch, seed=0)
        logits = model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def rate(step: Callable[[int], None], first: int) -> tuple[float, int]:
    """Steps per second over SECONDS_PER_ROUND, and the number of the next step."""
    number, started = first, time.perf_counter()
    while time.perf_counter() - started < SECONDS_PER_ROUND:
        step(number)
        number += 1
    return (number - first) / (time.perf_counter() - started), number


def alternate(ours: Callable[[int], None], peer: Callable[[int], None]) -> tuple[float, float, float]:
    """Median steps/s of both, and the median of the ratios round by round; the first round only warms up."""
    pairs, ours_at, peer_at = [], 0, 0
    for _ in range(ROUNDS + 1):
        a, ours_at = rate(ours, ours_at)
        b, peer_at = rate(peer, peer_at)
        pairs.append((a, b))
    first, second = zip(*pairs[1:], strict=True)
    ratio = statistics.median(a / b for a, b in pairs[1:])
    return statistics.median(first), statistics.median(second), ratio


def bench_training(folder: Path) -> list[dict[str, Any]]:
    """Tokens/s of one pull against transformers' Llama, and its model FLOPs against the matmul rate; all cores."""
    entries = []
    for name, size in SIZES.items():
        out = folder / name
        config = build.BuildConfig("inquiries", out=out, documents=4000, vocab_size=size[0], baseline_tokens=0)
        with contextlib.redirect_stderr(io.StringIO()):
            manifest = build.build(config)
        stream = TokenStream(config.out, manifest, "train", SEQ_LEN)
        tokens = size[-1] * SEQ_LEN
        ours, peer, ratio = alternate(pull_step(stream, size), llama_step(stream, size))
        label = f"pretrain {name}, fp32, {torch.get_num_threads()} threads, against transformers' Llama"
        entries.append(entry(label, ours * tokens, peer * tokens, ratio, "tokens/s"))

        model = Transformer(ModelConfig(*size[:6], SEQ_LEN, False, True, 10_000.0, 1e-6))
        flops = model.flops_per_token() * tokens
        square = torch.ones(1024, 1024)

        def matmul(_: int, square: torch.Tensor = square) -> None:
            torch.mm(square, square)

        ours, limit, _ = alternate(pull_step(stream, size), matmul)
        share = ours * flops / (limit * 2 * 1024**3)
        label = f"pretrain {name}, model FLOP/s, against a 1024 x 1024 matmul"
        entries.append(entry(label, ours * flops / 1e9, limit * 2 * 1024**3 / 1e9, share, "GFLOP/s"))
    return entries


def bench_guard(step_seconds: float) -> list[dict[str, Any]]:
    """The guard's time as a share of one step of the 1M pull; its limit is 1%. ratio: limit over share."""
    guard, losses = Guard(steps=10_000), np.random.default_rng(0).normal(3.0, 0.1, 5000).tolist()
    started = time.perf_counter()
    for number, loss in enumerate(losses):
        guard.observe(number, loss, 1.0)
    share = (time.perf_counter() - started) / len(losses) / step_seconds
    return [entry("guard, share of a 1M step, against 1%", 100 * share, 1.0, 0.01 / share, "%")]


def bench_reader(folder: Path) -> list[dict[str, Any]]:
    """Rows/s of gacha/runs.py against `wandb leet inspect --json` on the same offline run."""
    import wandb

    rows = 5000
    run = wandb.init(mode="offline", dir=str(folder), settings=wandb.Settings(console="off", silent=True))
    for number in range(rows):
        run.log({f"metric/{k}": number * k for k in range(8)}, step=number)
    run.finish()
    path = next(folder.glob("wandb/offline-run-*/run-*.wandb"))
    wandb_cli = str(Path(sys.executable).with_name("wandb"))
    pairs = []
    for _ in range(3):
        started = time.perf_counter()
        assert len(runs.read(folder / "wandb")[0].history["metric/1"].value) == rows
        ours = time.perf_counter() - started
        started = time.perf_counter()
        subprocess.run([wandb_cli, "leet", "inspect", "--json", str(path)], capture_output=True, check=True)
        pairs.append((rows / ours, rows / (time.perf_counter() - started)))
    first, second = zip(*pairs, strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    label = "runs.py, reading an offline run, against wandb leet inspect"
    return [entry(label, statistics.median(first), statistics.median(second), ratio, "rows/s")]


def entry(name: str, ours: float, peer: float, ratio: float, unit: str) -> dict[str, Any]:
    print(f"{name}: {ours:,.4g} against {peer:,.4g} {unit}, ratio {ratio:.3f}", file=sys.stderr, flush=True)
    return {"name": name, "ours": round(ours, 4), "peer": round(peer, 4), "ratio": round(ratio, 4), "unit": unit}


def main() -> int:
    os.environ["WANDB_MODE"] = "offline"
    with tempfile.TemporaryDirectory() as scratch:
        entries = bench_training(Path(scratch))
        step_seconds = SIZES["1M"][-1] * SEQ_LEN / entries[0]["ours"]
        entries += bench_guard(step_seconds)
        entries += bench_reader(Path(scratch))
    # A process of its own: the crawl's benchmark forks, and torch is a lot to fork.
    done = subprocess.run([sys.executable, "bench_crawl.py", "--json"], stdout=subprocess.PIPE, check=True)
    entries += json.loads(done.stdout)
    Path("bench.json").write_text(json.dumps(entries, indent=1) + "\n")
    width = max(len(e["name"]) for e in entries)
    print(f"{'':<{width}}  {'ours':>12}  {'peer':>12}  {'ratio':>7}  unit")
    for e in entries:
        print(f"{e['name']:<{width}}  {e['ours']:>12,.2f}  {e['peer']:>12,.2f}  {e['ratio']:>7.3f}  {e['unit']}")
    return 0


if __name__ == "__main__":
    console.door(main)
