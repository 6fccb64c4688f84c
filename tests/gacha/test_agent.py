"""The sweep agent through its door, with real children: a small program that writes down what it was given."""

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

from console import UserError
from gacha import agent, definition, locks, process

ROOT = Path(__file__).resolve().parents[2]

# Appends one line a start to seen.jsonl; then does what its `act` parameter says. `act` as a file waits for ./go.
CHILD = """
import json, os, pathlib, signal, sys, time
config = os.environ.get("WANDB_SWEEP_PARAM_PATH")
act = [word.partition("=")[2] for word in sys.argv if "act=" in word] or ["end"]
act = pathlib.Path(act[0]).read_text() if pathlib.Path(act[0]).is_file() else act[0]
def save(*_):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
with open("seen.jsonl", "a") as file:
    file.write(json.dumps({"argv": sys.argv, "env": dict(os.environ), "time": time.time(), "pid": os.getpid(),
        "config": open(config).read() if config else None, "stdin": sys.stdin.read(),
        "group": os.getpgrp()}) + "\\n")
print("step 1/2  loss 4.21", flush=True)
if act == "hang":
    time.sleep(60)
while act == "meet" and len(open("seen.jsonl").readlines()) < 2:
    time.sleep(0.02)
if act == "fail":
    print("error: no such corpus", file=sys.stderr)
    sys.exit(2)
if act == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf", flush=True)
    time.sleep(60)
if act == "diverge":
    sys.exit(3)
with open("ended.txt", "a") as file:
    file.write(os.environ["WANDB_RUN_ID"] + "\\n")
"""


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the child program and no W&B setting of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "OMP_", "CUDA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path("child.py").write_text(CHILD)
    return tmp_path


def write(parameters: dict[str, Any], **more: Any) -> str:
    """A definition of a grid over `parameters` served by the child, as sweep.yaml."""
    Path("sweep.yaml").write_text(
        yaml.safe_dump({"program": "child.py", "method": "grid", "parameters": parameters, **more})
    )
    return "sweep.yaml"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, --json result and progress of `gacha run`."""
    code = agent.main([*argv, "--json"])
    out, progress = capsys.readouterr()
    return code, json.loads(out), progress


def seen(name: str = "seen.jsonl") -> list[dict[str, Any]]:
    """What the children wrote down so far, in order of their starts."""
    return [json.loads(line) for line in Path(name).read_text().splitlines()] if Path(name).exists() else []


def spawn(*argv: str) -> subprocess.Popen[str]:
    """`python -m gacha run` as a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "gacha", "run", *argv, "--json"]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(true: Callable[[], object], seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def alive(run_id: str) -> bool:
    """Whether an attempt of the run lives: it holds the lock that it inherited."""
    with next(Path("wandb").glob(f"sweep-*/{run_id}.lock")).open() as file:
        return not locks.locked(file.fileno())


# ---- the grid


def points(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    return list(definition.grid(parameters))


def test_grid_order_is_that_of_wandbs_engine() -> None:
    """Expected values are what sweeps 0.3.0 proposed for these definitions."""
    flat = {"seed": {"values": [0, 1]}, "lr": {"values": [2.0e-3, 1.0]}, "data": {"value": "x"}}
    assert [(p["lr"], p["seed"]) for p in points(flat)] == [(0.002, 0), (0.002, 1), (1.0, 0), (1.0, 1)]
    assert list(points(flat)[0]) == ["data", "lr", "seed"]
    nested = {
        "model": {"parameters": {"d": {"values": [1, 2]}, "act": {"value": "g"}}},
        "zeta": {"values": [3.0, 3, 2, True, 1, "1"]},
        "alpha": {"value": 5},
        "Beta": {"value": None},
    }
    served = points(nested)
    assert json.dumps(served[0]) == '{"Beta": null, "alpha": 5, "zeta": 3, "model": {"act": "g", "d": 1}}'
    assert [(p["model"]["d"], repr(p["zeta"])) for p in served] == [
        (d, zeta) for d in (1, 2) for zeta in ("3", "2", "True", "1", "'1'")
    ]


def test_quickstart_is_four_seeds_and_the_bad_learning_rate() -> None:
    Path("train.py").touch()
    sweep = definition.read(str(ROOT / "sweeps/quickstart.yaml"))
    assert [p["seed"] for p in sweep.points] == [0, 1, 2, 3, 0]
    good, bad = sweep.points[0]["lr"], sweep.points[4]["lr"]
    assert [p["lr"] for p in sweep.points] == [good] * 4 + [bad] and bad > good


def test_covering_points_hold_every_value_once() -> None:
    grid = points({"a": {"values": [1, 2, 3]}, "m": {"parameters": {"b": {"values": ["x", "y"]}}}})
    chosen = definition.covering(grid)
    assert len(chosen) == 3
    assert {p["a"] for p in chosen} == {1, 2, 3} and {p["m"]["b"] for p in chosen} == {"x", "y"}
    seeds = definition.covering(points({"seed": {"values": list(range(100))}}))
    assert sorted(p["seed"] for p in seeds) == [0, 99]


# ---- what a child is given


def test_argv_environment_and_parameter_file_are_the_real_agents(
    room: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SERVICE", "of somebody else")
    parameters = {"lr": {"value": 1.0e-3}, "model": {"parameters": {"d": {"value": 64}}}, "tie": {"value": False}}
    code, result, _ = run(capsys, write(parameters, project="p", entity="e"))
    child = seen()[0]
    sid, rid = result["sweep_id"], result["runs"][0]["run_id"]
    env = child["env"]
    assert code == 0 and result["counts"]["finished"] == 1
    assert child["argv"] == ["child.py", "--lr=0.001", "--tie=False", "--model={'d': 64}"]
    assert (env["WANDB_SWEEP_ID"], env["WANDB_RUN_ID"]) == (sid, rid)
    assert len(sid) == len(rid) == 8 and (sid + rid).isalnum()
    assert env["WANDB_SWEEP_PARAM_PATH"] == str(room / f"wandb/sweep-{sid}/config-{rid}.yaml")
    assert (env["WANDB_DIR"], env["WANDB_PROJECT"], env["WANDB_ENTITY"]) == (str(room), "p", "e")
    assert (env["WANDB_MODE"], env["WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL"]) == ("offline", "1")
    assert "WANDB_SERVICE" not in env and "OMP_NUM_THREADS" not in env
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert yaml.safe_load(child["config"]) == {
        "wandb_version": 1,
        "lr": {"value": 0.001},
        "tie": {"value": False},
        "model": {"value": {"d": 64}},
    }
    assert child["stdin"] == "" and child["group"] == child["pid"] != os.getpgrp()


def test_users_own_settings_are_kept(
    room: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_DIR", str(room / "elsewhere"))
    _, result, _ = run(capsys, write({"seed": {"value": 0}}))
    env = seen()[0]["env"]
    assert env["WANDB_MODE"] == "disabled" and "WANDB_PROJECT" not in env
    assert result["folder"] == str(room / "elsewhere/wandb" / f"sweep-{result['sweep_id']}")
    assert env["WANDB_SWEEP_PARAM_PATH"].startswith(result["folder"])


@pytest.mark.parametrize(
    ("macro", "words"),
    [
        ("args", ["--a=1", "--no=False", "--yes=True"]),
        ("args_no_equals", ["--a", "1", "--no", "False", "--yes", "True"]),
        ("args_no_hyphens", ["a=1", "no=False", "yes=True"]),
        ("args_no_boolean_flags", ["--a=1", "--yes"]),
        ("args_json", ['{"a": 1, "no": false, "yes": true}']),
        ("args_append_hydra", ["+a=1", "+no=False", "+yes=True"]),
        ("args_override_hydra", ["++a=1", "++no=False", "++yes=True"]),
        ("program", ["child.py"]),
        ("interpreter", ["python"]),
        ("env", ["/usr/bin/env"]),
        ("envvar:HOUSE", ["casino"]),
    ],
)
def test_command_macros(macro: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOUSE", "casino")
    parameters = {"a": {"value": 1}, "yes": {"value": True}, "no": {"value": False}}
    command = ["${interpreter}", "${program}", 7, "${" + macro + "}", "x-${envvar:HOUSE}"]
    sweep = definition.read(write(parameters, command=command))
    assert process.command(sweep, sweep.points[0], Path("a.json")) == ["python", "child.py", "7", *words, "x-casino"]


def test_args_json_file_is_written_beside_the_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["${env}", "${interpreter}", "${program}", "${args_json_file}"]
    _, result, _ = run(capsys, write({"a": {"values": [1, 2]}}, command=command))
    for child, row in zip(seen(), result["runs"], strict=True):
        assert child["argv"][1] == f"{result['folder']}/config-{row['run_id']}.json"
        assert json.loads(Path(child["argv"][1]).read_text()) == row["params"]


def test_jobs_run_at_once_on_their_own_share(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    file = write({"act": {"value": "meet"}, "seed": {"values": [0, 1, 2, 3]}})  # the first waits for the second
    assert run(capsys, file, "--jobs", "2")[1]["counts"]["finished"] == 4
    events = [json.loads(line)["event"] for line in state().splitlines()]
    at_once = [events[: i + 1].count("started") - events[: i + 1].count("ended") for i in range(len(events))]
    assert max(at_once) == 2
    children = seen()
    assert {child["env"]["CUDA_VISIBLE_DEVICES"] for child in children[:2]} == {"4", "6"}
    assert children[0]["env"]["OMP_NUM_THREADS"] == str(max(1, len(process.cores()) // 2))


# ---- what is remembered


def test_run_cap_failures_and_divergence(capsys: pytest.CaptureFixture[str]) -> None:
    """A diverged run is a result; a failed one is not run again unless asked for, and then under its own id."""
    Path("mood").write_text("fail")
    file = write({"act": {"values": ["end", "diverge", "mood", "never"]}, "seed": {"value": 0}}, run_cap=3)
    code, first, progress = run(capsys, file)
    assert code == 1
    assert [(row["status"], row["returncode"]) for row in first["runs"]] == [
        ("finished", 0),
        ("diverged", 3),
        ("failed", 2),
    ]
    assert "--retry_failed" in progress and "error: no such corpus" in progress
    log = Path(first["folder"], first["runs"][2]["run_id"] + ".log").read_text()
    assert log == "step 1/2  loss 4.21\nerror: no such corpus\n"

    assert run(capsys, file)[0] == 1 and len(seen()) == 3
    Path("mood").write_text("end")
    code, second, _ = run(capsys, file, "--retry_failed")
    assert code == 0 and (second["counts"]["finished"], second["counts"]["failed"]) == (2, 0)
    ids = [child["env"]["WANDB_RUN_ID"] for child in seen()]
    assert ids == [*(row["run_id"] for row in first["runs"]), first["runs"][2]["run_id"]]

    code, _, progress = run(capsys, file)
    assert code == 0 and len(seen()) == 4 and "nothing left to run" in progress


def test_larger_run_cap_goes_on_with_the_same_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    _, first, _ = run(capsys, write({"seed": {"values": [0, 1, 2]}}, run_cap=1))
    _, second, _ = run(capsys, write({"seed": {"values": [0, 1, 2]}}, run_cap=2, description="one more"))
    assert first["sweep_id"] == second["sweep_id"] and first["runs"][0] == second["runs"][0]
    assert len(seen()) == 2
    assert definition.read(write({"seed": {"values": [0, 1, 3]}})).sweep_id != first["sweep_id"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_agent_saves_its_runs_and_goes_on_with_them(signum: int, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mood").write_text("hang")
    file = write({"act": {"values": ["end", "mood"]}, "seed": {"values": [0, 1]}})
    process = spawn(file, "--jobs", "2")
    wait_for(lambda: len(seen()) == 4)
    process.send_signal(signum)
    time.sleep(0.01)
    process.send_signal(signum)  # as `timeout` does: still one request to save
    out, progress = process.communicate(timeout=15)
    assert process.returncode == 128 + signum
    first = json.loads(out)
    assert [(row["status"], row["returncode"]) for row in first["runs"]] == [("finished", 0)] * 2 + [
        ("interrupted", 143)
    ] * 2
    assert "the same command goes on" in progress and "Traceback" not in progress
    assert Path(first["folder"], first["runs"][2]["run_id"] + ".log").read_text().endswith("saved\n")

    Path("mood").write_text("end")
    code, second, _ = run(capsys, file)
    ids = [row["run_id"] for row in second["runs"]]
    assert code == 0 and second["counts"]["finished"] == 4
    assert [child["env"]["WANDB_RUN_ID"] for child in seen()[4:]] == ids[2:]


def test_killed_agents_run_is_ended_before_it_runs_again(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mood").write_text("hang")
    file = write({"act": {"values": ["end", "mood"]}})
    process = spawn(file)
    wait_for(lambda: len(seen()) == 2 and b"started" in state().splitlines()[-1])
    orphan = seen()[1]["env"]["WANDB_RUN_ID"]
    process.kill()
    process.communicate()
    assert alive(orphan)
    with next(Path("wandb").glob("sweep-*/state.jsonl")).open("ab") as file_:
        file_.write(b'{"time": "2026-01-01T00')  # as if the power had failed within a line
    Path("mood").write_text("end")
    code, result, _ = run(capsys, file)
    assert code == 0 and not alive(orphan)
    assert [row["status"] for row in result["runs"]] == ["finished"] * 2
    assert [child["env"]["WANDB_RUN_ID"] for child in seen()[1:]] == [result["runs"][1]["run_id"]] * 2
    assert "saved" in Path(result["folder"], result["runs"][1]["run_id"] + ".log").read_text()


def state() -> bytes:
    return next(Path("wandb").glob("sweep-*/state.jsonl")).read_bytes()


@pytest.mark.parametrize(("delay", "signum"), [("1", signal.SIGTERM), ("30", signal.SIGINT)])
def test_deaf_run_is_killed_after_the_delay_or_a_second_ctrl_c(
    delay: str, signum: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_AGENT_KILL_DELAY", delay)
    process = spawn(write({"act": {"value": "deaf"}}))
    wait_for(lambda: any("deaf" in log.read_text() for log in Path("wandb").glob("sweep-*/*.log")))
    process.send_signal(signum)
    if delay == "30":
        time.sleep(1.2)
        process.send_signal(signum)
    out, _ = process.communicate(timeout=15)
    assert process.returncode == 128 + signum and json.loads(out)["runs"][0]["returncode"] == -signal.SIGKILL
    assert not alive(seen()[0]["env"]["WANDB_RUN_ID"])


def test_flapping_ends_the_sweep(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = write({"act": {"value": "fail"}, "seed": {"values": list(range(9))}})
    code, result, progress = run(capsys, file)
    assert code == 1 and result["counts"]["failed"] == 3 and result["counts"]["waiting"] == 6
    assert "3 runs failed within 60 s, the sweep stops: error: no such corpus" in progress
    monkeypatch.setenv("WANDB_AGENT_DISABLE_FLAPPING", "true")
    monkeypatch.setenv("WANDB_AGENT_MAX_INITIAL_FAILURES", "4")
    assert run(capsys, file)[1]["counts"]["failed"] == 3 + 4


def test_diverged_runs_do_not_count_as_flapping(capsys: pytest.CaptureFixture[str]) -> None:
    code, result, _ = run(capsys, write({"act": {"value": "diverge"}, "seed": {"values": list(range(6))}}))
    assert code == 0 and result["counts"]["diverged"] == 6


# ---- the lint

GOOD = "program: child.py\nmethod: grid\nparameters:\n  seed: {values: [0, 1]}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD + "a: [", ":5: not valid YAML"),
        ("- a\n- b\n", "not a mapping"),
        ("", "not a mapping"),
        (GOOD + "metod: grid\n", "metod: unknown key; did you mean method?"),
        (GOOD + "seeds: 5\n", "seeds: unknown key"),
        (GOOD + "early_terminate: {type: hyperband}\n", "metric: missing"),
        (GOOD.replace("grid", "bayes"), "metric: missing"),
        (GOOD.replace("grid", "gird"), "method: unknown method 'gird'"),
        (GOOD.replace("method: grid\n", ""), "method: missing"),
        (GOOD.replace("program: child.py\n", ""), "program: missing"),
        (GOOD.replace("child.py", "chlid.py"), "program: chlid.py is no file in"),
        ("program: child.py\nmethod: grid\n", "parameters: missing"),
        ("program: child.py\nmethod: grid\nparameters: {}\n", "parameters: must be a mapping"),
        (GOOD + "  lr: {values: [1.0e-3, 1e-4]}\n", ":5: parameters.lr.values: 1e-4 is text, not a number"),
        (GOOD + "  lr: {value: 3e5}\n", "parameters.lr.value: 3e5 is text, not a number, in YAML; write 3.0e+5"),
        (GOOD + "  m: {parameters: {lr: {value: 1e-3}}}\n", "parameters.m.parameters.lr.value: 1e-3 is text"),
        (GOOD + "  lr: 0.1\n", "parameters.lr: must be a mapping; write lr: {value: 0.1}"),
        (GOOD + "  lr: {}\n", "parameters.lr: has no value"),
        (GOOD + "  lr: {value: 1, values: [1]}\n", "parameters.lr: has both value and values"),
        (GOOD + "  lr: {values: []}\n", "parameters.lr: values: must be a list of at least one value"),
        (GOOD + "  lr: {valeus: [1]}\n", "parameters.lr: unknown attribute valeus; did you mean values?"),
        (GOOD + "  lr: {value: 1, description: rate}\n", "parameters.lr: unknown attribute description"),
        (GOOD + "  lr: {min: 0.0, max: 1}\n", "uniform has no list of values for a grid"),
        (GOOD + "  day: {value: 2026-01-01}\n", "date"),
        (GOOD + "  1x: {value: 1}\n", "parameters.1x: not a name that W&B takes"),
        (GOOD + "  seed: {value: 1}\n", ":5: parameters.seed: given twice"),
        (GOOD + "metric: {name: val/bpb, goal: minimise}\n", "metric.goal: must be minimize or maximize"),
        (GOOD + "metric: {goal: minimize}\n", "metric: needs a name"),
        (GOOD + "run_cap: 0\n", "run_cap: must be a whole number"),
        (GOOD + "run_cap: '5'\n", "run_cap: must be a whole number"),
        (GOOD + "command: ['${interpreter}', '${arg}']\n", "command: unknown macro ${arg}; did you mean args?"),
        (GOOD + "command: python train.py\n", "command: must be a list"),
        (GOOD + "project: 5\n", "project: must be text"),
        (GOOD + "".join(f"  p{i}: {{values: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}}\n" for i in range(9)), "set run_cap"),
    ],
)
def test_lint_names_file_and_key(text: str, says: str) -> None:
    Path("bad.yaml").write_text(text)
    with pytest.raises(UserError) as mistake:
        agent.main(["bad.yaml"])
    assert str(mistake.value).startswith("bad.yaml") and says in str(mistake.value)
    assert "\n" not in str(mistake.value) and not Path("wandb").exists()


def test_unreadable_files_are_named() -> None:
    Path("latin.yaml").write_bytes(b"name: caf\xe9\n")
    for file, says in (("none.yaml", "cannot be read"), ("latin.yaml", "not UTF-8"), (".", "cannot be read")):
        with pytest.raises(UserError, match=says):
            agent.main([file])


def test_quoted_number_and_wandbs_own_forms_are_text_on_purpose() -> None:
    text = GOOD + "  tag: {value: '1e-3', distribution: constant}\nmetric: {name: val/bpb}\ndescription: 1e-3 it is\n"
    Path("good.yaml").write_text(text)
    assert definition.read("good.yaml").points[0] == {"seed": 0, "tag": "1e-3"}


def test_check_prints_the_grid_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    file = write({"seed": {"values": [0, 1]}, "lr": {"value": 0.1}})
    code, result, _ = run(capsys, file, "--check")
    assert code == 0 and [row["params"]["seed"] for row in result["runs"]] == [0, 1]
    assert agent.main([file, "--check"]) == 0
    assert "seed=1" in capsys.readouterr().out
    assert not Path("wandb").exists() and not seen()


def test_misspelt_parameter_is_found_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """train.py itself says so, in a dry run."""
    monkeypatch.setenv("WANDB_DIR", str(Path.cwd()))
    text = (ROOT / "sweeps/quickstart.yaml").read_text().replace("d_model:", "d_modle:")
    Path("bad.yaml").write_text(text)
    file = str(Path("bad.yaml").resolve())
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as mistake:
        agent.main([file])
    assert str(mistake.value).startswith(file) and "d_modle" in str(mistake.value)


def test_program_that_cannot_start_is_one_line() -> None:
    with pytest.raises(UserError, match=r"sweep\.yaml: command: cannot start no-such-python"):
        agent.main([write({"seed": {"value": 0}}, command=["no-such-python", "${args}"])])
