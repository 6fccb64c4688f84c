"""Runs that are ended from outside: by preemption, after which they go on, and by early termination, which is final."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gacha import agent, ledger, runs, worker

ROOT = Path(__file__).resolve().parents[2]

# Writes what W&B would record of a run, as `logged` says, by W&B's own records; then does what ./mood says.
CHILD = """
import json, os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
import wandb
settings = wandb.Settings(x_transaction_log_flush_interval=1, x_disable_stats=True, console="off", silent=True)
run = wandb.init(settings=settings)
def leave(*_):
    run.mark_preempting()
    run.finish(exit_code=143)
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
started = len(list(pathlib.Path().glob("started-*")))
pathlib.Path(f"started-{{started}}").touch()
for step in range(run.config["rows"]):
    run.log({{"loss": run.config["loss"]}}, step=10 * started + step if run.config["moves"] else step)
if run.config["loss"] > 1:
    time.sleep(60)
if run.config["preempted"]:
    leave()
run.finish()
"""


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, where runs are recorded offline."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "OMP_", "CUDA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "LOOK_SECONDS", 0.1)
    Path("child.py").write_text(CHILD.format(root=str(ROOT)))
    return tmp_path


def write(parameters: dict[str, Any], **more: Any) -> str:
    """sweep.yaml: a grid over `parameters`; a list stands for values."""
    spelled = {name: {"values" if isinstance(v, list) else "value": v} for name, v in parameters.items()}
    told = {"program": "child.py", "method": "grid", "parameters": spelled, "command": ["${interpreter}", "${program}"]}
    Path("sweep.yaml").write_text(yaml.safe_dump(told | more))
    return "sweep.yaml"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, --json result and progress of `gacha run`."""
    code = agent.main([*argv, "--json"])
    out, progress = capsys.readouterr()
    return code, json.loads(out), progress


def journal(event: str) -> list[dict[str, Any]]:
    """Events of one kind."""
    rows = [json.loads(line) for line in next(Path("wandb").glob("*/state.jsonl")).read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def wait_for(true: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def test_preempted_pull_of_train_py_goes_on(room: Path, tiny_flags: dict[str, Any]) -> None:
    """SIGTERM from outside in the middle of a pull: it saves, and the agent runs it again to its end, under its id."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in tiny_flags.items()}
    flags |= {"tokens": 512 * 80, "val_every": 80, "out": str(room / "out")}
    command = ["${interpreter}", "${program}", "pretrain", "${args}"]
    file = write({**flags, "seed": 0}, program=str(ROOT / "train.py"), command=command)
    words = [sys.executable, "-m", "gacha", "run", file, "--json", "--pack", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    served = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list((room / "out").rglob("step-0000001*")))
    os.kill(journal("started")[0]["pid"], signal.SIGTERM)
    out, progress = served.communicate(timeout=100)
    result = json.loads(out)
    assert served.returncode == 0 and result["counts"]["finished"] == 1, progress
    (first,) = (row["run_id"] for row in result["runs"])
    assert [event["run_id"] for event in journal("started")] == [first, first]
    (preempted,) = [event for event in journal("ended") if event["status"] == "interrupted"]
    assert preempted["returncode"] == 143 and preempted["step"] >= 10 and preempted["again"]
    assert "preempted: to be run again" in progress
    read = {found.id: found for found in runs.read(room / "wandb")}
    assert read[first].status == "ok" and len(read[first].paths) == 2
    assert "resuming" in Path(result["folder"], f"{first}.log").read_text()


def test_preempted_run_goes_on_behind_what_waits_and_not_for_ever(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt makes three steps, and each after it repeats them: the next agent may try again."""
    monkeypatch.setattr(ledger, "IDLE_ATTEMPTS", 2)
    file = write({"loss": 0.5, "rows": 3, "moves": False, "preempted": [True, False]})
    code, result, progress = run(capsys, file)
    stuck, other = (row["run_id"] for row in result["runs"])
    ends = [event for event in journal("ended") if event["run_id"] == stuck]
    assert [event["run_id"] for event in journal("started")] == [stuck, other, stuck, stuck]
    assert code == 1 and result["counts"]["interrupted"] == 1 and "1 to go" in progress
    assert [(end["step"], end["again"]) for end in ends] == [(2, True), (2, True), (2, False)]


def test_early_termination_is_final(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst of four by its third value is asked to end; stopped is neither failed nor to go on."""
    monkeypatch.setattr(worker, "JUDGE_SECONDS", 0.3)
    early = {"early_terminate": {"type": "hyperband", "min_iter": 3, "eta": 2}, "metric": {"name": "loss"}}
    file = write({"loss": [0.1, 0.2, 9.0], "rows": 4, "moves": False, "preempted": False}, **early)
    code, result, progress = run(capsys, file)
    assert code == 0 and [row["status"] for row in result["runs"]] == ["finished", "finished", "stopped"]
    assert result["runs"][2]["returncode"] == 143 and "stopping  early_terminate" in progress
    assert len(journal("stopping")) == 1
    assert run(capsys, file)[0] == 0 and len(journal("started")) == 3
