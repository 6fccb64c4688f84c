"""`python -m posttrain.export RUN_OR_ADAPTER --out DIR`: a folder that transformers, vLLM and llama.cpp take.

A LoRA adapter is merged into its base, in float32, and the merged model is held against the two before and after:
the adapter must change the base, the merge must not change the adapter, and a fresh process that knows nothing but
transformers must read the same logits from the folder. The folder appears under its name only when it is whole.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import console
from posttrain import models, to_gguf

PROBE = "お問い合わせの件、6月12日(水)14:00までにご返信ください。 The meeting is on Friday.\n合計 1,200円"
MERGED = 1e-3  # largest change of a logit, of the spread of all, that a merge in float32 may make
RESULT_KEYS = ("name", "stage", "recipe", "seed", "status")  # of a run's result.json; nothing else reaches the card


@dataclass(frozen=True)
class ExportConfig:
    source: Annotated[str, tyro.conf.Positional]
    """folder of a run, a checkpoint, a Hugging Face model or a PEFT adapter; or a GGUF file"""
    out: Path
    """folder to write, which must not exist or be empty"""
    base: str | None = None
    """model that an adapter goes on, where the one that it names has moved"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """of the weights; bfloat16 is what vLLM computes in, float32 keeps every bit of a small model"""
    check: bool = True
    """compare what a fresh process reads from the folder with what was written"""
    llama_cpp: Path | None = None
    """checkout of llama.cpp, whose converter then makes model.gguf too; without it the commands are printed"""
    json: bool = False
    """print the result as one JSON object"""


def main(argv: list[str]) -> int:
    """Export one model and print what was measured."""
    config = console.parse(ExportConfig, argv, "python -m posttrain.export")
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise console.UserError(f"--out {config.out} exists already: remove it, or choose another folder")
    converter = to_gguf.find_converter(config.llama_cpp) if config.llama_cpp else None
    source = models.find(config.source)
    part = config.out.with_name(f".{config.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        result = export(source, part, config)
        if converter:
            to_gguf.convert(converter, part, config.dtype)
        if config.out.exists():
            config.out.rmdir()
        part.rename(config.out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if not converter:
        print(to_gguf.instructions(config.out, config.dtype), file=sys.stderr)
    console.print_result({"out": str(config.out), **result}, as_json=config.json)
    return 0


def export(source: Path, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write the model at `source` (what `models.find` returned) into `folder`, an empty one; returns what was measured.

    merge_difference: largest change of a logit by the merge; adapter_difference: by the adapter; cast_difference: by
    the dtype; reload_difference: between this process and a fresh one, 0 where all is well. Raises UserError where an
    adapter changes nothing, or a check fails.
    """
    import torch

    from posttrain import chat

    model, tokenizer = models.load(source, base=config.base)
    ids = tokenizer(PROBE, return_tensors="pt", add_special_tokens=False)["input_ids"]
    result: dict[str, Any] = {"source": str(source), "model_type": model.config.model_type}
    adapter = (source / models.ADAPTER).is_file()
    if adapter:
        model, measured = merge(source, model, ids)
        result |= measured
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise console.UserError(f"{source}: its tokenizer has more tokens than the model has embeddings")
    if tokenizer.chat_template:
        chat.install_template(tokenizer, model)
    exact = logits_of(model, ids)
    for parameter in model.parameters():  # not `to`: rotary frequencies stay in float32, as in a model that is loaded
        parameter.data = parameter.data.to(getattr(torch, config.dtype))
    cast = logits_of(model, ids)
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    result |= {"dtype": config.dtype, "cast_difference": float((cast - exact).abs().max())}
    result["cast_same_token"] = float((cast.argmax(-1) == exact.argmax(-1)).float().mean())
    origin = models.base_of(source, config.base) if adapter else source
    write_folder(model, tokenizer, folder, [source, origin])
    (folder / "README.md").write_text(card(result, lineage(source, config.base), origin.is_file()), encoding="utf-8")
    if config.check:
        result["reload_difference"] = reload_difference(folder, ids[0], cast[0])
        if result["reload_difference"] > 0:
            difference = result["reload_difference"]
            raise console.UserError(f"{config.out}: read again, logits differ by {difference:g}: nothing was written")
    return result


def merge(source: Path, tuned: Any, ids: Any) -> tuple[Any, dict[str, float]]:
    """The adapter on its base, as one model, and by how much logits changed. Raises UserError."""
    import torch

    with torch.no_grad():
        with tuned.disable_adapter():
            before = tuned(ids).logits.float()
        adapted = tuned(ids).logits.float()
    merged = tuned.merge_and_unload()
    difference = float((logits_of(merged, ids) - adapted).abs().max())
    moved = float((adapted - before).abs().max())
    if moved == 0:
        raise console.UserError(f"{source}: the adapter does not change its base: it was not trained, or not saved")
    if difference > MERGED * float(adapted.std()):
        raise console.UserError(f"{source}: merged, logits differ by {difference:g} from the adapter's on its base")
    return merged, {"adapter_difference": moved, "merge_difference": difference}


def logits_of(model: Any, ids: Any) -> Any:
    """(batch, length, vocabulary) in float32."""
    import torch

    with torch.no_grad():
        return model(ids).logits.float()


def write_folder(model: Any, tokenizer: Any, folder: Path, origins: list[Path]) -> None:
    """Weights as safetensors, config, generation config, tokenizer and template, and tokenizer.model from `origins`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    spelled = json.loads((folder / "tokenizer_config.json").read_bytes())
    if spelled["tokenizer_class"] == "TokenizersBackend":
        # The same class under the name that transformers 4 knows too.
        spelled["tokenizer_class"] = "PreTrainedTokenizerFast"
    for local in ("is_local", "local_files_only"):
        spelled.pop(local, None)
    for origin in origins:
        if (origin / "tokenizer.model").is_file():
            shutil.copyfile(origin / "tokenizer.model", folder / "tokenizer.model")
            # llama.cpp reads this here, and not in tokenizer.model; else it puts a space before every text.
            spelled.setdefault("add_prefix_space", bool(to_gguf.puts_space(folder)))
            break
    console.write_atomic(folder / "tokenizer_config.json", as_json(spelled))
    described = json.loads((folder / "config.json").read_bytes())
    described.pop("_name_or_path", None)  # a path of this machine
    rope = described.get("rope_parameters") or {}
    if rope.get("rope_type") == "default":
        described.setdefault("rope_theta", rope["rope_theta"])  # where transformers 4 looks for it
    console.write_atomic(folder / "config.json", as_json(described))
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)  # else only their writer may read them


def as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def lineage(source: Path, base: str | None) -> dict[str, Any]:
    """What a reader of the card may know: fingerprints, the adapter's shape and its run; no path of this machine."""
    from pretrain import causal_lm

    known: dict[str, Any] = {}
    if (source / models.ADAPTER).is_file():
        lower = models.base_of(source, base)
        known |= {"base": lower.name, "base_fingerprint": causal_lm.fingerprint(lower)}
        shape = json.loads((source / models.ADAPTER).read_bytes())
        modules = shape.get("target_modules")
        known["adapter"] = {key: shape.get(key) for key in ("peft_type", "r", "lora_alpha")}
        known["adapter"]["target_modules"] = sorted(modules) if isinstance(modules, list) else modules
    else:
        known |= {"model": source.name, "fingerprint": causal_lm.fingerprint(source)}
    for folder in (source, *list(source.parents)[:2]):
        try:
            run = json.loads((folder / "result.json").read_bytes())
        except (OSError, ValueError):
            continue
        known["run"] = {key: run[key] for key in RESULT_KEYS if key in run}
        inputs = run.get("lineage")
        if isinstance(inputs, dict):
            known["run"] |= {key: value for key, value in inputs.items() if re.fullmatch("[0-9a-f]{8,64}", str(value))}
        break
    return known


def card(result: dict[str, Any], known: dict[str, Any], gguf: bool) -> str:
    """README.md. What was read from files stands in a block of JSON, where Markdown and HTML mean nothing."""
    known = {**known, "parameters": result["parameters"], "dtype": result["dtype"]}
    facts = json.dumps(known, ensure_ascii=False, indent=2)
    for sign in "<>&`":
        facts = facts.replace(sign, f"\\u{ord(sign):04x}")
    terms = "The base model's license and terms hold for this one too.\n\n" if "base" in known or gguf else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# Exported model

```json
{facts}
```

{terms}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".", dtype="auto")
messages = [{{"role": "user", "content": "..."}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=256)[0, ids["input_ids"].shape[1] :]))
```
"""


def reload_difference(folder: Path, ids: Any, logits: Any) -> float:
    """Largest difference of a logit between (length, vocabulary) `logits` of `ids` and what a fresh process reads."""
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.safetensors"
        script = Path(__file__).with_name("reload.py")
        command = [sys.executable, str(script), str(folder.resolve()), PROBE, str(out)]
        # As many threads, so that sums are made in as many parts.
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        child = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=environment, check=False)
        if child.returncode:
            said = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise console.UserError(f"{folder}: a fresh process cannot load it: {said}")
        read = load_file(out)
    if not torch.equal(read["ids"], ids):
        raise console.UserError(f"{folder}: a fresh process reads other tokens from the same text")
    return float((read["logits"] - logits).abs().max())


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
