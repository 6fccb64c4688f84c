"""SentencePiece and its Hugging Face twin: equal ids, exact round trips, literal control tokens stay text."""

import io
import random
from pathlib import Path

import pytest
import sentencepiece as spm
from transformers import AutoTokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from console import UserError
from data import tokenizer

WORDS = [
    "お問い合わせ",
    "注文番号",
    "株式会社",
    "納期",
    "請求書",
    "ありがとうございます",
    "本日",
    "確認",
    "いたします",
    "送料",
    "税込",
    "円",
    "です",
    "の",
    "を",
    "は",
    "が",
    "と",
]
RANGES = [(0, 0x1F), (0x20, 0x7E), (0x80, 0x24F), (0x600, 0x6FF), (0x2500, 0x25FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF)]
RANGES += [(0xAC00, 0xD7A3), (0xFF00, 0xFFEF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF)]
LITERALS = ["<s>", "</s>", "<unk>", "<0x41>", "<0x0A>", "</", "<", "  ", "\n", "\t", "ー", "=", "。", "\u200d", "\x00"]


def texts(n: int, seed: int) -> list[str]:
    """Lines that look like office Japanese, with names, amounts and some Latin."""
    rng = random.Random(seed)
    lines = []
    for _ in range(n):
        words = [rng.choice([*WORDS, f"{rng.randint(1, 99999):,}", chr(rng.randint(0x4E00, 0x5000)), "Linux <b>"])]
        words += rng.choices(WORDS, k=rng.randint(2, 15))
        lines.append(rng.choice(["", "", " "]).join(words) + rng.choice("。、\n"))
    return lines


def fuzz(n: int, seed: int) -> list[str]:
    """Random strings: many scripts, control characters, repeated units (where ties between merges lie)."""
    rng, corpus = random.Random(seed), texts(200, seed + 1)
    made = []
    for i in range(n):
        parts = []
        for _ in range(rng.randint(1, 12)):
            line = rng.choice(corpus)
            at = rng.randrange(len(line))
            unit = rng.choice(
                [rng.choice(LITERALS), line[at : at + 4], line[at : at + 20], chr(rng.randint(*rng.choice(RANGES)))]
            )
            parts.append(unit * (rng.randint(1, 9) if i % 3 == 0 else 1))
        made.append("".join(parts).replace("\u2581", " "))
    return made


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    tokenizer.write_folder(tokenizer.train(texts(500, 0), request.param, 620, 16), path)
    return path


def test_hugging_face_ids_equal_sentencepiece_and_decode_gives_the_text_back(folder: Path) -> None:
    """AutoTokenizer and TokenizersBackend, over seeded random strings, a long document and the probes."""
    processor = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tried = [*fuzz(1_500, 7), "".join(fuzz(600, 8)), *texts(100, 9), *tokenizer.PROBES]
    ids = processor.encode(tried)
    for loaded in (AutoTokenizer.from_pretrained(folder), TokenizersBackend.from_pretrained(folder)):
        assert len(loaded) == processor.get_piece_size()
        assert loaded(tried).input_ids == ids
        assert [text for text, row in zip(tried, ids, strict=True) if loaded.decode(row) != text] == []
    assert processor.decode(ids) == tried
    tokenizer.probe(folder, tried)


def test_literal_control_tokens_are_text_and_real_ones_are_skipped(folder: Path) -> None:
    """ "<s>" in a document is three characters, also after save_pretrained (a checkpoint's copy)."""
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.save_pretrained(folder / "copy")
    for one in (loaded, AutoTokenizer.from_pretrained(folder / "copy")):
        assert not {0, 1, 2} & set(one("a<s>b</s><unk>").input_ids)
        assert one.decode([1, *one("<s> x").input_ids, 2], skip_special_tokens=True) == "<s> x"
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2, 2)


def test_token_bytes_add_up_to_the_text(folder: Path) -> None:
    """What bits per byte divides by: 0 for control tokens, else the UTF-8 bytes that each id stands for."""
    processor = tokenizer.load(folder)
    lengths = tokenizer.token_bytes(processor)
    assert lengths[:3].tolist() == [0, 0, 0]
    for text in fuzz(200, 3):
        assert lengths[processor.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic_and_silent(model_type: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Same texts, same bytes; SentencePiece's C++ log stays quiet."""
    first = tokenizer.train(texts(300, 1), model_type, 600, 8)
    assert tokenizer.train(texts(300, 1), model_type, 600, 8) == first
    assert capfd.readouterr() == ("", "")
    processor = spm.SentencePieceProcessor(model_proto=first)
    assert max(len(processor.id_to_piece(i)) for i in range(259, 600)) <= 8


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_vocab_size_that_does_not_fit_names_one_that_does(model_type: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"too high.*at most \d+") as high:
        tokenizer.train(texts(50, 1), model_type, 30_000, 16)
    with pytest.raises(UserError, match=r"too low.*at least \d+") as low:
        tokenizer.train(texts(300, 1), model_type, 262, 16)
    assert capfd.readouterr() == ("", "")
    for error in (high, low):
        fits = int("".join(c for c in str(error.value).split("at ")[1].split(",")[0] if c.isdigit()))
        made = tokenizer.train(texts(50 if error is high else 300, 1), model_type, fits, 16)
        assert spm.SentencePieceProcessor(model_proto=made).get_piece_size() == fits


def test_probe_refuses_a_tokenizer_that_is_not_exact(tmp_path: Path) -> None:
    """A model that swallows spaces, as SentencePiece trains by default, would corrupt documents silently."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(200, 1)), model_writer=model, vocab_size=500, model_type="bpe", minloglevel=3
    )
    tokenizer.write_folder(model.getvalue(), tmp_path)
    with pytest.raises(UserError, match="use a tokenizer trained by this project"):
        tokenizer.probe(tmp_path, [])
