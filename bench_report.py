"""`python bench_report.py`: a report of 1,000 runs of 2,000 rows each, against 30 seconds, 2 GiB and a page of 5 MB.

The runs are written here as wandb writes them, record by record, since wandb itself would take an hour: ten recipes of
a hundred seeds, of which some diverge and some are killed. The first is held against what `wandb leet inspect` reads.
"""

import json
import math
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import console
from gacha import leveldb

SECONDS, MEMORY, PAGE = 30.0, 2.0, 5.0  # limits, in seconds, GiB and MB
RECIPES = 10
VAL_EVERY = 20  # rows
BATCH = 16_384  # tokens
STARTED = 1_790_000_000
METRICS = (
    *(
        "tokens",
        "step",
        "train/loss",
        "train/lr",
        "stability/grad_norm",
        "stability/loss_z",
        "stability/max_attn_logit",
    ),
    *(
        "stability/update_rms",
        "perf/tokens_per_second",
        "perf/mfu",
        "perf/step_seconds",
        "_timestamp",
        "_runtime",
        "_step",
    ),
)
VALIDATION = ("val/loss", "val/bpb")


@dataclass(frozen=True)
class Config:
    """The report at the size of a large sweep."""

    runs: int = 1000
    rows: int = 2000
    """of each run"""
    json: bool = False
    """print the entries as one JSON list"""


# --- runs as wandb writes them --------------------------------------------------------------------------------------
def heads(key: str) -> list[bytes]:
    """What stands before a value of each length: an item's size, its key, the value's size."""
    name = b"\x12" + bytes([len(key)]) + key.encode()
    return [bytes([10, len(name) + 3 + size]) + name + b"\x82\x01" + bytes([size]) for size in range(60)]


HEADS = {key: heads(key) for key in (*METRICS, *VALIDATION)}


def varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


class Log:
    """A `.wandb` file being written: records in, framed by blocks."""

    def __init__(self) -> None:
        self.data, self.records = bytearray(leveldb.MAGIC), 0

    def write(self, message: bytes) -> None:
        """Add a Record that holds `message`, which begins with its field's tag."""
        self.records += 1
        record = b"\x08" + varint(self.records) + message
        begin = True
        while begin or record:
            left = leveldb.BLOCK - len(self.data) % leveldb.BLOCK
            if left < leveldb.HEAD:
                self.data += bytes(left)
                left = leveldb.BLOCK
            part, record = record[: left - leveldb.HEAD], record[left - leveldb.HEAD :]
            if record:
                kind = leveldb.FIRST if begin else leveldb.MIDDLE
            else:
                kind = leveldb.FULL if begin else leveldb.LAST
            self.data += struct.pack("<IHB", zlib.crc32(part, leveldb.SEEDS[kind]), len(part), kind) + part
            begin = False

    def row(self, tag: int, items: bytes) -> None:
        """Add history (tag 0x12) or a summary (0x1a)."""
        self.write(bytes([tag]) + varint(len(items)) + items)


def items(values: list[tuple[str, float]]) -> bytes:
    """Items of a history or summary record; wandb-core's are in no order either."""
    parts = []
    for key, value in values:
        text = repr(value).encode() if math.isfinite(value) else b"NaN"
        parts += [HEADS[key][len(text)], text]
    return b"".join(parts)


def curve(rng: random.Random, recipe: int, rows: int) -> tuple[list[float], list[float], int | None]:
    """Training loss and gradient norm of each row, and the row from which the run diverges."""
    luck, end = rng.gauss(0, 0.01), 2.6 + 0.02 * recipe
    lost = int(rng.uniform(0.2, 0.9) * rows) if rng.random() < 0.004 * recipe else None
    loss, norm = [], []
    for row in range(rows):
        late = row - lost if lost is not None and row >= lost else 0
        if late > rows / 20:
            loss.append(math.nan)
            norm.append(math.nan)
            break
        noise = rng.gauss(0, 0.03)
        loss.append(end + luck + 6 * (1 + 200 * row / rows) ** -0.7 + noise + late * 40 / rows)
        norm.append(0.4 * math.exp(noise * 6) + late * 0.2)
    return loss, norm, lost


def write_run(folder: Path, number: int, rows: int) -> Path:
    """A pull in a folder of its own, as `train.py pretrain` leaves one: finished, diverged, or killed half-way."""
    from google.protobuf.message import Message
    from wandb.proto import wandb_internal_pb2 as pb

    def add(field: str, message: Message, mailbox: str = "") -> None:
        control = pb.Control(mailbox_slot=mailbox) if mailbox else None  # type: ignore[attr-defined]
        log.write(pb.Record(**{field: message}, control=control).SerializeToString())  # type: ignore[attr-defined]

    rng, log = random.Random(number), Log()
    recipe, seed = number % RECIPES, number // RECIPES
    name, run_id, started = f"{recipe:x}f9c1a7e", f"bench{number:04d}", STARTED + 3600 * (number // 50)
    lr, budget = 3e-4 * 1.5**recipe, rows * BATCH
    config = {"stage": "pretrain", "recipe": name, "lr": lr, "tokens": budget, "batch_tokens": BATCH, "seq_len": 1024}
    config |= {"d_model": 512, "n_layers": 8, "optimizer": "muon", "hardware": "1 GPU", "currency": "JPY"}
    config |= {"git_commit": "0" * 40, "lineage": {"shards": "5f0c"}, "out": "runs"}
    config |= dict.fromkeys(("seed", "init_seed", "data_seed", "sample_seed"), seed)
    add("header", pb.HeaderRecord(version_info=pb.VersionInfo(producer="0.31.0", min_consumer="0.70.0")))  # type: ignore[attr-defined]
    run = pb.RunRecord(run_id=run_id, project="bench", run_group=name, job_type="pretrain")  # type: ignore[attr-defined]
    run.display_name = f"{name}-s{seed}"
    run.start_time.FromSeconds(started)
    for key, value in config.items():
        run.config.update.add(key=key, value_json=json.dumps(value))
    add("run", run, "slot")
    loss, norm, lost = curve(rng, recipe, rows)
    killed = rng.random() < 0.01
    told: dict[str, float] = {}
    lowest = math.inf
    for row in range(len(loss) // 2 if killed else len(loss)):
        clock = row * 0.5 + rng.random() * 0.01
        told = dict(zip(METRICS, (BATCH * (row + 1), row + 1, loss[row], lr, norm[row]), strict=False))
        told |= {"stability/loss_z": rng.gauss(0, 1), "stability/max_attn_logit": 8 + rng.random()}
        told |= {"stability/update_rms": 0.2 + rng.random() / 50, "perf/tokens_per_second": 3e4 + 900 * rng.random()}
        told |= {"perf/mfu": 0.4 + rng.random() / 50, "perf/step_seconds": 0.5 + rng.random() / 100}
        told |= {"_timestamp": started + clock, "_runtime": clock, "_step": row + 1}
        if (row + 1) % VAL_EVERY == 0:
            val = loss[row] + 0.05
            lowest = min(lowest, val)
            told |= {"val/loss": val, "val/bpb": val / 3}
        order = list(told.items())
        start = rng.randrange(len(order))
        text = items(order[start:] + order[:start])
        log.row(0x12, text + b"\x12" + bytes([len(varint(row + 1)) + 1, 8]) + varint(row + 1))
        log.row(0x1A, b"\n\x15\x12\x06_wandb\x12\x07runtime\x82\x01\x011")
        log.row(0x1A, text)
    status = "diverged" if lost is not None else "ok"
    summary = {
        "status": status,
        "tokens": told["tokens"],
        "val/loss": {"min": lowest if lowest < math.inf else math.nan},
    }
    summary |= {"cost/device_seconds": told["_runtime"], "cost/money": told["_runtime"] * 0.1}
    summary |= {"cost/flops": 6 * 25e6 * told["tokens"]} | ({"diverged_at_tokens": lost * BATCH} if lost else {})
    if not killed:
        record = pb.SummaryRecord()  # type: ignore[attr-defined]
        for key, value in summary.items():
            record.update.add(nested_key=[key], value_json=json.dumps(value))
        add("summary", record)
        add("exit", pb.RunExitRecord(exit_code=3 if lost is not None else 0, runtime=1), "slot")  # type: ignore[attr-defined]
    path = folder / f"offline-run-20260921_{number:06d}-{run_id}" / f"run-{run_id}.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(log.data)
    os.utime(path, (started + 3600, started + 3600))
    return path


# --- the report -----------------------------------------------------------------------------------------------------
def check(path: Path, rows: int) -> None:
    """What wandb's own reader finds in a written run. Raises RuntimeError if it is not what was meant."""
    wandb = str(Path(sys.executable).with_name("wandb"))
    told = subprocess.run([wandb, "leet", "inspect", "--json", "--summary", str(path)], capture_output=True, check=True)
    found = json.loads(told.stdout)
    expected = {"run_id": path.stem.removeprefix("run-"), "project": "bench", "exit_code": 0, "state": "finished"}
    got = {key: found.get(key) for key in expected} | {"tokens": found["summary"].get("tokens")}
    if got != expected | {"tokens": rows * BATCH}:
        raise RuntimeError(f"{path}: wandb reads {got}")


def memory_of(session: int) -> int:
    """Bytes resident in all processes of a session: the report's and those that it started."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session:
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def report(folder: Path, out: Path) -> dict[str, float]:
    """Wall and CPU seconds, bytes of memory at the peak and of the page, for `gacha report` as a process."""
    command = [sys.executable, "-m", "gacha", "report", str(folder), "--out", str(out)]
    alone = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(out.parent)}
    started, peak = time.perf_counter(), 0
    before = os.times()
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, env=alone) as child:
        while child.poll() is None:
            peak = max(peak, memory_of(child.pid))
            time.sleep(0.05)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": wall, "cpu": cpu, "memory": peak, "page": out.stat().st_size}


def measure(c: Config) -> list[dict[str, Any]]:
    """Entries of bench.json; the peer's figure is the limit, and a ratio above 1 is within it."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = [write_run(Path(scratch) / "wandb", number, c.rows) for number in range(c.runs)]
        size = sum(path.stat().st_size for path in paths)
        check(paths[0], c.rows)
        label = f"{c.runs:,} runs of {c.rows:,} rows"
        print(f"report: {label}, {size / 1e9:.2f} GB", file=sys.stderr, flush=True)
        got = report(Path(scratch) / "wandb", Path(scratch) / "report.html")
    print(f"report: {got['cpu']:.1f} seconds of CPU", file=sys.stderr, flush=True)
    return [
        entry(f"report: {label}, against the limit", got["wall"], SECONDS, "seconds"),
        entry(f"report: {label}, memory", got["memory"] / 2**30, MEMORY, "GiB"),
        entry(f"report: {label}, page", got["page"] / 1e6, PAGE, "MB"),
    ]


def entry(name: str, ours: float, limit: float, unit: str) -> dict[str, Any]:
    print(f"{name}: {ours:,.4g} against {limit:,.4g} {unit}, ratio {limit / ours:.3f}", file=sys.stderr, flush=True)
    return {"name": name, "ours": round(ours, 4), "peer": limit, "ratio": round(limit / ours, 4), "unit": unit}


def main() -> int:
    c = console.parse(Config, sys.argv[1:], "python bench_report.py")
    if c.runs < 2 * RECIPES or c.rows < 2 * VAL_EVERY:
        raise console.UserError(f"--runs {c.runs} --rows {c.rows}: give {2 * RECIPES} and {2 * VAL_EVERY} or more")
    entries = measure(c)
    if c.json:
        print(json.dumps(entries, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    console.door(main)
