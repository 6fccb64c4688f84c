"""From a configuration to the shape of its models, and to what of a batch goes through them at a time."""

from typing import TYPE_CHECKING, Any

from data import shards
from pretrain.model import ModelConfig

if TYPE_CHECKING:
    from pretrain.pretrain import PretrainConfig

CACHED_TOKENS = 8192  # of all pulls in one pass on a CPU, whose cache holds what a few thousand tokens need


def model_config(c: "PretrainConfig", manifest: dict[str, Any], pulls: int) -> ModelConfig:
    """The shape of `pulls` models of a configuration, for the vocabulary of shards."""
    return ModelConfig(
        vocab_size=manifest["vocab_size"],
        d_model=c.d_model,
        n_layers=c.n_layers,
        n_heads=c.n_heads,
        n_kv_heads=c.n_kv_heads,
        d_ff=c.d_ff,
        seq_len=c.seq_len,
        qk_norm=c.qk_norm,
        tie_embeddings=c.tie_embeddings,
        rope_theta=c.rope_theta,
        norm_eps=c.norm_eps,
        pulls=pulls,
        document_start=shards.document_ids(manifest)[0] if c.doc_mask else None,
        checkpoint_activations=c.checkpoint_activations,
        parametrization=c.parametrization,
        base_width=c.base_width,
        base_depth=c.base_depth,
        base_head_dim=c.base_head_dim,
        embedding_scale=c.embedding_scale,
        init=c.init,
        init_std=c.init_std,
    )


def micro_batch(c: "PretrainConfig", pulls: int) -> int:
    """Sequences of one pull in one forward and backward pass."""
    if c.micro_batch_tokens:
        return c.micro_batch_tokens // c.seq_len
    sequences = c.batch_tokens // c.seq_len
    return max(1, CACHED_TOKENS // (pulls * c.seq_len)) if c.device == "cpu" and pulls > 1 else sequences
