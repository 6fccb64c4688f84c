"""The tokenizer report: figures that can be counted by hand, the same for every kind of tokenizer file."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from console import UserError
from data import fertility, tokenizer

TEXTS = ["注文番号の確認です。", "注文の確認、納期の確認。", "The order is confirmed."] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of ours."""
    path = tmp_path_factory.mktemp("sp") / "ours"
    tokenizer.write_folder(tokenizer.train(TEXTS, "bpe", 320, 16), path)
    return path


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All bytes, "確" whole, and nothing else."""
    letters = {byte: letter for letter, byte in fertility.byte_alphabet().items()}
    vocab = {letters[byte]: byte for byte in range(256)}
    a, b, c = (letters[byte] for byte in "確".encode())
    backend = Tokenizer(models.BPE(vocab=vocab | {a + b: 256, a + b + c: 257}, merges=[(a, b), (a + b, c)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("hf") / "bytes"
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    return path


def test_figures_counted_by_hand(byte_level: Path) -> None:
    """ "確認a": 確 is one token, 認 three bytes, a one: 5 tokens, 3 of them less than a character."""
    (row,) = fertility.report([fertility.open_encoder(str(byte_level))], {"held_out": ["確認a"]})
    assert row["mb_per_second"] is None or row.pop("mb_per_second") > 0
    row.pop("mb_per_second", None)
    assert row == {
        "tokenizer": "bytes",
        "set": "held_out",
        "documents": 1,
        "characters": 3,
        "bytes": 7,
        "tokens": 5,
        "characters_per_token": 0.6,
        "bytes_per_token": 1.4,
        "fallback_tokens": 0.6,
        "fallback_characters": pytest.approx(1 / 3, abs=1e-6),
        "unknown_tokens": 0.0,
        "vocab_size": 258,
        "unused_ids": 253,
        "overlap": 1.0,
        "round_trip_failures": 0,
    }


def test_sentencepiece_and_its_twin_have_the_same_figures(folder: Path, tmp_path: Path) -> None:
    """The same vocabulary read from tokenizer.model and from tokenizer.json; U+9F98 is in neither, so three bytes."""
    (tmp_path / "twin").mkdir()
    twin = tmp_path / "twin" / "tokenizer.json"
    twin.write_bytes((folder / "tokenizer.json").read_bytes())
    encoders = [fertility.open_encoder(str(name)) for name in (folder, folder / "tokenizer.model", twin)]
    rows = fertility.report(encoders, {"in_domain": TEXTS, "held_out": ["注文\u9f98の", "a\nb", ""]})
    assert [row["set"] for row in rows] == ["in_domain", "held_out"] * 3
    assert [row["tokenizer"] for row in rows[::2]] == ["ours", "ours", "twin"]
    drop = ("tokenizer", "mb_per_second")
    first, *others = [[{k: v for k, v in row.items() if k not in drop} for row in rows[i : i + 2]] for i in (0, 2, 4)]
    assert others == [first, first]
    assert first[0]["fallback_tokens"] == first[0]["fallback_characters"] == 0
    # The newline is a byte piece too, but a whole character.
    assert first[1]["fallback_tokens"] == pytest.approx(3 / first[1]["tokens"], abs=1e-6)
    assert first[1]["fallback_characters"] == pytest.approx(1 / 7, abs=1e-6)


def test_a_tokenizer_that_loses_text_is_counted(tmp_path: Path) -> None:
    """A vocabulary of two letters, everything else <unk>: every other text fails, and unknowns are counted."""
    backend = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1, "b": 2, "never": 3}, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.save(str(tmp_path / "tokenizer.json"))
    (row,) = fertility.report([fertility.open_encoder(str(tmp_path))], {"held_out": ["abab", "acb", "bc"]})
    assert (row["round_trip_failures"], row["unused_ids"], row["tokens"]) == (2, 1, 9)
    assert row["unknown_tokens"] == pytest.approx(2 / 9, abs=1e-6)


def test_overlap_compares_the_bytes_that_pieces_stand_for(folder: Path, byte_level: Path) -> None:
    """Byte-level spells 確 in three strange letters, SentencePiece as it is: still the same piece."""
    ours, other = fertility.open_encoder(str(folder)), fertility.open_encoder(str(byte_level))
    rows = fertility.report([ours, other], {"in_domain": TEXTS})
    shared = {piece for piece in ours.pieces if piece} & {piece for piece in other.pieces if piece}
    assert "確".encode() in shared and rows[0]["overlap"] == 1
    assert rows[1]["overlap"] == pytest.approx(len(shared) / 258, abs=1e-4)


def test_the_sample_depends_on_the_texts_alone() -> None:
    """By hash: the same documents in any order, copies and blank ones once or not at all, within the limits."""
    texts = [f"文書{i}" * (1 + i % 5) for i in range(300)]
    chosen = fertility.sample(texts, documents=40)
    assert fertility.sample([*reversed(texts), " \n", *texts], documents=40) == chosen and len(set(chosen)) == 40
    assert set(chosen) < set(fertility.sample(texts, documents=80)) < set(texts) == set(fertility.sample(texts))
    small = fertility.sample(texts, text_bytes=1000)
    assert 900 < sum(len(text.encode()) for text in small) <= 1000


def test_the_command_prints_rows(folder: Path, byte_level: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A table, or {"rows": [...]}; both sets, blank documents left out."""
    for name, texts in (("law", TEXTS), ("news", ["速報です", " "])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = ["--tokenizers", str(folder), str(byte_level), "--source", f"jsonl:{tmp_path / 'law.jsonl'}"]
    argv += ["--held_out", f"jsonl:{tmp_path / 'news.jsonl'}", "--documents", "2"]
    assert fertility.main([*argv, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["tokenizer"], row["set"], row["documents"]) for row in rows] == [
        ("ours", "in_domain", 2),
        ("ours", "held_out", 1),
        ("bytes", "in_domain", 2),
        ("bytes", "held_out", 1),
    ]
    assert fertility.main(argv) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["tokenizer", "set", "documents"] and len(table) == 5


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokenizer there, a damaged one, an unknown bundled one, the package missing, an empty set."""
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "noise.model").write_bytes(b"noise")
    for name, said in [("none", "no tokenizer.model or tokenizer.json"), ("noise.model", "not a SentencePiece model")]:
        with pytest.raises(UserError, match=said):
            fertility.open_encoder(str(tmp_path / name))
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        fertility.open_encoder(str(tmp_path))
    with pytest.raises(UserError, match="--tokenizers: name at least one"):
        fertility.report([], {"in_domain": ["a"]})
    monkeypatch.setitem(__import__("sys").modules, "mistral_common", None)
    with pytest.raises(UserError, match=r"mistral:v1 comes with a package: pip install mistral-common"):
        fertility.open_encoder("mistral:v1")


def test_bundled_tokenizers_by_name() -> None:
    """The real baselines, from the package's own files."""
    pytest.importorskip("mistral_common")
    encoder = fertility.open_encoder("mistral:v1")
    assert (encoder.name, len(encoder.pieces), encoder.prefix) == ("mistral:v1", 32_000, True)
    (row,) = fertility.report([encoder], {"held_out": ["注文番号の確認です。"]})
    assert row["fallback_characters"] == 0 and row["round_trip_failures"] == 0
    assert fertility.bundled("tekken").name.startswith("tekken")
    with pytest.raises(UserError, match=r"mistral:v99: mistral-common has tekken, v1"):
        fertility.bundled("v99")
