"""What the device can do, and how to make it do the same thing twice."""

import os
import time

import torch

MATMUL_SIZE = {"cpu": 768, "cuda": 8192}  # square matrices large enough to reach the device's rate
MEASURE_SECONDS = 0.25


def make_deterministic(device: str, seed: int) -> None:
    """Same seed, same machine, same bits. A GPU kernel without a deterministic form only warns."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=device == "cuda")
    # Would fill every fresh tensor with NaN: a check for debugging that costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def measured_matmul_rate(device: str, dtype: str) -> float:
    """FLOP/s of a square matrix product on this device now: what perf/mfu is a share of."""
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


def size_name(n_params: int) -> str:
    """1,000,576 as `1.0M`: the tag by which runs of one size are found."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n_params >= scale:
            return f"{n_params / scale:.1f}{unit}"
    return str(n_params)
