"""What is wrong with a sweep definition, said before anything is paid for: one line that names the file and the key.

W&B only warns of what breaks its schema, and serves some of it as something else than was meant. Here whatever cannot
be meant is refused; what may be meant but seldom is comes back as a remark. Where W&B's engine is installed its own
schema has the last word.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from console import UserError
from gacha import engine
from gacha.space import check_parameters, check_space, distribution, is_number, leaves, meant

TEXTS = ("name", "project", "entity", "description", "program", "apiVersion", "kind")
SERVED = (
    *(*TEXTS, "command", "method", "metric", "parameters", "run_cap"),
    *("early_terminate", "scheduler", "controller"),
)
NOT_SERVED = {
    "job": "is W&B Launch's, which needs its server",
    "image_uri": "is W&B Launch's, which needs its server",
    "metrics": "several objectives are not served offline; name one under metric",
}
METHODS = ("grid", "random", "bayes", "custom")
METRIC = ("name", "goal", "target", "impute", "impute_while_running")
IMPUTE = ("latest", "best", "worst")
EARLY = ("type", "min_iter", "max_iter", "s", "eta", "strict")
SCHEDULER = ("engine", "source", "optimizer", "search_space")
MACROS = (
    *("env", "interpreter", "program", "args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags"),
    *("args_json", "args_json_file", "args_append_hydra", "args_override_hydra"),
)


def wrong(path: str, key: str, message: str) -> UserError:
    return UserError(f"{path}: {key}: {message}")


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# ---- the text


def check_written(path: str, node: yaml.Node | None, key: str = "") -> None:
    """Raise on what only the text shows: a key given twice, and a number that YAML 1.1 reads as text."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for name, child in node.value:
            inner = f"{key}.{name.value}".lstrip(".")
            if name.value in seen and name.value != "<<":
                raise UserError(f"{path}:{name.start_mark.line + 1}: {inner}: given twice; keep one")
            seen.add(name.value)
            check_written(path, child, inner)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            check_written(path, child, key)
    elif isinstance(node, yaml.ScalarNode) and node.style is None and node.tag == "tag:yaml.org,2002:str":
        # In quotes it is text on purpose.
        number = as_number(node.value)
        if number and key.startswith(("parameters.", "early_terminate.", "metric.target")):
            line = node.start_mark.line + 1
            raise UserError(f"{path}:{line}: {key}: {node.value} is text, not a number, in YAML; write {number}")


def as_number(text: str) -> str | None:
    """How YAML 1.1 wants the number that `text` looks like, e.g. 1.0e-3 for 1e-3; None if it is no number."""
    parts = re.fullmatch(r"([+-]?)(\d*)\.?(\d*)(?:[eE]([+-]?)(\d+))?", text)
    if not parts or not (parts[2] or parts[3]):
        return None
    sign, whole, fraction, exponent_sign, exponent = parts.groups(default="")
    whole = sign + (whole.lstrip("0") or "0")
    if not (fraction or exponent):
        return whole
    return f"{whole}.{fraction or '0'}" + (f"e{exponent_sign or '+'}{exponent}" if exponent else "")


# ---- the definition


def check(path: str, definition: dict[str, Any]) -> list[str]:
    """Remarks on what may be meant but seldom is. Raises UserError on the first key that is wrong or not served."""
    for key in definition:
        if key in NOT_SERVED:
            raise wrong(path, key, NOT_SERVED[key])
        if key not in SERVED:
            raise wrong(path, str(key), f"unknown key; {meant(key, SERVED)}")
    for key in TEXTS:
        if key in definition and not isinstance(definition[key], str):
            raise wrong(path, key, f"must be text, not {definition[key]!r}")
    method = definition.get("method")
    if method is None:
        raise wrong(path, "method", "missing; write method: grid")
    if method not in METHODS:
        raise wrong(path, "method", f"unknown method {method!r}; {meant(method, METHODS)}")
    if definition.get("kind", "sweep") != "sweep":
        raise wrong(path, "kind", f"must be sweep, not {definition['kind']!r}")
    check_command(path, definition)
    if "metric" in definition:
        check_metric(path, definition["metric"])
    if "run_cap" in definition and not is_count(definition["run_cap"]):
        raise wrong(path, "run_cap", f"must be a whole number of runs, 1 or more, not {definition['run_cap']!r}")
    check_scheduler(path, definition)
    needs = "early_terminate" if "early_terminate" in definition else method if method in ("bayes", "custom") else None
    if needs and "metric" not in definition:
        raise wrong(path, "metric", f"missing, and {needs} goes by it; write what the runs log, e.g. name: val/loss")
    if "parameters" not in definition:
        if "search_space" not in definition.get("scheduler", {}):
            raise wrong(path, "parameters", "missing; name what to vary, e.g. seed: {values: [0, 1, 2]}")
        remarks: list[str] = []
    else:
        check_parameters(path, "parameters", definition["parameters"])
        remarks = check_space(path, definition)
    if method in ("bayes", "custom"):
        remarks += check_engine(path, definition)
    if "early_terminate" in definition:
        check_early(path, definition["early_terminate"])
    check_schema(path, definition)
    return remarks


def check_command(path: str, definition: dict[str, Any]) -> None:
    """Raise UserError on a command that cannot run: an unknown macro, a program that is not there."""
    command = definition.get("command", ["${program}"])
    if not isinstance(command, list) or not command or not all(isinstance(word, str | int | float) for word in command):
        raise UserError(f"{path}: command: must be a list of words, e.g. ['${{env}}', '${{program}}', '${{args}}']")
    for word in map(str, command):
        if word.startswith("${") and word.endswith("}") and word[2:-1] not in MACROS and "envvar:" not in word:
            # The real agent drops it without a word.
            raise UserError(f"{path}: command: unknown macro {word}; {meant(word[2:-1], MACROS)}")
    if "${program}" not in command:
        return
    if "program" not in definition:
        raise UserError(f"{path}: program: missing; name the training script, e.g. program: train.py")
    if not Path(definition["program"]).is_file():
        raise UserError(
            f"{path}: program: {definition['program']} is no file in {Path.cwd()}; start from the folder that holds it"
        )


def check_metric(path: str, metric: object) -> None:
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise wrong(path, "metric", "needs a name, e.g. metric: {name: val/bpb, goal: minimize}")
    for key in metric:
        if key not in METRIC:
            raise wrong(path, f"metric.{key}", f"unknown key; {meant(key, METRIC)}")
    if metric.get("goal", "minimize") not in ("minimize", "maximize"):
        # W&B takes any other word for minimize.
        raise wrong(path, "metric.goal", f"must be minimize or maximize, not {metric['goal']!r}")
    if not is_number(metric.get("target", 0)):
        raise wrong(path, "metric.target", f"must be a number, not {metric['target']!r}")
    for key, known in (("impute", IMPUTE), ("impute_while_running", (*IMPUTE, "false"))):
        if metric.get(key, "worst") not in known:
            said = f'"{known[-1]}" in quotes' if metric[key] is False else "one of " + ", ".join(known)
            raise wrong(path, f"metric.{key}", f"must be {said}, not {metric[key]!r}")


def check_early(path: str, early: object) -> None:
    """Raise UserError on an `early_terminate` that W&B's engine would stumble over at the first look."""

    def bad(key: str, message: str) -> UserError:
        return wrong(path, f"early_terminate.{key}".rstrip("."), message)

    if not isinstance(early, dict):
        raise bad("", "must be a mapping, e.g. {type: hyperband, min_iter: 3}")
    for key in early:
        if key not in EARLY:
            raise bad(key, f"unknown key; {meant(key, EARLY)}")
    if early.get("type") != "hyperband":
        raise bad("type", f"must be hyperband, not {early.get('type')!r}")
    if not {"min_iter", "max_iter"} & set(early):
        raise bad("", "needs min_iter (logged values before the first cut), or max_iter with s")
    for key in ("min_iter", "max_iter", "s"):
        if key in early and not is_count(early[key]):
            raise bad(key, f"must be a whole number, 1 or more, not {early[key]!r}")
    if "max_iter" in early and "s" not in early:
        raise bad("s", "missing; with max_iter it says how many cuts to make")
    eta = early.get("eta", 3)
    if not is_number(eta) or eta <= 1:
        raise bad("eta", f"must be a number above 1, not {eta!r}")
    if not isinstance(early.get("strict", True), bool):
        raise bad("strict", f"must be true or false, not {early['strict']!r}")
    if "max_iter" in early and early["max_iter"] / eta < 1:
        raise bad("max_iter", f"{early['max_iter']} / eta {eta} is below one logged value: there is no cut to make")


def never_stops(early: dict[str, Any], most: int | None) -> list[str]:
    """A remark if no pull out of `most` (None: any number) can be stopped, whatever they log."""
    eta = early.get("eta", 3)
    if most is None or int(1.0 / eta * most) < most - 1:
        return []
    return [f"early_terminate can stop nothing: of {most} pulls eta {eta} lets all go on"]


def check_scheduler(path: str, definition: dict[str, Any]) -> None:
    """Raise UserError on a scheduler or controller that is not served, or contradicts the rest."""
    controller = definition.get("controller", {"type": "cloud"})
    if not isinstance(controller, dict) or controller.get("type") not in ("local", "cloud"):
        raise wrong(path, "controller", "must be {type: local} or {type: cloud}; offline they are the same")
    method, scheduler = definition["method"], definition.get("scheduler")
    if scheduler is None:
        if method == "custom":
            raise wrong(path, "scheduler", "missing; method: custom needs one, e.g. scheduler: {engine: optuna}")
        return
    if not isinstance(scheduler, dict):
        raise wrong(path, "scheduler", "must be a mapping, e.g. {engine: optuna}")
    for key, value in scheduler.items():
        if key not in SCHEDULER:
            raise wrong(path, f"scheduler.{key}", f"unknown key; {meant(key, SCHEDULER)}")
        if not isinstance(value, str):
            raise wrong(path, f"scheduler.{key}", f"must be text, not {value!r}")
    name = scheduler.get("engine")
    if name not in ("optuna", "wandb"):
        raise wrong(path, "scheduler.engine", f"must be optuna or wandb, not {name!r}")
    if (name == "wandb") == (method == "custom"):
        methods = "grid, random or bayes" if name == "wandb" else "custom"
        raise wrong(path, "method", f"scheduler.engine {name} needs method: {methods}, not {method}")
    if "early_terminate" in definition:
        raise wrong(path, "early_terminate", "does not go with a scheduler, which stops runs itself; leave one out")
    if controller["type"] == "local" and "controller" in definition:
        raise wrong(path, "controller", "type local does not go with a scheduler; leave controller out")
    named = [key for key in ("optimizer", "search_space") if key in scheduler]
    if named and name == "wandb":
        raise wrong(path, f"scheduler.{named[0]}", "is the optuna engine's; the wandb engine has none")
    if named and "source" not in scheduler:
        raise wrong(path, "scheduler.source", f"missing; name the Python file that holds {scheduler[named[0]]}")
    if "source" in scheduler and not Path(scheduler["source"]).is_file():
        raise wrong(path, "scheduler.source", f"{scheduler['source']} is no file in {Path.cwd()}")


# ---- engines


def check_engine(path: str, definition: dict[str, Any]) -> list[str]:
    """Remarks on the engine that is there. Raises UserError if none is that can search this space."""
    method, parameters = definition["method"], definition.get("parameters", {})
    nested = any("parameters" in spec for spec in parameters.values())
    found = engine.choose(path, method, nested)
    if found == "sweeps":
        return []
    remarks = [] if method == "custom" else [f"Optuna's TPE searches: for W&B's own engine, {engine.INSTALL_SWEEPS}"]
    if "optimizer" in definition.get("scheduler", {}):
        remarks.append("scheduler.optimizer: a pruner of its study is not asked, runs go to their end")
    for names, spec in leaves(parameters):
        kind = distribution(spec)
        if kind not in engine.OF_OPTUNA:
            mend = "" if method == "custom" else f"; {engine.INSTALL_SWEEPS} brings W&B's, which does"
            raise UserError(f"{path}: parameters: {'.'.join(names)}: Optuna does not search {kind}{mend}")
        if kind == "q_log_uniform_values" and (spec.get("q", 1) != 1 or spec["min"] < 1):
            remarks.append(f"{'.'.join(names)}: Optuna leaves q out on a logarithmic scale")
    return remarks


def check_schema(path: str, definition: dict[str, Any]) -> None:
    """Raise UserError on what W&B's own engine finds, where it is installed."""
    if not engine.version("sweeps").startswith("0.3."):
        return
    with engine.quiet():
        try:
            found = engine.sweeps().schema_violations_from_proposed_config(definition)
        except ImportError:
            return  # it lacks what it needs; the lint above stands alone
    for message in found:
        if "base-e exponents" not in message:  # a remark of ours
            raise UserError(f"{path}: W&B's schema: {message}")
