"""The reader of offline runs, on files that wandb wrote: whole, cut, killed, damaged, resumed."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from wandb.proto.wandb_internal_pb2 import Record, RunExitRecord  # type: ignore[attr-defined]

import console
from gacha import fragments, leveldb, records, runs


@pytest.fixture(scope="module")
def read(machine: Path) -> dict[str, runs.Run]:
    """The runs of the machine by `recipe-sSEED` name."""
    return {run.name: run for run in runs.read(machine)}


def log_of(run: runs.Run, folder: Path) -> Path:
    """A private copy of the run's last log."""
    return Path(shutil.copy(run.paths[-1], folder))


def test_agrees_with_wandb_leet_inspect(read: dict[str, runs.Run]) -> None:
    """Rows, config, summary, state: the same as wandb's own reader says, for a healthy and a NaN pull."""
    for name in ("3f9c1a7e-s0", "b44e0d21-s0"):
        run = read[name]
        wandb = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
        lines = subprocess.run([*wandb, str(run.paths[0])], capture_output=True, text=True, check=True).stdout
        records = map(json.loads, lines.splitlines())
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        summary = subprocess.run([*wandb, "--summary", str(run.paths[0])], capture_output=True, text=True, check=True)
        told = json.loads(summary.stdout)
        for metric in ("train/loss", "val/bpb", "stability/grad_norm", "_timestamp"):
            theirs = [(row["_step"], row["tokens"], float(row[metric])) for row in rows if metric in row]
            np.testing.assert_array_equal(np.array(theirs).T, np.array(run.history[metric]))
        assert len(run.history["train/loss"].step) > 5
        assert told["config"] == {key: value for key, value in run.config.items() if value != {}}
        flat = dict(fragments.leaves(told["summary"]))
        assert {key for key in flat if not key.startswith("_wandb")} <= run.summary.keys()
        for key in ("status", "val/loss.min", "cost/money", "tokens", "train/loss"):
            assert str(flat[key]).lower() == str(run.summary[key]).lower()
        assert (told["run_id"], told["project"], told["exit_code"]) == (run.id, run.project, run.exit_code)


def test_metrics_lie_on_tokens(read: dict[str, runs.Run]) -> None:
    curve = read["3f9c1a7e-s1"].history["val/bpb"]
    assert curve.step.tolist() == list(range(3, 61, 3))
    assert curve.tokens[-1] == 4_000_000 and np.all(np.diff(curve.tokens) > 0)
    assert read["3f9c1a7e-s1"].summary["val/loss.min"] == read["3f9c1a7e-s1"].history["val/loss"].value.min()


def test_status_of_each_pull(read: dict[str, runs.Run]) -> None:
    assert {name: (run.state, run.status, run.exit_code) for name, run in read.items()} == {
        "3f9c1a7e-s0": ("finished", "ok", 0),
        "3f9c1a7e-s1": ("finished", "ok", 0),
        "3f9c1a7e-s2": ("finished", "ok", 0),
        "3f9c1a7e-s3": ("finished", "ok", 0),
        "3f9c1a7e-s4": ("crashed", "crashed", None),
        "b44e0d21-s0": ("finished", "diverged", 3),
    }


def test_nan_losses_come_back_as_nan(read: dict[str, runs.Run]) -> None:
    loss = read["b44e0d21-s0"].history["train/loss"].value
    assert math.isnan(loss[-1]) and np.isfinite(loss[:-1]).all()


def test_killed_pull_keeps_what_was_flushed(read: dict[str, runs.Run]) -> None:
    """42 steps were logged before SIGKILL; wandb holds the last one back until the next begins."""
    assert read["3f9c1a7e-s4"].history["train/loss"].step.tolist() == list(range(1, 42))


def test_silence_tells_killed_from_running(read: dict[str, runs.Run]) -> None:
    path = read["3f9c1a7e-s4"].paths[0]
    told = [runs.read(path, now=path.stat().st_mtime + later)[0].status for later in (5, 100)]
    assert told == ["running", "crashed"]


def test_exit_record_that_no_process_asked_for_is_no_success(read: dict[str, runs.Run], tmp_path: Path) -> None:
    """A wandb-core shared with a living parent closes a SIGKILLed child's log with exit code 0 and no mailbox."""
    path = log_of(read["3f9c1a7e-s4"], tmp_path)
    exit_record = Record(num=999, exit=RunExitRecord(exit_code=0, runtime=1)).SerializeToString()
    chunk = struct.pack("<IHB", zlib.crc32(b"\x01" + exit_record), len(exit_record), 1) + exit_record
    path.write_bytes(path.read_bytes() + chunk)
    (run,) = runs.read(path, now=path.stat().st_mtime + 5)
    assert (run.state, run.status, run.exit_code) == ("crashed", "crashed", None)


def test_fragments_merge_and_the_later_one_wins(read: dict[str, runs.Run], tmp_path: Path) -> None:
    """Fragment one logged steps 1-36, fragment two 31-60; also with the files met in the other order."""
    run = read["3f9c1a7e-s3"]
    assert len(run.paths) == 2
    assert run.history["train/loss"].step.tolist() == list(range(1, 61))
    first, second = (runs.read(path)[0] for path in run.paths)
    assert first.history["_timestamp"].step[-1] == 36
    assert run.history["_timestamp"].value[30] == second.history["_timestamp"].value[0]
    assert run.summary["val/loss.min"] == run.history["val/loss"].value.min()
    for name, path in zip(("run-b.wandb", "run-a.wandb", "run-c.wandb"), [*run.paths, run.paths[0]], strict=True):
        shutil.copy(path, tmp_path / name)
    (again,) = runs.read(tmp_path)
    assert len(again.paths) == 2
    np.testing.assert_array_equal(np.array(again.history["train/loss"]), np.array(run.history["train/loss"]))


def test_survives_a_cut_at_every_byte_of_the_tail(read: dict[str, runs.Run], tmp_path: Path) -> None:
    """What is readable of a cut file is a prefix of the whole, it grows with the file, and no cut looks like damage."""
    whole = read["3f9c1a7e-s2"]
    path = log_of(whole, tmp_path)
    data, kept = path.read_bytes(), []
    for size in range(len(data) - 600, len(data)):
        path.write_bytes(data[:size])
        part = fragments.read_fragment(path)
        assert part.damaged == 0
        kept.append(len(part.steps))
        loss = runs.merge([part], time.time()).history["train/loss"].value
        np.testing.assert_array_equal(loss, whole.history["train/loss"].value[: len(loss)])
    assert kept == sorted(kept) and kept[-1] == 60


def test_a_header_alone_or_a_foreign_file_is_named_and_skipped(
    machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = runs.read(machine)[0]
    data = good.paths[0].read_bytes()
    for name, bad in {"header": data[:7], "empty": b"", "text": b"hello" * 9, "next": data[:6] + b"\x01"}.items():
        (tmp_path / f"run-{name}.wandb").write_bytes(bad)
    with pytest.raises(console.UserError, match="no W&B runs"):
        runs.read(tmp_path)
    (tmp_path / "run-good.wandb").write_bytes(data)
    capsys.readouterr()
    assert [run.id for run in runs.read(tmp_path)] == [good.id]
    warned = capsys.readouterr().err
    assert all(f"run-{name}.wandb" in warned for name in ("header", "empty", "text", "next")) and "good" not in warned


def test_garbage_in_the_middle_costs_one_block(read: dict[str, runs.Run], tmp_path: Path) -> None:
    """Reading goes on at the next 32 KiB block; rows after the damage are the true ones."""
    whole = read["3f9c1a7e-s0"]
    path = log_of(whole, tmp_path)
    data = bytearray(path.read_bytes())
    assert len(data) > 40_000
    data[9_000:9_100] = os.urandom(100)
    path.write_bytes(data)
    run = runs.read(path)[0]
    true = dict(zip(whole.history["train/loss"].step.tolist(), whole.history["train/loss"].value, strict=True))
    steps = run.history["train/loss"].step.tolist()
    assert run.damaged == 1 and 10 < len(steps) < 60 and steps[0] == 1 and steps[-1] == 60
    assert all(true[step] == value for step, value in zip(*run.history["train/loss"][::2], strict=True))
    assert run.status == "ok"


def test_tables_stay_inside_the_run(read: dict[str, runs.Run]) -> None:
    rows = runs.table(read["3f9c1a7e-s0"].tables["samples"])
    assert [row["prompt"] for row in rows] == ["いつも", "議事録"] and "納期" in rows[0]["text"]
    part = fragments.Fragment(read["3f9c1a7e-s0"].paths[0])
    fragments.keep_table(part, "x", "../../../../etc/passwd")
    assert part.tables == {}


def test_bulk_decoding_says_what_protobuf_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of numbers, of text, of media and of keys as long as the bytes that mark an item, from wandb and by hand."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    import wandb

    settings = wandb.Settings(console="off", x_disable_stats=True, silent=True)
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=settings)
    run.define_metric("val/loss", summary="min,max,mean")
    for step in range(60):
        row = {"nan": math.nan if step % 3 else 1.5, "inf": -math.inf, "nest": {"a": step, "b": {"c": step * 2.0}}}
        row |= {"y" * 100: -step, "いつも": 1e-300 * step, "big": 10**30 + step, "d.o.t": 2**53 + step}
        row |= {"mixed": "a" if step == 35 else step, "val/loss": 1 / (step + 1)}
        if step % 5 == 0:
            row |= {
                "flag": step % 2 == 0,
                "none": None,
                "text": 'a "b" \x01 いつも',
                "x" * 130: step,
                "long": "z" * 130,
                "list": [1, 2],
            }
            row |= {"deep": {"table": wandb.Table(columns=["a"], data=[[step]])}, "hist": wandb.Histogram([1, 2])}
        run.log(row, step=step)
        if step == 20:
            run.summary.update({"only": "x", "gone": 1, "nested": {"q": {"r": 1}}})
        if step == 40:
            del run.summary["gone"]
    run.finish()
    wandb.teardown()
    (path,) = runs.log_files(tmp_path)
    with path.open("ab") as file:  # a row whose step stands in its own field only, and one without a value
        for number, item in ((1000, {"key": "by hand", "value_json": "2.5"}), (1001, {"key": "by hand"})):
            record = Record(num=number, history={"item": [item], "step": {"num": number}}).SerializeToString()
            file.write(struct.pack("<IHB", zlib.crc32(b"\x01" + record), len(record), 1) + record)

    plain: dict[str, list[tuple[int, str]]] = {}
    summary: dict[str, str] = {}
    bulk = records.decode([payload for payload in leveldb.split(path.read_bytes()[7:], 7)[0] if payload])
    for payload in leveldb.split(path.read_bytes()[7:], 7)[0]:
        assert payload is not None
        record = Record.FromString(payload)
        said: dict[str, str] = {".".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        for key, text in said.items():
            plain.setdefault(key, []).append((int(said.get("_step", record.history.step.num)), text))
        summary |= {".".join(item.nested_key) or item.key: item.value_json for item in record.summary.update}
        for item in record.summary.remove:
            del summary[".".join(item.nested_key) or item.key]
    (run_read,) = runs.read(path)
    assert 20 < len(bulk.records) < 60 and {"x" * 130, "いつも", "nest.b.c", "nan"} <= run_read.history.keys()
    for key, cells in plain.items():
        parsed = [json.loads(text or "null") for _, text in cells]
        if key == "_step" or not all(isinstance(value, int | float) for value in parsed):
            assert key not in run_read.history
            continue
        np.testing.assert_array_equal(run_read.history[key].step, [step for step, _ in cells])
        np.testing.assert_array_equal(run_read.history[key].value, np.array(parsed, float))
    told = dict(fragments.leaves({key: json.loads(text) for key, text in summary.items()}))
    assert told.keys() == run_read.summary.keys() and repr(sorted(told.items())) == repr(
        sorted(run_read.summary.items())
    )
    assert "gone" not in told and told["nested.q.r"] == 1 and run_read.tables.keys() == {"deep.table"}


def test_logs_longer_than_a_piece_and_workers_change_nothing(
    read: dict[str, runs.Run], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces smaller than a record, and a process a core, give the runs that one piece and one process give."""
    monkeypatch.setattr(fragments, "PIECE", 512)
    monkeypatch.setattr(runs, "WORTH_FORKING", 1)
    again = {run.name: run for run in runs.read(machine)}
    assert list(again) == list(read)
    for name, run in read.items():
        assert again[name].history.keys() == run.history.keys() and again[name].summary == run.summary
        for key, series in run.history.items():
            np.testing.assert_array_equal(np.array(again[name].history[key]), np.array(series))


def test_a_missing_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(console.UserError, match="no such folder"):
        runs.read(tmp_path / "nowhere")
