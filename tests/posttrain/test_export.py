"""Exported folders: what transformers, vLLM and llama.cpp read of them, and what stops an export."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import console
from posttrain import chat, export, models, to_gguf

ASK = {"role": "user", "content": "納期は?"}
Exporter = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Exporter:
    """run(source, out, *flags): what `python -m posttrain.export` prints, in this process."""

    def door(source: Path, out: Path, *flags: str) -> dict[str, Any]:
        assert export.main([str(source), f"--out={out}", "--json", *flags]) == 0
        return dict(json.loads(capsys.readouterr().out))

    return door


@pytest.fixture(scope="module")
def adapter(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of four steps of TRL's SFT on a pull, saved with its tokenizer, in a run's model/."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    model, tokenizer = models.load(models.find(str(llama.folder)))
    assert chat.install_template(tokenizer, model)
    cpu: dict[str, Any] = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}
    args = SFTConfig(
        str(folder), assistant_only_loss=True, max_length=64, max_steps=4, learning_rate=0.01, save_strategy="no", **cpu
    )
    rows = Dataset.from_list([{"messages": [ASK, {"role": "assistant", "content": f"{n}日"}]} for n in range(1, 9)])
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer: Any = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.model.save_pretrained(folder / "model")
    models.save_tokenizer(tokenizer, folder / "model")
    told = {"name": "```</script><b>", "status": "ok", "seed": 3, "api_key": "sk-secret", "lineage": {"data": "ab" * 8}}
    (folder / "result.json").write_text(json.dumps(told))
    return folder


def test_a_pull_as_it_is(run: Exporter, llama: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    result = run(llama.folder, out, "--dtype=float32")
    assert result["cast_difference"] == result["reload_difference"] == 0 and result["cast_same_token"] == 1
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000
    names = {path.name for path in out.iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"}
    assert names == needed | {"tokenizer_config.json", "README.md"}, "no pickle, nothing of training"
    assert str(tmp_path) not in "".join(
        path.read_text() for path in out.glob("*.[jm][sd]*") if path.stat().st_size < 1e5
    )
    spelled = json.loads((out / "tokenizer_config.json").read_text())
    assert spelled["tokenizer_class"] == "PreTrainedTokenizerFast" and spelled["add_prefix_space"] is False
    for text in ("お問い合わせ <s>", "  a\n"):
        ids = AutoTokenizer.from_pretrained(out)(text)["input_ids"]
        assert ids == AutoTokenizer.from_pretrained(llama.checkpoint)(text)["input_ids"]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (llama.checkpoint, out))
    with torch.no_grad():
        assert torch.equal(ours(torch.tensor([[1, 40, 50]])).logits, theirs(torch.tensor([[1, 40, 50]])).logits)
    assert oct((out / "model.safetensors").stat().st_mode) == oct((out / "config.json").stat().st_mode)


def test_an_adapter_is_merged(run: Exporter, adapter: Path, llama: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(adapter, out)
    assert result["adapter_difference"] > 0.01 and result["merge_difference"] < 1e-4
    assert 0 < result["cast_difference"] < 1 and result["reload_difference"] == 0 and result["dtype"] == "bfloat16"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    told = json.loads((out / "tokenizer_config.json").read_text())["response_template"]
    assert told["start_anchor"] == "【応答】\n", "so that servers do not take it for Qwen3's or Llama's"
    assert (out / "chat_template.jinja").is_file() and not list(out.glob("adapter*"))
    assert (out / "tokenizer.model").read_bytes() == (llama.checkpoint / "tokenizer.model").read_bytes()
    assert (adapter / "model" / "tokenizer.model").is_file(), "transformers alone would have left it behind"
    # The folder speaks as the adapter did: same prompts, nearly the same logits.
    tuned, tokenizer = models.load(models.find(str(adapter)))
    merged, again = models.load(out)
    ids = chat.encode_prompt(tokenizer, [ASK])
    assert chat.encode_prompt(again, [ASK]) == ids
    import torch

    with torch.no_grad():
        difference = (tuned(torch.tensor([ids])).logits - merged(torch.tensor([ids])).logits).abs().max()
    assert difference < 0.5
    text = (out / "README.md").read_text()
    assert "sk-secret" not in text and "<b>" not in text and text.count("```") == 4 and str(tmp_path.parent) not in text
    facts = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert facts["run"] == {"name": "```</script><b>", "seed": 3, "status": "ok", "data": "ab" * 8}
    assert facts["base"] == llama.checkpoint.name and facts["adapter"]["r"] == 4


def test_chat_takes_runs_and_adapters(adapter: Path, llama: Any) -> None:
    assert models.find(str(adapter)) == adapter / "model"
    assert models.find(str(llama.folder)) == llama.checkpoint
    assert models.find(str(adapter / "model")) == adapter / "model"


def test_what_stops_an_export(run: Exporter, adapter: Path, llama: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(console.UserError, match="exists already"):
        run(adapter, tmp_path / "full")
    with pytest.raises(console.UserError, match=r"no convert_hf_to_gguf\.py in it"):
        run(adapter, tmp_path / "out", f"--llama_cpp={tmp_path}")
    model, _ = models.load(llama.checkpoint)
    untrained = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    untrained.save_pretrained(str(tmp_path / "untrained"))
    with pytest.raises(console.UserError, match="does not change its base"):
        run(tmp_path / "untrained", tmp_path / "out")
    other = json.loads((tmp_path / "untrained" / models.ADAPTER).read_text())
    (tmp_path / "untrained" / models.ADAPTER).write_text(json.dumps({**other, "base_model_name_or_path": "moved"}))
    with pytest.raises(console.UserError, match="its base cannot be opened"):
        run(tmp_path / "untrained", tmp_path / "out")
    with pytest.raises(console.UserError, match="does not change its base"):
        run(tmp_path / "untrained", tmp_path / "out", f"--base={llama.folder}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "untrained"], "nothing half-made stays"


def test_a_folder_that_reads_otherwise_is_refused(
    run: Exporter, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = export.write_folder

    def damaged(model: Any, *rest: Any) -> None:
        model.get_input_embeddings().weight.data[5:50] += 1
        written(model, *rest)

    monkeypatch.setattr(export, "write_folder", damaged)
    with pytest.raises(console.UserError, match="logits differ by"):
        run(llama.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_door_prints_how_to_make_gguf(llama: Any, tmp_path: Path) -> None:
    flags = [str(llama.folder), "--out", str(tmp_path / "out"), "--check=false"]
    command = [sys.executable, "-m", "posttrain.export", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and ["dtype", "bfloat16"] in [line.split() for line in done.stdout.splitlines()]
    assert f"convert_hf_to_gguf.py {tmp_path / 'out'}" in done.stderr and "llama-quantize" in done.stderr
    assert "add_space_prefix=bool:false" in done.stderr, "our tokenizers put no space before a text"
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and again.stderr.startswith("error: --out") and again.stderr.count("\n") == 1


def test_a_converter_that_fails_is_heard(run: Exporter, llama: Any, tmp_path: Path) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('architecture not known')")
    with pytest.raises(console.UserError, match="failed: architecture not known"):
        run(llama.folder, tmp_path / "out", f"--llama_cpp={tmp_path}", "--check=false")
    assert not (tmp_path / "out").exists()


def test_gguf_says_that_no_space_comes_first(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy as np

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.arange(8, dtype=np.float32).reshape(2, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for _ in range(2):  # the second time it is there
        to_gguf.say_no_space(path)
        reader = gguf.GGUFReader(path)
        assert reader.fields[to_gguf.KEY].contents() is False
        assert reader.tensors[0].data.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="needs LLAMA_CPP, a checkout of llama.cpp")
def test_llama_cpp_converts_it(run: Exporter, adapter: Path, tmp_path: Path) -> None:
    """The file holds the merged model: transformers reads the same logits from it."""
    import torch

    out = tmp_path / "out"
    run(adapter, out, "--dtype=float32", f"--llama_cpp={os.environ['LLAMA_CPP']}")
    (merged, _), (converted, _) = models.load(out), models.load(out / "model.gguf")
    ids = torch.tensor([[1, *range(20, 40)]])
    with torch.no_grad():
        assert (merged(ids).logits - converted(ids).logits).abs().max() < 1e-4
