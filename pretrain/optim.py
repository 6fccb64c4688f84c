"""AdamW and Muon, the learning-rate schedules, clipping, and the size of the updates they make.

Every pull has optimizers of its own, over views of its row of the batched parameters: its learning rate, weight decay,
moments and step count are its own, in the same arithmetic as if it were alone.
"""

import math
from collections import defaultdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain import parametrization, ranks
from pretrain.model import ModelConfig, Transformer, hugging_face_parts

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
    decay serve both (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4). Matrices of one shape are stacked,
    and merged projections are taken apart: torch.optim.Muon does neither, and always works in bfloat16.

    Groups have for each parameter its number of `rows`, of which fsdp leaves this rank a part (then directions are
    gathered, and every rank takes its rows of the same update), and `parts`, the row slices that are matrices.

    Where `found_inf`, a tensor, is 1, a step changes nothing: GradScaler's convention, which torch's fused AdamW
    follows too.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict], momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, slice, Tensor]]] = defaultdict(list)
            for parameter, rows, parts in zip(group["params"], group["rows"], group["parts"], strict=True):
                assert parameter.grad is not None
                buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                moved = buffer.lerp(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(moved, group["momentum"])
                buffer.copy_(moved if self.found_inf is None else torch.where(self.found_inf > 0, buffer, moved))
                begin = 0
                if parameter.size(0) < rows:
                    direction, begin = ranks.gather_rows(direction, rows), ranks.own_rows(rows).start
                end = begin + parameter.size(0)
                for part in parts:
                    first, stop, _ = part.indices(rows)
                    low, high = min(max(begin, first), end), max(begin, min(end, stop))
                    held, update = parameter[low - begin : high - begin], slice(low - first, high - first)
                    by_shape[direction[part].shape].append((held, update, direction[part]))
            for shape, pieces in by_shape.items():
                updates = orthogonalize(torch.stack([direction for _, _, direction in pieces]))
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for (held, own, _), update in zip(pieces, updates, strict=True):
                    new = (held * (1 - group["lr"] * group["weight_decay"])).sub_(update[own], alpha=scale)
                    held.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, held, new))


def make_optimizers(
    parameters: dict[str, nn.Parameter],
    config: ModelConfig,
    kind: Literal["adamw", "muon"],
    *,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
    weight_decay: float,
) -> list[torch.optim.Optimizer]:
    """Optimizers of one pull: one AdamW for everything, or Muon for its hidden matrices and AdamW for the rest.

    `parameters` are the pull's own, by name. Weight decay is for matrices: norms have none. The learning rate is set
    before every step, times each group's `lr_scale`, which is the parametrization's.
    """
    matrices: dict[str, list[slice]] = defaultdict(list)
    for ours, rows in hugging_face_parts(config).values():
        matrices[ours].append(rows)
    groups: dict[bool, dict[tuple, dict]] = {True: {}, False: {}}  # Muon's and AdamW's
    for name, parameter in parameters.items():
        by_muon = kind == "muon" and parameter.ndim == 2 and ".layers." in name
        rule = parametrization.rule(name, config, kind)
        decay = weight_decay * rule.weight_decay if parameter.ndim == 2 else 0.0
        empty: dict[str, Any] = {"params": [], "lr_scale": rule.lr, "weight_decay": decay}
        empty |= {"rows": list[Any](), "parts": list[Any]()} if by_muon else {"eps": eps * rule.eps}
        group = groups[by_muon].setdefault((rule.lr, rule.eps, decay), empty)
        group["params"].append(parameter)
        if by_muon:
            # A matrix that is not merged, o_proj or down_proj, ends in the residual stream.
            group["rows"].append(matrices[name][-1].stop or config.d_model)
            group["parts"].append(matrices[name])
    muon = [Muon(list(groups[True].values()), momentum)] if groups[True] else []
    return [*muon, torch.optim.AdamW(list(groups[False].values()), lr=0.0, betas=betas, fused=True)]


def own_parameters(model: Transformer, row: int) -> dict[str, nn.Parameter]:
    """What the optimizers of the pull in `row` update: the model's parameters, its slices of them, or this rank's."""
    named = dict(model.named_parameters())
    if model.config.pulls == 1:
        return {name: p if ranks.local(p) is p else nn.Parameter(ranks.local(p.data)) for name, p in named.items()}
    return {name: nn.Parameter(part) for name, part in model.pull_parameters(row).items()}


def hand_over(model: Transformer, row: int, parameters: dict[str, nn.Parameter]) -> None:
    """Point a pull's `parameters` at its row of `model` and of its gradients, wherever both have moved to."""
    batched = model.config.pulls > 1
    for name, whole in model.named_parameters():
        own = parameters[name]
        if own is whole:
            continue
        own.data = whole.data[row] if batched else ranks.local(whole.data)
        own.grad = None if whole.grad is None else whole.grad[row] if batched else ranks.local(whole.grad)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


@torch.no_grad()
def grad_norms(model: Transformer, sharers: ranks.Ranks = ranks.ALONE) -> Tensor:
    """L2 norm of each pull's gradient, (pulls,); `sharers` are the ranks that each hold a part of it."""
    grads = [ranks.local(p.grad) for p in model.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(grad.reshape(model.config.pulls, -1), dim=1) for grad in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return norm if sharers.world == 1 else sharers.sum_(norm.square()).sqrt()


@torch.no_grad()
def clip(parameters: dict[str, nn.Parameter], norm: Tensor, largest: float) -> None:
    """Scale a pull's gradient down to the norm `largest` where its `norm` (a scalar tensor) is above; 0: never."""
    if largest:
        grads = [p.grad for p in parameters.values() if p.grad is not None]
        torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def update_rms(optimizers: list[torch.optim.Optimizer], sharers: ranks.Ranks = ranks.ALONE) -> Tensor:
    """RMS over AdamW's parameters of m / (sqrt(v) + eps), the step just taken in units of the learning rate.

    `sharers` are the ranks that each have a part of these.
    Near 1 early and some tenths later in a healthy run; falling to 0 means an epsilon too large (Wortsman et al. 2023).
    """
    total, count = torch.zeros(()), 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if "exp_avg" not in state:
                    continue
                beta1, beta2 = group["betas"]
                m = state["exp_avg"] / (1 - beta1 ** state["step"])
                v = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
                squares = (m / (v.sqrt() + group["eps"])).square().sum()
                total, count = total.to(squares.device) + squares, count + parameter.numel()
    if sharers.world > 1:
        total, count = sharers.sum_(torch.stack((total, torch.full_like(total, count))))
    return (total / count).sqrt()
