"""Checkpoints for extended tokenizers: old weights to the bit, new rows the mean of the old, and what that is worth."""

import json
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from console import UserError
from data import extend as tokenizers
from data import tokenizer
from pretrain import embeddings

if TYPE_CHECKING:
    from tests.conftest import Pull

DOMAIN = [
    "第一条",
    "この法律",
    "政令",
    "で定める",
    "施行の日",
    "従前の例",
    "による",
    "罰則",
    "主務大臣",
    "又は",
    "の",
    "、",
]


def statutes(n: int, seed: int) -> list[str]:
    """Texts in which each word follows from the one before it three times in four."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        at, words = rng.randrange(len(DOMAIN)), []
        for _ in range(40):
            words.append(DOMAIN[at])
            at = (at * 5 + 1) % len(DOMAIN) if rng.random() < 0.75 else rng.randrange(len(DOMAIN))
        texts.append("".join(words))
    return texts


def extended(base: Path, folder: Path, pieces: int = 40) -> Path:
    """The tokenizer of `base` with pieces of statutes."""
    corpus = folder / "statutes.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in statutes(80, 0)), encoding="utf-8")
    tokenizers.extend(tokenizers.ExtendConfig(str(base), f"jsonl:{corpus}", folder / "extended", pieces=pieces))
    return folder / "extended"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose pieces are single characters and a few pairs."""
    folder = tmp_path_factory.mktemp("base") / "tokenizer"
    tokenizer.write_folder(tokenizer.train(statutes(60, 9), "bpe", 300, 2), folder)
    return folder


def llama_of(
    base: Path, folder: Path, dtype: torch.dtype, tied: bool, padded: int = 0, **save: Any
) -> LlamaForCausalLM:
    """A random Llama for the tokenizer at `base`, saved to `folder` beside it."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=300 + padded, tie_word_embeddings=tied, max_position_embeddings=256, **shape)
    model = LlamaForCausalLM(config)
    model.to(dtype)  # type: ignore[arg-type]
    model.save_pretrained(folder, **save)
    for path in base.iterdir():
        shutil.copyfile(path, folder / path.name)
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("padded", [0, 7, 100])
def test_new_rows_are_means_and_all_else_keeps_its_bits(
    tmp_path: Path, base: Path, dtype: torch.dtype, tied: bool, padded: int
) -> None:
    """Tied and untied, float32 and bfloat16, one file and several, and rows that the model was padded with."""
    folder = tmp_path / "checkpoint"
    llama_of(base, folder, dtype, tied, padded, max_shard_size="100KB" if dtype == torch.bfloat16 else "1GB")
    grown = extended(base, tmp_path)
    out = tmp_path / "out"
    result = embeddings.extend(folder, grown, out)
    listing = json.loads((grown / "new_pieces.json").read_text(encoding="utf-8"))
    before, after = weights(folder), weights(out)
    assert before.keys() == after.keys() and ("lm_head.weight" in after) != tied
    for name, old in before.items():
        new = after[name]
        assert new.dtype == old.dtype == dtype
        if "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(new, old)
            continue
        assert len(new) == max(300 + padded, 340) == result["rows_after"] and torch.equal(new[:300], old[:300])
        assert torch.equal(new[340:], old[340:])
        for i, _, ids in listing["pieces"]:
            assert torch.equal(new[i], old[ids].float().mean(0).to(dtype))
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    loaded = AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == after["model.embed_tokens.weight"].shape[0] == result["rows_after"]
    assert model.config.tie_word_embeddings == tied and model.dtype == dtype and len(loaded) == 340
    ids = loaded("この法律は、政令で定める", return_tensors="pt").input_ids
    assert ids.max() >= 300 and torch.isfinite(model(ids).logits).all()


def test_a_pull_of_ours_by_the_command(llama: "Pull", tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The door takes the folder of a pull, and the result samples and loads."""
    grown = extended(llama.checkpoint, tmp_path)
    argv = [str(llama.folder), str(grown), f"--out={tmp_path / 'out'}", "--json"]
    assert embeddings.main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == result["rows_after"] == result["rows_before"] + result["new_pieces"]


def nats_per_byte(model: Any, loaded: Any, texts: list[str]) -> float:
    """Loss over the UTF-8 bytes of the texts: what can be compared between tokenizers."""
    total = 0.0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[loaded.bos_token_id, *loaded(text).input_ids]])
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    return total / sum(len(text.encode()) for text in texts)


def test_at_step_0_means_lose_far_less_than_random_rows(tmp_path: Path, base: Path) -> None:
    """A Llama that knows the domain, before a single step with the new pieces; nats per byte of unseen texts."""
    torch.set_num_threads(1)
    model = llama_of(base, tmp_path / "checkpoint", torch.float32, tied=False)
    loaded = AutoTokenizer.from_pretrained(base)
    rows = [torch.tensor([1, *loaded(text).input_ids][:100]) for text in statutes(240, 1)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        batch = torch.stack([row[:60] for row in rows[step % 30 * 8 : step % 30 * 8 + 8]])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "checkpoint")
    grown = extended(base, tmp_path)
    embeddings.extend(tmp_path / "checkpoint", grown, tmp_path / "out")
    means = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    noise, drawn = (AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint") for _ in range(2))
    noise.resize_token_embeddings(340, mean_resizing=False)  # rows of the configured deviation
    drawn.resize_token_embeddings(340)  # transformers' default: from the normal distribution of all old rows
    unseen, new = statutes(30, 2), AutoTokenizer.from_pretrained(grown)
    before, mean = nats_per_byte(model, loaded, unseen), nats_per_byte(means, new, unseen)
    for other in (noise, drawn):
        worse = nats_per_byte(other, new, unseen)
        assert before < mean < worse and mean - before < 0.7 * (worse - before)


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, base: Path, tmp_path_factory: Any) -> None:
    """Another base, a checkpoint too small, no new_pieces.json or a damaged one, an --out that exists."""
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    llama_of(base, checkpoint, torch.float32, tied=True)
    grown = extended(base, tmp_path)

    def refused(said: str, changed: Path = checkpoint, by: Path = grown) -> None:
        with pytest.raises(UserError, match=said) as error:
            embeddings.extend(changed, by, out)
        assert "\n" not in str(error.value)

    refused("new_pieces.json is missing", by=base)
    other = tmp_path_factory.mktemp("other")
    tokenizer.write_folder(tokenizer.train([*statutes(60, 4), "東京都" * 9], "bpe", 301, 2), other / "base")
    refused("id 2[0-9]+ is .* in checkpoint|has 300 embeddings", by=extended(other / "base", other))
    small = tmp_path / "small"
    shutil.copytree(checkpoint, small)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(290)
    model.save_pretrained(small)
    refused("has 290 embeddings, the base of .* 300 ids", changed=small)
    twice = tmp_path / "twice"
    embeddings.extend(checkpoint, grown, twice)
    refused("has ids up to 339, .* puts new pieces from 300", changed=twice)
    listing = json.loads((grown / "new_pieces.json").read_text(encoding="utf-8"))
    without = json.dumps({**listing, "pieces": []})
    unknown = json.dumps({**listing, "pieces": [[300, "x", [999]]]})
    for damaged, said in ((without, "do not follow"), (unknown, "old ids"), ("{", "damaged")):
        (grown / "new_pieces.json").write_text(damaged, encoding="utf-8")
        refused(said)
    out.mkdir()
    (out / "file").touch()
    (grown / "new_pieces.json").write_text(json.dumps(listing), encoding="utf-8")
    refused("is there already")
