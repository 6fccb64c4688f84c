"""Any causal language model of transformers as something to train: from a folder or a GGUF file to losses and weights.

The model stays transformers' own, whatever its architecture. Only its head is replaced where that changes nothing: a
plain matrix after the decoder is taken by HeadLoss, which never holds all logits.
"""

import contextlib
import hashlib
import io
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import console
from data import fertility, sources, tokenizer
from pretrain import checkpoint
from pretrain.model import HeadLoss

SAME = 1e-4  # relative difference of two float32 losses that are the same but for rounding
LOGITS = 1 << 24  # of a chunk of tokens in validation: 64 MiB in float32, whatever the vocabulary
GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_NORMAL, GGUF_USER_DEFINED, GGUF_BYTE = 1, 4, 6  # kinds of pieces; the others are control tokens
ENDS = 1 << 20  # bytes at either end of a weight file that its fingerprint reads


def find(name: str) -> Path:
    """The GGUF file, or the folder of safetensors, that `name` is or holds: of a pull its last checkpoint.

    Raises UserError naming what is missing.
    """
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise console.UserError(f"--model {path}: no such file")
        from transformers.utils.import_utils import is_accelerate_available, is_gguf_available

        if not (is_gguf_available() and is_accelerate_available()):
            raise console.UserError(f"--model {path}: a GGUF file needs two packages: pip install 'llm-gacha[gguf]'")
        return path
    folder = [path, *checkpoint.folders(path)][-1]
    if not folder.is_dir():
        raise console.UserError(
            f"--model {name}: no such folder: give a Hugging Face model that lies on this machine, a pull's folder, or "
            "a GGUF file"
        )
    if not (folder / "config.json").is_file():
        raise console.UserError(f"--model {folder} lacks config.json: it is not a Hugging Face model's folder")
    if not list(folder.glob("*.safetensors")):
        pickled = "has only pickled weights, which are never read here: save them" if list(folder.glob("*.bin")) else ""
        raise console.UserError(f"--model {folder} {pickled or 'lacks weights: restore them'} as model.safetensors")
    return folder


def fingerprint(path: Path) -> str:
    """hex16 of a model: config.json, size and both ends of every weight file, since a whole one takes minutes."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted([path / "config.json", *path.glob("*.safetensors")]):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(ENDS))
            opened.seek(max(0, file.stat().st_size - ENDS))
            digest.update(opened.read())
    return digest.hexdigest()[:16]


def gguf_facts(path: Path) -> tuple[int | None, list[bytes | None]]:
    """How many positions a GGUF model reads, and the text that each id stands for (None: a control token).

    Only these, from the head of the file (format: github.com/ggml-org/ggml/blob/master/docs/gguf.md): the gguf package
    takes a minute over a vocabulary. Raises UserError for a damaged file.
    """
    try:
        with path.open("rb") as file:
            magic, _, _, entries = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            facts = {_gguf_value(file, GGUF_STRING).decode(): _gguf_value(file) for _ in range(entries)}
        kinds, texts = facts["tokenizer.ggml.token_type"], facts["tokenizer.ggml.tokens"]
        byte_level = facts["tokenizer.ggml.model"] == b"gpt2"
        limit = facts.get(f"{facts['general.architecture'].decode()}.context_length")
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise console.UserError(f"--model {path}: not a language model's GGUF file, or cut short ({error!r})") from None
    letters, space = fertility.byte_alphabet(), tokenizer.WORD_START.encode()
    pieces: list[bytes | None] = []
    for kind, text in zip(kinds, texts, strict=True):
        if kind not in (GGUF_NORMAL, GGUF_USER_DEFINED, GGUF_BYTE):
            pieces.append(None)
        elif kind == GGUF_BYTE:
            pieces.append(bytes([int(text[3:5], 16)]))  # <0x41>
        elif byte_level and kind == GGUF_NORMAL:
            pieces.append(bytes(letters[c] for c in text.decode()))
        else:
            pieces.append(text.replace(space, b" "))
    return limit, pieces


def _gguf_value(file: BinaryIO, kind: int | None = None) -> Any:
    """The next value of a GGUF file's head: of `kind`, or of the kind that is written before it."""
    kind = struct.unpack("<I", file.read(4))[0] if kind is None else kind
    if kind == GGUF_STRING:
        return file.read(struct.unpack("<Q", file.read(8))[0])
    if kind == GGUF_ARRAY:
        kind, length = struct.unpack("<IQ", file.read(12))
        if kind in GGUF_NUMBERS:
            form = f"<{length}{GGUF_NUMBERS[kind]}"
            return struct.unpack(form, file.read(struct.calcsize(form)))
        return [_gguf_value(file, kind) for _ in range(length)]
    return struct.unpack("<" + GGUF_NUMBERS[kind], file.read(struct.calcsize(GGUF_NUMBERS[kind])))[0]


def max_positions(folder: Path) -> int | None:
    """How many positions the model in `folder` was made for; None where its config.json sets no limit."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoConfig

    quieten()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise console.UserError(
            f"--model {folder}: config.json is of no known architecture ({sources.first_line(error)})"
        ) from None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def quieten() -> None:
    """transformers says nothing where a line of ours says what matters."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model in `dtype`, dropout off: its curve then depends on weights and data alone.

    Never from pickled weights, never with code of the model's author. Raises UserError where it cannot be loaded.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    quieten()
    folder: Path = path
    how: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if path.is_file():
        folder, how["gguf_file"] = path.parent, path.name
        print(f"dequantizing {path}: about a minute", file=sys.stderr, flush=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bar cannot be switched off
            model = AutoModelForCausalLM.from_pretrained(folder, **how)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, SafetensorError) as error:
        raise console.UserError(f"--model {path} cannot be loaded: {sources.first_line(error)}") from None
    return model.eval()


class CausalLM:
    """Losses of a transformers model; `own_head` says whether they are its decoder's hidden states through HeadLoss.

    Every window begins with `bos_id` in place of its first token, as every text of the model's first training did: a
    model may lean on it wherever it looks, and Gemma 3 270M without it needs 1.20 bits per byte for statutes, with it
    0.84. Most of what is learned otherwise would be to do without.
    """

    def __init__(self, model: Any, bos_id: int) -> None:
        self.model, self.bos_id = model, bos_id
        head = model.get_output_embeddings()
        self.head: Any = head if type(head) is nn.Linear and head.bias is None else None
        self.own_head = self.head is not None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @torch.no_grad()
    def try_own_head(self, ids: Tensor, targets: Tensor) -> None:
        """Set `own_head` by one window (1, length): is it the model's own loss, and will it still be?

        Not where the model scales or caps its logits after the head (Granite, Cohere, Gemma 2). Small logits would
        hide a cap from a comparison of losses, so the head's product is made a thousand times as large on its way.
        """
        if not self.own_head:
            return
        count = (targets >= 0).sum()
        ours, theirs = (float(loss(ids, targets, count)) for loss in (self.loss, self.loss_of_logits))
        passed: list[Tensor] = []

        def enlarge(_: nn.Module, __: tuple, product: Tensor) -> Tensor:
            passed.append(product * 1000)
            return passed[-1]

        with self.head.register_forward_hook(enlarge):
            logits = self.logits(ids)
        untouched = len(passed) == 1 and torch.equal(logits, passed[0])
        self.own_head = untouched and abs(ours - theirs) <= SAME * abs(theirs)

    def loss(self, ids: Tensor, targets: Tensor, count: Tensor) -> Tensor:
        """Sum of the negative log-likelihoods of `targets` (batch, length) over `count`; -1 is not scored."""
        if not self.own_head:
            return self.loss_of_logits(ids, targets, count)
        hidden = self.hidden(ids)
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):  # HeadLoss chooses each of its dtypes itself
            objective, _ = HeadLoss.apply(
                hidden.flatten(0, 1)[None], self.head.weight, targets.flatten()[None], count[None], 0.0
            )
        return objective.sum()

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states (batch, length, width) that the head reads."""
        return self.model.get_decoder()(input_ids=self.opened(ids), use_cache=False).last_hidden_state

    def logits(self, ids: Tensor) -> Tensor:
        """The model's own logits (batch, length, vocabulary)."""
        return self.model(input_ids=self.opened(ids), use_cache=False).logits

    def opened(self, ids: Tensor) -> Tensor:
        """`ids` (batch, length) with `bos_id` first."""
        return torch.cat((torch.full_like(ids[:, :1], self.bos_id), ids[:, 1:]), dim=1)

    def loss_of_logits(self, ids: Tensor, targets: Tensor, count: Tensor) -> Tensor:
        """As `loss`, from the model's own logits, all of them at once."""
        logits = self.logits(ids).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum") / count

    @torch.no_grad()
    def token_nll(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of every target (1, batch, length); 0 where the target is -1."""
        if self.own_head:
            hidden = self.hidden(ids[0]).flatten(0, 1)
            weight = self.head.weight.to(hidden.dtype)
            parts = (part @ weight.T for part in hidden.split(max(1, LOGITS // len(weight))))
        else:
            parts = (self.logits(row[None])[0] for row in ids[0])
        nll, wanted, at = torch.empty(targets.numel(), device=targets.device), targets.flatten(), 0
        for logits in parts:
            some = slice(at, at := at + len(logits))
            nll[some] = F.cross_entropy(logits.float(), wanted[some], ignore_index=-1, reduction="none")
        return nll.view_as(targets)

    def weights(self) -> dict[str, Tensor]:
        """What model.safetensors holds: parameters, a tied one once, and persistent buffers, under published names."""
        from transformers.core_model_loading import revert_weight_conversion

        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        tied -= {name for name, _ in self.model.named_parameters()}
        kept = {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied}
        kept = revert_weight_conversion(self.model, kept)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}

    def config(self) -> dict[str, Any]:
        """config.json of what is trained: in float32, and no longer quantized, whatever it came from."""
        config = json.loads(self.model.config.to_json_string())
        config.pop("quantization_config", None)
        return config | {"architectures": [type(self.model).__name__], "dtype": "float32"}

    def n_params(self) -> int:
        """Parameters, a tied embedding counted once."""
        return sum(p.numel() for p in self.model.parameters())

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward: 6 for each weight that multiplies, and causal attention 6 L d S (PaLM, appendix B).

        As if attention were full in every layer, and every expert used: an upper bound for models that save on these.
        """
        c = self.model.config.get_text_config()
        tied = self.head is not None and self.head.weight is self.model.get_input_embeddings().weight
        looked_up = 0 if tied else self.model.get_input_embeddings().weight.numel()
        width = c.num_attention_heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
        return 6.0 * (self.n_params() - looked_up) + 6.0 * c.num_hidden_layers * width * seq_len
