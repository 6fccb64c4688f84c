"""What a stranger sees of an exported folder: nothing but transformers, in a process of its own.

    python posttrain/reload.py FOLDER TEXT LOGITS.safetensors

Writes `ids` (length) of TEXT and `logits` (length, vocabulary) in float32, as AutoTokenizer and AutoModelForCausalLM
give them.
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, text: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits.float()
    save_file({"ids": ids[0], "logits": logits[0].contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
