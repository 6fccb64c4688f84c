"""`python -m gacha run FILE.yaml`: the definition that `wandb sweep` takes, served offline as `wandb agent` serves it.

Each run gets the real agent's argv and environment; what became of it is kept in `wandb/sweep-<id>/` (ledger.py), so
that the same command goes on where it stopped, after kill -9 too: finished runs stay finished, interrupted ones run
again under their old run id and resume from their own checkpoint.

What differs from `wandb agent` on purpose: `--jobs` runs at once; Ctrl-C asks the runs to save at once instead of
waiting for their end; exit code 3 (diverged) is a result, no failure; each run's output goes to a log of its own;
`python` is the interpreter that runs the agent; runs of our own train.py may share a process (pack.py).
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

import console
import tracking
from console import UserError
from gacha import board, definition
from gacha.definition import Sweep
from gacha.ledger import Pull, hold, only_agent, remember, replay, send
from gacha.pack import MOST_ON_CPU, MOST_ON_GPU, Pack, ours, plan, possible

POLL_SECONDS = 0.05
FLAPPING_SECONDS, FLAPPING_FAILURES, INITIAL_FAILURES, KILL_DELAY = 60, 3, 5, 30  # the real agent's


@dataclass(frozen=True)
class Config:
    """Serve a W&B sweep definition offline; the same command goes on where it stopped."""

    file: tyro.conf.Positional[str]
    """Sweep definition (YAML), as `wandb sweep` takes it."""
    jobs: int = 1
    """Processes at once. With several, CPU threads are divided and CUDA devices handed out by slot."""
    pack: int | Literal["auto"] = "auto"
    """Most runs of train.py pretrain in one process, where they differ in seeds, lr and weight_decay alone."""
    retry_failed: bool = False
    """Run failed runs again too (W&B's grid never does), under their old run ids."""
    check: bool = False
    """Check the definition, dry-run the program, print the grid; start nothing."""
    json: bool = False
    """Print the result as one JSON object."""


def main(argv: Sequence[str]) -> int:
    """Serve the sweep. Returns 0 when every run is done, 1 when some are not, 128 + signal when stopped by one."""
    config = console.parse(Config, argv, "python -m gacha run")
    if config.jobs < 1:
        raise UserError(f"--jobs {config.jobs}: must be 1 or more")
    if config.pack != "auto" and config.pack < 1:
        raise UserError(f"--pack {config.pack}: must be auto, or 1 or more")
    delay = kill_delay()
    sweep = definition.read(config.file)
    most = config.pack if config.pack != "auto" else MOST_ON_GPU if cuda_devices() else MOST_ON_CPU
    if not possible(sweep):
        if config.pack not in ("auto", 1):
            raise UserError(
                f"{sweep.path}: --pack {config.pack}: only runs of train.py pretrain ${{args}} share a process"
            )
        most = 1
    folder = Path(os.environ.get("WANDB_DIR", Path.cwd()), "wandb", f"sweep-{sweep.sweep_id}")
    if config.check:
        pulls, code = replay(sweep, folder), 0
        dry_run(sweep, plan(pulls, config.jobs, most))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with only_agent(folder):
            pulls = replay(sweep, folder)
            again = ("waiting", "interrupted", *(["failed"] if config.retry_failed else []))
            todo = [pull for pull in pulls if pull.status in again]
            end_orphans(todo, delay)
            # What has run was checked then: a resumed sweep starts at once.
            packs = plan(todo, config.jobs, most)
            dry_run(sweep, [pack for pack in packs if pack.pulls[0].status == "waiting"])
            code = serve(sweep, pulls, packs, config.jobs, delay)
            if not todo:
                say(f"nothing left to run; to start afresh, move {folder} away")
    if config.json:
        console.print_result(board.result(sweep.sweep_id, folder, pulls), as_json=True)
    else:
        board.print_pulls(sweep.sweep_id, folder, pulls)
    if config.check:
        return 0
    counts = Counter(pull.status for pull in pulls)
    to_go = counts["waiting"] + counts["interrupted"]
    if counts["failed"]:
        say(f"{counts['failed']} failed (logs in {folder}): mend the cause, then the same command with --retry_failed")
    if to_go:
        say(f"{to_go} to go: the same command goes on where it stopped")
    return code or int(bool(to_go or counts["failed"]))


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


def kill_delay() -> int:
    """Seconds between SIGTERM and SIGKILL, WANDB_AGENT_KILL_DELAY as for the real agent."""
    text = os.environ.get("WANDB_AGENT_KILL_DELAY", str(KILL_DELAY))
    if not text.isdecimal():
        raise UserError(f"WANDB_AGENT_KILL_DELAY={text}: must be a whole number of seconds")
    return int(text)


# ---- one process


def environment(sweep: Sweep, pack: Pack, jobs: int) -> dict[str, str]:
    """The real agent's environment of one run, plus what offline work and several slots need.

    Where several runs share the process, --each says for each what WANDB_RUN_ID and WANDB_SWEEP_PARAM_PATH say of one.
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
    if jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
        if devices := cuda_devices():
            env["CUDA_VISIBLE_DEVICES"] = devices[pack.slot % len(devices)]
    return env


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def start(sweep: Sweep, pack: Pack, jobs: int, delay: int) -> None:
    """Start the next attempt of the runs in `pack`, as the real agent does: own process group, stdin closed."""
    for pull in pack.pulls:
        tracking.save_sweep_params(pull.config, pull.params)
    if pack.alone:
        argv = command(sweep, pack.pulls[0].params, pack.pulls[0].config.with_suffix(".json"))
    else:
        pack.write_each(pack.each)
        pack.ended.unlink(missing_ok=True)
        argv = [*command(sweep, pack.shared, pack.each), f"--each={pack.each}"]
    for pull in pack.pulls:
        remember(pull, "assigned", params=pull.params)
    locks = [hold(pull, delay) for pull in pack.pulls]
    for pull in pack.pulls:
        pull.log_from = pull.log.stat().st_size if pull.log.exists() else 0
    with pack.log.open("ab") as log:
        pack.log_from = log.tell()
        try:
            pack.child = subprocess.Popen(
                argv,
                env=environment(sweep, pack, jobs),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                pass_fds=locks,
            )
        except OSError as error:
            raise UserError(f"{sweep.path}: command: cannot start {argv[0]}: {error.strerror}") from None
        finally:
            for lock in locks:
                os.close(lock)
    for pull in pack.pulls:
        pull.pid, pull.began, pull.status = pack.child.pid, time.monotonic(), "running"
    assert pack.child.stdin is not None
    pack.child.stdin.close()
    for pull in pack.pulls:
        remember(pull, "started", pid=pull.pid, argv=argv, slot=pack.slot)


def end_orphans(pulls: list[Pull], delay: int) -> None:
    """End what still runs of a killed agent, so that it and its next attempt do not write the same checkpoints."""
    left = [pull for pull in pulls if pull.pid is not None]
    with ThreadPoolExecutor() as pool:
        for lock in pool.map(lambda pull: hold(pull, delay), left):
            os.close(lock)


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

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max(1, cores() // 2)) as pool:
        tried = [part for part in parts if part.pulls]
        for number, complaint in enumerate(pool.map(words, range(len(tried)), tried)):
            # What is wrong with one is said of that one; what is too much together is served in smaller parts.
            if complaint and not tried[number].alone:
                several = [Pack([pull]) for pull in tried[number].pulls]
                complaint = next(filter(None, (words(number, one) for one in several)), None)
            if complaint:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"{sweep.path}: {complaint}")


# ---- all runs


def serve(sweep: Sweep, pulls: list[Pull], todo: list[Pack], jobs: int, delay: int) -> int:
    """Run `todo`, `jobs` processes at once, until none is left, they keep failing, or a signal comes.

    Returns 0, 1 (gave up because runs keep failing) or 128 + signal. `pulls` are all runs, for showing.
    """
    caught: list[tuple[int, float]] = []  # signal, time.monotonic()
    # A hangup that nohup made harmless stays so; Ctrl-C is heard even where a script's `&` had it ignored.
    heard = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        heard.append(signal.SIGHUP)

    def catch(signum: int, _: object) -> None:
        caught.append((signum, time.monotonic()))

    before = {signum: signal.signal(signum, catch) for signum in heard}
    waiting, running = deque(todo), list[Pack]()
    began, ended, failed, verdict = time.monotonic(), 0, 0, ""
    try:
        with board.Board(pulls) as shown:
            while (waiting or running) and not caught and not verdict:
                for pack in list(running):
                    code = pack.poll()  # before its news: after them, some could come unread
                    over = pack.settle()
                    if code is not None:
                        running.remove(pack)
                        if code in (console.EXIT_USER, -signal.SIGKILL) and pack.open and not pack.alone:
                            # Refused by the stage or killed by the system: too large together, or one run's mistake.
                            say(f"{len(pack.open)} runs ended together, served in smaller parts: {pack.last_error()}")
                            waiting.extendleft(reversed(pack.halves()))
                        over += pack.settle(code)
                    for pull in over:
                        line = (board.last_error if pull.status == "failed" else board.last_line)(
                            pull.log, pull.log_from
                        )
                        shown.tell(pull, f"{pull.status}  {board.clock(pull.seconds)}  {line}")
                    if failures := [pull for pull in over if pull.status == "failed"]:
                        # As the real agent, except that a diverged run (exit 3) or an interrupted one (143) does not
                        # count here: the first is a result that we came for, the second no fault of the run. Runs that
                        # fail with their process fail once.
                        failed += 1
                        line = board.last_error(failures[0].log, failures[0].log_from)
                        verdict = verdict or flapping(failed, ended, time.monotonic() - began, line)
                    ended += len(over)
                while waiting and len(running) < jobs and not caught and not verdict:
                    pack = waiting.popleft()
                    pack.slot = min(set(range(jobs)) - {other.slot for other in running})
                    running.append(pack)  # before it starts: what fails half-way is stopped too
                    start(sweep, pack, jobs, delay)
                    beside = "" if pack.alone else f"  (one of {len(pack.pulls)} in process {pack.pid})"
                    for pull in pack.pulls:
                        shown.tell(pull, f"started  {shown.labels[pull.index]}{beside}")
                shown.tick()
                time.sleep(POLL_SECONDS)
    finally:
        stop(running, delay, caught)
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if verdict:
        say(f"error: {sweep.path}: {verdict}")
        return 1
    return 128 + caught[0][0] if caught else 0


def flapping(failed: int, ended: int, seconds: float, line: str) -> str:
    """Why to give up after the `failed`-th failure, `ended` runs having ended before it; empty to go on."""
    watched = os.environ.get("WANDB_AGENT_DISABLE_FLAPPING") != "true"
    if watched and seconds < FLAPPING_SECONDS and failed >= FLAPPING_FAILURES:
        return f"{failed} runs failed within {FLAPPING_SECONDS} s, the sweep stops: {line}"
    text = os.environ.get("WANDB_AGENT_MAX_INITIAL_FAILURES", "")
    if failed >= ended and failed >= (int(text) if text.isdecimal() else INITIAL_FAILURES):
        return f"the first {failed} runs failed, the sweep stops: {line}"
    return ""


def stop(running: list[Pack], delay: int, caught: list[tuple[int, float]]) -> None:
    """Ask the running processes to save and end, kill them after `delay` seconds or a second Ctrl-C, and record it."""
    alive = [pack for pack in running if pack.child]
    for pack in alive:
        send(pack.pid, signal.SIGTERM)
    if alive:
        say(f"stopping {sum(len(pack.open) for pack in alive)} run(s): up to {delay} s to save, Ctrl-C again kills")
    until = time.monotonic() + delay
    while any(pack.poll() is None for pack in alive):
        # Two at once are one: `timeout` and some terminals signal both the process and its group.
        again = any(signum == signal.SIGINT and when > caught[0][1] + 1 for signum, when in caught)
        if again or time.monotonic() > until:
            for pack in alive:
                send(pack.pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    for pack in alive:
        pack.settle(pack.poll(), stopped=True)
