"""Search: random draws against W&B's own sampler, Bayesian proposals against its engine, Optuna through wandb."""

import json
import math
import random
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

import tracking
from console import UserError
from gacha import definition, engine, sampling, search
from gacha.search import Seen

LOSS = {"name": "loss", "goal": "minimize"}
NESTED = {
    "lr": {"distribution": "log_uniform_values", "min": 1.0e-5, "max": 0.1},
    "model": {"parameters": {"width": {"values": [64, 128, 256]}, "drop": {"min": 0.0, "max": 0.5}}},
    "warmup": {"min": 1, "max": 9},
    "optimizer": {"value": "adamw"},
}


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a program, for definitions that are read from it."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    return tmp_path


def read(parameters: dict[str, Any], method: str, sampler_seed: int = 0, **more: Any) -> definition.Sweep:
    given = {"program": "train.py", "method": method, "parameters": parameters, **more}
    Path("sweep.yaml").write_text(yaml.safe_dump(given))
    return definition.read("sweep.yaml", sampler_seed)


def loss(params: dict[str, Any]) -> float:
    return (math.log10(params["lr"]) + 3) ** 2 + params["model"]["drop"] + (params["warmup"] - 5) ** 2 / 10


def search_for(sweep: definition.Sweep, count: int, statuses: str = "f") -> list[Seen]:
    """`count` pulls, each proposed from those before it; a letter of `statuses` each, over and over."""
    names = {"f": "finished", "x": "failed", "r": "running", "s": "stopped", "d": "diverged", "w": "waiting"}
    seen: list[Seen] = []
    for number in range(count):
        params = search.propose(sweep, seen)
        assert params is not None
        value = loss(params)
        history = [value + 1, math.nan, value]
        seen.append(Seen(f"run{number}", params, names[statuses[number % len(statuses)]], history))
    return seen


# ---- random

SPECS: dict[str, dict[str, Any]] = {
    "categorical": {"values": ["a", "b", 3, None]},
    "probabilities": {"values": ["a", "b", "c", "d"], "probabilities": [0.5, 0.2, 0, 0.3]},
    "int_uniform": {"min": -2, "max": 6},
    "uniform": {"min": -1, "max": 2.5},
    "q_uniform": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.1},
    "q_uniform whole": {"distribution": "q_uniform", "min": 1, "max": 20, "q": 3},
    "q_uniform plain": {"distribution": "q_uniform", "min": 0, "max": 5},
    "log_uniform": {"distribution": "log_uniform", "min": -3, "max": 2},
    "log_uniform_values": {"distribution": "log_uniform_values", "min": 1.0e-4, "max": 1},
    "q_log_uniform": {"distribution": "q_log_uniform", "min": 0, "max": 4, "q": 2},
    "q_log_uniform_values": {"distribution": "q_log_uniform_values", "min": 1, "max": 50, "q": 2.5},
    "inv_log_uniform": {"distribution": "inv_log_uniform", "min": -3, "max": 2},
    "inv_log_uniform_values": {"distribution": "inv_log_uniform_values", "min": 1.0e-4, "max": 1},
    "normal": {"distribution": "normal"},
    "normal elsewhere": {"distribution": "normal", "mu": 3, "sigma": 0.5},
    "q_normal": {"distribution": "q_normal", "mu": 3, "sigma": 5, "q": 2},
    "log_normal": {"distribution": "log_normal", "mu": 1, "sigma": 0.5},
    "q_log_normal": {"distribution": "q_log_normal", "mu": 1, "q": 1},
    "beta": {"distribution": "beta", "a": 2, "b": 5},
    "q_beta": {"distribution": "q_beta", "a": 2, "b": 5, "q": 0.1},
    "q_beta plain": {"distribution": "q_beta"},
}


@pytest.mark.parametrize("name", SPECS)
def test_draws_are_distributed_as_wandbs(name: str) -> None:
    """Two samples of 1,500, by Kolmogorov-Smirnov where continuous and by chi-square where not; seeds are fixed."""
    with engine.quiet():
        from sweeps.params import HyperParameter

        parameter = HyperParameter("p", SPECS[name])
        random.seed(len(name))
        theirs = [search.plain(parameter.sample()) for _ in range(1500)]
    ours = [sampling.value(SPECS[name], sampling.stream(1, index, ("p",))) for index in range(1500)]
    assert {type(value) for value in ours} == {type(value) for value in theirs}
    if len(set(theirs)) > 500:
        assert stats.ks_2samp(theirs, ours).pvalue > 0.005
        return
    levels = [level for level in set(theirs + ours) if theirs.count(level) + ours.count(level) >= 10]
    assert {level for level in ours if level in levels} == {level for level in theirs if level in levels}
    table = [[values.count(level) for level in levels] for values in (theirs, ours)]
    assert stats.chi2_contingency(table).pvalue > 0.005


def test_bounds_hold_and_steps_are_exact() -> None:
    for index in range(300):
        point = sampling.point(SPECS, 5, index)
        assert 1.0e-4 <= point["log_uniform_values"] <= 1 and 1.0e-4 <= point["inv_log_uniform_values"] <= 1
        assert math.exp(-2) <= point["inv_log_uniform"] <= math.exp(3)
        assert point["q_uniform"] in [step * 0.1 for step in range(11)]
        assert point["q_uniform whole"] in range(0, 22, 3) and point["int_uniform"] in range(-2, 7)
        assert point["probabilities"] != "c"


def test_point_is_a_function_of_seed_and_index_alone() -> None:
    listed, endless = read(NESTED, "random", run_cap=9), read(NESTED, "random")
    assert listed.listed and not endless.listed and not endless.points
    assert [pull.params for pull in search_for(endless, 9)] == listed.points == read(NESTED, "random", run_cap=9).points
    assert search.propose(endless, [Seen("a", {}, "running", [])] * 5) == listed.points[5]
    assert len({json.dumps(point) for point in listed.points}) == 9
    other = read(NESTED, "random", sampler_seed=1, run_cap=9)
    assert not {point["lr"] for point in other.points} & {point["lr"] for point in listed.points}
    assert list(listed.points[0]) == ["lr", "optimizer", "warmup", "model"]


def test_a_new_parameter_leaves_the_others_draws() -> None:
    before = read(NESTED, "random", run_cap=5).points
    after = read({"a": {"min": 0.0, "max": 1.0}, **NESTED}, "random", run_cap=5).points
    assert [{**point, "a": 0} for point in before] == [{**point, "a": 0} for point in after]


def test_the_sweep_is_another_with_another_sampler_seed_unless_it_is_a_grid() -> None:
    grid = {"lr": {"values": [1, 2]}}
    assert read(grid, "grid", 0).sweep_id == read(grid, "grid", 1).sweep_id
    assert read(grid, "random", 0, run_cap=2).sweep_id != read(grid, "random", 1, run_cap=2).sweep_id
    assert read(grid, "random", 1, run_cap=2).sweep_id == read(grid, "random", 1, run_cap=3).sweep_id
    with pytest.raises(UserError, match="--sampler_seed -1"):
        read(grid, "random", -1)


# ---- where a sweep ends


def test_ends_at_run_cap_and_at_the_end_of_the_list() -> None:
    seen = [Seen(str(i), {}, "failed", []) for i in range(4)]
    assert search.propose(read(NESTED, "random", run_cap=4), seen) is None
    assert search.propose(read(NESTED, "bayes", run_cap=4, metric=LOSS), seen) is None
    grid = read({"lr": {"values": [1, 2, 3, 4]}}, "grid")
    assert search.propose(grid, seen[:3]) == {"lr": 4} and search.propose(grid, seen) is None


def test_ends_when_a_pull_reaches_the_target() -> None:
    sweep = read(NESTED, "random", metric={**LOSS, "target": 0.5})
    seen = [Seen("a", {}, "finished", [3.0, 0.6]), Seen("b", {}, "running", [math.nan, 2.0])]
    assert search.reached(sweep, seen) is None and search.propose(sweep, seen)
    seen.append(Seen("c", {}, "running", [0.5, 0.9]))
    hit = search.reached(sweep, seen)
    assert hit and hit.run_id == "c" and search.propose(sweep, seen) is None
    sweep = read(NESTED, "random", metric={"name": "accuracy", "goal": "maximize", "target": 2.9})
    hit = search.reached(sweep, seen)
    assert hit and hit.run_id == "a"


# ---- W&B's engine


@pytest.mark.parametrize("metric", [LOSS, {"name": "loss", "goal": "maximize", "impute": "latest"}])
def test_bayes_is_what_wandbs_engine_proposes(metric: dict[str, Any]) -> None:
    """From whole histories, though the engine is given three values of each; its seed is ours."""
    sweep = read(NESTED, "bayes", metric=metric)
    seen = search_for(sweep, 14, "ffxfrfsfdw")
    states = {"diverged": "failed", "stopped": "killed", "waiting": "pending"}
    with engine.quiet():
        sweeps = engine.sweeps()
        runs = [
            sweeps.SweepRun(
                name=pull.run_id,
                state=states.get(pull.status, pull.status),
                config=tracking.wrapped(pull.params),
                history=[{"loss": value} for value in pull.history],
            )
            for pull in seen
        ]
        np.random.seed(search.seed(sweep, seen))
        expected = sweeps.next_run(sweep.definition, runs).config
    assert search.propose(sweep, seen) == {name: search.plain(value["value"]) for name, value in expected.items()}


def test_bayes_is_seeded_and_leaves_the_callers_generator(capfd: pytest.CaptureFixture[str]) -> None:
    sweep = read(NESTED, "bayes", metric=LOSS)
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    first = [pull.params for pull in search_for(sweep, 6)]
    assert first == [pull.params for pull in search_for(sweep, 6)]
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]
    assert search.propose(read(NESTED, "bayes", 1, metric=LOSS), []) != first[0]
    assert capfd.readouterr() == ("", "")


def test_bayes_speaks_plain_python_and_keeps_agents_apart() -> None:
    """Eight agents that ask while nothing is known yet get eight points (wandb issue 4323: they got four)."""
    sweep = read(NESTED, "bayes", metric=LOSS)
    points = [pull.params for pull in search_for(sweep, 8, "r")]
    assert yaml.safe_load(yaml.safe_dump(points)) == json.loads(json.dumps(points)) == points
    assert len({point["lr"] for point in points}) == 8
    assert list(points[0]) == ["lr", "optimizer", "warmup", "model"]


def test_two_hundred_pulls_are_no_burden(capfd: pytest.CaptureFixture[str]) -> None:
    """Also with more of them running than the engine takes, of which it would tell on stdout."""
    sweep = read(NESTED, "bayes", metric=LOSS)
    points = read(NESTED, "random", run_cap=200).points
    seen = [Seen(str(i), p, "running" if i % 2 else "finished", [loss(p)] * 500) for i, p in enumerate(points)]
    assert search.propose(sweep, seen)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("history", [[], [math.nan], [math.inf, -math.inf]])
def test_bayes_takes_runs_that_logged_nothing_finite(history: list[float]) -> None:
    sweep = read(NESTED, "bayes", metric=LOSS)
    point = search.propose(sweep, [])
    assert point
    for status in ("finished", "failed", "diverged", "stopped", "interrupted", "running"):
        assert search.propose(sweep, [Seen("a", point, status, history), Seen("b", point, "finished", [1.0])])


# ---- Optuna


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Packages by name as if they were not installed."""
    real = engine.version

    def hide(*names: str, **versions: str) -> None:
        monkeypatch.setattr(engine, "version", lambda name: "" if name in names else versions.get(name) or real(name))

    return hide


def test_optuna_serves_bayes_where_wandbs_engine_is_not(without: Any, capfd: pytest.CaptureFixture[str]) -> None:
    without("sweeps")
    sweep = read(NESTED, "bayes", metric=LOSS)
    assert sweep.warnings == ("Optuna's TPE searches: for W&B's own engine, pip install --no-deps sweeps==0.3.0",)
    seen = search_for(sweep, 40, "ffffxfr")
    assert [pull.params for pull in seen] == [pull.params for pull in search_for(sweep, 40, "ffffxfr")]
    losses = [loss(pull.params) for pull in seen]
    assert np.median(losses[25:]) < np.median(losses[:10]) / 2
    assert list(seen[0].params) == ["lr", "optimizer", "warmup", "model"]
    assert json.loads(json.dumps(seen[0].params)) == seen[0].params
    assert capfd.readouterr() == ("", "")


def test_no_engine_is_one_line_that_says_what_to_install(without: Any) -> None:
    without("sweeps", "optuna")
    with pytest.raises(UserError) as mistake:
        read(NESTED, "bayes", metric=LOSS)
    assert "pip install --no-deps sweeps==0.3.0" in str(mistake.value)
    assert "pip install -e '.[bayes]'" in str(mistake.value)
    with pytest.raises(UserError, match=r"needs Optuna \(pip install"):
        read(NESTED, "custom", metric=LOSS, scheduler={"engine": "optuna"})


def test_old_engine_may_not_search_nested_parameters(without: Any) -> None:
    without(sweeps="0.2.0")
    with pytest.raises(UserError, match=r"sweeps 0\.2\.0 cannot search nested parameters; pip install --no-deps"):
        read(NESTED, "bayes", metric=LOSS)
    flat = read({"lr": {"min": 0.0, "max": 1.0}}, "bayes", metric=LOSS)
    assert search.propose(flat, []) and not flat.warnings


def test_engine_that_lacks_a_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = read(NESTED, "bayes", metric=LOSS)
    for name in [name for name in sys.modules if name.partition(".")[0] == "sweeps"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jsonref", None)
    with pytest.raises(UserError, match=r"cannot be imported .*jsonref"):
        search.ready(sweep)
    assert read(NESTED, "random", run_cap=1).points  # our own lint goes on alone


SOURCE = """
import optuna

def grid(sweep):
    return optuna.create_study(sampler=optuna.samplers.GridSampler({"lr": [0.1, 0.2, 0.3], "d": [1, 2]}, seed=3))

def three(sweep):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return study, lambda study: len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE])) >= 3

def stored(sweep):
    return optuna.create_study(storage="sqlite:///study.db", study_name="x", load_if_exists=True)

def space(trial):
    point = {"opt": trial.suggest_categorical("opt", ["adam", "sgd"])}
    if point["opt"] == "sgd":
        point["momentum"] = trial.suggest_float("momentum", 0, 1)
    return point

def broken(sweep):
    raise RuntimeError("no such\\ndatabase")
"""


def custom(parameters: dict[str, Any] | None = None, **scheduler: str) -> definition.Sweep:
    Path("study.py").write_text(textwrap.dedent(SOURCE))
    given = {"program": "train.py", "method": "custom", "metric": LOSS}
    given |= {"scheduler": {"engine": "optuna", "source": "study.py", **scheduler}}
    given |= {"parameters": parameters} if parameters else {}
    Path("sweep.yaml").write_text(yaml.safe_dump(given))
    return definition.read("sweep.yaml")


FLAT = {"lr": {"min": 0.0, "max": 1.0}, "d": {"min": 1, "max": 8}}


@pytest.mark.parametrize("status", ["finished", "running"])
def test_users_study_goes_on_where_it_stopped(status: str) -> None:
    """Each proposal builds it anew; a grid of six points is served once each and ends."""
    sweep, seen = custom(FLAT, optimizer="grid"), list[Seen]()
    search.ready(sweep)
    while (params := search.propose(sweep, seen)) is not None and len(seen) < 9:
        seen.append(Seen(str(len(seen)), params, status, [1.0]))
    assert len(seen) == 6 and len({json.dumps(pull.params) for pull in seen}) == 6


def test_users_terminator_ends_the_sweep() -> None:
    sweep, seen = custom(FLAT, optimizer="three"), list[Seen]()
    while (params := search.propose(sweep, seen)) is not None and len(seen) < 9:
        seen.append(Seen(str(len(seen)), params, "failed" if len(seen) == 1 else "finished", [1.0]))
    assert len(seen) == 4


def test_users_search_space_needs_no_parameters() -> None:
    sweep, seen = custom(search_space="space"), list[Seen]()
    for number in range(12):
        params = search.propose(sweep, seen)
        assert params and ("momentum" in params) == (params["opt"] == "sgd")
        seen.append(Seen(str(number), params, "finished" if number % 3 else "running", [0.5]))
    assert {pull.params["opt"] for pull in seen} == {"adam", "sgd"}


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        ({"optimizer": "broken"}, "scheduler: study.py: RuntimeError: no such database"),
        ({"optimizer": "none"}, "scheduler: study.py: study.py has no attribute 'none'"),
        ({"search_space": "grid"}, "returned Study, not a dict"),
    ],
)
def test_users_own_mistakes_are_one_line(scheduler: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as mistake:
        search.ready(custom(FLAT, **scheduler))
    assert says in str(mistake.value) and "\n" not in str(mistake.value)


def test_study_with_a_memory_of_its_own_is_refused() -> None:
    """It would be told of every run once more with every proposal."""
    sweep = custom(FLAT, optimizer="stored")
    search.ready(sweep)
    with pytest.raises(UserError, match="leave its storage out"):
        search.propose(sweep, [])
