"""The configuration that all post-training stages share: one base of their dataclasses, completed and checked."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

import console


@dataclass(frozen=True, kw_only=True)
class Common:
    """The fields that all stages have; each stage adds its own and sets its own defaults."""

    model: str
    """what to start from: a run's folder, a Hugging Face folder, a PEFT adapter's, or a GGUF file"""
    data: str
    """rows to train on: .jsonl or .parquet (a glob with jsonl: or parquet: before it), or hf:NAME[:CONFIG][:SPLIT]"""
    watch_data: str | None = None
    """held-out rows {prompt, reference} that the guard looks at in training, and the best checkpoint is chosen by"""
    test_data: str | None = None
    """held-out rows measured before and after; nothing is chosen on them. Default: watch_data"""
    task: str = ""
    """name of the task, for the report"""
    out: str = "runs"
    """folder that the run's own folder is made in"""
    seed: int = 0
    """sets the three seeds below where they are not given"""
    init_seed: int | None = None
    """draws new weights: an adapter's, a value head's, random ones"""
    data_seed: int | None = None
    """orders the rows"""
    sample_seed: int | None = None
    """draws completions, in training and in evaluation"""

    epochs: float = 1.0
    """passes over the data"""
    max_steps: int = 0
    """updates; 0: as many as `epochs` are"""
    batch_size: int = 16
    """rows of one update"""
    micro_batch_size: int = 0
    """rows of one forward and backward pass on one device; 0: all of them"""
    max_length: int = 1024
    """tokens of a row, prompt and answer; longer rows are dropped, counted and told"""
    lr: float = 2e-5
    """peak learning rate"""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """learning rate after the warm-up: down to 0, held, or held and down to 0 in the last three tenths"""
    warmup: float = 0.05
    """share of the updates with rising learning rate"""
    weight_decay: float = 0.0
    """decoupled"""
    beta2: float = 0.999
    """AdamW: decay of the second moment"""
    grad_clip: float = 1.0
    """largest L2 norm of the gradient"""
    lora_rank: int = 0
    """rank of LoRA adapters on all linear layers (Hu et al. 2021); 0: all weights are trained"""
    lora_alpha: int = 0
    """scale of the adapters; 0: twice the rank"""

    on_verdict: Literal["stop", "rollback", "ignore"] = "stop"
    """when the guard says that the run is lost. stop: it ends as diverged; rollback: it ends with the weights of its
    best evaluation as its model; ignore: it goes on, and the verdict is recorded"""
    judge: str = "exact_match"
    """score of the held-out task that the guard and the best checkpoint go by: exact_match, field_accuracy or valid"""
    watch_every: int = 20
    """updates between looks at watch_data; 0: never"""
    watch_items: int = 64
    """rows of watch_data to look at"""
    test_items: int = 0
    """rows of test_data to measure; 0: all"""
    samples: int = 4
    """answers sampled at temperature 1 for each of test_data's prompts, beside the greedy one"""
    max_new_tokens: int = 256
    """tokens of a generated answer at most"""
    base_data: str | None = None
    """shards of the base's corpus, with its tokenizer: bits per byte on their val split before and after"""
    base_tokens: int = 32_768
    """tokens of that val split to read"""
    log_every: int = 1
    """updates between rows of metrics"""
    checkpoint_every: int = 50
    """updates between checkpoints that a killed run goes on from"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed precision, for GPUs"""
    price_per_hour: float = 0.0
    """price of one device-hour, for cost/money"""
    currency: str = "JPY"
    """currency of price_per_hour"""
    json: bool = False
    """print the result as one JSON object"""


SEEDS = frozenset({"seed", "init_seed", "data_seed", "sample_seed"})
# What is read enters as fingerprints, the start model apart: a recipe over seeds starts from a model of each seed.
NOT_RECIPE = SEEDS | {
    *("model", "data", "watch_data", "test_data", "base_data", "out", "json", "device", "price_per_hour", "currency"),
    *("micro_batch_size", "watch_every", "watch_items", "test_items", "base_tokens", "log_every", "checkpoint_every"),
}


def complete(c: Any) -> Any:
    """The configuration as it is recorded: every seed a number, the device a device, tests on what is watched."""
    return dataclasses.replace(
        c,
        init_seed=c.seed if c.init_seed is None else c.init_seed,
        data_seed=c.seed if c.data_seed is None else c.data_seed,
        sample_seed=c.seed if c.sample_seed is None else c.sample_seed,
        test_data=c.test_data or c.watch_data,
        lora_alpha=c.lora_alpha or 2 * c.lora_rank,
        device=c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu",
    )


def check(c: Any, judges: tuple[str, ...] = ("exact_match", "field_accuracy", "valid")) -> None:
    """Raises UserError naming the flag that does not fit. judges: scores of the stage's held-out rows."""
    for name in ("batch_size", "max_length", "max_new_tokens", "log_every", "checkpoint_every", "watch_items"):
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    for name in ("lr", "epochs"):
        if not 0 < getattr(c, name) < math.inf:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be positive")
    if not 0 <= c.warmup <= 1:
        raise console.UserError(f"--warmup {c.warmup}: is a share, from 0 to 1")
    if not 0 <= c.beta2 < 1:
        raise console.UserError(f"--beta2 {c.beta2}: must be at least 0 and below 1")
    counts = ("max_steps", "micro_batch_size", "weight_decay", "lora_rank", "lora_alpha", "grad_clip", "watch_every")
    for name in (*counts, "test_items", "samples", "base_tokens", "price_per_hour"):
        if not 0 <= getattr(c, name) < math.inf:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be 0 or more")
    for name in sorted(SEEDS, key=lambda name: name != "seed"):
        if getattr(c, name) is not None and not 0 <= getattr(c, name) < 2**32:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be from 0 to 2^32 - 1")
    if c.judge not in judges:
        raise console.UserError(f"--judge {c.judge}: choose {' or '.join(judges)}")
    if c.micro_batch_size and c.batch_size % c.micro_batch_size:
        raise console.UserError(f"--micro_batch_size {c.micro_batch_size} must divide --batch_size {c.batch_size}")
    if c.device == "cuda" and not torch.cuda.is_available():
        raise console.UserError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    if c.on_verdict == "rollback" and not (c.watch_data and c.watch_every):
        raise console.UserError("--on_verdict rollback: needs --watch_data, by which the best checkpoint is chosen")
