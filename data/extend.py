"""`python -m data extend`: more pieces for an existing tokenizer, so that a domain's text costs fewer tokens.

The rule is byte-pair encoding (Sennrich et al. 2016) continued where the base stops. The domain text is encoded by
the base, and the pair of neighbouring tokens that is most frequent becomes the next piece: the one that saves most
tokens, given those before it. A character that the base can only spell in bytes competes with them for what it would
save. Every new piece ranks below all of the base's, so any text is first cut as the base cuts it, and then joined:
no text ever costs more tokens than before, and only text that holds a new piece changes at all.
"""

import dataclasses
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import console
from console import UserError
from data import fertility, shards, sources, tokenizer
from data.spool import share

WORD_START = tokenizer.WORD_START
LATIN = "A-Za-z\u00c0-\u024f"
# Where no piece may cross, as in SentencePiece's own training: scripts (kana and kanji count as one), digits, spaces.
CHUNK = re.compile(rf"{WORD_START}?(?:[{LATIN}]+|(?:(?![{LATIN}\d_])\w)+|[^\w\s{WORD_START}]+)")
LETTERS = 0x10000  # the base's ids as characters: what the trainer sees
SPARE = 1.5  # merges trained for each one asked for: some are too long, or spell what the base has
PROBED = 200
CARRIED = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@dataclass(frozen=True)
class ExtendConfig:
    """Add a domain's pieces to an existing tokenizer; old ids stay what they are."""

    tokenizer: str
    """The base, BPE: a folder or file with tokenizer.model or tokenizer.json, a shards folder, or mistral:NAME."""
    source: str
    """Domain documents: files:GLOB, jsonl:GLOB, parquet:GLOB, hf:NAME ... as for `data build`."""
    out: Path
    """Folder to make."""
    pieces: int = 8_000
    """Pieces to add."""
    max_piece_length: int = 16
    """Longest new piece in characters."""
    sample_bytes: int = 50_000_000
    """UTF-8 bytes of text to learn from at most, sampled by document hash."""
    val_fraction: float = 0.1
    """Share of documents never learned from, on which the result is measured; chosen by hash as in `data build`, whose
    validation documents they include if its share is no larger."""
    text_key: str = "text"
    """Key or column of the text (jsonl, parquet, hf)."""
    normalize: Literal["nfkc", "none"] = "nfkc"
    """Unicode normalisation of every document."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(frozen=True)
class Candidate:
    """A piece that could be added, spelled as in the vocabulary, and the merges that make it (none: a character)."""

    piece: str
    gain: int  # tokens saved on the domain text
    order: int  # pieces are added in the order learned, so that a piece follows its parts
    merges: tuple[tuple[str, str], ...]


def main(argv: list[str]) -> int | None:
    """`python -m data extend`: the result on stdout."""
    config = console.parse(ExtendConfig, argv, "python -m data extend")
    console.print_result(extend(config), config.json)
    return 0


def extend(config: ExtendConfig) -> dict[str, Any]:
    """Write `config.out`, an extended tokenizer, and return what it saves on held-out documents.

    Beside the tokenizer's files lies new_pieces.json: {"base_vocab": N, "pieces": [[id, piece, [old ids]], ...]}, the
    ids that the base encodes each new piece to. Raises UserError for a base that cannot be extended.
    """
    if config.pieces < 1 or config.max_piece_length < 2 or not 0 < config.val_fraction < 1:
        raise UserError("--pieces must be at least 1, --max_piece_length at least 2, --val_fraction between 0 and 1")
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"--out {config.out} is there already: delete it or choose another")
    path = fertility.locate(config.tokenizer)
    base = SentencePieceBase(path) if ".model" in path.name else HuggingFaceBase(path)
    texts, held_out = split(config)
    characters, chunks = Counter[str](), Counter[str]()
    for text in texts:
        characters.update(text)
        chunks.update(base.chunks(text))
    base.learn_characters(missing_characters(characters, base.known))
    found = candidates(base, chunks, characters, config)
    new: list[Candidate] = []
    unreachable: set[str] = set()
    while True:
        best = sorted((c for c in found if c.piece not in unreachable), key=lambda c: (-c.gain, c.order))
        new = sorted(best[: config.pieces], key=lambda c: c.order)
        if not (lost := base.add(new)):
            break
        unreachable |= lost
    if not new:
        raise UserError(f"--source {config.source}: the base has every piece that these documents repeat")
    with shards.part_folder(config.out) as part:
        base.write(part)
        pieces = [[base.size + k, c.piece, base.old_ids(c.piece)] for k, c in enumerate(new)]
        listing = {"base_vocab": base.size, "pieces": pieces}
        (part / "new_pieces.json").write_text(json.dumps(listing, ensure_ascii=False) + "\n", encoding="utf-8")
        before, after = fertility.open_encoder(str(path)), fertility.open_encoder(str(part))
        probe(part, before, after, texts[:PROBED])
        rows = fertility.report([before, after], {"learned_from": texts, "held_out": held_out})
    tokens = {(row["set"], i // 2): row["tokens"] for i, row in enumerate(rows)}
    old, now = tokens["held_out", 0], tokens["held_out", 1]
    return {
        "base": config.tokenizer,
        "base_vocab": base.size,
        "vocab_size": base.size + len(new),
        "pieces": len(new),
        "characters": sum(not c.merges for c in new),
        "learned_from_documents": len(texts),
        "learned_from_saved": round(1 - tokens["learned_from", 1] / tokens["learned_from", 0], 4),
        "held_out_documents": len(held_out),
        "held_out_tokens_before": old,
        "held_out_tokens_after": now,
        "held_out_saved": round(1 - now / old, 4),
        "folder": str(config.out),
    }


def split(config: ExtendConfig) -> tuple[list[str], list[str]]:
    """Texts to learn from and texts held out, by the hash that `data build` splits by."""

    def side(val: bool) -> Iterator[str]:
        for document in sources.read(config.source, text_key=config.text_key):
            text = tokenizer.normalise(document.text, config.normalize)
            try:
                if (share(text.encode()) < config.val_fraction) == val:
                    yield text
            except UnicodeEncodeError:
                raise UserError(f"document {document.id!a} holds half a surrogate pair: mend the source") from None

    # Read twice, so that memory is that of the two samples.
    texts, held_out = (fertility.sample(side(val), text_bytes=config.sample_bytes) for val in (False, True))
    if not texts or not held_out:
        few = f"{len(texts)} documents to learn from and {len(held_out)} held out"
        raise UserError(f"--source {config.source}: {few} at --val_fraction {config.val_fraction}: change it")
    return texts, held_out


def missing_characters(characters: Counter[str], known: set[str]) -> list[str]:
    """Characters that cost the base several tokens each, in code point order; control characters stay bytes."""
    return sorted(
        c for c in characters if c not in known and len(c.encode()) > 1 and (c.isprintable() or c == "\u3000")
    )


def candidates(
    base: "SentencePieceBase | HuggingFaceBase", chunks: Counter[str], characters: Counter[str], config: ExtendConfig
) -> list[Candidate]:
    """All pieces worth a place, each with the tokens it saves on the chunks."""
    spelled, merges, applied = train(base, chunks, config.pieces)
    made: dict[str, Candidate] = {}
    for order, character in enumerate(base.characters):
        gain = (len(character.encode()) - 1) * characters[character]
        made[character] = Candidate(character, gain, order, ())
    barred: set[str] = set()
    for order, (left, right) in enumerate(merges, len(made)):
        a, b = ("".join(spelled[letter] for letter in part) for part in (left, right))
        piece, gain = a + b, applied[left + right]
        if left in barred or right in barred or piece in base.known or base.length(piece) > config.max_piece_length:
            barred.add(left + right)
        elif piece in made:  # the same text of other tokens
            then = made[piece]
            made[piece] = dataclasses.replace(then, gain=then.gain + gain, merges=(*then.merges, (a, b)))
        else:
            made[piece] = Candidate(piece, gain, order, ((a, b),))
    return list(made.values())


def train(
    base: "SentencePieceBase | HuggingFaceBase", chunks: Counter[str], pieces: int
) -> tuple[dict[str, str], list[tuple[str, str]], Counter[str]]:
    """Byte-pair merges over the base's tokens of `chunks`, each token written as one private letter.

    Returns the piece of every letter, the merges in the order learned, and how often each was applied.
    """
    from tokenizers import Tokenizer, models, trainers

    words = Counter[str]()
    texts = sorted(chunks)
    for text, ids in zip(texts, base.encode_chunks(texts), strict=True):
        if len(ids) > 1:
            words["".join(chr(LETTERS + i) for i in ids)] += chunks[text]
    letters = sorted(set().union(*words))
    spelled = {letter: base.spell(ord(letter) - LETTERS) for letter in letters}
    trainer = trainers.BpeTrainer(
        vocab_size=len(letters) + int(SPARE * pieces), min_frequency=2, initial_alphabet=letters, show_progress=False
    )
    learned = Tokenizer(models.BPE())
    repeated = (itertools.repeat(word, times) for word, times in sorted(words.items()))
    learned.train_from_iterator(itertools.chain.from_iterable(repeated), trainer)
    model = json.loads(learned.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    final = np.zeros(len(model["vocab"]), np.int64)
    for word, times in words.items():
        for token in learned.model.tokenize(word):
            final[token.id] += times
    applied = Counter({token: int(final[i]) for token, i in model["vocab"].items()})
    for left, right in reversed(merges):
        applied[left] += applied[left + right]
        applied[right] += applied[left + right]
    return spelled, merges, applied


class SentencePieceBase:
    """A SentencePiece BPE model with byte fallback, ours or one of Llama's or Mistral's kind."""

    def __init__(self, path: Path) -> None:
        self.proto = tokenizer.model_proto(fertility.load_model(path).serialized_model_proto())
        spec, how = self.proto.trainer_spec, self.proto.normalizer_spec
        kind = spec.ModelType.Name(spec.model_type).lower()
        if kind != "bpe" or not spec.byte_fallback:
            raise UserError(f"{path}: a {kind} model, byte fallback {spec.byte_fallback}: only BPE with it is extended")
        if how.precompiled_charsmap or how.remove_extra_whitespaces or not how.escape_whitespaces:
            raise UserError(f"{path}: normalises its texts ({how.name}), which cannot be kept: choose another base")
        if (spec.unk_id, spec.bos_id, spec.eos_id) != (shards.UNK, shards.BOS, shards.EOS):
            raise UserError(f"{path}: <unk>, <s>, </s> must be ids {shards.UNK}, {shards.BOS}, {shards.EOS}")
        if any(piece.type == piece.USER_DEFINED for piece in self.proto.pieces):
            raise UserError(
                f"{path}: has user-defined pieces, which tokenizer.json cuts otherwise: choose another base"
            )
        self.size = len(self.proto.pieces)
        self.known = {piece.piece for piece in self.proto.pieces}
        self.base = self.processor([])
        self.characters: list[str] = []

    def processor(self, more: Iterable[str], prefix: bool = False) -> Any:
        """The model with `more` pieces, each scored below the one before it and all below the base's."""
        import sentencepiece as spm

        proto = type(self.proto)()
        proto.CopyFrom(self.proto)
        floor = min(piece.score for piece in proto.pieces)
        step = max(1.0, float(np.spacing(np.float32(-floor))))  # the scores are float32
        for k, piece in enumerate(more, 1):
            proto.pieces.add(piece=piece, score=floor - k * step)
        proto.trainer_spec.vocab_size = len(proto.pieces)
        if not prefix:
            proto.normalizer_spec.add_dummy_prefix = False
        return spm.SentencePieceProcessor(model_proto=proto.SerializeToString(deterministic=True))

    def learn_characters(self, characters: list[str]) -> None:
        """Give each of `characters` an id after the base's while pieces are learned."""
        self.characters = characters
        self.learning = self.processor(characters)

    def chunks(self, text: str) -> list[str]:
        return CHUNK.findall(text.replace(" ", WORD_START))

    def encode_chunks(self, chunks: list[str]) -> Iterator[list[int]]:
        for batch in fertility.batches(chunks):
            yield from self.learning.encode(batch)

    def spell(self, i: int) -> str:
        return self.learning.id_to_piece(i)

    def length(self, piece: str) -> int:
        return len(piece)

    def old_ids(self, piece: str) -> list[int]:
        return self.base.encode(piece)

    def add(self, new: list[Candidate]) -> set[str]:
        """Take `new` as the pieces to add; returns those that no text would ever be cut to.

        Joining inside a piece does not look beyond it: one that is not cut to itself alone never appears.
        """
        self.new = [c.piece for c in new]
        extended = self.processor(self.new)
        encoded = extended.encode(self.new)
        return {piece for k, (piece, ids) in enumerate(zip(self.new, encoded, strict=True)) if ids != [self.size + k]}

    def write(self, folder: Path) -> None:
        """tokenizer.model, and tokenizer.json with the same ids."""
        from tokenizers import Tokenizer, decoders, normalizers

        prefix = self.proto.normalizer_spec.add_dummy_prefix
        tokenizer.write_folder(self.processor(self.new, prefix).serialized_model_proto(), folder)
        if prefix:
            backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(WORD_START), backend.normalizer])
            backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)])
            backend.save(str(folder / "tokenizer.json"))


class HuggingFaceBase:
    """A tokenizer.json of BPE: byte-level (GPT, Llama 3, Qwen), SentencePiece-like, or Mistral's tekken.json."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self.folder = path.parent
        load = fertility.convert_tekken if path.name.startswith("tekken") else fertility.load_backend
        self.json = json.loads(load(path).to_str())
        model = self.json["model"]
        self.byte_level = fertility.is_byte_level(self.json)
        if model["type"] != "BPE" or not (self.byte_level or model["byte_fallback"]):
            raise UserError(
                f"{path}: a {model['type']} tokenizer: only BPE with byte fallback or byte-level is extended"
            )
        # Beside new pieces, an added token that the model does not list would be given another id.
        for token in self.json["added_tokens"]:
            model["vocab"].setdefault(token["content"], token["id"])
        self.size = max(model["vocab"].values()) + 1
        self.known = {*model["vocab"]}
        self.base = Tokenizer.from_str(json.dumps(self.json))
        self.characters: list[str] = []

    def backend(self, new: list[Candidate], ignore_merges: bool) -> Any:
        """The tokenizer with `new` pieces."""
        from tokenizers import Tokenizer

        model = self.json["model"]
        vocab = model["vocab"] | {c.piece: self.size + k for k, c in enumerate(new)}
        merges = [*model["merges"], *(list(merge) for c in new for merge in c.merges)]
        grown = model | {"vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
        return Tokenizer.from_str(json.dumps(self.json | {"model": grown}))

    def learn_characters(self, characters: list[str]) -> None:
        """Give each of `characters` an id after the base's while pieces are learned, if the base is not byte-level."""
        self.characters = [] if self.byte_level else characters
        alone = [Candidate(character, 0, 0, ()) for character in self.characters]
        self.learning = self.backend(alone, self.json["model"]["ignore_merges"]) if alone else self.base
        self.spelled = {i: piece for piece, i in self.learning.get_vocab(with_added_tokens=True).items()}

    def chunks(self, text: str) -> list[str]:
        text = self.base.normalizer.normalize_str(text) if self.base.normalizer else text
        if self.byte_level:
            return [chunk for chunk, _ in self.base.pre_tokenizer.pre_tokenize_str(text)]
        return CHUNK.findall(text.replace(" ", WORD_START))

    def encode_chunks(self, chunks: list[str]) -> Iterator[list[int]]:
        return ([token.id for token in self.learning.model.tokenize(chunk)] for chunk in chunks)

    def spell(self, i: int) -> str:
        return self.spelled[i]

    def length(self, piece: str) -> int:
        if not self.byte_level:
            return len(piece)
        alphabet = fertility.byte_alphabet()
        return len(bytes(alphabet[c] for c in piece).decode("utf-8", "replace"))

    def old_ids(self, piece: str) -> list[int]:
        return [token.id for token in self.base.model.tokenize(piece)]

    def add(self, new: list[Candidate]) -> set[str]:
        """Take `new` as the pieces to add; returns those that no text would ever be cut to."""
        self.new = new
        model = self.backend(new, False).model
        return {c.piece for k, c in enumerate(new) if [t.id for t in model.tokenize(c.piece)] != [self.size + k]}

    def write(self, folder: Path) -> None:
        """tokenizer.json, and the base's other files for transformers."""
        self.backend(self.new, self.json["model"]["ignore_merges"]).save(str(folder / "tokenizer.json"))
        for name in CARRIED:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        path = folder / "tokenizer_config.json"
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
        plain = {key: name for key, name in names.items() if name in self.known} | {"split_special_tokens": True}
        config = json.loads(path.read_bytes()) if path.is_file() else plain
        config.pop("auto_map", None)
        # A class with a name of its own may build the tokenizer anew, without what was added.
        config["tokenizer_class"] = "TokenizersBackend"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def probe(folder: Path, before: fertility.Encoder, after: fertility.Encoder, texts: list[str]) -> None:
    """Raise UserError unless the extended tokenizer gives every text back that its base does, with no more tokens,
    and tokenizer.json gives the same ids as tokenizer.model, where there is one."""
    backend = fertility.open_huggingface(folder / "tokenizer.json", "")
    for text in [*tokenizer.PROBES, *texts]:
        ids, old = after.encode([text])[0], before.encode([text])[0]
        if before.decode(old) != after.decode(ids) or backend.decode(ids) != after.decode(ids):
            raise UserError(f"{folder}: does not give this text back as its base does: {text[:40]!r}: mend the base")
        if len(ids) > len(old) or backend.encode([text])[0] != ids:
            raise UserError(f"{folder}: cuts this text otherwise than its base would: {text[:40]!r}: mend the base")
