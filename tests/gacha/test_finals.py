"""`gacha odds` through its command line, on tables as people have them."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import console
from gacha import duel, finals, noise, odds

REAL = Path(__file__).parents[2] / "docs" / "early_stopping.csv"
MUON = [3.2763, 3.2785, 3.2741, 3.2790, 3.2768, 3.2772]
ADAMW = [3.2880, 3.2862, 3.2911, 3.2871]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = ["recipe,seed,val_loss", *(f"track/1 Muon,{i},{x}" for i, x in enumerate(MUON)), "track/1 Muon,6,nan"]
    rows += [*(f"adamw,{i},{x}" for i, x in enumerate(ADAMW)), "adamw,9,", "alone,0,3.3", "lost,0,inf"]
    path = tmp_path / "finals.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def told(capsys: pytest.CaptureFixture[str], *argv: Any) -> dict[str, Any]:
    assert finals.main([*map(str, argv), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_statistics_of_each_group(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--group", "recipe", "--value", "val_loss", "--lower-is-better", "--target", "3.277", "--cost", "1e-4"]
    groups = told(capsys, table, *flags)["groups"]
    got = groups["track/1 Muon"]
    assert (got["n"], got["n_diverged"], got["n_missing"]) == (6, 1, 0)
    assert got["mean"] == pytest.approx(np.mean(MUON)) and got["sd"] == pytest.approx(np.std(MUON, ddof=1))
    for k, best in got["best_of"].items():
        exact = odds.best_of_curve(MUON, [int(k)])[0]
        assert (best["u"], best["v"], best["lo"], best["hi"]) == (exact.u, exact.v, exact.lo, exact.hi)
    assert list(got["best_of"]) == list(got["p_hit"]) == ["1", "2", "3", "4", "5", "6"]
    assert got["p_hit"]["2"]["p"] == pytest.approx(odds.p_hit(3, 6, 2).value)
    assert got["p_one_sided"] == pytest.approx(stats.ttest_1samp(MUON, 3.277, alternative="less").pvalue)
    assert got["reservation"] == odds.reservation(MUON, 1e-4, diverged=1).value
    assert got["p_diverge"]["p"] == pytest.approx(1 / 7)
    assert got["price"]["p"] == pytest.approx(3 / 7)
    assert got["outliers"] == []
    assert (groups["adamw"]["n"], groups["adamw"]["n_missing"], groups["adamw"]["p_hit"]["1"]["p"]) == (4, 1, 0)
    assert groups["alone"]["sd"] is None and groups["alone"]["best_of"]["1"]["lo"] is None
    assert groups["lost"]["n"] == 0 and groups["lost"]["mean"] is None and groups["lost"]["n_diverged"] == 1
    plain = told(capsys, table, "--group", "recipe", "--value", "val_loss")["groups"]["adamw"]
    assert (plain["reservation"], plain["p_one_sided"], plain["p_hit"]) == (None, None, {})


def test_money_and_worth_are_a_cost_in_units_of_the_value(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [table, "--group=recipe", "--value=val_loss", "--target=3.277"]
    money = told(capsys, *flags, "--cost=500", "--worth=5e6")["groups"]["track/1 Muon"]
    units = told(capsys, *flags, "--cost=1e-4")["groups"]["track/1 Muon"]
    assert money["reservation"] == pytest.approx(units["reservation"])
    assert money["price"]["spend"] == pytest.approx(5e6 * units["price"]["spend"])
    stopped = told(capsys, *flags, "--cost=500", "--detect", 0.1, "--false-alarm", 0.05)["groups"]["track/1 Muon"]
    assert stopped["price"]["cost"] < money["price"]["cost"] == 500


def test_a_duel(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--group", "recipe", "--value", "val_loss", "--lower_is_better", "--duel", "track/1 Muon", "adamw"]
    got = told(capsys, table, *flags)["duel"]
    exact = duel.duel(MUON, ADAMW)
    assert got["verdict"] == "track/1 Muon is better" and got["winner"] == "A"
    assert (got["welch_p"], got["p_improvement"], got["n_needed"]) == (exact.welch_p, 1.0, exact.n_needed)
    assert got["p_improvement_lo"] < 1 and got["n_diverged_a"] == 1
    assert finals.main([str(table), *flags]) == 0
    assert "duel: track/1 Muon is better than adamw" in capsys.readouterr().out


def test_the_better_end_is_guessed_and_said(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finals.main([str(table), "--value", "val_loss", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["lower_is_better"] is True and json.loads(captured.out)["groups"]["all"]["n"] == 11
    assert captured.err == "val_loss: lower is better, by its name; if not, give --higher_is_better\n"
    assert (
        told(capsys, table, "--value", "val_loss", "--higher-is-better")["groups"]["all"]["best_of"]["11"]["u"] == 3.3
    )
    assert all(map(finals.guess_lower_is_better, ["val/bpb", "Loss", "testError", "PPL", "train_time_s", "wer"]))
    assert not any(map(finals.guess_lower_is_better, ["accuracy", "score", "glossary", "reward", "sometimes"]))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--value", "val_los"],
            "no column 'val_los' (--value); there are recipe, seed, val_loss; did you mean val_loss?",
        ),
        (["--value", "val_loss", "--group", "recipes"], "no column 'recipes' (--group); there are recipe"),
        (["--value", "recipe"], ":2: 'track/1 Muon' in column 'recipe' is no number"),
        (["--value", "val_loss", "--group", "recipe", "--duel", "adam", "alone"], "no group 'adam'; there are adamw"),
        (["--value", "val_loss", "--group", "recipe", "--duel", "lost", "adamw"], "'lost' has no final"),
        (["--value", "val_loss", "--duel", "a", "b"], "--duel: needs --group"),
        (["--value", "val_loss", "--cost", "0"], "--cost 0: must be more than 0"),
        (["--value", "val_loss", "--worth", "3"], "--worth: needs --cost"),
        (["--value", "val_loss", "--step", "seed"], "curves need both"),
        (["--value", "val_loss", "--lower-is-better", "--higher-is-better"], "give one"),
        (
            ["--value", "val_loss", "--split", "seed", "sed"],
            "no column 'sed' (--split); there are recipe, seed, val_loss; did you mean seed?",
        ),
        (["--value", "val_loss", "--group", "recipe", "--split", "seed", "seed"], "--split: the seeds cannot be told"),
        (["--value", "val_loss", "--group", "recipe", "--scale", "val_loss"], ":8: no val_loss (--scale)"),
    ],
)
def test_mistakes_are_one_line(table: Path, flags: list[str], says: str) -> None:
    with pytest.raises(console.UserError) as mistake:
        finals.main([str(table), *flags])
    assert says in str(mistake.value) and "\n" not in str(mistake.value)


def test_an_empty_table_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(console.UserError, match="is empty"):
        finals.main([str(tmp_path / "empty.csv"), "--value", "x"])


def test_curves_tell_how_early_a_rank_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    got = told(capsys, REAL, "--value", "val_bpb", "--run", "run", "--step", "tokens")["groups"]["all"]
    assert got["n"] == 32 and got["best_of"]["32"]["u"] == pytest.approx(0.55409)
    assert [one["fraction"] for one in got["rank_known"]] == pytest.approx([i / 20 for i in range(1, 20)])
    families = {one["family"] for one in got["frontier"]}
    assert families == {"none", "halving", "hyperband", "learned"}
    assert got["buys_most"]["regret_sd"]["value"] <= 0.1
    assert {found["run"] for found in got["outliers"]} == {"0.2-s1", "0.2-s6", "0.2-s7"}
    assert finals.main([str(REAL), "--value", "val_bpb", "--group", "lr", "--run", "run", "--step", "tokens"]) == 0
    captured = capsys.readouterr()
    assert captured.out.index("0.015\n") < captured.out.index("0.2\n") and "saves most" in captured.out


def test_a_run_with_one_step_twice_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "curves.csv"
    path.write_text("run,step,loss\na,1,3\na,2,2\nb,1,4\nb,1,5\nc,2,2.5\nc,1,3\n")
    assert finals.main([str(path), "--value", "loss", "--run", "run", "--step", "step", "--json"]) == 0
    captured = capsys.readouterr()
    got = json.loads(captured.out)["groups"]["all"]
    assert (got["n"], got["n_missing"], got["mean"]) == (2, 1, 2.25)
    assert "curves.csv:4: run 'b' of 'all' has one step twice" in captured.err


def test_scales_and_seeds_have_their_doors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    rows = ["recipe,params,init,data,loss"]
    small: dict[str, list[float]] = {}
    large: dict[str, list[float]] = {}
    for recipe in range(4):
        for size, kept in ((1e6, small), (1e9, large)):
            kept[str(recipe)] = values = [recipe * 0.1 + float(x) for x in rng.normal(scale=0.1, size=6)]
            rows += [f"{recipe},{size:g},{i // 3},{i % 3},{x!r}" for i, x in enumerate(values)]
    path = tmp_path / "scales.csv"
    path.write_text("\n".join(rows) + "\n")
    flags = [path, "--group", "recipe", "--value", "loss", "--scale", "params", "--split", "init", "data"]
    got = told(capsys, *flags)
    exact = noise.decision_accuracy(small, large)
    assert got["decisions"]["1e+06"]["averaged"]["value"] == exact.averaged.value
    assert got["groups"]["2"]["mean"] == pytest.approx(np.mean(large["2"]))
    split = got["groups"]["2"]["split"]
    variance = noise.variance_split(large["2"], [str(i // 3) for i in range(6)], [str(i % 3) for i in range(6)])
    assert split["init"]["variance"] == variance.init.value
    assert math.isclose(sum(one["share"] for one in split.values()), 1)
    assert finals.main([*map(str, flags)]) == 0
    assert "are in the final order, by one seed" in capsys.readouterr().out


def test_the_door_is_quick_and_big_tables_take_seconds(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "gacha", "odds", "--help"]
    asked = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert "--reservation" not in asked.stdout and "--target" in asked.stdout
    assert not {"scipy.stats", "torch", "wandb"} & {
        line.rpartition("|")[2].strip() for line in asked.stderr.splitlines()
    }
    rng = np.random.default_rng(0)
    path = tmp_path / "big.csv"
    values = rng.normal(size=30_000)
    path.write_text("g,x\n" + "".join(f"{i % 1000},{x}\n" for i, x in enumerate(values)))
    started = time.process_time()
    assert finals.main([str(path), "--group", "g", "--value", "x", "--json"]) == 0
    assert time.process_time() - started < 8
