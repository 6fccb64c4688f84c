"""TRL's trainers tied to a run: their settings, and the callback that records, watches and stops."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

import console
from posttrain import trl_names
from posttrain.stage import Run, begin, heeded_signals

WSD_DECAY = 0.3  # share of the updates, as in pretraining
SCHEDULES = {  # transformers' names
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}


def trainer_arguments(run: Run) -> dict[str, Any]:
    """What every TRL configuration is given: sizes, optimizer, seeds, and nothing that TRL would send or hide."""
    c = run.c
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if c.batch_size % world:
        raise console.UserError(f"--batch_size {c.batch_size} must be a multiple of the {world} processes")
    micro = c.micro_batch_size or c.batch_size // world
    return {
        "output_dir": str(run.folder / "checkpoints"),
        "max_steps": run.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": max(1, c.batch_size // world // micro),
        "learning_rate": c.lr,
        "lr_scheduler_type": SCHEDULES[c.schedule],
        "lr_scheduler_kwargs": {"num_decay_steps": round(WSD_DECAY * run.steps)} if c.schedule == "wsd" else {},
        "warmup_steps": round(c.warmup * run.steps),
        "weight_decay": c.weight_decay,
        "adam_beta2": c.beta2,
        "max_grad_norm": c.grad_clip,
        "optim": "adamw_torch",
        "seed": c.init_seed,
        "data_seed": c.data_seed,
        "logging_steps": c.log_every,
        "logging_nan_inf_filter": False,  # it prints NaN as 0.0
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": c.checkpoint_every,
        "save_total_limit": 2,
        "use_cpu": c.device == "cpu",
        "bf16": c.dtype == "bfloat16",
        "activation_checkpointing": False,
        "gradient_checkpointing": False,
    }


def lora(c: Any) -> Any:
    """PEFT's configuration of the adapters that `c` asks for; None for all weights."""
    if not c.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=c.lora_rank, lora_alpha=c.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


class Watch(TrainerCallback):
    """Ties a TRL trainer to a run: rows to W&B and the guard, looks at the held-out task, verdicts, signals, state."""

    def __init__(self, run: Run, tokenizer: Any) -> None:
        self.run, self.tokenizer = run, tokenizer

    def on_log(self, args: Any, state: Any, control: Any, **told: Any) -> None:  # noqa: ARG002
        logs: dict[str, float] = told.get("logs") or {}
        row = trl_names.translate(logs, self.run.stage)
        row = {key: value for key, value in row.items() if not key.startswith(("train_", "total_", "epoch", "step_"))}
        self.run.step = state.global_step
        if row and state.global_step:
            self.run.tokens = float(logs.get("num_tokens", self.run.tokens))
            self.run.log(row)
        self.heed(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **told: Any) -> None:  # noqa: ARG002
        run, c = self.run, self.run.c
        run.step = state.global_step
        if c.watch_every and run.step % c.watch_every == 0:
            run.look(told["model"], self.tokenizer)
        if run.stop_signals:
            control.should_save = control.should_training_stop = True
        self.heed(control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.run.save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def heed(self, control: Any) -> None:
        if self.run.verdict and self.run.c.on_verdict != "ignore":
            control.should_training_stop = True


def train(run: Run, make_trainer: Callable[[Watch], Any], model: Any, tokenizer: Any) -> int:
    """Measure, train with the trainer that `make_trainer` builds, measure again. Returns the exit code."""
    watch = Watch(run, tokenizer)
    begin(run, model, tokenizer)
    trainer = make_trainer(watch)
    run.reference = getattr(trainer, "ref_model", None)
    trainer.remove_callback(PrinterCallback)  # stdout is for the result
    with heeded_signals(run):
        point = run.checkpoint
        trainer.train(resume_from_checkpoint=str(point) if point else None)
        return run.close(trainer.model, tokenizer)
