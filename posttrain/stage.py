"""What every post-training stage shares: one run's folder, W&B record, guard and clock.

A run lives in OUT/[SWEEP/]RECIPE-sSEED. The same command finds it again: a killed run goes on from its last checkpoint,
a finished one says so. model/ is what came out, best/ the weights of the best evaluation.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import console
import tracking
from posttrain import answers, forgetting, models
from posttrain.guard import Guard, Verdict
from posttrain.limits import Limits
from posttrain.rows import load_rows
from posttrain.settings import NOT_RECIPE, SEEDS
from pretrain import causal_lm
from pretrain.pull import EXIT_CODE, home

SAY_SECONDS = 5.0  # between lines of progress
SAMPLES_SHOWN = 16  # rows of the table of answers
KL_PROMPTS = 16
TEST_SEED = 7  # of the answers sampled to measure a model: the same for every run, so that a model is measured once


def digest(facts: Any) -> str:
    """hex16 of anything that is JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def file_fingerprint(source: str | None) -> str | None:
    """hex16 of a data source: of its bytes where it is one file, else of its name."""
    if source is None:
        return None
    path = Path(source)
    raw = path.read_bytes() if path.is_file() else source.encode()
    return hashlib.sha256(raw).hexdigest()[:16]


def model_fingerprint(path: Path) -> str:
    """hex16 of a model's weights and settings, or of an adapter's."""
    if (path / models.ADAPTER).is_file():
        raw = (path / "adapter_model.safetensors").read_bytes() + (path / models.ADAPTER).read_bytes()
        return hashlib.sha256(raw).hexdigest()[:16]
    return causal_lm.fingerprint(path)


@dataclass
class HeldOut:
    """Prompts and references of a held-out task."""

    prompts: list[Any]
    references: list[str]
    source: str


def held_out(source: str | None, items: int) -> HeldOut | None:
    """The first `items` rows (0: all) of {prompt, reference}. Raises UserError where a row has no reference."""
    if source is None:
        return None
    rows = load_rows(source, "prompt")
    if "reference" not in rows.column_names:
        raise console.UserError(f"{source}: rows have no reference to be measured by: add one to each")
    count = min(items or len(rows), len(rows))
    some = rows.select(range(count))
    for number, reference in enumerate(some["reference"], 1):
        if not isinstance(reference, str) or not reference.strip():
            raise console.UserError(f"{source}: row {number} has no reference text: add one, or remove the row")
    return HeldOut(list(some["prompt"]), list(some["reference"]), source)


@dataclass
class Run:
    """One run of a stage: opened by `open_run`, told of every row, closed by `close`."""

    stage: str
    c: Any
    name: str
    recipe: str
    folder: Path
    guard: Guard
    lineage: dict[str, Any]
    steps: int
    start: Path
    watch: HeldOut | None = None
    test: HeldOut | None = None

    tracker: Any = None
    reference: Any = None
    """dpo, kto: the start model beside the one that is trained; None where that is this one without its adapter"""
    lock: TextIO | None = None
    step: int = 0
    seconds: float = 0.0
    tokens: float = 0.0
    began: float = field(default_factory=time.monotonic)
    next_line: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None
    stop_signals: list[int] = field(default_factory=list)
    result: dict[str, Any] | None = None
    last: dict[str, float] = field(default_factory=dict)

    # --- begin -----------------------------------------------------------------------------------------------------
    @property
    def code(self) -> int:
        """Exit code of a run that has ended."""
        assert self.result
        return EXIT_CODE[self.result["status"]]

    def claim(self) -> None:
        """Take the folder. Of a run that has ended before, `result` is set and printed. Raises UserError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise console.UserError(f"--out {self.c.out}: no folder can be made there ({error.strerror})") from None
        self.lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise console.UserError(
                f"{self.folder} is being trained by another process: wait for it, or change --out"
            ) from None
        known = self.folder / "lineage.json"
        # The start model is not in the folder's name, so that a recipe's seeds may each have their own.
        if known.is_file() and json.loads(known.read_bytes())["model"] != self.lineage["model"]:
            raise console.UserError(f"{self.folder} began from another --model: change --out, or remove it")
        console.write_atomic(known, json.dumps(self.lineage).encode())
        if (self.folder / "result.json").is_file():
            self.result = json.loads((self.folder / "result.json").read_bytes())
            print(f"{self.folder} is already {self.result['status']}: remove it to train again", file=sys.stderr)
            console.print_result({k: v for k, v in self.result.items() if v is not None}, as_json=self.c.json)

    def open(self, tags: list[str]) -> None:
        """Start the W&B run, or go on with the killed one's."""
        state = self.state_of(self.checkpoint)
        known = self.folder / "wandb_id"
        self.tracker = tracking.start(
            self.stage,
            {
                **dataclasses.asdict(self.c),
                "limits": dataclasses.asdict(self.guard.limits),
                "control": getattr(self.c, "random_weights", False),  # what the report sets apart
            },
            name=self.name,
            recipe=self.recipe,
            tags=tags,
            x_axis="step",
            run_id=known.read_text() if known.is_file() else None,
            lineage=self.lineage,
        )
        console.write_atomic(known, self.tracker.id.encode())
        if state:
            self.guard = Guard(**state["guard"])
            self.before, self.step = state["before"], state["step"]
            self.seconds, self.tokens = state["seconds"], state["tokens"]
            self.say(f"goes on from step {self.step}")
        for key in ("model", "data"):
            self.tracker.use_artifact(f"{key}-{self.lineage[key]}:latest")

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint that is complete, to go on from."""
        found = [path for path in (self.folder / "checkpoints").glob("checkpoint-*") if (path / "run.json").is_file()]
        return max(found, key=models.step_of, default=None)

    @staticmethod
    def state_of(checkpoint: Path | None) -> dict[str, Any] | None:
        return json.loads((checkpoint / "run.json").read_bytes()) if checkpoint else None

    def save_state(self, checkpoint: Path) -> None:
        """Write beside a checkpoint what makes the run go on as if it had not stopped; last, since it completes it."""
        state = {"guard": self.guard.state(), "before": self.before, "step": self.step}
        state |= {"seconds": self.spent(), "tokens": self.tokens}
        console.write_atomic(checkpoint / "run.json", json.dumps(state).encode())

    # --- while it runs ---------------------------------------------------------------------------------------------
    def spent(self) -> float:
        """Device seconds paid for, by killed processes too."""
        return self.seconds + time.monotonic() - self.began

    def say(self, line: str) -> None:
        print(f"{self.stage} {self.name}: {line}", file=sys.stderr, flush=True)

    def log(self, row: Mapping[str, float]) -> None:
        """One row of history at the present step, which the guard hears too."""
        self.last |= row
        self.tracker.log({"step": self.step, **row}, step=self.step)
        heard = {key.replace("watch/", "eval/", 1): value for key, value in row.items() if not key.startswith("eval/")}
        verdict = self.guard.observe(self.step, heard)
        if verdict and not self.verdict:
            self.verdict = verdict
            self.say(str(verdict))
            self.tracker.alert(f"{self.name}: {verdict.kind}", str(verdict))
        if time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + SAY_SECONDS
            shown = ("train/loss", "reward/mean", "policy/kl", f"watch/{self.c.judge}")
            facts = "  ".join(f"{key.rpartition('/')[2]} {self.last[key]:.4g}" for key in shown if key in self.last)
            rate = self.step / max(self.spent(), 1e-9)
            left = (self.steps - self.step) / rate if rate else 0.0
            self.say(f"step {self.step}/{self.steps}  {facts}  eta {left // 60:.0f}:{left % 60:02.0f}")

    def look(self, model: Any, tokenizer: Any) -> None:
        """Measure the watched items, let the guard judge, and keep the weights if they are the best so far."""
        if self.watch is None:
            return
        told = self.scored(model, tokenizer, self.watch)
        row = {f"watch/{name}": value for name, value in told.items()}
        if self.stage in ("dpo", "kto") and self.step:
            # TRL's trainers of preferences do not say how far what the model writes has moved.
            some = self.watch.prompts[:KL_PROMPTS]
            reference = self.reference
            row["policy/kl"] = answers.sampled_kl(model, reference, tokenizer, some, self.c.max_new_tokens, self.step)
        self.log(row)
        if self.guard.best_step == self.step:
            self.keep(model, tokenizer, self.folder / "best")

    def scored(self, model: Any, tokenizer: Any, held: Any) -> dict[str, float]:
        """The scores of a look, by their bare names."""
        return answers.measure(model, tokenizer, held.prompts, held.references, self.c.max_new_tokens)[0]

    def keep(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Save the model as others are to open it."""
        save_model(model, tokenizer, folder)

    def reopen(self, folder: Path) -> tuple[Any, Any]:
        """What `keep` saved."""
        return models.load(folder)

    def measure(self, model: Any, tokenizer: Any, fingerprint: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Scores on the test items and bits per byte of the base's corpus. The same model is measured once."""
        told: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        c = self.c
        if self.test:
            asked = {"model": fingerprint, "data": file_fingerprint(self.test.source), "samples": c.samples}
            asked |= {"items": len(self.test.prompts), "max_new_tokens": c.max_new_tokens, "device": c.device}
            known = Path(c.out) / ".scores" / f"{digest(asked)}.json"
            if known.is_file():
                told, rows = json.loads(known.read_bytes())
            else:
                self.say(f"measures {len(self.test.prompts)} test items")
                told, rows = answers.measure(
                    model, tokenizer, self.test.prompts, self.test.references, c.max_new_tokens, c.samples, TEST_SEED
                )
                known.parent.mkdir(parents=True, exist_ok=True)
                console.write_atomic(known, json.dumps([told, rows], ensure_ascii=False).encode())
        told = {f"eval/{name}": value for name, value in told.items()}
        if c.base_data:
            told["base/bpb"] = forgetting.base_bpb(model, c.base_data, c.base_tokens)
        return told, rows

    # --- end -------------------------------------------------------------------------------------------------------
    def close(self, model: Any, tokenizer: Any) -> int:
        """Write model/, measure it, record everything. Returns the exit code."""
        lost = self.verdict is not None and self.c.on_verdict != "ignore"
        if self.stop_signals:
            self.tracker.summary({"status": "stopped", "step": self.step, **self.costs()})
            self.tracker.mark_preempting()
            self.tracker.finish(128 + self.stop_signals[0])
            self.say(f"stopped at step {self.step}; the same command goes on")
            return 128 + self.stop_signals[0]
        status = "ok"
        if self.verdict:
            status = "diverged" if self.c.on_verdict == "stop" else "spiked"
        best = self.folder / "best"
        if lost and self.c.on_verdict == "rollback" and best.is_dir():
            model, tokenizer = self.reopen(best)
            model.to(self.c.device)
            self.say(f"goes back to its best weights, of step {self.guard.best_step}")
        self.keep(model, tokenizer, self.folder / "model")
        after, rows = self.measure(model, tokenizer, model_fingerprint(self.folder / "model"))
        kind = self.verdict.kind if self.verdict else None
        summary: dict[str, Any] = {
            "status": status,
            "stop_reason": kind,
            "verdict": str(self.verdict) if self.verdict else None,
            "best_step": self.guard.best_step,
            "step": self.step,
            **{f"eval_before/{k.removeprefix('eval/')}": v for k, v in self.before.items() if k.startswith("eval/")},
            **({"base/bpb_before": self.before["base/bpb"]} if "base/bpb" in self.before else {}),
            **after,
            **self.costs(),
        }
        # W&B's summary takes the last row's values: these are the same.
        self.tracker.log({"step": self.step, **after}, step=self.step)
        if rows:
            columns: list[str | int] = ["prompt", "reference", "answer", "exact"]
            shown = [[row[str(key)] for key in columns] for row in rows[:SAMPLES_SHOWN]]
            self.tracker.table("samples", columns, shown, self.step)
        if self.guard.events:
            cells = [[e.step, e.kind, json.dumps(e.evidence), e.recovered_step] for e in self.guard.events]
            self.tracker.table("guard/events", ["step", "kind", "evidence", "recovered_step"], cells, self.step)
        self.tracker.summary({key: value for key, value in summary.items() if value is not None})
        self.tracker.artifact(
            f"model-{model_fingerprint(self.folder / 'model')}", "model", [self.folder / "model"], self.lineage
        )
        events = [dataclasses.asdict(event) for event in self.guard.events]
        console.write_atomic(self.folder / "guard.json", json.dumps(events, indent=1).encode())
        self.result = {"name": self.name, "model": str(self.folder / "model"), **summary}
        console.write_atomic(self.folder / "result.json", json.dumps(self.result, ensure_ascii=False).encode())
        code = EXIT_CODE[status]
        self.tracker.finish(code)
        console.print_result({k: v for k, v in self.result.items() if v is not None}, as_json=self.c.json)
        return code

    def costs(self) -> dict[str, float | str]:
        seconds = self.spent()
        return {
            "cost/device_seconds": seconds,
            "cost/money": seconds / 3600 * self.c.price_per_hour,
            "cost/tokens": self.tokens,
        }


def open_run(
    stage: str,
    c: Any,
    start: Path,
    steps: int,
    extra: Mapping[str, Any] | None = None,
    kind: type[Run] = Run,
    read: Callable[[str | None, int], Any] = held_out,
) -> Run:
    """The run of `stage` with configuration `c`, its folder claimed and its W&B run open, or ended before (`result`).

    extra: facts that make another recipe beside the configuration. kind, read: of a stage whose held-out rows are not
    prompts to be answered.
    """
    limits = Limits()
    fed = {f"{key}_fingerprint": file_fingerprint(getattr(c, key)) for key in ("data", "watch_data", "test_data")}
    config = dataclasses.asdict(c)
    recipe = tracking.recipe_hash({"stage": stage, **config, **fed, **(extra or {})}, leave_out=NOT_RECIPE)
    others = {name[0]: config[name] for name in sorted(SEEDS) if config[name] != c.seed}
    name = f"{recipe}-s{c.seed}" + "".join(f"-{letter}{seed}" for letter, seed in others.items())
    parent = next((place for place in (start.parent, start) if (place / "result.json").is_file()), None)
    lineage = {
        "model": model_fingerprint(start),
        "model_run": json.loads((parent / "result.json").read_bytes())["name"] if parent else None,
        "data": file_fingerprint(c.data),
    }
    run = kind(
        stage,
        c,
        name,
        recipe,
        home(c.out, name),
        Guard(stage, steps, limits, judge=f"eval/{c.judge}"),  # type: ignore[arg-type]
        lineage,
        steps,
        start,
        read(c.watch_data, c.watch_items) if c.watch_every else None,
        read(c.test_data, c.test_items),
    )
    run.claim()
    if not run.result:
        run.open([f"task:{c.task}"] if c.task else [])
    return run


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights, or the adapter alone, with the tokenizer and its chat template; in place of what was there, at once."""
    part = folder.with_name(f".{folder.name}.part")
    model.save_pretrained(part)
    models.save_tokenizer(tokenizer, part)
    old = folder.with_name(f".{folder.name}.old")
    if folder.is_dir():
        folder.replace(old)
    part.replace(folder)
    if old.is_dir():
        for file in old.iterdir():
            file.unlink()
        old.rmdir()


def begin(run: Run, model: Any, tokenizer: Any) -> None:
    """Put the model on its device; measure what a new run starts from."""
    model.to(run.c.device)
    if not run.before:
        new = f" new weights {run.c.init_seed}" if getattr(run.c, "random_weights", False) else ""
        run.before, _ = run.measure(model, tokenizer, run.lineage["model"] + new)
        if run.before:
            run.tracker.log({"step": 0, **run.before}, step=0)
        if run.watch:
            run.look(model, tokenizer)


@contextlib.contextmanager
def heeded_signals(run: Run) -> Iterator[None]:
    """SIGTERM and SIGINT are noted in the run, which stops after the update that it is at."""
    previous = {
        number: signal.signal(number, lambda number, _: run.stop_signals.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
