"""`python train.py ppo`: reinforcement learning from rewards with a value model, by PPO. TRL has none any more.

One step: sample a batch of completions at temperature 1, score them, and make several passes over them. Every token
costs its log-ratio to the start model, the last one earns the score (Ziegler et al. 2019). Details after Huang et al.
2024 (arXiv 2403.17031): the same forward pass gives old and new log-probabilities, no dropout, Adam's epsilon 1e-5, a
value model of its own with the policy's weights, a penalty for answers without an end. The value head begins at zero,
as in OpenAI's lm-human-preferences. Policy and value model share no weight, and Adam's updates do not depend on a
loss' scale, so there is no coefficient between the losses, but each has its gradient clipped and its learning rate.

Every random number comes from a seed and the step, so a run that was killed goes on with the same bits.
"""

import copy
import dataclasses
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import console
from posttrain import chat, gae, models, rewards, rollout, settings, stage, trainers
from posttrain.rows import load_rows
from pretrain import checkpoint

KEPT = 2  # checkpoints
STATE = "training.safetensors"


@dataclass(frozen=True, kw_only=True)
class PpoConfig(settings.Common):
    rewards: str = "format=0.2,fields=1,exact=1"
    """name=weight, several with commas: posttrain/rewards.py says which there are"""
    epochs: float = 1.0
    """passes over the prompts"""
    batch_size: int = 64
    """completions sampled in one step"""
    ppo_epochs: int = 4
    """passes over the completions of a step"""
    minibatches: int = 1
    """optimizer updates of one such pass"""
    lr: float = 3e-6
    """peak learning rate of the policy"""
    value_lr: float = 0.0
    """peak learning rate of the value model; 0: the policy's"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """learning rate after the warm-up: down to 0, or held"""
    value_warmup: int = 0
    """steps at the beginning in which the value model alone learns"""
    kl_coef: float = 0.05
    """price of one nat of log-ratio to the start model, in rewards"""
    kl_target: float = 0.0
    """nats of KL a completion that kl_coef is adapted to keep (Ziegler et al. 2019); 0: kl_coef stays"""
    kl_horizon: float = 10_000.0
    """completions over which it is adapted"""
    clip: float = 0.2
    """how far the ratio of new to old probabilities may leave 1"""
    value_clip: float = 0.2
    """how far a value may leave the old one before its error counts in full"""
    gamma: float = 1.0
    """discount of a token"""
    lam: float = 0.95
    """lambda of generalised advantage estimation"""
    whiten_rewards: bool = False
    """divide rewards by their standard deviation in the batch; then kl_coef is no price in rewards any more"""
    whiten_advantages: bool = True
    """bring advantages to mean 0 and standard deviation 1 in the batch"""
    eos_penalty: float = 1.0
    """taken off the score of an answer that does not end in max_new_tokens"""


def main(argv: list[str], dry_run: bool = False) -> int:
    """Parse, check all that can be checked before the first step, and train."""
    c = settings.complete(console.parse(PpoConfig, argv, "train.py ppo"))
    settings.check(c)
    check(c)
    parts = rewards.parse(c.rewards)
    rows = load_rows(c.data, "prompt")
    start = models.find(c.model)
    if dry_run:
        console.print_result(dataclasses.asdict(c), as_json=True)
        return 0
    model, tokenizer = models.load(start)
    if (start / models.ADAPTER).is_file():
        if c.lora_rank:
            raise console.UserError(f"--model {c.model}: is an adapter already: export it merged, or leave --lora_rank")
        model = model.merge_and_unload()
    chat.install_template(tokenizer, model)
    # What is longer leaves no room for an answer.
    data, dropped = chat.drop_long(rows, tokenizer, c.max_length - c.max_new_tokens + 1)
    if not len(data):
        raise console.UserError(f"{c.data}: no prompt leaves room for --max_new_tokens in --max_length {c.max_length}")
    if dropped:
        print(f"{c.data}: dropped {dropped.total()} of {len(rows)} prompts, too long", file=sys.stderr)
    prompts = list(data["prompt"])
    references = list(data["reference"]) if "reference" in data.column_names else [None] * len(prompts)
    rewards.total(parts, prompts[:1], [""], references[:1])  # mistakes show now, not after the first measurement
    steps = c.max_steps or max(1, int(c.epochs * len(data) / c.batch_size))
    run = stage.open_run("ppo", c, start, steps)
    if run.result:
        return run.code
    run.tracker.summary({"data/dropped_prompt_too_long": dropped.total(), "data/rows": len(data)})
    return train(run, model, tokenizer, prompts, references, parts)


def check(c: PpoConfig) -> None:
    """Raises UserError naming the flag that does not fit."""
    for name in ("ppo_epochs", "minibatches"):
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    for name in ("value_lr", "value_warmup", "kl_coef", "kl_target", "eos_penalty"):
        if not 0 <= getattr(c, name) < math.inf:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be 0 or more")
    for name in ("clip", "value_clip"):
        if not getattr(c, name) > 0:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be positive")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(c, name) <= 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be from 0 to 1")
    if c.batch_size % c.minibatches:
        raise console.UserError(f"--minibatches {c.minibatches} must divide --batch_size {c.batch_size}")
    if c.kl_target and (not c.kl_coef or c.kl_horizon < c.batch_size):
        raise console.UserError("--kl_target: needs --kl_coef above 0 and --kl_horizon of at least --batch_size")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise console.UserError("train.py ppo runs on one device: start it without torchrun or accelerate")


# --- models ----------------------------------------------------------------------------------------------------------
class ValueModel(nn.Module):
    """The policy's decoder with one number a position in place of a token."""

    def __init__(self, decoder: nn.Module, width: int) -> None:
        """decoder: transformers' base model, becomes part of this one; width: of its hidden states."""
        super().__init__()
        self.decoder, self.head = decoder, nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, last: int, **inputs: Tensor) -> Tensor:
        """(rows, last): values of the states in which each of the `last` tokens was chosen."""
        hidden = self.decoder(**inputs, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden[:, -last - 1 : -1].float())[..., 0]


@dataclass
class Models:
    """The three that PPO needs; reference None: the policy without its adapter."""

    policy: Any
    reference: Any
    value: ValueModel

    def named(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        pairs = [("policy", self.policy), ("value", self.value)]
        every = ((f"{kind}.{name}", p) for kind, model in pairs for name, p in model.named_parameters())
        return {name: p for name, p in every if p.requires_grad}


def make_models(c: PpoConfig, model: Any) -> Models:
    """Policy (all weights, or adapters), reference and value model from the start model."""
    reference = None if c.lora_rank else copy.deepcopy(model).requires_grad_(False)
    decoder = copy.deepcopy(model.base_model)
    with torch.random.fork_rng():
        torch.manual_seed(c.init_seed)
        if c.lora_rank:
            from peft import get_peft_model

            model = get_peft_model(model, trainers.lora(c))
            adapters = trainers.lora(c)
            adapters.task_type = None  # it has no language model's head
            decoder = get_peft_model(decoder, adapters)
        else:
            model.requires_grad_(True)
        width = model.config.get_text_config().hidden_size
        value = ValueModel(decoder, width)
    return Models(model.eval(), reference, value.to(c.device).eval())


# --- one step --------------------------------------------------------------------------------------------------------
def token_rewards(c: PpoConfig, score: Tensor, log_ratio: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """What every token earns: its share of the KL's price, and the last one the answer's score."""
    told = -kl_coef * log_ratio
    last = mask.sum(-1) - 1
    told[torch.arange(len(told), device=told.device), last] += score
    return gae.whiten(told, mask, shift=False) if c.whiten_rewards else told * mask


# --- the loop --------------------------------------------------------------------------------------------------------
def seed_of(seed: int, step: int) -> int:
    """The seed of a step's random numbers."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def drawn(step: int, size: int, rows: int, seed: int) -> list[int]:
    """The rows of step 1, 2, ...: each once in a pass over all of them, every pass in another order."""
    at = range((step - 1) * size, step * size)
    orders = {turn: np.random.default_rng([seed, turn]).permutation(rows) for turn in {i // rows for i in at}}
    return [int(orders[i // rows][i % rows]) for i in at]


def rate(c: PpoConfig, step: int, steps: int) -> float:
    """Learning rate of step 1, 2, ... as a share of its peak."""
    rising = round(c.warmup * steps)
    if step <= rising:
        return step / rising
    done = (step - 1 - rising) / max(1, steps - rising)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[c.schedule]


def train(
    run: stage.Run, model: Any, tokenizer: Any, prompts: list[Any], references: list[Any], parts: list[rewards.Reward]
) -> int:
    """Measure, train, measure again. Returns the exit code."""
    c: PpoConfig = run.c
    stage.begin(run, model, tokenizer)
    m = make_models(c, model)
    trained = m.named()
    groups = [[p for name, p in trained.items() if name.startswith(kind)] for kind in ("policy.", "value.")]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(group, lr=lr, betas=(0.9, c.beta2), eps=1e-5, weight_decay=c.weight_decay)
        for group, lr in zip(groups, (c.lr, c.value_lr or c.lr), strict=True)
    ]
    kl_coef = c.kl_coef
    if run.checkpoint:
        kl_coef = restore(run.checkpoint, trained, optimizers)
    with stage.heeded_signals(run):
        while run.step < run.steps and not run.stop_signals:
            if run.verdict and c.on_verdict != "ignore":
                break
            step = run.step + 1
            for optimizer, lr in zip(optimizers, (c.lr, c.value_lr or c.lr), strict=True):
                optimizer.param_groups[0]["lr"] = lr * rate(c, step, run.steps)
            rows = drawn(step, c.batch_size, len(prompts), c.data_seed or 0)
            asked, wanted = [prompts[i] for i in rows], [references[i] for i in rows]
            row, kl = one_step(c, m, tokenizer, asked, wanted, parts, optimizers, kl_coef, step)
            row |= {"ppo/kl_coef": kl_coef, "train/lr": optimizers[0].param_groups[0]["lr"]}
            if c.kl_target:
                kl_coef = gae.adapted(kl_coef, kl, c.kl_target, c.kl_horizon, c.batch_size)
            run.step = step
            run.tokens += row.pop("tokens")
            if step % c.log_every == 0 or not math.isfinite(row["stability/grad_norm"]):
                run.log(row)
            if c.watch_every and step % c.watch_every == 0:
                run.look(m.policy, tokenizer)
            if step % c.checkpoint_every == 0:
                save(run, trained, optimizers, kl_coef)
        if run.stop_signals and run.step:
            save(run, trained, optimizers, kl_coef)
        return run.close(m.policy, tokenizer)


def one_step(
    c: PpoConfig,
    m: Models,
    tokenizer: Any,
    prompts: list[Any],
    references: list[Any],
    parts: list[rewards.Reward],
    optimizers: list[torch.optim.Optimizer],
    kl_coef: float,
    step: int,
) -> tuple[dict[str, float], float]:
    """Sample, score and learn. Returns (the row of metrics, KL in nats a completion)."""
    precision = torch.autocast(c.device, torch.bfloat16, enabled=c.dtype == "bfloat16")
    size = c.micro_batch_size or c.batch_size // c.minibatches
    seed = seed_of(c.sample_seed or 0, step)
    with precision:
        batch = rollout.sample(m.policy, tokenizer, prompts, c.max_new_tokens, seed)
        old = rollout.look_back(m.policy, m.reference, m.value, batch, size)
    mask, width = batch.mask, batch.width
    answers = batch.ids[:, -width:].masked_fill(~mask, tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    worth, told = rewards.total(parts, prompts, texts, references)
    score = torch.tensor(worth, device=mask.device) - c.eos_penalty * ~batch.ended
    log_ratio = old["logp"] - old["ref"]
    earned = token_rewards(c, score, log_ratio, mask, kl_coef)
    advantages, returns = gae.generalised_advantages(earned, old["values"], mask, c.gamma, c.lam)
    white = gae.whiten(advantages, mask) if c.whiten_advantages else advantages

    seen: dict[str, list[float]] = {}
    order = np.random.default_rng(seed)
    for _ in range(c.ppo_epochs):
        for rows in np.split(order.permutation(c.batch_size), c.minibatches):
            for optimizer in optimizers:
                optimizer.zero_grad()
            tokens = mask[rows].sum()
            for at in range(0, len(rows), size):
                some = torch.from_numpy(rows[at : at + size]).to(mask.device)
                with precision:
                    logp, _ = rollout.log_probs(m.policy, batch.inputs(some), width)
                    values = m.value(width, **batch.inputs(some))
                losses, ratio = gae.policy_losses(logp, old["logp"][some], white[some], c.clip)
                errors = gae.value_losses(values, old["values"][some], returns[some], c.value_clip)
                facts = {"policy_loss": losses, "value_loss": errors, "ratio": ratio}
                facts["clip_fraction"] = ((ratio - 1).abs() > c.clip).float()
                sums = {name: (fact * mask[some]).sum() / tokens for name, fact in facts.items()}
                (sums["policy_loss"] + sums["value_loss"]).backward()
                for name, value in sums.items():
                    seen.setdefault(name, []).append(value.item())
            for which, optimizer in enumerate(optimizers):
                norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], c.grad_clip or math.inf)
                if which == 0:
                    seen.setdefault("grad_norm", []).append(norm.item())
                if torch.isfinite(norm) and (which == 1 or step > c.value_warmup):
                    optimizer.step()
    updates = c.ppo_epochs * c.minibatches
    row = {f"ppo/{name}": sum(values) / updates for name, values in seen.items() if name != "grad_norm"}
    spread = float(score.std(unbiased=False))
    row |= {
        "train/loss": row["ppo/policy_loss"],
        "stability/grad_norm": sum(seen["grad_norm"]) / updates,
        "policy/kl": gae.masked_mean(log_ratio, mask).item(),
        "policy/entropy": gae.masked_mean(old["entropy"], mask).item(),
        "policy/length": mask.sum(-1).float().mean().item(),
        "policy/clipped": (~batch.ended).float().mean().item(),
        "reward/mean": score.mean().item(),
        "reward/std": spread,
        "reward/zero_std": float(spread == 0),  # of the batch: a prompt has one completion here
        **{f"reward/{name}": sum(one) / len(one) for name, one in told.items()},
        "ppo/explained_variance": gae.explained_variance(old["values"], returns, mask),
        "tokens": float(batch.seen.sum()),
    }
    return row, log_ratio.sum(-1).mean().item()


# --- checkpoints -----------------------------------------------------------------------------------------------------
def save(
    run: stage.Run, trained: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer], kl_coef: float
) -> None:
    """All that the next step depends on, as checkpoints/checkpoint-STEP; the last KEPT stay."""
    folder = run.folder / "checkpoints" / f"checkpoint-{run.step}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint.training_tensors(trained, optimizers) | {f"weights/{k}": p for k, p in trained.items()}
    tensors["kl_coef"] = torch.tensor(kl_coef, dtype=torch.float64)
    save_file(checkpoint.snapshot(tensors), folder / STATE)
    run.save_state(folder)
    for old in sorted(folder.parent.glob("checkpoint-*"), key=models.step_of)[:-KEPT]:
        shutil.rmtree(old)


@torch.no_grad()
def restore(folder: Path, trained: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> float:
    """Put back what `save` wrote; returns the KL coefficient."""
    tensors = load_file(folder / STATE)
    kl_coef = tensors.pop("kl_coef").item()
    for name, parameter in trained.items():
        parameter.copy_(tensors.pop(f"weights/{name}"))
    checkpoint.restore_training(tensors, trained, optimizers)
    return float(kl_coef)
