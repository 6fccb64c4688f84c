"""`python train.py sample CHECKPOINT --prompt TEXT`: a continuation, by transformers, from any causal-LM folder."""

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import console


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: Annotated[str, tyro.conf.Positional]
    """a checkpoint folder, or the folder of a pull (then its last checkpoint)"""
    prompt: str = ""
    """text to continue; empty: a document from its beginning"""
    max_new_tokens: int = 160
    """tokens to add at most; a document's end stops earlier"""
    temperature: float = 0.7
    """softmax temperature; 0: the most likely token each time"""
    top_p: float = 0.95
    """nucleus: probability mass that is sampled from"""
    n_samples: int = 1
    """continuations"""
    seed: int = 0
    """sampling seed"""
    json: bool = False
    """print one JSON object"""


def find_checkpoint(path: Path) -> Path:
    """The Hugging Face folder that `path` is or holds. Raises UserError naming what is missing."""
    found = sorted((path / "checkpoints").glob("step-*"))
    folder = found[-1] if found else path
    if not folder.is_dir():
        raise console.UserError(f"no checkpoint at {path}: give a folder made by train.py, or any Hugging Face model")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise console.UserError(f"checkpoint {folder} lacks {name}: it is not a complete Hugging Face folder")
    if not list(folder.glob("*.safetensors")):
        raise console.UserError(f"checkpoint {folder} lacks model.safetensors: restore it, or take another step")
    return folder


def main(argv: list[str]) -> int:
    config = console.parse(SampleConfig, argv, "train.py sample")
    if config.temperature < 0 or not 0 < config.top_p <= 1:
        raise console.UserError("--temperature must be 0 or more, --top_p above 0 and at most 1")
    if config.n_samples < 1 or config.max_new_tokens < 1:
        raise console.UserError("--n_samples and --max_new_tokens must be at least 1")
    folder = find_checkpoint(Path(config.checkpoint))
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(config.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise console.UserError(f"checkpoint {folder} cannot be loaded: {error}") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()  # type: ignore[arg-type]
    # The corpus was NFKC-normalised by default, so full-width digits in a prompt would be characters never seen.
    prompt = unicodedata.normalize("NFKC", config.prompt)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        limit = model.config.max_position_embeddings
        raise console.UserError(f"the prompt has {len(ids)} tokens and the model reads {limit}: shorten it")
    sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    with torch.no_grad():
        generated = model.generate(  # type: ignore[misc]
            torch.tensor([ids] * config.n_samples, device=device),
            max_new_tokens=min(config.max_new_tokens, room),
            pad_token_id=tokenizer.eos_token_id,
            **(sampling if config.temperature > 0 else {"do_sample": False}),
        )
    texts = [prompt + str(tokenizer.decode(row[len(ids) :], skip_special_tokens=True)) for row in generated]
    if config.json:
        console.print_result({"checkpoint": str(folder), "prompt": prompt, "samples": texts}, as_json=True)
    else:
        print("\n\n".join(texts))
    return 0
