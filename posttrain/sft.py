"""`python train.py sft`: supervised fine-tuning on answers, with all weights or LoRA, by TRL's SFTTrainer.

Rows are tokenized and masked here (posttrain/chat.py), so that what is trained on can be shown: answers alone, their
end included. Packing puts rows behind each other with positions that begin anew; before the first step it is proved on
this model that rows packed so do not see each other, since not every attention back end heeds it.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer
from trl.data_utils import pack_dataset

import console
from posttrain import chat, models, settings, stage, trainers
from posttrain.rows import load_rows

SAME = 1e-3  # difference of two logits that are the same but for rounding, float32


@dataclass(frozen=True, kw_only=True)
class SftConfig(settings.Common):
    epochs: float = 3.0
    """passes over the data"""
    random_weights: bool = False
    """begin with new weights of the model's shape: the control that tells what pretraining brought"""
    packing: bool = False
    """several rows in one sequence of max_length tokens; an update has batch_size such sequences"""
    keep: float = 1.0
    """share of the data to train on, the first rows: half-trained models for studies of what comes after"""
    show: int = 0
    """print so many rows token by token, with what is trained on, and stop"""


def main(argv: list[str], dry_run: bool = False) -> int:
    """Parse, check all that can be checked before the first step, and train."""
    c = settings.complete(console.parse(SftConfig, argv, "train.py sft"))
    settings.check(c)
    if not 0 < c.keep <= 1:
        raise console.UserError(f"--keep {c.keep}: is a share of the rows, above 0 and at most 1")
    if c.show < 0:
        raise console.UserError(f"--show {c.show}: must be 0 or more")
    rows = load_rows(c.data, "messages")
    start = models.find(c.model)
    if dry_run:
        console.print_result(dataclasses.asdict(c), as_json=True)
        return 0
    model, tokenizer = models.load(start)
    chat.install_template(tokenizer, model)
    if c.show:
        some = rows.select(range(min(c.show, len(rows))))
        print("\n\n".join(chat.show_mask(tokenizer, row["messages"]) for row in some))
        return 0
    rows = rows.select(range(max(1, round(c.keep * len(rows)))))
    rows, dropped = chat.drop_long(rows, tokenizer, c.max_length)
    told = {reason: count for reason, count in dropped.items() if count}
    if not len(rows):
        raise console.UserError(f"{c.data}: no row fits in --max_length {c.max_length} ({told}): raise it")
    if told:
        print(f"{c.data}: dropped by length {json.dumps(told)} of {len(rows) + sum(told.values())}", file=sys.stderr)
    if c.random_weights:
        model = new_weights(model, c.init_seed)
        chat.install_template(tokenizer, model)
    data = tokenized(rows, tokenizer)
    say_beyond(model, max(map(len, data["input_ids"])))
    sequences = len(data)
    if c.packing:
        prove_apart(model, data)
        sequences = len(pack_dataset(data, c.max_length, "bfd"))
    steps = c.max_steps or max(1, int(c.epochs * sequences / c.batch_size))
    run = stage.open_run("sft", c, start, steps, {"control": c.random_weights})
    if run.result:
        return run.code
    run.tracker.summary({f"data/dropped_{reason}": count for reason, count in told.items()} | {"data/rows": len(rows)})

    return trainers.train(run, lambda watch: trainer(run, model, tokenizer, data, watch, c.packing), model, tokenizer)


def say_beyond(model: Any, longest: int) -> None:
    """A line on stderr where rows are longer than what the model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and longest > limit:
        print(
            f"the longest row has {longest} tokens, and the model was made for {limit}: positions beyond are new to it",
            file=sys.stderr,
        )


def new_weights(model: Any, seed: int) -> Any:
    """A model of the same shape with weights drawn from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(model)(model.config).eval()


def trainer(
    run: stage.Run, model: Any, tokenizer: Any, data: Dataset, watch: trainers.Watch, packing: bool = False
) -> SFTTrainer:
    """TRL's trainer on rows of `tokenized`."""
    settings = TrlConfig(
        **trainers.trainer_arguments(run),
        max_length=run.c.max_length,
        packing=packing,
        packing_strategy="bfd",
        dataset_kwargs={"skip_prepare_dataset": not packing},
    )
    return SFTTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=trainers.lora(run.c),
        callbacks=[watch],
    )


def tokenized(rows: Dataset, tokenizer: Any) -> Dataset:
    """`input_ids` and `labels` of chat rows; a label is -100 where nothing is to be learned: everywhere but answers."""
    table = []
    for row in rows:
        one = chat.encode(tokenizer, row["messages"])
        pairs = zip(one["input_ids"], one["assistant_masks"], strict=True)
        labels = [token if mine else -100 for token, mine in pairs]
        table.append({"input_ids": one["input_ids"], "labels": labels})
    return Dataset.from_list(table)


@torch.no_grad()
def prove_apart(model: Any, data: Dataset, rows: int = 3) -> None:
    """Raises UserError unless the first rows, packed, get the logits that each gets alone.

    Positions that begin anew are all that tells rows apart in a packed sequence (padding-free, as TRL has it); an
    attention back end that does not heed them lets a row read the ones before it.
    """
    some = [torch.tensor(ids) for ids in data.select(range(min(rows, len(data))))["input_ids"]]
    if len(some) < 2:
        return
    positions = torch.cat([torch.arange(len(ids)) for ids in some])
    device = model.get_input_embeddings().weight.device
    # Without a cache, as in training: with one, transformers takes no sequence for a packed one.
    packed = {"input_ids": torch.cat(some)[None].to(device), "position_ids": positions[None].to(device)}
    together = model(**packed, use_cache=False).logits[0]
    alone = torch.cat([model(input_ids=ids[None].to(device), use_cache=False).logits[0] for ids in some])
    worst = float((together - alone).abs().max())
    if worst > SAME * max(1.0, float(alone.abs().max())):
        raise console.UserError(
            f"--packing: rows of one sequence see each other in {type(model).__name__} with "
            f"{model.config._attn_implementation} attention (logits differ by {worst:.3g}): leave it out"
        )
