"""`python -m data fertility`: what tokenizers cost on a text, in-domain and held-out, side by side.

A tokenizer is a folder or file (tokenizer.model of SentencePiece, or tokenizer.json), a shards folder, or
`mistral:NAME`, one of those that the mistral-common package carries: real baselines without a network.
"""

import hashlib
import heapq
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import console
from console import UserError
from data import sources, tokenizer

BATCH_CHARACTERS = 4_000_000  # encoded at a time, so that memory does not grow with the corpus


@dataclass(frozen=True)
class FertilityConfig:
    """What tokenizers cost: characters and bytes a token, fallback, unused ids, overlap, speed."""

    tokenizers: tuple[str, ...]
    """Folders or files with tokenizer.model or tokenizer.json, shards folders, mistral:NAME; overlap is with the
    first."""
    source: str
    """In-domain documents: files:GLOB, jsonl:GLOB, parquet:GLOB, hf:NAME ... as for `data build`."""
    held_out: str | None = None
    """Documents of another kind, such as general text."""
    documents: int = 10_000
    """Documents of each set at most, chosen by the hash of their text; 0: all."""
    text_key: str = "text"
    """Key or column of the text (jsonl, parquet, hf)."""
    normalize: str = "nfkc"
    """Unicode normalisation of every document: nfkc or none."""
    json: bool = False
    """Print {"rows": [...]} as one JSON object."""


@dataclass(frozen=True)
class Encoder:
    """Any tokenizer as two functions; `pieces[i]` is the bytes of text that id i stands for, None for a reserved id."""

    name: str
    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    pieces: list[bytes | None]
    unknown: int | None
    prefix: bool  # a space is put before every text


def main(argv: list[str]) -> int | None:
    """`python -m data fertility`: one row per tokenizer and set on stdout."""
    config = console.parse(FertilityConfig, argv, "python -m data fertility")
    if config.normalize not in ("nfkc", "none"):
        raise UserError(f"--normalize {config.normalize}: nfkc or none")
    sets = {}
    for name, source in (("in_domain", config.source), ("held_out", config.held_out)):
        if source is not None:
            documents = sources.read(source, text_key=config.text_key)
            texts = (tokenizer.normalise(document.text, config.normalize) for document in documents)
            sets[name] = sample(texts, documents=config.documents)
    rows = report([open_encoder(name) for name in config.tokenizers], sets)
    if config.json:
        console.print_result({"rows": rows}, as_json=True)
        return 0
    cells = [[str(value) for value in values] for values in ([*rows[0]], *(row.values() for row in rows))]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def report(encoders: list[Encoder], sets: dict[str, list[str]]) -> list[dict[str, Any]]:
    """One row per encoder and set of texts. All but `mb_per_second` is the same on every machine.

    fallback_tokens: share of tokens that are less than a character (`<0xE3>`, or a fragment in a byte-level
    vocabulary); fallback_characters: share of characters that no single token holds; unused_ids: ids that no text of
    the set needed; overlap: share of this vocabulary's pieces, as bytes of text, that the first encoder has too;
    mb_per_second: UTF-8 megabytes per CPU-second, on all cores together; round_trip_failures: texts that do not come
    back.
    """
    if not encoders or any(not texts for texts in sets.values()):
        empty = next((name for name, texts in sets.items() if not texts), "")
        raise UserError(f"no document in {empty}" if encoders else "--tokenizers: name at least one")
    first = {piece for piece in encoders[0].pieces if piece}
    return [
        {"tokenizer": encoder.name, "set": name} | measure(encoder, texts, first)
        for encoder in encoders
        for name, texts in sets.items()
    ]


def measure(encoder: Encoder, texts: list[str], first: set[bytes]) -> dict[str, Any]:
    """The figures of one row; `first` are the pieces to compare the vocabulary with."""
    size = len(encoder.pieces)
    whole = np.array([whole_characters(piece or b"") for piece in encoder.pieces])
    partial = np.array([bool(piece) and not count for piece, count in zip(encoder.pieces, whole, strict=True)])
    seen, covered, failures, seconds = np.zeros(size, np.int64), 0, 0, 0.0
    for batch in batches(texts):
        begun = time.process_time()
        encoded = encoder.encode(batch)
        seconds += time.process_time() - begun
        for text, ids in zip(batch, encoded, strict=True):
            seen += np.bincount(ids, minlength=size)
            covered += int(whole[ids].sum()) - (encoder.prefix and bool(text)) if ids else 0
            failures += encoder.decode(ids) != text
    characters, raw, tokens = sum(map(len, texts)), sum(len(text.encode()) for text in texts), int(seen.sum())
    pieces = {piece for piece in encoder.pieces if piece}
    return {
        "documents": len(texts),
        "characters": characters,
        "bytes": raw,
        "tokens": tokens,
        "characters_per_token": round(characters / max(tokens, 1), 4),
        "bytes_per_token": round(raw / max(tokens, 1), 4),
        "fallback_tokens": round(float(seen[partial].sum()) / max(tokens, 1), 6),
        "fallback_characters": round(1 - covered / max(characters, 1), 6),
        "unknown_tokens": round(int(seen[encoder.unknown]) / max(tokens, 1), 6) if encoder.unknown is not None else 0.0,
        "vocab_size": size,
        "unused_ids": int((seen == 0).sum()),
        "overlap": round(len(pieces & first) / max(len(pieces), 1), 4),
        "round_trip_failures": failures,
        "mb_per_second": round(raw / 1e6 / seconds, 2) if seconds else None,
    }


def whole_characters(piece: bytes) -> int:
    """Characters that `piece` holds from their first byte to their last."""
    text = piece.decode("utf-8", "replace")
    return len(text) - text.count("\ufffd") + piece.count(b"\xef\xbf\xbd")


def batches(texts: list[str]) -> Iterator[list[str]]:
    """`texts` in lists of about BATCH_CHARACTERS."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def sample(texts: Iterable[str], *, documents: int = 0, text_bytes: int = 0) -> list[str]:
    """At most so many texts, or bytes of text (0: no limit), by the smallest hash: the same ones whatever their order.

    Blank texts and copies are left out; holds no more in memory than it returns.
    """
    heap: list[tuple[int, str]] = []
    held, seen = 0, set()
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        key = int.from_bytes(hashlib.sha256(raw).digest()[:8])
        if not text.strip() or key in seen:
            continue
        heapq.heappush(heap, (-key, text))
        seen.add(key)
        held += len(raw)
        while (documents and len(heap) > documents) or (text_bytes and held > text_bytes and len(heap) > 1):
            dropped = heapq.heappop(heap)
            seen.discard(-dropped[0])
            held -= len(dropped[1].encode("utf-8", "surrogatepass"))
    return [text for _, text in sorted(heap, reverse=True)]


def open_encoder(name: str) -> Encoder:
    """The tokenizer that `name` means (see the top of this file). Raises UserError if there is none."""
    path = locate(name)
    label = name if name.startswith("mistral:") else path.parent.name if path.parent.name else name
    label = path.parent.parent.name if label == "tokenizer" else label
    if path.name.startswith("tekken"):
        return open_tekken(path, label)
    return open_huggingface(path, label) if path.suffix == ".json" else open_sentencepiece(path, label)


def locate(name: str) -> Path:
    """The file of tokenizer `name`: tokenizer.json if it holds more than the tokenizer.model beside it, else that one.

    Raises UserError if there is neither.
    """
    if name.startswith("mistral:"):
        return bundled(name.removeprefix("mistral:"))
    path = Path(name)
    if path.is_file():
        return path
    folder = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    model, backend = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.is_file():
        # A fine-tuned model's folder may know tokens that the tokenizer.model it began with does not.
        if backend.is_file() and load_backend(backend).get_vocab_size() > load_model(model).get_piece_size():
            return backend
        return model
    if not backend.is_file():
        raise UserError(f"{name}: no tokenizer.model or tokenizer.json there: give a tokenizer's folder or mistral:v1")
    return backend


def bundled(name: str) -> Path:
    """The file of the mistral-common package that `name` (v1, v2, v3, v7, v7m1, tekken, or a file's name) means; of
    two tekkens the newer. Raises UserError without the package."""
    from importlib import resources

    try:
        folder = Path(str(resources.files("mistral_common"))) / "data"
    except ModuleNotFoundError:
        raise UserError(f"mistral:{name} comes with a package: pip install mistral-common") from None
    files = sorted(path for path in folder.iterdir() if ".model." in path.name or path.name.startswith("tekken"))
    found = [p for p in files if name in (p.name, p.name.rpartition(".")[2], p.name.partition("_")[0], p.stem)]
    if not found:
        known = sorted({p.name.rpartition(".")[2] if ".model." in p.name else "tekken" for p in files})
        raise UserError(f"mistral:{name}: mistral-common has {', '.join(known)}")
    return found[-1]


def load_model(path: Path) -> Any:
    """The SentencePieceProcessor of the file. Raises UserError if it is none."""
    import sentencepiece as spm

    try:
        return spm.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise UserError(f"{path}: not a SentencePiece model, or cut short ({error})") from None


def load_backend(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of the file, reading "<s>" in a text as text. Raises UserError if it is none."""
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json ({sources.first_line(error)})") from None
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def open_sentencepiece(path: Path, label: str) -> Encoder:
    """A SentencePiece model, with SentencePiece itself."""
    processor = load_model(path)
    spec = tokenizer.model_proto(processor.serialized_model_proto()).normalizer_spec
    pieces: list[bytes | None] = []
    for i in range(processor.get_piece_size()):
        piece = processor.id_to_piece(i)
        if processor.is_control(i) or processor.is_unknown(i):
            pieces.append(None)
        elif processor.is_byte(i):
            pieces.append(bytes([int(piece[3:5], 16)]))
        else:
            pieces.append(piece.replace(tokenizer.WORD_START, " ").encode())
    return Encoder(label, processor.encode, processor.decode, pieces, processor.unk_id(), spec.add_dummy_prefix)


def open_huggingface(path: Path, label: str) -> Encoder:
    """A tokenizer.json, byte-level or SentencePiece-like, with the tokenizers library."""
    backend = load_backend(path)
    specials = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    byte_level = is_byte_level(json.loads(path.read_bytes()))
    alphabet = byte_alphabet()
    pieces: list[bytes | None] = [None] * (max(backend.get_vocab(with_added_tokens=True).values()) + 1)
    added = backend.get_added_tokens_decoder()
    for piece, i in backend.get_vocab(with_added_tokens=True).items():
        if i in specials:
            continue
        if byte_level and i not in added:
            pieces[i] = bytes(alphabet[c] for c in piece)
        elif len(piece) == 6 and piece.startswith("<0x") and not byte_level:
            pieces[i] = bytes([int(piece[3:5], 16)])
        else:
            pieces[i] = piece.replace(tokenizer.WORD_START, " ").encode()
    spelled = b"".join(pieces[i] or b"" for i in backend.encode("a", add_special_tokens=False).ids)
    unknown = getattr(backend.model, "unk_token", None)
    return Encoder(
        label,
        lambda texts: [row.ids for row in backend.encode_batch(texts, add_special_tokens=False)],
        lambda ids: backend.decode(ids, skip_special_tokens=False),
        pieces,
        backend.token_to_id(unknown) if unknown else None,
        spelled == b" a",
    )


def load_tekken(path: Path) -> Any:
    """mistral-common's own reader of the file. Raises UserError without the package."""
    try:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    except ImportError as error:
        raise UserError(f"{path.name} needs a package: pip install mistral-common ({error})") from None
    return Tekkenizer.from_file(path)


def open_tekken(path: Path, label: str) -> Encoder:
    """Mistral's byte-level tokenizer, with mistral-common itself."""
    tekken = load_tekken(path)
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

    reserved, keep = tekken.num_special_tokens, SpecialTokenPolicy.KEEP
    spelled = [tekken.id_to_byte_piece(i, keep) for i in range(reserved, tekken.n_words)]
    return Encoder(
        label,
        lambda texts: [tekken.encode(text, bos=False, eos=False) for text in texts],
        lambda ids: tekken.decode(ids, special_token_policy=keep),
        [*[None] * reserved, *spelled],
        None,
        False,
    )


def convert_tekken(path: Path) -> Any:
    """The `tokenizers.Tokenizer` equal to a tekken.json; its own ids, reserved ones first."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tekken = load_tekken(path)
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    pieces = enumerate(open_tekken(path, "").pieces)
    vocab = {"".join(letters[byte] for byte in piece): i for i, piece in pieces if piece}
    # tiktoken joins the neighbours that make the earliest piece, however it is cut (transformers' TikTokenConverter).
    cuts = [(piece[:at], piece[at:]) for piece in vocab for at in range(1, len(piece))]
    merges = [(left, right) for left, right in cuts if left in vocab and right in vocab]
    reserved = [tekken.id_to_piece(i) for i in range(tekken.num_special_tokens)]
    vocab |= {name: i for i, name in enumerate(reserved)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    pattern = Regex(json.loads(path.read_bytes())["config"]["pattern"])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in reserved])
    return backend


def is_byte_level(backend: dict[str, Any]) -> bool:
    """Whether a tokenizer.json, parsed, spells bytes as GPT-2 does."""
    return '"ByteLevel"' in json.dumps([backend["pre_tokenizer"], backend["decoder"]])


def byte_alphabet() -> dict[str, int]:
    """GPT-2's visible character for each byte, the other way round (Radford et al. 2019, encoder.py)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + k): byte for k, byte in enumerate(hidden)}
