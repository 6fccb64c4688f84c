"""From token shards to a language model: one pull or many at once, from configuration to last metric.

A pull lives in OUT/[SWEEP/]RECIPE-sSEED. The same command finds it again: a killed pull resumes from its last
checkpoint and ends with the same bits as one that was never interrupted; a finished one only says so. Pulls that differ
in seeds, learning rate or weight decay alone are trained together, as one batch of models (together.py).
"""

import dataclasses
import math
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

import console
import tracking
from data import shards
from pretrain import checkpoint, faults, grid, memory, ranks
from pretrain.device import keep_freed_memory
from pretrain.model import Transformer
from pretrain.pull import EXIT_CODE, Pull, home
from pretrain.shape import micro_batch, model_config
from pretrain.stability import Guard
from pretrain.together import train_together


@dataclass(frozen=True)
class PretrainConfig:
    data: str
    """folder of token shards, made by `python -m data build`"""
    out: str = "runs"
    """folder that the pull's own folder is made in"""
    pulls: int = 1
    """pulls with seeds from `seed` on, trained together; lists do too: --seed 0..15 --lr 1e-3,3e-3, also of other seeds
    and weight_decay, and several lists are their product"""
    each: str | None = None
    """JSON Lines file with one pull a line: the seeds, lr and weight_decay in which it differs from the flags, and
    `run_id` and `sweep_params` of its W&B run; as each ends, a line about it is added to FILE.ended"""
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
    """query heads; d_model / n_heads must be even, for RoPE; 0: d_model / head_dim"""
    head_dim: int = 0
    """units of a head where n_heads is 0, for sweeps over d_model"""
    n_kv_heads: int = 2
    """key and value heads, a divisor of n_heads (grouped-query attention); 0: n_heads"""
    d_ff: int = 352
    """units of the SwiGLU layer; 0: 8/3 d_model, to the nearest 16"""
    seq_len: int = 256
    """tokens that a position can see, and are trained on together"""
    qk_norm: bool = False
    """RMSNorm on queries and keys (the checkpoint is then a Qwen3): bounds attention logits (Dehghani et al. 2023)"""
    tie_embeddings: bool = True
    """the output head is the embedding"""
    rope_theta: float = 10_000.0
    """RoPE's base"""
    norm_eps: float = 1e-6
    """epsilon of the RMSNorms"""
    z_loss: float = 0.0
    """weight of log(Z)^2 in the objective, against output logits that drift (PaLM, Chowdhery et al. 2022: 1e-4)"""
    doc_mask: bool = False
    """attention stays within a document"""
    parametrization: Literal["sp", "mup"] = "sp"
    """mup: init, lr, eps and weight_decay follow width and depth, so that what was tuned at the base size holds"""
    base_width: int = 0
    """mup: d_model at which lr was tuned"""
    base_depth: int = 0
    """mup: n_layers at which lr was tuned; 0: n_layers, no rule of depth"""
    base_head_dim: int = 0
    """mup: units of a head at which lr was tuned; 0: the model's own"""
    embedding_scale: float = 1.0
    """what embedded tokens are multiplied by; sqrt(d_model): the residual stream begins near 1 (Takase et al. 2023)"""
    init: Literal["small", "plain"] = "small"
    """small: o_proj and down_proj are drawn with std / sqrt(2 n_layers) (Takase et al. 2023); plain: as all matrices"""
    init_std: float = 0.0
    """std of initial matrices (mup: at the base size); 0: sqrt(2 / (5 d_model)) (Nguyen & Salazar 2019)"""

    tokens: int = 1_000_000
    """budget: tokens to train on, rounded down to whole batches; beyond one epoch the windows come again, reordered"""
    batch_tokens: int = 4096
    """tokens of one update, a multiple of seq_len"""
    micro_batch_tokens: int = 0
    """tokens of one forward and backward pass, whose gradients add up to the update's; 0: all of them"""
    checkpoint_activations: bool = False
    """keep only the input of each block and compute the block again in the backward pass: less memory, more time"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices by Muon, the rest by AdamW, one learning rate for both"""
    lr: float = 3e-3
    """peak learning rate"""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """warmup-stable-decay, or cosine after the warm-up"""
    warmup: float = 0.05
    """share of the budget with rising learning rate; a longer one bears higher rates (Wortsman et al. 2023)"""
    decay: float = 0.3
    """wsd: share of the budget with falling learning rate"""
    final_lr: float = 0.0
    """learning rate at the end as a share of the peak"""
    weight_decay: float = 0.1
    """decoupled, on matrices only"""
    beta1: float = 0.9
    """AdamW: decay of the first moment"""
    beta2: float = 0.95
    """AdamW: decay of the second moment; a slow one meets sudden gradients with large updates (Molybog et al. 2023)"""
    eps: float = 1e-8
    """AdamW's epsilon; where gradients are smaller than it, updates vanish without a spike (Wortsman et al. 2023)"""
    momentum: float = 0.95
    """Muon's Nesterov momentum"""
    grad_clip: float = 1.0
    """largest L2 norm of the gradient (Pascanu et al. 2013); 0: no such bound"""
    clip: Literal["fixed", "zclip", "adagc"] = "fixed"
    """fixed: by grad_clip; zclip: also by the norms so far (Kumar et al. 2025); adagc: each tensor by its own so far,
    after 100 updates by grad_clip (Wang et al. 2025)"""

    on_divergence: Literal["stop", "skip", "rewind", "lower_lr", "ignore"] = "stop"
    """stop: end the pull with status diverged; skip: leave out updates that are not finite or far out of bounds, and
    hold a learning rate that leaps; rewind: go back to a checkpoint from before it and pass over the data since
    (Chowdhery et al. 2022); lower_lr: go back likewise, and on at a lower rate; ignore: train on and only record it
    (for studies of divergence)"""
    max_retries: int = 3
    """rewind, lower_lr: times that a pull may go back before it ends as diverged"""
    retry_lr: float = 0.5
    """lower_lr: what the learning rate is multiplied by each time"""
    fault: str = ""
    """faults planted on purpose, for studies of divergence: batch@120, repeat@120, lr*50@120-139, nan@120,
    forget_moments@120, forget_count@120, restart_data@120, several with commas (faults.py says what each does)"""
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
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"
    """torchrun: ddp has the whole model on every rank, fsdp shares it out; auto: fsdp where it would crowd a GPU"""
    price_per_hour: float = 0.0
    """price of one device-hour, for cost/money"""
    currency: str = "JPY"
    """currency of price_per_hour"""
    json: bool = False
    """print the result as one JSON object"""


SEEDS = frozenset({"seed", "init_seed", "data_seed", "sample_seed"})
# Where, how often, in what portions and at what price a pull is computed and watched does not make it another recipe;
# its data enters as fingerprint.
NOT_RECIPE = SEEDS | {
    "data",
    "out",
    "pulls",
    "each",
    "head_dim",
    "micro_batch_tokens",
    "checkpoint_activations",
    "sharding",
    "val_every",
    "log_every",
    "checkpoint_every",
    "device",
    "price_per_hour",
    "currency",
    "json",
}


def main(argv: list[str], dry_run: bool = False) -> int:
    """Parse, check everything that can be checked before the first step, and pull."""
    plain, lists = grid.lists(argv)
    given = console.parse(PretrainConfig, plain, "train.py pretrain")
    asked = [(complete(c), extra) for c, extra in grid.asked(given, lists, given.pulls, given.each)]
    for c, _ in asked:
        check(c)
    manifest = check_data(asked[0][0])
    check_memory(asked[0][0], manifest, len(asked))
    if dry_run:
        records = [dataclasses.asdict(c) for c, _ in asked]
        console.print_result(records[0] if len(records) == 1 else {"pulls": records}, as_json=True)
        return 0
    return train(asked, manifest, Path(f"{given.each}.ended") if given.each else None)


def complete(c: PretrainConfig) -> PretrainConfig:
    """The configuration as one pull's record: every seed and size a number, the device a device."""
    if c.n_heads == 0 and (c.head_dim < 1 or c.d_model % c.head_dim):
        raise console.UserError(f"--n_heads 0: needs a --head_dim that divides --d_model {c.d_model}")
    n_heads = c.n_heads or c.d_model // c.head_dim
    return dataclasses.replace(
        c,
        pulls=1,
        each=None,
        init_seed=c.seed if c.init_seed is None else c.init_seed,
        data_seed=c.seed if c.data_seed is None else c.data_seed,
        sample_seed=c.seed if c.sample_seed is None else c.sample_seed,
        n_heads=n_heads,
        n_kv_heads=c.n_kv_heads or n_heads,
        d_ff=c.d_ff or max(16, round(c.d_model / 6) * 16),
        base_depth=c.base_depth or c.n_layers,
        base_head_dim=c.base_head_dim or c.d_model // max(1, n_heads),
        device=c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu",
    )


def check(c: PretrainConfig) -> None:
    """Raises UserError naming the flag that does not fit."""
    for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "seq_len", "tokens", "batch_tokens"):
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    for name in ("lr", "eps", "norm_eps", "rope_theta", "embedding_scale"):
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
    sizes = ("base_width", "base_depth", "base_head_dim")
    if not 0 < c.retry_lr < 1:
        raise console.UserError(f"--retry_lr {c.retry_lr}: must be above 0 and below 1")
    if c.max_retries < 0:
        raise console.UserError(f"--max_retries {c.max_retries}: must be 0 or more")
    for name in ("z_loss", "weight_decay", "grad_clip", "price_per_hour", "init_std", *sizes):
        if not 0 <= getattr(c, name) < math.inf:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be 0 or more")
    for name in ("seed", *sorted(SEEDS)):
        if not 0 <= getattr(c, name) < 2**63:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be from 0 to 2^63 - 1")
    if c.d_model % c.n_heads or c.d_model // c.n_heads % 2:
        raise console.UserError(f"--d_model {c.d_model} must be an even multiple of --n_heads {c.n_heads}")
    if c.n_heads % c.n_kv_heads:
        raise console.UserError(f"--n_heads {c.n_heads} must be a multiple of --n_kv_heads {c.n_kv_heads}")
    for name in ("batch_tokens", "micro_batch_tokens"):
        if getattr(c, name) % c.seq_len or getattr(c, name) < 0:
            raise console.UserError(f"--{name} {getattr(c, name)} must be a multiple of --seq_len {c.seq_len}")
    if c.tokens < c.batch_tokens:
        raise console.UserError(f"--tokens {c.tokens} is less than one batch of {c.batch_tokens}: raise it")
    faults.parse(c.fault, c.tokens // c.batch_tokens)
    if c.parametrization == "mup" and not c.base_width:
        raise console.UserError("--parametrization mup: needs --base_width, the d_model at which --lr was tuned")
    if c.compile and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise console.UserError("--compile: torch.compile needs a C++ compiler and finds none: install g++ or clang++")
    if c.device == "cuda" and not torch.cuda.is_available():
        raise console.UserError("--device cuda: torch sees no GPU here; use --device cpu or auto")


def check_data(c: PretrainConfig) -> dict[str, Any]:
    """The manifest of shards that fit the flags. Raises UserError."""
    manifest = shards.load(Path(c.data))
    for split, parts in manifest["splits"].items():
        if parts["tokens"] <= c.seq_len:
            raise console.UserError(f"{c.data}: {split} has {parts['tokens']} tokens, less than --seq_len {c.seq_len}")
    return manifest


def check_memory(c: PretrainConfig, manifest: dict[str, Any], pulls: int) -> None:
    """Raises UserError, with what would fit, where `pulls` of this shape do not fit into the device's memory."""
    config, world = model_config(c, manifest, pulls), int(os.environ.get("WORLD_SIZE", "1"))
    with torch.device("meta"):
        n_params = Transformer(config).n_params()
    share = -(-c.batch_tokens // c.seq_len // world) * c.seq_len
    memory.check(
        config,
        memory.Setting(
            batch_tokens=share,
            micro_batch_tokens=min(share, micro_batch(c, pulls) * c.seq_len),
            optimizer=c.optimizer,
            dtype=c.dtype,
            device="cuda" if c.device == "cuda" else "cpu",
            compiled=c.compile,
            world=world,
            sharding=ranks.choose(c.sharding, ranks.Ranks(0, world, c.device), n_params, pulls),
        ),
    )


def train(asked: list[tuple[PretrainConfig, dict[str, str]]], manifest: dict[str, Any], told: Path | None) -> int:
    """Every pull asked for; a line about the end of each is added to `told`.

    Returns 0 when one of them is good, 3 when all diverged, 128 + the signal that came.
    """
    keep_freed_memory()
    c = asked[0][0]
    team = ranks.start(c.device)
    team.share(c.batch_tokens // c.seq_len)
    if not team.is_first:
        os.environ["WANDB_MODE"] = "disabled"
    steps = c.tokens // c.batch_tokens
    pulls = []
    for own, extra in asked:
        config = dataclasses.asdict(own)
        recipe = tracking.recipe_hash({**config, "data_fingerprint": manifest["fingerprint"]}, leave_out=NOT_RECIPE)
        others = {name[0]: config[name] for name in sorted(SEEDS) if config[name] != own.seed}
        name = f"{recipe}-s{own.seed}" + "".join(f"-{letter}{seed}" for letter, seed in others.items())
        pull = Pull(name, recipe, config, home(c.out, name), c.batch_tokens, Guard(steps))
        pull.run_id = extra.get("run_id")
        pull.sweep_params = Path(extra["sweep_params"]) if "sweep_params" in extra else None
        pull.log_copy = Path(extra["log"]) if "log" in extra else None
        pull.told, pull.team = told, team
        pull.planted = faults.parse(own.fault, steps)
        pulls.append(pull)
    if len({pull.name for pull in pulls}) < len(pulls):
        raise console.UserError("two of the pulls are the same: each must differ in a seed, --lr or --weight_decay")
    for pull in pulls:
        pull.claim()
    team.wait()
    for pull in pulls:
        pull.look()
        if pull.result and team.is_first:
            print(f"{pull.folder} is already {pull.result['status']}: remove it to pull again", file=sys.stderr)
            pull.report_end(EXIT_CODE[pull.result["status"]])
    stop_signals: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        stop_signals.append(number)

    previous_handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        waiting, stopped = [pull for pull in pulls if not pull.result], False
        while waiting and not stopped:
            team.wait()
            groups = resumable_together(waiting)
            team.see_the_same(f"--out {c.out}", repr([(step, [pull.name for pull in group]) for step, group in groups]))
            for first_step, group in groups:
                if not team.sum_(torch.tensor([len(stop_signals)], device=c.device)):
                    train_together(group, c, manifest, first_step, stop_signals)
            stopped = bool(team.sum_(torch.tensor([len(stop_signals)], device=c.device)))
            waiting = [pull for pull in waiting if pull.went_back]
            for pull in [] if stopped else waiting:
                pull.rejoin()
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        for pull in pulls:
            pull.release()
    results = [pull.result for pull in pulls if pull.result]
    if not team.is_first or not results:
        pass
    elif len(pulls) == 1:
        console.print_result(results[0], as_json=c.json)
    elif c.json:
        console.print_result({"pulls": results}, as_json=True)
    else:
        for r in results:
            print(f"{r['name']}  {r['status']}  val/bpb {r['val/bpb']}  {r['checkpoint']}")
    sys.stdout.flush()
    team.part()
    if stop_signals:
        return 128 + stop_signals[0]
    return min(EXIT_CODE[r["status"]] for r in results)


def resumable_together(pulls: list[Pull]) -> list[tuple[int, list[Pull]]]:
    """(step to go on from, pulls): all of them from the newest step that all have saved, or else each from its own.

    A process that was killed between two pulls' saves left them a checkpoint apart. -1: from initial weights. What was
    saved before a pull went back is not on its way any more.
    """
    saved = {pull.name: set[int]() for pull in pulls}
    for pull in pulls:
        every = checkpoint.folders(pull.folder)
        last = checkpoint.retries(every[-1]) if every else 0
        saved[pull.name] = {checkpoint.step_of(f) for f in every if checkpoint.retries(f) == last} or {-1}
    if common := set.intersection(*saved.values()) if saved else set():
        return [(max(common), pulls)]
    groups: dict[int, list[Pull]] = {}
    for pull in pulls:
        groups.setdefault(max(saved[pull.name]), []).append(pull)
    return sorted(groups.items())
