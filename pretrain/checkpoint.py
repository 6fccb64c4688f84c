"""Checkpoints: Hugging Face folders that also resume training.

    step-00000400/
        config.json  model.safetensors  generation_config.json     AutoModelForCausalLM loads these
        tokenizer.json  tokenizer_config.json  tokenizer.model ...  AutoTokenizer loads these
        training_state.safetensors  training_state.json            optimizer, RNG, guard, loader, clock
        training_state/*.safetensors                               instead, where fsdp shares the optimizer's state out
A folder appears under its name only when every byte of it is on disk.
"""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from console import UserError, write_atomic
from pretrain import ranks
from pretrain.model import ModelConfig

STATE_JSON, STATE_TENSORS, WEIGHTS = "training_state.json", "training_state.safetensors", "model.safetensors"
STATE_SHARDS = "training_state"
CLIP_STATE = "clip/state"
FORMAT = 3  # of the training state; 2 had another guard's, and 1 an optimizer entry for each of Hugging Face's matrices
KEPT = 2  # checkpoints of a pull


def hugging_face_config(c: ModelConfig, bos_id: int, eos_id: int) -> dict[str, Any]:
    """config.json of a Llama, or of a Qwen3 with QK-norm. rope_theta is said twice: transformers 5 and those before."""
    return {
        "architectures": ["Qwen3ForCausalLM" if c.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if c.qk_norm else "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": "float32",
    }


def folders(pull: Path) -> list[Path]:
    """Complete checkpoints of a pull, oldest first."""
    return sorted(path for path in (pull / "checkpoints").glob("step-*") if path.is_dir())


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def save(
    pull: Path,
    weights: dict[str, Tensor],
    training: dict[str, Tensor] | ranks.Shards,
    config: dict[str, Any],
    state: dict[str, Any],
    tokenizer: Path,
    keep_step: int = -1,
) -> Path:
    """Write the checkpoint of `state["step"]` updates, then drop all but the last KEPT and the newest < `keep_step`.

    `weights` under Hugging Face's names with their `config`; `training` from `training_tensors`, or what the ranks are
    writing of it. Raises OSError when the disk is full or may not be written; earlier checkpoints are untouched then.
    """
    final = pull / "checkpoints" / f"step-{state['step']:08d}"
    part = final.with_name(f".{final.name}.part")
    for left in (pull / "checkpoints").glob(".step-*.part"):
        shutil.rmtree(left, ignore_errors=True)  # of a save that was killed
    try:
        part.mkdir(parents=True)
        for path in tokenizer.iterdir():
            shutil.copyfile(path, part / path.name)  # not copytree, whose error hides the errno of a full disk
        _save_tensors(weights, part / WEIGHTS)
        if isinstance(training, ranks.Shards):
            training.wait()
            training.folder.rename(part / STATE_SHARDS)
        else:
            _save_tensors(training, part / STATE_TENSORS)
        bos_id, eos_id = state["bos_id"], state["eos_id"]
        _write_json(part / "config.json", config)
        _write_json(
            part / "generation_config.json", {"bos_token_id": bos_id, "eos_token_id": eos_id, "do_sample": True}
        )
        files = sorted(path for path in part.rglob("*") if path.is_file())
        sizes = {str(path.relative_to(part)): path.stat().st_size for path in files}
        _write_json(part / STATE_JSON, {**state, "format": FORMAT, "files": sizes})
        for path in [*files, part / STATE_JSON]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    older = [folder for folder in folders(pull) if keep_step >= 0 and step_of(folder) < max(1, keep_step)]
    keep = {*folders(pull)[-KEPT:], *older[-1:]}
    for folder in folders(pull):
        if folder not in keep:
            shutil.rmtree(folder)
    return final


def shards_folder(pull: Path, step: int, clear: bool) -> Path:
    """Where the ranks write their parts of the checkpoint of `step`; `clear`: of what a killed save may have left."""
    for left in (pull / "checkpoints").glob(".step-*.shards") if clear else ():
        shutil.rmtree(left, ignore_errors=True)
    return pull / "checkpoints" / f".step-{step:08d}.shards"


def drop_since(pull: Path, onset_step: int) -> None:
    """Remove the checkpoints that a divergence reaches into. Step N's loss is that of checkpoint N: N is lost too.

    The initial weights stay in any case.
    """
    for folder in reversed(folders(pull)):
        if step_of(folder) >= max(1, onset_step):
            dropped = folder.with_name(f".{folder.name}.part")  # a kill must not leave half of one under its name
            shutil.rmtree(dropped, ignore_errors=True)
            folder.rename(dropped)
            shutil.rmtree(dropped)


def amend(folder: Path, changes: dict[str, Any]) -> None:
    """Change entries of a checkpoint's training_state.json, all at once."""
    state = json.loads((folder / STATE_JSON).read_bytes())
    write_atomic(folder / STATE_JSON, _as_json({**state, **changes}))


def retries(folder: Path) -> int:
    """How often its pull had gone back when a checkpoint was saved, or last gone back to; 0 where it does not say."""
    try:
        return int(json.loads((folder / STATE_JSON).read_bytes())["recovery"]["retries"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def verify(folder: Path) -> dict[str, Any]:
    """training_state.json of a checkpoint whose files are all there and whole. Raises UserError naming what is not."""
    older = [f.name for f in folders(folder.parent.parent) if f.name < folder.name]
    advice = f"delete the folder to go on from {older[-1]}" if older else "delete the folder to start the pull again"
    if not (folder / STATE_JSON).is_file():
        raise UserError(f"checkpoint {folder} lacks {STATE_JSON}: restore the file, or {advice}")
    try:
        state = json.loads((folder / STATE_JSON).read_bytes())
    except ValueError:
        raise UserError(f"checkpoint {folder}: {STATE_JSON} is not JSON: restore the file, or {advice}") from None
    if not isinstance(state, dict) or not {"step", "files"} <= state.keys():
        raise UserError(f"checkpoint {folder}: {STATE_JSON} lacks entries: restore the file, or {advice}")
    if state.get("format") != FORMAT:
        raise UserError(f"checkpoint {folder} is of another version of this program: go on with that, or {advice}")
    for name, size in state["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"checkpoint {folder} lacks {name}: restore the file, or {advice}")
        if path.stat().st_size != size:
            raise UserError(f"checkpoint {folder}: {name} has {path.stat().st_size} bytes, not {size}: {advice}")
    return state


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """training_state.json and weights of a checkpoint. Raises UserError where it is not whole."""
    state = verify(folder)
    return state, _load_tensors(folder / WEIGHTS)


def load_training(folder: Path, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Training tensors of a verified checkpoint; of those as large as `parameters` only what this rank holds of these.

    Whether many ranks wrote it or one, and however many read it.
    """
    if (folder / STATE_SHARDS).is_dir():
        return ranks.load_shards(folder / STATE_SHARDS, parameters)
    if any(ranks.local(parameter) is not parameter for parameter in parameters.values()):
        return ranks.load_shards(folder, parameters)
    return _load_tensors(folder / STATE_TENSORS)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"checkpoint {path.parent} cannot be read ({error}): delete the folder") from None


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which training cannot change while they are written."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def training_tensors(
    parameters: dict[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    clip_state: Tensor | None = None,
) -> dict[str, Tensor]:
    """Optimizer state, as `index of the optimizer/parameter/field`, that of clipping, and of the random generators."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    tensors = {"rng.cpu": torch.get_rng_state()}
    tensors |= {CLIP_STATE: clip_state} if clip_state is not None and clip_state.numel() else {}
    tensors |= {"rng.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return tensors | {
        f"{index}/{names[parameter]}/{field}": tensor
        for index, optimizer in enumerate(optimizers)
        for parameter, fields in optimizer.state.items()
        for field, tensor in fields.items()
    }


def restore_training(
    tensors: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    clip_state: Tensor | None = None,
) -> None:
    """Put `training_tensors` back."""
    for key, tensor in tensors.items():
        if key == "rng.cpu":
            torch.set_rng_state(tensor)
        elif key == "rng.cuda":
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(tensor)
        elif key == CLIP_STATE:
            assert clip_state is not None
            clip_state.copy_(tensor)
        else:
            index, name, field = key.split("/")
            parameter = parameters[name]
            # AdamW keeps its step count on the CPU unless fused on a GPU, where it must sit beside the moments.
            optimizers[int(index)].state[parameter][field] = tensor.to(parameter.device)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors' save_file, whose Rust error on a full disk becomes the OSError that it was."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(_errno_in(str(error)), f"cannot write ({error})", str(path)) from None


def _errno_in(message: str) -> int:
    found = re.search(r"os error (\d+)", message)
    return int(found.group(1)) if found else errno.EIO


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_bytes(_as_json(value))


def _as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
