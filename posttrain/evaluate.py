"""`python -m posttrain.evaluate MODEL --data TEST.jsonl`: held-out scores with intervals, greedy and sampled.

Exact match, field accuracy and validity of the format are told apart, since tuning moves them apart. Intervals are
95%, over items: exact (Clopper and Pearson) for rates, bootstrap for means; posttrain/intervals.py. --against puts a
second model beside the first on the same items, with the same draws.
"""

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

import console
import tracking
from posttrain import forgetting, intervals, models
from posttrain.intervals import Interval, Paired
from posttrain.scoring import Score, score

TABLE_ROWS = 1000  # of W&B's table; --out has all
SCORES: dict[str, Callable[[Score], float]] = {
    "exact_match": lambda one: float(one.exact),
    "field_accuracy": lambda one: one.field_accuracy,
    "valid": lambda one: float(one.valid),
}


@dataclass(frozen=True)
class EvaluateConfig:
    model: Annotated[str, tyro.conf.Positional]
    """run, checkpoint, Hugging Face folder, PEFT adapter, or GGUF file"""
    data: str
    """held-out rows {prompt, reference}: .jsonl, .parquet or hf:NAME[:CONFIG][:SPLIT]; a column `form` is told apart"""
    against: str | None = None
    """second model, compared with the first item by item"""
    samples: int = 8
    """answers sampled at temperature 1 for each prompt, beside the greedy one; 0: none"""
    limit: int = 0
    """the first so many rows; 0: all"""
    max_new_tokens: int = 256
    """tokens of an answer at most"""
    base_data: str | None = None
    """shards of the base's corpus, with its tokenizer: bits per byte on their val split, which tuning may wreck"""
    base_tokens: int = 32_768
    """tokens of that val split to read"""
    out: str | None = None
    """JSONL file of all answers with their scores"""
    seed: int = 7
    """of the sampled answers and of the bootstrap; training measures its models with 7"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one"""
    json: bool = False
    """print one JSON object"""


NOT_RECIPE = frozenset({"model", "data", "against", "base_data", "out", "seed", "device", "json"})


@dataclass
class Answers:
    """What one model said: per item the greedy answer and the sampled ones, each with its score."""

    fingerprint: str
    greedy: list[str]
    drawn: list[list[str]]
    scores: list[Score]
    again: list[list[Score]]
    base_bpb: float | None = None

    def means(self, name: str) -> list[float]:
        """One score of the sampled answers, as a mean per item."""
        return [float(np.mean([SCORES[name](one) for one in item])) for item in self.again]


def main(argv: list[str]) -> int:
    """Ask, score, print, record as a W&B run of job_type evaluate."""
    c = console.parse(EvaluateConfig, argv, "python -m posttrain.evaluate")
    for name in ("samples", "limit", "base_tokens"):
        if getattr(c, name) < 0:
            raise console.UserError(f"--{name} {getattr(c, name)}: must be 0 or more")
    if c.max_new_tokens < 1:
        raise console.UserError(f"--max_new_tokens {c.max_new_tokens}: must be at least 1")
    if not 0 <= c.seed < 2**32:
        raise console.UserError(f"--seed {c.seed}: must be from 0 to 2^32 - 1")
    if c.out and not Path(c.out).parent.is_dir():
        raise console.UserError(f"--out {c.out}: its folder does not exist: make it")
    paths = [models.find(name) for name in (c.model, c.against) if name is not None]
    import torch

    from posttrain import stage
    from posttrain.rows import load_rows

    if c.device == "cuda" and not torch.cuda.is_available():
        raise console.UserError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    held = stage.held_out(c.data, c.limit)
    assert held
    rows = load_rows(c.data, "prompt").select(range(len(held.prompts)))
    forms = list(map(str, rows["form"])) if "form" in rows.column_names else None
    # Before the models are asked, since that takes the time and W&B may refuse.
    lineage = {"model": stage.model_fingerprint(paths[0]), "data": stage.file_fingerprint(c.data)}
    if len(paths) > 1:
        lineage["against"] = stage.model_fingerprint(paths[1])
    recipe = tracking.recipe_hash({"stage": "evaluate", **dataclasses.asdict(c), **lineage}, leave_out=NOT_RECIPE)
    tracker = tracking.start(
        "evaluate",
        dataclasses.asdict(c),
        name=f"{recipe}-s{c.seed}",
        recipe=recipe,
        tags=[],
        x_axis=None,
        lineage=lineage,
    )
    for key in ("model", "data"):
        tracker.use_artifact(f"{key}-{lineage[key]}:latest")
    code = 1
    try:
        told = [ask(path, c, held) for path in paths]
        result = {"model": c.model, "data": c.data, "items": len(held.prompts), **summary(told[0], forms, c.seed)}
        if len(told) > 1:
            result |= {"against": c.against, **comparison(told[0], told[1], c.seed)}
        record(tracker, c, result, table(held, forms, told))
        code = 0
    finally:
        tracker.finish(code)
    if c.json:
        print(json.dumps({key: plain(value) for key, value in result.items()}, ensure_ascii=False))
    else:
        console.print_result({key: shown(value) for key, value in result.items()}, as_json=False)
    return 0


def ask(path: Path, c: EvaluateConfig, held: Any) -> Answers:
    """Load the model at `path` and have it answer every prompt."""
    import torch

    from posttrain import answers, chat, stage

    model, tokenizer = models.load(path)
    chat.install_template(tokenizer, model)
    model.to(c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    print(f"evaluate: {path} answers {len(held.prompts)} prompts {1 + c.samples} times", file=sys.stderr, flush=True)
    greedy = answers.generate(model, tokenizer, held.prompts, c.max_new_tokens)
    seeds = [c.seed * 1000 + k for k in range(c.samples)]
    rounds = [answers.generate(model, tokenizer, held.prompts, c.max_new_tokens, 1.0, seed) for seed in seeds]
    drawn = [[one[i] for one in rounds] for i in range(len(held.prompts))]
    return Answers(
        stage.model_fingerprint(path),
        greedy,
        drawn,
        [score(answer, reference) for answer, reference in zip(greedy, held.references, strict=True)],
        [[score(one, reference) for one in item] for item, reference in zip(drawn, held.references, strict=True)],
        forgetting.base_bpb(model, c.base_data, c.base_tokens) if c.base_data else None,
    )


def summary(told: Answers, forms: list[str] | None, seed: int) -> dict[str, Any]:
    """All that is said of one model: greedy, per field, per form, sampled, spread, pass@k."""
    found: dict[str, Any] = group(told.scores, seed)
    fields = defaultdict(list)
    for one in told.scores:
        for name, right in one.fields.items():
            fields[name].append(right)
    found |= {f"field/{name}": intervals.rate(right) for name, right in fields.items()}
    for form in sorted(set(forms or [])):
        some = [one for one, its in zip(told.scores, forms or [], strict=True) if its == form]
        found |= {f"form/{form}/{name}": value for name, value in group(some, seed).items()}
    if told.again[0]:
        found |= {f"sampled_{name}": intervals.over_items(told.means(name), seed) for name in SCORES}
        exact = np.array([[one.exact for one in item] for item in told.again], dtype=np.int64)
        if min(exact.shape) > 1:
            spread = intervals.spread(exact)
            found |= {"sampled_sd": float(exact.std(axis=1).mean()), "sampled_rerun_sd": spread.rerun_sd}
            found |= {"variance_within_items": spread.within, "variance_between_items": spread.between}
        for k in range(1, exact.shape[1] + 1):
            found[f"pass@{k}"] = intervals.over_items(
                intervals.pass_at_k(exact.shape[1], exact.sum(axis=1), k).tolist(), seed
            )
    if told.base_bpb is not None:
        found["base/bpb"] = told.base_bpb
    return found


def group(scores: Sequence[Score], seed: int) -> dict[str, Interval]:
    """The three scores of greedy answers."""
    return {
        "exact_match": intervals.rate([one.exact for one in scores]),
        "field_accuracy": intervals.over_items([one.field_accuracy for one in scores], seed),
        "valid": intervals.rate([one.valid for one in scores]),
    }


def comparison(first: Answers, second: Answers, seed: int) -> dict[str, Any]:
    """The first model minus the second."""
    greedy = {name: [[of(one) for one in told.scores] for told in (first, second)] for name, of in SCORES.items()}
    found: dict[str, Any] = {
        f"minus/{name}": (intervals.paired if name == "field_accuracy" else intervals.mcnemar)(one, other, seed)
        for name, (one, other) in greedy.items()
    }
    if first.again[0]:
        found |= {
            f"minus/sampled_{name}": intervals.paired(first.means(name), second.means(name), seed) for name in SCORES
        }
    if first.base_bpb is not None and second.base_bpb is not None:
        found["minus/base/bpb"] = first.base_bpb - second.base_bpb
    return found


def table(held: Any, forms: list[str] | None, told: list[Answers]) -> list[dict[str, Any]]:
    """One row an item."""
    rows = []
    for i, (prompt, reference) in enumerate(zip(held.prompts, held.references, strict=True)):
        row: dict[str, Any] = {"item": i, "form": forms[i] if forms else "", "prompt": prompt[-1]["content"]}
        row["reference"] = reference
        for prefix, one in zip(("", "against_"), told, strict=False):
            row |= {f"{prefix}answer": one.greedy[i], f"{prefix}sampled": one.drawn[i]}
            row |= {f"{prefix}{name}": of(one.scores[i]) for name, of in SCORES.items()}
            row[f"{prefix}sampled_exact"] = [again.exact for again in one.again[i]]
        rows.append(row)
    return rows


def record(tracker: Any, c: EvaluateConfig, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Scores into W&B's summary under eval/, answers into its table and into --out."""
    flat: dict[str, Any] = {"status": "ok"}
    for key, value in result.items():
        name = key if key.startswith(("base/", "minus/")) else f"eval/{key}"
        if isinstance(value, Interval):
            flat |= {name: value.value, f"{name}/low": value.low, f"{name}/high": value.high}
        elif isinstance(value, Paired):
            facts = value._asdict().items()
            flat |= {name if k == "difference" else f"{name}/{k}": v for k, v in facts if v is not None}
        elif isinstance(value, (int, float)):
            flat[name] = value
    tracker.summary(flat)
    columns: list[str | int] = list(rows[0])
    cells = [[json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for v in row.values()] for row in rows]
    tracker.table("answers", columns, cells[:TABLE_ROWS], 0)
    if c.out:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        console.write_atomic(Path(c.out), text.encode())


def plain(value: Any) -> Any:
    """A value of the result as JSON has it."""
    if isinstance(value, (Interval, Paired)):
        return {key: one for key, one in value._asdict().items() if one is not None}
    return value


def shown(value: Any) -> Any:
    """A value of the result for people."""
    if isinstance(value, (Interval, Paired)):
        return str(value)
    return f"{value:.4f}" if isinstance(value, float) else value


if __name__ == "__main__":
    console.door(lambda: main(sys.argv[1:]))
