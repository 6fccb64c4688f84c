"""`python train.py distill`: a teacher's answers, or its probabilities, into a smaller model.

--method sequence: the teacher answers the prompts and the student is fine-tuned on what it said (sequence-level
knowledge distillation, Kim and Rush 2016); the teacher may be an endpoint. --method logits: the student answers and
learns the teacher's probabilities of every next token along the way (on-policy distillation, Agarwal et al. 2024),
for which both must have one vocabulary. --layers makes a shallower student of a model's own layers.
"""

import copy
import dataclasses
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from torch import nn
from trl import DistillationConfig as TrlConfig
from trl import DistillationTrainer

import console
from posttrain import chat, models, scoring, settings, sft, stage, teacher, trainers
from posttrain.rows import load_rows


@dataclass(frozen=True, kw_only=True)
class DistillConfig(settings.Common):
    teacher: str
    """model to learn from, of any kind that --model takes; with --method sequence also http(s)://HOST[:PORT][/v1]"""
    method: Literal["sequence", "logits"] = "sequence"
    """sequence: fine-tuning on the teacher's answers; logits: its probabilities on the student's own answers"""
    layers: int = 0
    """the student is --model with so many of its layers, evenly spread from the first on, as DistilBERT's every other
    (Sanh et al. 2019); 0: all"""
    random_weights: bool = False
    """begin with new weights of the student's shape"""

    teacher_samples: int = 1
    """sequence: answers to each prompt"""
    teacher_temperature: float = 0.0
    """sequence: of those answers; 0: the most likely token each time"""
    teacher_model: str = ""
    """the endpoint's name for the model; empty: the only one that it lists"""
    keep: Literal["all", "valid", "exact"] = "all"
    """sequence: answers to learn from, by the rows' reference. Empty and unfinished ones are never learned from"""

    beta: float = 0.0
    """logits: divergence from the teacher; 0: forward KL, 1: reverse KL, between: generalized Jensen-Shannon. TRL's
    default 1 gives up what a weak student does not do yet; measured: of two answer formats it lost one for good"""
    temperature: float = 1.0
    """logits: of the student's answers, and of both sides of the divergence"""


def main(argv: list[str], dry_run: bool = False) -> int:
    """Parse, check all that can be checked before the first step, and train."""
    c = settings.complete(console.parse(DistillConfig, argv, "train.py distill"))
    check(c)
    rows = load_rows(c.data)
    if c.keep != "all" and "reference" not in rows.column_names:
        raise console.UserError(f"--keep {c.keep}: rows of {c.data} have no reference to score answers by")
    start = models.find(c.model)
    master = None if teacher.is_url(c.teacher) else find_teacher(c.teacher, c.method)
    if dry_run:
        console.print_result(dataclasses.asdict(c), as_json=True)
        return 0
    model, tokenizer = models.load(start)
    if c.layers:
        model = with_layers(model, c.layers)
    if c.random_weights:
        model = sft.new_weights(model, c.init_seed)
    chat.install_template(tokenizer, model)
    prompts, references = prompts_of(rows)
    fits = [len(chat.encode_prompt(tokenizer, prompt)) < c.max_length for prompt in prompts]
    dropped = Counter({"prompt_too_long": fits.count(False)})
    if not any(fits):
        raise console.UserError(f"{c.data}: no prompt fits in --max_length {c.max_length}: raise it")
    prompts = [one for one, fit in zip(prompts, fits, strict=True) if fit]
    references = [one for one, fit in zip(references, fits, strict=True) if fit]
    likely = same_words(c, master, model, tokenizer, prompts[0]) if master and c.method == "logits" else None
    known = stage.model_fingerprint(master) if master else f"{c.teacher} {c.teacher_model}"
    times = c.teacher_samples if c.method == "sequence" else 1
    run = stage.open_run("distill", c, start, steps_of(c, len(prompts) * times), {"teacher": known})
    if run.result:
        return run.code
    run.tracker.summary({"lineage/teacher": known})
    make: Callable[[trainers.Watch], Any]
    if likely:
        taught = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
        make = functools.partial(on_policy, run, model, tokenizer, taught, likely)
    else:
        try:
            taught, lost = asked(run, prompts, references, str(master or c.teacher))
            taught, long = chat.drop_long(taught, tokenizer, c.max_length)
            dropped += lost + long
            if not len(taught):
                raise console.UserError(f"--teacher {c.teacher}: no answer to learn from ({dict(dropped)})")
        except console.UserError:
            run.tracker.finish(console.EXIT_USER)
            raise
        run.steps = run.guard.steps = steps_of(c, len(taught))
        data = sft.tokenized(taught, tokenizer)
        make = functools.partial(sft.trainer, run, model, tokenizer, data)
    told = {reason: count for reason, count in dropped.items() if count}
    if told:
        run.say(f"not learned from: {json.dumps(told)}")
    run.tracker.summary(
        {f"data/dropped_{reason}": count for reason, count in told.items()} | {"data/rows": len(taught)}
    )
    return trainers.train(run, make, model, tokenizer)


def check(c: Any) -> None:
    """Raises UserError naming the flag that does not fit."""
    settings.check(c)
    if c.layers < 0:
        raise console.UserError(f"--layers {c.layers}: must be 0 or more")
    if c.teacher_samples < 1:
        raise console.UserError(f"--teacher_samples {c.teacher_samples}: must be at least 1")
    if c.teacher_temperature < 0 or (c.teacher_samples > 1 and not c.teacher_temperature):
        raise console.UserError(
            f"--teacher_temperature {c.teacher_temperature}: must be 0 or more, and above 0 for several answers"
        )
    if not 0 <= c.beta <= 1:
        raise console.UserError(f"--beta {c.beta}: must be from 0 to 1")
    if not c.temperature > 0:
        raise console.UserError(f"--temperature {c.temperature}: must be positive")
    if c.method == "logits" and teacher.is_url(c.teacher):
        raise console.UserError(f"--teacher {c.teacher}: an endpoint has no logits: use --method sequence")


def find_teacher(name: str, method: str) -> Path:
    """`models.find`, with the flag named. Raises UserError also where the teacher could not answer."""
    try:
        path = models.find(name)
    except console.UserError as mistake:
        raise console.UserError(f"--teacher {mistake}") from None
    if method == "sequence" and (path / models.ADAPTER).is_file():
        raise console.UserError(f"--teacher {name} is an adapter: merge it first, by python -m posttrain.export")
    if method == "sequence" and not models.load_tokenizer(path).chat_template:
        raise console.UserError(f"--teacher {name} has no chat template, so it was never taught to answer: tune it")
    return path


def steps_of(c: Any, rows: int) -> int:
    return c.max_steps or max(1, int(c.epochs * rows / c.batch_size))


def prompts_of(rows: Dataset) -> tuple[list[Any], list[str | None]]:
    """What is asked in rows of any kind, and the reference, if any: of a conversation all before its last answer."""
    asks = [row["messages"][:-1] if "messages" in row else row["prompt"] for row in rows]
    return asks, [row.get("reference") for row in rows]


def with_layers(model: Any, count: int) -> Any:
    """`model` with `count` of its layers: the i-th is the old one of number floor(i * layers / count)."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise console.UserError(f"--layers: {type(model).__name__} has no list of layers to choose from: leave it out")
    if count > len(layers):
        raise console.UserError(f"--layers {count}: the model has {len(layers)}")
    chosen = [i * len(layers) // count for i in range(count)]
    decoder.layers = nn.ModuleList([layers[i] for i in chosen])
    for place, layer in enumerate(decoder.layers):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = place  # where its keys and values lie in the cache
    model.config = copy.deepcopy(model.config)
    config = model.config.get_text_config()
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in chosen]
    decoder.config = config
    return model


def asked(run: stage.Run, prompts: list[Any], references: list[str | None], name: str) -> tuple[Dataset, Counter[str]]:
    """The teacher's answers as chat rows, and how many were left out, by reason. They are kept in the run's folder."""
    c = run.c
    numbers = [number for number in range(c.teacher_samples) for _ in prompts]
    sampling = teacher.Sampling(c.max_new_tokens, c.teacher_temperature, seed=c.sample_seed)
    known = teacher.TeacherConfig(
        teacher=name, out=str(run.folder), teacher_model=c.teacher_model, teacher_mode="chat", device=c.device
    )
    master = teacher.open_teacher(known)
    try:
        said = master.generate(prompts * c.teacher_samples, sampling, numbers, "teacher")
    finally:
        master.close()
    rows, lost = [], Counter[str]()
    for prompt, reference, answer in zip(
        prompts * c.teacher_samples, references * c.teacher_samples, said, strict=True
    ):
        if answer.finish_reason != "stop":
            lost[f"answer_{answer.finish_reason}"] += 1
        elif not answer.text.strip():
            lost["answer_empty"] += 1
        elif c.keep != "all" and not getattr(scoring.score(answer.text, reference or ""), c.keep):
            lost[f"answer_not_{c.keep}"] += 1
        else:
            rows.append({"messages": [*prompt, {"role": "assistant", "content": answer.text}]})
    return Dataset.from_list(rows), lost


def same_words(c: Any, path: Path, model: Any, tokenizer: Any, prompt: Any) -> Any:
    """The teacher at `path`. Raises UserError unless it has the student's vocabulary and chat template."""
    master, words = models.load(path)
    chat.install_template(words, master)
    sizes = [one.config.get_text_config().vocab_size for one in (model, master)]
    if sizes[0] != sizes[1] or tokenizer.get_vocab() != words.get_vocab():
        raise console.UserError(
            f"--teacher {c.teacher}: its vocabulary is not that of {c.model}: use --method sequence, which needs none"
        )
    if chat.encode_prompt(tokenizer, prompt) != chat.encode_prompt(words, prompt):
        raise console.UserError(
            f"--teacher {c.teacher}: its chat template is not that of {c.model}: use --method sequence"
        )
    return master.to(c.device)


def on_policy(
    run: stage.Run, model: Any, tokenizer: Any, data: Dataset, master: Any, watch: trainers.Watch
) -> DistillationTrainer:
    """TRL's trainer; `data` has prompts alone."""
    settings = TrlConfig(
        **trainers.trainer_arguments(run),
        max_completion_length=run.c.max_new_tokens,
        beta=run.c.beta,
        temperature=run.c.temperature,
    )
    return DistillationTrainer(
        model=model,
        teacher_model=master,
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=trainers.lora(run.c),
        callbacks=[watch],
    )


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
