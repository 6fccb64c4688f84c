"""Harder and rarer instructions from known ones, in Japanese: Evol-Instruct (Xu et al. 2023, arXiv 2304.12244).

    python -m posttrain.evolve --data DIR/train.jsonl --teacher MODEL_OR_URL --out EVOLVED

In each round every instruction is rewritten in one of six ways, five in depth and one in breadth, and answered; what
fails one of the paper's four eliminations goes into the next round as it was. The prompts are ours.
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import console
from posttrain import instruction_filters, rows, teacher
from posttrain.decisions import Record, done, fingerprint
from posttrain.instructions import turn
from posttrain.segmentation import FUNCTION, HOLLOW, Segmentation, script
from posttrain.similarity import SEGMENTATION, THRESHOLD, Texts
from posttrain.teacher import Sampling, Teacher, TeacherConfig

CHUNK = 100  # instructions between two rows of W&B
DEPTH = {
    "constraints": "条件や制約を一つだけ加え",
    "deepening": "尋ねている事柄について、より広く、より深く踏み込んだことを尋ねるようにし",
    "concretizing": "一般的な言い方を、具体的な場面、数値、固有の状況に置き換え",
    "reasoning": "少ない手順で片付くものなら、何段階かの推論や計算を要するようにし",
    "complicate_input": "表、JSON、ログ、箇条書きのメモなど、形のある入力データを付け加え",
}
BREADTH = "breadth"
METHODS = (*DEPTH, BREADTH)
REWRITE = """次の《もとの指示》を、人が読んで答えられる範囲で、少し難しくしてください。
・{how}、それ以外の意味は保ちます。
・長くなりすぎないように、加えるのは60字程度までにします。表やデータがあれば、そのまま残します。
・答えは書かず、《書き換えた指示》だけを日本語で書きます。

《もとの指示》
{instruction}

《書き換えた指示》
"""
CREATE = """次の《もとの指示》を手がかりに、まったく新しい指示を一つ作ってください。
・同じ分野に属しながら、めったに見かけない内容にします。
・長さと難しさは、もとの指示と同じくらいにします。
・答えは書かず、《新しい指示》だけを日本語で書きます。

《もとの指示》
{instruction}

《新しい指示》
"""
JUDGE = """二つの指示が、次の両方の点で同じかどうかを判断してください。
1. 課している条件や制約が同じである。
2. 尋ねていることの広さと深さが同じである。

一つめの指示: {first}

二つめの指示: {second}

両方とも同じなら「同じ」、そうでなければ「違う」とだけ答えてください。
判断: """
LABELS = re.compile(r"《?(?:もとの指示|元の指示|書き換えた指示|新しい指示|与えられた指示)》?")
# A refusal, not the apology that a letter to a customer is made of.
REFUSAL = re.compile(
    r"(?:お?答え|回答|お手伝い|提供|お応え|応答)(?:は|を|が|すること(?:は|が))?(?:いた|致)?し?"
    r"(?:でき(?:ません|ない)|かねます)|AI(?:アシスタント)?(?:として|なので|ですので)|言語モデル|\bsorry\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class EvolveConfig(TeacherConfig):
    """Evol-Instruct, with the paper's four rounds."""

    data: str = ""
    """JSONL or Parquet of conversations, or tasks.jsonl of self_instruct or seed tasks"""
    rounds: int = 4
    """times that every instruction is evolved"""
    seed: int = 0
    """draws the ways and the answers"""
    temperature: float = 1.0
    """of evolved instructions and their answers; the judge is greedy"""
    top_p: float = 0.95
    """nucleus of the same, as in the authors' script"""
    max_tokens: int = 2048
    """tokens of an evolved instruction, and of an answer"""
    min_chars: int = 8
    """shortest evolved instruction, in characters"""
    max_chars: int = 2000
    """longest evolved instruction, in characters"""
    refusal_chars: int = 160
    """an answer shorter than this that declines is dropped; the paper's 80 words"""
    segmentation: Segmentation = SEGMENTATION
    """tokens by which instructions are compared"""
    threshold: float = THRESHOLD
    """ROUGE-L F above which an instruction made in breadth is too much like a known one"""
    shown: int = 10_000
    """decisions that W&B's table gets; decisions.jsonl has all"""
    json: bool = False
    """print the result as one JSON object"""


def check(c: EvolveConfig) -> list[dict[str, Any]]:
    """The instructions to begin with. Raises UserError naming the flag or the row that does not fit."""
    if not c.data:
        raise console.UserError("--data is missing: give the instructions to evolve, such as DIR/train.jsonl")
    for name in ("rounds", "max_tokens", "min_chars"):
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    if c.max_chars < c.min_chars or not 0 < c.top_p <= 1 or not 0 <= c.threshold <= 1 or not c.temperature >= 0:
        raise console.UserError(
            "--max_chars must be no less than --min_chars, --top_p above 0 and at most 1, --threshold from 0 to 1, "
            "--temperature 0 or more"
        )
    found = []
    for where, row in rows.records(c.data):
        question, answer = first_exchange(where, row)
        if question:
            found.append({"instruction": question, "output": answer})
    if not found:
        raise console.UserError(f"--data {c.data}: no instruction in it")
    return [{"id": f"seed_{n:06d}", "round": 0, "method": "", "parent": "", **row} for n, row in enumerate(found)]


def first_exchange(where: str, row: dict[str, Any]) -> tuple[str, str]:
    """What is asked and answered in a row: a task with instances, or whatever is a conversation. Raises UserError."""
    if isinstance(row.get("instances"), list):
        if fault := instruction_filters.seed_fault({"is_classification": False, **row}) if row["instances"] else "":
            raise console.UserError(f"{where}: {fault}")
        first = row["instances"][0] if row["instances"] else {"input": "", "output": ""}
        return "\n\n".join(part for part in (row["instruction"], first["input"]) if part), first["output"]
    try:
        messages = rows.standard(row, "messages")["messages"]
    except (ValueError, KeyError) as error:
        raise console.UserError(f"{where}: {error}") from None
    asked = next(i for i, message in enumerate(messages) if message["role"] == "user")
    return messages[asked]["content"], messages[asked + 1]["content"]


def is_hollow(text: str) -> bool:
    """Whether a text is nothing but punctuation and function words."""
    return all(token in FUNCTION or token in HOLLOW for token in script(text))


def without_label(text: str) -> str:
    """An answer without the heading of its prompt, which a chatting teacher repeats in good faith."""
    bare = text.strip()
    label = LABELS.match(bare)
    return bare[label.end() :].strip() if label and bare.startswith("《") else bare


def evolved_fault(parent: str, text: str, reason: str, c: EvolveConfig) -> str:
    """Why an evolved instruction is dropped before anybody judges it."""
    if reason != "stop":
        return reason
    if len(text) < c.min_chars:
        return "too_short"
    if len(text) > c.max_chars:
        return "too_long"
    if "".join(text.split()) == "".join(parent.split()):
        return "no_gain"
    copied = LABELS.search(text)
    return "copies_prompt" if copied and copied.group() not in parent else ""


def answer_fault(text: str, reason: str, refusal_chars: int) -> str:
    """Why an answer, and with it its instruction, is dropped."""
    if reason != "stop":
        return reason
    if is_hollow(text):
        return "hollow"
    return "refusal" if len(text) < refusal_chars and REFUSAL.search(text) else ""


def evolve(
    c: EvolveConfig, number: int, parents: list[dict[str, Any]], known: Texts, asked: Teacher, record: Record
) -> list[dict[str, Any] | None]:
    """The successor of each of `parents` in round `number`, None where it failed."""
    rng = random.Random(f"{c.seed} {number} {parents[0]['id']}")
    ways = [rng.choice(METHODS) for _ in parents]
    drawn = Sampling(c.max_tokens, c.temperature, c.top_p, seed=c.seed)
    prompts = [rewrite_prompt(way, row["instruction"], asked.chat) for way, row in zip(ways, parents, strict=True)]
    # The number of the round tells apart what is tried again after it failed.
    written = asked.generate(prompts, drawn, [number] * len(prompts), f"round {number}")
    texts = [without_label(answer.text) for answer in written]
    faults = [
        evolved_fault(parent["instruction"], text, answer.finish_reason, c)
        for parent, text, answer in zip(parents, texts, written, strict=True)
    ]
    judged = [i for i, fault in enumerate(faults) if not fault and ways[i] != BREADTH]
    judge = Sampling(8, stop=() if asked.chat else ("\n",))
    prompts = [turn(judge_text(parents[i]["instruction"], texts[i]), "", asked.chat) for i in judged]
    for i, answer in zip(judged, asked.generate(prompts, judge, name="judge"), strict=True):
        if answer.text.strip().lstrip("「").startswith("同"):
            faults[i] = "no_gain"
    scores: dict[int, float] = {}
    broad = [i for i, fault in enumerate(faults) if not fault and ways[i] == BREADTH]
    for i, (new, _, score) in zip(broad, known.admit([texts[i] for i in broad], c.threshold), strict=True):
        faults[i], scores[i] = "" if new else "similar", score
    left = [i for i, fault in enumerate(faults) if not fault]
    prompts = [answer_prompt(texts[i], asked.chat) for i in left]
    answers = dict(zip(left, asked.generate(prompts, drawn, [number] * len(prompts), "answers"), strict=True))
    successors: list[dict[str, Any] | None] = []
    for i, (parent, way, text) in enumerate(zip(parents, ways, texts, strict=True)):
        if i in answers:
            faults[i] = answer_fault(answers[i].text.strip(), answers[i].finish_reason, c.refusal_chars)
        record.decide(way, text, faults[i], parent["instruction"], scores.get(i))
        name = f"{parent['id'].partition('.')[0]}.{number}"
        made = {"id": name, "round": number, "method": way, "parent": parent["id"]}
        told = answers[i].text.strip() if i in answers else ""
        successors.append(None if faults[i] else {**made, "instruction": text, "output": told})
    record.end_step()
    return successors


def rewrite_prompt(way: str, instruction: str, chat: bool) -> teacher.Prompt:
    """What asks to evolve an instruction in one of METHODS."""
    form = CREATE if way == BREADTH else REWRITE.replace("{how}", DEPTH[way])
    return turn(form.replace("{instruction}", instruction), "", chat)


def judge_text(first: str, second: str) -> str:
    before, _, rest = JUDGE.partition("{first}")
    between, _, after = rest.partition("{second}")
    return before + first + between + second + after


def answer_prompt(instruction: str, chat: bool) -> teacher.Prompt:
    return [{"role": "user", "content": instruction}] if chat else f"指示: {instruction}\n\n応答: "


def run(c: EvolveConfig, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """All rounds. Raises UserError where the teacher ends before them."""
    fed = {"data": fingerprint(Path(c.data))}
    if before := done(c, "evolve", fed):
        print(f"{c.out} is already done: remove it to begin anew", file=sys.stderr)
        return before
    asked = teacher.open_teacher(c)
    try:
        with Record("evolve", c, c.seed, asked, fed, c.shown) as record:
            known, pool, made = Texts(c.segmentation), list(seeds), list(seeds)
            for row in seeds:
                known.add(row["instruction"])
            for number in range(1, c.rounds + 1):
                after: list[dict[str, Any]] = []
                for begin in range(0, len(pool), CHUNK):
                    parents = pool[begin : begin + CHUNK]
                    successors = evolve(c, number, parents, known, asked, record)
                    after += [new or old for new, old in zip(successors, parents, strict=True)]
                    made += [new for new in successors if new]
                pool = after
            trained = [
                {
                    "messages": [
                        {"role": "user", "content": row["instruction"]},
                        {"role": "assistant", "content": row["output"]},
                    ]
                }
                for row in made
                if row["output"]
            ]
            return record.finish({"tasks.jsonl": made, "train.jsonl": trained})
    finally:
        asked.close()


def main(argv: list[str]) -> int:
    c = console.parse(EvolveConfig, argv, "python -m posttrain.evolve")
    seeds = check(c)
    with console.terminable():
        console.print_result(run(c, seeds), as_json=c.json)
    return 0


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
