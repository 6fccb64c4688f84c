"""Faults planted on purpose: each does what it says, to whom it says, once; and nonsense is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import console
from gacha import runs
from pretrain import pretrain

if TYPE_CHECKING:
    from tests.conftest import Pull

    Puller = Callable[..., Pull]
    Argv = Callable[..., list[str]]

CHANCE = float(np.log(1536))  # loss of a model that knows nothing, or of one that knows a lot on random tokens


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batch", "--fault batch"),
        ("batch@-1", "--fault batch@-1"),
        ("bach@3", "--fault bach@3"),
        ("batch@3;nan@4", "--fault batch@3;nan@4"),
        ("nan@5,lr*@4", "--fault lr*@4"),
        ("lr*0@4", "--fault lr*0@4"),
        ("lr*1e999@4", "--fault lr*1e999@4"),
        ("lr*e@4", "--fault lr*e@4"),
        ("lr*2@9-4", "--fault lr*2@9-4"),
        ("forget_moments@3-4", "--fault forget_moments@3-4"),
        ("nan@30", "--fault nan@30"),
        ("nan@" + "9" * 40, "beyond the budget of 30 updates"),
    ],
)
def test_nonsense_is_named_before_anything_is_made(
    text: str, says: str, tiny_flags: dict[str, Any], as_argv: "Argv", tmp_path: Path
) -> None:
    with pytest.raises(console.UserError) as error:
        pretrain.main(as_argv({**tiny_flags, "fault": text}, out=tmp_path / "runs"))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def history(pull: "Pull") -> dict[str, np.ndarray]:
    """Every metric by update: what update k said of itself is at k."""
    (run,) = (run for run in runs.read(pull.folder.parent) if run.name == pull.result["name"])
    return {name: series.value for name, series in run.history.items()}


def state(pull: "Pull") -> dict[str, Any]:
    return json.loads((pull.checkpoint / "training_state.json").read_bytes())


@pytest.fixture(scope="module")
def faulty(pull: "Puller", tmp_path_factory: pytest.TempPathFactory) -> Callable[..., "Pull"]:
    """The pull `llama` with faults."""
    return lambda text, **more: pull(
        tmp_path_factory.mktemp("faulty"), offline=True, **{"seed": 5, "fault": text, **more}
    )


def test_a_bad_batch_is_of_its_data_and_of_no_seed(faulty: Callable[..., "Pull"], llama: "Pull") -> None:
    """Two seeds meet it at the same step, no better than chance; before it nothing differs from the sound pull."""
    for seed in (5, 6):
        told = history(faulty("batch@20,repeat@25-26", seed=seed))["train/loss"]
        assert told[20] > CHANCE > told[19] and (told[25:27] > told[24]).all()
        assert told[21] < CHANCE
        if seed == 5:
            np.testing.assert_array_equal(told[:20], history(llama)["train/loss"][:20])


def test_the_recipe_knows_its_faults(faulty: Callable[..., "Pull"], llama: "Pull") -> None:
    one = faulty("nan@0")
    assert one.result["name"] != llama.result["name"]
    (run,) = runs.read(one.folder.parent)
    assert run.config["fault"] == "nan@0"


def test_a_learning_rate_leaps_and_comes_back(faulty: Callable[..., "Pull"], llama: "Pull") -> None:
    ratio = history(faulty("lr*50@10-12"))["train/lr"] / history(llama)["train/lr"]
    np.testing.assert_allclose(ratio, [1] * 10 + [50] * 3 + [1] * 17)


def test_nan_in_a_gradient_is_not_in_the_loss_and_ends_the_pull(faulty: Callable[..., "Pull"]) -> None:
    lost = faulty("nan@20")
    told = history(lost)
    assert (lost.code, lost.result["status"], lost.result["tokens"]) == (3, "diverged", 20 * 512)
    assert np.isfinite(told["train/loss"]).all() and np.isnan(told["stability/grad_norm"][20])


def test_a_resume_that_loads_no_moments_is_a_fresh_optimizer(faulty: Callable[..., "Pull"], llama: "Pull") -> None:
    """Adam's first update is its gradient's signs, of RMS 1; the loss of that step is still the sound one's."""
    told, sound = history(faulty("forget_moments@20")), history(llama)
    np.testing.assert_array_equal(told["train/loss"][:21], sound["train/loss"][:21])
    assert told["stability/update_rms"][20] == pytest.approx(1, abs=0.02)
    assert sound["stability/update_rms"][20] < 0.7
    assert told["train/loss"][21] != sound["train/loss"][21]


def test_a_count_that_restarts_makes_updates_too_large(faulty: Callable[..., "Pull"], llama: "Pull") -> None:
    """By sqrt(0.05) / 0.1 at once, from moments that lost their bias long ago (beta 0.9 and 0.95)."""
    told, sound = (history(one)["stability/update_rms"] for one in (faulty("forget_count@20"), llama))
    gone = 0.05**0.5 / 0.1 / ((1 - 0.95**21) ** 0.5 / (1 - 0.9**21))
    assert told[20] / sound[20] == pytest.approx(gone, rel=1e-3)
    np.testing.assert_allclose(told[:20], sound[:20], rtol=1e-6)


def test_a_sampler_that_restarts_shows_the_same_data_again(faulty: Callable[..., "Pull"]) -> None:
    """A batch that is bad at data step 3 comes at update 3, and at update 23 once more."""
    again = faulty("restart_data@20,batch@3")
    told = history(again)["train/loss"]
    assert state(again)["loader"]["next_step"] == 10
    assert told[23] > max(told[22], told[24]) + 0.5


def test_a_pull_killed_after_its_faults_ends_with_the_same_bits(
    faulty: Callable[..., "Pull"], pull: "Puller", tmp_path: Path
) -> None:
    """From between two faults: the first is in the checkpoint, data's place too, and the second comes once more."""
    whole = faulty("restart_data@15,forget_moments@19,forget_count@21,lr*3@18-22", optimizer="muon")
    folder = Path(shutil.copytree(whole.folder, tmp_path / whole.folder.name))
    shutil.rmtree(folder / "checkpoints" / "step-00000030")
    (folder / "result.json").unlink()
    again = pull(tmp_path, **whole.flags)
    assert again.folder == folder
    for name in ("model.safetensors", "training_state.safetensors"):
        assert (again.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes()
