"""What all tests share: one torch thread, W&B switched off unless a test asks for it, one small corpus."""

import contextlib
import io
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

REPOSITORY = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: a second thread costs more than it brings
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _no_tracking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the caller's W&B set-up reaches a test, and no test writes outside its folder."""
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))


@pytest.fixture(scope="session")
def shards_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of the embedded corpus as token shards, vocabulary 1,536."""
    from data import build

    folder = tmp_path_factory.mktemp("corpus") / "shards"
    build.build(build.BuildConfig(source="inquiries", out=folder, documents=300, vocab_size=1536, val_fraction=0.05))
    return folder


@pytest.fixture(scope="session")
def tiny_flags(shards_folder: Path) -> dict[str, Any]:
    """Flags of a pull that takes about a second."""
    return {
        "data": shards_folder,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "d_ff": 64,
        "seq_len": 64,
        "batch_tokens": 512,
        "tokens": 512 * 30,
        "val_tokens": 2048,
        "val_every": 10,
        "log_every": 1,
        "checkpoint_every": 10,
    }


class Pull(NamedTuple):
    """What one call of the pretraining door left behind; `flags` are what it was called with, without --out."""

    code: int
    result: dict[str, Any]
    folder: Path
    flags: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return sorted((self.folder / "checkpoints").glob("step-*"))[-1]


@pytest.fixture(scope="session")
def as_argv() -> Callable[..., list[str]]:
    """Flags as a command line: as_argv(flags, out=...)."""
    return lambda flags, **more: [f"--{name}={value}" for name, value in {**flags, **more}.items()]


@pytest.fixture(scope="session")
def pull(tiny_flags: dict[str, Any], as_argv: Callable[..., list[str]]) -> Callable[..., Pull]:
    """A pull in this process: pull(out, offline=False, **flags). Offline W&B files go to `out` too."""

    def make(out: Path, offline: bool = False, **more: Any) -> Pull:
        import torch
        import wandb

        from pretrain import pretrain

        torch.set_num_threads(1)
        out.mkdir(parents=True, exist_ok=True)
        flags, printed = {**tiny_flags, **more, "json": True}, io.StringIO()
        with pytest.MonkeyPatch.context() as environment, contextlib.redirect_stdout(printed):
            environment.setenv("WANDB_MODE", "offline" if offline else "disabled")
            for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
                environment.setenv(name, str(out))
            if offline:
                wandb.teardown()  # it reads the environment once
            try:
                code = pretrain.main(as_argv(flags, out=out))
            finally:
                if offline:
                    wandb.teardown()
        result = json.loads(printed.getvalue().splitlines()[-1])
        return Pull(code, result, out / result["name"], flags)

    return make


@pytest.fixture(scope="session")
def llama(pull: Callable[..., Pull], tmp_path_factory: pytest.TempPathFactory) -> Pull:
    """A finished pull of a Llama with tied embeddings and grouped queries, recorded by W&B; do not change it."""
    return pull(tmp_path_factory.mktemp("llama"), offline=True, seed=5, price_per_hour=3600)


@pytest.fixture(scope="session")
def untied(pull: Callable[..., Pull], tmp_path_factory: pytest.TempPathFactory) -> Pull:
    """A finished pull of a Llama with its own output head, by AdamW, of some 90 steps; do not change it."""
    more = {"tie_embeddings": False, "optimizer": "adamw", "schedule": "cosine"}
    return pull(tmp_path_factory.mktemp("untied"), tokens=512 * 90, checkpoint_every=50, **more)


@pytest.fixture(scope="session")
def qwen(pull: Callable[..., Pull], tmp_path_factory: pytest.TempPathFactory) -> Pull:
    """A finished pull of a Qwen3, by Muon, of some 90 steps; do not change it."""
    more = {"qk_norm": True, "optimizer": "muon", "z_loss": 1e-4, "n_heads": 4, "n_kv_heads": 2}
    return pull(tmp_path_factory.mktemp("qwen"), tokens=512 * 90, checkpoint_every=20, **more)


@pytest.fixture(scope="session")
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command from the checkout: spawn(argv, **environment); killed at the end if it still runs."""
    started: list[subprocess.Popen[str]] = []

    def start(argv: list[str], **environment: str) -> subprocess.Popen[str]:
        # Not this process's wandb-core, and a stdout that is buffered as in a user's shell.
        mine = {key: value for key, value in os.environ.items() if key not in ("WANDB_SERVICE", "PYTHONUNBUFFERED")}
        pipe = subprocess.PIPE
        told: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "text": True, "cwd": REPOSITORY}
        child = subprocess.Popen(argv, **told, env={**mine, **environment})
        started.append(child)
        return child

    yield start
    for child in started:
        if child.poll() is None:
            child.kill()
            child.communicate()


@pytest.fixture(scope="session")
def descendants() -> Callable[[int], dict[int, str]]:
    """Ids and names of a process and of everything that it started; skips where there is no /proc."""

    def find(pid: int) -> dict[int, str]:
        if not Path("/proc/self/stat").exists():
            pytest.skip("needs /proc")
        parents, names = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                number, text = int(stat.parent.name), stat.read_text()
                names[number] = text[text.index("(") + 1 : text.rindex(")")]
                parents[number] = int(text[text.rindex(")") + 2 :].split()[1])
        found = {pid}
        while new := {child for child, parent in parents.items() if parent in found} - found:
            found |= new
        return {number: names.get(number, "") for number in found}

    return find
