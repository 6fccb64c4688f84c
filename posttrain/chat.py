"""Chat: the template of a base model, and masks of what is trained on.

A model of this repository has no chat template and no role tokens. Ours needs none: a turn opens with a line of the
kind that its corpus is full of, and an answer ends with the end-of-document token that pretraining taught.

    <s>【前提】          system, optional
    ...
    【指示】             user
    ...
    【応答】             assistant: what follows, up to and with </s>, is trained on
    ...</s>【指示】 ...

No text can fake a turn or an end: the template itself rewrites a heading, and a special token, that stands in a
content, so it holds in every program that renders it. The prompt's ids are the first ids of the whole conversation's.
"""

import functools
import itertools
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from console import UserError
from posttrain.rows import HEADINGS, Message
from posttrain.rows import load_rows as load_rows

if TYPE_CHECKING:
    from datasets import Dataset


# --- templates -------------------------------------------------------------------------------------------------------
def install_template(tokenizer: Any, model: Any) -> bool:
    """Make `tokenizer` (changed in place) and `model`'s generation settings ready for chat; True if it had no template.

    It then gets ours, or Gemma's where the vocabulary has Gemma's turns. A template of the model's own stays. The token
    that ends an answer becomes the tokenizer's EOS, which trainers stop and mask at; generation stops at it and at the
    EOS before. Raises UserError where answers cannot be told from prompts, or end without a special token.
    """
    missing = not tokenizer.chat_template
    if missing:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: its tokenizer has no EOS token, so no answer could end")
        # The template writes "</s>" where it means the token, so the tokenizer has to read it as one.
        tokenizer.split_special_tokens = False
        tokenizer.chat_template = gemma_template(tokenizer) or write_template(tokenizer)
        # What an answer is, for servers: transformers' would else read ours as Qwen3's where that is the architecture.
        ask = [{"role": "user", "content": "a"}]
        asked, opened = (
            tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=prompt) for prompt in (False, True)
        )
        close = re.escape(tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))) + r"\s*|$"
        tokenizer.response_template = {
            "defaults": {"role": "assistant"},
            "start_anchor": opened.removeprefix(asked),
            "fields": {"content": {"close_pattern": close, "content": "text"}},
        }
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    end = end_of_turn(tokenizer)
    known = model.generation_config.eos_token_id
    ends = {end, tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else end
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config._from_model_config = False  # else `generate` makes it anew from config.json's one EOS
    return missing


def gemma_template(tokenizer: Any) -> str | None:
    """Gemma 3's template for its base models, which have its turns in their vocabulary but come without it."""
    turns = tokenizer.convert_tokens_to_ids(["<start_of_turn>", "<end_of_turn>"])
    if any(i in (None, tokenizer.unk_token_id) for i in turns):
        return None
    from trl.chat_template_utils import gemma3_training_chat_template

    return str(gemma3_training_chat_template)


def write_template(tokenizer: Any) -> str:
    """Our template (Jinja) for `tokenizer`, with its special tokens written into the escapes.

    Contents are trimmed only where the tokenizer would join a heading's newline to what follows.
    """
    swaps = [(f"【{heading}】", f"[{heading}]") for heading in HEADINGS.values()]
    swaps += [(token, f"{token[0]} {token[1:]}") for token in tokenizer.all_special_tokens]
    bos = tokenizer.bos_token if tokenizer.bos_token != tokenizer.eos_token else None
    trim = "" if newline_stands_alone(tokenizer) else "|trim"
    names = ", ".join(f"{quote(role)}: {quote(heading)}" for role, heading in HEADINGS.items())
    return "\n".join(
        (
            "{%- set headings = {" + names + "} -%}",
            "{%- set swaps = [" + ", ".join(f"({quote(a)}, {quote(b)})" for a, b in swaps) + "] -%}",
            *(["{{- " + quote(bos) + " -}}"] if bos else []),
            "{%- for message in messages -%}",
            "{%- if message['role'] not in headings -%}",
            "{{- raise_exception('roles are system, user and assistant, not ' + message['role']) -}}",
            "{%- endif -%}",
            "{%- set said = namespace(text=message['content']" + trim + ") -%}",
            "{%- for literal, harmless in swaps -%}",
            "{%- set said.text = said.text|replace(literal, harmless) -%}",
            "{%- endfor -%}",
            "{{- '【' + headings[message['role']] + '】\\n' -}}",
            "{%- if message['role'] == 'assistant' -%}",
            "{%- generation -%}{{- said.text + " + quote(tokenizer.eos_token) + " -}}{%- endgeneration -%}",
            "{%- else -%}{{- said.text + '\\n' -}}{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{- '【" + HEADINGS["assistant"] + "】\\n' -}}{%- endif -%}",
        )
    )


def quote(text: str) -> str:
    """`text` as a literal of Jinja's."""
    return json.dumps(text, ensure_ascii=False)


def newline_stands_alone(tokenizer: Any) -> bool:
    """Whether a newline never shares a token with what follows, as in the tokenizers of `python -m data build`."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return all(ids("】\n" + text) == ids("】\n") + ids(text) for text in ("\n\na", "  a", "\ta", "あ", "{", "\u3000あ"))


def training_template(tokenizer: Any) -> str:
    """The tokenizer's template with `{% generation %}` around answers and their end: what SFT masks by.

    From TRL where it knows the template; else rebuilt from how it renders probes, if it then renders all of them alike.
    Raises UserError where neither is possible.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise UserError(f"{tokenizer.name_or_path}: no single chat template: give the tokenizer one, or a base model")
    if found := marked_template(tokenizer, tokenizer.chat_template):
        return found
    raise UserError(
        f"{tokenizer.name_or_path}: answers cannot be told from prompts in its chat template: put "
        "{% generation %} ... {% endgeneration %} around them and their end token in chat_template.jinja"
    )


@functools.lru_cache(maxsize=8)
def marked_template(tokenizer: Any, template: str) -> str | None:
    """`training_template` of `template`, which is the tokenizer's own now; None where there is none."""
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

    marked: str | None
    try:
        marked = get_training_chat_template(tokenizer) or template
    except ValueError:
        marked = rebuild_template(tokenizer)
    return marked if marked and is_chat_template_stop_token_trained(tokenizer, marked) else None


def rebuild_template(tokenizer: Any) -> str | None:
    """A template that renders as `tokenizer`'s does, with generation markers; None if probes tell them apart."""
    from jinja2 import TemplateError

    def render(*messages: tuple[str, str], template: str | None = None, prompt: bool = False) -> str:
        rows = [{"role": role, "content": content} for role, content in messages]
        return str(
            tokenizer.apply_chat_template(
                rows, tokenize=False, add_generation_prompt=prompt, chat_template=template or tokenizer.chat_template
            )
        )

    asked, said, again, rule = ("user", "Kq1"), ("assistant", "Za1"), ("user", "Kq2"), ("system", "Sy1")
    try:
        opening, ask_end = render(asked).split("Kq1")
        answer = render(asked, prompt=True).removeprefix(render(asked))
        end = render(asked, said).split("Za1")[1]
        reopening = render(asked, said, again).split("Za1")[1].removeprefix(end).split("Kq2")[0]
        with_rule, between = render(rule, asked).split("Kq1")[0].split("Sy1")
        trims = "|trim" if "\n  Kq1" not in render(("user", "\n  Kq1")) else ""
    except (TemplateError, ValueError):
        return None
    content = "{{- message['content']" + trims + " -}}"
    template = "\n".join(
        (
            "{%- for message in messages -%}",
            "{%- if message['role'] == 'system' -%}",
            "{{- " + quote(with_rule) + " -}}" + content + "{{- " + quote(between) + " -}}",
            "{%- elif message['role'] == 'user' -%}",
            "{%- if loop.first -%}{{- " + quote(opening) + " -}}",
            "{%- elif loop.previtem['role'] != 'system' -%}{{- " + quote(reopening) + " -}}{%- endif -%}",
            content + "{{- " + quote(ask_end) + " -}}",
            "{%- else -%}{{- " + quote(answer) + " -}}",
            "{%- generation -%}" + content + "{{- " + quote(end) + " -}}{%- endgeneration -%}",
            "{%- endif -%}{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{- " + quote(answer) + " -}}{%- endif -%}",
        )
    )
    turns = [asked, ("assistant", " \n two\nlines \n"), ("user", "  次 \n"), said, again, ("assistant", "終")]
    probes = [[*start, *turns[:length]] for start in ([], [rule]) for length in range(1, len(turns) + 1)]
    try:
        for probe, prompt in itertools.product(probes, (False, True)):
            if render(*probe, prompt=prompt) != render(*probe, template=template, prompt=prompt):
                return None
    except TemplateError:
        return None
    return template


def end_of_turn(tokenizer: Any) -> int:
    """Id of the special token that ends an answer. Raises UserError where there is none."""
    row = encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    special = {i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    ends = [i for i, mine in zip(row["input_ids"], row["assistant_masks"], strict=True) if mine and i in special]
    if not ends:
        raise UserError(f"{tokenizer.name_or_path}: answers of its chat template end without a special token")
    return int(ends[-1])


# --- masks -----------------------------------------------------------------------------------------------------------
def encode(tokenizer: Any, messages: list[Message]) -> dict[str, list[int]]:
    """`messages` as `input_ids` and `assistant_masks` (1: trained on), of equal length, as SFT gets them."""
    template = training_template(tokenizer)
    row = tokenizer.apply_chat_template(messages, chat_template=template, return_assistant_tokens_mask=True)
    return {"input_ids": list(row["input_ids"]), "assistant_masks": list(row["assistant_masks"])}


def encode_prompt(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Ids of `messages` up to where the assistant is to speak."""
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def show_mask(tokenizer: Any, messages: list[Message]) -> str:
    """What is trained on, for people: a line a token, its id, whether it counts, and its text."""
    row = encode(tokenizer, messages)
    lines = [f"{'id':>7}  trained  token"]
    for i, mine in zip(row["input_ids"], row["assistant_masks"], strict=True):
        text = json.dumps(tokenizer.convert_ids_to_tokens(i), ensure_ascii=False)[1:-1]
        lines.append(f"{i:>7}  {'   *   ' if mine else '       '}  {text}")
    return "\n".join(lines)


def drop_long(rows: "Dataset", tokenizer: Any, max_length: int) -> tuple["Dataset", Counter[str]]:
    """The rows that fit in `max_length` tokens, and how many did not, by reason.

    prompt_too_long: no token of the answer would be left; answer_too_long: its end would be cut off, which teaches not
    to stop. TRL drops the former without a word and trains on the latter.
    """
    dropped: Counter[str] = Counter()
    kept = []
    for index, row in enumerate(rows):
        prompt = row["prompt"] if "prompt" in row else row["messages"][:-1]
        answers = [row[key] for key in ("completion", "chosen", "rejected") if row.get(key)]
        whole = [row["messages"]] if "messages" in row else [prompt + answer for answer in answers]
        if len(encode_prompt(tokenizer, prompt)) >= max_length:
            dropped["prompt_too_long"] += 1
        elif any(len(encode(tokenizer, messages)["input_ids"]) > max_length for messages in whole):
            dropped["answer_too_long"] += 1
        else:
            kept.append(index)
    return rows.select(kept), dropped
