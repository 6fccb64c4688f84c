"""Where the best learning rate goes: known curves, and pulls made by the pretraining door."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import console
from gacha import definition
from pretrain import pretrain, transfer
from pretrain.transfer import Curve

REPOSITORY = Path(__file__).parents[2]


def curve(best: float, spread: float = 0.01, x: tuple[float, ...] = (-11, -10, -9, -8, -7, -6, -5)) -> Curve:
    """Parabolas of three seeds whose minima lie at `best` and `spread` octaves to both sides of it."""
    at = np.array(x, dtype=np.float64)
    return Curve(at, 3.0 + 0.2 * np.square(at[:, None] - (best + spread * np.array([-1, 0, 1]))))


def test_moves_and_their_price_are_found_with_their_intervals() -> None:
    found = {
        ("sp", 64): curve(-6.4),
        ("sp", 512): curve(-9.3),
        ("mup", 64): curve(-6.4),
        ("mup", 512): curve(-6.9, 0.1),
    }
    result = transfer.summarise(found)
    assert result["move"]["sp"][0] == pytest.approx(-2.9, abs=1e-3)
    assert result["move"]["mup"] == pytest.approx([-0.5, -0.61, -0.39], abs=1e-3), "all that three seeds can give"
    assert result["ratio"] == pytest.approx([2.9 / 0.5, 2.88 / 0.61, 2.92 / 0.39], rel=1e-2)
    assert result["paid"]["sp"][0] == pytest.approx(0.2 * 2.9**2, abs=0.06), "interpolated"
    assert result["paid"]["mup"][0] == pytest.approx(0.2 * 0.5**2, abs=1e-3)
    assert [cell["log2_lr"][0] for cell in result["cells"]] == pytest.approx([-6.4, -9.3, -6.4, -6.9], abs=1e-3)


def test_a_best_learning_rate_at_the_edge_is_said_to_be() -> None:
    result = transfer.summarise({("sp", 64): curve(-6.4), ("sp", 512): curve(-12.0)})
    assert [cell["at_edge"] for cell in result["cells"]] == [False, True]
    assert result["cells"][1]["log2_lr"] == [-11, -11, -11]
    assert result["ratio"] is None


def test_learning_rates_that_are_not_evenly_spaced() -> None:
    assert transfer.vertex(np.array([-9.0, -7.0, -6.0]), np.array([4.0, 0.0, 1.0])) == pytest.approx((-7.0, 0.0, 1.0))


def test_a_parabola_that_never_moves_has_no_ratio() -> None:
    result = transfer.summarise({(name, width): curve(-7, 0.0) for name in ("sp", "mup") for width in (64, 512)})
    assert result["ratio"] == [None, None, None]
    assert json.dumps(result)


@pytest.fixture(scope="module")
def study(
    tiny_flags: dict[str, Any], as_argv: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Pulls of two widths, three learning rates and two seeds under both parametrizations, as offline W&B runs."""
    import wandb

    folder = tmp_path_factory.mktemp("study")
    short = {"tokens": 512 * 4, "val_every": 100, "log_every": 4, "checkpoint_every": 100, "val_tokens": 512}
    shape = {"n_heads": 0, "head_dim": 16, "n_kv_heads": 0, "d_ff": 0, "base_width": 16}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            environment.setenv(name, str(folder))
        wandb.teardown()
        for parametrization in ("sp", "mup"):
            for width in (16, 32):
                more = {"parametrization": parametrization, "d_model": width, "lr": "1e-3,1e-2,1e-1", "seed": "0,1"}
                argv = as_argv(tiny_flags, **short, **shape, **more, out=folder / "runs", on_divergence="ignore")
                assert pretrain.main(argv) in (0, console.EXIT_DIVERGED)
        wandb.teardown()
    return folder


def test_pulls_are_read_back_and_drawn(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "transfer.html"
    assert transfer.main([str(study), f"--out={page}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    cells = [(cell["parametrization"], cell["width"], cell["seeds"]) for cell in result["cells"]]
    assert cells == [("sp", 16, 2), ("sp", 32, 2), ("mup", 16, 2), ("mup", 32, 2)]
    assert result["cells"][0]["log2_lr"] == result["cells"][2]["log2_lr"], "at the base width they are one"
    assert "Learning rate over width" in page.read_text(encoding="utf-8")
    assert transfer.main([str(study), f"--out={page}"]) == 0
    said = capsys.readouterr().out
    assert "ratio of the moves" in said
    assert "mup: the best lr moves by" in said


def test_a_folder_without_a_study_is_refused(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(console.UserError, match="needs three and two"):
        transfer.main([str(llama.folder.parent), f"--out={tmp_path / 'page.html'}"])


def test_the_sweep_spans_the_study() -> None:
    sweep = definition.read(str(REPOSITORY / "sweeps" / "mup_transfer.yaml"))
    assert len(sweep.points) == 2 * 4 * 7 * 3
    assert {point["base_width"] for point in sweep.points} == {min(point["d_model"] for point in sweep.points)}
