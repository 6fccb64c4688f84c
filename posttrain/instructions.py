"""The texts of self-instruct in Japanese: what the teacher is asked, and how its answers are read.

The order and make of the prompts is Wang et al. 2022 (github.com/yizhongw/self-instruct); the wording is ours. A
teacher that continues texts gets them open-ended; one that chats gets them as a user's turn that says what to write.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from posttrain.teacher import Prompt

Task = dict[str, Any]
DIGITS = "0-90-9"
NUMBER = re.compile(rf"(?:^|\n)\s*(?:\*\*)?(?:課題)?\s*[{DIGITS}]+\s*[..、::))]\s*")
EXAMPLE = re.compile(rf"(?m)^\W{{0,3}}例\s*[{DIGITS}]*\s*[..、::))]?\W{{0,3}}$")
OUTPUT = re.compile(rf"(?m)^\W{{0,3}}出力\s*[{DIGITS}]*\W{{0,2}}[::]\W{{0,2}}[ \t ]*")
INPUT = re.compile(rf"^\W{{0,3}}入力\s*[{DIGITS}]*\W{{0,2}}[::]\W{{0,2}}[ \t ]*")
LABEL = re.compile(rf"(?m)^\W{{0,3}}ラベル\s*[{DIGITS}]*\W{{0,2}}[::][ \t ]*")
NOTHING = re.compile(r"[((]?(?:なし|不要|無し|入力なし)[))]?[。.]?")
FIELD = re.compile(r"[^\n::]{1,12}[::]\s*([^\n]+)")
CLASSIFIED = "次の課題が、決まった選択肢から答えを選ぶ分類の課題かどうかを、「はい」か「いいえ」で答えてください。"
INPUT_FIRST = (
    "それぞれの課題について、入力と出力の例を作ってください。入力の要らない課題では、出力だけを書きます。"
    "例は多くて5つです。"
)
OUTPUT_FIRST = "それぞれの分類の課題について、答えになるラベルを挙げ、そのラベルが正しい入力の例を作ってください。"
PLACE = re.compile(r"\{instruction\}|\{input\}")
WITH_INPUT = (
    "{instruction}\n\n{input}",
    "{instruction}\n{input}",
    "{instruction}\n\n入力: {input}",
    "{instruction}\n\n入力:\n{input}",
    "課題: {instruction}\n\n入力: {input}",
    "{instruction}\n\n対象:\n{input}",
    "{input}\n\n{instruction}",
)
WITHOUT_INPUT = (
    "{instruction}",
    "{instruction}\n",
    "課題: {instruction}",
    "次の課題に答えてください。\n\n{instruction}",
    "指示: {instruction}",
    "お願いがあります。{instruction}",
)


# --- prompts --------------------------------------------------------------------------------------------------------
def turn(text: str, order: str, chat: bool) -> Prompt:
    """`text` to be continued, or, for a teacher that chats, with the `order` to do so as a user's turn."""
    return [{"role": "user", "content": f"{text}\n\n{order}".strip()}] if chat else text


def bootstrap_prompt(known: Sequence[str], chat: bool) -> Prompt:
    """Eight known instructions, numbered; the teacher writes number nine and on."""
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(known, 1))
    after = len(known) + 1
    order = (
        f"続けて、{after}から{2 * len(known) - 1}までの新しい課題を、一行に一つずつ「{after}. 」のように番号を付けて"
        "書いてください。課題の文だけを日本語で書き、互いに違う種類のものにしてください。"
    )
    begun = f"いろいろな課題を次々に考えてください。\n\n{listed}"
    return turn(begun if chat else f"{begun}\n{after}.", order, chat)


def classification_prompt(instruction: str, shown: Sequence[Task], chat: bool) -> Prompt:
    """`shown` tasks with their answers, then `instruction` without."""
    examples = "\n\n".join(
        f"課題: {task['instruction']}\n分類: {'はい' if task['is_classification'] else 'いいえ'}" for task in shown
    )
    text = f"{CLASSIFIED}\n\n{examples}\n\n課題: {instruction}\n分類:"
    return turn(text, "「はい」か「いいえ」だけを書いてください。", chat)


def instances_prompt(instruction: str, is_classification: bool, shown: Sequence[Task], chat: bool) -> Prompt:
    """Instances of `shown` tasks, then `instruction`: label before input for classification, else input first.

    A teacher that is asked for inputs of a classification first writes inputs of one label (Wang et al. 2022, 2.2).
    """
    if is_classification:
        examples = [
            "\n".join(f"ラベル: {i['output']}\n入力: {i['input']}" for i in task["instances"]) for task in shown
        ]
        begun, head, order = (
            OUTPUT_FIRST,
            "",
            "最後の課題について、同じ形で「ラベル:」と「入力:」だけを書いてください。",
        )
    else:
        examples = ["\n".join(shown_instance(n, i) for n, i in enumerate(task["instances"], 1)) for task in shown]
        begun, head = INPUT_FIRST, "例1\n"
        order = "最後の課題について、同じ形で「例1」から、「入力:」と「出力:」だけを書いてください。"
    tasks = [f"課題: {task['instruction']}\n{text}" for task, text in zip(shown, examples, strict=True)]
    text = "\n\n".join([begun, *tasks, f"課題: {instruction}"])
    return turn(text if chat else f"{text}\n{head}", order, chat)


def shown_instance(number: int, instance: dict[str, str]) -> str:
    given = f"入力: {instance['input']}\n" if instance["input"] else ""
    return f"例{number}\n{given}出力: {instance['output']}"


def choose_shown(seeds: Sequence[Task], rng: random.Random) -> tuple[list[Task], list[Task], list[Task]]:
    """Seed tasks to show: for the question of classification, for inputs first, for outputs first.

    Short ones, so that the prompts fit small models; with at most two instances each.
    """
    brief = [
        {**task, "instances": task["instances"][:2]}
        for task in seeds
        if all(len(i["input"]) + len(i["output"]) <= 160 for i in task["instances"][:2])
    ]
    classified = [task for task in brief if task["is_classification"]]
    rest = [task for task in brief if not task["is_classification"]]
    rng.shuffle(classified)
    rng.shuffle(rest)
    bare = [task for task in rest if not task["instances"][0]["input"]][:2]
    fed = [task for task in rest if task["instances"][0]["input"]][:3]
    both = classified[:6] + rest[:8]
    rng.shuffle(both)
    return both, fed[:1] + bare + fed[1:], classified[:4]


# --- answers --------------------------------------------------------------------------------------------------------
def read_instructions(text: str, chat: bool) -> list[str]:
    """The numbered instructions of an answer. What stands before the first number is the ninth instruction where the
    teacher continues a text, and chatter where it chats."""
    parts = NUMBER.split(text)
    if chat and len(parts) == 1:
        parts = ["", *filter(str.strip, text.split("\n"))]
    return [" ".join(part.split()).strip("*").strip() for part in parts[1 if chat else 0 :]]


def read_classification(text: str) -> bool | None:
    """Whether the answer is yes; None where it is neither. Few tokens may end within はい: its first kana tells."""
    first = text.strip().lstrip("「『*")[:1].lower()
    return {"は": True, "y": True, "い": False, "n": False}.get(first)


def read_instances(text: str, is_classification: bool) -> list[dict[str, str]]:
    """The instances of an answer, as they come."""
    if is_classification:
        found = []
        for part in LABEL.split(text)[1:]:
            label, _, rest = part.partition("\n")
            found.append({"input": INPUT.sub("", rest.strip()).strip(), "output": label.strip().strip("「」*")})
        return found
    return [read_instance(part) for part in EXAMPLE.split(text) if part.strip()]


def read_instance(text: str) -> dict[str, str]:
    given, *outputs = OUTPUT.split(text)
    if not outputs:
        return {"input": "", "output": text.strip()}
    given = INPUT.sub("", given.strip()).strip()
    return {"input": "" if NOTHING.fullmatch(given) else given, "output": outputs[0].strip()}


def as_messages(instruction: str, instance: dict[str, str], rng: random.Random) -> list[dict[str, str]]:
    """An instance as a conversation, in one of the formats at random, so that a model does not hang on one.

    Half the time the name of a lone field of the input (`件名: ...`) is left out.
    """
    given = instance["input"]
    alone = FIELD.fullmatch(given)
    if alone and rng.random() < 0.5:
        given = alone.group(1)
    form = rng.choice(WITH_INPUT if given else WITHOUT_INPUT)
    filled = {"{instruction}": instruction, "{input}": given}
    asked = PLACE.sub(lambda place: filled[place.group()], form).strip()
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": instance["output"]}]
