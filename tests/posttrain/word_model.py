"""A random Llama of one layer whose tokens are words, for tasks with a known answer, and rows of such tasks."""

import json
from pathlib import Path
from typing import Any

WORDS = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "good", "bad"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>{% endgeneration %}"
    "{% else %}<s> {{ m['content'] }} <a> {% endif %}{% endfor %}"
)


def make(folder: Path) -> Path:
    """Save model and tokenizer in `folder`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<pad>", "<a>", "<unk>", *WORDS]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special, additional_special_tokens=["<a>"])
    tokenizer.chat_template = TEMPLATE
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(names), **sizes, **ids, max_position_embeddings=64))
    with torch.no_grad():
        model.lm_head.weight.mul_(5)  # or adapters could not tell the words apart
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
