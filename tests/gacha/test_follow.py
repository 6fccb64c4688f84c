"""Runs followed while their files grow: every byte read once, torn tails waited for, resumed runs as one."""

import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gacha import follow, fragments, leveldb, runs


@pytest.fixture(scope="module")
def logs(machine: Path) -> dict[str, list[Path]]:
    """The machine's files by the name of their run, in start order."""
    return {run.name: run.paths for run in runs.read(machine)}


def folder_of(place: Path, run_id: str, stamp: str = "20260101_000000", kind: str = "offline-run") -> Path:
    """Where wandb would put a run's file."""
    path = place / f"{kind}-{stamp}-{run_id}" / f"run-{run_id}.wandb"
    path.parent.mkdir(parents=True)
    return path


def test_a_growing_file_is_read_once_and_to_its_end(
    logs: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Appended in pieces that cut records, chunks and blocks anywhere; no byte is decoded twice."""
    data = logs["3f9c1a7e-s0"][0].read_bytes()
    whole = runs.read(logs["3f9c1a7e-s0"][0])[0].history["train/loss"]
    seen, parse = [], fragments.parse

    def counting(payload: bytes) -> Any:
        seen.append(payload)
        return parse(payload)

    monkeypatch.setattr(fragments, "parse", counting)
    path = folder_of(tmp_path, "abc")
    followed = follow.Follower(tmp_path, "train/loss")
    told: list[list[float]] = []
    with path.open("ab") as file:
        for at in range(0, len(data), 997):
            file.write(data[at : at + 997])
            file.flush()
            told.append(followed.history("abc"))
    assert told[-1] == whole.value.tolist() and followed.step("abc") == whole.step[-1]
    assert all(a == b[: len(a)] for a, b in pairwise(told)) and len({len(a) for a in told}) > 20
    assert len(seen) == sum(payload is not None for payload in leveldb.split(data[7:], 7)[0])


def test_a_damaged_block_is_passed_over(logs: dict[str, list[Path]], tmp_path: Path) -> None:
    data = bytearray(logs["3f9c1a7e-s0"][0].read_bytes())
    assert len(data) > 40_000
    data[9_000:9_100] = os.urandom(100)
    path = folder_of(tmp_path, "abc")
    followed = follow.Follower(tmp_path, "train/loss")
    for size in range(8_000, len(data) + 1000, 1000):
        path.write_bytes(data[:size])
        followed.history("abc")
    (run,) = runs.read(path)
    assert followed.history("abc") == run.history["train/loss"].value.tolist() and run.damaged == 1


def test_a_resumed_run_goes_on_where_its_newest_fragment_begins(logs: dict[str, list[Path]], tmp_path: Path) -> None:
    """The second fragment repeats steps 31-36, and one of them comes from an online run."""
    first, second = logs["3f9c1a7e-s3"]
    followed = follow.Follower(tmp_path, "train/loss")
    assert followed.history("abc") == [] and followed.step("abc") is None and not followed.preempting("abc")
    folder_of(tmp_path, "abc", "20260101_000000").write_bytes(first.read_bytes())
    assert followed.step("abc") == 36
    later = folder_of(tmp_path, "abc", "20260102_000000", "run")
    assert followed.step("abc") == 36, "a fragment without a row has no step yet"
    later.write_bytes(second.read_bytes())
    merged = {run.name: run for run in runs.read(first.parents[1])}["3f9c1a7e-s3"].history["train/loss"]
    assert followed.history("abc") == merged.value.tolist() and followed.step("abc") == 60


def test_preempting_is_asked_of_the_newest_fragment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mark_preempting` in the run that wandb writes; no more once the run was started again."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    import wandb

    settings = wandb.Settings(console="off", x_disable_stats=True, silent=True)
    followed = follow.Follower(tmp_path / "wandb")
    with wandb.init(mode="offline", dir=str(tmp_path), project="p", id="abc", settings=settings) as run:
        run.log({"x": 1}, step=7)
        run.mark_preempting()
    wandb.teardown()
    assert followed.preempting("abc") and followed.step("abc") == 7 and followed.history("abc") == []
    folder_of(tmp_path / "wandb", "abc", "20990101_000000").write_bytes(leveldb.MAGIC)
    assert not followed.preempting("abc") and followed.step("abc") == 7


def test_polling_many_runs_lists_the_folder_once(
    logs: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 live runs among 1,000 folders: one listing for a poll of all, and none while nothing new begins."""
    data = logs["3f9c1a7e-s0"][0].read_bytes()
    for number in range(1000):
        path = folder_of(tmp_path, f"r{number}")
        if number < 100:
            path.write_bytes(data[:4000])
    os.utime(tmp_path, (time.time() - 60, time.time() - 60))
    listings, scandir = [], os.scandir

    def counting(place: Path) -> Any:
        listings.append(place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", counting)
    followed = follow.Follower(tmp_path, "train/loss")
    for _ in range(3):
        assert all(followed.step(f"r{number}") for number in range(100))
    assert len(listings) == 1
    folder_of(tmp_path, "new").write_bytes(data)
    assert followed.step("new") == 60 and len(listings) == 2
