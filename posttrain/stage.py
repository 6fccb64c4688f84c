"""What every post-training stage shares: one run's folder, W&B record, guard and clock, and TRL's trainers on them.

A run lives in OUT/[SWEEP/]RECIPE-sSEED. The same command finds it again: a killed run goes on from its last checkpoint,
a finished one says so. model/ is what came out, best/ the weights of the best evaluation.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PrinterCallback, TrainerCallback

import console
import tracking
from data import shards
from data.loader import TokenStream
from posttrain import answers, models, trl_names
from posttrain.guard import Guard, Verdict
from posttrain.limits import Limits
from posttrain.rows import load_rows
from pretrain import causal_lm
from pretrain.pull import EXIT_CODE, home

SAY_SECONDS = 5.0  # between lines of progress
SAMPLES_SHOWN = 16  # rows of the table of answers
BPB_WINDOW = 256  # tokens
KL_PROMPTS = 16
WSD_DECAY = 0.3  # share of the updates, as in pretraining
SCHEDULES = {  # transformers' names
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}
TEST_SEED = 7  # of the answers sampled to measure a model: the same for every run, so that a model is measured once


@dataclass(frozen=True, kw_only=True)
class Common:
    """The fields that all stages have; each stage adds its own and sets its own defaults."""

    model: str
    """what to start from: a run's folder, a Hugging Face folder, a PEFT adapter's, or a GGUF file"""
    data: str
    """rows to train on: .jsonl or .parquet (a glob with jsonl: or parquet: before it), or hf:NAME[:CONFIG][:SPLIT]"""
    watch_data: str | None = None
    """held-out rows {prompt, reference} that the guard looks at in training, and the best checkpoint is chosen by"""
    test_data: str | None = None
    """held-out rows measured before and after; nothing is chosen on them. Default: watch_data"""
    task: str = ""
    """name of the task, for the report"""
    out: str = "runs"
    """folder that the run's own folder is made in"""
    seed: int = 0
    """sets the three seeds below where they are not given"""
    init_seed: int | None = None
    """draws new weights: an adapter's, a value head's, random ones"""
    data_seed: int | None = None
    """orders the rows"""
    sample_seed: int | None = None
    """draws completions, in training and in evaluation"""

    epochs: float = 1.0
    """passes over the data"""
    max_steps: int = 0
    """updates; 0: as many as `epochs` are"""
    batch_size: int = 16
    """rows of one update"""
    micro_batch_size: int = 0
    """rows of one forward and backward pass on one device; 0: all of them"""
    max_length: int = 1024
    """tokens of a row, prompt and answer; longer rows are dropped, counted and told"""
    lr: float = 2e-5
    """peak learning rate"""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """learning rate after the warm-up: down to 0, held, or held and down to 0 in the last three tenths"""
    warmup: float = 0.05
    """share of the updates with rising learning rate"""
    weight_decay: float = 0.0
    """decoupled"""
    beta2: float = 0.999
    """AdamW: decay of the second moment"""
    grad_clip: float = 1.0
    """largest L2 norm of the gradient"""
    lora_rank: int = 0
    """rank of LoRA adapters on all linear layers (Hu et al. 2021); 0: all weights are trained"""
    lora_alpha: int = 0
    """scale of the adapters; 0: twice the rank"""

    on_verdict: Literal["stop", "rollback", "ignore"] = "stop"
    """when the guard says that the run is lost. stop: it ends as diverged; rollback: it ends with the weights of its
    best evaluation as its model; ignore: it goes on, and the verdict is recorded"""
    judge: str = "exact_match"
    """score of the held-out task that the guard and the best checkpoint go by: exact_match, field_accuracy or valid"""
    watch_every: int = 20
    """updates between looks at watch_data; 0: never"""
    watch_items: int = 64
    """rows of watch_data to look at"""
    test_items: int = 0
    """rows of test_data to measure; 0: all"""
    samples: int = 4
    """answers sampled at temperature 1 for each of test_data's prompts, beside the greedy one"""
    max_new_tokens: int = 256
    """tokens of a generated answer at most"""
    base_data: str | None = None
    """shards of the base's corpus, with its tokenizer: bits per byte on their val split before and after"""
    base_tokens: int = 32_768
    """tokens of that val split to read"""
    log_every: int = 1
    """updates between rows of metrics"""
    checkpoint_every: int = 50
    """updates between checkpoints that a killed run goes on from"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed precision, for GPUs"""
    price_per_hour: float = 0.0
    """price of one device-hour, for cost/money"""
    currency: str = "JPY"
    """currency of price_per_hour"""
    json: bool = False
    """print the result as one JSON object"""


SEEDS = frozenset({"seed", "init_seed", "data_seed", "sample_seed"})
# What is read enters as fingerprints, the start model apart: a recipe over seeds starts from a model of each seed.
NOT_RECIPE = SEEDS | {
    *("model", "data", "watch_data", "test_data", "base_data", "out", "json", "device", "price_per_hour", "currency"),
    *("micro_batch_size", "watch_every", "watch_items", "test_items", "base_tokens", "log_every", "checkpoint_every"),
}


def complete(c: Any) -> Any:
    """The configuration as it is recorded: every seed a number, the device a device, tests on what is watched."""
    return dataclasses.replace(
        c,
        init_seed=c.seed if c.init_seed is None else c.init_seed,
        data_seed=c.seed if c.data_seed is None else c.data_seed,
        sample_seed=c.seed if c.sample_seed is None else c.sample_seed,
        test_data=c.test_data or c.watch_data,
        lora_alpha=c.lora_alpha or 2 * c.lora_rank,
        device=c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu",
    )


def check(c: Any, judges: tuple[str, ...] = ("exact_match", "field_accuracy", "valid")) -> None:
    """Raises UserError naming the flag that does not fit. judges: scores of the stage's held-out rows."""
    for name in ("batch_size", "max_length", "max_new_tokens", "log_every", "checkpoint_every", "watch_items"):
        if getattr(c, name) < 1:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be at least 1")
    for name in ("lr", "epochs"):
        if not 0 < getattr(c, name) < math.inf:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be positive")
    if not 0 <= c.warmup <= 1:
        raise console.UserError(f"--warmup {c.warmup}: is a share, from 0 to 1")
    if not 0 <= c.beta2 < 1:
        raise console.UserError(f"--beta2 {c.beta2}: must be at least 0 and below 1")
    counts = ("max_steps", "micro_batch_size", "weight_decay", "lora_rank", "lora_alpha", "grad_clip", "watch_every")
    for name in (*counts, "test_items", "samples", "base_tokens", "price_per_hour"):
        if not 0 <= getattr(c, name) < math.inf:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be 0 or more")
    for name in sorted(SEEDS, key=lambda name: name != "seed"):
        if getattr(c, name) is not None and not 0 <= getattr(c, name) < 2**32:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be from 0 to 2^32 - 1")
    if c.judge not in judges:
        raise console.UserError(f"--judge {c.judge}: choose {' or '.join(judges)}")
    if c.micro_batch_size and c.batch_size % c.micro_batch_size:
        raise console.UserError(f"--micro_batch_size {c.micro_batch_size} must divide --batch_size {c.batch_size}")
    if c.device == "cuda" and not torch.cuda.is_available():
        raise console.UserError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    if c.on_verdict == "rollback" and not (c.watch_data and c.watch_every):
        raise console.UserError("--on_verdict rollback: needs --watch_data, by which the best checkpoint is chosen")


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
            told["base/bpb"] = base_bpb(model, c.base_data, c.base_tokens)
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


@torch.no_grad()
def base_bpb(model: Any, folder: str, tokens: int) -> float:
    """Bits per byte of the val split of shards, in windows of BPB_WINDOW tokens: does tuning wreck the base?"""
    manifest = shards.load(Path(folder))
    if model.get_input_embeddings().num_embeddings < manifest["vocab_size"]:
        raise console.UserError(
            f"--base_data {folder}: its vocabulary is not the model's: build it with the model's own"
        )
    stream = TokenStream(Path(folder), manifest, "val", BPB_WINDOW)
    sizes = torch.from_numpy(np.load(Path(folder) / "token_bytes.npy").astype(np.int64))
    windows = max(1, min(stream.n_windows, tokens // BPB_WINDOW))
    nats, size, device, training = 0.0, 0, next(model.parameters()).device, model.training
    model.eval()
    for at in range(0, windows, 16):
        ids, targets = stream.windows(np.arange(at, min(at + 16, windows)))
        logits = model(input_ids=ids.to(device)).logits.float().flatten(0, 1)
        nats += float(F.cross_entropy(logits, targets.to(device).flatten(), ignore_index=-1, reduction="sum"))
        size += int(sizes[targets[targets >= 0]].sum())
    model.train(training)
    return nats / size / math.log(2)


# --- TRL's trainers --------------------------------------------------------------------------------------------------
def trainer_arguments(run: Run) -> dict[str, Any]:
    """What every TRL configuration is given: sizes, optimizer, seeds, and nothing that TRL would send or hide."""
    c = run.c
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if c.batch_size % world:
        raise console.UserError(f"--batch_size {c.batch_size} must be a multiple of the {world} processes")
    micro = c.micro_batch_size or c.batch_size // world
    return {
        "output_dir": str(run.folder / "checkpoints"),
        "max_steps": run.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": max(1, c.batch_size // world // micro),
        "learning_rate": c.lr,
        "lr_scheduler_type": SCHEDULES[c.schedule],
        "lr_scheduler_kwargs": {"num_decay_steps": round(WSD_DECAY * run.steps)} if c.schedule == "wsd" else {},
        "warmup_steps": round(c.warmup * run.steps),
        "weight_decay": c.weight_decay,
        "adam_beta2": c.beta2,
        "max_grad_norm": c.grad_clip,
        "optim": "adamw_torch",
        "seed": c.init_seed,
        "data_seed": c.data_seed,
        "logging_steps": c.log_every,
        "logging_nan_inf_filter": False,  # it prints NaN as 0.0
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": c.checkpoint_every,
        "save_total_limit": 2,
        "use_cpu": c.device == "cpu",
        "bf16": c.dtype == "bfloat16",
        "activation_checkpointing": False,
        "gradient_checkpointing": False,
    }


def lora(c: Any) -> Any:
    """PEFT's configuration of the adapters that `c` asks for; None for all weights."""
    if not c.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=c.lora_rank, lora_alpha=c.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


class Watch(TrainerCallback):  # type: ignore[misc]
    """Ties a TRL trainer to a run: rows to W&B and the guard, looks at the held-out task, verdicts, signals, state."""

    def __init__(self, run: Run, tokenizer: Any) -> None:
        self.run, self.tokenizer = run, tokenizer

    def on_log(self, _args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        row = trl_names.translate(logs or {}, self.run.stage)
        row = {key: value for key, value in row.items() if not key.startswith(("train_", "total_", "epoch", "step_"))}
        self.run.step = state.global_step
        if row and state.global_step:
            self.run.tokens = float((logs or {}).get("num_tokens", self.run.tokens))
            self.run.log(row)
        self.heed(control)

    def on_step_end(self, _args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        run, c = self.run, self.run.c
        run.step = state.global_step
        if c.watch_every and run.step % c.watch_every == 0:
            run.look(model, self.tokenizer)
        if run.stop_signals:
            control.should_save = control.should_training_stop = True
        self.heed(control)

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.run.save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def heed(self, control: Any) -> None:
        if self.run.verdict and self.run.c.on_verdict != "ignore":
            control.should_training_stop = True


def train(run: Run, make_trainer: Callable[[Watch], Any], model: Any, tokenizer: Any) -> int:
    """Measure, train with the trainer that `make_trainer` builds, measure again. Returns the exit code."""
    watch = Watch(run, tokenizer)
    begin(run, model, tokenizer)
    trainer = make_trainer(watch)
    run.reference = getattr(trainer, "ref_model", None)
    trainer.remove_callback(PrinterCallback)  # stdout is for the result
    with heeded_signals(run):
        point = run.checkpoint
        trainer.train(resume_from_checkpoint=str(point) if point else None)
        return run.close(trainer.model, tokenizer)


def begin(run: Run, model: Any, tokenizer: Any) -> None:
    """Put the model on its device; measure what a new run starts from."""
    model.to(run.c.device)
    if not run.before:
        run.before, _ = run.measure(model, tokenizer, run.lineage["model"])
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
