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
    follows too. Where `measures`, it keeps the `squares` of its updates for `step_squares`.
    """

    found_inf: Tensor | None = None
    measures = False
    squares: dict[Tensor, Tensor]

    def __init__(self, groups: list[dict], momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        self.squares = {}
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, slice, Tensor]]] = defaultdict(list)
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
                    by_shape[direction[part].shape].append((parameter, held, update, direction[part]))
            for shape, pieces in by_shape.items():
                updates = orthogonalize(torch.stack([direction for *_, direction in pieces]))
                size = 0.2 * math.sqrt(max(shape))
                scale = group["lr"] * size
                for (parameter, held, own, _), update in zip(pieces, updates, strict=True):
                    if self.measures:
                        square = (size * torch.linalg.vector_norm(update[own])).square()
                        self.squares[parameter] = self.squares.get(parameter, 0) + square
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
def parameter_norms(model: Transformer) -> Tensor:
    """L2 norm of the gradient of each parameter of each pull, (parameters, pulls), of the rows on this rank."""
    grads = [ranks.local(p.grad) for p in model.parameters() if p.grad is not None]
    return torch.stack([torch.linalg.vector_norm(grad.reshape(model.config.pulls, -1), dim=1) for grad in grads])


@torch.no_grad()
def grad_norms(norms: Tensor, sharers: ranks.Ranks = ranks.ALONE) -> Tensor:
    """L2 norm of each pull's gradient, (pulls,), from `parameter_norms`; `sharers` are the ranks with a part of it."""
    norm = torch.linalg.vector_norm(norms, dim=0)
    return norm if sharers.world == 1 else sharers.sum_(norm.square()).sqrt()


@torch.no_grad()
def clip(parameters: dict[str, nn.Parameter], norm: Tensor, largest: float) -> None:
    """Scale a pull's gradient down to the norm `largest` where its `norm` (a scalar tensor) is above; 0: never."""
    if largest:
        grads = [p.grad for p in parameters.values() if p.grad is not None]
        torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def update_rms(optimizers: list[torch.optim.Optimizer]) -> Tensor:
    """RMS over AdamW's parameters of m / (sqrt(v) + eps), the step just taken in units of the learning rate.

    Near 1 early and some tenths later in a healthy run; falling to 0 means an epsilon too large (Wortsman et al. 2023).
    """
    squares = adamw_squares(optimizers[-1])
    return (torch.stack([*squares.values()]).sum() / sum(parameter.numel() for parameter in squares)).sqrt()


@torch.no_grad()
def step_squares(parameters: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> Tensor:
    """Sum of squares over each of a pull's `parameters` of the step just taken in units of the learning rate.

    Without weight decay, (parameters,), of the rows on this rank. Muon's are of a step that it took with `measures`.
    """
    found = adamw_squares(optimizers[-1])
    for optimizer in optimizers[:-1]:
        assert isinstance(optimizer, Muon)
        found |= optimizer.squares
    return torch.stack([found[parameter] for parameter in parameters.values()])


def adamw_squares(adamw: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Sum of squares of m / (sqrt(v) + eps) over each parameter that has had a gradient.

    The corrections of both moments' bias are taken out of the elements' arithmetic: one pass over memory less for each.
    """
    squares: dict[Tensor, Tensor] = {}
    for group in adamw.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            state = adamw.state[parameter]
            if "exp_avg" not in state:
                continue
            root = (1 - beta2 ** state["step"]).sqrt()
            size = state["exp_avg_sq"].sqrt().add_(group["eps"] * root)
            torch.div(state["exp_avg"], size, out=size)
            squares[parameter] = (torch.linalg.vector_norm(size) * root / (1 - beta1 ** state["step"])).square()
    return squares
