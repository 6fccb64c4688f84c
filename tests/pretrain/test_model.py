"""The model against transformers' own on what training writes, its loss and counts against plain arithmetic."""

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import attention, checkpoint
from pretrain.model import LOGIT_CHUNK, HeadLoss, ModelConfig, Transformer, load_hugging_face_weights

if TYPE_CHECKING:
    from tests.conftest import Pull

SHAPE: dict[str, Any] = {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
SHAPE |= {"seq_len": 24, "qk_norm": False, "tie_embeddings": False, "rope_theta": 1e4, "norm_eps": 1e-6}


def model(seed: int = 0, **changes: Any) -> Transformer:
    made = Transformer(ModelConfig(**SHAPE | changes))
    made.init_weights([seed] * made.config.pulls)
    return made


def sentences(n: int, config: ModelConfig, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.vocab_size, (1, n, config.seq_len), generator=generator)


@pytest.mark.parametrize(
    ("name", "family"),
    [("llama", "LlamaForCausalLM"), ("untied", "LlamaForCausalLM"), ("qwen", "Qwen3ForCausalLM")],
)
def test_a_checkpoint_has_the_same_logits_in_transformers(
    name: str, family: str, request: pytest.FixtureRequest
) -> None:
    """Trained weights with grouped queries, tied and not, with and without QK-norm, over the whole context."""
    from transformers import AutoModelForCausalLM

    pull: Pull = request.getfixturevalue(name)
    c = pull.flags
    kept = {"vocab_size": 1536, "qk_norm": False, "tie_embeddings": True, **{k: c[k] for k in SHAPE if k in c}}
    ours = Transformer(ModelConfig(**{**SHAPE, **kept}))
    load_hugging_face_weights(ours, 0, checkpoint.load(pull.checkpoint)[1])
    theirs = AutoModelForCausalLM.from_pretrained(pull.checkpoint)
    assert type(theirs).__name__ == family
    assert theirs.config.tie_word_embeddings == kept["tie_embeddings"]
    assert sum(p.numel() for p in theirs.parameters()) == ours.n_params()
    ids = sentences(4, ours.config)
    with torch.no_grad():
        logits = ours.lm_head(ours.model(ids)[0]).view(*ids[0].shape, -1)
        difference = (logits - theirs(ids[0]).logits).abs().max()
    assert logits.std() > 0.5, "weights too small to tell two models apart"
    assert difference < 1e-4


def test_a_checkpoint_has_the_same_ids_in_transformers(llama: "Pull") -> None:
    """AutoTokenizer against the SentencePiece model that lies in the same folder."""
    import sentencepiece as spm
    from transformers import AutoTokenizer

    processor = spm.SentencePieceProcessor(model_file=str(llama.checkpoint / "tokenizer.model"))
    texts = ["件名:納期のご確認\n営業部 佐藤様", "合計 12,345 円(税込)", "  <s> 😀 Linux\t終", ""]
    tokenizer = AutoTokenizer.from_pretrained(llama.checkpoint)
    assert tokenizer(texts).input_ids == processor.encode(texts)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """The textbook's way, by autograd, with the whole batch's logits."""
    logits = hidden @ weight.T
    scored = targets >= 0
    nll = F.cross_entropy(logits, targets, ignore_index=-1)
    return nll + z_loss * torch.logsumexp(logits[scored], dim=1).square().mean(), nll


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("spread", [1.0, 40.0])
@pytest.mark.parametrize("tokens", [7, 2 * LOGIT_CHUNK["cpu"] + 300])
def test_head_loss_is_cross_entropy_plus_z_loss(tokens: int, spread: float, z_loss: float) -> None:
    """Value and both gradients, over several chunks, a fifth of the targets masked, also with huge logits."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 12, generator=generator) * spread
    weight = torch.randn(90, 12, generator=generator)
    targets = torch.randint(0, 90, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.2] = -1
    targets[0] = -1
    found: list[Any] = []
    wanted: list[Any] = []

    def ours(h: Tensor, w: Tensor) -> list[Tensor]:
        counts = (targets >= 0).sum()[None]
        return [value[0] for value in HeadLoss.apply(h[None], w, targets[None], counts, z_loss)]

    def textbook(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return reference(h, w, targets, z_loss)

    for head, out, kind in ((ours, found, torch.float32), (textbook, wanted, torch.float64)):
        h, w = (tensor.to(kind, copy=True).requires_grad_() for tensor in (hidden, weight))
        objective, nll = head(h, w)
        (3 * objective).backward()
        out += [objective.detach(), nll.detach(), h.grad, w.grad]
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-6 * spread)
    assert not found[2][targets < 0].any(), "a masked position pulled on its hidden state"


@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradients_of_the_whole_model_are_those_of_autograd(qk_norm: bool) -> None:
    """With tied embeddings, whose gradient comes from both ends."""
    ours, theirs = (model(tie_embeddings=True, qk_norm=qk_norm) for _ in range(2))
    ids, targets = sentences(3, ours.config), sentences(3, ours.config, seed=1)
    targets[..., ::5] = -1
    objective, nll, _ = ours(ids, targets, 1e-2)
    objective.backward()
    expected, plain = reference(theirs.model(ids)[0][0], theirs.lm_head.weight, targets.flatten(), 1e-2)
    expected.backward()
    torch.testing.assert_close((objective, nll[0]), (expected, plain))
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)


def test_token_nll_agrees_with_the_training_loss() -> None:
    """Masked targets count nothing in either; the mean over scored ones is the loss."""
    made = model()
    ids, targets = sentences(60, made.config), sentences(60, made.config, seed=1)  # 1,440 tokens: two chunks
    targets[..., 3:7] = -1
    each = made.token_nll(ids, targets)
    assert each.shape == targets.shape and not each[targets < 0].any() and (each[targets >= 0] > 0).all()
    torch.testing.assert_close(each.sum() / (targets >= 0).sum(), made(ids, targets, 0.5)[1][0])


def test_attention_sees_the_past_only() -> None:
    made = model()
    ids = sentences(1, made.config)
    changed = ids.clone()
    changed[..., 15] = (ids[..., 15] + 1) % 300
    before, after = made.model(ids)[0], made.model(changed)[0]
    assert torch.equal(before[:, :15], after[:, :15]) and (before[:, 15:] != after[:, 15:]).any(dim=-1).all()


@pytest.mark.parametrize("tied", [False, True])
def test_flops_per_token_against_a_count_by_hand(tied: bool) -> None:
    """Forward 2 and backward 4 FLOPs a weight; attention reads half the context on average, scores and values."""
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    attention = 2 * 2 * 32 * (24 / 2)
    assert model(tie_embeddings=tied).flops_per_token() == 6 * (2 * block + 300 * 32) + 3 * 2 * attention


def test_parameters_are_counted_once() -> None:
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert model(tie_embeddings=True).n_params() == 300 * 32 + 2 * block + 32
    assert model(qk_norm=True).n_params() == 2 * 300 * 32 + 2 * (block + 2 * 8) + 32


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = model(7).state_dict()
    torch.manual_seed(2)
    again, other = model(7).state_dict(), model(8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].ndim == 2]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    small = math.sqrt(2 / (5 * 32))
    assert first["lm_head.weight"].std().item() == pytest.approx(small, rel=0.1)
    assert first["model.layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(small / 2, rel=0.1)


def test_largest_attention_logit_against_brute_force() -> None:
    """Causal, grouped, scaled by the root of the head size; a larger one in the future does not count."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        q, k = torch.randn(2, 4, 6, 8, generator=generator), torch.randn(2, 2, 6, 8, generator=generator)
        q[:, :, -1], k[:, :, -1] = 0, 30 * k[:, :, -1]  # the largest key is seen by a query that ignores it
        every = [
            (float(q[b, h, i] @ k[b, h // 2, j]) / math.sqrt(8), j <= i)
            for b in range(2)
            for h in range(4)
            for i in range(6)
            for j in range(6)
        ]
        assert max(value for value, _ in every) > max(value for value, seen in every if seen)
        found = attention.max_logit(q, k, pulls=1).tolist()
        assert found == pytest.approx([max(value for value, seen in every if seen)], rel=1e-5)


def test_the_probe_reports_each_layer_and_changes_nothing() -> None:
    made = model()
    ids, targets = sentences(3, made.config), sentences(3, made.config, seed=1)
    probed, plain = made(ids, targets, 0.0, probe=True), made(ids, targets, 0.0)
    assert probed[0] == plain[0] and plain[2] is None and probed[2].shape == (2, 1)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "tie_embeddings": True}, {"document_start": 3}])
def test_rows_of_a_batch_of_pulls_are_the_models_that_they_would_be_alone(changes: dict[str, Any]) -> None:
    """Loss, largest logits, every gradient and every token's loss, each pull on data of its own."""
    together = Transformer(ModelConfig(**SHAPE | changes, pulls=3))
    together.init_weights([4, 5, 6])
    ids, targets = (
        torch.cat([sentences(5, together.config, seed) for seed in seeds]) for seeds in ((1, 2, 3), (7, 8, 9))
    )
    targets[1, :, ::3] = -1
    objective, nll, top = together(ids, targets, 1e-3, probe=True)
    objective.backward()
    for row, seed in enumerate((4, 5, 6)):
        alone = model(seed, **changes)
        mine = slice(row, row + 1)
        alone_objective, alone_nll, alone_top = alone(ids[mine], targets[mine], 1e-3, probe=True)
        alone_objective.backward()
        assert top is not None
        torch.testing.assert_close((nll[mine], top[:, mine]), (alone_nll, alone_top))
        for (name, batched), single in zip(together.named_parameters(), alone.parameters(), strict=True):
            assert batched.grad is not None
            torch.testing.assert_close(batched.grad[row], single.grad, rtol=1e-4, atol=1e-6, msg=name)
        each = alone.token_nll(ids[mine], targets[mine])
        torch.testing.assert_close(together.token_nll(ids, targets)[mine], each)
        told: Any = {"prompt": [5, 6, 7], "new_tokens": 30, "stop_id": 2, "temperature": 1.0}
        assert together.generate(**told, seeds=[1, 2, 3])[row] == alone.generate(**told, seeds=[row + 1])[0]
        smaller = together.selected([row])
        assert all(torch.equal(p, q) for p, q in zip(smaller.parameters(), alone.parameters(), strict=True))


def test_a_document_mask_hides_other_documents_and_nothing_else() -> None:
    """The hidden states of each document are those of the document alone in its window, wherever it lies."""
    made = model(document_start=1)
    ids = sentences(2, made.config)
    ids[0, 0, [0, 9, 15]] = 1
    ids[0, 1, [6]] = 1  # begins inside a document whose start it does not see
    hidden = made.model(ids)[0].view(2, 24, -1)
    for row, start, stop in ((0, 0, 9), (0, 9, 15), (0, 15, 24), (1, 0, 6), (1, 6, 24)):
        alone = model().model(ids[:, row : row + 1, start:stop])[0][0]
        torch.testing.assert_close(hidden[row, start:stop], alone, rtol=1e-4, atol=1e-5)


def test_activation_checkpoints_change_no_bit() -> None:
    results = []
    for kept in (False, True):
        made = model(checkpoint_activations=kept)
        made(sentences(3, made.config), sentences(3, made.config, seed=1), 0.0, probe=True)[0].backward()
        results.append([p.grad for p in made.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
