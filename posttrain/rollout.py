"""Completions sampled for PPO, and what models make of their tokens."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from posttrain import chat


@dataclass
class Batch:
    """Completions of a step. (completions, prompt and answer) ids and seen; the others (completions, answer)."""

    ids: Tensor
    seen: Tensor
    """1 on prompt and answer, 0 on padding"""
    mask: Tensor
    """true on the answer's tokens, its end among them"""
    ended: Tensor
    """(completions): the answer has an end"""

    @property
    def width(self) -> int:
        return self.mask.shape[1]

    def inputs(self, rows: Any) -> dict[str, Tensor]:
        seen = self.seen[rows]
        return {
            "input_ids": self.ids[rows],
            "attention_mask": seen,
            "position_ids": (seen.cumsum(-1) - 1).clamp(min=0),
        }


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[Any], max_new_tokens: int, seed: int) -> Batch:
    """One completion a prompt, from the model's own probabilities: temperature 1, nothing cut off."""
    ids = [chat.encode_prompt(tokenizer, prompt) for prompt in prompts]
    width, device = max(map(len, ids)), next(model.parameters()).device
    padded = torch.full((len(ids), width), tokenizer.pad_token_id)
    seen = torch.zeros_like(padded)
    for row, one in enumerate(ids):
        padded[row, width - len(one) :] = torch.tensor(one)
        seen[row, width - len(one) :] = 1
    ends = model.generation_config.eos_token_id
    how = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        remove_invalid_values=True,  # a broken policy is for the guard to tell, by its loss
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    padded, seen = padded.to(device), seen.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(input_ids=padded, attention_mask=seen, generation_config=how, use_cache=True)
    answer = out[:, width:]
    is_end = torch.isin(answer, torch.tensor(ends, device=device))
    mask = is_end.cumsum(-1) - is_end.long() == 0  # padding may be the end's own token
    return Batch(out, torch.cat([seen, mask.long()], dim=1), mask, (is_end & mask).any(-1))


def log_probs(model: Any, inputs: dict[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """(log-probability of each of the last `width` tokens, log-probabilities of the whole vocabulary there)."""
    logits = model(**inputs, logits_to_keep=width + 1, use_cache=False).logits[:, :-1].float()
    every = logits.log_softmax(-1)
    return every.gather(-1, inputs["input_ids"][:, -width:, None])[..., 0], every


@torch.no_grad()
def look_back(policy: Any, reference: Any, value: Any, batch: Batch, size: int) -> dict[str, Tensor]:
    """Of every token: log-probability by policy and reference, entropy of the policy in nats, value.

    reference None: the policy without its adapter. value(width, **inputs) is (rows, width). `size`: rows at once.
    """
    found: dict[str, list[Tensor]] = {"logp": [], "ref": [], "entropy": [], "values": []}
    for at in range(0, len(batch.ids), size):
        inputs = batch.inputs(slice(at, at + size))
        logp, every = log_probs(policy, inputs, batch.width)
        found["logp"].append(logp)
        found["entropy"].append(-(every.exp() * every).sum(-1))
        with policy.disable_adapter() if reference is None else nullcontext():
            found["ref"].append(log_probs(reference or policy, inputs, batch.width)[0])
        found["values"].append(value(batch.width, **inputs))
    return {name: torch.cat(parts) * batch.mask for name, parts in found.items()}
