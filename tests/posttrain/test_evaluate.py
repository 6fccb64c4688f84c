"""`python -m posttrain.evaluate`: scores as counted by hand, intervals as scipy's, pairs of models, records."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import console
from gacha import runs
from posttrain import evaluate, intervals, sft
from tests.posttrain import small_task

Files = tuple[Path, Path]
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return small_task.write(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def tuned(llama: Any, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that was taught the small task by half."""
    flags = {"model": llama.checkpoint, "data": files[0], "test_data": files[1], "max_steps": 35, "samples": 3}
    return small_task.train(sft.main, tmp_path_factory.mktemp("tuned"), **flags)


@pytest.fixture
def ask(tuned: Any, files: Files, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """ask(*flags): the door's JSON for the tuned model."""

    def call(*flags: str, model: str | Path | None = None) -> dict[str, Any]:
        capsys.readouterr()
        argv = [str(model or tuned.folder), f"--data={files[1]}", "--max_new_tokens=20", "--json", *flags]
        assert evaluate.main(argv) == 0
        return dict(json.loads(capsys.readouterr().out))

    return call


# --- the door --------------------------------------------------------------------------------------------------------
def test_scores_are_what_the_answers_say(ask: Evaluate, tuned: Any, tmp_path: Path) -> None:
    told = ask("--samples=3", f"--out={tmp_path / 'answers.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert told["items"] == len(rows) == 8
    assert [row["reference"] for row in rows] == [item["reference"] for item in small_task.items()]
    exact = [row["answer"].strip() == row["reference"] for row in rows]
    assert told["exact_match"]["value"] == np.mean(exact) == tuned.result["eval/exact_match"]
    assert 0 < told["exact_match"]["value"] < 1, "half taught"
    ci = stats.binomtest(sum(exact), 8).proportion_ci(0.95, "exact")
    assert (told["exact_match"]["low"], told["exact_match"]["high"]) == pytest.approx((ci.low, ci.high))
    again = np.array([[text.strip() == row["reference"] for text in row["sampled"]] for row in rows])
    assert again.shape == (8, 3) and again.tolist() == [row["sampled_exact"] for row in rows]
    assert told["sampled_exact_match"]["value"] == pytest.approx(again.mean())
    assert told["sampled_exact_match"]["value"] == pytest.approx(tuned.result["eval/sampled_exact_match"])
    assert told["sampled_sd"] == pytest.approx(tuned.result["eval/sampled_sd"]) == pytest.approx(again.std(1).mean())
    assert told["pass@1"]["value"] == pytest.approx(again.mean())
    assert told["pass@3"]["value"] == pytest.approx(again.any(1).mean()) and "pass@4" not in told
    fields = [value["value"] for key, value in told.items() if key.startswith("field/")]
    assert told["field_accuracy"]["value"] == pytest.approx(np.mean(fields)), "all items have the same two fields"
    by_form = [told[f"form/{form}/exact_match"]["value"] for form in ("json", "summary")]
    assert np.mean(by_form) == pytest.approx(told["exact_match"]["value"]), "four items each"
    assert told == {**ask("--samples=3")}, "the same seed, the same answers"
    assert ask("--samples=3", "--seed=8")["sampled_exact_match"] != told["sampled_exact_match"]


def test_two_models_are_compared_item_by_item(ask: Evaluate, llama: Any, shards_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    flags = (f"--against={llama.checkpoint}", f"--base_data={shards_folder}", "--base_tokens=1024", f"--out={out}")
    told = ask("--samples=2", *flags)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    wins = sum(row["exact_match"] for row in rows)
    one = told["minus/exact_match"]
    assert (one["wins"], one["losses"], one["difference"]) == (wins, 0, wins / 8), "the base has nothing right"
    assert one["p"] == pytest.approx(2 * 0.5**wins) and one["low"] <= one["difference"] <= one["high"]
    assert told["minus/field_accuracy"]["difference"] == told["field_accuracy"]["value"]
    assert told["minus/base/bpb"] > 0.01, "tuning on four answers wrecks the base"
    same = ask("--samples=0", f"--against={llama.checkpoint}", model=llama.checkpoint)
    one = same["minus/exact_match"]
    assert (one["difference"], one["p"], one["wins"], one["losses"]) == (0, 1, 0, 0)
    assert one["high"] == -one["low"] == same["exact_match"]["high"], "0 of 8 differ, which is not to say none would"
    assert "pass@1" not in same and "sampled_exact_match" not in same
    once = ask("--samples=1")
    assert "pass@1" in once and "sampled_sd" not in once, "one answer has no spread"


def test_it_is_recorded_as_a_run(ask: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuned: Any) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()
    try:
        told = ask("--samples=2", "--limit=5")
    finally:
        wandb.teardown()
    [run] = runs.read(tmp_path)
    assert (run.job_type, run.status, run.exit_code) == ("evaluate", "ok", 0)
    assert run.summary["eval/exact_match"] == told["exact_match"]["value"]
    assert run.summary["eval/exact_match/low"] == told["exact_match"]["low"]
    assert set(run.config["lineage"]) == {"model", "data"} and run.config["model"] == str(tuned.folder)
    table = runs.table(run.tables["answers"])
    assert [row["reference"] for row in table] == [item["reference"] for item in small_task.items()[:5]]
    assert len(json.loads(table[0]["sampled"])) == 2


def test_lines_for_people(tuned: Any, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(tuned.folder), f"--data={files[1]}", "--samples=0", "--max_new_tokens=20", "--limit=4"]
    assert evaluate.main(argv) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    value, low, high = (float(part.strip("[],")) for part in lines["exact_match"].split())
    assert low <= value <= high and lines["items"] == "4"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nowhere"], "nowhere: no such model"),
        (["MODEL", "--against=nowhere"], "nowhere: no such model"),
        (["MODEL", "--samples=-1"], "--samples -1: must be 0 or more"),
        (["MODEL", "--max_new_tokens=0"], "--max_new_tokens 0: must be at least 1"),
        (["MODEL", "--out=no/where.jsonl"], "--out no/where.jsonl: its folder does not exist"),
        (["MODEL", "--data=CHATS"], "not of {prompt, reference, ...}"),
        (["MODEL", "--sample=3"], "did you mean --samples"),
    ],
)
def test_mistakes_are_one_line(tuned: Any, files: Files, flags: list[str], said: str) -> None:
    names = {"MODEL": str(tuned.folder), "--data=CHATS": f"--data={files[0]}"}
    with pytest.raises(console.UserError) as mistake:
        evaluate.main([f"--data={files[1]}", *(names.get(flag, flag) for flag in flags)])
    assert said in str(mistake.value) and "\n" not in str(mistake.value)


# --- the figures -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("right", "n"), [(0, 12), (5, 12), (12, 12), (1, 1)])
def test_rates_have_the_exact_interval(right: int, n: int) -> None:
    """Clopper and Pearson by their beta quantiles."""
    told = intervals.rate([True] * right + [False] * (n - right))
    low = stats.beta.ppf(0.025, right, n - right + 1) if right else 0.0
    high = stats.beta.ppf(0.975, right + 1, n - right) if right < n else 1.0
    assert (told.value, told.how) == (right / n, "exact")
    assert (told.low, told.high) == pytest.approx((low, high))


def test_means_have_the_bootstrap_s_interval_as_scipy_makes_it() -> None:
    x = np.random.default_rng(1).beta(2, 3, 60)
    told = intervals.over_items(x.tolist(), 3)
    known = stats.bootstrap((x,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(0))
    interval = known.confidence_interval
    assert told.value == pytest.approx(x.mean()) and told.how == "bootstrap"
    assert (told.low, told.high) == pytest.approx((interval.low, interval.high), abs=0.01)
    assert told == intervals.over_items(x.tolist(), 3)
    assert intervals.over_items([1.0] * 9, 3) == intervals.rate([True] * 9), "a bootstrap would be sure"


def test_intervals_over_items_cover_where_intervals_over_answers_do_not() -> None:
    """Items of which each has a rate of its own, 8 answers each: 95% of 150 sets hold the truth, give or take."""
    rng, hit, naive = np.random.default_rng(0), 0, 0
    for _ in range(150):
        answers = rng.random((60, 8)) < rng.beta(0.5, 0.5, 60)[:, None]
        told = intervals.over_items(answers.mean(axis=1).tolist(), 0)
        hit += told.low <= 0.5 <= told.high
        flat = intervals.rate(answers.ravel())
        naive += flat.low <= 0.5 <= flat.high
    assert hit / 150 > 0.9 and naive / 150 < 0.75


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(k: int) -> None:
    for right in range(9):
        answers = [True] * right + [False] * (8 - right)
        choices = [any(some) for some in itertools.combinations(answers, k)]
        assert intervals.pass_at_k(8, np.array([right]), k)[0] == pytest.approx(np.mean(choices))


def test_spread_tells_luck_of_sampling_from_difficulty_of_items() -> None:
    rng = np.random.default_rng(2)
    rates = rng.choice([0.2, 0.8], 4000)
    told = intervals.spread(rng.random((4000, 6)) < rates[:, None])
    assert told.within == pytest.approx(0.16, abs=0.01) and told.between == pytest.approx(0.09, abs=0.01)
    assert told.rerun_sd == pytest.approx(math.sqrt(0.16 / 4000), rel=0.05)
    luck = intervals.spread(rng.random((4000, 6)) < 0.5)
    assert luck.within == pytest.approx(0.25, abs=0.01) and luck.between < 0.01


@pytest.mark.parametrize(("wins", "losses"), [(9, 2), (0, 5), (3, 3), (0, 0)])
def test_mcnemar_s_test_is_the_binomial_one_of_discordant_items(wins: int, losses: int) -> None:
    first = [True] * wins + [False] * losses + [True, True, False]
    second = [False] * wins + [True] * losses + [True, True, False]
    told = intervals.mcnemar(first, second, 0)
    tail = sum(math.comb(wins + losses, i) for i in range(min(wins, losses) + 1)) / 2 ** (wins + losses)
    assert told.p == pytest.approx(min(1.0, 2 * tail)) and (told.wins, told.losses) == (wins, losses)
    assert told.difference == pytest.approx((wins - losses) / len(first))


def test_pairs_are_surer_than_two_models_apart() -> None:
    rng = np.random.default_rng(4)
    hard = rng.random(80)
    first, second = np.clip(hard + 0.1, 0, 1), hard
    told = intervals.paired(first, second, 0)
    assert 0 < told.low <= told.difference <= told.high
    apart = intervals.over_items(second.tolist(), 0)
    assert apart.high - apart.low > 3 * (told.high - told.low)
    nothing = intervals.paired(second, second, 0)
    assert nothing.high == -nothing.low == intervals.rate([False] * 80).high, "no difference seen is not none"
