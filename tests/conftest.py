"""What all tests share: one torch thread, W&B switched off unless a test asks for it, one small corpus."""

import os
from pathlib import Path
from typing import Any

import pytest

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
