"""A model's own Hugging Face tokenizer, so that its training goes on with the very ids that it knows.

Any tokenizer.json that gives every text back will do: byte-level BPE (GPT-2, Llama 3, Qwen), SentencePiece-like with
byte fallback (Gemma, Mistral), and what `python -m data extend` makes of them. A GGUF file's is made into a folder
first.
"""

import json
import shutil
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from console import UserError
from data import fertility, shards, sources, tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json")
ALSO = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "new_pieces.json")
END_OF_TEXT = "<|endoftext|>"  # what opens and ends documents for models without a <bos>; a chat's turns end otherwise


class ForeignTokenizer:
    """tokenizer.json of a folder, with what a build asks of SentencePiece: `encode` and `get_piece_size`.

    `bos` and `eos` are the ids that open and end a document. Where the model has but one id for both, as GPT-2 and
    Qwen, they are the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.backend = fertility.load_backend(folder / "tokenizer.json")
        self.encoder = fertility.open_huggingface(folder / "tokenizer.json", str(folder))
        self.bos, self.eos = document_ids(folder, self.backend)

    def encode(self, texts: list[str], num_threads: int = 0) -> list[list[int]]:  # noqa: ARG002 - its own pool
        """Ids of each text, where `<s>` and its like in a text are text: AutoTokenizer's split_special_tokens."""
        return self.encoder.encode(texts)

    def get_piece_size(self) -> int:
        """The largest id and one: ids may have gaps."""
        return len(self.encoder.pieces)

    def token_bytes(self) -> np.ndarray:
        """(vocab,) uint16: the UTF-8 bytes of text that each id stands for; 0 for control tokens and gaps."""
        return np.array([len(piece or b"") for piece in self.encoder.pieces], "<u2")

    def kind(self) -> str:
        """The model's type as tokenizer.json names it, in lower case: bpe, unigram."""
        return type(self.backend.model).__name__.lower()

    def probe(self, texts: Iterable[str]) -> None:
        """Raise UserError unless every text comes back, and its ids stand for as many bytes as it has.

        Else bits per byte would be wrong. Two things are forgiven: that a tokenizer composes characters (NFC: Qwen),
        and one byte of a space that it puts before every text (Llama 2).
        """
        lengths = self.token_bytes()
        for text in [*tokenizer.PROBES, *texts]:
            ids = self.encoder.encode([text])[0]
            back = self.encoder.decode(ids)
            spelled = int(lengths[ids].sum()) - len(back.encode())
            same = unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", text)
            if not same or spelled not in (0, int(self.encoder.prefix)):
                raise UserError(
                    f"{self.folder / 'tokenizer.json'} does not give this text back: {text[:40]!r}: bits per byte "
                    "could not be measured; choose a model whose tokenizer has byte fallback"
                )


def is_foreign(path: Path) -> bool:
    """Whether `path` (a folder or a GGUF file) is to be read here, not as a SentencePiece folder of this project's.

    A published folder may have a tokenizer.model too, but with other control ids or fewer pieces than the model knows.
    """
    if path.suffix == ".gguf":
        return True
    if not (path / "tokenizer.json").is_file():
        return False
    if not all((path / name).is_file() for name in tokenizer.FILES):
        return True
    model = fertility.load_model(path / "tokenizer.model")
    ours = (model.unk_id(), model.bos_id(), model.eos_id()) == (shards.UNK, shards.BOS, shards.EOS)
    return not ours or fertility.locate(str(path)).suffix == ".json"


def identity(path: Path) -> Path:
    """The file that decides the ids of a foreign tokenizer. Raises UserError if there is no such GGUF file."""
    if path.suffix == ".gguf" and not path.is_file():
        raise UserError(f"--tokenizer {path}: no such file")
    return path if path.is_file() else path / "tokenizer.json"


def opened(folder: Path, texts: Iterable[str]) -> tuple[Any, dict[str, Any], np.ndarray]:
    """The tokenizer of `folder`, ours or a foreign one, once it was probed with `texts`.

    Returns what encodes, the manifest's `tokenizer` entry, and the bytes of text that each id stands for.
    """
    coder: Any
    if is_foreign(folder):
        coder, name = ForeignTokenizer(folder), "tokenizer.json"
        coder.probe(texts)
        kind, lengths, (bos, eos) = coder.kind(), coder.token_bytes(), (coder.bos, coder.eos)
    else:
        tokenizer.probe(folder, texts)
        coder, name = tokenizer.load(folder), "tokenizer.model"
        kind, lengths, (bos, eos) = tokenizer.kind(coder), tokenizer.token_bytes(coder), (shards.BOS, shards.EOS)
    sha256 = shards.hash_files(folder / name)
    entry = {"file": name, "sha256": sha256, "model_type": kind, "vocab_size": coder.get_piece_size()}
    return coder, entry | {"bos_id": bos, "eos_id": eos}, lengths


def copy_folder(source: Path, folder: Path) -> None:
    """The tokenizer of a folder or a GGUF file, as Hugging Face's files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".gguf":
        write_gguf_tokenizer(source, folder)
    else:
        for name in (*FILES, *ALSO):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
            elif name in FILES:
                raise UserError(f"{source / name} is missing: give the folder that the model was published with")
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    if config.pop("auto_map", None):  # names code of the model's author, which is never run here
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def write_gguf_tokenizer(path: Path, folder: Path) -> None:
    """The tokenizer inside a GGUF file as a Hugging Face folder, by transformers' own conversion."""
    from transformers import AutoTokenizer
    from transformers.utils.import_utils import is_gguf_available

    if not is_gguf_available():
        raise UserError(f"{path}: a GGUF file is read with a package: pip install 'llm-gacha[gguf]'")
    try:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"{path}: no tokenizer can be read from it ({sources.first_line(error)})") from None


def document_ids(folder: Path, backend: Any) -> tuple[int, int]:
    """Ids that open and end a document, as tokenizer_config.json names them. Raises UserError if it names none."""
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                named |= json.loads((folder / name).read_bytes())
            except ValueError as error:
                raise UserError(f"{folder / name}: not JSON ({error}): restore it") from None
    pieces = [
        token["content"] if isinstance(token := named.get(key), dict) else token for key in ("bos_token", "eos_token")
    ]
    bos, eos = (backend.token_to_id(piece) if piece else None for piece in pieces)
    if bos is None:
        bos = eos = next((i for i in (backend.token_to_id(END_OF_TEXT), eos) if i is not None), None)
    if bos is None or eos is None:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: names no eos_token that tokenizer.json has, so nothing would tell "
            "documents apart: add it"
        )
    return bos, eos
