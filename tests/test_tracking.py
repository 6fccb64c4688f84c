"""W&B may neither kill nor stall what somebody pays for, nor reach for the network when it is to stay offline."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb

import console
import tracking

Spawner = Callable[..., subprocess.Popen[str]]
Descendants = Callable[[int], dict[int, str]]


def wandb_of(pid: int, descendants: Descendants) -> dict[str, int]:
    """wandb's processes by name: wandb-core, and wandb-symon where it has started."""
    return {name: number for number, name in descendants(pid).items() if name.startswith("wandb")}


@pytest.fixture(scope="module")
def beheaded(
    spawn: Spawner,
    descendants: Descendants,
    as_argv: Callable[..., list[str]],
    tiny_flags: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """A pull with neither key nor WANDB_MODE whose wandb-core is killed in the middle; whom it called, by strace."""
    out = tmp_path_factory.mktemp("beheaded")
    flags = as_argv(tiny_flags, out=out, tokens=512 * 100, checkpoint_every=25, json=True)
    tracer = [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-qq",
        "-e",
        "trace=connect,sendto,sendmsg,sendmmsg",
        "-o",
        str(out / "trace"),
    ]
    traced = shutil.which("strace") and not subprocess.run([*tracer, "true"], check=False).returncode
    # A netrc, a settings file or a key of the caller would be an answer to a question that must not be asked.
    home = {name: str(out) for name in ("HOME", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")}
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            environment.delenv(name)
        child = spawn([*(tracer if traced else []), sys.executable, "train.py", "pretrain", *flags], **home)
    while not list(out.glob("*/checkpoints/step-00000025")):
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.01)
    for process in wandb_of(child.pid, descendants).values():
        os.kill(process, signal.SIGKILL)
    printed, said = child.communicate(timeout=60)
    reached = re.findall(r"sa_family=(AF_\w+).*", (out / "trace").read_text()) if traced else None
    return {"code": child.returncode, "out": out, "printed": printed, "said": said, "reached": reached}


def test_a_pull_outlives_its_wandb_core(beheaded: dict[str, Any]) -> None:
    """The budget is spent, the result is there, exit 0; what W&B lost is said once and counted."""
    result = json.loads(beheaded["printed"])
    assert (beheaded["code"], result["status"], result["tokens"]) == (0, "ok", 512 * 100)
    assert Path(result["checkpoint"]).name == "step-00000100"
    assert beheaded["said"].count("W&B stopped taking records, the run goes on") == 1
    assert re.search(r"W&B: \d+ records were lost; the run itself is complete on disk", beheaded["said"])


def test_a_dead_wandb_core_is_no_traceback(beheaded: dict[str, Any]) -> None:
    assert "Traceback" not in beheaded["said"]


def test_without_key_and_mode_a_pull_is_offline_and_says_so_once(beheaded: dict[str, Any]) -> None:
    assert beheaded["said"].count("no key and no WANDB_MODE") == 1
    assert [path.name.partition("-run-")[0] for path in beheaded["out"].glob("wandb/*-run-*")] == ["offline"]


def test_offline_no_process_reaches_for_the_network(beheaded: dict[str, Any]) -> None:
    """Neither ours nor wandb's: not even to look a name up."""
    if beheaded["reached"] is None:
        pytest.skip("needs strace, and leave to use it")
    assert "AF_UNIX" in beheaded["reached"], "the trace saw nothing"
    assert not {"AF_INET", "AF_INET6"} & set(beheaded["reached"])


STALLED = """
import sys, time, console, tracking
tracking.FINISH_SECONDS["offline"], tracking.ROWS_WAITING = 1.0, 2000
tracker = tracking.start("pretrain", {"lr": 1}, name="stalled", recipe="0" * 8, tags=[], x_axis="tokens")
tracker.log({"tokens": 0}, step=0)
print("started", flush=True)
sys.stdin.readline()
began = time.monotonic()
for step in range(1, 5000):
    tracker.log({"tokens": step, "train/loss": 1.0}, step=step)
tracker.summary({"status": "ok"})
logged = time.monotonic()
tracker.finish(3)
print(logged - began, time.monotonic() - logged, tracker.stuck, tracker.dropped, flush=True)
console.door(lambda: 3)
"""


def test_a_wandb_core_that_hangs_stalls_nothing(spawn: Spawner, descendants: Descendants, tmp_path: Path) -> None:
    """5,000 rows into a stopped process: each call returns, the end comes in its time and with its own exit code."""
    child = spawn([sys.executable, "-c", STALLED], WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert child.stdin and child.stdout and child.stdout.readline() == "started\n"
    processes = wandb_of(child.pid, descendants)
    os.kill(processes["wandb-core"], signal.SIGSTOP)
    began = time.monotonic()
    try:
        child.stdin.write("\n")
        child.stdin.flush()
        child.wait(timeout=30)
    finally:
        whole = time.monotonic() - began
        for process in processes.values():  # they hold stderr open
            os.kill(process, signal.SIGKILL)
    printed, said = child.communicate()
    logging, finishing, stuck, dropped = printed.split()
    assert float(logging) < 1.0 and float(finishing) < 2.5 and whole < 5.0
    assert (child.returncode, stuck) == (3, "True")
    assert int(dropped) > 2000 and f"{dropped} records were lost" in said and "Traceback" not in said


def test_a_misspelt_mode_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offlin")
    wandb.teardown()
    with pytest.raises(console.UserError, match="WANDB_MODE"):
        tracking.start("pretrain", {}, name="x", recipe="0" * 8, tags=[], x_axis="tokens")


def test_the_recipe_knows_values_and_not_their_order() -> None:
    """What is left out does not count, what is kept does."""
    one = tracking.recipe_hash({"lr": 0.1, "width": 3, "seed": 1}, frozenset({"seed"}))
    assert re.fullmatch("[0-9a-f]{8}", one)
    assert tracking.recipe_hash({"seed": 2, "width": 3, "lr": 0.1}, frozenset({"seed"})) == one
    assert tracking.recipe_hash({"lr": 0.2, "width": 3, "seed": 1}, frozenset({"seed"})) != one
    assert tracking.recipe_hash({"lr": 0.1, "width": 3, "seed": 1}, frozenset()) != one
