"""Instructions that an aligned model says by itself: Magpie (Xu et al. 2024, arXiv 2406.08464).

    python -m posttrain.magpie --teacher MODEL --out DIR --n 1000

A chat model that is given its template up to where the user would speak goes on as the user: no seeds, no prompts. The
instruction is sampled at temperature 1 from the whole distribution, the answer to it is greedy.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import console
from posttrain import teacher
from posttrain.decisions import Record, done
from posttrain.instruction_filters import HIRAGANA
from posttrain.segmentation import Segmentation
from posttrain.similarity import SEGMENTATION, THRESHOLD, Texts
from posttrain.teacher import Message, Sampling, Teacher, TeacherConfig

CHUNK = 64  # instructions between two rows of W&B
SAID = "\u2063here the user speaks\u2063"  # invisible separators: in no template
GRAM = 4  # characters


@dataclass(frozen=True)
class MagpieConfig(TeacherConfig):
    """Magpie's sampling, and filters that need no second model."""

    n: int = 1000
    """instructions with answers, after filters; the last batch may bring a few more"""
    max_samples: int = 0
    """instructions to draw at most; 0: four for each that is wanted"""
    system: str = ""
    """system message that steers what the user asks; empty: the template's own"""
    seed: int = 0
    """draws the instructions"""
    temperature: float = 1.0
    """of instructions; answers are greedy"""
    top_p: float = 1.0
    """nucleus of instructions"""
    instruction_tokens: int = 256
    """tokens of an instruction at most"""
    max_tokens: int = 1024
    """tokens of an answer at most"""
    min_chars: int = 8
    """shortest instruction, in characters"""
    max_chars: int = 1000
    """longest instruction, in characters"""
    japanese_only: bool = True
    """drop instructions without hiragana, which every Japanese sentence has"""
    max_repetition: float = 0.5
    """share of character 4-grams that are repeats, above which a text is dropped"""
    segmentation: Segmentation = SEGMENTATION
    """tokens by which instructions are compared"""
    threshold: float = THRESHOLD
    """ROUGE-L F above which an instruction is too near its neighbour; tasks.jsonl has the distance, 1 - F"""
    shown: int = 10_000
    """decisions that W&B's table gets; decisions.jsonl has all"""
    json: bool = False
    """print the result as one JSON object"""


def check(c: MagpieConfig) -> None:
    """Raises UserError naming the flag that does not fit."""
    if teacher.is_url(c.teacher):
        raise console.UserError(
            f"--teacher {c.teacher}: Magpie needs the model's own chat template: give a local model"
        )
    for name in ("n", "instruction_tokens", "max_tokens", "min_chars"):
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    for name in ("max_repetition", "threshold"):
        if not 0 <= getattr(c, name) <= 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: is a share, from 0 to 1")
    if c.max_chars < c.min_chars or not 0 < c.top_p <= 1 or not c.temperature >= 0 or c.max_samples < 0:
        raise console.UserError(
            "--max_chars must be no less than --min_chars, --top_p above 0 and at most 1, --temperature and "
            "--max_samples 0 or more"
        )
    if c.teacher_mode == "completion":
        raise console.UserError("--teacher_mode completion: Magpie is made of a chat template")


def before_user(tokenizer: Any, system: str) -> tuple[str, str]:
    """What a template writes before and after what a user says. Raises UserError where it changes that."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": SAID})
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    if whole.count(SAID) != 1:
        raise console.UserError("--teacher: its chat template does not repeat what the user says: Magpie cannot use it")
    before, _, after = whole.partition(SAID)
    return before, after


def end_turn(asked: Teacher, after: str) -> tuple[str, ...]:
    """Have the teacher end where the user's turn ends: at a control token, or at the texts returned."""
    from posttrain.local_teacher import LocalModel

    backend = asked.backend
    assert isinstance(backend, LocalModel)
    ids = backend.tokenizer(after, add_special_tokens=False)["input_ids"]
    if ids and ids[0] in backend.tokenizer.all_special_ids:
        backend.ends = sorted({*backend.ends, ids[0]})
        return ()
    return (after,) if after else ()


def repetition(text: str) -> float:
    """Share of a text's character 4-grams that were there before; 0 for a text of fewer than 20."""
    grams = Counter(text[at : at + GRAM] for at in range(len(text) - GRAM + 1))
    total = grams.total()
    return 1 - len(grams) / total if total >= 20 else 0.0


def fault(text: str, reason: str, c: MagpieConfig) -> str:
    """Why an instruction or an answer is dropped by itself; empty where it is not."""
    if reason != "stop":
        return reason
    if not text:
        return "empty"
    return "repetition" if repetition(text) > c.max_repetition else ""


def instruction_fault(text: str, reason: str, c: MagpieConfig) -> str:
    """As `fault`, and for its length or its language; an answer may well be a number or a name."""
    if text and len(text) < c.min_chars and reason == "stop":
        return "too_short"
    if len(text) > c.max_chars:
        return "too_long"
    foreign = c.japanese_only and text and not HIRAGANA.search(text)
    return fault(text, reason, c) or ("not_japanese" if foreign else "")


def sample(c: MagpieConfig, asked: Teacher, record: Record) -> list[dict[str, Any]]:
    """Instructions with answers, until there are enough or the samples run out."""
    backend: Any = asked.backend
    before, after = before_user(backend.tokenizer, c.system)
    said = Sampling(c.instruction_tokens, c.temperature, c.top_p, stop=end_turn(asked, after), seed=c.seed)
    answered = Sampling(c.max_tokens, seed=c.seed)
    known, names, made = Texts(c.segmentation), list[str](), list[dict[str, Any]]()
    limit = c.max_samples or 4 * c.n
    system: list[Message] = [{"role": "system", "content": c.system}] if c.system else []
    for first in range(0, limit, CHUNK):
        if len(made) >= c.n:
            break
        numbers = range(first, min(first + CHUNK, limit))
        drawn = asked.generate([before] * len(numbers), said, numbers, f"instructions for {c.n - len(made):,} more")
        fresh = []
        for answer in drawn:
            text = answer.text.strip()
            if reason := instruction_fault(text, answer.finish_reason, c):
                record.decide("instruction", text, reason)
            else:
                fresh.append(text)
        kept = []
        for text, (new, place, score) in zip(fresh, known.admit(fresh, c.threshold), strict=True):
            near = names[place] if place >= 0 else ""
            record.decide("instruction", text, "" if new else "duplicate" if text == near else "similar", near, score)
            if new:
                names.append(text)
                kept.append((text, 1 - score))
        prompts: list[teacher.Prompt] = [[*system, {"role": "user", "content": text}] for text, _ in kept]
        for (text, apart), answer in zip(kept, asked.generate(prompts, answered, name="answers"), strict=True):
            reply = answer.text.strip()
            reason = fault(reply, answer.finish_reason, c)
            record.decide("answer", reply, reason, note=text)
            if not reason:
                row = {"id": f"magpie_{len(made):06d}", "instruction": text, "output": reply}
                made.append({**row, "min_neighbor_distance": round(apart, 4)})
        record.end_step()
    return made


def run(c: MagpieConfig) -> dict[str, Any]:
    """The whole stage. Raises UserError where the model has no chat template."""
    if finished := done(c, "magpie", {}):
        print(f"{c.out} is already done: remove it to begin anew", file=sys.stderr)
        return finished
    asked = teacher.open_teacher(c)
    try:
        if not asked.chat:
            raise console.UserError(f"--teacher {c.teacher} has no chat template: Magpie needs an aligned model")
        with Record("magpie", c, c.seed, asked, {}, c.shown) as record:
            made = sample(c, asked, record)
            if len(made) < c.n:
                print(f"{len(made)} of {c.n} were kept: see {c.out}/decisions.jsonl", file=sys.stderr, flush=True)
            trained = [
                {
                    "messages": [
                        {"role": "user", "content": row["instruction"]},
                        {"role": "assistant", "content": row["output"]},
                    ]
                }
                for row in made
            ]
            return record.finish({"tasks.jsonl": made, "train.jsonl": trained})
    finally:
        asked.close()


def main(argv: list[str]) -> int:
    c = console.parse(MagpieConfig, argv, "python -m posttrain.magpie")
    check(c)
    with console.terminable():
        console.print_result(run(c), as_json=c.json)
    return 0


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
