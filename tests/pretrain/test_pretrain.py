"""A pull: finished, killed, stopped, diverged, repeated; and what W&B's files say of each."""

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import console
from gacha import runs
from gacha.leveldb import HEAD, split
from pretrain import checkpoint, pretrain
from pretrain.model import ModelConfig, Transformer, load_hugging_face_weights

if TYPE_CHECKING:
    from tests.conftest import Pull

    Puller = Callable[..., Pull]
    Spawner = Callable[..., subprocess.Popen[str]]
    Argv = Callable[..., list[str]]

METRICS = ["train/loss", "train/lr", "stability/grad_norm", "stability/loss_z", "stability/max_attn_logit"]
METRICS += ["stability/update_rms", "perf/tokens_per_second", "perf/mfu", "perf/step_seconds"]
AT_VALIDATION = ["val/loss", "val/bpb"]
SAVED = ("model.safetensors", "training_state.safetensors")


def wait_for(pattern: str, folder: Path, child: subprocess.Popen[str]) -> Path:
    """The first path below `folder` that matches, as soon as it is there."""
    while not (found := sorted(folder.glob(pattern))):
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.002)
    return found[0]


def steps(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.folders(folder)]


def assert_same_bits(one: Path, other: Path) -> None:
    for name in SAVED:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(("name", "last_saved"), [("untied", 0), ("qwen", 40)])
def test_a_pull_killed_at_a_random_moment_ends_with_the_same_bits(
    name: str,
    last_saved: int,
    request: pytest.FixtureRequest,
    spawn: "Spawner",
    pull: "Puller",
    as_argv: "Argv",
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """AdamW before its first periodic checkpoint, Muon after its second; then the same command, in another process."""
    whole: Pull = request.getfixturevalue(name)
    child = spawn([sys.executable, "train.py", "pretrain", *as_argv(whole.flags, out=tmp_path)])
    wait_for(f"*/checkpoints/step-{last_saved:08d}", tmp_path, child)
    time.sleep(random.uniform(0, 0.03 if last_saved == 0 else 0.1))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    folder = tmp_path / whole.folder.name
    resumes_at = steps(folder)[-1]
    assert resumes_at == last_saved if last_saved == 0 else last_saved <= resumes_at < 90
    assert not (folder / "result.json").exists()
    again = pull(tmp_path, **whole.flags)
    assert f"resuming {folder} from step {resumes_at}" in capsys.readouterr().err
    assert (again.code, again.folder, steps(folder)) == (0, folder, steps(whole.folder))
    assert_same_bits(again.checkpoint, whole.checkpoint)
    guards = [json.loads((one.checkpoint / "training_state.json").read_bytes())["guard"] for one in (again, whole)]
    assert guards[0] == guards[1]
    assert again.result["val/bpb"] == whole.result["val/bpb"]


@pytest.fixture(scope="module")
def stopped(
    spawn: "Spawner",
    as_argv: "Argv",
    pull: "Puller",
    tiny_flags: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """A pull that got SIGTERM at its first checkpoint, W&B offline; a second one on its folder; the one resumed."""
    out = tmp_path_factory.mktemp("stopped")
    flags = {**tiny_flags, "tokens": 512 * 150, "checkpoint_every": 50, "json": True}
    argv = as_argv(flags, out=out)
    command = [sys.executable, "train.py", "pretrain", *argv]
    child = spawn(command, WANDB_MODE="offline", WANDB_DIR=str(out), HOME=str(out))
    while not list(out.glob("*/checkpoints/step-00000000")):
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.01)
    with pytest.raises(console.UserError) as second:
        pretrain.main(argv)
    wait_for("*/checkpoints/step-00000050", out, child)
    child.terminate()
    printed, said = child.communicate(timeout=60)
    saved = steps(out / json.loads(printed)["name"])
    (log,) = runs.log_files(out)
    fragment = runs.read(log)[0]
    resumed = pull(out, offline=True, **flags)
    (run,) = runs.read(out)
    told = {"code": child.returncode, "result": json.loads(printed), "stderr": said, "saved": saved, "run": run}
    return told | {"second": str(second.value), "resumed": resumed, "fragment": fragment}


def test_sigterm_saves_and_the_same_command_finishes(stopped: dict[str, Any]) -> None:
    """Exit 143, one line that says how to go on, a checkpoint of the very step; then an ordinary end."""
    last = stopped["saved"][-1]
    assert stopped["code"] == 143 and stopped["result"]["status"] == "stopped"
    assert 50 <= last < 150 and stopped["result"]["tokens"] == last * 512
    assert f"stopped by SIGTERM at step {last}, saved: the same command resumes" in stopped["stderr"]
    assert "Traceback" not in stopped["stderr"]
    assert stopped["resumed"].code == 0 and stopped["resumed"].result["tokens"] == 150 * 512


def test_a_second_process_on_a_pull_that_runs_is_refused(stopped: dict[str, Any]) -> None:
    assert "is being trained by another process" in stopped["second"]
    assert str(stopped["resumed"].folder) in stopped["second"]


def test_a_resumed_pull_is_one_run_in_two_fragments(stopped: dict[str, Any]) -> None:
    """The first says stopped; together they hold each step once, in order, and say how it ended."""
    first, run, last = stopped["fragment"], stopped["run"], stopped["saved"][-1]
    assert (first.status, first.exit_code, first.summary["status"]) == ("stopped", 143, "stopped")
    assert first.history["train/loss"].step.tolist() == list(range(1, last + 1))
    assert len(run.paths) == 2 and run.id == first.id == stopped["resumed"].result["run_id"]
    assert run.history["train/loss"].step.tolist() == list(range(1, 151))
    assert run.history["train/loss"].tokens.tolist() == [512 * step for step in range(1, 151)]
    assert (run.status, run.exit_code, run.summary["status"]) == ("ok", 0, "ok")
    assert run.summary["cost/device_seconds"] > first.summary["cost/device_seconds"]


def test_a_finished_pull_is_recorded_as_the_design_says(llama: "Pull") -> None:
    """Every metric on every logged step, validations where they are due, all on tokens."""
    (run,) = runs.read(llama.folder.parent)
    for name in METRICS:
        assert run.history[name].step.tolist() == list(range(1, 31)), name
        assert run.history[name].tokens.tolist() == [512 * step for step in range(1, 31)], name
        assert all(math.isfinite(value) for value in run.history[name].value), name
    for name in AT_VALIDATION:
        assert run.history[name].step.tolist() == [10, 20, 30], name
    assert run.history["step"].value.tolist() == run.history["step"].step.tolist()
    assert 7.0 < run.history["train/loss"].value[0] < 8.0 and run.history["train/loss"].value[-1] < 6.5
    recipe = run.config["recipe"]
    assert re.fullmatch("[0-9a-f]{8}", recipe)
    assert (run.group, run.job_type, run.name, run.project) == (recipe, "pretrain", f"{recipe}-s5", "llm-gacha")
    kinds = {tag.partition(":")[0]: tag.partition(":")[2] for tag in run.tags}
    assert kinds.keys() == {"size", "data", "commit"} and kinds["size"] == "67.7k"
    config = run.config
    assert {"git_commit", "hardware", "versions", "lineage", "currency", "stage"} <= config.keys()
    assert {name: config[name] for name in ("seed", "init_seed", "data_seed", "sample_seed")} == dict.fromkeys(
        ("seed", "init_seed", "data_seed", "sample_seed"), 5
    )
    assert config["versions"]["torch"] == torch.__version__ and config["lineage"]["shards"] == kinds["data"]
    assert config["tokens"] == 30 * 512 and config["git_commit"] and config["hardware"]


def test_the_summary_holds_verdict_scores_and_costs(llama: "Pull") -> None:
    """FLOPs by hand for 18,432 block weights, a head of 49,152 and attention over half of 64 tokens."""
    (run,) = runs.read(llama.folder.parent)
    told = run.summary
    assert (run.status, told["status"], run.exit_code, told["tokens"]) == ("ok", "ok", 0, 30 * 512)
    assert told["val/bpb"] == run.history["val/bpb"].value[-1] == llama.result["val/bpb"]
    assert told["cost/flops"] == (6 * (18_432 + 49_152) + 6 * 2 * 32 * 64) * 30 * 512
    assert 0 < told["cost/device_seconds"] < 60
    assert told["cost/money"] == pytest.approx(told["cost/device_seconds"], rel=1e-3)  # at 3,600 an hour
    assert "diverged_at_tokens" not in told


def test_the_lowest_validation_loss_is_in_the_summary(llama: "Pull") -> None:
    (run,) = runs.read(llama.folder.parent)
    assert run.summary["val/loss.min"] == run.history["val/loss"].value.min()


def test_sample_texts_are_in_a_table(llama: "Pull") -> None:
    (run,) = runs.read(llama.folder.parent)
    rows = runs.table(run.tables["samples"])
    assert len(rows) == 4 and [list(row) for row in rows] == [["step", "tokens", "prompt", "text"]] * 4
    assert all((row["step"], row["tokens"]) == (30, 30 * 512) for row in rows)
    assert all(row["text"].startswith(row["prompt"]) and len(row["text"]) > len(row["prompt"]) for row in rows)
    assert rows[0]["prompt"] == "" and len({row["prompt"] for row in rows}) > 1


def records(log: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    return [Record.FromString(payload) for payload in split(log.read_bytes()[HEAD:], HEAD)[0] if payload]


def test_the_model_is_an_artifact_by_reference(llama: "Pull") -> None:
    (run,) = runs.read(llama.folder.parent)
    logged = [record.artifact for record in records(run.paths[0]) if record.WhichOneof("record_type") == "artifact"]
    (artifact,) = [one for one in logged if one.type == "model"]
    assert artifact.name == f"model-{run.name}"
    references = [entry.ref for entry in artifact.manifest.contents]
    assert any(ref.endswith("step-00000030/model.safetensors") for ref in references)
    assert all(ref.startswith("file://") for ref in references)


def test_a_finished_pull_says_so_and_changes_nothing(llama: "Pull", pull: "Puller") -> None:
    before = {path: path.stat().st_mtime_ns for path in llama.folder.rglob("*") if path.name != ".lock"}
    started = time.monotonic()
    again = pull(llama.folder.parent, **llama.flags)
    assert (again.code, again.result) == (0, llama.result) and time.monotonic() - started < 0.5
    assert {path: path.stat().st_mtime_ns for path in llama.folder.rglob("*") if path.name != ".lock"} == before


@pytest.fixture(scope="module")
def diverged(pull: "Puller", tmp_path_factory: pytest.TempPathFactory) -> "Pull":
    """A learning rate of 10, recorded by W&B; do not change it."""
    out = tmp_path_factory.mktemp("diverged")
    return pull(out, offline=True, lr=10, optimizer="muon", tokens=512 * 60, checkpoint_every=2)


def test_a_divergence_ends_the_pull_and_is_told(diverged: "Pull") -> None:
    """Exit 3 well before the budget is spent, the verdict in W&B, an alert, a checkpoint from before the onset."""
    assert (diverged.code, diverged.result["status"]) == (3, "diverged")
    assert diverged.result["tokens"] < 0.5 * 60 * 512
    assert json.loads((diverged.folder / "result.json").read_bytes()) == diverged.result
    (run,) = runs.read(diverged.folder.parent)
    assert (run.status, run.exit_code, run.summary["status"]) == ("diverged", 3, "diverged")
    assert run.summary["diverged_at_tokens"] == diverged.result["tokens"]
    assert run.summary["cost/device_seconds"] > 0 and run.summary["cost/flops"] > 0
    onset = int(re.findall(r"left its trend at step (\d+)", run.summary["verdict"])[0])
    kept = steps(diverged.folder)
    assert kept and kept[-1] <= onset and Path(diverged.result["checkpoint"]) == diverged.checkpoint
    (alert,) = [record.alert for record in records(run.paths[0]) if record.WhichOneof("record_type") == "alert"]
    assert alert.title == "diverged" and run.summary["verdict"] in alert.text
    assert run.summary["verdict"] in (diverged.folder / "train.log").read_text()


def test_a_diverged_pull_stays_diverged(diverged: "Pull", pull: "Puller") -> None:
    started = time.monotonic()
    again = pull(diverged.folder.parent, **diverged.flags)
    assert (again.code, again.result) == (3, diverged.result) and time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer": "muon", "lr": 10, "checkpoint_every": 2},
        {"lr": 1e10, "checkpoint_every": 1},
    ],
)
def test_the_checkpoint_that_a_divergence_leaves_is_a_good_one(
    flags: dict[str, Any], pull: "Puller", tmp_path: Path
) -> None:
    """However often it was saved, the one kept predicts no worse than the initial weights did."""
    lost = pull(tmp_path, **flags, tokens=512 * 60, warmup=0)
    assert lost.code == 3
    shape: dict[str, Any] = {
        "vocab_size": 1536,
        "qk_norm": False,
        "tie_embeddings": True,
        "rope_theta": 1e4,
        "norm_eps": 1e-6,
    }
    shape |= {key: lost.flags[key] for key in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "seq_len")}
    model = Transformer(ModelConfig(**shape))
    load_hugging_face_weights(model, 0, checkpoint.load(lost.checkpoint)[1])
    ids = torch.randint(3, 1536, (1, 8, 65), generator=torch.Generator().manual_seed(0))
    assert model(ids[..., :-1], ids[..., 1:], 0.0)[1].item() < math.log(1536) + 1


def test_a_pull_that_ends_lost_is_not_called_ok(pull: "Puller", tmp_path: Path) -> None:
    """A budget that ends before the guard's patience does is no reason to recommend the pull."""
    lost = pull(tmp_path, lr=10, warmup=0)
    assert lost.result["status"] == "diverged"


def test_a_divergence_may_be_ignored_but_is_still_told(pull: "Puller", tmp_path: Path) -> None:
    """The whole budget is spent, also on NaN."""
    lost = pull(tmp_path, lr=1e10, on_divergence="ignore")
    assert (lost.code, lost.result["status"], lost.result["tokens"]) == (3, "diverged", 30 * 512)


def test_bfloat16_learns_as_float32_does(llama: "Pull", pull: "Puller", tmp_path: Path) -> None:
    """Autocast over float32 weights, which is also what the checkpoint holds."""
    half = pull(tmp_path, seed=5, dtype="bfloat16", qk_norm=True)
    assert half.result["val/bpb"] == pytest.approx(llama.result["val/bpb"], rel=0.05)


def test_seeds_are_three_and_the_recipe_does_not_know_them(pull: "Puller", tmp_path: Path) -> None:
    """Neither seeds nor where and how often a pull is watched make another recipe; a learning rate does."""
    first = pull(tmp_path / "a", tokens=512)
    others: dict[str, dict[str, Any]] = {
        "watched": {"seed": 3, "log_every": 7, "val_every": 9, "checkpoint_every": 4, "price_per_hour": 5},
        "init": {"init_seed": 3},
        "data": {"data_seed": 3},
        "lr": {"lr": 2e-3},
    }
    made = {name: pull(tmp_path / name, tokens=512, **flags) for name, flags in others.items()}
    recipes = {name: one.result["name"].partition("-")[0] for name, one in made.items()}
    mine = first.result["name"].partition("-")[0]
    assert recipes["lr"] != mine and {recipes[name] for name in ("watched", "init", "data")} == {mine}
    assert len({first.result["name"], *(one.result["name"] for one in made.values())}) == 5

    def initial(one: "Pull") -> bytes:
        return (one.folder / "checkpoints" / "step-00000000" / "model.safetensors").read_bytes()

    def loss(one: "Pull") -> str:
        return re.findall(r"step 1/1  loss ([\d.]+)", (one.folder / "train.log").read_text())[0]

    assert initial(made["data"]) == initial(first) and loss(made["data"]) != loss(first)
    assert initial(made["init"]) != initial(first) and loss(made["init"]) != loss(first)
    assert initial(made["watched"]) == initial(made["init"])
    assert initial(made["lr"]) == initial(first) and loss(made["lr"]) == loss(first)
