"""Predicted against measured memory, and the one line that says what would fit."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import console
from pretrain import device, memory
from pretrain.memory import Setting
from pretrain.model import ModelConfig, Transformer

TINY = ModelConfig(1536, 32, 1, 2, 2, 64, 64, False, True, 10_000.0, 1e-6)
SETTING = Setting(4096, 4096, "adamw", "float32", "cpu")


@pytest.mark.parametrize("pulls", [1, 3])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_activations_that_autograd_keeps_are_those_that_are_counted(pulls: int, qk_norm: bool, dtype: str) -> None:
    config = ModelConfig(64, 32, 1, 4, 2, 96, 64, qk_norm, True, 10_000.0, 1e-6, pulls=pulls)
    ids = torch.zeros(pulls, 4, 64, dtype=torch.int64)

    def kept(n_layers: int) -> int:
        model = Transformer(replace(config, n_layers=n_layers))
        weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), model.model.rotary)}
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        keep = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with keep, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            model(ids, ids, 0.0)
        return sum(storages.values())

    counted = ids.numel() * memory.activation_bytes(config, dtype, compiled=False)
    if dtype == "bfloat16":  # autocast's copies of the weights, which `predict` counts as working memory
        counted += 2 * sum(p.numel() for p in Transformer(config).model.layers.parameters())
    assert kept(3) - kept(2) == pytest.approx(counted, rel=0.05 if dtype == "bfloat16" else 0.005)


def test_predicted_memory_is_near_the_measured_peak(
    shards_folder: Path, tmp_path: Path, as_argv: Callable[..., list[str]], spawn: Callable[..., subprocess.Popen[str]]
) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs /proc")

    def peak(config: ModelConfig, setting: Setting) -> int:
        """Bytes that a process holds at most in two updates, between which nothing is saved."""
        flags = {
            name: getattr(config, name) for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "pulls")
        }
        flags |= {"optimizer": setting.optimizer, "micro_batch_tokens": setting.micro_batch_tokens}
        flags |= {"seq_len": 64, "batch_tokens": 4096, "tokens": 2 * 4096, "val_tokens": 1024}
        code = (
            "import sys; from concurrent.futures import Future; from pretrain import pretrain, together\n"
            "class AtOnce:\n"  # a slow disk would keep the copies of the first checkpoint through the updates
            "    def __init__(self, threads): pass\n"
            "    def submit(self, save, *what): done = Future(); done.set_result(save(*what)); return done\n"
            "    def shutdown(self): pass\n"
            "together.ThreadPoolExecutor = AtOnce; pretrain.main(sys.argv[1:])\n"
            "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        argv = as_argv(flags, data=shards_folder, out=tmp_path)
        out, err = spawn([sys.executable, "-c", code, *argv]).communicate(timeout=120)
        found = re.search(r"VmHWM:\s+(\d+)", out)
        assert found, err
        return 1024 * int(found.group(1))

    def predicted(config: ModelConfig, setting: Setting) -> float:
        need = memory.predict(config, setting)
        return need.on("cpu") - need.checkpoint

    empty = peak(TINY, SETTING) - predicted(TINY, SETTING)
    for config, setting in (
        (replace(TINY, d_model=128, n_layers=5, n_heads=4, d_ff=352, pulls=4), SETTING),
        (
            replace(TINY, d_model=512, n_layers=4, n_heads=8, d_ff=1376),
            replace(SETTING, micro_batch_tokens=1024),
        ),
    ):
        measured = peak(config, setting) - empty
        assert predicted(config, setting) == pytest.approx(measured, rel=0.2)


def test_what_does_not_fit_is_told_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, d_model=256, n_layers=8, n_heads=8, n_kv_heads=4, d_ff=704, pulls=4)
    whole = memory.predict(config, SETTING).on("cpu")

    def advice(free: float) -> str:
        monkeypatch.setattr(memory, "free_bytes", lambda _: free)
        with pytest.raises(console.UserError) as error:
            memory.check(config, SETTING)
        assert "\n" not in str(error.value)
        return str(error.value).split("what would fit: ")[1]

    def fits(free: float, config: ModelConfig, **setting: int) -> bool:
        return memory.fits(config, replace(SETTING, **setting), free)  # type: ignore[arg-type]

    for free in (0.9 * whole, 0.5 * whole):
        micro = int(re.findall(r"^--micro_batch_tokens (\d+)", advice(free))[0])
        assert fits(free, config, micro_batch_tokens=micro) and not fits(free, config, micro_batch_tokens=2 * micro)
        assert 4096 % micro == 0 and micro % config.seq_len == 0
    light, least = replace(config, checkpoint_activations=True), replace(SETTING, micro_batch_tokens=64)
    just = 1.001 * memory.predict(light, least).on("cpu") / memory.SPARE
    assert advice(just).startswith("--checkpoint_activations --micro_batch_tokens 64")
    found = re.search(r"(\d) of these 4 pulls at a time", advice(0.3 * whole))
    assert found and fits(0.3 * whole, replace(config, pulls=int(found.group(1))))
    narrow = re.search(r"--micro_batch_tokens 64 --d_model (\d+) --n_heads (\d+)", advice(0.01 * whole))
    assert narrow and int(narrow.group(1)) < 256
    assert "lower --n_layers" in advice(1e5)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1.2 * whole)
    assert memory.check(config, SETTING).weights == 4 * 4 * Transformer(config).n_params()


def test_limits_of_control_groups_of_both_versions_are_read(tmp_path: Path) -> None:
    for groups, place, limit, used, idle in (
        (
            "4:memory:/a/b\n0::/\n",
            "memory/a/b",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
        ("0::/a/b\n", "a/b", "memory.max", "memory.current", "inactive_file"),
    ):
        (root := tmp_path / limit / place).mkdir(parents=True)
        (own := tmp_path / f"{limit}.own").write_text(groups)
        (root / limit).write_text("max\n" if limit == "memory.max" else "1000\n")
        (root / used).write_text("700\n")
        (root / "memory.stat").write_text(f"anon 5\n{idle} 200\n")
        found = memory.cgroup_headrooms(own, tmp_path / limit)
        assert found == ([] if limit == "memory.max" else [500])
        (root / limit).write_text("900\n")
        assert memory.cgroup_headrooms(own, tmp_path / limit) == [400]
    assert 0 < memory.free_bytes("cpu") < 2**50


def test_a_data_sheet_is_found_by_the_device_s_name() -> None:
    assert device.data_sheet_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert device.data_sheet_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert device.data_sheet_flops("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert device.data_sheet_flops("Tesla V100-SXM2-16GB", "bfloat16") is None
    assert device.data_sheet_flops("NVIDIA RTX A1000", "float32") is None
    assert device.data_sheet_flops("NVIDIA GeForce RTX 4090 Laptop GPU", "float32") is None


def test_an_mfu_is_a_share_of_a_rate_that_the_machine_reaches() -> None:
    rate = device.measured_matmul_rate("cpu", "float32")
    assert 1e9 < rate < 1e14 and device.measured_matmul_rate("cpu", "float32") == rate
