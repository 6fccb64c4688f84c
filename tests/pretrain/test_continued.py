"""Continued pretraining: any model's own loss, forgetting in view, the same bits after a kill, mistakes in one line."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import wandb
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import console
from data import build, extend, shards
from data.loader import TokenStream
from gacha import runs
from pretrain import causal_lm, checkpoint, continued
from pretrain.adapt import mixed_batch

if TYPE_CHECKING:
    import subprocess

    from tests.conftest import Pull

    Spawner = Callable[..., subprocess.Popen[str]]
    Argv = Callable[..., list[str]]

SHAPE: dict[str, Any] = {
    "vocab_size": 1536,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
GPT2 = {"vocab_size": 1536, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
# Name, how it differs, and whether its logits are but a product of its hidden states.
ARCHITECTURES: list[tuple[str, dict[str, Any], bool]] = [
    ("Llama", {**SHAPE}, True),
    ("Gemma3", {**SHAPE, "head_dim": 16, "sliding_window": 16}, True),
    ("Gemma2", {**SHAPE, "head_dim": 16}, False),  # caps its logits
    ("Granite", {**SHAPE, "logits_scaling": 8.0}, False),
    ("GPT2", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}, True),
    ("Mixtral", {**SHAPE, "num_local_experts": 4}, True),  # whose experts are merged in memory and not on disk
]


@pytest.fixture(scope="module")
def general(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text by the tokenizer of `shards_folder`."""
    texts = [f"{i} The quick brown fox jumps over {i * 7} lazy dogs, and so on. " * 5 for i in range(200)]
    folder = tmp_path_factory.mktemp("general")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags: dict[str, Any] = {"tokenizer": shards_folder, "val_fraction": 0.1, "baseline_tokens": 0}
    build.build(build.BuildConfig(source=f"jsonl:{folder / 'corpus.jsonl'}", out=folder / "shards", **flags))
    return folder / "shards"


def saved(name: str, config: dict[str, Any], tokenizer: Path, folder: Path) -> Path:
    """A random model of the architecture, with the tokenizer of a shards folder."""
    torch.manual_seed(0)
    kind = "Gemma3Text" if name == "Gemma3" else name
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, head)(getattr(transformers, f"{kind}Config")(**config))
    model.save_pretrained(folder)
    for path in (tokenizer / "tokenizer").iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def flags(shards_folder: Path, general: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Flags of a pull of a second, on a random Llama."""
    model = saved("Llama", SHAPE, shards_folder, tmp_path_factory.mktemp("model") / "llama")
    sizes = {
        "seq_len": 32,
        "batch_tokens": 256,
        "tokens": 256 * 40,
        "val_tokens": 1024,
        "val_every": 20,
        "log_every": 1,
    }
    return {"model": model, "data": shards_folder, "general": general, "lr": 1e-2, "checkpoint_every": 20, **sizes}


Run = Callable[..., tuple[int, dict[str, Any], Path]]


@pytest.fixture(scope="module")
def run(flags: dict[str, Any], as_argv: "Argv") -> Run:
    """run(out, **changes): exit code, result and folder of a pull in this process; a flag of None is left out."""

    def make(out: Path, **changes: Any) -> tuple[int, dict[str, Any], Path]:
        torch.set_num_threads(1)
        printed = io.StringIO()
        given = {name: value for name, value in {**flags, **changes, "json": True}.items() if value is not None}
        with contextlib.redirect_stdout(printed):
            code = continued.main(as_argv(given, out=out))
        result = json.loads(printed.getvalue())
        return code, result, out / result["name"]

    return make


def nats_and_bytes(model: Any, folder: Path, val_tokens: int, seq_len: int) -> tuple[float, float]:
    """val/loss and val/bpb by transformers' own logits, window by window, each opened by <s>."""
    manifest, nats, count, spelled = shards.load(folder), 0.0, 0, 0
    stream = TokenStream(folder, manifest, "val", seq_len)
    lengths = np.load(folder / "token_bytes.npy").astype(int)
    for window in range(min(stream.n_windows, val_tokens // seq_len)):
        ids, targets = stream.windows(np.array([window]))
        ids[:, 0] = manifest["tokenizer"]["bos_id"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        nats += float(F.cross_entropy(logits, targets[0], ignore_index=-1, reduction="sum"))
        count += int((targets >= 0).sum())
        spelled += int(lengths[targets[targets >= 0].numpy()].sum())
    return nats / count, nats / np.log(2) / spelled


@pytest.mark.parametrize(("name", "config", "own_head"), ARCHITECTURES)
def test_what_is_measured_is_the_models_own_loss(
    name: str, config: dict[str, Any], own_head: bool, run: Run, flags: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    """Before the first step and after the last, by transformers from the folders on disk; config.json is theirs."""
    model = saved(name, config, flags["data"], tmp_path / "model")
    code, result, folder = run(tmp_path / "out", model=model, tokens=256 * 10, micro_batch_tokens=64)
    assert code == 0 and ("taken whole from the model" in capsys.readouterr().err) == (not own_head)
    for path, prefix in ((model, "start/"), (checkpoint.folders(folder)[-1], "")):
        loaded = AutoModelForCausalLM.from_pretrained(path).eval()
        for part, data in (("val", flags["data"]), ("val_general", flags["general"])):
            loss, bpb = nats_and_bytes(loaded, data, 1024, 32)
            assert result[f"{prefix}{part}/bpb"] == pytest.approx(bpb, rel=1e-5)
            if prefix:
                assert result[f"{prefix}{part}/loss"] == pytest.approx(loss, rel=1e-5)
    assert result["val/bpb"] < result["start/val/bpb"]
    assert type(loaded).__name__ == type(AutoModelForCausalLM.from_pretrained(model)).__name__


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A finished pull that was never interrupted, recorded by W&B; do not change it."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_MODE", "offline")
        environment.setenv("WANDB_DIR", str(out))
        wandb.teardown()  # it reads the environment once
        try:
            code, result, folder = run(out)
        finally:
            wandb.teardown()
    assert code == 0
    return result, folder


def test_forgetting_is_recorded_from_before_the_first_step(whole: tuple[dict[str, Any], Path]) -> None:
    """Both sets at steps 0, 20 and 40, on tokens; the start in the summary and in the result."""
    result, folder = whole
    (record,) = runs.read(folder.parent)
    for part in ("val", "val_general"):
        for metric in ("loss", "bpb"):
            history = record.history[f"{part}/{metric}"]
            assert history.step.tolist() == [0, 20, 40] and history.tokens.tolist() == [0, 5120, 10240]
        assert result[f"start/{part}/bpb"] == record.history[f"{part}/bpb"].value[0]
        assert record.summary[f"start/{part}/bpb"] == result[f"start/{part}/bpb"]
        assert record.summary[f"{part}/bpb"] == result[f"{part}/bpb"]
    for name in ("train/loss", "train/lr", "stability/grad_norm", "stability/update_rms", "perf/mfu"):
        assert record.history[name].step.tolist() == list(range(1, 41)), name
    assert record.summary["status"] == "ok" and record.config["lineage"]["model"]


def test_general_text_is_forgotten_less_when_replayed(
    run: Run, whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """The very same steps on the domain alone: better there, or alike, and worse on the rest."""
    _, alone, _ = run(tmp_path, replay=0)
    assert alone["start/val_general/bpb"] == whole[0]["start/val_general/bpb"]
    assert whole[0]["val_general/bpb"] < 0.8 * alone["val_general/bpb"]
    assert alone["val/bpb"] < 1.05 * whole[0]["val/bpb"]
    _, without, _ = run(tmp_path, replay=None, general=None)
    assert without["val/bpb"] == alone["val/bpb"] and "val_general/bpb" not in without


@pytest.mark.parametrize("replay", [0.0, 0.25, 0.3, 0.9])
def test_every_batch_has_its_share_and_no_window_is_seen_twice(
    replay: float, shards_folder: Path, general: Path
) -> None:
    """Shares that no batch can have exactly are had over several; domain windows go on where the last batch ended."""
    streams = [TokenStream(path, shards.load(path), "train", 32) for path in (shards_folder, general)]
    whole = [{tuple(row) for row in s.windows(np.arange(s.n_windows))[0].tolist()} for s in streams]
    shared = whole[0] & whole[1]
    replayed, seen = 0, []
    for step in range(20):
        ids, targets = mixed_batch(streams[0], streams[1], replay, step, 8, seed=3)
        again = mixed_batch(streams[0], streams[1], replay, step, 8, seed=3)
        assert ids.shape == targets.shape == (8, 32) and torch.equal(ids, again[0]) and torch.equal(targets, again[1])
        rows = [tuple(row) for row in ids.tolist()]
        replayed += sum(row in whole[1] and row not in shared for row in rows)
        seen += [row for row in rows if row in whole[0]]
        assert abs(replayed - 8 * replay * (step + 1)) <= 0.5 + 1e-9
    first = streams[0].windows(streams[0].ordered(np.arange(len(seen)), 3))[0]
    assert seen == [tuple(row) for row in first.tolist()]


def test_a_killed_pull_ends_with_the_same_bits(
    spawn: "Spawner",
    as_argv: "Argv",
    flags: dict[str, Any],
    run: Run,
    whole: tuple[dict[str, Any], Path],
    tmp_path: Path,
    capsys: Any,
) -> None:
    """kill -9 after its first periodic checkpoint, on a batch in parts; then the same command, in another process."""
    child = spawn([sys.executable, "train.py", "continue", *as_argv(flags, out=tmp_path)])
    folder = tmp_path / whole[0]["name"]
    while not (folder / "checkpoints" / "step-00000020").is_dir():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL and not (folder / "result.json").exists()
    code, result, _ = run(tmp_path)
    assert code == 0 and f"resuming {folder} from step 20" in capsys.readouterr().err
    ended = [checkpoint.folders(path)[-1] for path in (folder, whole[1])]
    for name in ("model.safetensors", "training_state.safetensors", "config.json", "tokenizer.json"):
        assert (ended[0] / name).read_bytes() == (ended[1] / name).read_bytes(), name
    for name in ("val/bpb", "val_general/bpb", "start/val/bpb", "start/val_general/bpb"):
        assert result[name] == whole[0][name]
    code, again, _ = run(tmp_path)
    assert (code, again) == (0, result) and "is already ok" in capsys.readouterr().err


def test_sigterm_saves_and_the_same_command_goes_on(run: Run, tmp_path: Path, capsys: Any) -> None:
    ended = threading.Event()

    def stop() -> None:
        while not ended.is_set():
            if list(tmp_path.glob("*/checkpoints/step-00000020")):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=stop)
    thread.start()
    code, result, folder = run(tmp_path, tokens=256 * 100, general=None)
    ended.set()
    thread.join()
    said = capsys.readouterr().err
    assert code == 143 and result["status"] == "stopped" and "saved: the same command resumes" in said
    stopped_at = checkpoint.step_of(checkpoint.folders(folder)[-1])
    assert 20 <= stopped_at < 100 and result["tokens"] == 256 * stopped_at
    code, result, _ = run(tmp_path, tokens=256 * 100, general=None)
    assert code == 0 and result["tokens"] == 256 * 100 and f"from step {stopped_at}" in capsys.readouterr().err


def test_a_divergence_stops_it_with_exit_code_3(run: Run, tmp_path: Path) -> None:
    code, result, folder = run(tmp_path, lr=1e4, warmup=0, grad_clip=0, tokens=256 * 60)
    assert code == 3 and result["status"] == "diverged" and result["tokens"] < 256 * 60
    assert checkpoint.folders(folder)[0].name == "step-00000000"


def test_a_pull_goes_on_with_an_extended_tokenizer(
    llama: "Pull", general: Path, run: Run, tmp_path: Path, shards_folder: Path
) -> None:
    """From a pull of ours: new rows are their old pieces' means, so that it begins where it was, at fewer tokens."""
    source = f"jsonl:{general.parent / 'corpus.jsonl'}"
    extend.extend(extend.ExtendConfig(str(shards_folder), source, tmp_path / "extended", pieces=60))
    built: dict[str, Any] = {"tokenizer": tmp_path / "extended", "val_fraction": 0.1, "baseline_tokens": 0}
    longer = build.build(build.BuildConfig(source=source, out=tmp_path / "shards", **built))
    assert longer["splits"]["val"]["tokens"] < shards.load(general)["splits"]["val"]["tokens"]
    more = {"model": llama.folder, "data": tmp_path / "shards", "general": None, "lr": 3e-3, "tokens": 256 * 20}
    with pytest.raises(console.UserError, match=r"was not built with the tokenizer of .* --tokenizer"):
        run(tmp_path / "out", **more)
    code, result, folder = run(tmp_path / "out", **more, tokenizer=tmp_path / "extended")
    before = load_file(llama.checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    start = checkpoint.folders(folder)[0]
    assert start.name == "step-00000000"
    after = load_file(start / "model.safetensors")["model.embed_tokens.weight"]
    (i, _, old), *_ = json.loads((tmp_path / "extended" / "new_pieces.json").read_bytes())["pieces"]
    assert len(after) == longer["vocab_size"] and torch.equal(after[: len(before)], before)
    assert torch.allclose(after[i], before[old].mean(0), atol=1e-7)
    assert code == 0 and result["val/bpb"] < result["start/val/bpb"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "nowhere"}, "--model nowhere: no such folder"),
        ({"model": "nowhere.gguf"}, "no such file"),
        ({"replay": 0.5, "general": None}, "--replay 0.5: needs --general"),
        ({"replay": 1}, "--replay"),
        ({"seq_len": 256}, "reads at most 128 tokens"),
        ({"batch_tokens": 250}, "--seq_len"),
        ({"micro_batch_tokens": 33}, "--micro_batch_tokens"),
        ({"tokens": 255}, "--tokens"),
        ({"lr": -1}, "--lr"),
        ({"warmup": 2}, "--warmup"),
        ({"val_every": 0}, "--val_every"),
        ({"seed": -1}, "--seed"),
        ({"data": "nowhere"}, "nowhere: no manifest.json"),
        ({"tokenizer": "nowhere"}, "nowhere"),
        ({"optimizer": "muon"}, "optimizer"),
    ],
)
def test_nonsense_is_named_before_anything_is_made(
    changes: dict[str, Any], says: str, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(console.UserError, match=says) as error:
        run(tmp_path / "out", **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_named(run: Run, flags: dict[str, Any], tmp_path: Path) -> None:
    """No config.json, pickled weights only, another tokenizer, general shards of another, a damaged GGUF file."""

    def refused(says: str, **changes: Any) -> None:
        with pytest.raises(console.UserError, match=says) as error:
            run(tmp_path / "out", **changes)
        assert "\n" not in str(error.value)

    copy = tmp_path / "model"
    shutil.copytree(flags["model"], copy)
    other: dict[str, Any] = {"vocab_size": 1400, "val_fraction": 0.1, "baseline_tokens": 0, "documents": 200}
    build.build(build.BuildConfig(source="inquiries", out=tmp_path / "other", **other))
    refused("--general .* another tokenizer", general=tmp_path / "other")
    refused("was not built with the tokenizer of", data=tmp_path / "other", general=None)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused("only pickled weights, which are never read", model=copy)
    (copy / "pytorch_model.bin").rename(copy / "model.safetensors")
    (copy / "config.json").write_text('{"model_type": "theirs", "auto_map": {"AutoConfig": "code.Config"}}')
    refused("no known architecture", model=copy)
    (copy / "config.json").unlink()
    refused("lacks config.json", model=copy)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(10))
    refused("not a language model's GGUF file|pip install", model=damaged)


def test_a_dry_run_prints_the_configuration(
    flags: dict[str, Any], as_argv: "Argv", tmp_path: Path, capsys: Any
) -> None:
    assert continued.main(as_argv(flags, out=tmp_path / "out"), dry_run=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["replay"] == 0.25 and told["data_seed"] == 0 and told["device"] in ("cpu", "cuda")
    assert told.keys() == {field.name for field in dataclasses.fields(continued.ContinueConfig)}
    assert not (tmp_path / "out").exists()


def test_the_head_of_a_gguf_file_is_read(tmp_path: Path) -> None:
    """Written here by the format's description: numbers, a string, arrays; pieces as text, control tokens as none."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    pieces = [("<bos>", 3), ("<0x0A>", 6), ("▁は", 1), ("  ", 4)]
    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("gemma3"),
        text("gemma3.rope.freq_base") + struct.pack("<If", 6, 1e6),
        text("gemma3.context_length") + struct.pack("<II", 4, 4096),
        text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("llama"),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 4) + b"".join(text(piece) for piece, _ in pieces),
        text("tokenizer.ggml.token_type") + struct.pack("<IIQ4i", 9, 5, 4, *(kind for _, kind in pieces)),
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(entries)) + b"".join(entries))
    assert causal_lm.gguf_facts(path) == (4096, [None, b"\n", " は".encode(), b"  "])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(console.UserError, match="cut short"):
        causal_lm.gguf_facts(path)
