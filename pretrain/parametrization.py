"""How initial weights, learning rates, epsilons and decays follow the model's size: SP, or μP with CompleteP's depth.

SP (what everyone trains): every matrix is drawn with std = sqrt(2 / (5 d_model)), residual outputs with that divided by
sqrt(2 n_layers) (Takase et al. 2023), every norm's gain is 1, one learning rate for all. `init` and `init_std` change
that draw, `embedding_scale` is what embedded tokens are multiplied by.

μP: hyper-parameters tuned at a base size hold at another. In the forward-multiplier form of Yang et al. 2022 (Tensor
Programs V, tables 3 and 8) and Dey et al. 2025 (CompleteP, table 1, alpha = 1), with width m = d_model / base_width,
depth r = n_layers / base_depth and head h = head_dim / base_head_dim:

    parameter           forward          init std     AdamW lr    AdamW eps    decay
    embedding           1                s            1           1/m          1
    norm gains          1                1            1           1/(m r)      0
    hidden matrices     residual 1/r     s/sqrt(m)    1/m         1/(m r)      m
    logits (head)       1/m              s            1           1/m          1
    attention logits    1/sqrt(h)        (so that they are q.k / head_dim, times a constant of the base)

s is SP's std at the base size, so that at m = r = h = 1 μP is SP to the bit. The decay's factor keeps lr *
weight_decay, the share of a matrix that a step takes off (Wortsman et al. 2023; CompleteP's lambda * m). The epsilon
follows the gradient's RMS.

A checkpoint must be a plain Llama or Qwen3 that knows no multipliers, so none is in the forward pass. With W' = c W in
place of c inside it, training is the same function of time if init and lr are multiplied by c, and eps and decay
divided (Yang et al. 2022, lemma J.1: neither Adam's step nor Muon's sees the gradient's scale). Each one's place:

    1/r of a branch     into o_proj and down_proj
    1/m of the logits   into lm_head; with tied embeddings into the final norm's gain, which only the head reads
    1/sqrt(h)           into q_norm's gain; without QK-norm every row of qkv_proj takes h^(-1/4), which gives q.k its
                        h^(-1/2) and v an h^(-1/4) that o_proj undoes (rows of one matrix cannot have their own lr)
    embedding_scale     into embed_tokens; where the head is the same matrix and must not be scaled, divided out of the
                        final norm's gain

Muon on hidden matrices: a step's spectral norm is lr * 0.2 sqrt(max(rows, columns)) and should be of the order of
sqrt(rows / columns) (Yang, Simon & Bernstein 2023, condition 1), which is constant where all widths grow together: the
learning rate goes with 1/sqrt(m). The rest is AdamW's, with AdamW's rule. Depth: CompleteP's 1/r, as for AdamW.

Two things are outside the rule. Widths grow together: d_ff, heads times head_dim, and key-value heads in proportion to
d_model. Clipping by the global gradient norm is not equivariant: folded gradients are c times smaller, and the head's
share of the norm grows with sqrt(m), so that a large model is clipped more often; AdamW and Muon hardly notice.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pretrain.model import ModelConfig


@dataclass(frozen=True)
class Rule:
    """`init` is the std of a matrix's normal draw, or what a gain is filled with; the others multiply the flags'."""

    init: float
    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0


def rule(name: str, config: "ModelConfig", optimizer: Literal["adamw", "muon"]) -> Rule:
    """The rule of the parameter `name`, as `Transformer.named_parameters` calls it."""
    c = config
    in_block, gain = ".layers." in name, name.endswith("norm.weight")
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    base_width, base_depth, base_head = c.d_model, c.n_layers, c.head_dim  # SP: every model is its own base
    if c.parametrization == "mup":
        base_width, base_depth, base_head = c.base_width, c.base_depth, c.base_head_dim
    m, r, h = c.d_model / base_width, c.n_layers / base_depth, c.head_dim / base_head
    std = c.init_std or math.sqrt(2 / (5 * base_width))
    if residual and c.init == "small":
        std /= math.sqrt(2 * base_depth)
    if not in_block:
        plain, multiplier = Rule(init=1.0 if gain else std, eps=1 / m), 1.0
        if name == ("model.norm.weight" if c.tie_embeddings else "lm_head.weight"):
            multiplier = 1 / m
        if name == "model.embed_tokens.weight":
            multiplier = c.embedding_scale
        elif c.tie_embeddings:
            multiplier /= c.embedding_scale
    elif gain:
        plain = Rule(init=1.0, eps=1 / (m * r))
        multiplier = h**-0.5 if name.endswith("q_norm.weight") else 1.0
    else:
        lr = 1 / m if optimizer == "adamw" else 1 / math.sqrt(m)
        plain = Rule(init=std / math.sqrt(m), lr=lr, eps=1 / (m * r), weight_decay=1 / lr)
        multiplier = 1 / r if residual else 1.0
        if not c.qk_norm and name.endswith("qkv_proj.weight"):
            multiplier *= h**-0.25
        if not c.qk_norm and name.endswith("o_proj.weight"):
            multiplier *= h**0.25
    return Rule(
        init=plain.init * multiplier,
        lr=plain.lr * multiplier,
        eps=plain.eps / multiplier,
        weight_decay=plain.weight_decay / multiplier,
    )
