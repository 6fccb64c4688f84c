"""Clipping a pull's gradient: by a fixed norm, or by what its own norms have been (ZClip, AdaGC).

The rules that follow a pull keep one vector of float32 on its device, which its checkpoint holds. The host reads none
of it, so that a GPU is not waited for, and an update that is not applied leaves it as it was.

    fixed   norm at most `largest` (Pascanu et al. 2013)
    zclip   with mean and sd of the norms so far, one that is z > 2.5 sd above the mean is clipped to mean + 2.5 sd
            * 2.5 / z: the further out, the closer to the mean. The clipped norm is what enters mean and sd (Kumar et
            al. 2025, arXiv 2504.02507). Those of the first 25 updates are plain averages, and clip nothing
    adagc   each tensor's norm at most 1.05 times its own moving average of clipped norms, which begins as the smallest
            one of 100 updates clipped by the global norm (Wang et al. 2025, arXiv 2502.11034, algorithm 1). A merged
            projection is one tensor
`largest` also bounds zclip's norm at all times, and adagc's in its first 100 updates alone, as published.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain import optim, ranks

Rule = Literal["fixed", "zclip", "adagc"]
ZCLIP_UPDATES, ZCLIP_KEEPS, ZCLIP_Z = 25, 0.97, 2.5
ADAGC_UPDATES, ADAGC_KEEPS, ADAGC_TIMES = 100, 0.98, 1.05


def start(rule: Rule, parameters: dict[str, nn.Parameter], device: str) -> Tensor:
    """What the rule knows before the first update.

    zclip: updates seen, mean and variance of their norms; adagc: updates seen, and the usual norm of each tensor in the
    order of `parameters`; fixed: nothing.
    """
    if rule == "fixed":
        return torch.zeros(0, device=device)
    if rule == "zclip":
        return torch.zeros(3, device=device)
    return torch.tensor([0.0, *[math.inf] * len(parameters)], device=device)


@torch.no_grad()
def clip(
    rule: Rule,
    parameters: dict[str, nn.Parameter],
    norm: Tensor,
    largest: float,
    state: Tensor,
    skipped: Tensor,
    sharers: ranks.Ranks = ranks.ALONE,
) -> None:
    """Scale a pull's gradients by `rule`, and let `state` (from `start`) learn from them unless `skipped` is 1.

    norm and skipped are scalar tensors; `largest` 0 is no bound. `sharers` are the ranks that each hold a part of the
    gradients, `norm` being that of the whole.
    """
    if rule == "fixed":
        optim.clip(parameters, norm, largest)
        return
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    bound = largest or math.inf
    if rule == "zclip":
        usual, learned = zclip(norm, state)
        torch._foreach_mul_(grads, (usual.clamp(max=bound) / (norm + 1e-6)).clamp(max=1.0))
    else:
        factors, learned = adagc(tensor_norms(grads, sharers), (bound / (norm + 1e-6)).clamp(max=1.0), state)
        torch._foreach_mul_(grads, list(factors.unbind()))
    state.copy_(torch.where(skipped > 0, state, learned))


def zclip(norm: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The norm that an update of this `norm` may have, and the state after it."""
    seen, mean, variance = state.unbind()
    deviation = variance.sqrt()
    z = (norm - mean) / (deviation + 1e-6)
    usual = torch.where((seen >= ZCLIP_UPDATES) & (z > ZCLIP_Z), mean + ZCLIP_Z**2 * deviation / z, norm)
    seen = seen + 1
    young = seen <= ZCLIP_UPDATES
    moved = mean + torch.where(young, 1 / seen, 1 - ZCLIP_KEEPS) * (usual - mean)
    keeps = torch.where(young, 1 - 1 / seen, ZCLIP_KEEPS)
    # Welford's recurrence while the average is a plain one: there the new mean is nearer to the norm than in an EMA.
    gains = torch.where(young, 1 / (seen - 1).clamp(min=1), 1 - ZCLIP_KEEPS)
    return usual, torch.stack((seen, moved, keeps * variance + gains * (usual - moved).square()))


def adagc(norms: Tensor, by_global_norm: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What each tensor's gradient is multiplied by, (tensors,) as its `norms`, and the state after it."""
    seen, usual = state[0], state[1:]
    young = seen < ADAGC_UPDATES
    factors = torch.where(young, by_global_norm, (ADAGC_TIMES * usual / norms).clamp(max=1.0).nan_to_num(1.0))
    clipped = norms * factors
    # A tensor that once had no gradient at all must not be held at none for ever.
    smallest = torch.where(clipped > 0, torch.minimum(usual, clipped), usual)
    learned = torch.where(young, smallest, ADAGC_KEEPS * usual + (1 - ADAGC_KEEPS) * clipped)
    return factors, torch.cat((seen[None] + 1, learned))


def tensor_norms(grads: list[Tensor], sharers: ranks.Ranks = ranks.ALONE) -> Tensor:
    """L2 norm of each gradient, (tensors,)."""
    norms = torch.stack(torch._foreach_norm(grads))
    return norms if sharers.world == 1 else sharers.sum_(norms.square()).sqrt()
