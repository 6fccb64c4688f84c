"""The online roads with W&B's own programs, against tests/wandb_double.py: the same sweep by `wandb agent` and by
`gacha run`, runs synced into a sweep, a run stopped by hyperband, a project read back whole.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from console import UserError
from gacha import online, report, report_run, runs, workspace
from tests import wandb_double
from tests.wandb_double import ENTITY, Row, Server

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# The real agent, asking every 0.2 s instead of every 5.
AGENT = "from wandb import wandb_agent; wandb_agent.Agent.POLL_INTERVAL = 0.2; from wandb.cli.cli import cli; cli()"
# Logs as any W&B program does, and writes down what it was given.
CHILD = """
import json, os, sys, wandb
run = wandb.init(config={"model": {"act": "gelu", "width": 1}})
with open("seen.jsonl", "a") as file:
    file.write(json.dumps({"argv": sys.argv, "run": run.id, "config": dict(run.config)}) + "\\n")
run.define_metric("tokens")
run.define_metric("*", step_metric="tokens")
run.define_metric("val/loss", step_metric="tokens", summary="min")
for step in range(1, 6):
    odd = {"stability/loss_z": [float("nan"), float("inf"), -1.0][step % 3]} if step % 2 else {}
    run.log({"val/loss": 6.0 / step + run.config["seed"], "tokens": 100 * step, **odd}, step=step)
run.summary["status"] = "ok"
"""
SWEEP: dict[str, Any] = {
    "program": "child.py",
    "method": "grid",
    "project": "toy",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "parameters": {
        "seed": {"values": [0, 1]},
        "model": {"parameters": {"width": {"values": [64, 128]}, "tied": {"value": True}}},
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with wandb_double.serving() as running:
        yield running
        assert not running.unknown


@pytest.fixture
def reading(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as a user of the server: wandb reads its environment once."""
    import wandb

    for key, value in server.environment(home).items():
        monkeypatch.setenv(key, value)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where a child keeps what it keeps."""
    return tmp_path / "home"


def environment(server: Server, home: Path, **more: str) -> dict[str, str]:
    """The caller's environment without its W&B and proxies, and with the double's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    kept = {key: value for key, value in kept.items() if "proxy" not in key.lower()}
    return kept | server.environment(home) | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | more


def call(*argv: str, env: dict[str, str], cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    done = subprocess.run(argv, env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def create(definition: dict[str, Any], server: Server, home: Path, cwd: Path) -> str:
    """`wandb sweep`; the id that the server gave it."""
    before = set(server.sweeps)
    (cwd / "sweep.yaml").write_text(yaml.safe_dump(definition))
    call("wandb", "sweep", "sweep.yaml", env=environment(server, home), cwd=cwd)
    (made,) = set(server.sweeps) - before
    return made


def offline(server: Server, home: Path, cwd: Path) -> dict[str, str]:
    """The environment in which nothing may reach the server: it has neither its key nor its address."""
    env = environment(server, home, WANDB_DIR=str(cwd), PYTHONPATH=str(ROOT))
    return {key: value for key, value in env.items() if key not in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE")}


def seen(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("reading")
def test_both_roads_give_the_same_runs(server: Server, home: Path, tmp_path: Path) -> None:
    """The same four-run file through `wandb agent` and through `gacha run`, then `wandb sync` of the latter."""
    by_wandb, by_gacha = tmp_path / "agent", tmp_path / "gacha"
    for folder in (by_wandb, by_gacha):
        folder.mkdir()
        (folder / "child.py").write_text(CHILD)
    first = create(SWEEP, server, home, by_wandb)
    call(sys.executable, "-c", AGENT, "agent", f"{ENTITY}/toy/{first}", env=environment(server, home), cwd=by_wandb)

    second = create(SWEEP, server, home, by_gacha)
    before = server.operations.copy()
    argv = (sys.executable, "-m", "gacha", "run", "sweep.yaml", "--sweep_id", second)
    call(*argv, env=offline(server, home, by_gacha), cwd=by_gacha)
    assert server.operations == before, "gacha run asked the server"

    agent, gacha = seen(by_wandb), seen(by_gacha)
    assert len(agent) == 4
    assert [child["argv"] for child in gacha] == [child["argv"] for child in agent]
    assert [child["config"] for child in gacha] == [child["config"] for child in agent]
    assert agent[1]["argv"] == ["child.py", "--seed=1", "--model={'tied': True, 'width': 64}"]
    assert agent[1]["config"] == {"seed": 1, "model": {"act": "gelu", "tied": True, "width": 64}}
    assert [server.runs[child["run"]].params for child in agent] == [child["config"] for child in agent]
    read = {run.id: run for run in runs.read(by_gacha)}
    assert [read[child["run"]].config for child in gacha] == [child["config"] for child in gacha]
    assert {run.sweep_id for run in read.values()} == {second}

    call("wandb", "sync", "--yes", str(by_gacha / "wandb"), env=environment(server, home), cwd=by_gacha)
    synced = [row for row in server.runs.values() if row.sweep == second]
    assert sorted(row.id for row in synced) == sorted(read)
    assert all(row.state == "finished" and row.project == "toy" for row in synced)
    assert {row.id: row.params for row in synced} == {run.id: run.config for run in read.values()}
    losses = [[line["val/loss"] for line in server.runs[child["run"]].history] for child in agent + gacha]
    assert losses[:4] == losses[4:]

    import wandb

    there = wandb.Api().sweep(f"{ENTITY}/toy/{second}")
    assert there.config == SWEEP and {run.id for run in there.runs} == set(read)
    for run in online.read(f"{ENTITY}/toy/{second}"):
        assert run.config == read[run.id].config and same_history(run, read[run.id])


@pytest.mark.usefixtures("reading")
def test_train_py_under_the_real_agent_and_stopped_by_hyperband(
    server: Server, home: Path, tmp_path: Path, tiny_flags: dict[str, Any]
) -> None:
    """Of two pulls one ends; the long one is stopped when two of another agent's runs turn out better."""
    budgets = [tiny_flags["tokens"], 20_000_000]
    fixed = {**tiny_flags, "out": tmp_path / "runs", "val_every": 5, "checkpoint_every": 500}
    parameters = {key: {"value": str(value) if isinstance(value, Path) else value} for key, value in fixed.items()}
    definition = {
        "program": "train.py",
        "command": ["${env}", "${interpreter}", "${program}", "pretrain", "${args}"],
        "method": "grid",
        "project": "pulls",
        "metric": {"name": "val/bpb", "goal": "minimize"},
        "early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2},
        "parameters": parameters | {"tokens": {"values": budgets}},
    }
    sweep = create(definition, server, home, tmp_path)
    argv = [sys.executable, "-c", AGENT, "agent", f"{ENTITY}/pulls/{sweep}"]
    env = environment(server, home, OMP_NUM_THREADS="1")
    with subprocess.Popen(
        argv, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as agent:
        try:
            until = time.monotonic() + 90
            rows: list[Row] = []
            while len(rows) < 2 and time.monotonic() < until:
                rows = [row for row in list(server.runs.values()) if row.sweep == sweep]
                time.sleep(0.05)
            for name in ("better1", "better2"):
                history = [{"_step": step, "val/bpb": 0.5 / step} for step in range(1, 4000)]
                server.runs[name] = Row(
                    name, "pulls", sweep=sweep, config=rows[0].config, history=history, state="finished"
                )
            said, _ = agent.communicate(timeout=90)
        finally:
            agent.kill()
    ended, stopped = rows
    assert agent.returncode == 0, said
    assert (ended.state, ended.exit_code, ended.summary["status"]) == ("finished", 0, "ok"), said
    assert (stopped.state, stopped.exit_code, stopped.summary["status"]) == ("failed", 143, "stopped"), said
    assert stopped.summary["tokens"] < budgets[1]
    assert list((tmp_path / "runs").rglob("step-*")), "nothing was saved"
    assert [row.params["tokens"] for row in rows] == budgets and stopped.job_type == "pretrain"
    # The definition gives the flags, W&B's parameter file the config: both say the same, so the recipe is one.
    assert ended.group == ended.params["recipe"] and ended.params["d_model"] == tiny_flags["d_model"]
    assert [line["tokens"] for line in ended.history] == sorted(line["tokens"] for line in ended.history)

    read = {run.id: run for run in online.read(f"{ENTITY}/pulls/{sweep}")}
    assert (read[stopped.id].status, read[ended.id].status) == ("stopped", "ok")
    assert read[ended.id].history["val/bpb"].value[-1] == ended.summary["val/bpb"]


def same_history(one: runs.Run, other: runs.Run) -> bool:
    """Whether both runs have the same metrics with the same steps, tokens and values; sizes of tables are none."""
    keys = {key for key in one.history if not key.startswith("samples.")}
    return keys == {key for key in other.history if not key.startswith("samples.")} and all(
        np.array_equal(mine, theirs, equal_nan=True)
        for key in keys
        for mine, theirs in zip(one.history[key], other.history[key], strict=True)
    )


@pytest.mark.usefixtures("reading")
def test_a_project_is_read_as_its_files_are(server: Server, home: Path, tmp_path: Path, machine: Path) -> None:
    """Pulls of every fate, synced by `wandb sync`, come back from the server as they come from the disk."""
    shutil.copytree(machine / "wandb", tmp_path / "wandb", symlinks=True)
    env = environment(server, home)
    subprocess.run(["wandb", "sync", "--yes", "wandb"], env=env, cwd=tmp_path, capture_output=True, timeout=120)
    local = {run.id: run for run in runs.read(tmp_path / "wandb")}
    found = online.read(f"{ENTITY}/quickstart")
    assert {run.id for run in found} == set(local)
    assert [run.started for run in found] == sorted(run.started for run in found)
    for run in found:
        mine = local[run.id]
        for field in ("name", "group", "job_type", "tags", "sweep_id", "project"):
            assert getattr(run, field) == getattr(mine, field)
        # W&B sends no empty dict, and counts running seconds itself.
        assert run.config == {key: value for key, value in mine.config.items() if value != {}}
        assert run.started == pytest.approx(mine.started, abs=0.5)
        if len(mine.paths) == 1:
            assert same_history(run, mine)
            known = {key: value for key, value in mine.summary.items() if not key.startswith("_wandb")}
            assert run.summary.keys() == known.keys()
            assert all(run.summary[key] == known[key] or known[key] != known[key] for key in known)
            assert run.status == mine.status
    assert sorted(run.status for run in found) == ["crashed", "diverged", "ok", "ok", "ok", "ok"]
    assert report.select(found, "", "") == found


@pytest.mark.parametrize("state", ["finished", "running"])
@pytest.mark.parametrize("stride", [1, 100])
@pytest.mark.usefixtures("reading")
def test_all_rows_are_read(server: Server, state: str, stride: int) -> None:
    """2,500 rows, from a finished run's parquet file and a running one's pages, whatever the steps between."""
    values = np.random.default_rng(0).normal(size=2500).tolist()
    values[7], values[8] = math.nan, math.inf
    rows = [{"_step": stride * i, "tokens": 10 * i, "val/loss": value} for i, value in enumerate(values)]
    rows[9] |= {"note": "text", "samples": {"_type": "table-file", "path": "x"}, "late": 1}
    name = f"{state}{stride}"
    server.runs[name] = Row(
        name, name, state=state, history=rows, config={"seed": {"value": 3}, "_wandb": {"value": 1}}
    )
    (run,) = online.read(f"{ENTITY}/{name}")
    assert np.array_equal(run.history["val/loss"].value, values, equal_nan=True)
    assert run.history["val/loss"].step.tolist() == [stride * i for i in range(2500)]
    assert run.history["val/loss"].tokens.tolist() == [10 * i for i in range(2500)]
    assert run.history["late"].step.tolist() == [9 * stride] and "note" not in run.history
    assert (run.config, run.status) == ({"seed": 3}, "ok" if state == "finished" else "running")
    assert server.operations["HistoryPage"] < 100, "a request for every few rows"


@pytest.mark.parametrize(
    ("state", "summary", "status"),
    [
        ("finished", {}, "ok"),
        ("finished", {"status": "spiked"}, "spiked"),
        ("failed", {}, "crashed"),
        ("failed", {"status": "diverged"}, "diverged"),
        ("crashed", {}, "crashed"),
        ("killed", {}, "stopped"),
        ("running", {"status": "stopped"}, "running"),
        ("preempted", {}, "stopped"),
    ],
)
@pytest.mark.usefixtures("reading")
def test_states_become_statuses(server: Server, state: str, summary: dict[str, Any], status: str) -> None:
    server.runs["one"] = Row("one", "states", state=state, summary=summary, config={"seed": {"value": 0}})
    assert [run.status for run in online.read(f"{ENTITY}/states")] == [status]


@pytest.mark.usefixtures("reading")
def test_what_the_server_refuses_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.runs["lone"] = Row("lone", "here")
    for path, words in (
        (f"{ENTITY}/nosuch", "no such project"),
        (f"{ENTITY}/here/nosuch", "the sweep nosuch has no runs"),
    ):
        with pytest.raises(UserError, match=words) as mistake:
            online.read(path)
        assert "\n" not in str(mistake.value) and path in str(mistake.value)

    import wandb

    monkeypatch.setattr(online, "TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        wandb.teardown()
        began = time.monotonic()
        with pytest.raises(UserError, match="no answer in time"):
            online.read(f"{ENTITY}/here")
        assert time.monotonic() - began < 15
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    wandb.teardown()
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        online.read(f"{ENTITY}/here")


PULLS = [
    {"run_id": "a", "name": "r-s0", "recipe": "r", "seed": 0, "val_bpb": 1.5, "diverged_at": math.nan, "estimated": []},
    {"run_id": "b", "name": "r-s1", "recipe": "r", "seed": "one", "val_bpb": 1.6, "diverged_at": 0.5, "estimated": []},
]
REPORT: dict[str, Any] = {
    "generated": "2026-01-01T00:00:00+00:00",
    "source": "here",
    "projects": ["toy"],
    "sweeps": [],
    "varied": ["lr"],
    "status": {"ok": 2},
    "pulls": PULLS,
    "recipes": [{"recipe": "r", "n": 2, "p_diverge": {"p": 0.5}, "best_of": {"1": {"u": 1.55}, "2": {"u": 1.5}}}],
    "best": PULLS[0],
    "duel": {"a": "r", "b": "s", "welch_p": 0.25, "pairs": [{"a": "r", "b": "s", "difference": {"value": -0.1}}]},
    "stopping": [{"recipe": "r", "frontier": [{"family": "halving", "saved": {"value": 0.5, "lo": 0.4}}]}],
    "cost": {"total": {"flops": 3.0, "money": {"JPY": 2.5}}},
}


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.usefixtures("reading")
def test_the_report_is_a_run_of_its_own(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()
    page = tmp_path / "report.html"
    page.write_text("<!doctype html><p>報告</p>", encoding="utf-8")
    said = report_run.log_report(REPORT, page, "here")
    assert said
    wandb.teardown()
    if mode == "online":
        row = server.runs[said.rpartition("/")[2]]
        assert (row.job_type, row.project, row.state) == ("report", "toy", "finished")
        assert row.summary["best/val_bpb"] == 1.5
        assert any(data == page.read_bytes() for name, data in row.files.items() if name.endswith(".html"))
        return
    (run,) = runs.read(tmp_path / "wandb")
    assert (run.job_type, run.project, run.config["source"], run.config["runs"]) == (
        "report",
        "toy",
        "here",
        ["a", "b"],
    )
    assert run.summary["pulls/ok"] == 2 and run.summary["cost/money/JPY"] == 2.5
    assert [row["seed"] for row in runs.table(run.tables["pulls"])] == ["0", "one"]
    assert [(row["recipe"], row["k"], row["u"]) for row in runs.table(run.tables["best_of"])] == [
        ("r", 1, 1.55),
        ("r", 2, 1.5),
    ]
    assert runs.table(run.tables["duels"]) == [{"a": "r", "b": "s", "difference.value": -0.1}]
    assert runs.table(run.tables["stopping"])[0]["saved.lo"] == 0.4 and run.summary["duel/welch_p"] == 0.25
    with pytest.raises(UserError, match="no pretrain runs"):
        report.select([run], "", "")


def test_a_report_that_wandb_cannot_take_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert report_run.log_report(REPORT, tmp_path / "none.html", "here") is None
    monkeypatch.setenv("WANDB_MODE", "sideways")
    assert report_run.log_report(REPORT, tmp_path / "none.html", "here") is None
    assert "sideways" in capsys.readouterr().err


@pytest.mark.usefixtures("reading")
def test_the_view_of_a_project(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `--dry_run` prints is what is saved: bands by recipe over tokens, finals against lr, one sweep's runs."""
    assert workspace.main(["me/toy", "--sweep", "abc1", "--dry_run"]) == 0
    spec = json.loads(capsys.readouterr().out)["spec"]["section"]
    panels = [panel["config"] for part in spec["panelBankConfig"]["sections"] for panel in part["panels"]]
    (bands,) = [panel for panel in panels if panel["chartTitle"] == "val/bpb" and panel.get("groupArea") == "stddev"]
    assert (bands["xAxis"], bands["groupBy"], bands["groupAgg"]) == ("tokens", "recipe.value", "mean")
    assert any(panel.get("xAxis") == "config:lr.value" and panel["xAxisLogScale"] for panel in panels)
    shown = {key for panel in panels for key in panel.get("metrics", [])}
    assert {"stability/grad_norm", "perf/mfu", "cost/money", "train/loss"} <= shown
    filters = [(part["key"]["name"], part["value"]) for part in spec["runSets"][0]["filters"]["filters"]]
    assert filters == [("jobType", "pretrain"), ("sweep", "abc1")]

    assert workspace.main([f"{ENTITY}/toy", "--sweep", "abc1"]) == 0
    assert capsys.readouterr().out.startswith(f"{server.url}/{ENTITY}/toy")
    assert json.loads(server.views[-1]["spec"])["section"]["runSets"][0]["filters"] == spec["runSets"][0]["filters"]
    assert (server.views[-1]["projectName"], server.views[-1]["displayName"]) == ("toy", "gacha abc1")
    with pytest.raises(UserError, match="ENTITY/PROJECT"):
        workspace.main(["toy"])
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(UserError, match="pip install"):
        workspace.main(["me/toy", "--dry_run"])
