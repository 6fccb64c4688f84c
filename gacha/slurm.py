"""`gacha run FILE.yaml --slurm N`: N jobs through submitit, each of them one agent of the sweep over the shared folder.

A job that nears its time limit, or is preempted, lets its agent save what runs and is requeued: the agent goes on with
what is left, wherever the job starts next. What it had in hand the other agents may take up meanwhile.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import console
from console import UserError, write_atomic
from gacha import process
from gacha.ledger import Ledger

try:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError
except ImportError:
    raise UserError("--slurm needs submitit: pip install -e '.[slurm]'") from None

if TYPE_CHECKING:
    from gacha.agent import Config

MOST_REQUEUES = 1000  # times that a job may run out of its time: a sweep is longer than a job
SPARE_SECONDS = 60  # between the end of an agent, which may take its runs' kill delay, and the job's
USR2_SECONDS = 60.0  # what Slurm says first when it preempts a job is SIGTERM; whether it is to be requeued comes later


class AgentJob:
    """What a job runs: an agent as a process of its own. submitit pickles it, and calls `checkpoint` to requeue it."""

    def __init__(self, argv: list[str], folder: str) -> None:
        self.argv, self.folder = argv, folder
        self.child: subprocess.Popen | None = None
        self.told = False

    def __call__(self) -> None:
        """Serve until the agent ends; its exit code is the job's."""
        # A group of its own: SIGUSR2, with which Slurm announces the end to a whole group, would kill it.
        words = [sys.executable, "-m", "gacha", "run", *self.argv]
        self.child = subprocess.Popen(words, cwd=self.folder, process_group=0)
        signal.signal(signal.SIGTERM, self.end_agent)  # over submitit's, which ignores it
        code = self.child.wait()
        if self.told:
            time.sleep(USR2_SECONDS)
        if code:
            sys.exit(code if code > 0 else 128 - code)

    def end_agent(self, *_: object) -> None:
        self.told = True
        if self.child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child.pid, signal.SIGTERM)

    def checkpoint(self) -> Any:
        """End the agent with everything saved; what the requeued job is to run."""
        self.end_agent()
        if self.child:
            # Not by its `wait`: this is a signal's handler, and what it has interrupted is that call with its lock.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(AgentJob(self.argv, self.folder))


def submit(config: "Config", ledger: Ledger, delay: int) -> int:
    """Submit the jobs, say which they are and where they log. Returns 0; raises UserError where Slurm is not there."""
    folder = ledger.folder / "slurm"
    if config.slurm_cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            "--slurm: no sbatch here: submit where there is one, or try the jobs here by --slurm_cluster local"
        )
    folder.mkdir(exist_ok=True)
    # Jobs may start days later: what they serve is what was submitted.
    copy = folder / "definition.yaml"
    write_atomic(copy, Path(config.file).read_bytes())
    argv = [str(copy.resolve()), f"--jobs={config.jobs}", f"--pack={config.pack}"]
    argv += [f"--sampler_seed={config.sampler_seed}", f"--sweep_id={ledger.sweep.sweep_id}"]
    argv += [f"--count={config.count}"] if config.count else []
    job = AgentJob(argv, str(Path.cwd()))
    executor = local(config, folder, delay) if config.slurm_cluster == "local" else cluster(config, folder, delay)
    try:
        with executor.batch():
            jobs = [executor.submit(job) for _ in range(config.slurm)]
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"--slurm: sbatch refused: {lines[-1] if lines else error}") from None
    ids = [job.job_id for job in jobs]
    told = {"sweep_id": ledger.sweep.sweep_id, "folder": str(ledger.folder), "jobs": ids}
    told["logs"] = [str(job.paths.stdout) for job in jobs]
    console.print_result(told if config.json else told | {"jobs": " ".join(ids), "logs": str(folder)}, config.json)
    return 0


def cluster(config: "Config", folder: Path, delay: int) -> Any:
    """Slurm's executor with what the flags ask of it."""
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=MOST_REQUEUES)
    asked: dict[str, Any] = {"time": config.slurm_time, "cpus_per_task": config.slurm_cpus, "stderr_to_stdout": True}
    asked |= {"job_name": f"gacha-{folder.parent.name.removeprefix('sweep-')}"}
    asked |= {"signal_delay_s": delay + SPARE_SECONDS, "array_parallelism": config.slurm}
    asked |= {"partition": config.slurm_partition} if config.slurm_partition else {}
    asked |= {"gpus_per_node": config.slurm_gpus} if config.slurm_gpus else {}
    asked |= {"mem": f"{int(config.slurm_mem_gb * 1024)}MB"} if config.slurm_mem_gb else {}
    asked |= {"additional_parameters": extra(config.slurm_extra)} if config.slurm_extra else {}
    executor.update_parameters(**asked)
    return executor


def local(config: "Config", folder: Path, delay: int) -> Any:
    """The same jobs as processes of this machine."""
    executor = submitit.LocalExecutor(folder=folder, max_num_timeout=MOST_REQUEUES)
    gpus = config.slurm_gpus or len(process.cuda_devices())
    asked = {"timeout_min": config.slurm_time, "signal_delay_s": delay + SPARE_SECONDS, "gpus_per_node": gpus}
    executor.update_parameters(**asked, stderr_to_stdout=True)
    return executor


def extra(text: str) -> dict[str, Any]:
    """`account=llm,exclusive` as flags of sbatch."""
    flags: dict[str, Any] = {}
    for part in text.split(","):
        key, given, value = part.strip().removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", key):
            raise UserError(f"--slurm_extra {text}: write key=value,key=value, e.g. account=llm,qos=low")
        flags[key] = value if given else True
    return flags
