"""AdamW and Muon, the learning-rate schedules, and the size of the updates they make."""

import math
from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def learning_rate(
    step: int, steps: int, *, schedule: Literal["wsd", "cosine"], peak: float, warmup: float, decay: float, final: float
) -> float:
    """Learning rate of `step` (0-based) out of `steps`; warmup, decay and final are fractions of steps, steps and peak.

    wsd: linear warm-up, constant, then linear decay over the last `decay` (Hu et al. 2024, MiniCPM); cosine: after the
    warm-up one half wave down to `final` (Loshchilov & Hutter 2017), `decay` unused.
    """
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
    decay_steps = round(decay * steps)
    left = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
    return peak * (final + (1 - final) * left)


def orthogonalize(momentum: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices to a stack (n, rows, columns), by Newton-Schulz; singular values land near 1.

    In bfloat16 on a GPU as published; in float32 on a CPU, where bfloat16 without AMX is some 30 times slower.
    """
    a, b, c = NEWTON_SCHULZ
    x = momentum.bfloat16() if momentum.is_cuda else momentum.float()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(momentum.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for matrices: Nesterov momentum, orthogonalised, decoupled weight decay (Jordan et al. 2024).

    The update is scaled by 0.2 sqrt(max(rows, columns)) so that its RMS is AdamW's and one learning rate and weight
    decay serve both (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4). Matrices of one shape are stacked:
    torch.optim.Muon takes them one by one and always in bfloat16.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                directions = []
                for parameter in parameters:
                    assert parameter.grad is not None
                    buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    directions.append(parameter.grad.lerp(buffer, group["momentum"]))
                scale = 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, orthogonalize(torch.stack(directions)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(
    model: nn.Module,
    kind: Literal["adamw", "muon"],
    *,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
    weight_decay: float,
) -> list[torch.optim.Optimizer]:
    """One AdamW for everything, or Muon for the hidden matrices and AdamW for embeddings, head and norms.

    Weight decay is for matrices: norms have none. The learning rate is set before every step.
    """
    named = dict(model.named_parameters())
    hidden = [p for name, p in named.items() if p.ndim == 2 and ".layers." in name]
    embeddings = [p for name, p in named.items() if p.ndim == 2 and ".layers." not in name]
    vectors = [p for p in named.values() if p.ndim == 1]
    decayed = embeddings if kind == "muon" else hidden + embeddings
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
    return [Muon(hidden, lr=0.0, momentum=momentum, weight_decay=weight_decay), adamw] if kind == "muon" else [adamw]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


@torch.no_grad()
def update_rms(optimizers: list[torch.optim.Optimizer]) -> float:
    """RMS over AdamW's parameters of m / (sqrt(v) + eps), the step just taken in units of the learning rate.

    Near 1 early and some tenths later in a healthy run; falling to 0 means an epsilon too large (Wortsman et al. 2023).
    """
    total, count = 0.0, 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if "exp_avg" not in state:
                    continue
                beta1, beta2 = group["betas"]
                step = float(state["step"])
                m = state["exp_avg"] / (1 - beta1**step)
                v = state["exp_avg_sq"] / (1 - beta2**step)
                total += float((m / (v.sqrt() + group["eps"])).square().sum())
                count += parameter.numel()
    return math.sqrt(total / count)
