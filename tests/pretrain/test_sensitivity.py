"""What a wrong learning rate costs: known curves, and pulls made by the pretraining door."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import console
from gacha import definition, runs
from pretrain import pretrain, sensitivity
from pretrain.sensitivity import Pull, Variant

REPOSITORY = Path(__file__).parents[2]


def series(values: list[float]) -> runs.Series:
    """A row per update."""
    step = np.arange(1, len(values) + 1)
    return runs.Series(step, step * 512.0, np.array(values, dtype=np.float64))


def pull(loss: float, status: str = "ok", **more: Any) -> Pull:
    told = {"train": series([7.0, 6.0, 5.0]), "logits": None, "rms": 0.2}
    return Pull(loss=loss, status=status, **{**told, **more})


def variant(name: str, losses: list[list[float]]) -> Variant:
    """`losses` by learning rate, then seed."""
    lrs = [10.0 ** (number - 4) for number in range(len(losses))]
    pulls = {(lr, seed): pull(loss) for lr, row in zip(lrs, losses, strict=True) for seed, loss in enumerate(row)}
    return Variant(name, {"qk_norm": name != "base"}, lrs, [0, 1, 2], pulls)


def test_sensitivity_is_the_mean_excess_over_the_grid() -> None:
    """A loss above that at initialization, or none at all, counts as that at initialization."""
    base = variant("base", [[5.0, 5.1, 4.9], [4.0, 4.0, 4.0], [6.0, 8.0, 7.0], [math.inf, 9.0, 7.0]])
    flat = variant("qk_norm", [[5.0, 5.0, 5.0], [4.0, 4.0, 4.0], [4.2, 4.2, 4.2], [4.4, 4.4, 4.4]])
    told = sensitivity.summarise([base, flat])["variants"]
    third = (6.0 + 7.0 + 7.0) / 3
    assert told[0]["loss_at_init"] == 7.0
    assert told[0]["sensitivity"][0] == pytest.approx((1.0 + third - 4.0 + 3.0) / 4, abs=1e-4)
    assert told[0]["sensitivity"][1] < told[0]["sensitivity"][0] < told[0]["sensitivity"][2]
    assert told[1]["sensitivity"] == pytest.approx([0.4] * 3, abs=1e-4)
    assert told[0]["against_first"] is None
    assert told[1]["against_first"][0] == pytest.approx(0.4 - told[0]["sensitivity"][0], abs=1e-3)
    assert told[1]["against_first"][2] < 0
    assert (told[1]["best_lr"], told[1]["best_loss"]) == (1e-3, 4.0)
    assert told[1]["best_loss_against_first"] == [0.0, 0.0, 0.0]


def test_a_logit_that_grows_first_is_told_from_one_that_grows_after() -> None:
    """Of three lost pulls one is warned of, one too late, one not; of the three others above the best rate, one is."""
    calm = series([2.0] * 40)
    falling = [7.0 - 0.1 * step for step in range(40)]
    rising = [*falling[:20], *[6.0] * 20]  # above the best rate's from update 21 on
    best = pull(3.0, train=series(falling), logits=calm)
    early = pull(6.0, train=series(rising), logits=series([2.0] * 12 + [9.0] * 28))
    late = pull(
        math.inf,
        "diverged",
        train=series([*rising[:30], *[math.nan] * 10]),
        logits=series([2.0] * 30 + [math.nan] * 10),
    )
    silent = pull(6.0, train=series(rising), logits=calm)
    warned = pull(3.2, train=series([loss + 0.1 for loss in falling]), logits=series([2.0] * 30 + [8.1] * 10))
    made = variant("base", [[5.0] * 3, [3.0] * 3, [3.1] * 3, [6.0] * 3])
    made.pulls.update({(made.lrs[1], seed): best for seed in range(3)})
    made.pulls.update({(made.lrs[2], seed): pull(3.1, train=series(falling), logits=calm) for seed in range(3)})
    made.pulls[made.lrs[2], 0] = warned
    made.pulls.update({(made.lrs[3], seed): each for seed, each in enumerate((early, late, silent))})
    (told,) = sensitivity.summarise([made])["variants"]
    assert (told["lost"], told["diverged"], told["others"]) == (3, 1, 3)
    assert (told["logit_first"], told["median_lead"], told["others_left"]) == (1, 21 - 13, 1)


def test_an_update_of_departure_is_the_first_of_those_that_do_not_end() -> None:
    best = pull(3.0, train=series([5.0] * 10), logits=series([1.0] * 10))
    back = pull(3.0, train=series([6.0] * 9 + [5.0]), logits=series([1.0, 9.0] + [1.0] * 8))
    assert sensitivity.departures(back, best) == (None, 2)
    always = pull(3.0, train=series([6.0] * 10), logits=series([2.0] * 10))
    assert sensitivity.departures(always, best) == (1, None)


@pytest.fixture(scope="module")
def study(
    tiny_flags: dict[str, Any], as_argv: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Pulls with and without QK-norm, at three learning rates of which one is absurd, of two seeds, as offline runs."""
    import wandb

    folder = tmp_path_factory.mktemp("study")
    short = {"tokens": 512 * 16, "val_every": 100, "log_every": 2, "checkpoint_every": 100, "val_tokens": 512}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            environment.setenv(name, str(folder))
        wandb.teardown()
        for qk_norm in ("false", "true"):
            more = {"qk_norm": qk_norm, "lr": "1e-3,1e-2,1e30", "seed": "0,1"}
            argv = as_argv(tiny_flags, **short, **more, out=folder / "runs", on_divergence="ignore")
            assert pretrain.main(argv) in (0, console.EXIT_DIVERGED)
        argv = as_argv(tiny_flags, **short, lr=1e-3, seed=5, out=folder / "runs", on_divergence="ignore")
        assert pretrain.main(argv) == 0  # a seed that only one learning rate has
        wandb.teardown()
    return folder


def test_pulls_are_read_back_and_drawn(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "sensitivity.html"
    assert sensitivity.main([str(study), f"--out={page}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["by"], result["lrs"]) == (["qk_norm"], [1e-3, 1e-2, 1e30])
    seen = [(row["name"], row["seeds"], row["lost"], row["diverged"]) for row in result["variants"]]
    assert seen == [("base", 2, 2, 2), ("qk_norm", 2, 2, 2)]
    for row in result["variants"]:
        assert row["loss_at_init"] == pytest.approx(math.log(1536), rel=0.05)
        assert row["best_lr"] == 1e-2
    cells = {(cell["variant"], cell["lr"]): cell for cell in result["cells"]}
    assert cells["base", 1e30]["lost"] == 1.0 and cells["base", 1e-2]["lost"] == 0.0
    assert cells["base", 1e30]["loss"] == pytest.approx(result["variants"][0]["loss_at_init"], abs=1e-3)
    assert 0 < cells["qk_norm", 1e-2]["update_rms"] < 1.5
    assert "Learning-rate sensitivity" in page.read_text(encoding="utf-8")
    assert sensitivity.main([str(study), f"--out={page}", "--by=qk_norm"]) == 0
    said = capsys.readouterr().out
    assert "S less base's" in said and "the largest attention logit grew before" in said


@pytest.mark.parametrize(("by", "words"), [("eps", "differ in qk_norm"), ("no_such", "--by no_such")])
def test_fields_that_make_no_study_are_refused(by: str, words: str, study: Path, tmp_path: Path) -> None:
    with pytest.raises(console.UserError, match=words):
        sensitivity.main([str(study), f"--by={by}", f"--out={tmp_path / 'page.html'}"])


def test_a_folder_without_a_study_is_refused(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(console.UserError, match="needs three and two"):
        sensitivity.main([str(llama.folder.parent), f"--out={tmp_path / 'page.html'}"])


@pytest.mark.parametrize(("name", "pulls"), [("lr_sensitivity", 140), ("embedding_scale", 60), ("epsilon", 54)])
def test_the_sweeps_span_their_studies(name: str, pulls: int) -> None:
    sweep = definition.read(str(REPOSITORY / "sweeps" / f"{name}.yaml"))
    assert len(sweep.points) == pulls
    known = pretrain.PretrainConfig.__dataclass_fields__
    assert {field for point in sweep.points for field in point} <= set(known)
    assert {point["on_divergence"] for point in sweep.points} == {"ignore"}
