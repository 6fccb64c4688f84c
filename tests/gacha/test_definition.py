"""Definitions: grids and inferred distributions against W&B's own engine, and the lint with and without it."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import tracking
from console import UserError
from gacha import definition, engine, space

ROOT = Path(__file__).resolve().parents[2]
LOSS = {"name": "val/loss"}


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    return tmp_path


def write(parameters: Any, method: str = "grid", **more: Any) -> str:
    Path("sweep.yaml").write_text(
        yaml.safe_dump({"program": "train.py", "method": method, "parameters": parameters, **more})
    )
    return "sweep.yaml"


def refusal(parameters: Any, method: str = "grid", **more: Any) -> str:
    with pytest.raises(UserError) as mistake:
        definition.read(write(parameters, method, **more))
    assert str(mistake.value).startswith("sweep.yaml") and "\n" not in str(mistake.value)
    return str(mistake.value)


# ---- W&B's engine as the judge


def engines_grid(given: dict[str, Any]) -> list[dict[str, Any]]:
    """All that W&B's engine proposes, one after the other, until it has no more."""
    with engine.quiet():
        sweeps = engine.sweeps()
        runs: list[Any] = []
        while (run := sweeps.next_run(given, runs)) is not None:
            run.state = "finished"
            runs.append(run)
    return [{name: value["value"] for name, value in run.config.items()} for run in runs]


@pytest.mark.parametrize(
    "parameters",
    [
        {"seed": {"values": [0, 1]}, "lr": {"values": [2.0e-3, 1.0]}, "data": {"value": "x"}},
        {"a": {"values": [3.0, 3, 2, True, 1, "1", None]}, "B": {"values": ["x", "x"]}},
        {"width": {"min": 2, "max": 4}, "seed": {"values": [1, 0]}},
        {"drop": {"distribution": "q_uniform", "min": 0, "max": 0.5, "q": 0.1}, "n": {"value": [1, 2]}},
        {"k": {"distribution": "q_uniform", "min": 1, "max": 9, "q": 3}},
        {"k": {"distribution": "q_uniform", "min": 0.5, "max": 4}},
        {
            "model": {"parameters": {"d": {"values": [1, 2]}, "act": {"value": "g"}}},
            "alpha": {"values": [5, 6]},
            "zeta": {"min": 0, "max": 1},
        },
        {"m": {"parameters": {"n": {"parameters": {"x": {"values": [1, 2]}, "y": {"value": 0}}}, "a": {"value": 1}}}},
        {"betas": {"values": [[0.9, 0.95], [0.9, 0.99]]}, "extra": {"values": [{"p": 1}, {"p": 2, "q": 3}]}},
    ],
)
def test_grid_is_that_of_wandbs_engine(parameters: dict[str, Any]) -> None:
    sweep = definition.read(write(parameters))
    expected = engines_grid(sweep.definition)
    assert json.dumps(sweep.points) == json.dumps(expected) and len(expected) > 1


@pytest.mark.parametrize(
    "spec",
    [
        *({"min": low, "max": high} for low, high in itertools.product((0, 0.5), (2, 2.0))),
        *({"value": 1}, {"values": [1]}, {"values": [1, 2], "probabilities": [0.5, 0.5]}),
        *({"distribution": name, "min": 1, "max": 2} for name in space.ATTRIBUTES if name.endswith("uniform_values")),
    ],
)
def test_distribution_is_inferred_as_wandb_infers_it(spec: dict[str, Any]) -> None:
    with engine.quiet():
        from sweeps.config.schema import fill_parameter

        filled = fill_parameter("p", spec)
    assert filled and filled[1]["distribution"] == space.distribution(spec)


def wrong_specs() -> Iterator[dict[str, Any]]:
    """Parameters that are right, with one attribute taken away, added or replaced."""
    good = {"value": 3, "values": [1, 2], "probabilities": [0.5, 0.5], "min": 1, "max": 4}
    good |= {"q": 2, "mu": 1, "sigma": 1, "a": 1, "b": 2}
    for name, taken in space.ATTRIBUTES.items():
        spec = {"distribution": name, **{word: good[word] for word in taken}}
        for word in (*good, "distribution", "parameters", "other"):
            yield {key: value for key, value in spec.items() if key != word}
            for value in (None, "x", "2", 0, -1, 0.5, 3, True, [], [1], {}, {"lr": {"value": 1}}):
                yield {**spec, word: value}


def test_our_lint_finds_what_wandbs_schema_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the engine the lint is alone. Every 7th of 3,042 cases; W&B's remarks on exponents are remarks."""
    with engine.quiet():
        violations = engine.sweeps().schema_violations_from_proposed_config
    monkeypatch.setattr(engine, "version", lambda _: "")
    told = accepted = 0
    for spec in itertools.islice(wrong_specs(), 0, None, 7):
        given = yaml.safe_load(Path(write({"p": spec}, "random")).read_text())
        try:
            found = [line for line in violations(given) if "base-e exponents" not in line]
        except TypeError as error:  # some break the check itself
            found = [str(error)]
        try:
            definition.read("sweep.yaml")
        except UserError:
            told += 1
        else:
            accepted += 1
            assert not found, (spec, found)
    assert told > 250 and accepted > 20


def test_every_definition_of_ours_passes_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = sorted(Path("sweeps").glob("*.yaml"))
    assert len(files) >= 11
    for file in files:
        with engine.quiet():
            assert engine.sweeps().schema_violations_from_proposed_config(yaml.safe_load(file.read_text())) == []
        sweep = definition.read(str(file))
        assert not sweep.warnings, file
        assert sweep.points or sweep.definition["method"] == "bayes", file


# ---- the lint

RANGE = {"min": 0.0, "max": 1.0}


@pytest.mark.parametrize(
    ("parameters", "method", "says"),
    [
        ({"lr": RANGE}, "grid", "parameters: lr: uniform has no list of values for a grid"),
        ({"lr": {"values": [1, 2], "probabilities": [0.5, 0.5]}}, "grid", "categorical_w_probabilities has no list"),
        ({"n": {"min": 0, "max": 10**9}}, "grid", "a range of 1,000,000,000 values"),
        ({"lr": {"min": 0.0}}, "random", "parameters.lr: has min and no max; give both"),
        ({"lr": {"min": 1, "max": 1}}, "random", "min 1 is not below max 1"),
        ({"lr": {"min": "low", "max": 1.0}}, "random", "min: must be a number, not 'low'"),
        ({"lr": {**RANGE, "distribution": "log_uniform_values"}}, "random", "min: must be above 0 on a logarithmic"),
        ({"lr": {"distribution": "log_uniform", "min": 1.0e-4, "max": 0.1}}, "random", "write log_uniform_values"),
        ({"lr": {"distribution": "log_uniform", "min": 1, "max": 1000}}, "random", "are exponents of e"),
        ({"lr": {**RANGE, "distribution": "loguniform"}}, "random", "did you mean log_uniform?"),
        ({"lr": {**RANGE, "distribution": "int_uniform"}}, "random", "int_uniform needs whole numbers, not 0.0"),
        ({"lr": {**RANGE, "q": 0.1}}, "random", "q: does not go with distribution uniform, which takes min, max"),
        ({"lr": {**RANGE, "value": 1}}, "random", "has both value and min"),
        ({"lr": {"mu": 0}}, "random", "has no value and no distribution; mu alone"),
        ({"lr": {"distribution": "normal", "sigma": 0}}, "random", "sigma: must be above 0"),
        ({"lr": {"distribution": "q_uniform", **RANGE, "q": 0}}, "random", "q: must be above 0"),
        ({"o": {"values": [1, 2], "probabilities": [0.5, 0.6]}}, "random", "2 that add up to 1.1"),
        ({"o": {"values": [1, 2], "probabilities": [0.5, 0.5]}}, "bayes", "probabilities are for method: random"),
        ({"lr": {"value": 1}}, "bayes", "nothing to search for method: bayes"),
        ({"m": {"parameters": {"lr": {"min": 2.0, "max": 1.0}}}}, "random", "parameters.m.parameters.lr: min 2.0"),
        ({"m": {"parameters": {"lr": RANGE}, "distribution": "uniform"}}, "random", "not beside parameters"),
    ],
)
def test_what_cannot_be_searched_is_refused(parameters: dict[str, Any], method: str, says: str) -> None:
    assert says in refusal(parameters, method, metric=LOSS)


@pytest.mark.parametrize(
    ("early", "says"),
    [
        ({"type": "hyperband"}, "early_terminate: needs min_iter"),
        ({"type": "envelope", "min_iter": 3}, "early_terminate.type: must be hyperband"),
        ({"type": "hyperband", "min_iters": 3}, "early_terminate.min_iters: unknown key; did you mean min_iter?"),
        ({"type": "hyperband", "max_iter": 27}, "early_terminate.s: missing"),
        ({"type": "hyperband", "max_iter": 2, "s": 2}, "early_terminate.max_iter: 2 / eta 3 is below one"),
        ({"type": "hyperband", "min_iter": 3, "eta": 1}, "early_terminate.eta: must be a number above 1"),
        ({"type": "hyperband", "min_iter": 0}, "early_terminate.min_iter: must be a whole number"),
        ({"type": "hyperband", "min_iter": 1, "strict": "yes"}, "early_terminate.strict: must be true or false"),
        ("hyperband", "early_terminate: must be a mapping"),
    ],
)
def test_early_termination_that_would_stumble_is_refused(early: Any, says: str) -> None:
    assert says in refusal({"lr": RANGE}, "random", metric=LOSS, early_terminate=early)


def test_searches_that_go_by_a_metric_need_one() -> None:
    early = {"type": "hyperband", "min_iter": 3}
    assert "metric: missing, and early_terminate goes by it" in refusal({"lr": RANGE}, "random", early_terminate=early)
    assert "metric: missing, and bayes goes by it" in refusal({"lr": RANGE}, "bayes")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"metric": {**LOSS, "impute_while_running": False}}, 'must be "false" in quotes'),
        ({"metric": {**LOSS, "impute": "mean"}}, "metric.impute: must be one of latest, best, worst"),
        ({"metric": {**LOSS, "target": "low"}}, "metric.target: must be a number"),
        ({"job": "x"}, "job: is W&B Launch's, which needs its server"),
        ({"metrics": [LOSS, LOSS]}, "metrics: several objectives are not served offline"),
        ({"controller": {"type": "loca"}}, "controller: must be {type: local}"),
        ({"scheduler": {"engine": "optuna"}}, "method: scheduler.engine optuna needs method: custom, not random"),
        ({"scheduler": {"engine": "ax"}}, "scheduler.engine: must be optuna or wandb"),
        ({"scheduler": {"engine": "wandb", "sauce": "x"}}, "scheduler.sauce: unknown key; did you mean source?"),
        ({"scheduler": {"engine": "wandb", "source": "no.py"}}, "scheduler.source: no.py is no file in"),
        ({"kind": "job"}, "kind: must be sweep"),
    ],
)
def test_keys_beside_the_parameters(more: dict[str, Any], says: str) -> None:
    assert says in refusal({"lr": RANGE}, "random", **more)


def test_custom_needs_a_scheduler_and_leaves_early_termination_to_it() -> None:
    assert "scheduler: missing" in refusal({"lr": RANGE}, "custom", metric=LOSS)
    more = {"scheduler": {"engine": "wandb"}, "early_terminate": {"type": "hyperband", "min_iter": 1}}
    assert "early_terminate: does not go with a scheduler" in refusal({"lr": RANGE}, "bayes", metric=LOSS, **more)
    assert "name the Python file that holds f" in refusal(
        {"lr": RANGE}, "custom", metric=LOSS, scheduler={"engine": "optuna", "optimizer": "f"}
    )
    normal = {"lr": {"distribution": "normal"}}
    assert "Optuna does not search normal" in refusal(normal, "custom", metric=LOSS, scheduler={"engine": "optuna"})


def test_numbers_written_as_text_are_found_wherever_a_number_belongs() -> None:
    for tail in ("metric: {name: a, target: 1e-3}", "early_terminate: {type: hyperband, min_iter: 3, eta: 3e0}"):
        Path("sweep.yaml").write_text(f"program: train.py\nmethod: random\nparameters: {{lr: {{value: 1}}}}\n{tail}\n")
        with pytest.raises(UserError, match=r"sweep\.yaml:4: .* is text, not a number, in YAML; write"):
            definition.read("sweep.yaml")


@pytest.mark.parametrize(
    ("parameters", "method", "more", "says"),
    [
        ({"seed": {"min": 0, "max": 9}}, "random", {}, "seed is part of what random searches"),
        ({"m": {"parameters": {"data_seed": {"values": [0, 1]}}}}, "bayes", {}, "m.data_seed is part of what bayes"),
        (
            {"lr": {"distribution": "log_uniform", "min": -7, "max": 0}},
            "random",
            {},
            "lr is drawn from 0.000911882 to 1:",
        ),
        (
            {"lr": {"values": [1, 2]}},
            "grid",
            {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2}},
            "early_terminate can stop nothing: of 2 pulls eta 2 lets all go on",
        ),
    ],
)
def test_what_is_seldom_meant_is_remarked(parameters: dict[str, Any], method: str, more: Any, says: str) -> None:
    (line,) = definition.read(write(parameters, method, metric=LOSS, **more)).warnings
    assert says in line


def test_what_is_meant_is_not_remarked() -> None:
    early = {"type": "hyperband", "min_iter": 1, "eta": 2}
    assert not definition.read(write({"seed": {"values": [0, 1, 2]}}, metric=LOSS, early_terminate=early)).warnings
    assert not definition.read(write({"seed": {"value": 0}, "lr": RANGE}, "random")).warnings


# ---- macros

ECHO = "import json, sys; print(json.dumps(sys.argv[1:]))"
PARAMS = {"lr": 0.5, "on": True, "off": False, "m": {"d": 2}}


@pytest.mark.parametrize(
    ("macro", "heard"),
    [
        ("args", ["--lr=0.5", "--on=True", "--off=False", "--m={'d': 2}"]),
        ("args_no_equals", ["--lr", "0.5", "--on", "True", "--off", "False", "--m", "{'d': 2}"]),
        ("args_no_hyphens", ["lr=0.5", "on=True", "off=False", "m={'d': 2}"]),
        ("args_no_boolean_flags", ["--lr=0.5", "--on", "--m={'d': 2}"]),
        ("args_json", [json.dumps(PARAMS)]),
        ("args_json_file", ["params.json"]),
        ("args_append_hydra", ["+lr=0.5", "+on=True", "+off=False", "+m={'d': 2}"]),
        ("args_override_hydra", ["++lr=0.5", "++on=True", "++off=False", "++m={'d': 2}"]),
    ],
)
def test_program_hears_what_a_macro_says(room: Path, macro: str, heard: list[str]) -> None:
    """Through /usr/bin/env and the interpreter's macro, with a word out of the environment in the middle of another."""
    Path("echo.py").write_text(ECHO)
    command = ["${env}", "HOUSE=1", "${interpreter}", "${program}", "at-${envvar:HOUSE}", "${" + macro + "}", 7]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ["HOUSE"] = "casino"
    try:
        argv = tracking.sweep_argv(command, "echo.py", PARAMS, Path("params.json"))
    finally:
        del os.environ["HOUSE"]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True, env={"PATH": path}, cwd=room).stdout
    assert json.loads(printed) == ["at-casino", *heard, "7"]
    if macro == "args_json_file":
        assert json.loads(Path("params.json").read_text()) == PARAMS
