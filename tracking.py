"""The one module that writes to wandb: a run's start, its rows, tables, artifacts and its end.

Tracking may never kill or stall a run that somebody pays for. wandb's core is another process: when it dies, `log` and
`finish` raise ConnectionResetError; when it hangs, they block for ever (after 775 rows, measured on 0.31). So every
call is made by one background thread from a bounded queue, and what W&B cannot take is counted and said, not awaited.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import console

ROWS_WAITING = 20_000  # rows held for a core that does not answer; then the newest are dropped and counted
FINISH_SECONDS = {"offline": 60.0, "online": 600.0}  # an upload may take minutes; writing a file may not
INIT_SECONDS = 60.0  # for a server that does not answer, before the run goes on offline
PROJECT = "llm-gacha"
MODES = ("online", "offline", "shared", "disabled")
LIBRARIES = ("torch", "numpy", "transformers", "wandb", "sentencepiece", "tokenizers", "safetensors")


def recipe_hash(config: Mapping[str, Any], leave_out: frozenset[str]) -> str:
    """Eight hex digits of a configuration without its seeds (and other fields of `leave_out`): the sweep's group."""
    kept = {key: value for key, value in sorted(config.items()) if key not in leave_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


@functools.cache
def git_commit() -> str:
    """Commit of this checkout, with `+` when tracked files differ from it; `unknown` outside git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here, capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()[:12] + ("+" if dirty.returncode else "")


def cpu_name() -> str:
    """Model name of the processor and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} x {cores}"


@functools.cache
def say_once(line: str) -> None:
    """A line on stderr, once in a process: several runs share what it tells of."""
    print(line, file=sys.stderr, flush=True)


class Tracker:
    """One W&B run. Made by `start`; every method returns at once, `finish` within FINISH_SECONDS."""

    core_hangs = False  # all runs of a process share one core: when it hung for one, the others do not wait again

    def __init__(self, run: Any, mode: str) -> None:
        self.run, self.mode = run, mode
        self.id: str = run.id
        self.jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=ROWS_WAITING)
        self.dropped = 0
        self.stuck = False
        self.complaint = ""
        self.thread = threading.Thread(target=self._work, name="wandb-writer", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # whatever wandb raises, the run that is paid for goes on
                self.dropped += 1
                if not self.complaint:
                    self.complaint = f"{type(error).__name__}: {error}"
                    say_once(f"W&B stopped taking records, the run goes on ({self.complaint})")

    def _do(self, job: Callable[[], None]) -> None:
        try:
            self.jobs.put_nowait(job)
        except queue.Full:
            self.dropped += 1

    def log(self, row: dict[str, Any], step: int) -> None:
        """One row of history; `step` is our own global step, since offline W&B restarts its own at 0 on resume."""
        self._do(lambda: self.run.log(row, step=step))

    def summary(self, values: dict[str, Any]) -> None:
        self._do(lambda: self.run.summary.update(values))

    def table(self, name: str, columns: list[str | int], rows: list[list[Any]], step: int) -> None:
        import wandb

        self._do(lambda: self.run.log({name: wandb.Table(columns=columns, data=rows)}, step=step))

    def page(self, name: str, path: Path, step: int) -> None:
        """A self-contained HTML page, shown by W&B as it is. A copy of it goes into the run's files."""
        import wandb

        self._do(lambda: self.run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False)}, step=step))

    def alert(self, title: str, text: str) -> None:
        self._do(lambda: self.run.alert(title=title, text=text))

    def artifact(self, name: str, kind: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        """Files and folders as a W&B artifact by reference: they stay where they are, nothing is copied or uploaded."""
        import wandb

        def job() -> None:
            artifact = wandb.Artifact(name, type=kind, metadata=metadata)
            for path in paths:
                artifact.add_reference(path.resolve().as_uri(), name=path.name, checksum=False)
            self.run.log_artifact(artifact)

        self._do(job)

    def use_artifact(self, name: str) -> None:
        """Draw lineage in W&B where a server can resolve it; offline wandb raises, and config["lineage"] has it."""

        def job() -> None:
            # The server has it only if the stage that made it ran online: no loss, and nothing to tell of.
            with contextlib.suppress(Exception):
                self.run.use_artifact(name)

        if self.mode == "online":
            self._do(job)

    def mark_preempting(self) -> None:
        self._do(lambda: self.run.mark_preempting())

    def finish(self, exit_code: int) -> None:
        """End the run with its exit code. If W&B does not answer in time, says so and sets `stuck`."""
        self._do(lambda: self.run.finish(exit_code=exit_code))
        with contextlib.suppress(queue.Full):
            self.jobs.put(None, timeout=1.0)
        self.thread.join(0.1 if Tracker.core_hangs else FINISH_SECONDS[self.mode])
        self.stuck = Tracker.core_hangs = self.thread.is_alive()
        if self.stuck or self.dropped:
            # wandb's exit hook would wait for a hung core without end, and print a traceback over a dead one.
            console.skip_exit_hooks = True
            lost = f"{self.dropped} records were lost" if self.dropped else "it did not answer at the end"
            print(f"W&B: {lost}; the run itself is complete on disk", file=sys.stderr, flush=True)


def has_key(settings: Any) -> bool:
    """Whether wandb would find a key for the server of its `settings` without asking for one."""
    from wandb.sdk.lib.wbauth import wbnetrc

    named = any(os.environ.get(key) for key in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    return named or wbnetrc.read_netrc_auth(host=settings.base_url) is not None


def start(
    stage: str,
    config: dict[str, Any],
    *,
    name: str,
    recipe: str,
    tags: list[str],
    x_axis: Literal["tokens", "step"] | None,
    run_id: str | None = None,
    sweep_params: Path | None = None,
    alone: bool = True,
    lineage: dict[str, Any] | None = None,
    hardware: str | None = None,
    project: str = PROJECT,
    entity: str | None = None,
) -> Tracker:
    """Open the W&B run of one stage with the house's records: group = recipe, job_type = stage, x axis, lineage.

    WANDB_MODE is respected. With no mode and no key the run is offline, said once; a server that does not answer makes
    it offline too. Never a prompt. `run_id` continues a run of that id (a resumed pull).

    A process may open several runs, each with `alone` False. In a sweep W&B knows one run per process, by environment;
    `sweep_params` (a file of `save_sweep_params`) makes this run the sweep's run `run_id` with these parameters.
    """
    # Without this, wandb 0.31 sends its own error telemetry, and looks its server up in DNS, in offline mode too.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    wanted = os.environ.get("WANDB_MODE")
    if wanted and wanted not in MODES:
        raise console.UserError(f"WANDB_MODE={wanted}: choose {', '.join(MODES)}")
    import wandb

    known = wandb.setup().settings
    chosen = wanted or (known.mode if known.mode != "online" else None)
    keyed = has_key(known)
    mode: Any = chosen or ("online" if keyed else "offline")
    if not chosen and not keyed:
        say_once("W&B: no key and no WANDB_MODE, so this run is recorded offline (wandb sync sends it later)")

    commit = git_commit()
    record = {
        **config,
        "stage": stage,
        "recipe": recipe,
        "git_commit": commit,
        "hardware": hardware or cpu_name(),
        "versions": {"python": platform.python_version()} | {lib: _version(lib) for lib in LIBRARIES},
        "lineage": lineage or {},
    }
    arguments: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT") or project,
        "entity": os.environ.get("WANDB_ENTITY") or entity,
        "config": record,
        "group": os.environ.get("WANDB_RUN_GROUP") or recipe,
        "job_type": stage,
        "name": name,
        "tags": [*tags, f"commit:{commit}"],
        "reinit": "default" if alone else "create_new",
    }
    sweep_id = os.environ.get("WANDB_SWEEP_ID")
    if sweep_id and not alone and not sweep_params:
        raise console.UserError(
            "several pulls in one process, but W&B's agent counts a process as one run: list the seeds in the sweep's "
            "own parameters (gacha run packs them into one process)"
        )
    if run_id and (sweep_params or not sweep_id):
        arguments |= {"id": run_id, "resume": "allow"}

    def open_run(mode: Any) -> Any:
        session = wandb.setup()
        # A default flush of 15 s loses a killed run's tail; the field's name is checked so that a rename is noticed.
        settings = wandb.Settings(x_transaction_log_flush_interval=1.0, init_timeout=INIT_SECONDS)
        if not alone:
            settings.console = "off"  # it would catch what all runs say
        if session.most_recent_active_run is not None:
            settings.x_disable_stats = True  # of the machine, as the first run has them
            settings.x_save_requirements = False  # 0.1 s for a list that the first run has
        if sweep_params:
            # Under a sweep of the session's, wandb ignores the run's id and locks the session's parameters into it. The
            # file is read at each init; the sweep's id is taken from the run as well.
            session.settings.sweep_id, session.settings.sweep_param_path = None, str(sweep_params)
            settings.sweep_id = sweep_id
        return wandb.init(mode=mode, settings=settings, **arguments)

    try:
        run = open_run(mode)
    except Exception as error:
        if mode != "online":
            raise console.UserError(
                f"W&B cannot record this run ({error}): set WANDB_DIR to a folder that can be written, "
                "or WANDB_MODE=disabled to go without a record"
            ) from None
        say_once(f"W&B: no answer from the server, recorded offline instead ({error})")
        if wandb.setup().most_recent_active_run is None:
            wandb.teardown()
        mode = os.environ["WANDB_MODE"] = "offline"  # the next run of this process does not wait again
        run = open_run(mode)
    if x_axis:
        run.define_metric(x_axis)
        run.define_metric("*", step_metric=x_axis)
        run.define_metric("val/loss", step_metric=x_axis, summary="min")
    return Tracker(run, "online" if mode in ("online", "shared") else "offline")


# ---- sweeps: wandb's own expansion of a command and its own parameter file, for gacha/agent.py; a copy would drift


def sweep_argv(command: list[Any] | None, program: str, params: dict[str, Any], json_path: Path) -> list[str]:
    """The argv of one run, as wandb_agent.Agent._command_run builds it; `command` None is W&B's default.

    Writes `json_path` if the command asks for ${args_json_file}. An unknown macro is dropped, as the real agent does.
    """
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    # A copy: create_sweep_command fills ${envvar:...} in place.
    template = create_sweep_command(list(command) if command else None)
    macros = create_sweep_command_args({"args": wrapped(params)})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [program]}
    macros |= {"args_json_file": [str(json_path)]}
    if "${args_json_file}" in template:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(macros["args_json"][0], encoding="utf-8")
    argv: list[str] = []
    for chunk in map(str, template):
        is_macro = chunk.startswith("${") and chunk.endswith("}")
        argv += macros.get(chunk[2:-1], []) if is_macro else [chunk]
    return argv


def save_sweep_params(path: Path, params: dict[str, Any]) -> None:
    """Write the file that WANDB_SWEEP_PARAM_PATH names, from which `wandb.init` fills and locks run.config."""
    from wandb.sdk.lib.config_util import save_config_file_from_dict

    save_config_file_from_dict(os.fspath(path), wrapped(params))


def optuna_scheduler(sweep_id: str, definition: dict[str, Any]) -> Any:
    """wandb's ask-and-tell optimizer over Optuna for a sweep definition; whatever is wrong with its `source` raises."""
    from wandb.sdk.sweeps.scheduler.optuna import build_optuna_optimizer
    from wandb.sdk.sweeps.sweep_info import SweepInfo

    named = {key: definition.get(key, "") for key in ("name", "entity", "project")}
    return build_optuna_optimizer(SweepInfo(id=sweep_id, config=definition, controller_run_name="", **named))


def scheduler_run(params: dict[str, Any], state: str, metrics: dict[str, float]) -> Any:
    """A run as wandb's optimizers are told of it; `state` is one of W&B's, `metrics` its summary."""
    from wandb.sdk.sweeps.run_state import RunState
    from wandb.sdk.sweeps.scheduler.optimizer import RunConfig, RunWithMetrics

    return RunWithMetrics(RunConfig.from_values(params), RunState(state), "", metrics, [])


def wrapped(params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`params` as W&B sends them to agents: every top-level value under the key `value`."""
    return {name: {"value": value} for name, value in params.items()}


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
