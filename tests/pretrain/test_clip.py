"""ZClip and AdaGC: the published rules, each pull by its own norms, resumed to the bit."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import console
from pretrain import checkpoint, clip
from pretrain.ranks import Ranks

if TYPE_CHECKING:
    from tests.conftest import Pull

    Puller = Callable[..., Pull]

APPLIED, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def with_norms(*norms: float) -> dict[str, nn.Parameter]:
    """Parameters whose gradients have these norms."""
    generator, made = torch.Generator().manual_seed(0), {}
    for number, norm in enumerate(norms):
        parameter = nn.Parameter(torch.zeros(6, 4))
        grad = torch.randn(6, 4, generator=generator)
        parameter.grad = grad * (norm / grad.norm())
        made[f"{number}"] = parameter
    return made


def norms_of(parameters: dict[str, nn.Parameter]) -> list[float]:
    return [p.grad.norm().item() for p in parameters.values() if p.grad is not None]


def clipped(
    rule: clip.Rule, norms: list[float], largest: float, state: Tensor, skipped: Tensor = APPLIED
) -> list[float]:
    """Norms of the tensors after clipping gradients of `norms`."""
    parameters = with_norms(*norms)
    clip.clip(rule, parameters, torch.tensor(math.hypot(*norms)), largest, state, skipped)
    return norms_of(parameters)


def test_zclip_is_the_published_rule() -> None:
    """Kumar et al. 2025, algorithm 1, in floats: plain mean and variance of 25 norms, then z-scores and EMAs."""
    generator = torch.Generator().manual_seed(1)
    norms = (0.5 + 0.05 * torch.randn(120, generator=generator)).tolist()
    norms[12], norms[60], norms[61], norms[90] = 3.0, 5.0, 0.9, 40.0
    state = clip.start("zclip", {}, "cpu")
    young, mean, variance, cut = list[float](), 0.0, 0.0, 0
    for norm in norms:
        told = norm
        if len(young) == 25:
            z = (norm - mean) / (math.sqrt(variance) + 1e-6)
            if z > 2.5:
                told, cut = mean + 2.5 * math.sqrt(variance) / (z / 2.5), cut + 1
            mean = 0.97 * mean + 0.03 * told
            variance = 0.97 * variance + 0.03 * (told - mean) ** 2
        else:
            young.append(norm)
            mean = sum(young) / len(young)
            variance = sum((one - mean) ** 2 for one in young) / len(young)
        assert clipped("zclip", [norm], 2.0, state)[0] == pytest.approx(min(told, 2.0), rel=1e-4)
        assert state[1].item() == pytest.approx(mean, rel=1e-4)
        assert state[2].item() == pytest.approx(variance, rel=1e-3, abs=1e-7)
    assert cut >= 2


def test_zclip_needs_no_fixed_bound() -> None:
    state = clip.start("zclip", {}, "cpu")
    assert clipped("zclip", [50.0], 0.0, state) == pytest.approx([50.0])
    for _ in range(30):
        clipped("zclip", [50.0], 0.0, state)
    assert clipped("zclip", [5000.0], 0.0, state) == pytest.approx([50.0], rel=0.1)


def test_adagc_holds_each_tensor_to_its_own_norms() -> None:
    """Wang et al. 2025, algorithm 1: the smallest norm of 100 globally clipped updates, then an EMA of clipped ones."""
    state = clip.start("adagc", with_norms(1.0, 1.0), "cpu")
    for number in range(100):
        norms = [0.3 + 0.01 * (number % 7), 2.0]
        share = 1 / math.hypot(*norms)
        assert clipped("adagc", norms, 1.0, state) == pytest.approx([one * share for one in norms], rel=1e-4)
    usual = [0.3 / math.hypot(0.3, 2.0), 2.0 / math.hypot(0.36, 2.0)]
    assert state[1:].tolist() == pytest.approx(usual, rel=1e-4)
    for norms in ([0.1, 0.5], [7.0, 0.5], [0.1, 90.0]):
        told = [min(norm, 1.05 * most) for norm, most in zip(norms, usual, strict=True)]
        assert clipped("adagc", norms, 1.0, state) == pytest.approx(told, rel=1e-4)
        usual = [0.98 * most + 0.02 * one for most, one in zip(usual, told, strict=True)]
        assert state[1:].tolist() == pytest.approx(usual, rel=1e-4)


def test_a_tensor_that_had_no_gradient_yet_is_not_held_at_none() -> None:
    state = clip.start("adagc", with_norms(1.0, 1.0), "cpu")
    for _ in range(100):
        clipped("adagc", [0.5, 0.0], 0.0, state)
    assert clipped("adagc", [0.5, 3.0], 0.0, state) == pytest.approx([0.5, 3.0])


@pytest.mark.parametrize("rule", ["zclip", "adagc"])
def test_an_update_that_is_not_applied_teaches_nothing(rule: clip.Rule) -> None:
    state = clip.start(rule, with_norms(1.0, 1.0), "cpu")
    for _ in range(130):
        clipped(rule, [0.5, 0.6], 1.0, state)
    before = state.clone()
    clipped(rule, [math.nan, 0.6], 1.0, state, SKIPPED)
    clipped(rule, [math.inf, 0.6], 1.0, state, SKIPPED)
    assert torch.equal(state, before)
    clipped(rule, [0.5, 0.6], 1.0, state)
    assert not torch.equal(state, before)


def test_ranks_that_share_a_tensor_out_clip_it_by_its_whole_norm() -> None:
    whole = with_norms(0.7, 30.0)
    grads = [p.grad for p in whole.values() if p.grad is not None]
    lower = torch.stack([grad[4:].norm() for grad in grads])

    class Two(Ranks):
        def sum_(self, tensor: Tensor) -> Tensor:
            return tensor.add_(lower.square())

    mine = {name: nn.Parameter(torch.zeros(4, 4)) for name in whole}
    for parameter, grad in zip(mine.values(), grads, strict=True):
        parameter.grad = grad[:4].clone()
    states = [torch.tensor([100.0, 1.0, 1.0]) for _ in range(2)]
    norm = torch.tensor(math.hypot(0.7, 30.0))
    clip.clip("adagc", mine, norm, 1.0, states[0], APPLIED, Two(0, 2))
    clip.clip("adagc", whole, norm, 1.0, states[1], APPLIED)
    torch.testing.assert_close(states[0], states[1])
    for part, all_of_it in zip(mine.values(), whole.values(), strict=True):
        assert part.grad is not None and all_of_it.grad is not None
        torch.testing.assert_close(part.grad, all_of_it.grad[:4])


@pytest.mark.parametrize("rule", ["zclip", "adagc"])
def test_a_pull_goes_on_from_its_norms_to_the_bit(
    rule: str, pull: "Puller", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last checkpoint lost, the same command ends with the same bytes; the rule has clipped on both sides of it."""
    monkeypatch.setattr(clip, "ADAGC_UPDATES", 6)
    monkeypatch.setattr(clip, "ZCLIP_UPDATES", 6)
    flags: dict[str, Any] = {"clip": rule, "tokens": 512 * 30, "seed": 2, "lr": 1e-2}
    whole = pull(tmp_path, **flags)
    kept = {name: (whole.checkpoint / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.STATE_TENSORS)}
    state = load_file(whole.checkpoint / checkpoint.STATE_TENSORS)[checkpoint.CLIP_STATE]
    assert state[0] == 30 and state.isfinite().all()
    for path in sorted(whole.checkpoint.iterdir()):
        path.unlink()
    whole.checkpoint.rmdir()
    (whole.folder / "result.json").unlink()
    again = pull(tmp_path, **flags)
    assert again.checkpoint.name == "step-00000030"
    assert {name: (again.checkpoint / name).read_bytes() for name in kept} == kept
    fixed = pull(tmp_path, **flags | {"clip": "fixed"})
    assert fixed.result["val/bpb"] != whole.result["val/bpb"]
    assert checkpoint.CLIP_STATE not in load_file(fixed.checkpoint / checkpoint.STATE_TENSORS)


def test_pulls_together_are_clipped_as_alone(
    pull: "Puller", tiny_flags: dict[str, Any], as_argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    from pretrain import pretrain

    flags = {**tiny_flags, "clip": "zclip", "lr": 1e-2}
    assert pretrain.main(as_argv(flags, out=tmp_path / "together", seed="2,3")) == 0
    alone = pull(tmp_path / "alone", **flags, seed=3)
    other = checkpoint.folders(tmp_path / "together" / alone.folder.name)[-1]
    mine, theirs = (
        load_file(place / checkpoint.STATE_TENSORS)[checkpoint.CLIP_STATE] for place in (alone.checkpoint, other)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--clip=zlip", "--clip"), ("--embedding_scale=0", "must be positive"), ("--init_std=-1", "0 or more")],
)
def test_a_mistake_names_its_flag(flag: str, words: str, shards_folder: Path, tmp_path: Path) -> None:
    from pretrain import pretrain

    with pytest.raises(console.UserError, match=words) as raised:
        pretrain.main([f"--data={shards_folder}", f"--out={tmp_path}", flag])
    assert flag.partition("=")[0] in str(raised.value)
