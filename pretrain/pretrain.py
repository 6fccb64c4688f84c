"""From token shards to a language model: one pull, from configuration to last metric.

The pull lives in OUT/[SWEEP/]RECIPE-sSEED. The same command finds it again: a killed pull resumes from its last
checkpoint and ends with the same bits as one that was never interrupted; a finished one only says so.
"""

import dataclasses
import fcntl
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

import console
import tracking
from data import shards
from data.loader import TokenStream
from pretrain import checkpoint, optim
from pretrain.device import make_deterministic, measured_matmul_rate, size_name
from pretrain.model import ModelConfig, Transformer
from pretrain.progress import Progress
from pretrain.stability import Guard, Verdict
from pretrain.validate import Validation, sample_texts


@dataclass(frozen=True)
class PretrainConfig:
    data: str
    """folder of token shards, made by `python -m data build`"""
    out: str = "runs"
    """folder that the pull's own folder is made in"""
    seed: int = 0
    """sets the three seeds below where they are not given"""
    init_seed: int | None = None
    """draws the initial weights"""
    data_seed: int | None = None
    """orders the training windows"""
    sample_seed: int | None = None
    """draws the sample texts at the end"""

    d_model: int = 128
    """width: units of the residual stream"""
    n_layers: int = 4
    """blocks"""
    n_heads: int = 4
    """query heads; d_model / n_heads must be even, for RoPE"""
    n_kv_heads: int = 2
    """key and value heads, a divisor of n_heads (grouped-query attention)"""
    d_ff: int = 352
    """units of the SwiGLU layer"""
    seq_len: int = 256
    """tokens that a position can see, and are trained on together"""
    qk_norm: bool = False
    """RMSNorm on queries and keys (the checkpoint is then a Qwen3)"""
    tie_embeddings: bool = True
    """the output head is the embedding"""
    rope_theta: float = 10_000.0
    """RoPE's base"""
    norm_eps: float = 1e-6
    """epsilon of the RMSNorms"""
    z_loss: float = 0.0
    """weight of log(Z)^2 in the objective (PaLM: 1e-4)"""

    tokens: int = 1_000_000
    """budget: tokens to train on, rounded down to whole batches; beyond one epoch the windows come again, reordered"""
    batch_tokens: int = 4096
    """tokens of one update, a multiple of seq_len"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices by Muon, the rest by AdamW, one learning rate for both"""
    lr: float = 3e-3
    """peak learning rate"""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """warmup-stable-decay, or cosine after the warm-up"""
    warmup: float = 0.05
    """share of the budget with rising learning rate"""
    decay: float = 0.3
    """wsd: share of the budget with falling learning rate"""
    final_lr: float = 0.0
    """learning rate at the end as a share of the peak"""
    weight_decay: float = 0.1
    """decoupled, on matrices only"""
    beta1: float = 0.9
    """AdamW: decay of the first moment"""
    beta2: float = 0.95
    """AdamW: decay of the second moment"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    momentum: float = 0.95
    """Muon's Nesterov momentum"""
    grad_clip: float = 1.0
    """largest L2 norm of the gradient; 0: no clipping"""

    on_divergence: Literal["stop", "ignore"] = "stop"
    """stop: end the pull with status diverged; ignore: train on and only record it (for studies of divergence)"""
    val_tokens: int = 131_072
    """validation tokens, the first of the val split; the whole split if it has fewer"""
    val_every: int = 50
    """updates between validations; the last update always has one"""
    log_every: int = 2
    """updates between rows of metrics"""
    checkpoint_every: int = 50
    """updates between checkpoints"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast over float32 weights; for GPUs, and CPUs that compute in it"""
    compile: bool = False
    """torch.compile the decoder: needs a C++ compiler, half a minute, and pays on long pulls"""
    price_per_hour: float = 0.0
    """price of one device-hour, for cost/money"""
    currency: str = "JPY"
    """currency of price_per_hour"""
    json: bool = False
    """print the result as one JSON object"""


SEEDS = frozenset({"seed", "init_seed", "data_seed", "sample_seed"})
# Where, how often and at what price a pull is watched does not make it another recipe; its data enters as fingerprint.
NOT_RECIPE = SEEDS | {
    "data",
    "out",
    "val_every",
    "log_every",
    "checkpoint_every",
    "device",
    "price_per_hour",
    "currency",
}
NOT_RECIPE |= {"json"}
EXIT_CODE = {"ok": 0, "spiked": 0, "diverged": console.EXIT_DIVERGED}


def main(argv: list[str], dry_run: bool = False) -> int:
    """Parse, check everything that can be checked before the first step, and pull."""
    config = console.parse(PretrainConfig, argv, "train.py pretrain")
    manifest = check(config)
    if dry_run:
        console.print_result(resolved(config), as_json=True)
        return 0
    return train(config, manifest)


def resolved(c: PretrainConfig) -> dict[str, Any]:
    """The configuration as it is recorded: every seed a number, the device a device."""
    seeds = {name: c.seed if getattr(c, name) is None else getattr(c, name) for name in SEEDS}
    device = c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return {**dataclasses.asdict(c), **seeds, "device": device}


def check(c: PretrainConfig) -> dict[str, Any]:
    """The data manifest, once flags and inputs are known to fit together. Raises UserError naming what does not."""
    for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "seq_len", "tokens", "batch_tokens"):
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    for name in ("lr", "eps", "norm_eps", "rope_theta"):
        if not 0 < getattr(c, name) < math.inf:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be positive")
    for name in ("val_tokens", "val_every", "log_every", "checkpoint_every"):
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    for name in ("warmup", "decay", "final_lr"):
        if not 0 <= getattr(c, name) <= 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: is a share, from 0 to 1")
    for name in ("beta1", "beta2", "momentum"):
        if not 0 <= getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 0 and below 1")
    for name in ("z_loss", "weight_decay", "grad_clip", "price_per_hour"):
        if not 0 <= getattr(c, name) < math.inf:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be 0 or more")
    config = resolved(c)
    for name in ("seed", *sorted(SEEDS)):
        if not 0 <= config[name] < 2**63:
            raise console.UserError(f"--{name} {config[name]}: must be from 0 to 2^63 - 1")
    if c.d_model % c.n_heads or c.d_model // c.n_heads % 2:
        raise console.UserError(f"--d_model {c.d_model} must be an even multiple of --n_heads {c.n_heads}")
    if c.n_heads % c.n_kv_heads:
        raise console.UserError(f"--n_heads {c.n_heads} must be a multiple of --n_kv_heads {c.n_kv_heads}")
    if c.batch_tokens % c.seq_len:
        raise console.UserError(f"--batch_tokens {c.batch_tokens} must be a multiple of --seq_len {c.seq_len}")
    if c.tokens < c.batch_tokens:
        raise console.UserError(f"--tokens {c.tokens} is less than one batch of {c.batch_tokens}: raise it")
    if c.device == "cuda" and not torch.cuda.is_available():
        raise console.UserError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    manifest = shards.load(Path(c.data))
    for split, parts in manifest["splits"].items():
        if parts["tokens"] <= c.seq_len:
            raise console.UserError(f"{c.data}: {split} has {parts['tokens']} tokens, less than --seq_len {c.seq_len}")
    return manifest


def train(c: PretrainConfig, manifest: dict[str, Any]) -> int:
    """One pull. Returns its exit code: 0 done, 3 diverged, 143 or 130 stopped by a signal with everything saved."""
    config = resolved(c)
    device, init_seed, data_seed = config["device"], config["init_seed"], config["data_seed"]
    recipe = tracking.recipe_hash({**config, "data_fingerprint": manifest["fingerprint"]}, leave_out=NOT_RECIPE)
    others = {name[0]: config[name] for name in sorted(SEEDS) if config[name] != c.seed}
    name = f"{recipe}-s{c.seed}" + "".join(f"-{letter}{seed}" for letter, seed in others.items())
    pull = Path(c.out) / os.environ.get("WANDB_SWEEP_ID", "") / name
    try:
        pull.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise console.UserError(f"--out {c.out}: no folder can be made there ({error.strerror})") from None
    lock = (pull / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise console.UserError(f"{pull} is being trained by another process: wait for it, or change --out") from None
    if (pull / "result.json").is_file():
        result = json.loads((pull / "result.json").read_bytes())
        print(f"{pull} is already {result['status']}: remove it to pull again", file=sys.stderr)
        console.print_result(result, as_json=c.json)
        return EXIT_CODE[result["status"]]

    make_deterministic(device, init_seed)
    model_config = ModelConfig(
        vocab_size=manifest["vocab_size"],
        **{f.name: getattr(c, f.name) for f in dataclasses.fields(ModelConfig) if f.name != "vocab_size"},
    )
    model = Transformer(model_config)
    model.init_weights(init_seed)
    model.to(device)
    optimizers = optim.make_optimizers(
        model,
        c.optimizer,
        betas=(c.beta1, c.beta2),
        eps=c.eps,
        momentum=c.momentum,
        weight_decay=c.weight_decay,
    )
    steps = c.tokens // c.batch_tokens
    guard, start_step, seconds_before, run_id = Guard(steps), 0, 0.0, None
    if saved := checkpoint.folders(pull):
        state = checkpoint.load(saved[-1], model, optimizers)
        guard, start_step, run_id = Guard(**state["guard"]), state["step"], state["run_id"]
        seconds_before = state["seconds"]
        torch.set_num_threads(state["threads"])  # sums are split by thread: another number would change the last bits
        print(f"resuming {pull} from step {start_step}", file=sys.stderr)
    if c.compile:
        model.model.compile()

    folder = Path(c.data)
    bos_id, eos_id = shards.BOS, shards.EOS
    train_tokens = TokenStream(folder, manifest, "train", c.seq_len)
    validation = Validation(folder, manifest, c.val_tokens, c.seq_len)
    peak_flops = measured_matmul_rate(device, c.dtype)
    flops_per_token = model.flops_per_token()

    tracker = tracking.start(
        "pretrain",
        config,
        name=name,
        recipe=recipe,
        tags=[f"size:{size_name(model.n_params())}", f"data:{manifest['fingerprint']}"],
        x_axis="tokens",
        run_id=run_id,
        lineage={
            "shards": manifest["fingerprint"],
            "tokenizer": manifest["tokenizer"]["sha256"],
            "source": manifest["source"],
        },
        hardware=torch.cuda.get_device_name() if device == "cuda" else None,
    )
    tracker.use_artifact(f"shards-{manifest['fingerprint']}:latest")
    baseline = manifest.get("baseline") if validation.is_whole_split else None
    if baseline:
        tracker.summary({"baseline/kn5_bpb": baseline["val_bpb"]})
    progress = Progress(pull / "train.log", steps, start_step, c.batch_tokens)
    progress.say(
        f"{name}: {model.n_params():,} parameters, {steps:,} steps of {c.batch_tokens:,} tokens "
        f"({steps * c.batch_tokens / train_tokens.n_tokens:.2f} epochs), on {device}, "
        f"W&B run {tracker.id} ({tracker.mode})"
    )

    stop_signal = 0

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal stop_signal
        stop_signal = number

    previous_handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    step, val, diverged_at = start_step, None, -1
    verdict: Verdict | None = None
    saved_step = start_step if saved else -1
    started = time.perf_counter()

    def seconds() -> float:
        return seconds_before + time.perf_counter() - started

    def costs() -> dict[str, float]:
        return {
            "cost/flops": flops_per_token * step * c.batch_tokens,
            "cost/device_seconds": seconds(),
            "cost/money": seconds() / 3600 * c.price_per_hour,
        }

    def save() -> None:
        nonlocal saved_step
        state = {
            "step": step,
            "tokens": step * c.batch_tokens,
            "guard": guard.state(),
            "loader": {"data_seed": data_seed, "next_step": step, "shards": manifest["fingerprint"]},
            "seconds": seconds(),
            "threads": torch.get_num_threads(),
            "run_id": tracker.id,
            "config": config,
            "bos_id": bos_id,
            "eos_id": eos_id,
        }
        checkpoint.save(pull, model, optimizers, state, folder / "tokenizer", keep_step=guard.keep_before)
        saved_step = step

    def tell(verdict: Verdict, tokens: int) -> None:
        progress.say(str(verdict))
        tracker.alert("diverged", f"{name}: {verdict}")
        tracker.summary({"diverged_at_tokens": tokens, "verdict": str(verdict)})

    status, exit_code = "crashed", 1
    try:
        if saved_step < 0:
            save()  # a pull that is lost in its first steps leaves its initial weights, and a killed one its run id
        while step < steps and not stop_signal:
            step_started = time.perf_counter()
            last = step + 1 == steps
            logs = (step + 1) % c.log_every == 0 or last
            lr = optim.learning_rate(
                step,
                steps,
                schedule=c.schedule,
                peak=c.lr,
                warmup=c.warmup,
                decay=c.decay,
                final=c.final_lr,
            )
            optim.set_learning_rate(optimizers, lr)
            ids, targets = train_tokens.batch(step, c.batch_tokens // c.seq_len, data_seed)
            probe: list[Tensor] | None = [] if logs else None
            with torch.autocast(device, torch.bfloat16, enabled=c.dtype == "bfloat16"):
                objective, nll = model.loss(ids.to(device), targets.to(device), c.z_loss, probe)
            objective.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
            loss = nll.item()
            verdict = guard.observe(step, loss, grad_norm.item()) or verdict
            if verdict and diverged_at < 0:
                diverged_at = step * c.batch_tokens
                tell(verdict, diverged_at)
            if verdict and c.on_divergence == "stop":
                row = {"tokens": step * c.batch_tokens, "step": step + 1, "train/loss": loss, "train/lr": lr}
                row |= {"stability/grad_norm": grad_norm.item(), "stability/loss_z": guard.loss_z}
                tracker.log(row, step=step + 1)
                break
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            step_seconds = time.perf_counter() - step_started
            rate = c.batch_tokens / step_seconds
            row = {"tokens": step * c.batch_tokens, "step": step}
            if logs:
                row |= {
                    "train/loss": loss,
                    "train/lr": lr,
                    "stability/grad_norm": grad_norm.item(),
                    "stability/loss_z": guard.loss_z,
                    "stability/max_attn_logit": max(logit.item() for logit in probe or []),
                    "stability/update_rms": optim.update_rms(optimizers),
                    "perf/tokens_per_second": rate,
                    "perf/step_seconds": step_seconds,
                    "perf/mfu": flops_per_token * rate / peak_flops,
                }
            if step % c.val_every == 0 or last:
                val = validation.evaluate(model)
                row |= val
            if len(row) > 2:
                tracker.log(row, step=step)
            progress.update(step, loss, val["val/bpb"] if val else None, rate, guard.status)
            if step % c.checkpoint_every == 0 or last:
                save()
        if step == steps and diverged_at < 0 and (verdict := guard.at_the_end(step)):
            diverged_at = step * c.batch_tokens
            tell(verdict, diverged_at)
        if verdict and (c.on_divergence == "stop" or step == steps):
            status = "diverged"
            if c.on_divergence == "stop":
                checkpoint.drop_since(pull, verdict.onset_step)
        elif step < steps:
            status = "stopped"
            exit_code = 128 + stop_signal
            if saved_step != step:
                save()
            tracker.mark_preempting()
            progress.say(
                f"stopped by {signal.Signals(stop_signal).name} at step {step}, saved: the same command resumes"
            )
        else:
            status = "spiked" if guard.spikes else "ok"
            if val is None:  # killed between its last checkpoint and its end
                val = validation.evaluate(model)
                tracker.log({"tokens": step * c.batch_tokens, "step": step, **val}, step=step + 1)
            texts = sample_texts(model, validation, folder / "tokenizer", eos_id, config["sample_seed"])
            rows = [[step, step * c.batch_tokens, prompt, text] for prompt, text in texts]
            tracker.table("samples", ["step", "tokens", "prompt", "text"], rows, step=step)
            tracker.artifact(f"model-{name}", "model", [checkpoint.folders(pull)[-1]], {"step": step, **val})
        exit_code = EXIT_CODE.get(status, exit_code)
    except OSError as refusal:
        if refusal.errno in console.MACHINE_SAYS_NO:
            status, exit_code = "stopped", console.EXIT_USER
            kept_step = f"the last checkpoint is step {saved_step}" if saved_step >= 0 else "nothing was saved yet"
            progress.say(f"stopped at step {step} ({refusal.strerror}); {kept_step}")
        raise
    finally:
        progress.close()
        # val/loss is left alone: W&B keeps its minimum there.
        final = {"val/bpb": val["val/bpb"]} if val else {}
        spent = costs()
        tracker.summary({"status": status, "tokens": step * c.batch_tokens, **final, **spent})
        tracker.finish(exit_code)
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    kept = checkpoint.folders(pull)
    result = {
        "name": name,
        "status": status,
        "val/bpb": val["val/bpb"] if val and math.isfinite(val["val/bpb"]) else None,
        **({"baseline/kn5_bpb": baseline["val_bpb"]} if baseline else {}),
        "tokens": step * c.batch_tokens,
        "device_seconds": round(spent["cost/device_seconds"], 1),
        "tokens_per_second": round(
            (step - start_step) * c.batch_tokens / max(1e-9, spent["cost/device_seconds"] - seconds_before)
        ),
        "checkpoint": str(kept[-1]) if kept else None,
        "run_id": tracker.id,
    }
    if status in EXIT_CODE:
        console.write_atomic(pull / "result.json", json.dumps(result, ensure_ascii=False).encode())
    console.print_result(result, as_json=c.json)
    return exit_code
