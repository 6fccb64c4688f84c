"""Many pulls in one process: each is what it would be alone, whatever becomes of the others."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import console
from gacha import runs
from pretrain import checkpoint, pretrain, together

if TYPE_CHECKING:
    from tests.conftest import Pull

    Puller = Callable[..., Pull]
    Spawner = Callable[..., subprocess.Popen[str]]
    Argv = Callable[..., list[str]]

CURVE = ("train/loss", "stability/grad_norm", "stability/update_rms", "train/lr")


@pytest.fixture
def pulls(tiny_flags: dict[str, Any], as_argv: "Argv", monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """pulls(out, offline=False, **flags): exit code and results of several pulls in this process."""
    import wandb

    def make(out: Path, offline: bool = False, **more: Any) -> tuple[int, list[dict[str, Any]]]:
        printed = io.StringIO()
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            monkeypatch.setenv(name, str(out))
        monkeypatch.setenv("WANDB_MODE", "offline" if offline else "disabled")
        out.mkdir(parents=True, exist_ok=True)
        wandb.teardown()
        try:
            with contextlib.redirect_stdout(printed):
                code = pretrain.main(as_argv({**tiny_flags, **more, "json": True}, out=out))
        finally:
            wandb.teardown()
        return code, json.loads(printed.getvalue().splitlines()[-1])["pulls"]

    return make


def curves(folder: Path) -> dict[str, runs.Run]:
    return {str(run.name): run for run in runs.read(folder)}


@pytest.mark.parametrize(
    "recipe",
    [
        {"optimizer": "adamw"},
        {"optimizer": "muon", "qk_norm": True, "tie_embeddings": False, "z_loss": 1e-4, "doc_mask": True},
    ],
)
def test_each_pull_of_a_batch_has_the_curve_that_it_has_alone(
    recipe: dict[str, Any], pulls: Callable[..., Any], pull: "Puller", tmp_path: Path
) -> None:
    """200 steps, seeds times learning rates, by what W&B recorded: within 1e-4 of the loss at every step."""
    flags = {**recipe, "tokens": 256 * 200, "batch_tokens": 256, "val_every": 100, "checkpoint_every": 100}
    flags |= {"n_heads": 4, "n_kv_heads": 2}
    code, results = pulls(tmp_path / "together", offline=True, seed="3..4", lr="1e-3,4e-3", **flags)
    assert code == 0 and len(results) == 4
    found = curves(tmp_path / "together")
    for seed, lr in ((3, 4e-3), (4, 1e-3)):
        alone = pull(tmp_path / "alone", offline=True, seed=seed, lr=lr, **flags)
        (one,) = [run for run in runs.read(tmp_path / "alone") if run.name == alone.result["name"]]
        other = found[alone.result["name"]]
        for name in CURVE:
            mine, theirs = one.history[name], other.history[name]
            assert mine.step.tolist() == theirs.step.tolist() == list(range(1, 201))
            assert np.abs(theirs.value / mine.value - 1).max() < (1e-4 if name == "train/loss" else 1e-2), name
        assert other.summary["val/bpb"] == pytest.approx(one.summary["val/bpb"], rel=1e-4)
        same = [key for key in one.config if key not in ("out", "hardware")]
        assert {key: one.config[key] for key in same} == {key: other.config[key] for key in same}
        (result,) = [r for r in results if r["name"] == other.name]
        assert result["tokens"] == 200 * 256 and Path(result["checkpoint"]).name == "step-00000200"


def test_a_pull_that_diverges_is_closed_and_the_others_do_not_notice(
    pulls: Callable[..., Any], pull: "Puller", tmp_path: Path
) -> None:
    """Two of four are lost, at NaN and by leaving their trend; and the batch is packed anew."""
    flags = {"optimizer": "muon", "tokens": 512 * 60, "checkpoint_every": 20, "warmup": 0.0}
    code, results = pulls(tmp_path / "all", offline=True, lr="3e-3,1e30,1e-2,10", **flags)
    assert code == 0 and [r["status"] for r in results] == ["ok", "diverged", "ok", "diverged"]
    lost = [Path(tmp_path / "all" / r["name"]) for r in results if r["status"] == "diverged"]
    assert all(len(checkpoint.folders(folder)) >= 1 for folder in lost)
    assert all(r["tokens"] < 60 * 512 for r in results if r["status"] == "diverged")
    recorded = curves(tmp_path / "all")
    assert [recorded[r["name"]].exit_code for r in results] == [0, 3, 0, 3]
    for lr, result in ((3e-3, results[0]), (1e-2, results[2])):
        alone = pull(tmp_path / "alone", lr=lr, **flags)
        assert result["val/bpb"] == pytest.approx(alone.result["val/bpb"], rel=1e-4)
    # Device time is divided among those that used it.
    seconds = [r["device_seconds"] for r in results]
    assert seconds[1] < seconds[0] and seconds[1] < seconds[2]


def test_all_lost_is_exit_code_3(pulls: Callable[..., Any], tmp_path: Path) -> None:
    code, results = pulls(tmp_path, lr="1e30,1e29", optimizer="muon", warmup=0.0)
    assert code == 3 and {r["status"] for r in results} == {"diverged"}


def test_a_killed_batch_goes_on_from_the_step_that_all_have(
    spawn: "Spawner", as_argv: "Argv", tiny_flags: dict[str, Any], pulls: Callable[..., Any], tmp_path: Path
) -> None:
    """Even if the kill fell between two pulls' saves; finished, it is what an uninterrupted batch is, bit for bit."""
    flags = {**tiny_flags, "tokens": 512 * 60, "seed": "0..2", "log_every": 5}
    _, whole = pulls(tmp_path / "whole", **flags)
    child = spawn([sys.executable, "train.py", "pretrain", *as_argv(flags, out=tmp_path / "killed")])
    while not list((tmp_path / "killed").glob("*-s2/checkpoints/step-00000020")):
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    last = sorted((tmp_path / "killed").glob("*-s1/checkpoints/step-*"))[-1]
    last.rename(last.with_name(f".{last.name}.part"))  # as if its save had not come through
    code, again = pulls(tmp_path / "killed", **flags)
    assert code == 0
    for one, other in zip(again, whole, strict=True):
        for name in ("model.safetensors", "training_state.safetensors"):
            mine, theirs = (Path(r["checkpoint"]) / name for r in (one, other))
            assert mine.read_bytes() == theirs.read_bytes()


def test_the_same_command_trains_only_what_is_missing(
    pulls: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = pulls(tmp_path, pulls=2)
    code, results = pulls(tmp_path, pulls=3)
    assert code == 0 and results[:2] == first and results[2]["status"] == "ok"
    assert capsys.readouterr().err.count("is already ok") == 2


def test_each_line_of_a_file_is_a_pull_and_its_end_is_told(pulls: Callable[..., Any], tmp_path: Path) -> None:
    """With the run ids that were asked for, diverged ones with 3; a pull that had ended is told again."""
    each = tmp_path / "pack.jsonl"
    lines = [{"seed": 1, "run_id": "one"}, {"seed": 1, "lr": 1e30, "run_id": "two"}, {"seed": 2, "weight_decay": 0.0}]
    each.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, results = pulls(tmp_path, offline=True, each=each, warmup=0.0)
    assert code == 0 and [r["status"] for r in results] == ["ok", "diverged", "ok"]
    told = [json.loads(line) for line in (tmp_path / "pack.jsonl.ended").read_text().splitlines()]
    assert [(t["run_id"], t["status"], t["exit_code"]) for t in told[:2]] == [("two", "diverged", 3), ("one", "ok", 0)]
    assert {r["run_id"] for r in results} == {run.id for run in runs.read(tmp_path)} >= {"one", "two"}
    assert curves(tmp_path)[results[2]["name"]].config["weight_decay"] == 0.0
    (tmp_path / "pack.jsonl.ended").unlink()
    pulls(tmp_path, each=each, warmup=0.0)
    again = [json.loads(line) for line in (tmp_path / "pack.jsonl.ended").read_text().splitlines()]
    assert sorted(map(str, again)) == sorted(map(str, told))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"seed": "0..x"}, "--seed: '0..x'"),
        ({"seed": "3..1"}, "--seed: '3..1'"),
        ({"seed": "1,1"}, "--seed 1,1"),
        ({"lr": "1e-3,fast"}, "--lr: 'fast'"),
        ({"lr": "1..3"}, "--lr: '1..3'"),
        ({"lr": "1e-3,-1"}, "--lr -1"),
        ({"d_model": "32,64"}, "--d_model"),
        ({"pulls": 0}, "--pulls 0"),
        ({"pulls": 2, "seed": "0,1"}, "--pulls 2"),
        ({"each": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"micro_batch_tokens": 100}, "--micro_batch_tokens 100"),
        ({"parametrization": "mup"}, "--base_width"),
        ({"n_heads": 0}, "--head_dim"),
        ({"d_model": 1 << 16, "batch_tokens": 1 << 20, "tokens": 1 << 20}, "what would fit: "),
    ],
)
def test_nonsense_is_named_before_anything_is_made(
    flags: dict[str, Any], says: str, tiny_flags: dict[str, Any], as_argv: "Argv", tmp_path: Path
) -> None:
    with pytest.raises(console.UserError) as error:
        pretrain.main(as_argv({**tiny_flags, **flags}, out=tmp_path / "runs"))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no line"),
        ("{", "line 1"),
        ('{"seed": 1}\n[2]', "line 2"),
        ('{"seed": 1}\n{"seed": "one"}', "line 2"),
        ('{"d_model": 64}', "d_model"),
        ('{"seed": 1}\n{"seed": 1}', "two of the pulls are the same"),
    ],
)
def test_a_file_of_pulls_that_is_wrong_is_named_with_its_line(
    text: str, says: str, tiny_flags: dict[str, Any], as_argv: "Argv", tmp_path: Path
) -> None:
    (tmp_path / "pack.jsonl").write_text(text)
    with pytest.raises(console.UserError) as error:
        pretrain.main(as_argv(tiny_flags, out=tmp_path / "runs", each=tmp_path / "pack.jsonl"))
    assert says in str(error.value) and not (tmp_path / "runs").exists()


def test_micro_batches_and_recomputed_activations_are_the_same_recipe_and_curve(
    llama: "Pull", pull: "Puller", tmp_path: Path
) -> None:
    """One update in four parts: the recipe's name stays, and the loss to within float32's rounding."""
    parts = pull(tmp_path, **{**llama.flags, "micro_batch_tokens": 128, "checkpoint_activations": True})
    assert parts.result["name"] == llama.result["name"]
    assert parts.result["val/bpb"] == pytest.approx(llama.result["val/bpb"], rel=1e-5)


def test_a_host_that_runs_ahead_of_its_device_changes_nothing(
    pulls: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a step is judged while the next is computed: same bits, same rows, same verdicts."""
    found = []
    for name, lag in (("at once", 0), ("behind", 1)):
        monkeypatch.setitem(together.LAG, "cpu", lag)
        out = tmp_path / name
        _, results = pulls(out, offline=True, lr="3e-3,1e30", warmup=0.0, log_every=3)
        weights = (Path(results[0]["checkpoint"]) / "model.safetensors").read_bytes()
        rows = {run.name: run.history["train/loss"].step.tolist() for run in runs.read(out)}
        found.append((weights, rows, [(r["name"], r["status"], r["tokens"], r["val/bpb"]) for r in results]))
    assert found[0] == found[1]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_compiled_blocks_learn_as_eager_ones_do(llama: "Pull", pull: "Puller", tmp_path: Path) -> None:
    compiled = pull(tmp_path, **{**llama.flags, "compile": True})
    assert compiled.result["val/bpb"] == pytest.approx(llama.result["val/bpb"], rel=1e-4)
