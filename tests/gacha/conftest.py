"""Real offline W&B runs, logged by wandb itself the way train.py logs a pull."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BUDGET = 4_000_000
SAMPLE = (
    "いつもお世話になっております。</script><script>alert(1)</script>\n営業部の佐藤です。納期についてご連絡いたします。"
)


def log_pull(
    folder: Path,
    seed: int,
    *,
    recipe: str = "3f9c1a7e",
    lr: float = 3e-3,
    steps: int = 60,
    first: int = 1,
    last: int | None = None,
    diverge_at: int | None = None,
    finish: bool = True,
    slow: float = 0.0,
    **init: Any,
) -> None:
    """One pull: `steps` optimizer steps make the budget; this fragment logs steps first..last."""
    os.environ["WANDB_DATA_DIR"] = str(folder)
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(x_transaction_log_flush_interval=1, console="off", x_disable_stats=True, silent=True)
    config = {"stage": "pretrain", "recipe": recipe, "seed": seed, "lr": lr, "width": 192, "tokens": BUDGET}
    config |= {"git_commit": "0" * 40, "hardware": "2 cores", "currency": "JPY", "lineage": {}, "out": f"out/{seed}"}
    told: dict[str, Any] = {
        "project": "quickstart",
        "group": recipe,
        "job_type": "pretrain",
        "name": f"{recipe}-s{seed}",
    }
    told |= {"config": config, "settings": settings, "dir": str(folder), "mode": "offline"}
    run = wandb.init(**told | init)
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    run.define_metric("val/loss", step_metric="tokens", summary="min")
    noise, luck = random.Random(seed), random.Random(seed).gauss(0, 0.012)
    every, tokens = max(1, steps // 20), 0
    for step in range(1, (last or steps) + 1):
        done = step / steps
        tokens = int(BUDGET * done)
        late = max(0, step - diverge_at) / steps if diverge_at else 0.0
        jitter = noise.gauss(0, 0.03)
        loss = 2.9 + luck + 6.2 * math.exp(-6 * done**0.6) + jitter + 60 * late
        grad = 0.6 + 2 * math.exp(-20 * done) + abs(jitter) * 4 + 400 * late
        if late > 0.045:
            loss = math.nan
        row = {"train/loss": loss, "tokens": tokens, "step": step, "train/lr": lr * min(1, 10 * done)}
        row |= {"stability/grad_norm": grad, "stability/loss_z": jitter / 0.03 + 2000 * late}
        row |= {"stability/max_attn_logit": 8.0, "stability/update_rms": 0.2, "perf/tokens_per_second": 4e4}
        row |= {"perf/mfu": 0.3, "perf/step_seconds": 60 / steps}
        if step % every == 0:
            row |= {"val/loss": loss - jitter + 0.05, "val/bpb": (loss - jitter + 0.05) / 2.1}
        if step >= first:
            run.log(row, step=step)
            time.sleep(slow)
        if math.isnan(loss):
            break
    if not finish:
        print("logged", flush=True)
        time.sleep(60)
    seconds = 60 * tokens / BUDGET
    run.summary.update({"tokens": tokens, "cost/flops": 6 * 1e6 * tokens, "cost/device_seconds": seconds})
    run.summary.update({"cost/money": seconds * 0.004, "baseline/kn5_bpb": 1.62})
    run.summary["status"] = "diverged" if diverge_at else "stopped" if tokens < BUDGET else "ok"
    if diverge_at:
        run.summary["diverged_at_tokens"] = tokens
    elif tokens == BUDGET:
        rows = [[steps, tokens, "いつも", SAMPLE], [steps, tokens, "議事録", "1. 次回会議は四月十日（金）です。"]]
        run.log({"samples": wandb.Table(columns=["step", "tokens", "prompt", "text"], data=rows)}, step=steps)
    run.finish(exit_code=3 if diverge_at else 143 if tokens < BUDGET else 0)


def log_killed(folder: Path, seed: int, steps: int, last: int) -> None:
    """A pull in its own process, ended by SIGKILL a moment after it logged step `last`."""
    script = (
        "import importlib.util as u, pathlib, sys; s = u.spec_from_file_location('c', sys.argv[1]); "
        "c = u.module_from_spec(s); s.loader.exec_module(c); "
        "c.log_pull(pathlib.Path(sys.argv[2]), int(sys.argv[3]), steps=int(sys.argv[4]), last=int(sys.argv[5]), "
        "finish=False)"
    )
    command = [sys.executable, "-c", script, __file__, str(folder), str(seed), str(steps), str(last)]
    alone = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}  # not this process's wandb-core
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=alone)
    assert child.stdout is not None
    while child.stdout.readline().strip() != "logged":
        assert child.poll() is None, "the child died before it had logged"
    time.sleep(1.2)  # one flush interval: what was logged before it must be on disk
    os.kill(child.pid, signal.SIGKILL)
    child.wait()


def make_machine(folder: Path, steps: int = 60) -> Path:
    """The quickstart's outcome and worse: four seeds, one of them in two fragments, one diverged, one killed."""
    for seed in range(3):
        log_pull(folder, seed, steps=steps)
    log_pull(folder, 3, steps=steps, id="resumed1", last=int(0.6 * steps))
    log_pull(folder, 0, steps=steps, recipe="b44e0d21", lr=0.3, diverge_at=int(0.14 * steps))
    log_killed(folder, 4, steps, int(0.7 * steps))
    log_pull(folder, 3, steps=steps, id="resumed1", first=int(0.5 * steps) + 1)
    import wandb

    wandb.teardown()  # it ends a run's file only after `finish` has returned
    for path in folder.rglob("*.wandb"):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    return folder


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of `make_machine`; read it, do not write to it."""
    return make_machine(tmp_path_factory.mktemp("machine"))
