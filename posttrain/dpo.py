"""`python train.py dpo`: learning from preferences directly, by TRL's DPO and KTO trainers, with the same records.

DPO (Rafailov et al. 2023), IPO (Azar et al. 2023), KTO (Ethayarajh et al. 2024). Rows are preferences; of rows with a
reference instead, pairs are made by the start model itself: the best and the worst of its sampled answers, by score.
DPO's own metrics look healthy while the model dies, so the guard looks at the chosen answers' log-probability, at the
held-out task, and at the KL of what the model now writes.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from trl import DPOConfig as TrlDpoConfig
from trl import DPOTrainer, KTOTrainer
from trl import KTOConfig as TrlKtoConfig

import console
from posttrain import answers, chat, models, scoring, settings, stage, trainers
from posttrain.rows import load_rows


@dataclass(frozen=True, kw_only=True)
class DpoConfig(settings.Common):
    loss: Literal["dpo", "ipo", "kto"] = "dpo"
    """dpo: sigmoid of the margin; ipo: the margin's distance from 1/(2 beta); kto: answers one by one, good or bad"""
    beta: float = 0.1
    """how dear it is to leave the start model"""
    sft_weight: float = 0.0
    """dpo, ipo: weight of the chosen answers' own loss beside it, against forgetting them (Pang et al. 2024)"""
    label_smoothing: float = 0.0
    """dpo: share of preferences taken to be wrong (cDPO, Mitchell 2023)"""
    lr: float = 1e-6
    """peak learning rate"""
    prompts: int = 0
    """rows with a reference: how many of them, the first, to make pairs of; 0: all"""
    pair_samples: int = 6
    """rows with a reference: answers that the start model gives to each prompt, of which the best and the worst are a
    pair"""
    pair_temperature: float = 1.0
    """of those answers"""


def main(argv: list[str], dry_run: bool = False) -> int:
    """Parse, check all that can be checked before the first step, and train."""
    c = settings.complete(console.parse(DpoConfig, argv, "train.py dpo"))
    settings.check(c)
    if not c.beta > 0:
        raise console.UserError(f"--beta {c.beta}: must be positive")
    if not 0 <= c.label_smoothing < 0.5:
        raise console.UserError(f"--label_smoothing {c.label_smoothing}: must be at least 0 and below 0.5")
    if c.sft_weight < 0 or (c.sft_weight and c.loss == "kto"):
        raise console.UserError(f"--sft_weight {c.sft_weight}: must be 0 or more, and 0 for kto")
    if c.pair_samples < 2:
        raise console.UserError(f"--pair_samples {c.pair_samples}: a pair needs at least 2")
    rows = load_rows(c.data)
    own = "reference" in rows.column_names and "chosen" not in rows.column_names
    wanted = ("label",) if c.loss == "kto" else ("chosen", "rejected")
    if not own and any(name not in rows.column_names for name in wanted):
        shape = "{prompt, completion, label}" if c.loss == "kto" else "{prompt, chosen, rejected}"
        raise console.UserError(f"{c.data}: --loss {c.loss} learns from rows of {shape}, or of {{prompt, reference}}")
    start = models.find(c.model)
    if dry_run:
        console.print_result(dataclasses.asdict(c), as_json=True)
        return 0
    model, tokenizer = models.load(start)
    chat.install_template(tokenizer, model)
    model.to(c.device)
    pairs = own_pairs(c, rows, model, tokenizer, stage.model_fingerprint(start)) if own else rows
    pairs, dropped = chat.drop_long(as_answers(pairs) if c.loss == "kto" else pairs, tokenizer, c.max_length)
    told = {reason: count for reason, count in dropped.items() if count}
    if not len(pairs):
        raise console.UserError(f"{c.data}: no pair fits in --max_length {c.max_length} ({told}): raise it")
    if told:
        print(f"{c.data}: dropped by length {json.dumps(told)}", file=sys.stderr)
    steps = c.max_steps or max(1, int(c.epochs * len(pairs) / c.batch_size))
    run = stage.open_run("kto" if c.loss == "kto" else "dpo", c, start, steps)
    if run.result:
        return run.code
    run.tracker.summary({f"data/dropped_{k}": v for k, v in told.items()} | {"data/rows": len(pairs)})

    def make(watch: trainers.Watch) -> Any:
        shared = {
            **trainers.trainer_arguments(run),
            "max_length": c.max_length,
            "beta": c.beta,
            "disable_dropout": True,
        }
        rest = {"model": model, "train_dataset": pairs, "processing_class": tokenizer, "callbacks": [watch]}
        rest["peft_config"] = trainers.lora(c)
        if c.loss == "kto":
            return KTOTrainer(args=TrlKtoConfig(**shared), **rest)
        losses = ["sigmoid" if c.loss == "dpo" else "ipo", *(["sft"] if c.sft_weight else [])]
        weights = [1.0, c.sft_weight][: len(losses)]
        settings = TrlDpoConfig(**shared, loss_type=losses, loss_weights=weights, label_smoothing=c.label_smoothing)
        return DPOTrainer(args=settings, **rest)

    return trainers.train(run, make, model, tokenizer)


def own_pairs(c: Any, rows: Dataset, model: Any, tokenizer: Any, fingerprint: str) -> Dataset:
    """Preferences between the model's own answers: the best and the worst of each prompt's, where they differ.

    Better: exact, then more fields right, then valid. Kept in OUT/.pairs, since the answers are what takes time.
    """
    asked = [fingerprint, stage.file_fingerprint(c.data), c.pair_samples, c.pair_temperature, c.sample_seed, c.prompts]
    place = Path(c.out) / ".pairs" / f"{stage.digest([*asked, c.max_new_tokens])}.jsonl"
    if not place.is_file():
        some = rows.select(range(min(c.prompts or len(rows), len(rows))))
        prompts, references = list(some["prompt"]), list(some["reference"])
        print(f"samples {c.pair_samples} answers to each of {len(prompts)} prompts", file=sys.stderr, flush=True)
        drawn = [
            answers.generate(model, tokenizer, prompts, c.max_new_tokens, c.pair_temperature, c.sample_seed * 1000 + k)
            for k in range(c.pair_samples)
        ]
        found = []
        for i, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
            ranked = sorted((one[i] for one in drawn), key=worth(reference))
            worst, best = ranked[0], ranked[-1]
            if worst.strip() and worth(reference)(best) > worth(reference)(worst):
                found.append({"prompt": prompt, "chosen": spoken(best), "rejected": spoken(worst)})
        place.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        console.write_atomic(place, text.encode())
    if not place.stat().st_size:
        raise console.UserError(
            f"{c.data}: all answers to a prompt are equally good, at every prompt: nothing to prefer"
        )
    return load_rows(str(place), "preference")


def spoken(answer: str) -> list[dict[str, str]]:
    """An answer as the assistant's message."""
    return [{"role": "assistant", "content": answer}]


def worth(reference: str) -> Callable[[str], tuple[bool, float, bool]]:
    """How good an answer is, to be sorted by."""

    def key(answer: str) -> tuple[bool, float, bool]:
        one = scoring.score(answer, reference)
        return one.exact, one.field_accuracy, one.valid

    return key


def as_answers(rows: Dataset) -> Dataset:
    """Pairs as KTO's rows: each answer by itself, good or bad. Rows that are so already stay."""
    if "label" in rows.column_names:
        return rows
    table = []
    for row in rows:
        for name, good in (("chosen", True), ("rejected", False)):
            table.append({"prompt": row["prompt"], "completion": row[name], "label": good})
    return Dataset.from_list(table)
