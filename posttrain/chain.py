"""`python train.py office`: the office task end to end from a base model, each stage its own W&B run.

    sft       the base on two thirds of the taught rows: a half-trained model, so that there is something left to gain
    dpo       from it, on pairs of its own answers
    grpo      from it, rewarded by format, fields and exact match
    control   the same SFT from random weights: what pretraining brought
    sft-full  the base on all rows: what more data alone would have brought

Every stage is a command that can be typed; all are measured on the same test items, before and after. A killed chain
goes on where it stopped. Settings were chosen on the validation items alone.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import console
import tracking
from posttrain import models

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
STAGES = ("sft", "dpo", "grpo", "control", "sft-full")
MAIN = ("eval/exact_match", "eval/field_accuracy", "eval/valid", "eval/sampled_exact_match", "eval/sampled_sd")


@dataclass(frozen=True)
class OfficeChainConfig:
    model: str
    """base model: a run's folder, a Hugging Face folder, or a folder of pulls, whose best val/bpb is taken"""
    data: str = "out/office"
    """folder of `python -m posttrain.office`; made if it is not there"""
    out: str = "runs"
    """folder that the stages' own folders are made in"""
    seed: int = 0
    """seed of every stage"""
    stages: str = ",".join(STAGES)
    """which to run, with commas; dpo and grpo need sft"""

    record: str = "triage"
    """full or triage, as `python -m posttrain.office` has them"""
    max_chars: int = 460
    """longest enquiry in characters"""
    rows: int = 2880
    """taught rows"""
    val: int = 64
    """validation items"""
    test: int = 128
    """test items"""
    sft_steps: int = 200
    """updates of SFT, and of its control"""
    full_steps: int = 360
    """updates of the fully trained SFT"""
    sft_lr: float = 3e-3
    """peak learning rate of SFT"""
    dpo_steps: int = 20
    """updates of DPO"""
    dpo_lr: float = 2e-5
    """peak learning rate of DPO"""
    dpo_prompts: int = 64
    """prompts whose sampled answers make the pairs"""
    grpo_steps: int = 40
    """updates of GRPO"""
    grpo_lr: float = 5e-4
    """peak learning rate of GRPO"""
    beta: float = 0.02
    """weight of KL in GRPO"""
    batch_size: int = 8
    """rows of an update of SFT and DPO"""
    completions: int = 32
    """completions of an update of GRPO, eight a prompt"""
    max_length: int = 512
    """tokens of a prompt with its answer"""
    max_new_tokens: int = 64
    """tokens of an answer"""
    samples: int = 3
    """answers sampled to each test prompt"""
    base_data: str | None = None
    """shards of the base's corpus: bits per byte before and after each stage"""
    price_per_hour: float = 0.0
    """price of one device-hour, for cost/money"""
    json: bool = False
    """print the result as one JSON object"""


def main(argv: list[str], dry_run: bool = False) -> int:
    """Run the stages. Returns 0 when all came to an end (also as diverged), or the code of the one that did not."""
    c = console.parse(OfficeChainConfig, argv, "train.py office")
    asked = [name for name in c.stages.split(",") if name]
    unknown = [name for name in asked if name not in STAGES]
    if unknown or not asked:
        raise console.UserError(f"--stages {c.stages}: choose of {', '.join(STAGES)}")
    if "sft" not in asked and {"dpo", "grpo"} & set(asked):
        raise console.UserError("--stages: dpo and grpo go on from sft: name it too")
    base = best_below(c.model)
    if dry_run:
        console.print_result(dataclasses.asdict(c), as_json=True)
        return 0
    make_data(c)
    results: dict[str, dict[str, Any]] = {}
    with Children() as children:
        for name in asked:
            code, told = children.run(command(c, name, base, results))
            if code in (143, 130):
                return code
            if not told:
                print(f"office: {name} failed with exit code {code}; the others go on", file=sys.stderr)
                if name == "sft":
                    return code or 1
                continue
            results[name] = told
    record(c, base, results)
    rows = {name: {key.rpartition("/")[2]: told.get(key) for key in MAIN} for name, told in results.items()}
    if c.json:
        console.print_result(rows, as_json=True)
    else:
        print(table(results))
    return 0


def best_below(model: str) -> str:
    """`model`, or for a folder of pulls the one whose val/bpb is best. Raises UserError where there is none."""
    folder = Path(model)
    if (folder / "config.json").is_file() or (folder / "checkpoints").is_dir() or not folder.is_dir():
        return str(models.find(model)) if folder.exists() else model_missing(model)
    found = [(json.loads(path.read_bytes()), path.parent) for path in folder.rglob("result.json")]
    good = [
        (told["val/bpb"], place)
        for told, place in found
        if told.get("status") in ("ok", "spiked") and told.get("val/bpb")
    ]
    if not good:
        raise console.UserError(f"--model {model}: no finished pull of `train.py pretrain` below it")
    return str(min(good)[1])


def model_missing(model: str) -> str:
    raise console.UserError(f"--model {model}: no such folder: give a model's, a pull's, or one that holds pulls")


def make_data(c: OfficeChainConfig) -> None:
    """The office data, once; the same flags give the same files."""
    from posttrain import office

    wanted = f"{c.record} {c.max_chars} {c.rows} {c.val} {c.test}"
    note = Path(c.data) / "made_with"
    if note.is_file() and note.read_text() == wanted:
        return
    flags = {"record": c.record, "max_chars": c.max_chars, "train": c.rows, "val": c.val, "test": c.test, "out": c.data}
    office.write(office.OfficeConfig(**{**flags, "out": Path(c.data)}))  # type: ignore[arg-type]
    console.write_atomic(note, wanted.encode())


def command(c: OfficeChainConfig, name: str, base: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """The command of a stage."""
    places = {"watch_data": f"{c.data}/val.jsonl", "test_data": f"{c.data}/test.jsonl"}
    flags: dict[str, Any] = {**places, "out": c.out, "seed": c.seed, "task": "office", "json": True}
    flags |= {"max_length": c.max_length, "max_new_tokens": c.max_new_tokens, "samples": c.samples}
    flags |= {"price_per_hour": c.price_per_hour, "watch_items": c.val}
    if c.base_data:
        flags["base_data"] = c.base_data
    if name in ("sft", "sft-full", "control"):
        steps = c.full_steps if name == "sft-full" else c.sft_steps
        flags |= {"model": base, "data": f"{c.data}/sft.jsonl", "lr": c.sft_lr, "batch_size": c.batch_size}
        flags |= {
            "max_steps": steps,
            "beta2": 0.98,
            "schedule": "wsd",
            "watch_every": 40,
            "random_weights": name == "control",
        }
        return ["sft", *(f"--{key}={value}" for key, value in flags.items())]
    flags |= {"model": results["sft"]["model"], "data": f"{c.data}/train.jsonl"}
    if name == "dpo":
        flags |= {"lr": c.dpo_lr, "max_steps": c.dpo_steps, "batch_size": c.batch_size, "watch_every": 5}
        flags |= {"prompts": c.dpo_prompts}
    else:
        flags |= {"lr": c.grpo_lr, "max_steps": c.grpo_steps, "batch_size": c.completions, "watch_every": 10}
        flags |= {"beta": c.beta, "schedule": "linear"}
    return [name, *(f"--{key}={value}" for key, value in flags.items())]


class Children:
    """Stages as processes, one at a time; a signal to this one reaches the stage, which saves and ends."""

    def __enter__(self) -> "Children":
        self.child: subprocess.Popen[str] | None = None
        self.told: list[int] = []
        self.previous = {number: signal.signal(number, self.pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def pass_on(self, number: int, _: FrameType | None) -> None:
        self.told.append(number)
        if self.child and self.child.poll() is None:
            self.child.send_signal(number)

    def run(self, argv: list[str]) -> tuple[int, dict[str, Any] | None]:
        """(exit code, result) of a stage. It is a run of its own, not this sweep's: that is the chain's."""
        if self.told:
            return 128 + self.told[0], None
        own = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_SWEEP", "WANDB_RUN_ID", "WANDB_RESUME"))}
        self.child = subprocess.Popen([sys.executable, str(TRAIN), *argv], stdout=subprocess.PIPE, text=True, env=own)
        out, _ = self.child.communicate()
        code = 128 + self.told[0] if self.told else self.child.returncode
        lines = out.strip().splitlines()
        return code, json.loads(lines[-1]) if lines and code in (0, console.EXIT_DIVERGED) else None


def record(c: OfficeChainConfig, base: str, results: dict[str, dict[str, Any]]) -> None:
    """The chain's own W&B run: every stage's scores, and what each brought. A sweep over seeds counts this one."""
    config = dataclasses.asdict(c)
    recipe = tracking.recipe_hash({"stage": "office", **config}, frozenset({"seed", "out", "json", "model", "data"}))
    lineage = {"base": base, "stages": {name: told["name"] for name, told in results.items()}}
    name = f"{recipe}-s{c.seed}"
    tracker = tracking.start(
        "office", config, name=name, recipe=recipe, tags=["task:office"], x_axis=None, lineage=lineage
    )
    summary: dict[str, Any] = {"status": "ok"}
    for stage, told in results.items():
        for key in MAIN:
            short = key.rpartition("/")[2]
            if key in told:
                summary[f"{stage}/{short}"] = told[key]
                before = told.get(key.replace("eval/", "eval_before/"))
                summary[f"{stage}/{short}_gain"] = told[key] - before if before is not None else None
        summary[f"{stage}/status"] = told["status"]
    summary["cost/device_seconds"] = sum(told["cost/device_seconds"] for told in results.values())
    summary["cost/money"] = sum(told["cost/money"] for told in results.values())
    best = max((told.get("eval/exact_match") or 0.0) for told in results.values())
    tracker.log({"office/exact_match": best}, step=1)
    tracker.summary(summary | {"office/exact_match": best})
    tracker.finish(0)


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line a stage: greedy and sampled scores, in percent."""
    heads = ["exact", "fields", "valid", "sampled exact", "sampling sd"]
    lines = [f"{'stage':<10}" + "".join(f"{head:>15}" for head in heads) + "  status"]
    for name, told in results.items():
        cells = "".join(f"{100 * told[key]:>14.1f}%" if told.get(key) is not None else f"{'-':>15}" for key in MAIN)
        lines.append(f"{name:<10}{cells}  {told['status']}")
    return "\n".join(lines)
