"""A model to talk to, to tune or to export, from whatever holds one: a run, a checkpoint, an adapter, a GGUF file."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import console
from data import sources

ADAPTER = "adapter_config.json"


def find(name: str) -> Path:
    """The GGUF file, or the folder of a model or of a PEFT adapter, that `name` is or holds.

    Of a run it is model/, else the last of checkpoints/. Raises UserError naming what is missing.
    """
    path = Path(name)
    if not path.exists():
        raise console.UserError(f"{name}: no such model: give a folder of a run or of a Hugging Face model, or a .gguf")
    last = sorted((path / "checkpoints").glob("*-*"), key=step_of)[-1:]
    for folder in (path / "model", *last, path):
        if (folder / ADAPTER).is_file():
            return folder
        if (folder / "config.json").is_file():
            path = folder
            break
    from pretrain import causal_lm

    try:
        return causal_lm.find(str(path))
    except console.UserError as error:
        raise console.UserError(str(error).removeprefix("--model ")) from None


def step_of(folder: Path) -> int:
    """The number that the names of checkpoints end with: step-00000400, checkpoint-400."""
    found = re.search(r"-(\d+)$", folder.name)
    return int(found[1]) if found else -1


def base_of(adapter: Path, base: str | None = None) -> Path:
    """The model that `adapter` was trained on: `base`, or what the adapter names. Raises UserError."""
    try:
        named = str(json.loads((adapter / ADAPTER).read_bytes())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise console.UserError(f"{adapter / ADAPTER} cannot be read ({error!r}): restore it") from None
    try:
        return find(base or named)
    except console.UserError as error:
        raise console.UserError(f"{adapter} is an adapter, and its base cannot be opened: {error}") from None


def load(path: Path, dtype: Any = None, base: str | None = None) -> tuple[Any, Any]:
    """The model at `path` (what `find` returned), dropout off, and its tokenizer. An adapter is put on its base.

    dtype: of the weights, a torch.dtype (default float32). Only safetensors and GGUF are read, and no code that comes
    with a model is run. Raises UserError.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from pretrain import causal_lm

    dtype = dtype or torch.float32
    if not (path / ADAPTER).is_file():
        try:
            model = causal_lm.load(path, dtype)
        except console.UserError as error:
            raise console.UserError(str(error).removeprefix("--model ")) from None
        if path.is_file():
            # Its weights are dequantized, but trainers would refuse them for what the model says of their origin.
            for name in ("is_quantized", "quantization_method", "hf_quantizer"):
                vars(model).pop(name, None)
            vars(model.config).pop("quantization_config", None)
            # Saving an adapter, peft looks for a folder to see whether the vocabulary grew.
            warnings.filterwarnings("ignore", "Could not find a config file")
        # An adapter notes the name of its base; of a GGUF file transformers only keeps the folder.
        model.config._name_or_path = model.name_or_path = str(path.resolve())
        return model, load_tokenizer(path)
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (path / "adapter_model.safetensors").is_file():
        raise console.UserError(f"{path} lacks adapter_model.safetensors: pickled adapters are never read")
    lower = base_of(path, base)
    model, tokenizer = load(lower, dtype)
    if (path / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks for a property that transformers renamed
            tuned = PeftModel.from_pretrained(model, str(path), use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise console.UserError(f"{path} does not fit on {lower}: {sources.first_line(error)}") from None
    return tuned.eval(), tokenizer


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder or a GGUF file. Raises UserError."""
    from transformers import AutoTokenizer

    folder, how = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **how)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise console.UserError(f"{path}: its tokenizer cannot be loaded: {sources.first_line(error)}") from None


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Into `folder`, with tokenizer.model where it was loaded with one: llama.cpp reads that, transformers drops it."""
    tokenizer.save_pretrained(folder)
    model = Path(tokenizer.name_or_path) / "tokenizer.model"
    if model.is_file() and not (folder / model.name).exists():
        shutil.copyfile(model, folder / model.name)
