"""What the device can do, and how to make it do the same thing twice."""

import ctypes
import os
import re
import sys
import time
from functools import cache

import torch

MATMUL_SIZE = {"cpu": 768, "cuda": 8192}  # square matrices large enough to reach the device's rate
MEASURE_SECONDS = 1.0

# Dense FLOP/s of float32 outside tensor cores and of bfloat16 in them, from NVIDIA's data sheets and architecture
# whitepapers (Volta to Blackwell; "with sparsity" halved). A V100 has no bfloat16. The first name that is a part of the
# device's decides, so the longer ones come first.
DATA_SHEET = {
    "B200": (75e12, 2250e12),
    "GH200": (67e12, 989e12),
    "H200": (67e12, 989e12),
    "H100 PCIe": (51e12, 756e12),
    "H100 NVL": (60e12, 835e12),
    "H100": (67e12, 989e12),
    "A100": (19.5e12, 312e12),
    "A10G": (35e12, 70e12),
    "A10": (31.2e12, 125e12),
    "A40": (37.4e12, 149.7e12),
    "L40S": (91.6e12, 362e12),
    "L40": (90.5e12, 181e12),
    "L4": (30.3e12, 121e12),
    "RTX 4090": (82.6e12, 165.2e12),
    "RTX 3090": (35.6e12, 71e12),
    "V100-SXM2": (15.7e12, None),
    "V100": (14e12, None),
}
# glibc's <malloc.h>; the values are part of its ABI.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def make_deterministic(device: str, seed: int) -> None:
    """Same seed, same machine, same bits. A GPU kernel without a deterministic form only warns."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=device == "cuda")
    # Would fill every fresh tensor with NaN: a check for debugging that costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to 1 GiB, for the next tensor of a training step.

    By default it maps each large tensor afresh and gives it back at once, and the kernel clears every page again: up to
    a tenth of a step. Other C libraries are left as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


@cache
def measured_matmul_rate(device: str, dtype: str) -> float:
    """FLOP/s of a square matrix product on this device, measured once a process: what perf/mfu is a share of."""
    size = MATMUL_SIZE[device]
    a = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    best, stop = 0.0, time.perf_counter() + MEASURE_SECONDS
    torch.mm(a, a)
    while time.perf_counter() < stop:
        started = time.perf_counter()
        torch.mm(a, a)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def data_sheet_flops(device_name: str, dtype: str) -> float | None:
    """Dense FLOP/s that the maker states for `torch.cuda.get_device_name()`; None for what is not in DATA_SHEET."""
    for name, (float32, bfloat16) in DATA_SHEET.items():
        if re.search(rf"\b{name}\b(?! Laptop| D$)", device_name):
            return {"float32": float32, "bfloat16": bfloat16}[dtype]
    return None


def size_name(n_params: int) -> str:
    """1,000,576 as `1.0M`: the tag by which runs of one size are found."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n_params >= scale:
            return f"{n_params / scale:.1f}{unit}"
    return str(n_params)
