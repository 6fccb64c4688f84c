"""From a published model to one that knows a domain: continued pretraining, with forgetting in view.

Any causal LM of transformers goes on learning from the domain's shards while a share of each batch replays general
text; `val/bpb` on both, from before the first step, shows what is won and what it costs. As in pretraining the same
command finds its pull in OUT/[SWEEP/]RECIPE-sSEED again, and a killed one ends with the same bits.
"""

import dataclasses
import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

import console
import tracking
from data import fertility, shards, tokenizer
from pretrain import causal_lm, embeddings
from pretrain.adapt import Inputs, adapt
from pretrain.pull import EXIT_CODE, Pull, home
from pretrain.stability import Guard


@dataclass(frozen=True)
class ContinueConfig:
    model: str
    """folder of a Hugging Face causal LM (safetensors), folder of a pull, or a GGUF file, which is dequantized"""
    data: str
    """shards of the domain, made by `python -m data build --tokenizer` with the model's own tokenizer"""
    general: str | None = None
    """shards of general text with the same tokenizer: its val split measures what is forgotten, its train split is
    replayed"""
    replay: float | None = None
    """share of each batch that is general text; default 0.25 with --general (Ibrahim et al. 2024: 5% holds against a
    near domain, 25% against another language), 0 only measures it"""
    tokenizer: str | None = None
    """tokenizer extended by `python -m data extend`, which the shards were built with: new rows start at the mean of
    their old pieces'"""
    out: str = "runs"
    """folder that the pull's own folder is made in"""
    seed: int = 0
    """sets the seed below where it is not given"""
    data_seed: int | None = None
    """orders the training windows; nothing else is drawn"""

    seq_len: int = 1024
    """tokens that a position can see, and are trained on together"""
    tokens: int = 10_000_000
    """budget: tokens to train on, replayed ones included, rounded down to whole batches"""
    batch_tokens: int = 32_768
    """tokens of one update, a multiple of seq_len"""
    micro_batch_tokens: int = 0
    """tokens of one forward and backward pass, a multiple of seq_len; 0: the whole batch"""
    lr: float = 5e-5
    """peak learning rate. Warmed up anew, since the optimizer starts without moments; a tenth or so of what models
    of 0.1 to 10B were trained at: near their peak a domain is learned faster and the rest forgotten faster"""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """warmup-stable-decay, or cosine after the warm-up"""
    warmup: float = 0.1
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
    grad_clip: float = 1.0
    """largest L2 norm of the gradient; 0: no clipping"""

    on_divergence: Literal["stop", "ignore"] = "stop"
    """stop: end the pull with status diverged; ignore: train on and only record it"""
    val_tokens: int = 131_072
    """validation tokens of each val split, the first ones; the whole split if it has fewer"""
    val_every: int = 50
    """updates between validations; before the first update and after the last there always is one"""
    log_every: int = 2
    """updates between rows of metrics"""
    checkpoint_every: int = 100
    """updates between checkpoints, which hold the weights three times: themselves and AdamW's two moments"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast over float32 weights; for GPUs, and CPUs that compute in it"""
    price_per_hour: float = 0.0
    """price of one device-hour, for cost/money"""
    currency: str = "JPY"
    """currency of price_per_hour"""
    json: bool = False
    """print the result as one JSON object"""


# As in pretraining; the model, its data and its tokenizer enter the recipe as fingerprints.
NOT_RECIPE = frozenset(
    {"seed", "data_seed", "model", "data", "general", "tokenizer", "out", "val_every", "log_every", "checkpoint_every"}
    | {"micro_batch_tokens", "device", "price_per_hour", "currency", "json"}
)


def main(argv: list[str], dry_run: bool = False) -> int:
    """Parse, check everything that can be checked before the model is loaded, and train."""
    c = complete(console.parse(ContinueConfig, argv, "train.py continue"))
    inputs = check(c)
    if dry_run:
        console.print_result(dataclasses.asdict(c), as_json=True)
        return 0
    return run(c, inputs)


def complete(c: ContinueConfig) -> ContinueConfig:
    """The configuration as it is recorded: every default a number, the device a device."""
    return dataclasses.replace(
        c,
        replay=(0.25 if c.general else 0.0) if c.replay is None else c.replay,
        data_seed=c.seed if c.data_seed is None else c.data_seed,
        device=c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu",
    )


def check(c: ContinueConfig) -> Inputs:
    """Raises UserError naming the flag, the folder or the vocabulary that does not fit."""
    for name in ("seq_len", "tokens", "batch_tokens", "val_tokens", "val_every", "log_every", "checkpoint_every"):
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    for name in ("lr", "eps"):
        if not 0 < getattr(c, name) < math.inf:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be positive")
    for name in ("warmup", "decay", "final_lr"):
        if not 0 <= getattr(c, name) <= 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: is a share, from 0 to 1")
    for name in ("beta1", "beta2", "replay"):
        if not 0 <= getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 0 and below 1")
    for name in ("weight_decay", "grad_clip", "price_per_hour", "micro_batch_tokens"):
        if not 0 <= getattr(c, name) < math.inf:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be 0 or more")
    for name in ("seed", "data_seed"):
        if not 0 <= getattr(c, name) < 2**63:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be from 0 to 2^63 - 1")
    for name in ("batch_tokens", "micro_batch_tokens"):
        if getattr(c, name) % c.seq_len:
            raise console.UserError(f"--{name} {getattr(c, name)} must be a multiple of --seq_len {c.seq_len}")
    if c.tokens < c.batch_tokens:
        raise console.UserError(f"--tokens {c.tokens} is less than one batch of {c.batch_tokens}: raise it")
    if c.device == "cuda" and not torch.cuda.is_available():
        raise console.UserError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    if c.replay and not c.general:
        raise console.UserError(f"--replay {c.replay}: needs --general, the shards that are replayed")
    domain = open_shards(c.data, c.seq_len)
    general = open_shards(c.general, c.seq_len) if c.general else None
    if general and general["tokenizer"]["sha256"] != domain["tokenizer"]["sha256"]:
        raise console.UserError(
            f"--general {c.general} was built with another tokenizer than --data {c.data}: build it with "
            f"`python -m data build --tokenizer {c.data}`"
        )
    model = causal_lm.find(c.model)
    limit, pieces, encode = read_vocabulary(model)
    if limit is not None and c.seq_len > limit:
        raise console.UserError(f"--seq_len {c.seq_len}: {model} reads at most {limit} tokens")
    ours = fertility.open_encoder(str(Path(c.data) / "tokenizer"))
    new_pieces = None
    if c.tokenizer:
        new_pieces = embeddings.read_listing(fertility.locate(c.tokenizer).parent)
        if fertility.open_encoder(c.tokenizer).pieces != ours.pieces:
            raise console.UserError(
                f"--data {c.data} was built with another tokenizer than {c.tokenizer}: build it anew"
            )
    size = new_pieces[0] if new_pieces else len(ours.pieces)
    if len(pieces) < size or any(a != b for a, b in zip(pieces, ours.pieces, strict=False) if a and b):
        raise console.UserError(
            f"--data {c.data} was not built with the tokenizer of {model}: build it with "
            f"`python -m data build --tokenizer {model}`, or give an extended one as --tokenizer"
        )
    if encode and not new_pieces and any(encode([text]) != ours.encode([text]) for text in tokenizer.PROBES):
        raise console.UserError(
            f"--data {c.data}: its tokenizer cuts texts otherwise than that of {model}: build it anew"
        )
    return Inputs(model, domain, general, new_pieces)


def open_shards(folder: str, seq_len: int) -> dict[str, Any]:
    """The manifest of shards with a window in either split. Raises UserError."""
    manifest = shards.load(Path(folder))
    for split, parts in manifest["splits"].items():
        if parts["tokens"] <= seq_len:
            raise console.UserError(f"{folder}: {split} has {parts['tokens']} tokens, less than --seq_len {seq_len}")
    return manifest


def read_vocabulary(model: Path) -> tuple[int | None, list[bytes | None], Any]:
    """How many positions the model reads, the text of each id, and its tokenizer's encode (None for a GGUF file)."""
    if model.is_file():
        return *causal_lm.gguf_facts(model), None
    encoder = fertility.open_encoder(str(model))
    return causal_lm.max_positions(model), encoder.pieces, encoder.encode


def run(c: ContinueConfig, inputs: Inputs) -> int:
    """One pull. Returns its exit code: 0 done, 3 diverged, 143 or 130 stopped by a signal with everything saved."""
    config = dataclasses.asdict(c)
    lineage = {
        "model": causal_lm.fingerprint(inputs.model),
        "shards": inputs.domain["fingerprint"],
        "general": inputs.general["fingerprint"] if inputs.general else None,
        "tokenizer": inputs.domain["tokenizer"]["sha256"],
        "source": inputs.domain["source"],
    }
    fed = {f"{key}_fingerprint": value for key, value in lineage.items() if key != "source"}
    fed["extended"] = inputs.new_pieces is not None
    recipe = tracking.recipe_hash({"stage": "continue", **config, **fed}, leave_out=NOT_RECIPE)
    name = f"{recipe}-s{c.seed}" + (f"-d{c.data_seed}" if c.data_seed != c.seed else "")
    pull = Pull(name, recipe, config, home(c.out, name), c.batch_tokens, Guard(c.tokens // c.batch_tokens))
    pull.claim()
    pull.look()
    if pull.result:
        print(f"{pull.folder} is already {pull.result['status']}: remove it to train again", file=sys.stderr)
        console.print_result(pull.result, as_json=c.json)
        return EXIT_CODE[pull.result["status"]]
    stop_signals: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        stop_signals.append(number)

    previous_handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        exit_code = adapt(c, inputs, pull, lineage, stop_signals)
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    assert pull.result
    console.print_result(pull.result, as_json=c.json)
    return exit_code
