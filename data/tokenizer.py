"""SentencePiece, and the same tokenizer as a Hugging Face folder with ids equal to SentencePiece's.

transformers' own conversion lets a literal "<s>" in a text become the control token and, for unigram models, a
literal "<0x41>" the byte; so tokenizer.json is built here, and `probe` compares the two before anything is encoded.
"""

import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from console import UserError
from data.shards import BOS, EOS, UNK

WORD_START = "\u2581"  # SentencePiece writes a space so; a literal one in a text could not be told from it
FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LINE_CHARACTERS = 4_000  # at most 16,000 bytes: SentencePiece drops longer training lines
PROBES = [
    "お問い合わせの件、6月12日(水)14:00までにご返信ください。",
    "  leading, double  and trailing spaces  ",
    "tabs\tand\r\nnewlines\n\n\nand\x00\x07\x1b control characters",
    "絵文字👩‍👩‍👧‍👦🇯🇵と𠮷野家の髙﨑、ｶﾞと㍿、ーーーーーー",
    "<s>literal</s><unk><0x41><0x0A></</s>",
    "ãéîõü ελληνικά русский العربية 한국어 ไทย \u200d\ufe0f\u3000",
    "",
]


def normalise(text: str, how: str) -> str:
    """`text` in NFKC if `how` is "nfkc", as it is if "none"; U+2581 becomes a space, as SentencePiece reads it."""
    import unicodedata

    return (unicodedata.normalize("NFKC", text) if how == "nfkc" else text).replace(WORD_START, " ")


def training_lines(text: str) -> Iterator[str]:
    """`text` cut where SentencePiece's trainer would otherwise drop the line: its reserved characters, its limit.

    Newlines are cut too, so that no piece holds one: a newline is always the byte piece <0x0A>.
    """
    for line in re.split("[\n\t\0\u2585]+", text):
        for start in range(0, len(line), LINE_CHARACTERS):
            yield line[start : start + LINE_CHARACTERS]


def train(texts: Iterable[str], model_type: str, vocab_size: int, max_piece_length: int) -> bytes:
    """A SentencePiece model ("bpe" or "unigram") of `texts`, as the bytes of tokenizer.model; same texts, same bytes.

    Raises UserError with the size that fits, where `vocab_size` does not.
    """
    import sentencepiece as spm

    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in training_lines(text)),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            max_sentencepiece_length=max_piece_length,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=0.9995,
            required_chars=WORD_START,  # else a corpus without spaces leaves it to bytes, and spaces decode as U+2581
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=16_384,
            num_threads=8,  # fixed: unigram's sums depend on it
            minloglevel=3,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(explain(str(error), vocab_size)) from None
    return quantise(model.getvalue()) if model_type == "unigram" else model.getvalue()


def explain(error: str, vocab_size: int) -> str:
    """SentencePiece's error as advice."""
    if found := re.search(r"Vocabulary size too high.*<= (\d+)", error):
        return f"--vocab_size {vocab_size} is too high for this corpus: at most {found[1]}, or more documents"
    if found := re.search(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)", error):
        return f"--vocab_size {vocab_size} is too low for the characters of this corpus: at least {found[1]}"
    reason = error.strip().splitlines()[-1] if error.strip() else "no reason given"
    return f"SentencePiece cannot train --vocab_size {vocab_size} on this corpus: {reason}"


def quantise(model: bytes) -> bytes:
    """Round unigram scores to 1/16 nat: path sums are then exact in float32 (SentencePiece) and in float64 (Hugging
    Face), so that both break a tie between segmentations of the same pieces alike."""
    proto = model_proto(model)
    for piece in proto.pieces:
        piece.score = round(piece.score * 16) / 16
    return proto.SerializeToString(deterministic=True)


def model_proto(model: bytes) -> Any:
    """The protobuf message that a tokenizer.model holds."""
    from sentencepiece import sentencepiece_model_pb2 as pb2

    return getattr(pb2, "ModelProto").FromString(model)  # noqa: B009 - protobuf makes it at import, unseen by mypy


def write_folder(model: bytes, folder: Path) -> None:
    """tokenizer.model and the Hugging Face files beside it: AutoTokenizer and TokenizersBackend load `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer.json").write_text(convert(load(folder)).to_str(pretty=True), encoding="utf-8")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config = tokens | {
        "tokenizer_class": "TokenizersBackend",
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        # "<s>" in a text is three characters, never the control token.
        "split_special_tokens": True,
        "model_max_length": 10**9,
    }
    for name, value in (("tokenizer_config", config), ("special_tokens_map", tokens)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def copy_folder(source: Path, folder: Path) -> None:
    """A tokenizer that `write_folder` or `data extend` made, as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, "new_pieces.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
        elif name in FILES:
            raise UserError(
                f"{source / name} is missing: give a folder made by `python -m data build` or `data extend`"
            )


def load(folder: Path) -> Any:
    """The SentencePieceProcessor of `folder`. Raises UserError unless its control ids are ours."""
    import sentencepiece as spm

    path = folder / "tokenizer.model"
    try:
        processor = spm.SentencePieceProcessor(model_proto=path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give a folder made by `python -m data build`") from None
    except RuntimeError as error:
        raise UserError(f"{path}: not a SentencePiece model, or cut short ({error})") from None
    if (processor.unk_id(), processor.bos_id(), processor.eos_id()) != (UNK, BOS, EOS):
        raise UserError(f"{path}: <unk>, <s>, </s> must be ids {UNK}, {BOS}, {EOS}")
    return processor


def convert(processor: Any) -> Any:
    """`processor` (SentencePieceProcessor, bpe or unigram) as a `tokenizers.Tokenizer` with the same ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    size = processor.get_piece_size()
    pieces = [processor.id_to_piece(i) for i in range(size)]
    special = [i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)]
    reserved = {*special, *(i for i in range(size) if processor.is_byte(i))}
    normal = {piece: i for i, piece in enumerate(pieces) if i not in reserved}
    scores = [processor.get_score(i) for i in range(size)]
    model_type = kind(processor)
    model: Any
    if model_type == "bpe":
        # SentencePiece joins whatever neighbours make a piece, the best-scored piece first: every cut is a merge.
        cuts = [(piece[:at], piece[at:], i) for piece, i in normal.items() for at in range(1, len(piece))]
        cuts = [cut for cut in cuts if cut[0] in normal and cut[1] in normal]
        # Of equal scores (runs of spaces, in Mistral's) it joins the leftmost: where the longest left part is.
        cuts.sort(key=lambda cut: (-scores[cut[2]], -len(cut[0]), normal[cut[0]], normal[cut[1]]))
        vocab, merges = {piece: i for i, piece in enumerate(pieces)}, [(left, right) for left, right, _ in cuts]
        model = models.BPE(vocab=vocab, merges=merges, unk_token=pieces[UNK], fuse_unk=True, byte_fallback=True)
    else:
        model = models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=UNK, byte_fallback=True)
    result = Tokenizer(model)
    result.normalizer = normalizers.Replace(" ", WORD_START)
    if model_type == "unigram":
        # Its lattice would match a literal "<s>" or "<0x41>" as the reserved piece. Cut after the bracket: no piece
        # of ours mixes it with letters or digits, so nothing else changes.
        bracket = Regex(r"\n|</?(?=unk>|s>|0x[0-9A-F]{2}>)")
        result.pre_tokenizer = pre_tokenizers.Split(bracket, "merged_with_previous")
    result.decoder = decoders.Sequence([decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse()])
    result.add_special_tokens([AddedToken(pieces[i], normalized=False, special=True) for i in special])
    return result


def kind(processor: Any) -> str:
    """ "bpe" or "unigram". Raises UserError for another SentencePiece model."""
    spec = model_proto(processor.serialized_model_proto()).trainer_spec
    name = spec.ModelType.Name(spec.model_type).lower()
    if name not in ("bpe", "unigram"):
        raise UserError(f"tokenizer.model is a {name} model: only bpe and unigram can be written as tokenizer.json")
    return name


def probe(folder: Path, texts: Iterable[str]) -> None:
    """Raise UserError unless tokenizer.model and tokenizer.json give equal ids and the very text back."""
    from tokenizers import Tokenizer

    processor, backend = load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    if backend.get_vocab_size() != processor.get_piece_size():
        raise UserError(f"{folder}: tokenizer.json and tokenizer.model differ in size: train the tokenizer anew")
    for text in [*PROBES, *texts]:
        ids = processor.encode(text)
        same = backend.encode(text, add_special_tokens=False).ids == ids
        if same and processor.decode(ids) == text == backend.decode(ids, skip_special_tokens=False):
            continue
        what = "does not give this text back" if same else "and tokenizer.json give different ids"
        raise UserError(f"{folder / 'tokenizer.model'} {what}: {text[:40]!r}: use a tokenizer trained by this project")


def token_bytes(processor: Any) -> np.ndarray:
    """(vocab,) uint16: the UTF-8 bytes of text that each id stands for; 0 for <unk>, <s> and </s>."""
    lengths = np.zeros(processor.get_piece_size(), "<u2")
    for i in range(len(lengths)):
        if processor.is_byte(i):
            lengths[i] = 1
        elif not (processor.is_control(i) or processor.is_unknown(i)):
            lengths[i] = len(processor.id_to_piece(i).replace(WORD_START, " ").encode())
    return lengths
