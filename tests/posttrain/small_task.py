"""A task that a model of two layers learns in seconds, and training through the stages' own doors in this process."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

KINDS = {"見積": "高", "納期": "中", "修理": "低", "返品": "高"}
COMMON = {
    "lr": 1e-2,
    "batch_size": 4,
    "max_length": 64,
    "max_new_tokens": 20,
    "schedule": "constant",
    "warmup": 0.0,
    "samples": 2,
    "json": True,
}


def items() -> list[dict[str, Any]]:
    """{prompt, reference, form}: which kind an enquiry is of, as two lines."""
    rows = []
    for number, (kind, urgency) in enumerate(KINDS.items()):
        for asked in (f"{kind}の件", f"{kind}を"):
            reference = f"区分: {kind}\n急ぎ: {urgency}"
            rows.append({"prompt": asked, "reference": reference, "form": "summary" if number % 2 else "json"})
    return rows


def write(folder: Path) -> tuple[Path, Path]:
    """(chat rows, prompts with references) of `items` as files."""
    chats = [
        {
            "messages": [
                {"role": role, "content": row[key]} for role, key in (("user", "prompt"), ("assistant", "reference"))
            ]
        }
        for row in items()
    ]
    paths = folder / "sft.jsonl", folder / "test.jsonl"
    for path, rows in zip(paths, (chats, items()), strict=True):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return paths


class Trained(NamedTuple):
    """What one call of a stage's door left behind."""

    code: int
    result: dict[str, Any]
    folder: Path

    @property
    def weights(self) -> bytes:
        return next((self.folder / "model").glob("*.safetensors")).read_bytes()


def train(main: Callable[[list[str]], int], out: Path, offline: bool = False, **flags: Any) -> Trained:
    """Run a stage's `main` in this process; with `offline`, W&B's files go to `out` too."""
    import torch
    import wandb

    torch.set_num_threads(1)
    printed = io.StringIO()
    argv = [f"--{name}={value}" for name, value in {**COMMON, **flags, "out": out}.items()]
    with pytest.MonkeyPatch.context() as environment, contextlib.redirect_stdout(printed):
        environment.setenv("WANDB_MODE", "offline" if offline else "disabled")
        if offline:
            out.mkdir(parents=True, exist_ok=True)
            environment.setenv("WANDB_DIR", str(out))
            wandb.teardown()  # it reads the environment once
        try:
            code = main(argv)
        finally:
            if offline:
                wandb.teardown()
    lines = printed.getvalue().splitlines()
    result = json.loads(lines[-1]) if lines else {}
    return Trained(code, result, Path(result["model"]).parent if result else out)
