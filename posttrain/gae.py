"""The arithmetic of PPO on completions: advantages, losses and the KL coefficient, on tensors alone.

All tensors are (completions, tokens); `mask` is true on the tokens that were sampled, the token that ends the answer
among them. PPO: Schulman et al. 2017. Its details for language models: Huang et al. 2024 (arXiv 2403.17031).
"""

import torch
from torch import Tensor


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) by generalised advantage estimation (Schulman et al. 2016, equation 16).

    Nothing comes after an answer's last token. Both are 0 where `mask` is false.
    """
    values = values * mask
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    surprise = (rewards + gamma * after - values) * mask
    advantages = torch.zeros_like(rewards)
    carried = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        carried = surprise[:, t] + gamma * lam * carried
        advantages[:, t] = carried
    return advantages * mask, (advantages + values) * mask


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens where `mask` is true."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor, shift: bool = True) -> Tensor:
    """`values` with variance 1 over the mask, and mean 0 or, without `shift`, the mean that they had."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift else white + mean) * mask


def policy_losses(logp: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(the clipped surrogate's loss of every token, the ratio of new to old probabilities)."""
    ratio = torch.exp(logp - old)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), ratio


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of every token, at least what it would be had the value moved by no more than `clip`."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 a constant; 0 where returns do not vary."""
    chosen, told = returns[mask], (returns - values)[mask]
    variance = float(chosen.var(unbiased=False))
    return 1 - float(told.var(unbiased=False)) / variance if variance > 1e-12 else 0.0


def adapted(coefficient: float, kl: float, target: float, horizon: float, completions: int) -> float:
    """The next KL coefficient (Ziegler et al. 2019, section 2.2): up while the KL, nats a completion, is above target.

    The error is clipped at a fifth, so that a batch moves the coefficient by a fifth of its share of the horizon.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * completions / horizon)
