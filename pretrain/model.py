"""A decoder-only transformer, or many of one shape trained together: Llama, or Qwen3 with QK-norm.

RMSNorm (Zhang & Sennrich 2019), RoPE (Su et al. 2021), SwiGLU (Shazeer 2020), grouped-query attention (Ainslie et al.
2023), QK-norm (Henry et al. 2020; per head as in Qwen3), tied embeddings (Press & Wolf 2017), z-loss (PaLM, 2022).

A small model leaves most of a machine idle between its small matrix products. So P pulls of one architecture are one
model here: every parameter has a leading pull dimension, every product is batched over it, and the pulls are folded
into attention's batch. Nothing is shared: row k of every parameter, gradient and loss is pull k's alone. With one pull
the parameters are plain matrices.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain import attention, parametrization, ranks

LOGIT_CHUNK = {"cpu": 1024, "cuda": 8192}  # tokens whose logits exist at one time: a cache's worth, a GPU's worth


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
    pulls: int = 1
    """models trained together, each with weights of its own"""
    document_start: int | None = None
    """token that opens a document, which attention does not cross then; None: it sees the whole window"""
    checkpoint_activations: bool = False
    """keep only each block's input for the backward pass and compute the block again there"""
    parametrization: Literal["sp", "mup"] = "sp"
    base_width: int = 0
    """d_model, n_layers and head_dim at which mup is the same as sp"""
    base_depth: int = 0
    base_head_dim: int = 0
    embedding_scale: float = 1.0
    """what embedded tokens are multiplied by, folded into the weights' initial values and steps"""
    init: Literal["small", "plain"] = "small"
    """plain: o_proj and down_proj are drawn as all other matrices"""
    init_std: float = 0.0
    """std of the matrices; 0: sqrt(2 / (5 d_model))"""

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


def rotary_table(config: ModelConfig, length: int) -> Tensor:
    """cos and signed sin for each position, shape (2, length, head_dim), in Hugging Face's half-split layout."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / config.rope_theta**exponent)
    return torch.stack((torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """RoPE on `x` (..., heads, length, head_dim); the halves' signs are in the table."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


class Matrix(nn.Module):
    """x W^T for every pull: weight (rows, columns), or (pulls, rows, columns) for more than one."""

    def __init__(self, pulls: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((pulls, rows, columns) if pulls > 1 else (rows, columns)))

    def forward(self, x: Tensor) -> Tensor:
        """(pulls, n, columns) to (pulls, n, rows)."""
        return F.linear(x, self.weight) if self.weight.ndim == 2 else torch.bmm(x, self.weight.mT)


class Embedding(Matrix):
    def forward(self, ids: Tensor) -> Tensor:
        """(pulls, batch, length) to (pulls, batch * length, d_model)."""
        if self.weight.ndim == 2:
            return F.embedding(ids, self.weight).flatten(1, 2)
        first_row = torch.arange(0, self.weight.size(0) * self.weight.size(1), self.weight.size(1), device=ids.device)
        return F.embedding(ids + first_row[:, None, None], self.weight.flatten(0, 1)).flatten(1, 2)


class RMSNorm(nn.Module):
    def __init__(self, pulls: int, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((pulls, size) if pulls > 1 else (size,)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`x` (pulls, ..., size)."""
        if self.weight.ndim == 1:
            return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)
        gain = self.weight.to(x.dtype).view(x.size(0), *[1] * (x.ndim - 2), x.size(-1))
        return F.rms_norm(x, (x.size(-1),), None, self.eps) * gain


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.qkv_proj = Matrix(c.pulls, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, c.d_model)
        self.o_proj = Matrix(c.pulls, c.d_model, c.n_heads * c.head_dim)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.pulls, c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.pulls, c.head_dim, c.norm_eps)

    def forward(
        self, x: Tensor, rotary: Tensor, mask: attention.Mask | None, probe: bool
    ) -> tuple[Tensor, Tensor | None]:
        c, length = self.config, rotary.size(1)
        heads = self.qkv_proj(x).view(x.size(0), -1, length, c.n_heads + 2 * c.n_kv_heads, c.head_dim)
        q, k, v = heads.split((c.n_heads, c.n_kv_heads, c.n_kv_heads), dim=3)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.flatten(0, 1).transpose(1, 2) for part in (q, k, v))
        q, k = rotate(q, rotary), rotate(k, rotary)
        top = attention.max_logit(q, k, x.size(0)) if probe else None
        y = attention.attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(x.size(0), x.size(1), -1)), top


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Matrix(config.pulls, 2 * config.d_ff, config.d_model)
        self.down_proj = Matrix(config.pulls, config.d_model, config.d_ff)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.pulls, config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.pulls, config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, rotary: Tensor, mask: attention.Mask | None, probe: bool
    ) -> tuple[Tensor, Tensor | None]:
        attended, top = self.self_attn(self.input_layernorm(x), rotary, mask, probe)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), top


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.pulls, config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.pulls, config.d_model, config.norm_eps)
        self.rotary = nn.Buffer(rotary_table(config, config.seq_len), persistent=False)

    def forward(self, ids: Tensor, probe: bool = False) -> tuple[Tensor, Tensor | None]:
        """Hidden states (pulls, batch * length, d_model) of `ids` (pulls, batch, length).

        With `probe` also the largest attention logit of each layer (layers, pulls), see `attention.max_logit`.
        """
        x = self.embed_tokens(ids)
        rotary = self.rotary[:, : ids.size(2)].to(x.dtype)
        start = self.config.document_start
        mask = None if start is None else attention.document_mask(ids.flatten(0, 1), start)
        tops = []
        for layer in self.layers:
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                x, top = checkpoint(layer, x, rotary, mask, probe, use_reentrant=False)
            else:
                x, top = layer(x, rotary, mask, probe)
            tops.append(top)
        return self.norm(x), torch.stack(tops) if probe else None


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Matrix(config.pulls, config.vocab_size, config.d_model)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, seeds: list[int]) -> None:
        """Normal draws whose scale `parametrization.rule` sets, pull k's from `seeds[k]` alone.

        Drawn on the CPU in the order of Hugging Face's names: the same on every device, in any company, merged or not.
        """
        for row, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            parameters = self.pull_parameters(row)
            for _, (name, rows) in sorted(hugging_face_parts(self.config).items()):
                scale, part = parametrization.rule(name, self.config, "adamw").init, parameters[name][rows]
                part.copy_(torch.randn(part.shape, generator=generator) if part.ndim == 2 else torch.ones(part.shape))
                part.mul_(scale)

    def compile_blocks(self) -> None:
        """torch.compile each block: all have one shape, so that one compilation serves every layer."""
        for layer in self.model.layers:
            layer.compile()

    def pull_parameters(self, row: int) -> dict[str, Tensor]:
        """Parameters of one pull, as plain matrices and vectors that share memory with the model's."""
        named = self.named_parameters()
        return {name: p.data[row] if self.config.pulls > 1 else p.data for name, p in named}

    def selected(self, rows: list[int]) -> "Transformer":
        """A smaller batch: the pulls of `rows` alone, their weights copied."""
        smaller = Transformer(replace(self.config, pulls=len(rows))).to(self.lm_head.weight.device)
        for new, old in enumerate(rows):
            source = self.pull_parameters(old)
            for name, part in smaller.pull_parameters(new).items():
                part.copy_(source[name])
        return smaller

    def forward(
        self, ids: Tensor, targets: Tensor, z_loss: float, counts: Tensor | None = None, probe: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The objective to minimise, summed over pulls, and each pull's mean negative log-likelihood in nats/token.

        `ids`, `targets` (pulls, batch, length); targets of -1 are not scored. The sums over tokens are divided by
        `counts` (pulls,): the scored tokens of the whole batch where this call sees only a part of it, else of this
        call. The objective adds z_loss * log(Z)^2 (PaLM, eq. 5.1); the second value (pulls,) never does. The third is
        each layer's largest attention logit (layers, pulls), with `probe`.
        """
        hidden, tops = self.model(ids, probe)
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        targets = targets.flatten(1)
        counts = (targets >= 0).sum(1) if counts is None else counts
        with torch.autocast(device, enabled=False):  # HeadLoss chooses each of its dtypes itself
            objective, nll = HeadLoss.apply(hidden, self.lm_head.weight, targets, counts, z_loss)
        return objective.sum(), nll, tops

    @torch.no_grad()
    def token_nll(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of every target (pulls, batch, length); 0 where the target is -1."""
        hidden, _ = self.model(ids)
        weight = self.lm_head.weight.to(hidden.dtype).view(hidden.size(0), -1, hidden.size(-1))
        chunk = LOGIT_CHUNK[hidden.device.type]
        nll = torch.empty(targets.flatten(1).shape, device=hidden.device)
        for row, start in ((r, s) for r in range(hidden.size(0)) for s in range(0, hidden.size(1), chunk)):
            logits = (hidden[row, start : start + chunk] @ weight[row].T).float()
            part = targets[row].flatten()[start : start + chunk]
            nll[row, start : start + chunk] = F.cross_entropy(logits, part, ignore_index=-1, reduction="none")
        return nll.view_as(targets)

    @torch.no_grad()
    def generate(
        self, prompt: list[int], new_tokens: int, stop_id: int, temperature: float, seeds: list[int]
    ) -> list[list[int]]:
        """Each pull's continuation of `prompt` by up to `new_tokens` ids, sampled from its own seed, up to `stop_id`.

        A model sees the last `seq_len` ids.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        ids = torch.tensor(prompt).repeat(self.config.pulls, 1)
        device = self.lm_head.weight.device
        for _ in range(new_tokens):
            window = ids[:, None, -self.config.seq_len :].to(device)
            last = self.model(window)[0][:, -1:]
            logits = self.lm_head(last)[:, 0].float().cpu()
            # A pull that is not finite, and trained on (--on_divergence ignore), may say anything.
            likely = F.softmax(logits / temperature, dim=-1).nan_to_num(1.0)
            rows = zip(likely, generators, strict=True)
            drawn = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
            ranks.as_on_first(drawn)
            ids = torch.cat((ids, drawn), dim=1)
            if (ids[:, len(prompt) :] == stop_id).any(1).all():
                break
        texts = [row[len(prompt) :] for row in ids.tolist()]
        return [prompt + row[: row.index(stop_id) + 1 if stop_id in row else len(row)] for row in texts]

    def n_params(self) -> int:
        """Parameters of one pull, a tied embedding counted once."""
        return sum(p.numel() for p in self.parameters()) // self.config.pulls

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs of one token of one pull: 6 per matmul weight, plus causal attention 6 L d S.

        The embedding look-up multiplies nothing and is left out; the head multiplies, tied or not (PaLM, appendix B).
        """
        c = self.config
        matmul = sum(m.weight.numel() for m in self.modules() if isinstance(m, Matrix) and not isinstance(m, Embedding))
        return 6.0 * matmul / c.pulls + 6.0 * c.n_layers * c.n_heads * c.head_dim * c.seq_len


def hugging_face_parts(c: ModelConfig) -> dict[str, tuple[str, slice]]:
    """Hugging Face's name of every weight: our parameter that holds it, and its rows there."""
    every = slice(None)
    parts = {name: (name, every) for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    if c.tie_embeddings:
        del parts["lm_head.weight"]
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    for layer in (f"model.layers.{number}" for number in range(c.n_layers)):
        qkv, gate_up = f"{layer}.self_attn.qkv_proj.weight", f"{layer}.mlp.gate_up_proj.weight"
        parts[f"{layer}.self_attn.q_proj.weight"] = qkv, slice(0, q)
        parts[f"{layer}.self_attn.k_proj.weight"] = qkv, slice(q, q + kv)
        parts[f"{layer}.self_attn.v_proj.weight"] = qkv, slice(q + kv, q + 2 * kv)
        parts[f"{layer}.mlp.gate_proj.weight"] = gate_up, slice(0, c.d_ff)
        parts[f"{layer}.mlp.up_proj.weight"] = gate_up, slice(c.d_ff, 2 * c.d_ff)
        own = ["self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
        own += ["self_attn.q_norm", "self_attn.k_norm"] if c.qk_norm else []
        parts |= {f"{layer}.{name}.weight": (f"{layer}.{name}.weight", every) for name in own}
    return parts


def hugging_face_weights(model: Transformer, row: int) -> dict[str, Tensor]:
    """Weights of one pull under Hugging Face's names, sharing memory with the model's."""
    return taken_apart(model.pull_parameters(row), model.config)


def taken_apart(parameters: dict[str, Tensor], c: ModelConfig) -> dict[str, Tensor]:
    """Parameters under our names as views under Hugging Face's."""
    return {name: parameters[ours][rows] for name, (ours, rows) in hugging_face_parts(c).items()}


def load_hugging_face_weights(model: Transformer, row: int, weights: dict[str, Tensor]) -> None:
    """Put weights under Hugging Face's names into one pull. Raises KeyError for a missing one."""
    for name, part in hugging_face_weights(model, row).items():
        part.copy_(weights[name])


class HeadLoss(torch.autograd.Function):
    """Output head, cross-entropy and z-loss together, a chunk of tokens at a time.

    The gradient of the logits is known as soon as the logits are, so it is taken in the forward pass and the logits of
    the whole batch never exist: less memory and one pass over the vocabulary fewer than autograd's way.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        """Objective and mean nll of each pull, both (pulls,); the objective alone has a gradient.

        hidden (pulls, tokens, d_model), weight (vocab, d_model) or (pulls, vocab, d_model), targets (pulls, tokens)
        with -1 for positions not scored, counts (pulls,) what the sums over tokens are divided by.
        """
        pulls, tokens, _ = hidden.shape
        matrix = weight.to(hidden.dtype).view(pulls, -1, hidden.size(-1))
        wants_grad = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        grad_weight = torch.zeros_like(matrix, dtype=torch.float32) if wants_grad else None
        nll = torch.zeros(pulls, dtype=torch.float32, device=hidden.device)
        z_sum = torch.zeros(pulls, dtype=torch.float32, device=hidden.device)
        # A CPU takes one pull after another, whose logits stay in its cache; a GPU is fed with all of them at once.
        chunk, together = LOGIT_CHUNK[hidden.device.type], 1 if hidden.device.type == "cpu" else pulls
        chunk = max(1, chunk // together)
        for first, start in ((p, s) for p in range(0, pulls, together) for s in range(0, tokens, chunk)):
            some, part = slice(first, first + together), slice(start, start + chunk)
            logits = torch.bmm(hidden[some, part], matrix[some].mT).float()
            keep = targets[some, part] >= 0
            index = targets[some, part].clamp(min=0).unsqueeze(2)
            share = keep / counts[some, None]
            top = logits.amax(dim=2, keepdim=True)
            at_target = logits.gather(2, index) - top
            exponentials = logits.sub_(top).exp_()
            z = exponentials.sum(dim=2, keepdim=True)
            log_sum = z.log()
            log_z = (log_sum + top).squeeze(2)
            nll[some] += ((log_sum - at_target).squeeze(2) * share).sum(1)
            z_sum[some] += (log_z.square() * share).sum(1)
            if grad_hidden is None or grad_weight is None:
                continue
            # The gradient of nll + z_loss log_z^2 in the logits is steeper (p - onehot / steeper). That factor and p's
            # 1/z scale the narrow side of each product below instead of passing over the vocabulary once more.
            steeper = 1 + 2 * z_loss * log_z
            scale = (share * steeper).unsqueeze(2) / z
            grad = exponentials.scatter_add_(2, index, -z / steeper.unsqueeze(2)).to(hidden.dtype)
            torch.bmm(grad, matrix[some], out=grad_hidden[some, part]).mul_(scale)
            scaled = (hidden[some, part] * scale).to(hidden.dtype)
            if hidden.dtype == torch.float32:
                grad_weight[some].baddbmm_(grad.mT, scaled)
            else:
                grad_weight[some] += torch.bmm(grad.mT, scaled)
        if grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.view_as(weight))
        ctx.mark_non_differentiable(nll)
        return nll + z_loss * z_sum, nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        each = grads[0].view(-1, 1, 1)
        return grad_hidden.mul_(each), grad_weight.mul_(each if grad_weight.ndim == 3 else grads[0]), None, None, None
