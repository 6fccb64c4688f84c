"""Early termination against W&B's own engine, on random histories, and the cases in which it is known to do nothing."""

import math
import random
from typing import Any

import pytest

from gacha import engine, hyperband
from gacha.search import STATES, Seen

METRIC = {"name": "val/loss", "goal": "minimize"}


def pulls(histories: list[list[float]], statuses: str = "") -> list[Seen]:
    """Pulls named "0", "1", ...; a letter each of `statuses`: r(unning, the default), f(inished)."""
    names = [{"r": "running", "f": "finished"}[letter] for letter in statuses.ljust(len(histories), "r")]
    return [Seen(str(i), {}, name, h) for i, (h, name) in enumerate(zip(histories, names, strict=True))]


def engines_choice(definition: dict[str, Any], seen: list[Seen]) -> set[str]:
    """What W&B's own engine stops."""
    with engine.quiet():
        sweeps = engine.sweeps()
        name = definition["metric"]["name"]
        runs = [
            sweeps.SweepRun(
                name=pull.run_id,
                state=STATES.get(pull.status, "pending"),
                history=[{name: value, "other": 1} for value in pull.history],
            )
            for pull in seen
        ]
        return {run.name for run in sweeps.stop_runs(definition, runs)}


def random_case(luck: random.Random) -> tuple[dict[str, Any], list[Seen]]:
    rule: dict[str, Any] = {"type": "hyperband"}
    if luck.random() < 0.5:
        rule["min_iter"] = luck.randint(1, 6)
    else:
        rule |= {"max_iter": luck.randint(5, 40), "s": luck.randint(1, 4)}
    if luck.random() < 0.7:
        rule["eta"] = luck.choice([2, 3, 4, 1.5, 2.5, 1.1])
    if luck.random() < 0.6:
        rule["strict"] = luck.random() < 0.5
    definition = {"early_terminate": rule, "metric": {"name": "val/loss"}}
    if luck.random() < 0.6:
        definition["metric"]["goal"] = luck.choice(["minimize", "maximize"])
    seen = []
    for number in range(luck.randint(1, 12)):
        # Few levels, so that ties are common.
        history = [luck.choice([float(luck.randint(0, 6)), luck.gauss(3, 2)]) for _ in range(luck.randint(0, 30))]
        for place in range(len(history)):
            if luck.random() < 0.05:
                history[place] = luck.choice([math.nan, math.inf, -math.inf])
        status = luck.choice(["running"] * 5 + ["finished", "stopped", "failed", "diverged", "interrupted", "waiting"])
        seen.append(Seen(f"run{number}", {}, status, history))
    return definition, seen


def agree(cases: int, seed: int) -> tuple[int, int]:
    """How many pulls were running and how many stopped, over random cases in which ours must be the engine's set."""
    luck, running, stopped = random.Random(seed), 0, 0
    for number in range(cases):
        definition, seen = random_case(luck)
        bands = list(hyperband.bands(definition["early_terminate"]))
        if not bands:
            continue  # the lint refuses it, the engine raises
        ours = hyperband.to_stop(definition, seen)
        assert ours == engines_choice(definition, seen), (seed, number, definition, seen)
        running += sum(pull.status == "running" for pull in seen)
        stopped += len(ours)
    return running, stopped


def test_stops_whom_wandbs_engine_stops() -> None:
    running, stopped = agree(cases=250, seed=0)
    assert 0.1 < stopped / running < 0.9, "the cases decide nothing"


@pytest.mark.parametrize(
    ("rule", "bands"),
    [
        ({"min_iter": 3}, [3, 9, 27, 81]),
        ({"min_iter": 3, "eta": 1.5}, [3, 4, 6, 10]),
        ({"max_iter": 27, "s": 2}, [3, 9]),
        ({"max_iter": 27, "s": 9, "eta": 2}, [1, 3, 6, 13]),
        ({"max_iter": 27, "s": 2, "min_iter": 4}, [3, 9]),  # as the engine: max_iter has the word
    ],
)
def test_bands(rule: dict[str, Any], bands: list[int]) -> None:
    assert [band for band, _ in zip(hyperband.bands(rule), range(4), strict=False)] == bands


def test_bands_count_logged_values_and_nan_is_none() -> None:
    rule = {"metric": METRIC, "early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2}}
    assert hyperband.to_stop(rule, pulls([[5, 1], [5, 2], [5, 3]])) == {"2"}
    assert hyperband.to_stop(rule, pulls([[5, 1], [5, 2], [5]])) == set()
    assert hyperband.to_stop(rule, pulls([[5, 1], [5, 2], [5, math.nan, math.nan]])) == set()
    assert hyperband.to_stop(rule, pulls([[5, 1], [5, 2], [math.nan, 5, math.nan, 3]])) == {"2"}


def test_strict_looks_at_the_band_and_lenient_at_the_best_so_far() -> None:
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    seen = pulls([[9, 1], [9, 2], [1, 3]])
    assert hyperband.to_stop({"metric": METRIC, "early_terminate": rule}, seen) == {"2"}
    assert hyperband.to_stop({"metric": METRIC, "early_terminate": {**rule, "strict": False}}, seen) == set()


def test_finished_pulls_are_compared_with_and_left_alone() -> None:
    rule = {"metric": METRIC, "early_terminate": {"type": "hyperband", "min_iter": 1}}
    assert hyperband.to_stop(rule, pulls([[1], [2], [9], [8]], "fffr")) == {"3"}


def test_without_the_key_nothing_stops() -> None:
    assert hyperband.to_stop({"metric": METRIC}, pulls([[1], [2], [3], [4]])) == set()
    assert hyperband.to_stop({}, []) == set()
