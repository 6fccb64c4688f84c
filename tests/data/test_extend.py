"""Extended tokenizers: old ids stay, new pieces are reachable and save tokens, no text costs more, texts come back."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from console import UserError
from data import extend, fertility, tokenizer

GENERAL = [
    "お問い合わせ",
    "注文",
    "番号",
    "会社",
    "納期",
    "請求",
    "書",
    "ありがとう",
    "本日",
    "確認",
    "いたし",
    "ます",
    "送料",
    "円",
    "です",
    "の",
    "を",
    "は",
    "が",
    "と",
    "The",
    "mail",
    "of",
    "an",
    "order",
]
DOMAIN = [
    "第一条",
    "第二項",
    "この法律",
    "政令で定める",
    "施行の日",
    "従前の例による",
    "罰則",
    "附則",
    "主務大臣",
    "に規定する",
    "懲役",
    "又は",
    "及び",
    "禁錮",
    "審議会",
    "の",
    "、",
    "を",
    "。",
    "article",
]
CONTROL = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "  ",
    " " * 21,
    "\n",
    "\t",
    "\x00",
    "👩‍👩‍👧",
    "ﾃﾞ",
    "𠮷",
    "ü",
    "\u3000",
    "第",
    "12",
    "附",
]


def lines(words: list[str], n: int, seed: int, gap: str = "") -> list[str]:
    rng = random.Random(seed)
    return [gap.join(rng.choices(words, k=rng.randint(4, 25))) + rng.choice("。\n ") for _ in range(n)]


def fuzz(n: int, seed: int) -> list[str]:
    """Strings of both kinds of text, cut anywhere, with control tokens and runs between them."""
    rng, corpus = random.Random(seed), lines(DOMAIN, 40, seed) + lines(GENERAL, 40, seed, " ")
    made = []
    for _ in range(n):
        parts = [rng.choice([rng.choice(corpus)[rng.randrange(8) :][:15], rng.choice(CONTROL)]) for _ in range(9)]
        made.append("".join(part * rng.choice([1, 1, 1, 3]) for part in parts))
    return made


def ours(folder: Path) -> str:
    """A tokenizer of `python -m data build`."""
    tokenizer.write_folder(tokenizer.train(lines(GENERAL, 300, 0, " "), "bpe", 330, 16), folder)
    return str(folder)


def mistral_like(folder: Path) -> str:
    """A tokenizer.model that puts a space before every text and has runs of spaces, all of one score, as Mistral's."""
    made = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines(GENERAL, 300, 0, " ")),
        model_writer=made,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    proto = tokenizer.model_proto(made.getvalue())
    for run in range(2, 9):
        proto.pieces.add(piece=tokenizer.WORD_START * run, score=-1e9)
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return str(folder / "tokenizer.model")


def byte_level(folder: Path) -> str:
    """A tokenizer.json as GPT's and Llama 3's: special tokens after the vocabulary, which the model does not list."""
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(lines(GENERAL, 300, 0, " "), trainer)
    made.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"split_special_tokens": True}))
    return str(folder)


def json_alone(folder: Path) -> str:
    """A tokenizer.json with byte fallback, as Llama 2's and Gemma's, without the tokenizer.model it came from."""
    mistral_like(folder)
    backend = tokenizer.convert(fertility.load_model(folder / "tokenizer.model"))
    (folder / "tokenizer.model").unlink()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(tokenizer.WORD_START), backend.normalizer])
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)])
    backend.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


class Made:
    """A base, what `extend` made of it, and what it printed."""

    def __init__(self, base: str, folder: Path, pieces: int = 150) -> None:
        self.folder = folder / "extended"
        self.result = extend.extend(config(base, folder, self.folder, pieces=pieces))
        self.before, self.after = fertility.open_encoder(base), fertility.open_encoder(str(self.folder))
        self.listing: dict[str, Any] = json.loads((self.folder / "new_pieces.json").read_text(encoding="utf-8"))


def config(base: str, folder: Path, out: Path, **more: Any) -> extend.ExtendConfig:
    corpus = folder / "domain.jsonl"
    if not corpus.exists():
        documents = ("".join(lines(DOMAIN, 30, seed)) for seed in range(60))
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return extend.ExtendConfig(base, f"jsonl:{corpus}", out, **{"val_fraction": 0.2, **more})


@pytest.fixture(scope="module", params=[ours, mistral_like, byte_level, json_alone])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param.__name__)
    return Made(request.param(folder / "base"), folder)


def test_old_ids_stay_and_new_ones_follow(made: Made) -> None:
    """Every id of the base means the same bytes; specials too; the new ones come after the last."""
    size = made.listing["base_vocab"]
    assert made.after.pieces[:size] == made.before.pieces
    new = len(made.listing["pieces"])
    assert len(made.after.pieces) == size + new == made.result["vocab_size"] and 20 < new <= 150
    assert [i for i, _, _ in made.listing["pieces"]] == list(range(size, size + new))
    loaded = AutoTokenizer.from_pretrained(made.folder)
    base = Tokenizer.from_file(str(made.folder / "tokenizer.json"))
    for i, token in base.get_added_tokens_decoder().items():
        assert loaded.convert_tokens_to_ids(token.content) == i < size


def test_every_new_piece_can_be_produced_and_is_spelled_by_its_old_ids(made: Made) -> None:
    """A piece that no text is ever cut to would be an embedding that is never trained."""
    backend = Tokenizer.from_file(str(made.folder / "tokenizer.json"))
    for i, piece, old in made.listing["pieces"]:
        assert [token.id for token in backend.model.tokenize(piece)] == [i]
        spelled = b"".join(made.before.pieces[k] or b"" for k in old)
        assert len(old) > 1 and spelled == made.after.pieces[i]
        assert len((made.after.pieces[i] or b"").decode("utf-8", "replace")) <= 16


def test_held_out_text_costs_less_and_no_text_costs_more(made: Made) -> None:
    """At least a quarter less in the domain; where no new piece stands, the very ids of the base."""
    assert made.result["held_out_saved"] > 0.25 and made.result["held_out_documents"] > 3
    first = made.listing["base_vocab"]
    same = 0
    for text in [*fuzz(600, 1), *lines(GENERAL, 100, 2, " "), *tokenizer.PROBES]:
        old, new = made.before.encode([text])[0], made.after.encode([text])[0]
        assert len(new) <= len(old)
        if max(new, default=0) < first:
            assert new == old
            same += 1
    assert same > 50


def test_texts_come_back_and_hugging_face_agrees(made: Made) -> None:
    """AutoTokenizer and TokenizersBackend give the ids of the tokenizer.model where there is one, and the text."""
    tried = [*fuzz(400, 3), "".join(fuzz(200, 4)), *lines(DOMAIN, 50, 5), *tokenizer.PROBES]
    ids = made.after.encode(tried)
    assert [made.after.decode(row) for row in ids] == [made.before.decode(row) for row in made.before.encode(tried)]
    assert [text for text, row in zip(tried, ids, strict=True) if made.after.decode(row) != text] == []
    for loaded in (AutoTokenizer.from_pretrained(made.folder), TokenizersBackend.from_pretrained(made.folder)):
        assert loaded(tried, add_special_tokens=False).input_ids == ids
        assert len(loaded) == len(made.after.pieces)


@pytest.mark.parametrize("base", [ours, byte_level])
def test_the_order_of_documents_changes_no_byte(base: Callable[[Path], str], tmp_path: Path) -> None:
    first = Made(base(tmp_path / "base"), tmp_path)
    corpus = tmp_path / "domain.jsonl"
    corpus.write_text("".join(reversed(corpus.read_text().splitlines(keepends=True))))
    second = extend.extend(config(str(tmp_path / "base"), tmp_path, tmp_path / "again", pieces=150))
    assert {**second, "folder": ""} == {**first.result, "folder": ""}
    for path in first.folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_extended_tokenizer_can_be_extended_again(tmp_path: Path) -> None:
    """The second time on top of the first: ids of both stay."""
    first = Made(ours(tmp_path / "base"), tmp_path, pieces=30)
    extend.extend(config(str(first.folder), tmp_path, tmp_path / "more", pieces=30))
    again = fertility.open_encoder(str(tmp_path / "more"))
    assert again.pieces[: len(first.after.pieces)] == first.after.pieces and len(again.pieces) > len(first.after.pieces)


@pytest.mark.parametrize("name", ["v1", "tekken"])
def test_the_bundled_tokenizers_of_mistral_common(name: str, tmp_path: Path) -> None:
    """Real bases: SentencePiece with a space before each text, and the first 4,000 ids of the byte-level one."""
    pytest.importorskip("mistral_common")
    base = f"mistral:{name}"
    if name == "tekken":
        whole = json.loads(fertility.bundled(name).read_bytes())
        whole["vocab"], whole["config"]["default_vocab_size"] = whole["vocab"][:3000], 4000
        base = str(tmp_path / "tekken.json")
        Path(base).write_text(json.dumps(whole))
    made = Made(base, tmp_path, pieces=40)
    assert made.result["held_out_saved"] > 0.25
    assert made.after.pieces[: made.result["base_vocab"]] == made.before.pieces
    tried = fuzz(200, 6)
    loaded = AutoTokenizer.from_pretrained(made.folder)
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded(tried, add_special_tokens=False).input_ids == made.after.encode(tried)
    assert [made.after.decode(row) for row in made.after.encode(tried)] == tried


def test_a_base_that_cannot_be_extended_is_named(tmp_path: Path) -> None:
    """Unigram, a normaliser that changes texts, no tokenizer at all, a bad --out: one line, nothing left behind."""
    tokenizer.write_folder(tokenizer.train(lines(GENERAL, 300, 0, " "), "unigram", 330, 16), tmp_path / "unigram")
    made = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines(GENERAL, 300, 0, " ")), model_writer=made, vocab_size=330, model_type="bpe",
        byte_fallback=True, minloglevel=3,
    )  # fmt: skip
    (tmp_path / "nfkc.model").write_bytes(made.getvalue())
    (tmp_path / "noise.model").write_bytes(b"noise")
    out = tmp_path / "out"
    cases = [("unigram", "a unigram model"), ("nfkc.model", "normalises its texts"), ("noise.model", "not a Sentence")]
    for base, said in [*cases, ("none", "no tokenizer.model or tokenizer.json")]:
        with pytest.raises(UserError, match=said):
            extend.extend(config(str(tmp_path / base), tmp_path, out))
    with pytest.raises(UserError, match=r"--pieces must be at least 1"):
        extend.extend(config("x", tmp_path, out, pieces=0))
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(UserError, match="is there already"):
        extend.extend(config(ours(tmp_path / "base"), tmp_path, out))
    assert sorted(path.name for path in out.iterdir()) == ["file"] and not list(tmp_path.glob(".*"))
