"""The stages of `data/crawl.py` as Slurm jobs: one array a stage, and a last job that completes the build."""

import contextlib
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import console
from data import crawl
from data.progress import say

ARRAY = 1000  # tasks of one array at most: Slurm's default MaxArraySize allows 1,001


def submit(job: crawl.Job, argv: list[str], log: Path) -> str:
    """Send every stage to Slurm, each after the one before, and last the command `argv` itself on this machine's
    executor, which finds all of them done and writes to `log`; returns the last job's id. Submitted again, only what
    is missing runs. Raises UserError where there is no Slurm, where it refuses, or while jobs sent before are queued.
    """
    assert job.slurm is not None
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            raise console.UserError(f"no {program} on this machine: submit from a node of the cluster that has it")
    for path in (job.annotations.resolve(), job.work.resolve(), crawl.ROOT):
        if any(c.isspace() for c in str(path)):
            raise console.UserError(f"{path}: datatrove's Slurm scripts take no path with a space: choose another")
    with crawl.locked(job.work.parent):
        ids = queued(job.work / "slurm.json")
        if ids:
            raise console.UserError(f"jobs of this build are queued: wait for them, or scancel {' '.join(ids)}")
        tasks = crawl.prepare(job)
        crawl.renew(job)
        programs = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        modules = f"PYTHONPATH={crawl.ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"
        # The stage of buckets has a file open for each task of the stage before it.
        setup = f"{job.slurm.env_command}\nexport {programs} {modules}\nulimit -Sn $(ulimit -Hn)".strip()
        for stage in crawl.stages(job, tasks):
            send(job, stage, setup, ids)
        command = shlex.join([sys.executable, "-m", "data", *argv])
        script = f"#!/bin/bash\n{setup}\nexec {command}\n"
        options = [
            "--parsable",
            "--job-name=data-finish",
            f"--partition={job.slurm.partition}",
            f"--time={job.slurm.time}",
            f"--mem-per-cpu={job.slurm.mem_per_cpu_gb}G",
            f"--output={str(log).replace('%', '%%')}",
            *([f"--dependency=afterok:{ids[-1]}", "--kill-on-invalid-dep=yes"] if ids else []),
        ]
        with sending(job, "finish", ids):
            printed = subprocess.check_output(["sbatch", *options], input=script, text=True)
            ids.append(printed.strip().partition(";")[0])
    return ids[-1]


def logs(job: crawl.Job) -> Path:
    """Where Slurm keeps what the tasks print, as JOB_TASK.out."""
    return (job.work / "logs" / "slurm").resolve()


def send(job: crawl.Job, stage: crawl.Stage, setup: str, ids: list[str]) -> None:
    """Send the tasks of a stage that are not done, to start after the last of the jobs `ids`; adds the new one."""
    from datatrove.executor import SlurmPipelineExecutor

    assert job.slurm is not None
    name, steps, number = stage
    executor: Any = SlurmPipelineExecutor(
        steps,
        tasks=number,
        workers=job.workers or -1,
        time=job.slurm.time,
        partition=job.slurm.partition,
        mem_per_cpu_gb=job.slurm.mem_per_cpu_gb,
        qos="",
        job_name=f"data-{name}",
        logging_dir=str(crawl.logs_of(job, name)),
        slurm_logs_folder=str(logs(job)),
        env_command=setup,
        depends_job_id=ids[-1] if ids else None,
        sbatch_args={"kill-on-invalid-dep": "yes"},  # else a failed stage's successors would wait for ever
    )
    todo = len(executor.get_incomplete_ranks())
    # One array a stage, so that the next stage depends on all of it: of datatrove's chains of arrays it would not.
    executor.tasks_per_job = math.ceil(todo / ARRAY)
    executor.launch_merge_stats = lambda: None  # a second job for each stage, for figures that nobody reads
    if todo:
        with sending(job, name, ids):
            executor.run()
            ids.append(str(executor.job_id))
        say(f"{name}: job {ids[-1]}, {todo} tasks")


@contextlib.contextmanager
def sending(job: crawl.Job, name: str, ids: list[str]) -> Iterator[None]:
    """Keep what was sent, for `queued`. Raises UserError where sbatch refuses; its own words are on stderr by then."""
    try:
        yield
    except subprocess.CalledProcessError:
        before = f"; sent before it: scancel {' '.join(ids)}" if ids else ""
        raise console.UserError(f"sbatch refused the job {name}, and says why above{before}") from None
    finally:
        console.write_atomic(job.work / "slurm.json", json.dumps(ids).encode())


def queued(sent: Path) -> list[str]:
    """Which of the jobs listed in `sent` Slurm has still to run or to end."""
    if not sent.is_file():
        return []
    ids = ",".join(json.loads(sent.read_bytes()))
    command = ["squeue", "--noheader", "--format=%F", f"--jobs={ids}"]
    # It fails on ids that Slurm has forgotten: those are not queued.
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return sorted({line.strip() for line in lines}, key=int)
