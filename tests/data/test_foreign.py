"""Shards by a model's own tokenizer: its ids, its control tokens, and bytes that add up."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

import console
from data import build, extend, ngram, shards
from data.loader import TokenStream

TEXTS = [f"第{i}条 この法律は、政令で定める。 Article {i} shall apply.\n\n  {i * 37}円 😀" for i in range(150)]


def made(folder: Path, kind: str) -> Path:
    """A tokenizer folder as GPT-2 (one id opens and ends), Llama 3 or Gemma (byte fallback, <bos> after <eos>)."""
    names: dict[str, Any] = {"eos_token": "<|endoftext|>"}
    special = ["<|endoftext|>", "<|im_end|>"]
    if kind == "gemma":
        names, special = (
            {"bos_token": {"__type": "AddedToken", "content": "<bos>"}, "eos_token": "<eos>", "unk_token": "<unk>"},
            ["<pad>"],
        )
        special += ["<eos>", "<bos>", "<unk>"]
    if kind == "llama3":
        names, special = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}, ["<|begin|>", "<|end|>"]
    if kind == "gemma":
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet, also = [], [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet, also = pre_tokenizers.ByteLevel.alphabet(), []
    trainer = trainers.BpeTrainer(
        vocab_size=700 if kind == "gemma" else 320,
        special_tokens=special + also,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    data = json.loads(backend.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in also]
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    config = names | {"tokenizer_class": "TokenizersBackend", "auto_map": {"AutoTokenizer": ["their.Code", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def built(tmp_path: Path, tokenizer: Path, name: str = "out", **more: Any) -> tuple[Path, dict[str, Any]]:
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    flags: dict[str, Any] = {"val_fraction": 0.2, "tokenizer": tokenizer, **more}
    return tmp_path / name, build.build(build.BuildConfig(source=f"jsonl:{source}", out=tmp_path / name, **flags))


@pytest.mark.parametrize(("kind", "ends"), [("gpt2", (0, 0)), ("llama3", (0, 1)), ("gemma", (2, 1))])
def test_ids_are_the_models_own_and_bytes_add_up(tmp_path: Path, kind: str, ends: tuple[int, int]) -> None:
    """As AutoTokenizer gives them for the stored texts, between the model's own control tokens."""
    out, manifest = built(tmp_path, made(tmp_path / "theirs", kind), normalize="none")
    assert manifest == shards.verify(out, full=True)
    assert shards.document_ids(manifest) == ends and manifest["tokenizer"]["file"] == "tokenizer.json"
    assert manifest["baseline"] is None
    theirs, lengths = AutoTokenizer.from_pretrained(out / "tokenizer"), np.load(out / "token_bytes.npy")
    after = [ends[1]] if ends[0] != ends[1] else []
    wanted = {}
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert lengths[ids].sum() == len(text.encode())
        wanted[(ends[0], *ids, *after)] = text
    found = []
    for split in ("train", "val"):
        for tokens, starts in shards.open_split(out, manifest, split):
            found += [tuple(tokens[a:b].tolist()) for a, b in itertools.pairwise(starts)]
            assert lengths[tokens].sum() == manifest["splits"][split]["bytes"]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize(("kind", "scored"), [("gpt2", True), ("llama3", False)])
def test_what_opens_a_document_is_a_target_where_it_also_ends_one(tmp_path: Path, kind: str, scored: bool) -> None:
    out, manifest = built(tmp_path, made(tmp_path / "theirs", kind))
    stream = TokenStream(out, manifest, "train", 32)
    ids, targets = stream.windows(np.arange(stream.n_windows))
    opens = ids.flatten()[1:] == 0
    assert opens.any() and (targets.flatten()[:-1][opens] == (0 if scored else -1)).all()
    assert (targets.flatten()[:-1][~opens] >= 0).all()


def test_a_shards_folder_and_an_extended_tokenizer_are_taken_too(tmp_path: Path) -> None:
    """A second corpus by the tokenizer of the first; then one that `data extend` made of it, at fewer tokens."""
    first, manifest = built(tmp_path, made(tmp_path / "theirs", "llama3"))
    _, again = built(tmp_path, first, "again")
    assert again["fingerprint"] == manifest["fingerprint"]
    source = f"jsonl:{tmp_path / 'corpus.jsonl'}"
    extend.extend(extend.ExtendConfig(str(first), source, tmp_path / "extended", pieces=20, val_fraction=0.2))
    out, longer = built(tmp_path, tmp_path / "extended", "longer")
    assert longer["vocab_size"] > manifest["vocab_size"] and shards.document_ids(longer) == (0, 1)
    assert longer["splits"]["train"]["tokens"] < manifest["splits"]["train"]["tokens"]
    assert (out / "tokenizer" / "new_pieces.json").is_file()


def test_no_code_of_its_author_is_carried_along(tmp_path: Path) -> None:
    out, _ = built(tmp_path, made(tmp_path / "theirs", "gpt2"))
    assert "auto_map" not in json.loads((out / "tokenizer" / "tokenizer_config.json").read_bytes())


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """No end of a document, a tokenizer that loses text, no tokenizer_config.json, a GGUF file that is none."""

    def refused(tokenizer: Path, said: str) -> None:
        with pytest.raises(console.UserError, match=said) as error:
            built(tmp_path, tokenizer)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    folder = made(tmp_path / "theirs", "gpt2")
    shutil.copytree(folder, tmp_path / "endless")
    backend = json.loads((folder / "tokenizer.json").read_bytes())
    (tmp_path / "endless" / "tokenizer.json").write_text(json.dumps(backend).replace("<|endoftext|>", "<|other|>"))
    refused(tmp_path / "endless", "names no eos_token")
    shutil.copytree(folder, tmp_path / "lossy")
    backend["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "lossy" / "tokenizer.json").write_text(json.dumps(backend))
    refused(tmp_path / "lossy", "does not give this text back")
    (folder / "tokenizer_config.json").unlink()
    refused(folder, "tokenizer_config.json is missing")
    refused(tmp_path / "none.gguf", "no such file")


def test_the_baseline_is_refused(tmp_path: Path) -> None:
    out, _ = built(tmp_path, made(tmp_path / "theirs", "gpt2"))
    with pytest.raises(console.UserError, match="there is no baseline"):
        ngram.main([str(out)])
