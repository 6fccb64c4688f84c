"""Causal attention within a window, or within its documents, and how large its logits are."""

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | BlockMask
else:
    Mask = Any

PROBED_SEQUENCES = 2  # sequences of a pull's batch whose attention logits are computed when they are to be logged


def document_mask(ids: Tensor, start: int) -> Mask:
    """Who sees whom when documents do not see each other: `ids` (batch, length), each document opened by `start`.

    On a GPU a block mask of FlexAttention (Dong et al. 2024), which skips the blocks between documents; on a CPU what
    is added to the logits (batch, 1, length, length), which costs its attention kernel nothing: booleans would be made
    into this once a layer.
    """
    document = (ids == start).cumsum(1)
    if not ids.is_cuda:
        seen = (document[:, None, :, None] == document[:, None, None, :]).tril()
        return torch.where(seen, 0.0, -math.inf)
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # noqa: ARG001
        return (q >= k) & (document[b, q] == document[b, k])

    return create_block_mask(visible, ids.size(0), None, ids.size(1), ids.size(1), device=ids.device)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    """Causal attention: q (batch, heads, length, head_dim), k and v the same or with fewer heads, each for a group."""
    shared = q.size(1) != k.size(1)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)
    return _flex()(q, k, v, block_mask=mask, enable_gqa=shared)


@cache
def _flex() -> Any:
    """FlexAttention is a template: without torch.compile it would make the dense matrix that it is there to avoid."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@torch.no_grad()
def max_logit(q: Tensor, k: Tensor, pulls: int) -> Tensor:
    """Largest causal attention logit over each pull's first sequences (pulls,): q, k (pulls * batch, heads, ...).

    It grows to ~1e4 before divergence (Wortsman et al. 2023).
    """
    q, k = (x.unflatten(0, (pulls, -1))[:, :PROBED_SEQUENCES].float() for x in (q, k))
    k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
    logits = (q @ k.mT) / math.sqrt(q.size(-1))
    visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return logits.masked_fill(~visible, -math.inf).flatten(1).amax(1)
