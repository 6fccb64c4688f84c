"""Runs of a sweep that share a process: a stand-in for train.py that does as it is told, and train.py itself."""

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

import tracking
from console import UserError
from gacha import agent, definition, locks, pack, runs
from gacha.ledger import Pull
from pretrain import grid

ROOT = Path(__file__).resolve().parents[2]

# Honours --each as pretrain does. Seeds end in order; ./mood may say hang, crash or die, and --room how many fit.
TRAIN = """
import json, os, pathlib, signal, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[2:] if "=" in word)
each = flags.pop("each", None)
alone = {"run_id": os.environ.get("WANDB_RUN_ID"), "log": os.devnull, "sweep_params": None}
rows = [json.loads(line) for line in open(each)] if each else [alone]
pulls = [{**flags, **row} for row in rows]
with open("seen.jsonl", "a") as file:
    told = {"flags": flags, "rows": rows, "env": dict(os.environ), "pid": os.getpid(), "dry": "--dry_run" in sys.argv}
    file.write(json.dumps(told) + "\\n")
for pull in pulls:
    if float(pull["lr"]) <= 0:
        sys.exit(print(f"error: --lr {pull['lr']}: must be positive", file=sys.stderr) or 2)
if "--dry_run" in sys.argv:
    sys.exit(0)
if len(pulls) > int(flags.get("room", 100)):
    sys.exit(print(f"error: {len(pulls)} pulls do not fit into memory", file=sys.stderr) or 2)

def end(pull, code):
    if each:
        with open(each + ".ended", "a") as file:
            file.write(json.dumps({"run_id": pull["run_id"], "name": "n", "status": "s", "exit_code": code}) + "\\n")

def save(*_):
    for pull in pulls:
        end(pull, 143)
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
for pull in pulls:
    with open(pull["log"], "a") as log:
        log.write(f"step 1/2  seed {pull['seed']}\\n")
mood = pathlib.Path("mood").read_text() if pathlib.Path("mood").exists() else ""
codes = set()
while pulls:
    pull = pulls.pop(0)
    codes.add(3 if float(pull["lr"]) > 1 else 0)
    end(pull, max(codes))
    if pulls and mood == "hang":
        time.sleep(60)
    if pulls and mood == "crash":
        raise RuntimeError("a bug")
    if pulls and mood == "die":
        os.kill(os.getpid(), signal.SIGKILL)
sys.exit(min(codes))
"""
COMMAND = ["${env}", "${interpreter}", "${program}", "pretrain", "${args}"]


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the stand-in, and no W&B setting of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "CUDA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAIN)
    monkeypatch.setattr(pack, "TRAIN", tmp_path / "train.py")
    return tmp_path


def write(parameters: dict[str, Any], **more: Any) -> str:
    """sweep.yaml: a grid over `parameters`; a list stands for values."""
    spelled = {name: {"values" if isinstance(v, list) else "value": v} for name, v in parameters.items()}
    told = {
        "program": "train.py",
        "command": COMMAND,
        "method": "grid",
        "parameters": {"lr": {"value": 0.1}, **spelled},
    }
    Path("sweep.yaml").write_text(yaml.safe_dump({**told, **more}))
    return "sweep.yaml"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, --json result and progress of `gacha run`."""
    code = agent.main([*argv, "--json"])
    out, progress = capsys.readouterr()
    return code, json.loads(out), progress


def seen(dry: bool = False) -> list[dict[str, Any]]:
    """What the processes were given, in order of their starts: those of dry runs, or the others."""
    lines = Path("seen.jsonl").read_text().splitlines() if Path("seen.jsonl").exists() else []
    return [told for told in map(json.loads, lines) if told["dry"] == dry]


def spawn(*argv: str) -> subprocess.Popen[str]:
    """`python -m gacha run` with the stand-in, as a process of its own."""
    code = (
        "import pathlib, sys; from gacha import agent, pack; pack.TRAIN = pathlib.Path('train.py').resolve(); "
        "sys.exit(agent.main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, *argv, "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(true: Callable[[], object], seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def sizes(pulls: list[dict[str, Any]], jobs: int, most: int) -> list[int]:
    """How many runs each process gets."""
    made = [Pull(index, str(index), params, Path()) for index, params in enumerate(pulls)]
    return [len(one.pulls) for one in pack.plan(made, jobs, most)]


# ---- who shares a process


def test_packs_differ_in_what_pulls_of_one_process_may_differ_in() -> None:
    assert set(pack.FIELDS) == set(grid.OF_A_PULL)


def test_slots_are_filled_evenly() -> None:
    """The quickstart's five runs, more runs than a process takes, a grid of several recipes, a slot for every run."""
    seeds = [{"seed": seed} for seed in range(20)]
    assert sizes(seeds[:5], 2, 8) == [2, 3]
    assert sizes(seeds[:5], 1, 8) == [5]
    assert sizes(seeds, 2, 8) == [5, 5, 5, 5]
    assert sizes(seeds[:8], 8, 8) == [1] * 8
    assert sizes(seeds, 1, 1) == [1] * 20
    widths = [{"d_model": width, "seed": seed} for width in (1, 2, 3) for seed in range(4)]
    assert sizes(widths, 1, 8) == [4, 4, 4]
    assert sizes(widths, 2, 8) == [2] * 6
    assert sizes([{"seed": "0..3"}, {"seed": "4..7"}], 1, 8) == [1, 1]


@pytest.mark.parametrize(
    ("more", "whether"),
    [
        ({}, True),
        ({"command": ["${env}", "torchrun", "${program}", "pretrain", "${args}"]}, False),
        ({"command": ["${interpreter}", "${program}", "pretrain", "${args_json}"]}, False),
        ({"command": ["${interpreter}", "${program}", "sft", "${args}"]}, False),
        ({"command": None}, False),
        ({"program": "other.py"}, False),
    ],
)
def test_only_our_pretrain_is_packed(more: dict[str, Any], whether: bool) -> None:
    Path("other.py").touch()
    told = yaml.safe_load(Path(write({"seed": [0, 1]}, **more)).read_text())
    Path("sweep.yaml").write_text(yaml.safe_dump({name: value for name, value in told.items() if value is not None}))
    assert pack.possible(definition.read("sweep.yaml")) == whether
    assert not pack.possible(definition.read(write({"seed": [0, 1], "pulls": 4})))


def test_asking_for_what_cannot_be_packed_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"^sweep\.yaml: --pack 4: only runs of train\.py pretrain"):
        agent.main([write({"seed": [0, 1]}, command=["${interpreter}", "${program}", "${args}"]), "--pack", "4"])
    with pytest.raises(UserError, match="--pack 0: must be auto, or 1 or more"):
        agent.main([write({"seed": [0, 1]}), "--pack", "0"])


# ---- what a process is given, and what its runs keep


def test_a_pack_is_told_what_each_run_would_have_been_told(capsys: pytest.CaptureFixture[str]) -> None:
    code, result, progress = run(capsys, write({"seed": [0, 1, 2], "lr": [0.1, 3.0], "d_model": 64}, project="p"))
    (told,) = seen()
    rows, runs, folder = told["rows"], result["runs"], Path(result["folder"])
    assert code == 0 and told["flags"] == {"d_model": "64"}
    assert [(row["lr"], row["seed"], row["run_id"]) for row in rows] == [
        (run["params"]["lr"], run["params"]["seed"], run["run_id"]) for run in runs
    ]
    for row, one in zip(rows, runs, strict=True):
        wanted = {"wandb_version": 1} | {name: {"value": value} for name, value in one["params"].items()}
        assert yaml.safe_load(Path(row["sweep_params"]).read_text()) == wanted
        assert Path(row["log"]).read_text() == f"step 1/2  seed {row['seed']}\n"
    env = told["env"]
    assert (env["WANDB_SWEEP_ID"], env["WANDB_PROJECT"]) == (result["sweep_id"], "p")
    assert "WANDB_RUN_ID" not in env and "WANDB_SWEEP_PARAM_PATH" not in env
    assert [run["status"] for run in runs] == ["finished"] * 3 + ["diverged"] * 3
    assert progress.count("started") == progress.count("one of 6 in process") == 6
    events = [json.loads(line)["event"] for line in (folder / "state.jsonl").read_text().splitlines()]
    assert events == ["assigned"] * 6 + ["started"] * 6 + ["ended"] * 6
    (dry,) = seen(dry=True)
    assert {row["lr"] for row in dry["rows"]} == {0.1, 3.0} and {row["seed"] for row in dry["rows"]} == {0, 1, 2}


def test_two_slots_share_five_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """What the first slot has taken and not yet started counts when the second is filled."""
    code, _, _ = run(capsys, write({"seed": list(range(5))}), "--jobs", "2")
    assert code == 0 and sorted(len(told["rows"]) for told in seen()) == [2, 3]


def test_pack_1_is_a_process_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, result, _ = run(capsys, write({"seed": [0, 1]}), "--pack", "1")
    assert code == 0 and [told["env"]["WANDB_RUN_ID"] for told in seen()] == [run["run_id"] for run in result["runs"]]


def test_what_does_not_fit_together_is_served_in_halves(capsys: pytest.CaptureFixture[str]) -> None:
    code, result, progress = run(capsys, write({"seed": list(range(6)), "room": 2}))
    assert code == 0 and result["counts"]["finished"] == 6
    assert [len(told["rows"]) for told in seen()] == [6, 3, 1, 2, 3, 1, 2]
    assert "6 runs ended together, served in smaller parts: error: 6 pulls do not fit into memory" in progress


def test_a_point_that_train_refuses_is_named_before_anything_starts() -> None:
    with pytest.raises(UserError, match=r"^sweep\.yaml: --lr -1\.0: must be positive$"):
        agent.main([write({"seed": [0, 1], "lr": [0.1, -1.0]})])
    assert not seen()


def test_runs_that_die_with_their_process(capsys: pytest.CaptureFixture[str]) -> None:
    """The first has ended before; the crash is one failure, its words are in each log; --retry_failed packs anew."""
    Path("mood").write_text("crash")
    file = write({"seed": [0, 1, 2, 3, 4]})
    code, first, progress = run(capsys, file)
    assert code == 1 and [run["status"] for run in first["runs"]] == ["finished"] + ["failed"] * 4
    assert "the sweep stops" not in progress and progress.count("RuntimeError: a bug") == 4
    log = Path(first["folder"], first["runs"][2]["run_id"] + ".log").read_text()
    assert "its process ended with exit code 1" in log and log.endswith("RuntimeError: a bug\n")
    Path("mood").write_text("")
    code, second, _ = run(capsys, file, "--retry_failed")
    assert code == 0 and second["counts"]["finished"] == 5
    assert [row["run_id"] for row in seen()[1]["rows"]] == [run["run_id"] for run in first["runs"]][1:]


def test_what_the_system_kills_together_is_served_in_halves(capsys: pytest.CaptureFixture[str]) -> None:
    """As the kernel kills what takes all memory: the runs that had not ended go on, each under its id."""
    Path("mood").write_text("die")
    code, result, _ = run(capsys, write({"seed": [0, 1, 2, 3]}))
    assert code == 0 and result["counts"]["finished"] == 4
    ids = [row["run_id"] for row in result["runs"]]
    assert [row["run_id"] for told in seen() if len(told["rows"]) > 1 for row in told["rows"]] == ids + ids[2:]
    assert [told["env"].get("WANDB_RUN_ID") for told in seen()] == [None, ids[1], None, ids[3]]


def state() -> list[dict[str, Any]]:
    text = next(iter(Path("wandb").glob("sweep-*/state.jsonl")), Path("sweep.yaml")).read_text()
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_an_end_is_known_while_the_others_go_on_and_ctrl_c_stops_those(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mood").write_text("hang")
    file = write({"seed": [0, 1, 2]})
    process = spawn(file)
    wait_for(lambda: [event["event"] for event in state()].count("ended") == 1)
    assert state()[-1]["status"] == "finished"
    process.send_signal(signal.SIGINT)
    out, progress = process.communicate(timeout=15)
    first = json.loads(out)
    assert process.returncode == 130 and "stopping 2 run(s)" in progress and "Traceback" not in progress
    assert [(run["status"], run["returncode"]) for run in first["runs"]] == [("finished", 0)] + [
        ("interrupted", 143)
    ] * 2
    Path("mood").write_text("")
    assert run(capsys, file)[1]["counts"]["finished"] == 3


def test_killed_agents_pack_is_ended_before_its_runs_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Finished runs stay finished; the others run again, packed, under their ids, when the orphan has let go."""
    Path("mood").write_text("hang")
    file = write({"seed": [0, 1, 2]})
    process = spawn(file)
    wait_for(lambda: [event["event"] for event in state()].count("ended") == 1)
    process.kill()
    process.communicate()
    ids = [row["run_id"] for row in seen()[0]["rows"]]
    with next(Path("wandb").glob(f"sweep-*/{ids[1]}.lock")).open() as lock:
        assert not locks.locked(lock.fileno())
        Path("mood").write_text("")
        code, result, _ = run(capsys, file)
        assert code == 0 and result["counts"]["finished"] == 3 and locks.locked(lock.fileno())
    assert [row["run_id"] for row in seen()[1]["rows"]] == ids[1:]


# ---- with train.py itself


def test_pulls_of_one_process_are_runs_of_the_sweep(
    room: Path, tiny_flags: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, ids, parameters, logs and outcomes as of runs with a process each; one of them diverges."""
    monkeypatch.setattr(pack, "TRAIN", ROOT / "train.py")
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in tiny_flags.items()}
    more = {"optimizer": "muon", "qk_norm": True, "out": str(room / "out")}
    file = write({**flags, **more, "lr": [0.01, 30.0], "seed": [0, 1]}, program=str(ROOT / "train.py"), run_cap=3)
    code, result, progress = run(capsys, file)
    assert code == 0 and [row["status"] for row in result["runs"]] == ["finished", "finished", "diverged"]
    assert progress.count("one of 3 in process") == 3
    read = {found.id: found for found in runs.read(room / "wandb")}
    assert read.keys() == {row["run_id"] for row in result["runs"]}
    for row in result["runs"]:
        found = read[row["run_id"]]
        assert found.sweep_id == result["sweep_id"] and found.name.endswith(f"-s{row['params']['seed']}")
        assert {name: found.config[name] for name in ("lr", "seed")} == {
            name: row["params"][name] for name in ("lr", "seed")
        }
        assert found.status == ("diverged" if row["params"]["lr"] > 1 else "ok")
        log = Path(result["folder"], f"{row['run_id']}.log").read_text()
        assert f"W&B run {row['run_id']}" in log.splitlines()[0] and log.count("W&B run") == 1
        assert (room / "out" / result["sweep_id"] / found.name / "train.log").read_text() == log


KILLED = """
import os, sys, time, pathlib, tracking
trackers = []
for seed in range(3):
    config = {"seed": seed, "lr": 0.1}
    path = pathlib.Path(f"config-{seed}.yaml").resolve()
    tracking.save_sweep_params(path, config)
    told = {"name": f"r-s{seed}", "recipe": "r", "tags": [], "x_axis": "tokens", "alone": False}
    trackers.append(tracking.start("pretrain", config, run_id=f"run{seed}", sweep_params=path, **told))
for step in range(20):
    for seed, tracker in enumerate(trackers):
        tracker.log({"tokens": step, "train/loss": seed + step}, step=step)
trackers[0].finish(3)
time.sleep(2)
os.kill(os.getpid(), 9)
"""


def test_runs_of_a_killed_process_keep_their_rows(room: Path) -> None:
    """wandb's core flushes each run every second; the last row of an open one is written with the next."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_SWEEP_ID": "sweep1"}
    assert subprocess.run([sys.executable, "-c", KILLED], env=env).returncode == -signal.SIGKILL
    found = {one.id: one for one in runs.read(room / "wandb", now=time.time() + 3600)}
    assert {one.sweep_id for one in found.values()} == {"sweep1"}
    assert [(found[f"run{seed}"].name, found[f"run{seed}"].config["seed"]) for seed in range(3)] == [
        ("r-s0", 0),
        ("r-s1", 1),
        ("r-s2", 2),
    ]
    assert [found[f"run{seed}"].status for seed in range(3)] == ["diverged", "crashed", "crashed"]
    assert [list(found[f"run{seed}"].history["train/loss"].value[:19]) for seed in range(3)] == [
        [seed + step for step in range(19)] for seed in range(3)
    ]


def test_in_a_sweep_a_process_without_parameters_of_each_run_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under W&B's own agent the second run would take the first one's id."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UserError, match="list the seeds in the sweep's own parameters"):
        tracking.start("pretrain", {}, name="x", recipe="r", tags=[], x_axis=None, alone=False)
