"""`python train.py grpo`: reinforcement learning from rewards without a value model, by TRL's GRPO and RLOO trainers.

Several completions of each prompt are sampled, and each is worth as much as its reward exceeds the others' (GRPO: Shao
et al. 2024; RLOO: Ahmadian et al. 2024). A reward is a proxy: the held-out task is measured beside it, and so is the KL
from the start model, which TRL leaves out where it has no weight.
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from trl import GRPOConfig as TrlGrpoConfig
from trl import GRPOTrainer, RLOOTrainer
from trl import RLOOConfig as TrlRlooConfig

import console
from posttrain import chat, models, rewards, settings, stage, trainers
from posttrain.rows import load_rows

NO_WEIGHT = 1e-12  # of KL in the objective, with which TRL measures it and the update does not feel it


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(settings.Common):
    algorithm: Literal["grpo", "rloo"] = "grpo"
    """how a completion's advantage is taken from its group's rewards"""
    rewards: str = "format=0.2,fields=1,exact=1"
    """name=weight, several with commas: posttrain/rewards.py says which there are"""
    epochs: float = 1.0
    """passes over the prompts"""
    batch_size: int = 64
    """completions of one update, a multiple of num_generations"""
    num_generations: int = 8
    """completions of a prompt"""
    lr: float = 1e-6
    """peak learning rate"""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "constant"
    """learning rate after the warm-up: down to 0, held, or held and down to 0 in the last three tenths"""
    beta: float = 0.02
    """weight of the KL from the start model in the objective; it is measured with 0 too"""
    clip: float = 0.2
    """how far the ratio of new to old probabilities may leave 1"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """grpo: what rewards are divided by: their sd in a group, in a batch, or nothing (Dr. GRPO, Liu et al. 2025)"""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = "dapo"
    """grpo: over what token losses are averaged"""
    temperature: float = 1.0
    """of the sampled completions"""


def main(argv: list[str], dry_run: bool = False) -> int:
    """Parse, check all that can be checked before the first step, and train."""
    c = settings.complete(console.parse(GrpoConfig, argv, "train.py grpo"))
    settings.check(c)
    if c.num_generations < 2 or c.batch_size % c.num_generations:
        raise console.UserError(
            f"--batch_size {c.batch_size} must be a multiple of --num_generations, which is 2 or more"
        )
    if c.micro_batch_size % c.num_generations:
        raise console.UserError(f"--micro_batch_size {c.micro_batch_size} must be a multiple of --num_generations")
    for name in ("beta", "clip"):
        if getattr(c, name) < 0:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be 0 or more")
    if c.temperature <= 0:
        raise console.UserError(f"--temperature {c.temperature}: must be positive, or all completions are the same")
    parts = rewards.parse(c.rewards)
    rows = load_rows(c.data, "prompt")
    if "reference" not in rows.column_names:
        raise console.UserError(f"{c.data}: rows have no reference to be rewarded by: add one to each")
    start = models.find(c.model)
    if dry_run:
        console.print_result(dataclasses.asdict(c), as_json=True)
        return 0
    model, tokenizer = models.load(start)
    chat.install_template(tokenizer, model)
    room = c.max_length - c.max_new_tokens
    fits = [len(chat.encode_prompt(tokenizer, row["prompt"])) <= room for row in rows]
    if not any(fits):
        raise console.UserError(f"{c.data}: no prompt leaves room for --max_new_tokens in --max_length {c.max_length}")
    if not all(fits):
        print(f"{c.data}: dropped {fits.count(False)} of {len(fits)} prompts, too long", file=sys.stderr)
    data = rows.select([i for i, fit in enumerate(fits) if fit])
    prompts = c.batch_size // c.num_generations
    steps = c.max_steps or max(1, int(c.epochs * len(data) / prompts))
    run = stage.open_run(c.algorithm, c, start, steps)
    if run.result:
        return run.code
    run.tracker.summary({"data/dropped_prompt_too_long": fits.count(False), "data/rows": len(data)})
    grouped = {"scale_rewards": c.scale_rewards, "loss_type": c.loss_type} if c.algorithm == "grpo" else {}
    config: Any
    trainer: Any
    config, trainer = (TrlGrpoConfig, GRPOTrainer) if c.algorithm == "grpo" else (TrlRlooConfig, RLOOTrainer)

    def make(watch: trainers.Watch) -> Any:
        settings = config(
            **{**trainers.trainer_arguments(run), "seed": c.sample_seed},
            num_generations=c.num_generations,
            max_completion_length=c.max_new_tokens,
            temperature=c.temperature,
            top_k=0,
            shuffle_dataset=False,  # `in_order` has
            beta=max(c.beta, NO_WEIGHT),
            epsilon=c.clip,
            reward_weights=[part.weight for part in parts],
            **grouped,
        )
        return trainer(
            model=model,
            reward_funcs=[part.for_trl() for part in parts],
            args=settings,
            train_dataset=in_order(data, steps * prompts, c.data_seed),
            processing_class=tokenizer,
            peft_config=trainers.lora(c),
            callbacks=[watch],
        )

    return trainers.train(run, make, model, tokenizer)


def in_order(rows: Dataset, count: int, seed: int) -> Dataset:
    """`count` rows in the order in which they are trained on: every pass over them is another permutation.

    TRL's own sampler begins its permutations anew in a run that goes on from a checkpoint.
    """
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(len(rows)) for _ in range(-(-count // len(rows)))]
    return rows.select(np.concatenate(passes)[:count])
