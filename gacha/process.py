"""One process of a sweep: the argv and environment that W&B's own agent would give it, its start, its dry run."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tracking
from console import UserError
from gacha import definition
from gacha.definition import Sweep
from gacha.ledger import Ledger
from gacha.locks import Card
from gacha.pack import Pack, ours


def environment(sweep: Sweep, pack: Pack, card: Card, others: list[Card]) -> dict[str, str]:
    """The real agent's environment of one run, plus what offline work and several slots need.

    `others` are the agents with which this one (`card`) shares devices or cores. Where several runs share the process,
    --each says for each what WANDB_RUN_ID and WANDB_SWEEP_PARAM_PATH say of one.
    """
    env = dict(os.environ)
    for of_another in ("WANDB_SERVICE", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        env.pop(of_another, None)  # each process starts a wandb of its own
    env.setdefault("WANDB_DIR", str(Path.cwd()))
    for key in ("project", "entity"):
        if key in sweep.definition:
            env[f"WANDB_{key.upper()}"] = sweep.definition[key]
    env["WANDB_SWEEP_ID"] = sweep.sweep_id
    if pack.alone:
        env["WANDB_RUN_ID"] = pack.pulls[0].run_id
        env["WANDB_SWEEP_PARAM_PATH"] = str(pack.pulls[0].config)
    env.setdefault("WANDB_MODE", "offline")
    # The default of 15 s loses the end of a run that is killed.
    env.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
    # W&B's ${interpreter} is the bare word `python`. Without an activated environment that is another python or none;
    # ours is first, so that a run imports what the agent's environment holds.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    if (jobs := card.jobs + sum(other.jobs for other in others)) > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(cores()) // jobs)))
        if card.devices:
            env["CUDA_VISIBLE_DEVICES"] = card.devices[pack.slot % len(card.devices)]
    return env


def cores() -> list[int]:
    """CPU cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cuda_devices() -> list[str]:
    """Names of the visible CUDA devices, found without importing torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    # Counted, not named: in a container that was given /dev/nvidia3 alone, CUDA calls it 0.
    return [str(i) for i in range(sum(bool(re.fullmatch(r"nvidia\d+", dev.name)) for dev in Path("/dev").iterdir()))]


def command(sweep: Sweep, params: dict[str, Any], json_path: Path) -> list[str]:
    """The argv of a run."""
    given = sweep.definition
    return tracking.sweep_argv(given.get("command"), given.get("program", ""), params, json_path)


def prepare(sweep: Sweep, pack: Pack) -> None:
    """Write the files that the process will read, and its argv."""
    for pull in pack.pulls:
        tracking.save_sweep_params(pull.config, pull.params)
        pull.log_from = pull.log.stat().st_size if pull.log.exists() else 0
    if pack.alone:
        pack.argv = command(sweep, pack.pulls[0].params, pack.pulls[0].config.with_suffix(".json"))
    else:
        pack.write_each(pack.each)
        pack.ended.unlink(missing_ok=True)
        pack.argv = [*command(sweep, pack.shared, pack.each), f"--each={pack.each}"]


def start(sweep: Sweep, pack: Pack, ledger: Ledger, card: Card, others: list[Card]) -> None:
    """Start the next attempt of the runs in `pack`, as the real agent does: own process group, stdin closed.

    To be called in one's turn, after `prepare`, with the locks of the runs held; they go over to the process.
    """
    with pack.log.open("ab") as log, ledger.path.open("ab") as journal:
        pack.log_from = log.tell()
        try:
            pack.child = subprocess.Popen(
                pack.argv,
                env=environment(sweep, pack, card, others),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                pass_fds=[hold.file for hold in pack.holds],
                preexec_fn=tells_its_start(pack, ledger, card.machine, journal.fileno()),
            )
        except OSError as error:
            raise UserError(f"{sweep.path}: command: cannot start {pack.argv[0]}: {error.strerror}") from None
        finally:
            pack.release()
    assert pack.child.stdin is not None
    pack.child.stdin.close()
    ledger.read()


def tells_its_start(pack: Pack, ledger: Ledger, machine: str, journal: int) -> Callable[[], None]:
    """What a run does in its own process before it becomes the program: it writes its id into the journal.

    So no moment is left in which an agent can be killed between a start and the record of it: until the program runs,
    the process holds the agent's turn with it. It writes bytes made beforehand, since after a fork little is safe.
    """
    told = {"machine": machine, "argv": pack.argv, "slot": pack.slot}
    halves = [ledger.row(pull, "started", pid=0, **told).split(b'"pid": 0,', 1) for pull in pack.pulls]

    def tell() -> None:
        pid = b'"pid": %d,' % os.getpid()
        os.write(journal, b"".join(before + pid + after + b"\n" for before, after in halves))
        os.fsync(journal)

    return tell


def dry_run(sweep: Sweep, packs: list[Pack]) -> None:
    """Let our own train.py check the flags of every point before one is paid for; raises UserError with its words.

    Only points in which every value occurs once are tried. Another program may not know --dry_run: not tried.
    """
    if not ours(sweep):
        return
    sweep_keys = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    env = {key: value for key, value in os.environ.items() if key not in sweep_keys} | {"PATH": path}
    wanted = {id(point) for point in definition.covering([pull.params for pack in packs for pull in pack.pulls])}
    parts = [Pack([pull for pull in pack.pulls if id(pull.params) in wanted]) for pack in packs]

    def words(number: int, pack: Pack) -> str | None:
        argv = [*command(sweep, pack.shared, Path(scratch, f"{number}.json")), "--dry_run"]
        if not pack.alone:
            pack.write_each(Path(scratch, f"{number}.jsonl"))
            argv.append(f"--each={Path(scratch, f'{number}.jsonl')}")
        try:
            done = subprocess.run(
                argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace"
            )
        except OSError as error:
            return f"command: cannot start {argv[0]}: {error.strerror}"
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("error:")] or said or [f"exit code {done.returncode}"]
        return errors[-1].removeprefix("error:").strip() if done.returncode else None

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max(1, len(cores()) // 2)) as pool:
        tried = [part for part in parts if part.pulls]
        for number, complaint in enumerate(pool.map(words, range(len(tried)), tried)):
            # What is wrong with one is said of that one; what is too much together is served in smaller parts.
            if complaint and not tried[number].alone:
                several = [Pack([pull]) for pull in tried[number].pulls]
                complaint = next(filter(None, (words(number, one) for one in several)), None)
            if complaint:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"{sweep.path}: {complaint}")
