"""`train.py sft` through its door on a model of two layers: masks, packing, resume, guard, records."""

import dataclasses
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import console
import train
from gacha import runs
from posttrain import chat, models, sft, stage
from posttrain.rows import load_rows
from tests.posttrain import small_task
from tests.posttrain.small_task import Trained

Sft = Callable[..., Trained]
Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return small_task.write(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def tune(llama: Any, files: Files) -> Sft:
    """tune(out, **flags): one run of the SFT door on the small task."""
    return lambda out, **more: small_task.train(sft.main, out, **{"model": llama.checkpoint, "data": files[0], **more})


@pytest.fixture(scope="module")
def learnt(tune: Sft, files: Files, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """60 updates, recorded by W&B, with everything measured; do not change it."""
    watched = {"watch_data": files[1], "watch_every": 20, "watch_items": 4, "base_data": shards_folder}
    out = tmp_path_factory.mktemp("learnt")
    return tune(out, offline=True, max_steps=60, base_tokens=2048, task="kinds", price_per_hour=3600, **watched)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """What TRL's trainer computes its losses of, in order."""
    seen: list[dict[str, torch.Tensor]] = []

    trainer: Any = vars(sft)["SFTTrainer"]

    class Watched(trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            seen.append({key: value.clone() for key, value in inputs.items() if torch.is_tensor(value)})
            return super().compute_loss(model, inputs, *rest, **more)

    monkeypatch.setattr(sft, "SFTTrainer", Watched)
    return seen


def write_rows(path: Path, *conversations: tuple[str, ...]) -> Path:
    """Conversations of a user and an assistant in turn as chat rows."""
    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(one)]} for one in conversations
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def taught(tokenizer: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    """The text under the labels of each row of a batch."""
    return [tokenizer.decode(row[row >= 0]) for row in batch["labels"]]


# --- what is trained on ----------------------------------------------------------------------------------------------
def test_the_trainer_gets_answers_and_their_end_alone(
    tune: Sft, tmp_path: Path, batches: list[dict[str, torch.Tensor]]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ("見積は?", "はい"), ("納期は?", "未定", "では?", "明日"))
    run = tune(tmp_path, data=data, max_steps=1, batch_size=2)
    _, tokenizer = models.load(run.folder / "model")
    [batch] = batches
    assert sorted(taught(tokenizer, batch)) == ["はい</s>", "未定</s>明日</s>"], (
        "every assistant turn, each with its EOS"
    )
    kept = batch["labels"] >= 0
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    for ids, mine in zip(batch["input_ids"], kept, strict=True):
        told = tokenizer.decode(ids[~mine])
        assert "【指示】" in told and "は?" in told and "はい" not in told and "未定" not in told


def test_packed_rows_do_not_see_each_other(
    tune: Sft, tmp_path: Path, llama: Any, batches: list[dict[str, torch.Tensor]]
) -> None:
    run = tune(tmp_path, epochs=1, batch_size=1, packing=True)
    _, tokenizer = models.load(run.folder / "model")
    assert run.result["step"] == len(batches) < len(small_task.items()), "an epoch is over sequences"
    assert sum(int((batch["position_ids"] == 0).sum()) for batch in batches) == len(small_task.items())
    batch = batches[0]
    ids, positions = batch["input_ids"][0], batch["position_ids"][0]
    begins = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
    assert len(begins) > 2, "several rows in one sequence"
    assert taught(tokenizer, batch)[0].count("</s>") == len(begins) - 1
    model, _ = models.load(llama.checkpoint)
    with torch.no_grad():
        packed = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        leaky = model(input_ids=ids[None]).logits[0]
        alone = torch.cat([model(input_ids=ids[None, a:b]).logits[0] for a, b in itertools.pairwise(begins)])
    assert float((packed - alone).abs().max()) < 1e-5
    assert float((leaky - alone).abs().max()) > 1e-2, "the control: without positions they do"


def test_packing_is_refused_where_positions_are_not_heeded(llama: Any, files: Files) -> None:
    class Deaf(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.config, self.get_input_embeddings = model, model.config, model.get_input_embeddings

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return self.model(input_ids=input_ids)

    model, tokenizer = models.load(llama.checkpoint)
    chat.install_template(tokenizer, model)
    data = sft.tokenized(load_rows(str(files[0]), "messages"), tokenizer)
    sft.prove_apart(model, data)
    with pytest.raises(console.UserError, match="--packing: rows of one sequence see each other"):
        sft.prove_apart(Deaf(model), data)


def test_long_rows_are_dropped_counted_told_and_recorded(
    tune: Sft, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "長い" * 60
    data = write_rows(
        tmp_path / "rows.jsonl", ("見積は?", "はい"), (long, "はい"), ("納期は?", long), ("修理は?", long)
    )
    run = tune(tmp_path / "out", offline=True, data=data, max_steps=1)
    assert 'dropped by length {"prompt_too_long": 1, "answer_too_long": 2} of 4' in capsys.readouterr().err
    [recorded] = runs.read(tmp_path / "out")
    counts = {key: value for key, value in recorded.summary.items() if key.startswith("data/")}
    assert counts == {"data/rows": 1, "data/dropped_prompt_too_long": 1, "data/dropped_answer_too_long": 2}
    assert run.code == 0
    with pytest.raises(console.UserError, match="no row fits in --max_length 8"):
        tune(tmp_path / "none", data=data, max_length=8)


def test_show_prints_the_mask_and_trains_nothing(
    llama: Any, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft.main([f"--model={llama.checkpoint}", f"--data={files[0]}", f"--out={tmp_path}", "--show=1"]) == 0
    lines = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()[1:]]
    marked = [line.startswith("*") for line in lines]
    assert marked == sorted(marked) and 0 < sum(marked) < len(lines), "first the prompt, then the answer"
    assert lines[-1].split() == ["*", "</s>"] and not list(tmp_path.iterdir())
    assert sft.main([f"--model={llama.checkpoint}", f"--data={files[0]}", "--show=99"]) == 0, "as many as there are"


def test_rows_beyond_the_model_s_positions_are_told_of(
    tune: Sft, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ("長い" * 30, "はい"))
    tune(tmp_path / "out", data=data, max_steps=1, max_length=256)
    assert "and the model was made for 64: positions beyond are new to it" in capsys.readouterr().err


# --- what comes out --------------------------------------------------------------------------------------------------
def test_it_learns_and_says_so_everywhere(learnt: Trained, llama: Any) -> None:
    result = learnt.result
    assert learnt.code == 0 and result["status"] == "ok" and result["step"] == 60
    assert result["eval_before/exact_match"] == 0 and result["eval/exact_match"] >= 0.5 and result["eval/valid"] == 1
    assert result["base/bpb"] != result["base/bpb_before"] > 0
    assert result["cost/money"] == pytest.approx(result["cost/device_seconds"])
    [run] = runs.read(learnt.folder.parent)
    assert (run.job_type, run.status, run.name, run.group) == ("sft", "ok", learnt.folder.name, run.config["recipe"])
    assert "task:kinds" in run.tags
    for key in ("eval/exact_match", "eval_before/exact_match", "base/bpb", "best_step"):
        assert run.summary[key] == pytest.approx(result[key])
    assert {"train/loss", "train/lr", "stability/grad_norm", "train/token_accuracy"} <= set(run.history)
    assert list(run.history["watch/exact_match"].step) == [0, 20, 40, 60]
    assert list(run.history["train/loss"].step) == list(range(1, 61))
    assert run.config["lineage"]["model"] == stage.model_fingerprint(llama.checkpoint)
    assert run.config["versions"]["transformers"] and "samples" in run.tables
    assert {"config.json", "chat_template.jinja", "tokenizer.json"} <= {
        path.name for path in (learnt.folder / "model").iterdir()
    }
    assert models.find(str(learnt.folder)) == learnt.folder / "model"


def test_a_finished_run_says_so_and_another_model_is_not_passed_off_for_it(
    tune: Sft, tmp_path: Path, learnt: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tune(tmp_path, max_steps=2)
    again = tune(tmp_path, max_steps=2)
    assert again == first and "is already ok: remove it to train again" in capsys.readouterr().err
    with pytest.raises(console.UserError, match="began from another --model"):
        tune(tmp_path, max_steps=2, model=learnt.folder)


def test_one_seed_one_set_of_weights(tune: Sft, tmp_path: Path) -> None:
    one, same, other = (tune(tmp_path / str(i), max_steps=4, seed=seed) for i, seed in enumerate((1, 1, 2)))
    assert one.weights == same.weights != other.weights
    order = tune(tmp_path / "order", max_steps=4, seed=1, data_seed=2)
    assert order.weights == other.weights, "of SFT with all weights, only the order of rows is random"
    assert order.folder.name == one.folder.name + "-d2"


def test_lora_writes_an_adapter_that_opens(tune: Sft, tmp_path: Path, llama: Any, files: Files) -> None:
    run = tune(tmp_path, lora_rank=4, max_steps=20)
    assert (run.folder / "model" / "adapter_model.safetensors").is_file()
    assert not (run.folder / "model" / "model.safetensors").exists()
    tuned, tokenizer = models.load(models.find(str(run.folder)))
    base, _ = models.load(llama.checkpoint)
    row = sft.tokenized(load_rows(str(files[0]), "messages"), tokenizer)[0]
    batch = {key: torch.tensor([value]) for key, value in row.items()}
    with torch.no_grad():
        assert float(tuned(**batch).loss) < float(base(**batch).loss) - 0.5
        with tuned.disable_adapter():
            assert torch.equal(tuned(**batch).logits, base(**batch).logits), "the base is as it was"


def test_the_control_begins_from_other_weights(tune: Sft, tmp_path: Path, llama: Any) -> None:
    tuned = tune(tmp_path, max_steps=1)
    torch.manual_seed(99)  # nothing of the process's own random state may enter
    control = tune(tmp_path, max_steps=1, random_weights=True)
    torch.manual_seed(98)
    again = tune(tmp_path / "again", max_steps=1, random_weights=True)
    assert control.folder.name != tuned.folder.name and control.weights != tuned.weights
    assert control.weights == again.weights
    pretrained, new = models.load(llama.checkpoint)[0], models.load(control.folder / "model")[0]
    change = [
        float(((a - b).norm() / a.norm()).detach())
        for a, b in zip(pretrained.parameters(), new.parameters(), strict=True)
    ]
    assert sum(one > 1 for one in change) > len(change) / 2, "no weight of the pretrained model is left"


# --- stopping and going on -------------------------------------------------------------------------------------------
def test_stopped_by_sigterm_it_goes_on_bit_for_bit(
    tune: Sft, tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = {"max_steps": 10, "watch_data": files[1], "watch_every": 2, "watch_items": 2}
    whole = tune(tmp_path / "whole", **flags)
    log = stage.Run.log

    def kill_at_5(run: stage.Run, row: Any) -> None:
        log(run, row)
        if run.step == 5 and "train/loss" in row:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(stage.Run, "log", kill_at_5)
        stopped = tune(tmp_path / "killed", offline=True, **flags)
    assert stopped.code == 143 and not stopped.result
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handler is given back"
    resumed = tune(tmp_path / "killed", offline=True, **flags)
    assert resumed.code == 0 and resumed.weights == whole.weights
    timeless = {key: value for key, value in resumed.result.items() if not key.startswith("cost/") and key != "model"}
    assert timeless == {key: whole.result[key] for key in timeless}
    [run] = runs.read(tmp_path / "killed")
    assert list(run.history["train/loss"].step) == list(range(1, 11)), "one W&B run, no step twice"
    assert len(run.paths) == 2 and run.status == "ok"


def test_killed_for_good_it_goes_on_bit_for_bit(
    tune: Sft, tmp_path: Path, llama: Any, files: Files, spawn: Callable[..., Any], as_argv: Callable[..., list[str]]
) -> None:
    flags = {"model": llama.checkpoint, "data": files[0], "max_steps": 40, "checkpoint_every": 5, "lora_rank": 2}
    whole = tune(tmp_path / "whole", **flags)
    argv = as_argv({**small_task.COMMON, **flags}, out=tmp_path / "killed", max_steps=40)
    slow = "import time, sys; from posttrain import sft, stage; log = stage.Run.log\n"
    slow += "stage.Run.log = lambda run, row: (time.sleep(0.1), log(run, row))[1]\nsft.main(sys.argv[1:])"
    child = spawn([sys.executable, "-c", slow, *argv])
    end = time.monotonic() + 60
    while not list(tmp_path.glob("killed/*/checkpoints/checkpoint-10/run.json")):
        assert child.poll() is None and time.monotonic() < end, child.communicate()[1]
        time.sleep(0.02)
    child.kill()
    child.wait()
    resumed = tune(tmp_path / "killed", **flags)
    assert resumed.code == 0 and resumed.weights == whole.weights


def test_a_lost_run_ends_as_diverged(tune: Sft, tmp_path: Path) -> None:
    run = tune(tmp_path, offline=True, lr=1e6, max_steps=60)
    assert run.code == console.EXIT_DIVERGED and run.result["status"] == "diverged" and run.result["step"] < 60
    assert run.result["stop_reason"] in ("loss_divergence", "nonfinite")
    [recorded] = runs.read(tmp_path)
    assert recorded.status == "diverged" and recorded.summary["stop_reason"] == run.result["stop_reason"]
    assert recorded.exit_code == console.EXIT_DIVERGED and "guard/events" in recorded.tables
    assert json.loads((run.folder / "guard.json").read_bytes())[0]["kind"] == run.result["stop_reason"]
    assert tune(tmp_path, lr=1e6, max_steps=60).code == console.EXIT_DIVERGED, "told again, with the same code"


def test_rollback_gives_the_best_weights_back(tune: Sft, tmp_path: Path, files: Files, learnt: Trained) -> None:
    watched = {"watch_data": files[1], "watch_every": 5, "on_verdict": "rollback"}
    run = tune(tmp_path, model=learnt.folder, lr=1e6, max_steps=60, **watched)
    assert run.code == 0 and run.result["status"] == "spiked" and run.result["step"] < 60
    assert run.result["best_step"] == 0 and run.weights == learnt.weights
    assert run.result["eval/exact_match"] == run.result["eval_before/exact_match"] >= 0.5


# --- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"model": "nowhere"}, "nowhere: no such model"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"lr": 0}, "--lr 0.0: must be positive"),
        ({"keep": 1.5}, "--keep 1.5: is a share"),
        ({"batch_size": 4, "micro_batch_size": 3}, "--micro_batch_size 3 must divide --batch_size 4"),
        ({"judge": "beauty"}, "--judge beauty: choose"),
        ({"on_verdict": "rollback"}, "--on_verdict rollback: needs --watch_data"),
        ({"seed": -1}, "--seed -1: must be from 0"),
        ({"watch_data": "DATA"}, "is a row of {messages: [{role, content}, ...]}, not of {prompt, reference, ...}"),
        ({"epoch": 3}, "did you mean --epochs"),
    ],
)
def test_mistakes_are_one_line(tune: Sft, tmp_path: Path, files: Files, flags: dict[str, Any], said: str) -> None:
    flags = {name: files[0] if value == "DATA" else value for name, value in flags.items()}
    with pytest.raises(console.UserError) as mistake:
        tune(tmp_path, **flags)
    assert said in str(mistake.value) and "\n" not in str(mistake.value)
    assert not list(tmp_path.glob("*-s*/result.json"))


def test_a_mistake_leaves_with_2(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "sft", "--model=nowhere", f"--data={files[0]}"])
    for name in ("HF_HUB_OFFLINE", "TRL_EXPERIMENTAL_SILENCE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit) as end:
        console.door(train.main)
    assert end.value.code == console.EXIT_USER
    err = capsys.readouterr().err
    assert err.startswith("error: nowhere: no such model") and err.count("\n") == 1


def test_dry_run_checks_and_trains_nothing(
    llama: Any, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--model={llama.checkpoint}", f"--data={files[0]}", f"--out={tmp_path}", "--seed=3"]
    assert sft.main(argv, dry_run=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {field.name for field in dataclasses.fields(sft.SftConfig)}
    assert told["data_seed"] == told["init_seed"] == 3 and not list(tmp_path.iterdir())
