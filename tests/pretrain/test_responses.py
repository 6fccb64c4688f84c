"""A pull that mends itself: poisoned, it skips or goes back, ends as a sound one does, and says what that cost."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gacha import runs
from pretrain import checkpoint, pretrain, together

if TYPE_CHECKING:
    from tests.conftest import Pull

    Puller = Callable[..., Pull]
    Spawner = Callable[..., subprocess.Popen[str]]
    Argv = Callable[..., list[str]]

LONG: dict[str, Any] = {"tokens": 512 * 90, "val_every": 90, "seed": 5, "warmup": 0.1}
LEAP = "lr*50@50-70"


def state(pull: "Pull") -> dict[str, Any]:
    return json.loads((pull.checkpoint / "training_state.json").read_bytes())


def run_of(pull: "Pull") -> runs.Run:
    (run,) = (run for run in runs.read(pull.folder.parent) if run.name == pull.result["name"])
    return run


def events(pull: "Pull") -> list[dict[str, Any]]:
    return runs.table(run_of(pull).tables["stability/events"])


@pytest.fixture(scope="module")
def sound(pull: "Puller", tmp_path_factory: pytest.TempPathFactory) -> "Pull":
    return pull(tmp_path_factory.mktemp("sound"), **LONG)


@pytest.fixture(scope="module")
def rewound(pull: "Puller", tmp_path_factory: pytest.TempPathFactory) -> "Pull":
    """A leap of the learning rate, by which the pull loses what it knew, undone; do not change it."""
    out = tmp_path_factory.mktemp("rewound")
    return pull(out, offline=True, **LONG, fault=LEAP, on_divergence="rewind", price_per_hour=3600)


def test_a_leap_of_the_learning_rate_is_undone(rewound: "Pull", sound: "Pull") -> None:
    """One return, whose data is passed over; the budget in updates and the end are those of the sound pull."""
    assert (rewound.code, rewound.result["status"]) == (0, "spiked")
    assert rewound.result["tokens"] == 90 * 512 and rewound.result["stability/retries"] == 1
    assert rewound.result["val/bpb"] == pytest.approx(sound.result["val/bpb"], rel=0.01)
    recovery = state(rewound)["recovery"]
    assert recovery["shift"] == recovery["reached"] - 50 > 0, "data from the checkpoint of step 50 to the verdict"
    assert state(rewound)["loader"]["next_step"] == 90 + recovery["shift"]


def test_what_was_done_and_lost_is_on_the_record(rewound: "Pull") -> None:
    """One run in two fragments whose rows are those of the way that led to the end; paid for is all."""
    run, recovery = run_of(rewound), state(rewound)["recovery"]
    assert len(run.paths) == 2 and (run.status, run.exit_code) == ("spiked", 0)
    assert run.history["train/loss"].step.tolist() == list(range(1, 91))
    assert run.history["train/loss"].value[55:].max() < 7, "nothing of what was undone"
    (told,) = [row for row in events(rewound) if row["action"]]
    assert (told["action"], told["kind"], told["step"]) == ("rewind", "divergence", recovery["reached"] - 1)
    evidence = json.loads(told["evidence"])
    lost = (recovery["reached"] - 50) * 512
    assert (evidence["to_step"], evidence["lost_tokens"]) == (50, lost)
    summary = run.summary
    assert (summary["stability/retries"], summary["cost/lost_tokens"]) == (1, lost)
    assert 0 < summary["cost/lost_device_seconds"] < summary["cost/device_seconds"]
    assert summary["cost/money"] == pytest.approx(summary["cost/device_seconds"])
    per_token = 6 * (18_432 + 49_152) + 6 * 2 * 32 * 64
    assert summary["cost/flops"] == per_token * (90 * 512 + lost)
    assert "diverged_at_tokens" not in summary
    assert "back to step 50, on with data step" in (rewound.folder / "train.log").read_text()


@pytest.mark.parametrize(
    ("fault", "response", "within"),
    [
        ("batch@70", "skip", 0.01),
        ("nan@70", "skip", 0.01),
        ("lr*50@50-69", "skip", 0.01),
        ("nan@70", "rewind", 0.01),
        (LEAP, "lower_lr", 0.1),  # it learns half as fast for half of its time
    ],
)
def test_a_poisoned_pull_ends_as_a_sound_one(
    fault: str, response: str, within: float, pull: "Puller", sound: "Pull", tmp_path: Path
) -> None:
    mended = pull(tmp_path, offline=True, **LONG, fault=fault, on_divergence=response)
    assert mended.code == 0
    assert mended.result["val/bpb"] <= sound.result["val/bpb"] * (1 + within)
    summary, done = run_of(mended).summary, state(mended)["recovery"]
    if fault.startswith("lr") and response == "skip":
        (held,) = [row for row in events(mended) if row["action"]]
        assert (held["step"], held["action"], done["skipped"]) == (50, "hold_lr", 0)
        assert run_of(mended).history["train/lr"].value.max() == pytest.approx(3e-3)
    elif response == "skip":
        assert done["skipped"] == summary["stability/skipped_updates"] == 1
        assert summary["cost/lost_tokens"] == 512
        assert [row["step"] for row in events(mended) if row["action"] == "skip"] == [70]
    else:
        assert done["retries"] == summary["stability/retries"] == 1
        assert done["lr_factor"] == (0.5 if response == "lower_lr" else 1)
        assert (done["shift"] > 0) == (response == "rewind")
        assert mended.result["status"] == "spiked"


def test_a_pull_killed_on_its_way_back_ends_with_the_same_bits(
    rewound: "Pull", spawn: "Spawner", as_argv: "Argv", pull: "Puller", tmp_path: Path
) -> None:
    """At once after later checkpoints were dropped, or some steps later."""
    child = spawn([sys.executable, "train.py", "pretrain", *as_argv(rewound.flags, out=tmp_path)])
    folder = tmp_path / rewound.folder.name
    while not (folder / "checkpoints" / "step-00000060").exists():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.002)
    while (folder / "checkpoints" / "step-00000060").exists():
        time.sleep(0.001)
    time.sleep(random.choice([0.0, 0.05, 0.3]))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    again = pull(tmp_path, **rewound.flags)
    assert again.result["val/bpb"] == rewound.result["val/bpb"]
    for name in ("model.safetensors", "training_state.safetensors"):
        assert (again.checkpoint / name).read_bytes() == (rewound.checkpoint / name).read_bytes()
    mine, theirs = state(again), state(rewound)
    assert mine["guard"] == theirs["guard"]
    for name in ("retries", "reached", "shift", "lr_factor", "rewound_tokens", "events"):
        assert mine["recovery"][name] == theirs["recovery"][name], name


def test_a_pull_goes_back_out_of_a_batch_of_pulls_as_it_does_alone(
    rewound: "Pull",
    as_argv: "Argv",
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batch goes on without it, and ends before it. As on a GPU, a verdict comes when the next update is made."""
    monkeypatch.setitem(together.LAG, "cpu", 1)
    each = tmp_path / "each.jsonl"
    each.write_text('{"seed": 5}\n{"seed": 6, "lr": 1e-5}\n')
    assert pretrain.main(as_argv({**rewound.flags, "each": each}, out=tmp_path)) == 0
    mended, other = json.loads(capsys.readouterr().out.splitlines()[-1])["pulls"]
    assert (mended["name"], mended["stability/retries"]) == (rewound.result["name"], 1)
    assert mended["val/bpb"] == pytest.approx(rewound.result["val/bpb"], rel=1e-4)
    assert (other["status"], other["tokens"]) == ("ok", 90 * 512) and "stability/retries" not in other
    ended = [json.loads(line)["name"] for line in (tmp_path / "each.jsonl.ended").read_text().splitlines()]
    assert ended == [other["name"], mended["name"]]


def test_a_pull_that_cannot_be_mended_ends_as_diverged(pull: "Puller", tmp_path: Path) -> None:
    """After its last retry, with exit code 3; the same command says so again."""
    flags = {"lr": 10, "optimizer": "muon", "tokens": 512 * 60, "checkpoint_every": 5}
    lost = pull(tmp_path, offline=True, **flags, on_divergence="lower_lr", max_retries=2, retry_lr=0.9)
    assert (lost.code, lost.result["status"], lost.result["stability/retries"]) == (3, "diverged", 2)
    run = run_of(lost)
    assert (run.status, len(run.paths), run.summary["diverged_at_tokens"]) == ("diverged", 3, lost.result["tokens"])
    assert [row["action"] for row in events(lost) if row["action"]] == ["lower_lr"] * 2
    again = pull(tmp_path, **lost.flags)
    assert (again.code, again.result) == (3, lost.result)


def test_a_pull_that_skips_on_and_on_ends_as_diverged(pull: "Puller", tmp_path: Path) -> None:
    """Its first update leaves nothing that is finite."""
    lost = pull(tmp_path, lr=1e30, optimizer="muon", warmup=0, tokens=512 * 60, on_divergence="skip")
    assert (lost.code, lost.result["status"]) == (3, "diverged")
    assert 12 < lost.result["stability/skipped_updates"] < 40
    assert checkpoint.folders(lost.folder), "a checkpoint from before it"


def test_a_verdict_at_the_end_of_the_budget_goes_back_too(pull: "Puller", sound: "Pull", tmp_path: Path) -> None:
    """The learning rate leaps where no patience is left."""
    mended = pull(tmp_path, **{**LONG, "fault": "lr*400@80-86", "on_divergence": "rewind"})
    assert (mended.code, mended.result["status"], mended.result["stability/retries"]) == (0, "spiked", 1)
    assert mended.result["val/bpb"] == pytest.approx(sound.result["val/bpb"], rel=0.01)
    assert state(mended)["recovery"]["reached"] == 90


def test_a_divergence_that_is_ignored_is_not_forgotten_by_a_resume(pull: "Puller", tmp_path: Path) -> None:
    """Killed after the verdict, it ends with the same one."""
    flags = {"lr": 10, "optimizer": "muon", "tokens": 512 * 40, "on_divergence": "ignore"}
    lost = pull(tmp_path, offline=True, **flags)
    told = run_of(lost).summary
    assert (lost.code, lost.result["status"]) == (3, "diverged") and told["diverged_at_tokens"] < 30 * 512
    shutil.rmtree(lost.checkpoint)
    (lost.folder / "result.json").unlink()
    again = pull(tmp_path, offline=True, **flags)
    assert (again.code, again.result["val/bpb"]) == (3, lost.result["val/bpb"])
    summary = run_of(again).summary
    assert [summary[key] for key in ("diverged_at_tokens", "verdict")] == [
        told[key] for key in ("diverged_at_tokens", "verdict")
    ]
