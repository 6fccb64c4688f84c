"""`python train.py reward`: a model that scores answers, learned from preferences by TRL's RewardTrainer.

The base's decoder gets one number in place of a token, read at the answer's last token, and the difference of the two
scores is the log-odds that the first is preferred (Bradley and Terry 1952; Ouyang et al. 2022). The head begins with
N(0, 1/(d + 1)), d the width of the hidden states (Huang et al. 2024, arXiv 2403.17031). What comes out is a Hugging
Face sequence classifier with one label, adapters merged, for `--rewards model:FOLDER`. It is right where it has seen
preferences and nowhere else, which held-out preferences from the same source do not show.
"""

import copy
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig as TrlConfig
from trl import RewardTrainer

import console
from data import sources
from posttrain import chat, models, rewards, settings, stage, trainers
from posttrain.rows import Message, load_rows

JUDGES = ("accuracy",)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(settings.Common):
    watch_data: str | None = None
    """held-out preferences that the guard looks at in training, and the best checkpoint is chosen by"""
    test_data: str | None = None
    """held-out preferences measured before and after; nothing is chosen on them. Default: watch_data"""
    lr: float = 1e-5
    """peak learning rate"""
    judge: str = "accuracy"
    """score that the guard and the best checkpoint go by: share of pairs whose preferred answer scores higher"""
    center: float = 0.01
    """weight of the squared sum of a pair's scores, which keeps their mean at 0 (Eisenstein et al. 2024)"""


@dataclass
class Pairs:
    """Held-out preferences as whole conversations."""

    chosen: list[list[Message]]
    rejected: list[list[Message]]


def held_out(source: str | None, items: int) -> Pairs | None:
    """The first `items` preferences (0: all)."""
    if source is None:
        return None
    rows = load_rows(source, "preference")
    some = rows.select(range(min(items or len(rows), len(rows))))
    return Pairs(*([row["prompt"] + row[name] for row in some] for name in ("chosen", "rejected")))


class RewardRun(stage.Run):
    """A run that is measured on preferences and keeps classifiers."""

    def scored(self, model: Any, tokenizer: Any, held: Any) -> dict[str, float]:
        """Of Pairs: accuracy; margin, the mean difference of scores; loss, nats a pair; n, pairs."""
        chosen, rejected = (np.array(rewards.scores(model, tokenizer, one)) for one in (held.chosen, held.rejected))
        margins = chosen - rejected
        told = {"accuracy": np.mean(margins > 0), "margin": margins.mean(), "loss": np.logaddexp(0, -margins).mean()}
        return {"n": float(len(margins)), **{name: float(value) for name, value in told.items()}}

    def measure(self, model: Any, tokenizer: Any, _fingerprint: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
        told = self.scored(model, tokenizer, self.test) if self.test else {}
        return {f"eval/{name}": value for name, value in told.items()}, []

    def keep(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """The whole classifier: an adapter on a head that is drawn anew would be worth nothing."""
        if hasattr(model, "merge_and_unload"):
            model = copy.deepcopy(model).merge_and_unload()
        super().keep(model, tokenizer, folder)

    def reopen(self, folder: Path) -> tuple[Any, Any]:
        return rewards.RewardModel(folder).load()


def main(argv: list[str], dry_run: bool = False) -> int:
    """Parse, check all that can be checked before the first step, and train."""
    c = settings.complete(console.parse(RewardConfig, argv, "train.py reward"))
    settings.check(c, JUDGES)
    if not 0 <= c.center < math.inf:
        raise console.UserError(f"--center {c.center}: must be 0 or more")
    if c.base_data:
        raise console.UserError("--base_data: a reward model writes no text to be measured: leave it out")
    rows = load_rows(c.data, "preference")
    start = models.find(c.model)
    if dry_run:
        console.print_result(dataclasses.asdict(c), as_json=True)
        return 0
    base, tokenizer = models.load(start)
    chat.install_template(tokenizer, base)
    rows, dropped = chat.drop_long(rows, tokenizer, c.max_length)
    told = {reason: count for reason, count in dropped.items() if count}
    if not len(rows):
        raise console.UserError(f"{c.data}: no pair fits in --max_length {c.max_length} ({told}): raise it")
    if told:
        print(f"{c.data}: dropped by length {json.dumps(told)}", file=sys.stderr)
    model = classifier(base, tokenizer, c.init_seed)
    # The ids that `rewards.scores` reads, so that what is trained on is what is asked later.
    data = rows.map(
        lambda row: {
            f"{name}_ids": list(tokenizer.apply_chat_template(row["prompt"] + row[name], return_dict=False))
            for name in ("chosen", "rejected")
        },
        remove_columns=rows.column_names,
        load_from_cache_file=False,
    )
    steps = c.max_steps or max(1, int(c.epochs * len(data) / c.batch_size))
    run = stage.open_run("reward", c, start, steps, kind=RewardRun, read=held_out)
    if run.result:
        return run.code
    run.tracker.summary({f"data/dropped_{k}": v for k, v in told.items()} | {"data/rows": len(data)})

    def make(watch: trainers.Watch) -> Any:
        settings = TrlConfig(
            **trainers.trainer_arguments(run), max_length=c.max_length, center_rewards_coefficient=c.center or None
        )
        adapters = trainers.lora(c)
        if adapters:
            adapters.task_type = "SEQ_CLS"  # which trains the head whole
        return RewardTrainer(
            model=model,
            args=settings,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=adapters,
            callbacks=[watch],
        )

    return trainers.train(run, make, model, tokenizer)


def classifier(base: Any, tokenizer: Any, seed: int) -> Any:
    """A sequence classifier with one label and the base's decoder, whose memory it takes over. Raises UserError."""
    if hasattr(base, "merge_and_unload"):
        base = base.merge_and_unload()
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = AutoModelForSequenceClassification.from_config(config)
        except ValueError as error:
            raise console.UserError(f"{type(base).__name__} scores no answers: {sources.first_line(error)}") from None
        nn.init.normal_(model.score.weight, std=1 / math.sqrt(config.get_text_config().hidden_size + 1))
    model.base_model.load_state_dict(base.base_model.state_dict(), assign=True)
    return model.eval()
