"""`python -m gacha serve` through its door: what trackio's files hold, what its server answers, how it ends."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from console import UserError
from gacha import dashboard, runs
from tests.gacha.conftest import log_pull

Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def source(machine: Path, tmp_path: Path) -> Path:
    """A copy of the machine's runs that may be written to."""
    shutil.copytree(machine / "wandb", tmp_path / "source" / "wandb", symlinks=True)
    return tmp_path / "source"


def start(spawn: Spawn, source: Path, *argv: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """The dashboard of `source`, and its address once it has told it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    child = spawn([sys.executable, "-m", "gacha", "serve", str(source), f"--port={port}", *argv], **environment)
    assert child.stdout is not None and child.stderr is not None
    told = child.stdout.readline() + child.stdout.readline()
    assert f"http://127.0.0.1:{port}/?project=" in told, told + child.stderr.read()
    return child, f"http://127.0.0.1:{port}/"


def end(child: subprocess.Popen[str]) -> None:
    """Ctrl-C."""
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=20)
    assert child.returncode == 0 and "Traceback" not in said, said


def stored(folder: Path, project: str = "quickstart") -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Rows by run id, in trackio's own file."""
    found: dict[str, list[tuple[int, dict[str, float]]]] = {}
    with sqlite3.connect(folder / f"{project}.db") as base:
        for run_id, step, row in base.execute("SELECT run_id, step, metrics FROM metrics ORDER BY step, id"):
            found.setdefault(run_id, []).append((step, json.loads(row)))
    return found


def facts(folder: Path, run_id: str, project: str = "quickstart") -> dict[str, object]:
    with sqlite3.connect(folder / f"{project}.db") as base:
        (text,) = base.execute("SELECT config FROM configs WHERE run_id = ?", (run_id,)).fetchone()
        return dict(json.loads(text))


def test_runs_are_served_and_followed(spawn: Spawn, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run with its whole history, a new one while it is served, nothing twice, and Ctrl-C ends it."""
    child, url = start(spawn, source, "--live")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as page:
        assert page.status == 200 and b"<html" in page.read()
    local = {run.id: run for run in runs.read(source)}
    rows = stored(source / "trackio")
    assert set(rows) == set(local)
    for run_id, run in local.items():
        for key in ("train/loss", "val/bpb", "tokens"):
            held = [(step, row[key]) for step, row in rows[run_id] if key in row]
            assert [step for step, _ in held] == run.history[key].step.tolist()
            assert np.array_equal([float(value) for _, value in held], run.history[key].value, equal_nan=True)
        told = facts(source / "trackio", run_id)
        assert (told["status"], told["lr"], told["_Group"]) == (run.status, run.config["lr"], run.group)
    best = min(local.values(), key=lambda run: run.summary["val/bpb"])
    assert facts(source / "trackio", best.id)["final val/bpb"] == best.summary["val/bpb"]

    monkeypatch.setenv("WANDB_MODE", "offline")
    log_pull(source, 9, id="newcomer")
    until = time.monotonic() + 20
    while "newcomer" not in (rows := stored(source / "trackio")) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(rows["newcomer"]) == 60
    end(child)

    child, _ = start(spawn, source)
    end(child)
    assert stored(source / "trackio") == rows


def test_it_listens_at_home_only_and_names_a_taken_port(spawn: Spawn, source: Path, tmp_path: Path) -> None:
    child, url = start(spawn, source, "--project=mine", f"--out={tmp_path / 'elsewhere'}")
    port = url.rstrip("/").rpartition(":")[2]
    assert len(stored(tmp_path / "elsewhere", "mine")) == 6 and not (source / "trackio").exists()
    hexed = f"{int(port):04X}"
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [part[1] for part in listening if part[3] == "0A" and part[1].endswith(f":{hexed}")] == [f"0100007F:{hexed}"]

    again = spawn([sys.executable, "-m", "gacha", "serve", str(source), f"--port={port}"])
    _, said = again.communicate(timeout=60)
    assert again.returncode == 2 and said.strip().splitlines()[-1].startswith(f"error: --port {port}: {port} is taken")
    end(child)


def test_a_changed_past_is_copied_anew(tmp_path: Path, machine: Path) -> None:
    """A run resumed from an older checkpoint has other rows from there on: the old ones do not stay beside them."""
    resumed = next(run for run in runs.read(machine) if run.id == "resumed1")
    script = (
        "import sys; from pathlib import Path; from gacha import dashboard, runs\n"
        "dashboard.load(Path(sys.argv[1]))\n"
        "for path in sys.argv[2:]: dashboard.copy(runs.read(path)[0], '')\n"
    )
    first, second = (str(path) for path in resumed.paths)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    out = tmp_path / "trackio"
    for paths, rows in (([first], 36), ([second], 30)):
        subprocess.run([sys.executable, "-c", script, str(out), *paths], env=env, check=True, timeout=60)
        assert len(stored(out)["resumed1"]) == rows
    assert facts(out, "resumed1")["status"] == "ok"


def test_mistakes_are_one_line(spawn: Spawn, tmp_path: Path) -> None:
    for argv, words in (
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path)], "no W&B runs"),
        ([str(tmp_path), "--port=70000"], "0 to 65535"),
    ):
        child = spawn([sys.executable, "-m", "gacha", "serve", *argv])
        _, said = child.communicate(timeout=60)
        assert child.returncode == 2 and words in said and len(said.splitlines()) == 1


def test_without_trackio_the_command_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="pip install"):
        dashboard.load(tmp_path)
