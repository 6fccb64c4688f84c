"""A decoder-only transformer whose parameters carry Hugging Face's names: Llama, or Qwen3 with QK-norm.

RMSNorm (Zhang & Sennrich 2019), RoPE (Su et al. 2021), SwiGLU (Shazeer 2020), grouped-query attention (Ainslie et al.
2023), QK-norm (Henry et al. 2020; per head as in Qwen3), tied embeddings (Press & Wolf 2017), z-loss (PaLM, 2022).
Because the names and the arithmetic are theirs, `state_dict()` is the checkpoint and nothing is converted on export.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_CHUNK = 1024  # tokens whose logits exist at one time: small enough for the cache, large enough for the matmul
PROBED_SEQUENCES = 2  # sequences of a batch whose attention logits are computed when they are to be logged


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; every size is a count of units, `rope_theta` is RoPE's base."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    seq_len: int
    qk_norm: bool
    tie_embeddings: bool
    rope_theta: float
    norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


def rotary_table(config: ModelConfig, length: int) -> Tensor:
    """cos and signed sin for each position, shape (2, length, head_dim), in Hugging Face's half-split layout."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / config.rope_theta**exponent)
    return torch.stack((torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """RoPE on `x` (batch, heads, length, head_dim); the halves' signs are in the table."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.q_proj = nn.Linear(c.d_model, c.n_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.d_model, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x: Tensor, rotary: Tensor, probe: list[Tensor] | None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, self.config.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q.transpose(1, 2), rotary), rotate(k.transpose(1, 2), rotary), v.transpose(1, 2)
        if probe is not None:
            probe.append(max_attention_logit(q, k))
        shared = self.config.n_heads != self.config.n_kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


@torch.no_grad()
def max_attention_logit(q: Tensor, k: Tensor) -> Tensor:
    """Largest causal attention logit over the first sequences: it grows to ~1e4 before divergence (Wortsman 2023)."""
    q, k = q[:PROBED_SEQUENCES].float(), k[:PROBED_SEQUENCES].float()
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    logits = (q @ k.transpose(-1, -2)) / math.sqrt(q.size(-1))
    visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return logits.masked_fill(~visible, -math.inf).max()


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rotary: Tensor, probe: list[Tensor] | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, probe)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.rotary = nn.Buffer(rotary_table(config, config.seq_len), persistent=False)

    def forward(self, ids: Tensor, probe: list[Tensor] | None = None) -> Tensor:
        """Hidden states (batch, length, d_model) of `ids` (batch, length)."""
        x = self.embed_tokens(ids)
        rotary = self.rotary[:, : ids.size(1)].to(x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, probe)
        return self.norm(x)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Small init, std = sqrt(2 / (5 d)), and residual outputs scaled by 1 / sqrt(2 L) (Takase et al. 2023).

        Drawn on the CPU from `seed` alone, in the order of the parameters' names: the same on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        std = math.sqrt(2 / (5 * self.config.d_model))
        for name, parameter in sorted(self.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = std / math.sqrt(2 * self.config.n_layers) if residual else std
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)

    def loss(
        self, ids: Tensor, targets: Tensor, z_loss: float, probe: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Objective to minimise and mean negative log-likelihood in nats/token of `targets` (batch, length).

        Targets of -1 are not scored. The objective adds z_loss * log(Z)^2 (PaLM, eq. 5.1); the second value never does.
        """
        hidden = self.model(ids, probe).flatten(0, 1)
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):  # HeadLoss chooses each of its dtypes itself
            objective, nll = HeadLoss.apply(hidden, self.lm_head.weight, targets.flatten(), z_loss)
        return objective, nll

    @torch.no_grad()
    def token_nll(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of every target (batch, length); 0 where the target is -1."""
        hidden = self.model(ids).flatten(0, 1)
        weight = self.lm_head.weight.to(hidden.dtype)
        parts = [
            F.cross_entropy((h @ weight.T).float(), t, ignore_index=-1, reduction="none")
            for h, t in zip(hidden.split(LOGIT_CHUNK), targets.flatten().split(LOGIT_CHUNK), strict=True)
        ]
        return torch.cat(parts).view_as(targets)

    @torch.no_grad()
    def generate(self, ids: list[int], new_tokens: int, stop_id: int, temperature: float, seed: int) -> list[int]:
        """Continue `ids` by up to `new_tokens` sampled ids, seeing the last `seq_len`, ending at `stop_id`."""
        generator = torch.Generator().manual_seed(seed)
        device = self.lm_head.weight.device
        for _ in range(new_tokens):
            window = torch.tensor([ids[-self.config.seq_len :]], device=device)
            logits = (self.model(window)[0, -1] @ self.lm_head.weight.T).float().cpu()
            drawn = int(torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator))
            ids = [*ids, drawn]
            if drawn == stop_id:
                break
        return ids

    def n_params(self) -> int:
        """Parameters, a tied embedding counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs of one token: 6 per matmul weight, plus causal attention 6 L d S.

        The embedding look-up multiplies nothing and is left out; the head multiplies, tied or not (PaLM, appendix B).
        """
        c = self.config
        matmul = sum(p.numel() for p in self.model.layers.parameters() if p.ndim == 2) + self.lm_head.weight.numel()
        return 6.0 * matmul + 6.0 * c.n_layers * c.n_heads * c.head_dim * c.seq_len


class HeadLoss(torch.autograd.Function):
    """Output head, cross-entropy and z-loss together, a chunk of tokens at a time.

    The gradient of the logits is known as soon as the logits are, so it is taken in the forward pass and the logits of
    the whole batch never exist: less memory and one pass over the vocabulary fewer than autograd's way.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        """hidden (tokens, d_model), weight (vocab, d_model), targets (tokens,) with -1 for positions not scored."""
        matrix = weight.to(hidden.dtype)
        wants_grad = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        grad_weight = torch.zeros_like(matrix, dtype=torch.float32) if wants_grad else None
        scored = targets >= 0
        count = scored.sum()
        nll_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        z_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.size(0), LOGIT_CHUNK):
            part = slice(start, start + LOGIT_CHUNK)
            logits = (hidden[part] @ matrix.T).float()
            keep, index = scored[part], targets[part].clamp(min=0).unsqueeze(1)
            top = logits.amax(dim=1, keepdim=True)
            at_target = logits.gather(1, index) - top
            exponentials = logits.sub_(top).exp_()
            z = exponentials.sum(dim=1, keepdim=True)
            log_sum = z.log()
            log_z = (log_sum + top).squeeze(1)
            nll_sum += ((log_sum - at_target).squeeze(1) * keep).sum()
            z_sum += (log_z.square() * keep).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # The gradient of nll + z_loss log_z^2 in the logits is steeper (p - onehot / steeper). That factor and p's
            # 1/z scale the narrow side of each product below instead of passing over the vocabulary once more.
            steeper = 1 + 2 * z_loss * log_z
            scale = (keep / count * steeper).unsqueeze(1) / z
            grad = exponentials.scatter_add_(1, index, -z / steeper.unsqueeze(1)).to(hidden.dtype)
            torch.mm(grad, matrix, out=grad_hidden[part])
            grad_hidden[part] *= scale
            scaled = (hidden[part] * scale).to(hidden.dtype)
            if hidden.dtype == torch.float32:
                grad_weight.addmm_(grad.T, scaled)
            else:
                grad_weight += grad.T @ scaled
        if wants_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        nll = nll_sum / count
        ctx.mark_non_differentiable(nll)
        return nll + z_loss * z_sum / count, nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grads[0]), grad_weight.mul_(grads[0]), None, None
