"""Checkpoints: which are kept, that none is half there, and that a damaged one is named instead of trained from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from console import UserError
from pretrain import checkpoint, optim
from pretrain.model import ModelConfig, Transformer, hugging_face_weights, load_hugging_face_weights

if TYPE_CHECKING:
    from tests.conftest import Pull

SHAPE: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}
SHAPE |= {"seq_len": 8, "qk_norm": False, "tie_embeddings": True, "rope_theta": 1e4, "norm_eps": 1e-6}
Parts = tuple[Transformer, list[torch.optim.Optimizer]]


def parts(kind: Any, seed: int = 0) -> Parts:
    model = Transformer(ModelConfig(**SHAPE))
    model.init_weights([seed])
    told: Any = {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = optim.make_optimizers(optim.own_parameters(model, 0), model.config, kind, **told)
    optim.set_learning_rate(optimizers, 1e-2)
    return model, optimizers


def write(
    pull: Path, model: Transformer, optimizers: list[torch.optim.Optimizer], state: dict[str, Any], *more: Any
) -> Path:
    """A checkpoint of what the training loop has in its hands."""
    training = checkpoint.training_tensors(optim.own_parameters(model, 0), optimizers)
    tensors = (checkpoint.snapshot(hugging_face_weights(model, 0)), checkpoint.snapshot(training))
    return checkpoint.save(pull, *tensors, checkpoint.hugging_face_config(model.config, 1, 2), state, *more)


def update(model: Transformer, optimizers: list[torch.optim.Optimizer]) -> None:
    """One step on data from torch's own generator, so that its state matters."""
    model(torch.randint(0, 64, (1, 4, 8)), torch.randint(0, 64, (1, 4, 8)), 0.0)[0].backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.fixture
def save(tmp_path: Path, shards_folder: Path) -> Callable[..., Path]:
    """save(step, keep_step): a checkpoint of a fresh model in the pull folder `tmp_path`."""
    model, optimizers = parts("adamw")

    def make(step: int, keep_step: int = -1) -> Path:
        state = {"step": step, "bos_id": 1, "eos_id": 2}
        return write(tmp_path, model, optimizers, state, shards_folder / "tokenizer", keep_step)

    return make


def steps(pull: Path) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoint.folders(pull)]


def test_the_last_two_are_kept_and_one_from_before_a_suspicion(save: Callable[..., Path], tmp_path: Path) -> None:
    """While the guard suspects everything since step 25, the newest from before it stays however long that lasts."""
    for step in (0, 10, 20, 30):
        save(step)
    assert steps(tmp_path) == [20, 30]
    for step in (40, 50, 60):
        save(step, keep_step=25)
    assert steps(tmp_path) == [20, 50, 60]
    save(70)
    assert steps(tmp_path) == [60, 70]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_what_a_divergence_reaches_into_is_dropped(save: Callable[..., Path], tmp_path: Path) -> None:
    for step in (0, 10, 20):
        save(step, keep_step=5)
    checkpoint.drop_since(tmp_path, 15)
    assert steps(tmp_path) == [0, 10]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_loaded_checkpoint_goes_on_with_the_same_bits(kind: str, tmp_path: Path, shards_folder: Path) -> None:
    """Weights, both moments or the momentum, step counts and torch's generator all come back."""
    torch.manual_seed(1)
    (model, optimizers), (resumed, fresh) = parts(kind), parts(kind, seed=9)
    for _ in range(3):
        update(model, optimizers)
    state = {"step": 3, "bos_id": 1, "eos_id": 2, "guard": {"best": float("inf")}}
    folder = write(tmp_path, model, optimizers, state, shards_folder / "tokenizer")
    update(model, optimizers)
    found, weights = checkpoint.load(folder)
    assert found["guard"] == {"best": float("inf")}
    load_hugging_face_weights(resumed, 0, weights)
    own = optim.own_parameters(resumed, 0)
    checkpoint.restore_training(checkpoint.load_training(folder, dict(own)), own, fresh)
    update(resumed, fresh)
    for mine, other in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other)
        for ours, theirs in zip(fresh, optimizers, strict=True):
            assert ours.state[mine].keys() == theirs.state[other].keys()
            assert all(torch.equal(ours.state[mine][key], value) for key, value in theirs.state[other].items())


def test_a_save_that_fails_leaves_the_earlier_ones_alone(
    save: Callable[..., Path], tmp_path: Path, shards_folder: Path
) -> None:
    """Nothing half-written stays, and nothing is dropped to make room for what was never written."""
    for step in (0, 10):
        save(step)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    unwritable = {"step": 20, "bos_id": 1, "eos_id": 2, "x": object()}  # fails last, when the tensors are on disk
    with pytest.raises(TypeError):
        write(tmp_path, *parts("adamw"), unwritable, shards_folder / "tokenizer")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000000", "step-00000010"]


def unfinished(pull: "Pull", to: Path) -> Path:
    """A copy of a finished pull that its last checkpoint, but not its end, has reached."""
    folder = Path(shutil.copytree(pull.folder, to / pull.folder.name))
    (folder / "result.json").unlink()
    return sorted((folder / "checkpoints").iterdir())[-1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def no_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("model.safetensors", Path.unlink),
        ("model.safetensors", cut),
        ("model.safetensors", no_header),
        ("training_state.safetensors", Path.unlink),
        ("training_state.safetensors", cut),
        ("training_state.json", Path.unlink),
        ("training_state.json", cut),
        ("training_state.json", lambda path: path.write_text("{}")),
        ("training_state.json", lambda path: path.write_text("[]")),
        ("config.json", cut),
        ("tokenizer.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_named_and_nothing_is_trained(
    file: str, harm: Callable[[Path], Any], llama: "Pull", pull: Callable[..., "Pull"], tmp_path: Path
) -> None:
    """One line with the folder, and nothing on disk has changed: what can be saved is still there."""
    folder = unfinished(llama, tmp_path)
    harm(folder / file)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        pull(tmp_path, **llama.flags)
    assert str(folder) in str(error.value) and "delete the folder" in str(error.value)
    assert "\n" not in str(error.value)
    assert file in str(error.value) or harm is no_header
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_checkpoint_before_a_damaged_one_takes_over_once_that_is_deleted(
    llama: "Pull", pull: Callable[..., "Pull"], tmp_path: Path
) -> None:
    """As the message advises; a half-written folder that a kill left is ignored and cleaned; the end is the same."""
    last = unfinished(llama, tmp_path)
    last.rename(last.with_name(f".{last.name}.part"))
    cut(last.with_name(f".{last.name}.part") / "model.safetensors")
    again = pull(tmp_path, **llama.flags)
    assert again.result["val/bpb"] == llama.result["val/bpb"]
    for name in ("model.safetensors", "training_state.safetensors"):
        assert (again.checkpoint / name).read_bytes() == (llama.checkpoint / name).read_bytes()
    names = sorted(path.name for path in again.checkpoint.parent.iterdir())
    assert names == ["step-00000020", "step-00000030"]


def test_a_pull_killed_after_its_last_checkpoint_still_has_its_result(
    llama: "Pull", pull: Callable[..., "Pull"], tmp_path: Path
) -> None:
    unfinished(llama, tmp_path)
    assert pull(tmp_path, **llama.flags).result["val/bpb"] == pytest.approx(llama.result["val/bpb"])
