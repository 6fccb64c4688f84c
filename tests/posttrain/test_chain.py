"""The office chain through its door: stopped in its first stage, gone on with, recorded; mistakes come first."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import console
from gacha import runs
from posttrain import chain

if TYPE_CHECKING:
    from tests.conftest import Pull

    Spawner = Callable[..., subprocess.Popen[str]]

SMALL = {"rows": 48, "val": 4, "test": 4, "sft_steps": 300, "grpo_steps": 2, "completions": 8, "max_new_tokens": 8}
SMALL |= {"max_chars": 420, "max_length": 640, "samples": 1, "batch_size": 2}


def test_a_stopped_chain_goes_on_and_every_stage_is_a_run(
    spawn: "Spawner", llama: "Pull", tmp_path: Path, shards_folder: Path
) -> None:
    flags = {**SMALL, "model": llama.folder.parent, "data": tmp_path / "data", "out": tmp_path / "runs", "seed": 3}
    flags |= {"stages": "sft,grpo", "base_data": shards_folder, "json": True}
    argv = [sys.executable, "train.py", "office", *(f"--{name}={value}" for name, value in flags.items())]
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    first = spawn(argv, **environment)
    assert first.stderr
    for line in first.stderr:
        if "step 0/" in line:
            break
    time.sleep(1.5)  # into the updates, which say where they are every five seconds alone
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode == 143

    saved = list((tmp_path / "runs").glob("*/checkpoints/checkpoint-*/run.json"))
    second = spawn(argv, **environment)
    out, err = second.communicate(timeout=240)
    assert second.returncode == 0, err
    assert ("goes on from step" in err) == bool(saved)
    told = json.loads(out.splitlines()[-1])
    assert set(told) == {"sft", "grpo"} and 0 <= told["grpo"]["field_accuracy"] <= 1

    found = {run.job_type: run for run in runs.read(tmp_path)}
    assert set(found) == {"sft", "grpo", "office"}
    assert found["grpo"].config["lineage"]["model_run"] == found["sft"].name
    assert found["sft"].config["seed"] == 3 and not found["sft"].config["control"]
    assert 0 < found["sft"].summary["base/bpb_before"] != found["sft"].summary["base/bpb"]
    for key in ("sft/exact_match", "sft/exact_match_gain", "grpo/field_accuracy_gain", "office/exact_match"):
        assert key in found["office"].summary, key
    # GRPO starts where SFT ended, on the same items.
    assert found["grpo"].summary["eval_before/valid"] == found["sft"].summary["eval/valid"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stages", "sft,best"], "choose of sft"),
        (["--stages", "grpo"], "name it too"),
        (["--model", "nowhere"], "no such folder"),
    ],
)
def test_mistakes(llama: "Pull", flags: list[str], said: str) -> None:
    with pytest.raises(console.UserError, match=said):
        chain.main(["--model", str(llama.folder), *flags], dry_run=True)


def test_a_folder_without_pulls_is_told(tmp_path: Path) -> None:
    with pytest.raises(console.UserError, match="no finished pull"):
        chain.main(["--model", str(tmp_path)], dry_run=True)
