"""Kill trials of a sweep: `python tests/gacha/kill_trials.py --trials 200 --seed 0`.

A trial serves a small grid by one or two agents, kills at random moments an agent, a run, or an agent with all its
runs (as when a machine fails), gives the same command again, and then asks: has every run finished exactly once, has
none run twice at the same time, is none lost, does the journal say what happened? The runs notice doubles themselves:
each start takes a lock of its own, and each goes on from what it has saved.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gacha import agent, worker

PULLS, STEPS = 6, 8
KINDS = ("agent KILL", "agent TERM", "agent INT", "agent STOP", "run KILL", "run TERM", "machine")
# Every line of trace is one write, so that several writers do not mix.
PROGRAM = """
import fcntl, json, os, signal, sys, time
run, pid = os.environ["WANDB_RUN_ID"], os.getpid()
def tell(*words):
    os.write(trace, (" ".join(map(str, (time.monotonic(), run, pid, *words))) + "\\n").encode())
trace = os.open("trace", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
lock = os.open("lock-" + run, os.O_RDWR | os.O_CREAT)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    tell("double")
tell("begin")
saved = "saved-" + run
done = int(open(saved).read()) if os.path.exists(saved) else 0
def leave(*_):
    time.sleep(0.02)
    tell("leave")
    os._exit(143)
signal.signal(signal.SIGTERM, leave)
for step in range(done, int(sys.argv[1].split("=")[1])):
    time.sleep(0.03)
    tell("step", step)
    with open(saved + ".part", "w") as file:
        file.write(str(step + 1))
    os.replace(saved + ".part", saved)
tell("end")
"""
COMMAND = ["${interpreter}", "-S", "-E", "${program}", "${args}"]


def write_sweep(folder: Path, pulls: int = PULLS, steps: int = STEPS) -> None:
    """The program and its grid in `folder`."""
    parameters = {"a_steps": {"value": steps}, "seed": {"values": list(range(pulls))}}
    told = {"program": "child.py", "method": "grid", "command": COMMAND, "parameters": parameters}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(told))
    (folder / "child.py").write_text(PROGRAM)


def start_agent(folder: Path, *argv: str) -> int:
    """Process id of an agent at work in `folder`: a fork, so that a trial does not pay for the imports."""
    if pid := os.fork():
        return pid
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        said = os.open(f"agent-{os.getpid()}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]
        code = agent.main(["sweep.yaml", *argv])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(99)


def ended(pid: int) -> int | None:
    """Exit code of an agent, negative after a signal; None while it lives."""
    gone, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if gone else None


def children(pid: int) -> list[int]:
    """Its child processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = stat.read_text()
            if int(text[text.rindex(")") + 2 :].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def hurt(kind: str, pid: int, luck: random.Random) -> None:
    """Do to the agent `pid`, or to a run of it, what `kind` says."""
    who, _, name = kind.partition(" ")
    runs = children(pid)
    if who == "machine":
        os.kill(pid, signal.SIGSTOP)  # it starts nothing between our look and the end
        for victim in [*children(pid), pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
    elif who == "run":
        with contextlib.suppress(ProcessLookupError):
            os.kill(luck.choice(runs or [pid]), signal.Signals[f"SIG{name}"] if runs else signal.SIGKILL)
    elif name == "STOP":
        os.kill(pid, signal.SIGSTOP)  # a machine that hangs, and comes back
        time.sleep(0.3)
        os.kill(pid, signal.SIGCONT)
    else:
        os.kill(pid, signal.Signals[f"SIG{name}"])


def serve(folder: Path, agents: int, wounds: list[tuple[str, float]], luck: random.Random) -> list[int]:
    """Serve with `agents` agents, `wounds` (what, how many seconds after the first run has begun, or if negative after
    the start of the agents) done to them; exit codes of all.
    """
    alive = {start_agent(folder, f"--jobs={luck.choice([1, 2])}"): 0 for _ in range(agents)}
    codes, since, begun, wounds = [], time.monotonic(), 0.0, sorted(wounds, key=lambda wound: wound[1])
    lines = trace_size(folder)
    while alive:
        for pid in list(alive):
            if (code := ended(pid)) is not None:
                codes.append(code)
                del alive[pid]
        now = time.monotonic()
        begun = begun or (now if trace_size(folder) > lines else 0.0)
        due = (
            alive
            and wounds
            and (now > since - wounds[0][1] if wounds[0][1] < 0 else begun and now > begun + wounds[0][1])
        )
        if due:
            hurt(wounds.pop(0)[0], luck.choice(list(alive)), luck)
        if now > since + 60:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{folder}: agents hang")
        time.sleep(0.005)
    return codes


def trace_size(folder: Path) -> int:
    return (folder / "trace").stat().st_size if (folder / "trace").exists() else 0


def check(folder: Path, pulls: int = PULLS, steps: int = STEPS) -> dict[str, int]:
    """Raise AssertionError if a run was lost, doubled or misrecorded; counts of what happened."""
    (state,) = folder.glob("wandb/sweep-*/state.jsonl")
    events = collections.defaultdict(list)
    for line in state.read_bytes().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut short by a kill: at most one a kill
            events[json.loads(line)["run_id"]].append(json.loads(line))
    trace = [line.split() for line in (folder / "trace").read_text().splitlines()]
    assert len(events) == pulls == len({line[1] for line in trace}), f"{folder}: {len(events)} of {pulls} runs"
    assert not [line for line in trace if line[3] == "double"], f"{folder}: a run ran twice at the same time"
    attempts = 0
    for run_id, history in events.items():
        names = [event["event"] for event in history]
        finished = [place for place, event in enumerate(history) if event.get("status") == "finished"]
        assert finished == [len(history) - 1], f"{folder}: {run_id}: {names}"
        # A start needs a claim, and a claim the end of what was before: by its own end or by its agent's death.
        pids = [event["pid"] for event in history if event["event"] == "started"]
        mine = [line for line in trace if line[1] == run_id]
        assert {int(line[2]) for line in mine} <= set(pids), f"{folder}: {run_id}: a start that nobody recorded"
        done = [int(line[4]) for line in mine if line[3] == "step"]
        assert sorted(set(done)) == list(range(steps)) and done == sorted(done), f"{folder}: {run_id}: steps {done}"
        assert len(done) - steps <= len(pids) - 1, f"{folder}: {run_id}: more steps again than interruptions"
        attempts += len(pids)
    return {"runs": pulls, "attempts": attempts, "events": sum(map(len, events.values()))}


def trial(folder: Path, luck: random.Random) -> dict[str, int]:
    """Serve, hurt, serve again until done; counts."""
    write_sweep(folder)
    agents = luck.choice([1, 2, 2])
    kinds: collections.Counter[str] = collections.Counter()
    for _ in range(luck.choice([1, 2])):
        wounds = [(luck.choice(KINDS), luck.uniform(-0.3, 1.0)) for _ in range(luck.choice([1, 2]))]
        kinds.update(kind for kind, _ in wounds)
        serve(folder, agents, wounds, luck)
    for _ in range(5):
        if set(codes := serve(folder, agents, [], luck)) == {0}:
            break
    assert set(codes) == {0}, f"{folder}: not done: {codes}"
    return {**check(folder), **{f"hurt: {kind}": number for kind, number in kinds.items()}, f"{agents} agents": 1}


def race(folder: Path, agents: int, pulls: int) -> dict[str, int]:
    """Agents that take tiny runs as fast as they can."""
    write_sweep(folder, pulls, 0)
    alive = [start_agent(folder, "--jobs=2") for _ in range(agents)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in alive]
    assert set(codes) == {0}, f"{folder}: {codes}"
    counts = check(folder, pulls, 0)
    assert counts["attempts"] == pulls, f"{folder}: {counts['attempts']} starts of {pulls} runs"
    return counts


def warm(folder: Path) -> None:
    """Serve one run in this process: its forks then find everything imported."""
    write_sweep(folder, 1, 0)
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        agent.main(["sweep.yaml"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--race", type=int, default=120, help="runs over which two and three agents race afterwards")
    asked = parser.parse_args()
    total: dict[str, Any] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        warm(Path(folder))
        os.chdir("/")
    for number in range(asked.trials):
        with tempfile.TemporaryDirectory() as folder:
            counts = trial(Path(folder), random.Random(asked.seed * 1_000_000 + number))
        total.update(counts)
        total["trials"] += 1
        print(f"{number + 1}/{asked.trials} {json.dumps(counts)}", file=sys.stderr, flush=True)
    for agents in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            total[f"race of {agents}: runs without a double"] = race(Path(folder), agents, asked.race)["runs"]
    print(json.dumps(dict(sorted(total.items()))))


if __name__ == "__main__":
    worker.LOOK_SECONDS = 0.2
    main()
