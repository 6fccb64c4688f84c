"""A teacher's instruction data from a few seed tasks: Self-Instruct (Wang et al. 2022, arXiv 2212.10560) in Japanese.

    python -m posttrain.self_instruct --teacher MODEL_OR_URL --out DIR --n 1000

New instructions from known ones, are they classification, instances of each, filters in between. DIR/tasks.jsonl has
the tasks, DIR/train.jsonl conversations for sft, DIR/decisions.jsonl why each item was kept or dropped. The same
command goes on after any end.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import console
from data.progress import progress
from posttrain import instruction_filters, instructions, rows, teacher
from posttrain.decisions import Record, done, fingerprint
from posttrain.instructions import Task
from posttrain.segmentation import Segmentation
from posttrain.similarity import SEGMENTATION, THRESHOLD, Texts
from posttrain.teacher import Sampling, Teacher, TeacherConfig

SEEDS = Path(__file__).with_name("seed_tasks.jsonl")
CHUNK = 200  # tasks between two rows of W&B, once the instructions are there


@dataclass(frozen=True)
class SelfInstructConfig(TeacherConfig):
    """Defaults are the paper's where the field does not say otherwise."""

    n: int = 1000
    """instructions that the teacher writes, after filters; the last batch may bring a few more"""
    seed_tasks: str = str(SEEDS)
    """JSONL of human tasks: instruction, is_classification, instances of input and output"""
    seed: int = 0
    """draws the prompts' examples, the answers and the formats"""
    human_in_prompt: int = 6
    """human instructions of the eight that a request shows"""
    machine_in_prompt: int = 2
    """machine instructions of the eight; as long as there are fewer, human ones take their place"""
    request_batch: int = 5
    """requests between two updates of the pool"""
    max_requests: int = 0
    """requests for instructions at most, for a teacher of which nothing is kept; 0: n + 20"""

    max_tokens: int = 1024
    """tokens of an answer with new instructions"""
    temperature: float = 0.7
    """of new instructions; all else is greedy"""
    top_p: float = 0.5
    """nucleus of new instructions"""
    presence_penalty: float = 2.0
    """of new instructions, as OpenAI's API counts it"""
    classification_max_tokens: int = 8
    """tokens of yes or no; 3 in the paper, which is less than いいえ in a vocabulary without kana"""
    output_first_max_tokens: int = 300
    """tokens of a classification task's instances"""
    input_first_max_tokens: int = 350
    """tokens of any other task's instances"""
    instance_presence_penalty: float = 1.5
    """of instances"""
    max_instances: int = 5
    """instances that a task keeps, drawn at random"""

    min_chars: int = 8
    """shortest instruction, in characters; the paper's 4 words"""
    max_chars: int = 300
    """longest instruction, in characters; the paper's 150 words"""
    segmentation: Segmentation = SEGMENTATION
    """tokens by which instructions are compared"""
    threshold: float = THRESHOLD
    """ROUGE-L F above which an instruction is too much like a known one; the paper's 0.7 is for English words"""
    include_seeds: bool = True
    """put the human tasks into train.jsonl, too"""
    shown: int = 10_000
    """decisions that W&B's table gets; decisions.jsonl has all"""
    json: bool = False
    """print the result as one JSON object"""


def check(c: SelfInstructConfig) -> list[Task]:
    """The seed tasks. Raises UserError naming the flag or the row that does not fit."""
    for name in ("n", "request_batch", "max_tokens", "max_instances", "min_chars", "classification_max_tokens"):
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    for name in ("max_requests", "machine_in_prompt", "temperature", "shown"):
        if not getattr(c, name) >= 0:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be 0 or more")
    if not 0 < c.top_p <= 1 or not 0 <= c.threshold <= 1:
        raise console.UserError("--top_p must be above 0 and at most 1, --threshold from 0 to 1")
    if c.human_in_prompt < 1 or c.max_chars < c.min_chars:
        raise console.UserError("--human_in_prompt must be at least 1, --max_chars no less than --min_chars")
    seeds = []
    for where, row in rows.records(c.seed_tasks):
        if fault := instruction_filters.seed_fault(row):
            raise console.UserError(f"{where}: {fault}")
        seeds.append(row)
    wanted = c.human_in_prompt + c.machine_in_prompt
    if len(seeds) < wanted or {task["is_classification"] for task in seeds} != {True, False}:
        raise console.UserError(
            f"--seed_tasks {c.seed_tasks}: {len(seeds)} tasks; needs {wanted} or more, with and without classification"
        )
    return seeds


def write_instructions(c: SelfInstructConfig, seeds: list[Task], asked: Teacher, record: Record) -> list[Task]:
    """New instructions, each with the known one that is nearest to it."""
    rng = random.Random(c.seed)
    human = [task["instruction"] for task in seeds]
    known, names = Texts(c.segmentation), list(human)
    for text in human:
        known.add(text)
    # The original also stops at "16." within a line, where Japanese business texts have figures such as 16.5.
    last = 2 * (c.human_in_prompt + c.machine_in_prompt)
    stop = (f"\n{last}",) if asked.chat else ("\n\n", f"\n{last}")
    more: dict[str, Any] = {"top_p": c.top_p, "presence_penalty": c.presence_penalty}
    sampling = Sampling(c.max_tokens, c.temperature, **more, stop=stop, seed=c.seed)
    tasks: list[Task] = []
    limit = c.max_requests or c.n + 20
    with progress("instructions", c.n, "kept") as advance:
        for first in range(0, limit, c.request_batch):
            if len(tasks) >= c.n:
                break
            before = len(tasks)
            numbers = range(first, min(first + c.request_batch, limit))
            prompts = []
            for _ in numbers:
                machine = rng.sample(tasks, min(c.machine_in_prompt, len(tasks)))
                shown = [task["instruction"] for task in machine]
                shown += rng.sample(human, c.human_in_prompt + c.machine_in_prompt - len(shown))
                rng.shuffle(shown)
                prompts.append(instructions.bootstrap_prompt(shown, asked.chat))
            texts = []
            for answer in asked.generate(prompts, sampling, numbers):
                if answer.finish_reason != "stop":
                    record.decide("answer", answer.text, answer.finish_reason)
                    continue
                for text in instructions.read_instructions(answer.text, asked.chat):
                    fault = instruction_filters.instruction_fault(text, c.min_chars, c.max_chars)
                    if fault:
                        record.decide("instruction", text, fault)
                    else:
                        texts.append(text)
            for text, (new, place, score) in zip(texts, known.admit(texts, c.threshold), strict=True):
                record.decide("instruction", text, "" if new else "similar", names[place] if place >= 0 else "", score)
                if new:
                    names.append(text)
                    nearest = {"nearest": names[place], "score": round(score, 4)}
                    tasks.append({"id": f"machine_{len(tasks):06d}", "instruction": text, **nearest})
            advance(len(tasks) - before)
            record.end_step()
    return tasks


def classify(c: SelfInstructConfig, tasks: list[Task], shown: list[Task], asked: Teacher, record: Record) -> None:
    """Set is_classification of `tasks`; what is neither yes nor no counts as no."""
    stop = () if asked.chat else ("\n", "課題")
    sampling = Sampling(c.classification_max_tokens, stop=stop, seed=c.seed)
    for begin in range(0, len(tasks), CHUNK):
        some = tasks[begin : begin + CHUNK]
        prompts = [instructions.classification_prompt(task["instruction"], shown, asked.chat) for task in some]
        for task, answer in zip(some, asked.generate(prompts, sampling, name="classification"), strict=True):
            said = instructions.read_classification(answer.text)
            task["is_classification"] = bool(said)
            record.counts[f"classification/{ {True: 'yes', False: 'no', None: 'unclear'}[said] }"] += 1
        record.end_step()


def write_instances(
    c: SelfInstructConfig, tasks: list[Task], shown: dict[bool, list[Task]], asked: Teacher, record: Record
) -> None:
    """Set the instances of `tasks`; of some nothing is kept."""
    stop = ("例6", "例6", "課題:", "課題:")
    for begin in range(0, len(tasks), CHUNK):
        for kind in (True, False):
            some = [task for task in tasks[begin : begin + CHUNK] if task["is_classification"] is kind]
            length = c.output_first_max_tokens if kind else c.input_first_max_tokens
            sampling = Sampling(length, presence_penalty=c.instance_presence_penalty, stop=stop, seed=c.seed)
            prompts = [instructions.instances_prompt(t["instruction"], kind, shown[kind], asked.chat) for t in some]
            for task, answer in zip(some, asked.generate(prompts, sampling, name="instances"), strict=True):
                found = instructions.read_instances(answer.text, kind)
                faults = instruction_filters.instance_faults(found, answer.finish_reason == "length", kind)
                kept = [number for number, fault in enumerate(faults) if not fault]
                chosen = random.Random(f"{c.seed} {task['id']}").sample(kept, min(len(kept), c.max_instances))
                task["instances"] = [found[number] for number in sorted(chosen)]
                for number, (instance, fault) in enumerate(zip(found, faults, strict=True)):
                    reason = fault or ("" if number in chosen else "more_than_wanted")
                    told = f"{instance['input']}\n→ {instance['output']}"
                    record.decide("instance", told, reason, note=task["instruction"])
                if not found:
                    record.decide("instance", answer.text, "unreadable", note=task["instruction"])
        record.end_step()


def conversations(c: SelfInstructConfig, tasks: list[Task]) -> list[dict[str, Any]]:
    """Rows for sft, one per instance, the same question and answer once."""
    rng, seen, made = random.Random(f"{c.seed} formats"), set(), []
    for task in tasks:
        for instance in task["instances"]:
            messages = instructions.as_messages(task["instruction"], instance, rng)
            told = tuple(message["content"] for message in messages)
            if told not in seen and all(told):
                seen.add(told)
                made.append({"messages": messages, "task": task["id"]})
    return made


def run(c: SelfInstructConfig, seeds: list[Task]) -> dict[str, Any]:
    """All four steps. Raises UserError where the teacher ends before them."""
    fed = {"seeds": fingerprint(Path(c.seed_tasks))}
    if before := done(c, "self_instruct", fed):
        print(f"{c.out} is already done: remove it to begin anew", file=sys.stderr)
        return before
    asked = teacher.open_teacher(c)
    try:
        with Record("self_instruct", c, c.seed, asked, fed, c.shown) as record:
            both, input_first, output_first = instructions.choose_shown(seeds, random.Random(f"{c.seed} shown"))
            tasks = write_instructions(c, seeds, asked, record)
            if len(tasks) < c.n:
                limit = c.max_requests or c.n + 20
                said = f"{len(tasks)} of {c.n} instructions were kept of {limit} requests: see {c.out}/decisions.jsonl"
                print(said, file=sys.stderr, flush=True)
            classify(c, tasks, both, asked, record)
            write_instances(c, tasks, {True: output_first, False: input_first}, asked, record)
            human = [{**task, "id": str(task.get("id", f"seed_{n}"))} for n, task in enumerate(seeds)]
            trained = conversations(c, (human if c.include_seeds else []) + tasks)
            return record.finish({"tasks.jsonl": tasks, "train.jsonl": trained})
    finally:
        asked.close()


def main(argv: list[str]) -> int:
    c = console.parse(SelfInstructConfig, argv, "python -m posttrain.self_instruct")
    seeds = check(c)
    with console.terminable():
        console.print_result(run(c, seeds), as_json=c.json)
    return 0


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
