"""Several agents on one sweep: nothing is taken twice, nothing is lost, and each leaves the others what is theirs."""

import errno
import fcntl
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
from gacha import agent, definition, locks, process, search, worker
from gacha.ledger import Ledger
from gacha.pack import Pack

ROOT = Path(__file__).resolve().parents[2]

# One line a start in seen.jsonl; hangs as long as ./mood says so, and exits with the code that ./mood holds.
CHILD = """
import json, os, pathlib, signal, sys, time
mood = pathlib.Path("mood")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with open("seen.jsonl", "a") as file:
    told = {name: value for name, value in os.environ.items() if name.startswith(("WANDB", "CUDA", "OMP"))}
    file.write(json.dumps({"argv": sys.argv[1:], "env": told, "pid": os.getpid()}) + "\\n")
while mood.exists() and mood.read_text() == "hang":
    time.sleep(0.02)
sys.exit(int(mood.read_text()) if mood.exists() else 0)
"""


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the child program and no W&B setting of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "OMP_", "CUDA_", "SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "LOOK_SECONDS", 0.1)
    Path("child.py").write_text(CHILD)
    return tmp_path


def write(parameters: dict[str, Any], method: str = "grid", **more: Any) -> str:
    told = {"program": "child.py", "method": method, "parameters": parameters, **more}
    Path("sweep.yaml").write_text(yaml.safe_dump(told))
    return "sweep.yaml"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, --json result and progress of `gacha run`."""
    code = agent.main([*argv, "--json"])
    out, progress = capsys.readouterr()
    return code, json.loads(out), progress


def seen() -> list[dict[str, Any]]:
    """What the children wrote down so far, in order of their starts."""
    return [json.loads(line) for line in Path("seen.jsonl").read_text().splitlines()] if here("seen.jsonl") else []


def here(name: str) -> bool:
    return Path(name).exists()


def journal() -> list[dict[str, Any]]:
    return [json.loads(line) for line in next(Path("wandb").glob("*/state.jsonl")).read_text().splitlines()]


def spawn(*argv: str, to: str) -> subprocess.Popen[str]:
    """`python -m gacha run` as a process of its own, whose progress goes to the file `to`."""
    with Path(to).open("w") as log:
        words = [sys.executable, "-m", "gacha", "run", *argv, "--json"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=log, text=True)


def wait_for(true: Callable[[], object], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


# ---- killed at any moment


def test_kill_trials_lose_and_double_nothing(room: Path) -> None:
    """A handful; 200 of them are run by hand, as the head of kill_trials.py says."""
    words = [sys.executable, str(ROOT / "tests/gacha/kill_trials.py"), "--trials", "2", "--race", "12", "--seed", "7"]
    done = subprocess.run(words, cwd=room, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["trials"] == 2 and counts["runs"] == 12 <= counts["attempts"]
    assert counts["race of 2: runs without a double"] == counts["race of 3: runs without a double"] == 12


def test_what_one_agent_leaves_the_next_takes_up() -> None:
    """The first is asked to end, the second is killed and its run lives on; a third finishes, after a fair wait."""
    Path("mood").write_text("hang")
    file = write({"seed": {"value": 0}})
    first = spawn(file, to="first")
    wait_for(seen)
    second = spawn(file, to="second")
    wait_for(lambda: "waiting for 1 run(s)" in Path("second").read_text())
    assert len(seen()) == 1
    first.send_signal(signal.SIGTERM)
    wait_for(lambda: len(seen()) == 2)
    assert first.wait(15) == 143
    third = spawn(file, to="third")
    wait_for(lambda: "waiting for 1 run(s)" in Path("third").read_text())
    second.kill()
    second.communicate()
    wait_for(lambda: len(seen()) == 3)  # the orphan was ended first: it holds the run's lock
    Path("mood").unlink()
    out, _ = third.communicate(timeout=15)
    assert third.returncode == 0 and json.loads(out)["counts"]["finished"] == 1
    assert len({start["env"]["WANDB_RUN_ID"] for start in seen()}) == 1
    names = [event["event"] for event in journal()]
    assert names == ["assigned", "started", "ended", "assigned", "started", "assigned", "started", "ended"]


def test_run_that_lives_on_another_host_is_left_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent there is dead; its lock, which a shared file system shows, says that it is not."""
    monkeypatch.setattr(worker, "LINGER_SECONDS", 0.3)
    file = write({"seed": {"values": [0, 1]}})
    sweep = definition.read(file)
    folder = Path("wandb", f"sweep-{sweep.sweep_id}").resolve()
    folder.mkdir(parents=True)
    ledger = Ledger(sweep, folder)
    ledger.agent = "elsewhere-1-abcd"
    ledger.write(ledger.pulls[0], "assigned", params=ledger.pulls[0].params)
    with ledger.pulls[0].lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ledger.write(ledger.pulls[0], "started", pid=os.getpid(), machine="elsewhere boot", argv=[], slot=0)
        code, result, progress = run(capsys, file)
        assert [row["status"] for row in result["runs"]] == ["running", "finished"] and code == 0
        assert "waiting for 1 run(s) of elsewhere-1-abcd" in progress and "1 still run with other agents" in progress
    code, result, _ = run(capsys, file)
    assert code == 0 and result["counts"]["finished"] == 2 and len(seen()) == 2


def test_folder_of_an_older_version_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Its events name no agent and no machine; one run was going on when its agent was killed, one about to."""
    file = write({"seed": {"values": [0, 1, 2, 3]}})
    sweep = definition.read(file)
    folder = Path("wandb", f"sweep-{sweep.sweep_id}")
    folder.mkdir(parents=True)
    ids = [pull.run_id for pull in Ledger(sweep, folder).pulls]

    def event(number: int, name: str, **facts: Any) -> str:
        head = {"time": "2026-01-01T00:00:00.000+00:00", "run_id": ids[number], "event": name}
        return json.dumps({**head, **facts}) + "\n"

    rows = [event(number, "assigned", params=sweep.points[number]) for number in range(4)]
    rows += [event(number, "started", pid=2**22 + number, argv=[], slot=0) for number in range(3)]
    rows += [event(0, "ended", status="finished", returncode=0, seconds=5.0)]
    rows += [event(1, "ended", status="failed", returncode=1, seconds=5.0)]
    (folder / "state.jsonl").write_text("".join(rows))
    code, result, _ = run(capsys, file)
    assert code == 1 and [row["status"] for row in result["runs"]] == ["finished", "failed", "finished", "finished"]
    assert [start["env"]["WANDB_RUN_ID"] for start in seen()] == [ids[2], ids[3]]
    assert run(capsys, file, "--retry_failed")[0] == 0


def test_file_system_without_locks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"has no locks \(No locks available\): set WANDB_DIR"):
        agent.main([write({"seed": {"value": 0}})])


def test_agents_of_one_host_have_slots_of_their_own(room: Path) -> None:
    """Devices by slot, threads by all jobs; an agent that sees other devices is no neighbour."""
    room.joinpath("f").mkdir()
    cores = list(range(8))
    sweep = definition.read(write({"seed": {"values": [0, 1]}}))
    pull = Ledger(sweep, room / "f").pulls[0]
    with (
        locks.alive(room / "f", 2, ["4", "5", "6"], cores) as one,
        locks.alive(room / "f", 1, ["4", "5", "6"], cores) as two,
        locks.alive(room / "f", 1, ["7"], cores) as three,
    ):
        assert (one.slots, two.slots, three.slots) == ((0, 1), (2,), (0,))
        assert locks.cards(room / "f").keys() == {one.name, two.name, three.name}
        assert one.shares(two) and not one.shares(three)
        env = process.environment(sweep, Pack([pull], slot=2), two, [one])
        assert env["CUDA_VISIBLE_DEVICES"] == "6" and env["OMP_NUM_THREADS"] == str(max(1, len(process.cores()) // 3))
        assert "CUDA_VISIBLE_DEVICES" not in process.environment(sweep, Pack([pull]), three, [])
    assert not locks.cards(room / "f")


# ---- what an agent is asked for


def test_count_is_of_one_agent(capsys: pytest.CaptureFixture[str]) -> None:
    file = write({"seed": {"values": [0, 1, 2, 3, 4]}})
    code, result, _ = run(capsys, file, "--count", "2")
    assert code == 0 and (result["counts"]["finished"], result["counts"]["waiting"]) == (2, 3)
    assert run(capsys, file, "--count", "2")[1]["counts"]["finished"] == 4
    code, result, _ = run(capsys, file)
    assert code == 0 and [start["argv"] for start in seen()] == [[f"--seed={seed}"] for seed in range(5)]


def test_sweep_id_of_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    file = write({"seed": {"values": [0, 1]}})
    code, result, _ = run(capsys, file, "--sweep_id", "aBcd1234")
    assert code == 0 and Path(result["folder"]).name == "sweep-aBcd1234"
    assert {start["env"]["WANDB_SWEEP_ID"] for start in seen()} == {"aBcd1234"}
    assert "nothing left to run" in run(capsys, file, "--sweep_id", "aBcd1234")[2]
    with pytest.raises(UserError, match="belongs to another definition"):
        agent.main([write({"seed": {"values": [5, 6]}}), "--sweep_id", "aBcd1234"])
    with pytest.raises(UserError, match="--sweep_id a/b: must be 1 to 64 letters and digits"):
        agent.main([file, "--sweep_id", "a/b"])


def test_retry_failed_is_for_all_agents(capsys: pytest.CaptureFixture[str]) -> None:
    """One that is asked for it puts the failed runs back, whoever takes them; none is tried again by itself."""
    Path("mood").write_text("1")
    file = write({"seed": {"values": [0, 1]}})
    assert run(capsys, file)[1]["counts"]["failed"] == 2
    assert run(capsys, file)[1]["counts"]["failed"] == 2 == len(seen())
    code, result, _ = run(capsys, file, "--retry_failed", "--count", "1")
    assert code == 1 and (result["counts"]["failed"], result["counts"]["interrupted"]) == (1, 1)
    Path("mood").write_text("0")
    code, result, _ = run(capsys, file)
    assert code == 1 and (result["counts"]["failed"], result["counts"]["finished"]) == (1, 1)
    assert run(capsys, file, "--retry_failed")[0] == 0


# ---- points on demand


def test_points_of_an_endless_search_are_remembered_before_they_start(capsys: pytest.CaptureFixture[str]) -> None:
    """A stopped search goes on with the same points under the same ids; no point is drawn twice or skipped."""
    file = write({"lr": {"min": 0.0, "max": 1.0}}, method="random")
    _, first, _ = run(capsys, file, "--count", "3", "--jobs", "2")
    assert [event["event"] for event in journal()][:2] == ["proposed", "assigned"]
    folder = Path(first["folder"])
    with (folder / "state.jsonl").open("a") as state:
        # As if an agent had been killed between the proposal and the start.
        sweep = definition.read(file)
        ledger = Ledger(sweep, folder)
        ledger.agent = "dead-1-abcd"
        point = search.propose(sweep, [search.Seen(p.run_id, p.params, p.status, []) for p in ledger.pulls])
        state.write(ledger.row(ledger.propose(point or {}), "assigned").decode() + "\n")
    code, second, _ = run(capsys, file, "--count", "2")
    assert code == 0 and second["counts"]["finished"] == 5 == len(second["runs"])
    assert second["runs"][:3] == first["runs"] and second["runs"][3]["params"] == point
    drawn = [search.propose(sweep, [search.Seen("", {}, "finished", [])] * number) for number in range(5)]
    assert [row["params"] for row in second["runs"]] == drawn
    assert sorted(start["argv"][0] for start in seen()) == sorted(f"--lr={row['lr']}" for row in drawn if row)


def test_check_shows_a_search_and_what_became_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is started or made; of a killed agent's runs it says that they are interrupted."""
    file = write({"lr": {"min": 0.0, "max": 1.0}}, method="random")
    assert run(capsys, file, "--check")[1]["runs"] == [] and not here("wandb")
    _, result, _ = run(capsys, file, "--count", "1")
    ledger = Ledger(definition.read(file), Path(result["folder"]))
    ledger.agent = "dead-1-abcd"
    ledger.write(ledger.propose({"lr": 0.5}), "started", pid=2**22, machine=locks.machine(), argv=[], slot=0)
    code, result, _ = run(capsys, file, "--check")
    assert code == 0 and [row["status"] for row in result["runs"]] == ["finished", "interrupted"] and len(seen()) == 1
