"""The next pull of a sweep: out of its list, drawn at random, or proposed by an engine from the pulls so far.

A proposal is a function of the definition, the sampler's seed and the pulls that are shown: the same results in the
same order give the same point, whoever asks. Nothing is kept between calls.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import tracking
from console import UserError
from gacha import engine, space
from gacha.definition import Sweep, nest


class Seen(NamedTuple):
    """A pull as the search sees it."""

    run_id: str
    params: dict[str, Any]
    status: str
    """finished, diverged, failed, interrupted, running, waiting or stopped."""
    history: list[float]
    """The logged values of the sweep's metric, in order; may hold NaN."""


# A diverged run left with an exit code, which W&B calls failed; what is to run again is on its way.
STATES = {"finished": "finished", "diverged": "failed", "failed": "failed", "stopped": "killed", "running": "running"}


def ready(sweep: Sweep) -> None:
    """Import what proposals need, seconds that no lock should wait for. Raises UserError if it cannot be imported."""
    if sweep.listed or sweep.definition["method"] == "random":
        return
    propose(sweep, [])


def reached(sweep: Sweep, seen: Sequence[Seen]) -> Seen | None:
    """The first pull that has logged `metric.target` or better: W&B starts no new one then; running ones go on."""
    metric = sweep.definition.get("metric", {})
    if "target" not in metric:
        return None
    sign = -1 if metric.get("goal") == "maximize" else 1
    return next((pull for pull in seen if any(sign * value <= sign * metric["target"] for value in pull.history)), None)


def propose(sweep: Sweep, seen: Sequence[Seen]) -> dict[str, Any] | None:
    """Parameters of pull number len(seen), `seen` being all pulls before it in their order; None: there is none.

    None where the list or the space is exhausted, `run_cap` is reached or a pull has reached `metric.target`.
    """
    given, number = sweep.definition, len(seen)
    if reached(sweep, seen) or number >= given.get("run_cap", math.inf):
        return None
    if sweep.listed:
        return sweep.points[number] if number < len(sweep.points) else None
    if given["method"] == "random":
        from gacha import sampling

        return sampling.point(given["parameters"], sweep.sampler_seed, number)
    nested = any("parameters" in spec for spec in given.get("parameters", {}).values())
    if engine.choose(sweep.path, given["method"], nested) == "sweeps":
        return by_sweeps(sweep, seen)
    return by_optuna(sweep, seen)


def by_sweeps(sweep: Sweep, seen: Sequence[Seen]) -> dict[str, Any]:
    """A point by W&B's own engine: a Gaussian process and expected improvement (sweeps 0.3.0, bayes_search.py)."""
    # It draws from numpy's global generator, which is put back as it was.
    before = np.random.get_state()
    with engine.quiet():
        try:
            sweeps = engine.sweeps()
        except ImportError as error:
            raise UserError(
                f"{sweep.path}: method: W&B's engine cannot be imported ({error}); it needs pip install "
                "scipy scikit-learn jsonschema jsonref pydantic"
            ) from None
        name = sweep.definition["metric"]["name"]
        runs = [
            sweeps.SweepRun(
                name=pull.run_id,
                config=tracking.wrapped(pull.params),
                state=sweeps.RunState(STATES.get(pull.status, "pending")),
                history=[{name: value} for value in told(pull.history)],
            )
            for pull in seen
        ]
        try:
            np.random.seed(seed(sweep, seen))
            # As it came: its own validation drops nested parameters.
            proposed = sweeps.next_run(sweep.definition, runs)
        finally:
            np.random.set_state(before)
    return {key: plain(param["value"]) for key, param in proposed.config.items()}


def told(history: Sequence[float]) -> list[float]:
    """The lowest, the highest and the last finite value: all that the engine looks at, without the way between."""
    finite = [value for value in history if math.isfinite(value)]
    return [min(finite), max(finite), finite[-1]] if finite else []


def plain(value: Any) -> Any:
    """`value` with numpy's scalars as Python's, which JSON and YAML can write."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def seed(sweep: Sweep, seen: Sequence[Seen]) -> int:
    """32 bits that differ from proposal to proposal: agents at work on the same results get different points."""
    return int(np.random.SeedSequence([sweep.sampler_seed, len(seen)]).generate_state(1)[0])


# ---- Optuna, through wandb's own scheduler


def by_optuna(sweep: Sweep, seen: Sequence[Seen]) -> dict[str, Any] | None:
    """A point by Optuna: TPE, or the study and the space that the user's `scheduler.source` makes; None: exhausted."""
    import wandb  # noqa: F401  at its first import it takes hold of stdout and stderr: not of what `quiet` puts there

    scheduler = sweep.definition.get("scheduler", {})
    parameters = {} if "search_space" in scheduler else sweep.definition["parameters"]
    # wandb's scheduler knows no nesting, and a name of W&B's holds no slash.
    leaves = {"/".join(names): (names, spec) for names, spec in space.leaves(parameters)}
    flat = {**sweep.definition, "parameters": {key: spec for key, (_, spec) in leaves.items()}}
    try:
        with engine.quiet():
            optimizer = tracking.optuna_scheduler(sweep.sweep_id, flat)
            theirs = "optimizer" in scheduler
            if any(trial.state.name != "WAITING" for trial in optimizer.study.trials):
                raise ValueError(
                    "its study keeps trials of its own; leave its storage out, every run is told to it anew"
                )
            if not theirs:
                import optuna

                # A point that runs counts as a bad one until it is known: agents at work at once keep apart.
                optimizer.study.sampler = optuna.samplers.TPESampler(seed=seed(sweep, seen), constant_liar=True)
            for pull in seen:
                params = {
                    key: functools.reduce(operator.getitem, names, pull.params) for key, (names, _) in leaves.items()
                }
                tell(optimizer, pull, params or pull.params, sweep.definition["metric"]["name"], again=theirs)
            proposed = [] if optimizer.should_terminate_sweep() else optimizer.ask_n_runs(1)
    except Exception as error:
        if "source" not in scheduler:
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split()).removeprefix("Error: ")  # wandb's own
        raise UserError(f"{sweep.path}: scheduler: {scheduler['source']}: {said}") from None
    if not proposed:
        return None
    values = proposed[0].config.flat_dict()
    point = nest((leaves[key][0] if key in leaves else (key,), plain(value)) for key, value in values.items())
    # A sampler of a list, all of which runs, begins at the list's head again.
    of_a_list = hasattr(optimizer.study.sampler, "is_exhausted")
    return None if of_a_list and any(pull.params == point for pull in seen) else point


def tell(optimizer: Any, pull: Seen, params: dict[str, Any], metric: str, again: bool) -> None:
    """Tell a new optimizer of a pull. `again`: first ask as it was asked then, so that a sampler moves on as it did.

    A study of the user's may have a seed of its own, or a list of points to go through: it would begin anew each time.
    """
    state, value = STATES.get(pull.status, "pending"), pull.history[-1] if pull.history else math.nan
    if state == "finished" and not math.isfinite(value):
        state = "failed"
    run = tracking.scheduler_run(params, state, {metric: value})
    asked = optimizer.ask_n_runs(1) if again else []
    if asked and asked[0].config.flat_dict() == params:
        optimizer.tell_run(asked[0].run_id, run)
        return
    for other in asked:
        optimizer.forget_run(other.run_id)
    if run.state.is_alive:
        optimizer.tell_existing_active_run(run)
    else:
        optimizer.tell_existing_finished_run(run)
