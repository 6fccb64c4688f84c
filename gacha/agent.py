"""`python -m gacha run FILE.yaml`: the definition that `wandb sweep` takes, served offline as `wandb agent` serves it.

Each run gets the real agent's argv and environment; what became of it is kept in `wandb/sweep-<id>/` (ledger.py), so
that the same command goes on where it stopped, after kill -9 too: finished runs stay finished, interrupted ones run
again under their old run id and resume from their own checkpoint. The same command given twice, on one host or on
several that share the folder, is two agents at work on one sweep: no run is taken twice, and what a dying agent leaves
the others take up.

What differs from `wandb agent` on purpose: `--jobs` runs at once; Ctrl-C asks the runs to save at once instead of
waiting for their end; exit code 3 (diverged) is a result, no failure; each run's output goes to a log of its own;
`python` is the interpreter that runs the agent; runs of our own train.py may share a process (pack.py).
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

import console
from console import UserError
from gacha import board, definition, locks, process
from gacha.board import say
from gacha.definition import Sweep
from gacha.ledger import Ledger, Pull
from gacha.pack import MOST_ON_CPU, MOST_ON_GPU, Pack, plan, possible

KILL_DELAY = 30  # the real agent's


@dataclass(frozen=True)
class Config:
    """Serve a W&B sweep definition offline; the same command goes on where it stopped, and may run several times."""

    file: tyro.conf.Positional[str]
    """Sweep definition (YAML), as `wandb sweep` takes it."""
    jobs: int = 1
    """Processes at once. With several, CPU threads are divided and CUDA devices handed out by slot."""
    count: int | None = None
    """Most runs that this agent starts, as of `wandb agent --count`; without it, all."""
    pack: int | Literal["auto"] = "auto"
    """Most runs of train.py pretrain in one process, where they differ in seeds, lr and weight_decay alone."""
    sampler_seed: int = 0
    """Seed of random and Bayesian search; the same seed draws the same points."""
    sweep_id: str = ""
    """Id of a sweep on a W&B server: `wandb sync` attaches the runs to it. Without it, an id out of the definition."""
    retry_failed: bool = False
    """Run failed runs again too (W&B's grid never does), under their old run ids."""
    check: bool = False
    """Check the definition, dry-run the program, print the grid; start nothing."""
    json: bool = False
    """Print the result as one JSON object."""
    slurm: int = 0
    """Submit this many Slurm jobs, each an agent of this sweep, and return; the folder must be shared by the nodes."""
    slurm_partition: str = ""
    slurm_time: int = 60
    """Minutes of each job; a job that runs out of time saves its runs, is requeued and goes on."""
    slurm_gpus: int = 0
    """GPUs of each job; --jobs as many to use them all."""
    slurm_cpus: int = 1
    slurm_mem_gb: float = 0.0
    """Memory of each job; without it, the cluster's default."""
    slurm_extra: str = ""
    """More flags of sbatch, as key=value,key=value: account=llm,qos=low."""
    slurm_cluster: Literal["slurm", "local"] = "slurm"
    """local: the same jobs as processes of this machine, where there is no Slurm."""


def main(argv: Sequence[str]) -> int:
    """Serve the sweep. Returns 0 when every run is done, 1 when some are not, 128 + signal when stopped by one."""
    config = console.parse(Config, argv, "python -m gacha run")
    check(config)
    delay = kill_delay()
    sweep = definition.read(config.file, config.sampler_seed)
    if config.sweep_id:
        sweep = dataclasses.replace(sweep, sweep_id=config.sweep_id)
    for line in sweep.warnings:
        say(f"{sweep.path}: {line}")
    most = most_together(config, sweep)
    folder = Path(os.environ.get("WANDB_DIR", Path.cwd()), "wandb", f"sweep-{sweep.sweep_id}")
    if config.check:
        ledger, code = look(sweep, folder), 0
        process.dry_run(sweep, plan(ledger.pulls or first(sweep, folder), config.jobs, most))
    elif config.slurm:
        from gacha import slurm

        ledger = prepare(config, sweep, folder, most)
        return slurm.submit(config, ledger, delay)
    else:
        ledger, code = work(config, sweep, folder, most, delay)
    if config.json:
        console.print_result(board.result(sweep.sweep_id, folder, ledger.pulls), as_json=True)
    else:
        board.print_pulls(sweep.sweep_id, folder, ledger.pulls)
    return 0 if config.check else code


def check(config: Config) -> None:
    """Raise UserError on flags that mean nothing."""
    for name in ("jobs", "count", "slurm_time", "slurm_cpus"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")
    for name in ("slurm", "slurm_gpus", "slurm_mem_gb"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} {getattr(config, name)}: must not be negative")
    if config.pack != "auto" and config.pack < 1:
        raise UserError(f"--pack {config.pack}: must be auto, or 1 or more")
    if config.sweep_id and not re.fullmatch(r"[A-Za-z0-9]{1,64}", config.sweep_id):
        raise UserError(f"--sweep_id {config.sweep_id}: must be 1 to 64 letters and digits, as W&B's ids are")


def kill_delay() -> int:
    """Seconds between SIGTERM and SIGKILL, WANDB_AGENT_KILL_DELAY as for the real agent."""
    text = os.environ.get("WANDB_AGENT_KILL_DELAY", str(KILL_DELAY))
    if not text.isdecimal():
        raise UserError(f"WANDB_AGENT_KILL_DELAY={text}: must be a whole number of seconds")
    return int(text)


def most_together(config: Config, sweep: Sweep) -> int:
    """Most runs in one process."""
    asked = config.pack not in ("auto", 1)
    if not possible(sweep):
        if asked:
            raise UserError(
                f"{sweep.path}: --pack {config.pack}: only runs of train.py pretrain ${{args}} share a process"
            )
        return 1
    if "early_terminate" in sweep.definition or not sweep.listed:
        if asked:
            raise UserError(
                f"{sweep.path}: --pack {config.pack}: runs that are stopped or proposed one by one share no process"
            )
        return 1
    return config.pack if config.pack != "auto" else MOST_ON_GPU if process.cuda_devices() else MOST_ON_CPU


def look(sweep: Sweep, folder: Path) -> Ledger:
    """The sweep's state as it is; nothing is made where nothing has run."""
    if not folder.is_dir():
        return Ledger(sweep, folder)
    with locks.turn(folder):
        ledger = Ledger(sweep, folder)
        ledger.look(locks.cards(folder), locks.machine())
    return ledger


def first(sweep: Sweep, folder: Path) -> list[Pull]:
    """The first point of a search, for a dry run."""
    from gacha import search

    params = search.propose(sweep, [])
    return [] if params is None else [Pull(0, "", params, folder)]


def prepare(config: Config, sweep: Sweep, folder: Path, most: int) -> Ledger:
    """The sweep's state, after what was interrupted (and, if asked for, failed) is put back into the queue."""
    from gacha import search

    search.ready(sweep)
    folder.mkdir(parents=True, exist_ok=True)
    with locks.turn(folder):
        ledger = Ledger(sweep, folder)
        cards = locks.cards(folder)
        ledger.look(cards, locks.machine())
        again = ("interrupted", *(["failed"] if config.retry_failed else []))
        for pull in ledger.pulls:
            if pull.status in again and not pull.ready and pull.agent not in cards:
                ledger.write(pull, "requeued")
    jobs = config.jobs * max(1, config.slurm) + sum(card.jobs for card in cards.values())
    # What has run was checked then: a resumed sweep starts at once.
    process.dry_run(sweep, plan([pull for pull in ledger.pulls if pull.status == "waiting"], jobs, most))
    return ledger


def work(config: Config, sweep: Sweep, folder: Path, most: int, delay: float) -> tuple[Ledger, int]:
    """Be one agent of the sweep; its state at the end, and the exit code."""
    from gacha import worker  # brings numpy and pyarrow, which --help does not wait for
    from gacha.follow import Follower

    ledger = prepare(config, sweep, folder, most)
    nothing = sweep.listed and not any(pull.ready or pull.status == "running" for pull in ledger.pulls)
    with locks.alive(folder, config.jobs, process.cuda_devices(), process.cores()) as card:
        ledger.agent = card.name
        follower = Follower(folder.parent, sweep.definition.get("metric", {}).get("name"))
        agent = worker.Worker(sweep, ledger, card, follower, most, config.count, delay)
        code = worker.serve(agent, lambda pack: process.dry_run(sweep, [Pack(pack.pulls)]))
    with locks.turn(folder):
        ledger.read()
        ledger.look(locks.cards(folder), card.machine)
    counts = Counter(pull.status for pull in ledger.pulls)
    to_go = counts["interrupted"] + (0 if config.count else counts["waiting"])
    if nothing:
        say(f"nothing left to run; to start afresh, move {folder} away")
    if counts["failed"]:
        say(f"{counts['failed']} failed (logs in {folder}): mend the cause, then the same command with --retry_failed")
    if agent.target:
        say(f"run {agent.target} has reached the target of {sweep.definition['metric']['name']}: no more are started")
        to_go = 0
    if counts["running"]:
        say(f"{counts['running']} still run with other agents; what these leave, the same command takes up")
    if to_go:
        say(f"{to_go} to go: the same command goes on where it stopped")
    return ledger, code or int(bool(to_go or counts["failed"]))
