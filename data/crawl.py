"""From a source to clean documents on datatrove's executors: annotate, select, near-duplicates, clean text.

Every stage is a list of steps that datatrove runs as tasks, on this machine, by Slurm or by Ray. The tasks depend on
the source's files alone, every task writes under a temporary name, and datatrove's completion marks say what is done: a
build that was killed goes on where it stopped, and gives the same bytes with any number of workers.
"""

import collections
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import multiprocess
from loguru import logger

import console
from data import annotate, dedup, extract, overlap, profiles, select, sources
from data.progress import cores, progress, say

Stage = tuple[str, list[Any], int]
ROOT = Path(__file__).resolve().parents[1]
WATCH = 0.5  # seconds between two looks at the tasks' signs of life
MOST_TASKS = 100  # of the stages that look at the whole corpus: each of them reads all candidate pairs
WORTH_A_PROCESS = 64_000_000  # bytes that pay for one more process, or task, of the later stages

logger.disable("datatrove")  # a line a task on stderr; what matters is said by `watched` and by exceptions


@dataclass(frozen=True)
class Slurm:
    """How jobs are submitted; the names are sbatch's."""

    partition: str
    time: str
    mem_per_cpu_gb: int
    env_command: str


@dataclass(frozen=True)
class Job:
    """One crawl to process; `annotations` and `work` are the folders of the first stage and of the others."""

    source: str
    profile: profiles.Profile
    annotations: Path
    work: Path
    keep: bool  # annotate everything, so that the annotations serve other thresholds too
    whole: bool = False  # keep the text of what is dropped, too
    text_key: str = "text"
    id_key: str = "id"
    documents: int = 20_000
    seed: int = 0
    max_documents: int = 0
    eval_sets: tuple[str, ...] = ()
    eval_keys: tuple[str, ...] = ("text",)
    drop_contaminated: bool = False
    executor: Literal["local", "slurm", "ray"] = "local"
    workers: int = 0
    slurm: Slurm | None = None


def plan(job: Job) -> dict[str, Any]:
    """What the annotations of this job are made from: they serve another job exactly if its plan is the same."""
    return {
        "format": annotate.FORMAT,
        "source": job.source,
        "inputs": sources.inputs(job.source),
        "tasks": annotate.tasks(job.source, whole=bool(job.max_documents)),
        "text_key": job.text_key,
        "id_key": job.id_key,
        "documents": job.documents,
        "seed": job.seed,
        "max_documents": job.max_documents,
        "extractor": extract.EXTRACTOR,
        "words": {name: str(path) for name, path in job.profile.words.items()},
        "words_sha256": {name: digest(path) for name, path in job.profile.words.items()},
        "whole": job.whole or job.keep,
        "early": None if job.keep else profiles.describe(job.profile),
    }


def digest(path: str) -> str:
    """SHA-256 of a file, as hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def prepare(job: Job) -> int:
    """Write the plan, or check that the one there is the same; returns the number of tasks.

    Raises UserError where the annotations are of something else, and says what differs.
    """
    for name in ("documents", "seed", "max_documents", "workers"):
        if getattr(job, name) < 0:
            raise console.UserError(f"--{name} {getattr(job, name)}: 0 or more")
    path, wanted = job.annotations / "plan.json", json.loads(json.dumps(plan(job)))
    if path.is_file():
        there = annotate.read_plan(job.annotations)
        changed = [key for key in wanted if there.get(key) != wanted[key]]
        if changed and not job.keep:
            shutil.rmtree(job.work)  # what a build of something else left when it was killed
        elif changed:
            raise console.UserError(
                f"{job.annotations} was annotated from another {', '.join(changed)}: choose another folder or delete it"
            )
    elif job.annotations.exists() and any(p.name != ".lock" for p in job.annotations.iterdir()) and job.keep:
        raise console.UserError(f"{job.annotations} exists and holds no annotations: choose another folder")
    for folder in (job.annotations / "annotations", job.annotations / "progress"):
        folder.mkdir(parents=True, exist_ok=True)
    console.write_atomic(path, json.dumps(wanted, ensure_ascii=False).encode())
    return len(wanted["tasks"])


FOLDERS = ("decisions", "signatures", "buckets", "verified", "removed", "seconds", "documents", "logs")


def renew(job: Job) -> None:
    """Clear what another profile decided over the same annotations."""
    mark = job.work / "profile.json"
    decided_by = [profiles.describe(job.profile), job.eval_sets, job.eval_keys]
    wanted = json.dumps(decided_by, sort_keys=True).encode()
    if not mark.is_file() or mark.read_bytes() != wanted:
        for name in FOLDERS:
            shutil.rmtree(job.work / name, ignore_errors=True)
    for name in FOLDERS:
        (job.work / name).mkdir(parents=True, exist_ok=True)
    console.write_atomic(mark, wanted)


def stages(job: Job, tasks: int) -> list[Stage]:
    """The stages in order: name, steps, number of tasks. Of a small source one task finds the near-duplicates."""
    from datatrove.pipeline.dedup import MinhashDedupFilter

    size = sum(entry["bytes"] for entry in annotate.read_plan(job.annotations)["inputs"])
    folder, work, config = str(job.annotations.resolve()), str(job.work.resolve()), job.profile.dedup
    place: dict[str, Any] = {"folder": folder, "work": work}
    several = min(MOST_TASKS, 1 + size // WORTH_A_PROCESS)
    buckets: dict[str, Any] = {
        "signatures_folder": f"{work}/signatures",
        "buckets_folder": f"{work}/buckets",
        "config": config,
    }
    verify: dict[str, Any] = {
        "buckets_folder": f"{work}/buckets",
        "texts": f"{folder}/annotations",
        "signatures": f"{work}/decisions",
        "verified_folder": f"{work}/verified",
        "config": config,
    }
    cluster = dedup.cluster_step(config, f"{work}/verified", f"{work}/removed")
    clock = functools.partial(functools.partial, clocked, ledger=f"{work}/seconds")
    near: list[Stage] = [
        ("buckets", [clock(step=functools.partial(dedup.buckets, **buckets))], min(config.bands, several)),
        ("verify", [clock(step=functools.partial(dedup.verify, **verify))], several),
        ("cluster", [clock(step=cluster)], 1),
    ]
    write: dict[str, Any] = {
        "work": work,
        "profile": job.profile,
        "eval_sets": job.eval_sets,
        "eval_keys": job.eval_keys,
    }
    return [
        ("annotate", [functools.partial(annotate.annotate, folder=folder)], tasks),
        ("select", [functools.partial(select.select, **place, profile=job.profile)], tasks),
        *(near if several > 1 else [("cluster", [step for _, steps, _ in near for step in steps], 1)]),
        (
            "write",
            [
                functools.partial(select.rows, **place),
                MinhashDedupFilter(f"{work}/removed"),
                functools.partial(select.write, **write),
            ],
            tasks,
        ),
    ]


def begin(data: Any, rank: int, world_size: int, *, progress: str) -> None:
    """First step of a task on this machine: leave this process's id in the folder `progress`, for `watched`.

    A process that unpickles it imports this module, which stills datatrove's log.
    """
    del data, world_size
    follow_parent()
    Path(progress, f"{rank:05d}").write_text(f"{os.getpid()} 0")


def clocked(data: Any, rank: int, world_size: int, *, step: Callable[..., None], ledger: str) -> None:
    """`step`, with its CPU seconds left in the folder `ledger`."""
    begun = time.process_time()
    step(data, rank, world_size)
    name = getattr(step, "func", type(step)).__name__
    Path(ledger, f"{name}-{rank:05d}").write_text(f"{time.process_time() - begun:.4f}")


def run(job: Job, last: str = "write") -> None:
    """Run the stages up to `last` that are not done yet, with a line of progress for each."""
    tasks = prepare(job)
    if warning := profiles.extractor_differs(job.profile, extract.EXTRACTOR):
        say(warning)
    if last != "annotate":
        renew(job)
    todo = stages(job, tasks)
    todo = todo[: [name for name, _, _ in todo].index(last) + 1]
    workers = job.workers or cores()
    die_together()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # the buckets stage opens a file a task
    if job.executor == "ray":
        try:
            import ray
        except ModuleNotFoundError:
            raise console.UserError("--executor ray: ray is not installed: pip install ray") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it calls home
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        ray.init(ignore_reinit_error=True, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    for name, steps, number in todo:
        logs = logs_of(job, name)
        if job.executor == "ray":
            from datatrove.executor import RayPipelineExecutor

            executor: Any = RayPipelineExecutor(
                steps, tasks=number, workers=job.workers or -1, logging_dir=str(logs), mem_per_cpu_gb=1
            )
        else:
            from datatrove.executor import LocalPipelineExecutor

            # A process costs a second of imports: what is small is done in this one.
            most = workers if name == "annotate" else 1 + stored(job.annotations / "annotations") // WORTH_A_PROCESS
            first = functools.partial(begin, progress=str((job.annotations / "progress").resolve()))
            executor = LocalPipelineExecutor(
                [first, *steps], tasks=number, workers=min(workers, number, most), logging_dir=str(logs)
            )
        if executor.get_incomplete_ranks():
            with watched(job, name, number, logs):
                executor.run()
        if missing := executor.get_incomplete_ranks():  # Ray's executor only logs what failed
            where = logs / "logs" / f"task_{missing[0]:05d}.log"
            raise console.UserError(f"{name}: {len(missing)} of {number} tasks failed: see {where}, then run again")


def logs_of(job: Job, name: str) -> Path:
    """Where datatrove keeps the marks of a stage's finished tasks; those of annotations stay with the annotations."""
    return ((job.annotations if name == "annotate" else job.work) / "logs" / name).resolve()


def stored(folder: Path) -> int:
    """Bytes of the Parquet files in `folder`."""
    return sum(path.stat().st_size for path in folder.glob("*.parquet"))


@contextlib.contextmanager
def watched(job: Job, name: str, number: int, logs: Path) -> Iterator[None]:
    """Progress of a stage while the block runs: bytes where its tasks tell them, else tasks.

    A worker that was killed would be awaited for ever by its pool: then this process says so and ends.
    """
    plan = annotate.read_plan(job.annotations)
    spans = [annotate.Task(*task).end - annotate.Task(*task).begin for task in plan["tasks"]]
    in_bytes = name == "annotate" and sum(spans) > 0
    over = threading.Event()

    def look(live: bool) -> int:
        finished = [int(path.name) for path in (logs / "completions").glob("[0-9]*")]
        done = sum(spans[rank] for rank in finished) if in_bytes else len(finished)
        for path in (job.annotations / "progress").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                pid, at = path.read_text().split()
                if int(path.name) not in finished:
                    done += int(at)
                    if live and job.executor == "local" and not alive(int(pid)):
                        lost(int(path.name), name, logs, over)
        return done

    def watch() -> None:
        seen = 0
        with progress(name, sum(spans) if in_bytes else number, "bytes" if in_bytes else "tasks") as advance:
            while True:
                ended = over.wait(WATCH)
                now = look(live=not ended)
                advance(max(0, now - seen))
                seen = max(seen, now)
                if ended:
                    return

    for path in (job.annotations / "progress").glob("[0-9]*"):
        path.unlink(missing_ok=True)
    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def alive(pid: int) -> bool:
    """Whether a process of this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def lost(rank: int, name: str, logs: Path, over: threading.Event) -> None:
    """End this process because the one that ran task `rank` is gone, unless task or stage are done after all."""
    if not over.wait(5.0) and not (logs / "completions" / f"{rank:05d}").exists():
        say(
            f"error: {name}: the process of task {rank} was killed (out of memory?): run the same command again, "
            "with fewer --workers if memory was short; finished tasks are kept"
        )
        os._exit(1)


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Hold `work` for this build alone. Raises UserError while another one has it."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("wb") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX: not inherited by what a killed build left running
        except OSError:
            raise console.UserError(
                f"another build is at work in {work}: wait for it, or choose another --out"
            ) from None
        yield


@functools.cache
def follow_parent() -> None:
    """In a pool's process: end with the build. The server that forked it waits for its children instead."""
    if (parent := multiprocess.parent_process()) is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, name="follow-parent", daemon=True).start()


@functools.cache
def die_together() -> None:
    """Let the kernel end what this process forks together with it (Linux): datatrove's manager process."""
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        os.register_at_fork(after_in_child=lambda: prctl(1, signal.SIGKILL))  # 1: PR_SET_PDEATHSIG


class Contaminated(NamedTuple):
    """A clean document that holds evaluation items: its characters, and the items."""

    characters: int
    hits: list[overlap.Hit]


def contaminated(job: Job) -> dict[tuple[int, int], Contaminated]:
    """By (task, row), the clean documents that hold evaluation items, common phrases left out."""
    found: dict[int, list[overlap.Hit]] = collections.defaultdict(list)
    characters = {}
    for path in sorted((job.work / "documents").glob("[0-9]*.json")):
        for row, length, hit in json.loads(path.read_bytes())["hits"]:
            place = int(path.stem) << 32 | row
            characters[place] = length
            found[place].append(overlap.Hit(**hit))
    settled = overlap.settled(found, overlap.Rules().common)
    return {(at >> 32, at & 0xFFFFFFFF): Contaminated(characters[at], hits) for at, hits in settled.items()}


def documents(job: Job) -> Iterator[sources.Document]:
    """The clean documents in the source's order, without contaminated ones if the job drops them."""
    import pyarrow.parquet as pq

    dropped = contaminated(job) if job.drop_contaminated else {}
    for path in sorted((job.work / "documents").glob("[0-9]*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group).to_pylist():
                    if (int(path.stem), row["row"]) not in dropped:
                        yield sources.Document(row["id"], row["text"], {"url": row["url"]} if row["url"] else {})
