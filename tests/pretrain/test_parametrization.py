"""μP: the same as SP at the base size, the same training as with multipliers in the forward pass, flat over width."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import console
from pretrain import checkpoint, coordcheck, optim
from pretrain.model import ModelConfig, Transformer, load_hugging_face_weights
from pretrain.parametrization import rule

if TYPE_CHECKING:
    from tests.conftest import Pull

SHAPE: dict[str, Any] = {"vocab_size": 97, "d_model": 32, "n_layers": 4, "n_heads": 2, "n_kv_heads": 1, "d_ff": 48}
SHAPE |= {"seq_len": 16, "qk_norm": False, "tie_embeddings": False, "rope_theta": 1e4, "norm_eps": 1e-6}
SHAPE |= {"parametrization": "mup", "base_width": 8, "base_depth": 2, "base_head_dim": 4}
TOLD: Any = {"betas": (0.9, 0.95), "eps": 1e-4, "momentum": 0.95, "weight_decay": 0.1}


@pytest.mark.parametrize(("qk_norm", "tied"), list(itertools.product([False, True], repeat=2)))
def test_at_the_base_size_it_is_sp_to_the_bit(qk_norm: bool, tied: bool) -> None:
    flags = SHAPE | {"qk_norm": qk_norm, "tie_embeddings": tied, "base_width": 32, "base_depth": 4, "base_head_dim": 16}
    mup, sp = ModelConfig(**flags), ModelConfig(**flags | {"parametrization": "sp"})
    names = [name for name, _ in Transformer(sp).named_parameters()]
    assert len(names) > 20
    for name in names:
        assert rule(name, mup, "adamw") == rule(name, sp, "adamw")
        assert rule(name, mup, "muon") == rule(name, sp, "muon")


def forward_multiplier(name: str, c: ModelConfig) -> float | Tensor:
    """What the published tables put into the forward pass, per row where rows of a merged matrix differ."""
    m, r, h = c.d_model / c.base_width, c.n_layers / c.base_depth, c.head_dim / c.base_head_dim
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return 1 / r
    if name == ("model.norm.weight" if c.tie_embeddings else "lm_head.weight"):
        return 1 / m
    if name.endswith("q_norm.weight"):
        return 1 / math.sqrt(h)
    if name.endswith("qkv_proj.weight") and not c.qk_norm:
        rows = torch.ones((c.n_heads + 2 * c.n_kv_heads) * c.head_dim, 1)
        rows[: c.n_heads * c.head_dim] /= math.sqrt(h)
        return rows
    return 1.0


def published(name: str, c: ModelConfig) -> tuple[float, float, float]:
    """lr, eps and weight decay factors of TP V's table 8 and CompleteP's table 1, with the multipliers above."""
    m, r = c.d_model / c.base_width, c.n_layers / c.base_depth
    if ".layers." not in name:
        return 1.0, 1 / m, 1.0
    return (1.0, 1 / (m * r), 0.0) if name.endswith("norm.weight") else (1 / m, 1 / (m * r), m)


@pytest.mark.parametrize(("qk_norm", "tied"), list(itertools.product([False, True], repeat=2)))
def test_it_trains_as_with_multipliers_in_the_forward_pass(qk_norm: bool, tied: bool) -> None:
    """12 steps of AdamW at 4 times the width and head, twice the depth, with an epsilon large enough to count."""
    c = ModelConfig(**SHAPE | {"qk_norm": qk_norm, "tie_embeddings": tied, "n_heads": 2})
    ours = Transformer(c)
    ours.init_weights([0])
    multipliers = {name: forward_multiplier(name, c) for name, _ in ours.named_parameters()}
    theirs: dict[str, Tensor] = {}
    for name, p in ours.named_parameters():
        folded = rule(name, c, "adamw")
        std = math.sqrt(2 / (5 * c.base_width))
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * c.base_depth)
        if ".layers." in name:
            std /= math.sqrt(c.d_model / c.base_width)
        theirs[name] = (p.detach() * ((std if p.ndim == 2 else 1.0) / folded.init)).requires_grad_()
    groups = []
    for name, weight in theirs.items():
        lr, eps, decay = published(name, c)
        decay *= 0.1 * (weight.ndim == 2)
        groups.append({"params": [weight], "lr": 0.01 * lr, "eps": TOLD["eps"] * eps, "weight_decay": decay})
    plain = torch.optim.AdamW(groups, betas=TOLD["betas"])
    folded_optimizers = optim.make_optimizers(optim.own_parameters(ours, 0), c, "adamw", **TOLD)
    optim.set_learning_rate(folded_optimizers, 0.01)
    ids = torch.randint(3, c.vocab_size, (1, 4, c.seq_len + 1), generator=torch.Generator().manual_seed(1))
    batch, curves = (ids[..., :-1], ids[..., 1:], 0.0), []
    for _ in range(12):
        mine = ours(*batch)[0]
        other = functional_call(ours, {name: w * multipliers[name] for name, w in theirs.items()}, batch)[0]
        curves.append((mine.item(), other.item()))
        for objective, optimizers in ((mine, folded_optimizers), (other, [plain])):
            objective.backward()
            for optimizer in optimizers:
                optimizer.step()
        ours.zero_grad(set_to_none=True)
        plain.zero_grad(set_to_none=True)
    assert abs(curves[0][0] - curves[-1][0]) > 0.1, "nothing was learned"
    for mine_loss, other_loss in curves:
        assert mine_loss == pytest.approx(other_loss, rel=2e-5)


def test_a_muon_step_has_the_spectral_norm_of_its_width() -> None:
    """Yang, Simon & Bernstein 2023, condition 1: |dW| in proportion to sqrt(rows / columns), here constant."""
    norms = []
    for width in (32, 128):
        c = ModelConfig(
            **SHAPE | {"d_model": width, "d_ff": 3 * width, "n_heads": width // 16, "n_kv_heads": width // 16}
        )
        c = ModelConfig(**{**c.__dict__, "base_width": 32, "base_head_dim": 16, "base_depth": 4})
        model = Transformer(c)
        model.init_weights([0])
        parameters = optim.own_parameters(model, 0)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizers = optim.make_optimizers(parameters, c, "muon", **TOLD | {"weight_decay": 0.0})
        optim.set_learning_rate(optimizers, 0.01)
        generator = torch.Generator().manual_seed(0)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
        name = "model.layers.0.mlp.down_proj.weight"
        norms.append(torch.linalg.matrix_norm(parameters[name].detach() - before[name], ord=2).item())
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_a_pull_at_the_base_size_ends_where_sp_ends(pull: "Callable[..., Pull]", tmp_path: Path) -> None:
    flags = {"tokens": 512 * 10, "seed": 3}
    sp = pull(tmp_path / "sp", **flags)
    mup = pull(tmp_path / "mup", **flags, parametrization="mup", base_width=32)
    wide = pull(tmp_path / "wide", **flags, parametrization="mup", base_width=16)
    assert mup.result["val/bpb"] == sp.result["val/bpb"] != wide.result["val/bpb"]


def test_init_is_drawn_as_it_is_told() -> None:
    """std of what is drawn: SP's, an own one, and residual outputs as small as that divided by sqrt(2 n_layers)."""
    flags = SHAPE | {"vocab_size": 4096, "d_model": 64, "d_ff": 256, "parametrization": "sp"}
    small, plain = math.sqrt(2 / (5 * 64)), {"init": "plain"}
    for more, std, residual in (
        ({}, small, small / math.sqrt(8)),
        (plain, small, small),
        (plain | {"init_std": 0.02}, 0.02, 0.02),
    ):
        model = Transformer(ModelConfig(**flags | more))
        model.init_weights([0])
        drawn = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
        assert drawn["model.embed_tokens.weight"] == pytest.approx(std, rel=0.02)
        assert drawn["model.layers.1.mlp.gate_up_proj.weight"] == pytest.approx(std, rel=0.05)
        assert drawn["model.layers.1.mlp.down_proj.weight"] == pytest.approx(residual, rel=0.05)


@pytest.mark.parametrize(("parametrization", "tied"), list(itertools.product(["sp", "mup"], [False, True])))
def test_scaled_embeddings_train_as_with_the_multiplier_in_the_forward_pass(parametrization: str, tied: bool) -> None:
    """The embedding layer's output times 8, and nothing else: 12 steps with an epsilon and a decay that count."""
    flags = SHAPE | {"parametrization": parametrization, "tie_embeddings": tied}
    plain, scaled = (Transformer(ModelConfig(**flags | {"embedding_scale": scale})) for scale in (1.0, 8.0))
    for model in (plain, scaled):
        model.init_weights([0])
    ids = torch.randint(3, 97, (1, 4, 17), generator=torch.Generator().manual_seed(1))
    before = plain(ids[..., :-1], ids[..., 1:], 0.0)[1].item()
    plain.model.embed_tokens.register_forward_hook(lambda _, __, output: 8.0 * output)
    sides, curves = [], list[list[float]]()
    for model in (plain, scaled):
        optimizers = optim.make_optimizers(optim.own_parameters(model, 0), model.config, "adamw", **TOLD)
        optim.set_learning_rate(optimizers, 0.01)
        sides.append((model, optimizers))
    for _ in range(12):
        curves.append([])
        for model, optimizers in sides:
            objective, nll, _ = model(ids[..., :-1], ids[..., 1:], 0.0)
            objective.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            curves[-1].append(nll.item())
    assert abs(curves[0][0] - before) > 1e-3, "the multiplier does nothing"
    assert curves[0][0] - curves[-1][0] > 0.1, "nothing was learned"
    for by_multiplier, folded in curves:
        assert folded == pytest.approx(by_multiplier, rel=2e-5)


def test_a_checkpoint_with_scaled_embeddings_is_a_plain_llama(pull: "Callable[..., Pull]", tmp_path: Path) -> None:
    """transformers computes the same losses, and the residual stream begins at some tenths."""
    from transformers import AutoModelForCausalLM

    made = pull(tmp_path, embedding_scale=5.6, init="plain", tokens=512 * 10)
    theirs = AutoModelForCausalLM.from_pretrained(made.checkpoint)
    state, weights = checkpoint.load(made.checkpoint)
    assert state["config"]["embedding_scale"] == 5.6
    embedded = weights["model.embed_tokens.weight"]
    assert 0.5 < embedded.square().mean().sqrt().item() < 0.8
    shape = {"vocab_size": len(embedded), "d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64}
    ours = Transformer(ModelConfig(**SHAPE | shape | {"tie_embeddings": True, "seq_len": 64, "parametrization": "sp"}))
    load_hugging_face_weights(ours, 0, weights)
    ids = torch.randint(3, len(embedded), (1, 2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs(input_ids=ids[0]).logits
        mine = ours.lm_head(ours.model(ids)[0])
    torch.testing.assert_close(mine.view_as(logits), logits, rtol=1e-4, atol=1e-4)


def check_coordinates(shards_folder: Path, out: Path, *flags: str) -> int:
    given = [f"--data={shards_folder}", f"--out={out}", "--head_dim=8", "--seq_len=32", "--batch_tokens=256"]
    return coordcheck.main([*given, *flags])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_coordinates_are_flat_under_mup_and_grow_under_sp(
    optimizer: str, shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--widths=32,64,128", "--steps=5", "--json", f"--optimizer={optimizer}", "--lr=8e-3")
    assert check_coordinates(shards_folder, tmp_path / "page.html", *flags) == 0
    result = json.loads(capsys.readouterr().out)
    slopes = {(r["parametrization"], r["activation"]): r["slope"] for r in result["slopes"] if r["of"] == "change"}
    assert slopes["sp", "residual 1"] > (0.7 if optimizer == "adamw" else 0.15)
    assert slopes["sp", "logits"] > 0.15
    assert max(abs(slope) for (name, _), slope in slopes.items() if name == "mup") < 0.35
    assert "Coordinate check" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_coordinates_over_depth(shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--widths=32", "--depths=2,4,8", "--steps=5", "--json")
    assert check_coordinates(shards_folder, tmp_path / "page.html", *flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["activations"] == ["embedding", "last residual", "logits"]
    slope = {name: coordcheck.slope_of(result, name, "last residual", "change")["slope"] for name in ("sp", "mup")}
    assert slope["sp"] > 0.4
    assert slope["mup"] < slope["sp"] - 0.4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--widths=32"], "--widths"),
        (["--widths=32,no"], "--widths"),
        (["--widths=32,36"], "--head_dim"),
        (["--seeds=1"], "--seeds"),
        (["--batch_tokens=100"], "--batch_tokens"),
    ],
)
def test_a_mistake_names_its_flag(flags: list[str], words: str, shards_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(console.UserError, match=words):
        check_coordinates(shards_folder, tmp_path / "page.html", *flags)
