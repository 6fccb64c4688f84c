"""`make bench`: ratios against peers and limits, each measured in one run, alternating. Writes bench.json.

A machine's speed drifts and its neighbours come and go, so a peer is always measured between our own rounds and the
figure to read is the median of the round-by-round ratios. ratio > 1: ours is better.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import console
from gacha import runs


def bench_reader(folder: Path) -> list[dict[str, Any]]:
    """Rows/s of gacha/runs.py against `wandb leet inspect --json` on the same offline run."""
    import wandb

    rows = 5000
    run = wandb.init(mode="offline", dir=str(folder), settings=wandb.Settings(console="off", silent=True))
    for number in range(rows):
        run.log({f"metric/{k}": number * k for k in range(8)}, step=number)
    run.finish()
    path = next(folder.glob("wandb/offline-run-*/run-*.wandb"))
    wandb_cli = str(Path(sys.executable).with_name("wandb"))
    pairs = []
    for _ in range(3):
        started = time.perf_counter()
        assert len(runs.read(folder / "wandb")[0].history["metric/1"].value) == rows
        ours = time.perf_counter() - started
        started = time.perf_counter()
        subprocess.run([wandb_cli, "leet", "inspect", "--json", str(path)], capture_output=True, check=True)
        pairs.append((rows / ours, rows / (time.perf_counter() - started)))
    first, second = zip(*pairs, strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    label = "runs.py, reading an offline run, against wandb leet inspect"
    return [entry(label, statistics.median(first), statistics.median(second), ratio, "rows/s")]


def entry(name: str, ours: float, peer: float, ratio: float, unit: str) -> dict[str, Any]:
    print(f"{name}: {ours:,.4g} against {peer:,.4g} {unit}, ratio {ratio:.3f}", file=sys.stderr, flush=True)
    return {"name": name, "ours": round(ours, 4), "peer": round(peer, 4), "ratio": round(ratio, 4), "unit": unit}


def main() -> int:
    os.environ["WANDB_MODE"] = "offline"
    with tempfile.TemporaryDirectory() as scratch:
        entries = bench_reader(Path(scratch))
    # Processes of their own: the crawl's benchmark forks, and torch is a lot to fork.
    for part in ("bench_report.py", "bench_stability.py", "bench_posttrain.py", "bench_pretrain.py", "bench_crawl.py"):
        done = subprocess.run([sys.executable, part, "--json"], stdout=subprocess.PIPE, check=True)
        entries += json.loads(done.stdout)
    Path("bench.json").write_text(json.dumps(entries, indent=1) + "\n")
    width = max(len(e["name"]) for e in entries)
    print(f"{'':<{width}}  {'ours':>12}  {'peer':>12}  {'ratio':>7}  unit")
    for e in entries:
        print(f"{e['name']:<{width}}  {e['ours']:>12,.2f}  {e['peer']:>12,.2f}  {e['ratio']:>7.3f}  {e['unit']}")
    return 0


if __name__ == "__main__":
    console.door(main)
