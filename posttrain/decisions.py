"""What the stages that make data share: the run in W&B, every decision with its reason, and the files at the end.

A stage asks its teacher in an order that depends on the answers alone, and always from the beginning: after a kill the
answers come from the cache, and every file is written again with the same bytes.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import console
import tracking
from posttrain.teacher import NOT_RECIPE, Teacher, TeacherConfig, is_url

INPUTS = frozenset({"seed_tasks", "data"})  # paths; what lies there enters the recipe as a fingerprint
TABLE_ROWS = 500  # in one portion of the W&B table
COLUMNS: list[str | int] = ["step", "what", "text", "kept", "reason", "nearest", "score", "note"]


def fingerprint(path: Path) -> str:
    """hex16 of a file's bytes. Raises UserError where it is not one file."""
    if not path.is_file():
        raise console.UserError(f"{path}: give one file that lies on this machine, so that its bytes can be recorded")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def done(c: TeacherConfig, stage: str, fed: dict[str, str]) -> dict[str, Any] | None:
    """The result of the same command where it has ended before. Raises UserError where OUT holds another's."""
    path = Path(c.out) / "result.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_bytes())
    if result["asked_for"] != asked_for(c, stage, fed):
        raise console.UserError(f"--out {c.out} holds the result of another configuration: give another folder")
    return result


def asked_for(c: TeacherConfig, stage: str, fed: dict[str, str]) -> str:
    """hex8 of a command and what it is `fed`, seed included; an endpoint may have moved to another address."""
    named = {"stage": stage, "local": "" if is_url(c.teacher) else c.teacher, **fed}
    return tracking.recipe_hash({**dataclasses.asdict(c), **named}, leave_out=NOT_RECIPE | INPUTS)


class Record:
    """One run of a stage that makes data, to be used as a context.

    `fed` are the fingerprints of what the stage reads, `shown` how many decisions W&B gets; OUT/decisions.jsonl has
    them all. The W&B run is continued by the next start of the same command.
    """

    def __init__(
        self, stage: str, c: TeacherConfig, seed: int, teacher: Teacher, fed: dict[str, str], shown: int
    ) -> None:
        self.stage, self.c, self.seed, self.teacher, self.fed = stage, c, seed, teacher, fed
        self.shown, self.step = shown, 0
        self.config = dataclasses.asdict(c) | {"teacher_id": teacher.id}
        whole = {"stage": stage, **self.config, **fed}
        self.recipe = tracking.recipe_hash(whole, leave_out=NOT_RECIPE | INPUTS | {"seed", "shown"})
        self.counts: Counter[str] = Counter()
        self.rows: list[list[Any]] = []
        self.folder = Path(c.out)

    def __enter__(self) -> "Record":
        identity = self.folder / "wandb_run"
        run_id = identity.read_text() if identity.is_file() else None
        lineage = {"teacher": self.teacher.id, **self.fed}
        name = f"{self.recipe}-s{self.seed}"
        more: dict[str, Any] = {"tags": ["synthetic"], "x_axis": "step", "run_id": run_id, "lineage": lineage}
        self.tracker = tracking.start(self.stage, self.config, name=name, recipe=self.recipe, **more)
        console.write_atomic(identity, self.tracker.id.encode())
        self.tracker.summary({"status": "stopped"})
        # Not atomic: it tells of a run under way, and the next start writes it anew.
        self.file = (self.folder / "decisions.jsonl").open("w", encoding="utf-8", errors="replace")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.file.close()
        self.tracker.summary(self.costs())
        if kind is None:
            self.tracker.summary({"status": "ok"})
        elif issubclass(kind, console.UserError):
            self.tracker.summary({"stop_reason": str(error)})
        elif issubclass(kind, Exception):
            self.tracker.summary({"status": "crashed"})
        code = 0 if kind is None else console.EXIT_USER if issubclass(kind, console.UserError) else 1
        self.tracker.finish(code)

    def decide(
        self, what: str, text: str, reason: str, nearest: str = "", score: float | None = None, note: str = ""
    ) -> None:
        """One decision about a `what` (instruction, instance, ...): kept where `reason` is empty."""
        self.counts[f"{what}/{reason or 'kept'}"] += 1
        value = None if score is None else round(score, 4)
        row = [self.step, what, text, not reason, reason, nearest, value, note]
        self.file.write(json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n")
        if self.shown:
            self.shown -= 1
            self.rows.append(row)

    def end_step(self) -> None:
        """Log counts and costs so far, and a portion of the table when there is one."""
        self.file.flush()
        self.step += 1
        counts = {f"decisions/{name}": count for name, count in sorted(self.counts.items())}
        self.tracker.log({"step": self.step, **counts, **self.costs()}, step=self.step)
        if len(self.rows) >= TABLE_ROWS:
            self._show()

    def _show(self) -> None:
        if self.rows:
            self.tracker.table("decisions", COLUMNS, self.rows, step=self.step)
            self.rows = []

    def costs(self) -> dict[str, Any]:
        """cost/* of all that the result rests on, and what this process alone asked for as teacher/*."""
        ledger = self.teacher.ledger
        session = {f"teacher/{name}": value for name, value in ledger.session().items()}
        return {f"cost/{name}": value for name, value in ledger.total().items()} | session

    def finish(self, files: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """Write `files` (name to rows), manifest.json and result.json; returns the result."""
        for name, rows in files.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            console.write_atomic(self.folder / name, lines.encode("utf-8", "replace"))
        self.end_step()
        self._show()
        counts = dict(sorted(self.counts.items()))
        kept = {name: value for name, value in self.config.items() if name not in NOT_RECIPE | INPUTS}
        manifest = {
            "stage": self.stage,
            "recipe": self.recipe,
            "config": kept,
            "lineage": {"teacher": self.teacher.id, **self.fed},
            "files": {
                name: {"sha256": hashlib.sha256((self.folder / name).read_bytes()).hexdigest(), "rows": len(rows)}
                for name, rows in files.items()
            },
            "decisions": counts,
            "answers": self.teacher.ledger.total(),
            "currency": self.c.currency,
        }
        console.write_atomic(
            self.folder / "manifest.json", (json.dumps(manifest, ensure_ascii=False, indent=1) + "\n").encode()
        )
        paths = [self.folder / name for name in (*files, "decisions.jsonl", "manifest.json")]
        self.tracker.artifact(f"{self.stage}-{self.recipe}-s{self.seed}", "dataset", paths, manifest)
        sizes = {name: len(rows) for name, rows in files.items()}
        total = self.teacher.ledger.total()
        result = {"out": str(self.folder), **sizes, **counts, **total, "currency": self.c.currency}
        result |= {"asked_for": asked_for(self.c, self.stage, self.fed)}
        console.write_atomic(self.folder / "result.json", (json.dumps(result, ensure_ascii=False) + "\n").encode())
        return result
