"""Agents as jobs of a cluster: real jobs of submitit's on this machine, and what is said to a stand-in for sbatch."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from console import UserError
from gacha import agent

ROOT = Path(__file__).resolve().parents[2]

CHILD = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with open("seen", "a") as file:
    file.write(os.environ["WANDB_RUN_ID"] + " " + os.environ["SUBMITIT_LOCAL_JOB_ID"] + "\\n")
while len(set(line.split()[1] for line in open("seen"))) < 2 or pathlib.Path("hang").exists():
    time.sleep(0.02)
"""
SBATCH = '#!/bin/sh\ncp "$1" submitted.sh\necho "Submitted batch job 4711"\n'


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a sweep of four runs, of which the first waits until two jobs are at work."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "OMP_", "CUDA_", "SLURM_", "SUBMITIT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("WANDB_AGENT_KILL_DELAY", "5")
    Path("child.py").write_text(CHILD)
    told = {"program": "child.py", "method": "grid", "parameters": {"seed": {"values": [0, 1, 2, 3]}}}
    Path("sweep.yaml").write_text(yaml.safe_dump(told))
    return tmp_path


def wait_for(true: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def ends() -> list[dict[str, str]]:
    rows = [json.loads(line) for line in next(Path("wandb").glob("*/state.jsonl")).read_text().splitlines()]
    return [row for row in rows if row["event"] == "ended"]


def test_two_jobs_serve_one_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    """Submitted and left to themselves; one is preempted in the middle, and goes on as the job that it was."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    Path("hang").touch()
    assert agent.main(["sweep.yaml", "--slurm", "2", "--slurm_cluster", "local", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    jobs = [int(number) for number in told["jobs"]]
    assert len(jobs) == 2 and Path(told["folder"]) == next(Path("wandb").resolve().glob("sweep-*"))
    wait_for(lambda: Path("seen").exists() and len(set(Path("seen").read_text().split()) & set(told["jobs"])) == 2)
    # What Slurm sends to a job that nears its end; the job is the child of submitit's stand-in for Slurm.
    tasks = {int(p.parent.name): p.read_text().rpartition(")")[2].split() for p in Path("/proc").glob("[0-9]*/stat")}
    (task,) = [pid for pid, facts in tasks.items() if int(facts[1]) == jobs[0]]
    os.kill(task, signal.SIGUSR2)
    wait_for(lambda: any(row["status"] == "interrupted" for row in ends()))
    Path("hang").unlink()
    wait_for(lambda: len([row for row in ends() if row["status"] == "finished"]) == 4)
    for number in jobs:
        os.waitpid(number, 0)
    log = Path(told["logs"][0]).read_text()
    assert "Calling checkpoint method" in log and "Requeued job" in log
    assert "4 finished" in log and "4 finished" in Path(told["logs"][1]).read_text()


def test_what_sbatch_is_given(room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no sbatch here: submit where there is one"):
        agent.main(["sweep.yaml", "--slurm", "2"])
    for name, text in (("sbatch", SBATCH), ("srun", "#!/bin/sh\n")):
        (room / name).write_text(text)
        (room / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{room}{os.pathsep}{os.environ['PATH']}")
    flags = ["--slurm_partition", "gpu", "--slurm_time", "90", "--slurm_gpus", "4", "--slurm_mem_gb", "1.5"]
    assert (
        agent.main(["sweep.yaml", "--slurm", "3", "--jobs", "4", *flags, "--slurm_extra", "account=llm,exclusive"]) == 0
    )
    assert "4711_0 4711_1 4711_2" in capsys.readouterr().out
    script = Path("submitted.sh").read_text()
    for line in (
        "array=0-2%3",
        "partition=gpu",
        "time=90",
        "gpus-per-node=4",
        "mem=1536MB",
        "account=llm",
        "exclusive",
    ):
        assert f"#SBATCH --{line}\n" in script
    assert "#SBATCH --signal=USR2@65\n" in script  # 5 s for the runs to save, a minute to spare
    with pytest.raises(UserError, match="--slurm_extra a b: write key=value"):
        agent.main(["sweep.yaml", "--slurm", "3", "--slurm_extra", "a b"])
    (room / "sbatch").write_text("#!/bin/sh\necho 'error: invalid partition' >&2\nexit 1\n")
    with pytest.raises(UserError, match="invalid partition"):
        agent.main(["sweep.yaml", "--slurm", "3"])


def test_without_submitit_the_command_that_brings_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, "gacha.slurm", raising=False)
    monkeypatch.delattr("gacha.slurm", raising=False)
    with pytest.raises(UserError, match=r"pip install -e '\.\[slurm\]'"):
        agent.main(["sweep.yaml", "--slurm", "2"])
