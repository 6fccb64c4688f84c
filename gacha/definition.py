"""A W&B sweep definition: read, linted before anything is paid for, and unfolded into its grid.

Order of the grid, which decides what `run_cap` leaves in, is that of W&B's engine (package `sweeps` 0.3.0,
grid_search.py and params.py): parameters sorted by name, nested ones in the place of their parent, the last name
varying fastest, values in the order written. So `lr` [a, b] and `seed` [0, 1] give a0 a1 b0 b1, in whatever order the
file lists them. Values that are equal count once (3.0 equals 3; the spelling written last is used): five times the
same learning rate is one run, five pulls need a `seed`.
"""

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from console import UserError

TEXTS = ("name", "project", "entity", "description", "program", "apiVersion", "kind")
SERVED = (*TEXTS, "command", "method", "metric", "parameters", "run_cap")
NOT_SERVED = ("early_terminate", "controller", "scheduler", "metrics", "job", "image_uri")
METRIC = ("name", "goal", "target", "impute", "impute_while_running")
MACROS = (
    *("env", "interpreter", "program", "args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags"),
    *("args_json", "args_json_file", "args_append_hydra", "args_override_hydra"),
)
RANGES = ("min", "max", "mu", "sigma", "q", "a", "b", "probabilities")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")  # the schema's pattern for parameter names
MOST_POINTS = 100_000  # nobody means a larger grid; far below what would fill the memory


@dataclass(frozen=True)
class Sweep:
    """A definition that passed the lint."""

    path: str
    """The file, as the user named it."""
    definition: dict[str, Any]
    """The YAML, unmodified."""
    sweep_id: str
    """8 characters out of the content: the same definition is the same sweep, wherever the file lies."""
    points: list[dict[str, Any]]
    """Parameters of each run, in the order in which they are served, cut at `run_cap`."""


def read(path: str) -> Sweep:
    """The sweep in `path`. Raises UserError, one line naming file and key, on whatever is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        definition = yaml.safe_load(text)
        check_written(path, yaml.compose(text, Loader=yaml.SafeLoader))
        content = json.dumps(definition)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a sweep definition") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    except (TypeError, ValueError, RecursionError) as error:
        # W&B hands parameters over as JSON; a date, a set or a file that contains itself has none.
        raise UserError(f"{path}: holds a value that JSON cannot ({error}); put dates in quotes") from None
    if not isinstance(definition, dict):
        raise UserError(f"{path}: not a mapping; a sweep definition has keys such as program, method, parameters")
    check(path, definition)
    size = math.prod(len(values) for _, values in leaves(definition["parameters"]))
    cap = definition.get("run_cap")
    if min(size, cap or size) > MOST_POINTS:
        raise UserError(f"{path}: parameters: a grid of {size:,} points; set run_cap ({MOST_POINTS:,} at most)")
    # A larger run_cap or another description is the same sweep with more of it wanted: finished runs stay finished.
    identity = {key: value for key, value in json.loads(content).items() if key not in ("run_cap", "description")}
    sweep_id = short_id(json.dumps(identity, sort_keys=True))
    return Sweep(path, definition, sweep_id, list(itertools.islice(grid(definition["parameters"]), cap)))


def short_id(text: str) -> str:
    """8 characters [a-z0-9], the form of W&B's own ids, out of a hash of `text`."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    return "".join("0123456789abcdefghijklmnopqrstuvwxyz"[number // 36**i % 36] for i in range(8))


# ---- lint: what W&B would only warn of, or serve as something else than was meant


def meant(word: object, known: tuple[str, ...]) -> str:
    """The end of a message about the unknown `word`: the nearest known word, or all of them."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


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
        if number and key.startswith("parameters."):
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


def check(path: str, definition: dict[str, Any]) -> None:
    """Raise UserError on the first key that W&B would refuse or that is not served offline."""

    def wrong(key: str, message: str) -> UserError:
        return UserError(f"{path}: {key}: {message}")

    for key in definition:
        if key in NOT_SERVED:
            raise wrong(key, "not served offline yet; served: " + ", ".join(SERVED))
        if key not in SERVED:
            raise wrong(key, f"unknown key; {meant(key, SERVED)}")
    for key in TEXTS:
        if key in definition and not isinstance(definition[key], str):
            raise wrong(key, f"must be text, not {definition[key]!r}")
    method = definition.get("method")
    if method is None:
        raise wrong("method", "missing; write method: grid")
    if method in ("random", "bayes", "custom"):
        raise wrong("method", f"{method} is not served offline yet; served: grid")
    if method != "grid":
        raise wrong("method", f"unknown method {method!r}; write method: grid")
    check_command(path, definition)
    metric = definition.get("metric")
    if "metric" in definition:
        if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
            raise wrong("metric", "needs a name, e.g. metric: {name: val/bpb, goal: minimize}")
        for key in metric:
            if key not in METRIC:
                raise wrong(f"metric.{key}", f"unknown key; {meant(key, METRIC)}")
        if metric.get("goal", "minimize") not in ("minimize", "maximize"):
            raise wrong("metric.goal", f"must be minimize or maximize, not {metric['goal']!r}")
    cap = definition.get("run_cap", 1)
    if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
        raise wrong("run_cap", f"must be a whole number of runs, 1 or more, not {cap!r}")
    if "parameters" not in definition:
        raise wrong("parameters", "missing; name what to vary, e.g. seed: {values: [0, 1, 2]}")
    check_parameters(path, "parameters", definition["parameters"])


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


def check_parameters(path: str, where: str, parameters: object) -> None:
    """Raise UserError on the first parameter that a grid cannot serve; nested `parameters:` are looked into."""
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(f"{path}: {where}: must be a mapping of parameters, e.g. seed: {{values: [0, 1, 2]}}")
    for name, spec in parameters.items():
        key = f"{path}: {where}.{name}"
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(f"{key}: not a name that W&B takes (letters, digits, _ . -, not a digit first)")
        if not isinstance(spec, dict):
            kind = "values" if isinstance(spec, list) else "value"
            raise UserError(f"{key}: must be a mapping; write {name}: {{{kind}: {spec}}}")
        given = [form for form in ("value", "values", "parameters") if form in spec]
        ranged = [word for word in spec if word in RANGES]
        if ranged or spec.get("distribution", "constant") not in ("constant", "categorical"):
            word = ranged[0] if ranged else "distribution"
            raise UserError(f"{key}: {word}: ranges and distributions are not served offline yet; list the values")
        for word in spec:
            if word not in ("value", "values", "parameters", "distribution"):
                raise UserError(f"{key}: unknown attribute {word}; {meant(word, ('value', 'values', 'parameters'))}")
        if len(given) != 1:
            found = f"both {' and '.join(given)}" if given else "no value"
            raise UserError(f"{key}: has {found}; give it one of value, values, parameters")
        if spec.get("distribution") not in (None, {"value": "constant", "values": "categorical"}.get(given[0])):
            raise UserError(f"{key}: distribution: {spec['distribution']} does not go with {given[0]}; leave it out")
        if given == ["parameters"]:
            check_parameters(path, f"{where}.{name}.parameters", spec["parameters"])
        elif given == ["values"] and (not isinstance(spec["values"], list) or not spec["values"]):
            raise UserError(f"{key}: values: must be a list of at least one value")


# ---- grid


def leaves(parameters: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], list[Any]]]:
    """(path of names, distinct values) of every parameter, in the engine's order (see the head of this file)."""
    found = []
    for name, spec in sorted(parameters.items()):
        if "parameters" in spec:
            found += leaves(spec["parameters"], (*above, name))
        else:
            # A dict keeps the first place and the last spelling, as the engine's table of hashes does.
            values = [spec["value"]] if "value" in spec else spec["values"]
            found.append(((*above, name), list({same(value): value for value in values}.values())))
    return found


def same(value: Any) -> str:
    """Text that is equal for values that W&B's engine takes for the same: 3 and 3.0, but not 1, '1' and true."""
    whole = isinstance(value, float) and value.is_integer()
    return yaml.safe_dump(int(value) if whole else value, sort_keys=True)


def grid(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The points of the grid; within a point plain parameters come first and nested ones after, as the engine's do."""
    found = leaves(parameters)
    for values in itertools.product(*(values for _, values in found)):
        point: dict[str, Any] = {}
        for (names, _), value in sorted(zip(found, values, strict=True), key=lambda leaf: len(leaf[0][0]) > 1):
            inner = point
            for name in names[:-1]:
                inner = inner.setdefault(name, {})
            inner[names[-1]] = value
        yield point


def flat(params: dict[str, Any], above: str = "") -> dict[str, Any]:
    """`params` with nested names joined by dots, for tables and comparison."""
    rows: dict[str, Any] = {}
    for name, value in params.items():
        rows |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return rows


def covering(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few of `points` in which every value of every parameter occurs: what a dry run has to try."""
    pairs = [{(name, same(value)) for name, value in flat(point).items()} for point in points]
    wanted = {pair for point in pairs for pair in point}
    for name in {name for name, _ in wanted}:
        numbers = {int(value.split()[0]) for other, value in wanted if other == name and re.match(r"-?\d+\n", value)}
        if len(numbers) > 16:
            # A long run of seeds: its ends speak for the rest.
            wanted -= {(name, same(number)) for number in numbers - {min(numbers), max(numbers)}}
    chosen = []
    while wanted:
        best = max(range(len(points)), key=lambda index: len(pairs[index] & wanted))
        chosen.append(points[best])
        wanted -= pairs[best]
    return chosen
