"""A W&B sweep definition: read, linted before anything is paid for, and unfolded into its grid.

Order of the grid, which decides what `run_cap` leaves in, is that of W&B's engine (package `sweeps` 0.3.0,
grid_search.py and params.py): parameters sorted by name, nested ones in the place of their parent, the last name
varying fastest, values in the order written. So `lr` [a, b] and `seed` [0, 1] give a0 a1 b0 b1, in whatever order the
file lists them. Values that are equal count once (3.0 equals 3; the spelling written last is used): five times the
same learning rate is one run, five pulls need a `seed`.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from console import UserError
from gacha import lint, space


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
    """Parameters of each run, in the order in which they are served, cut at `run_cap`; empty if not `listed`."""
    listed: bool = True
    """Whether `points` holds them all. If not, gacha.search proposes one after the other."""
    sampler_seed: int = 0
    """Of random and Bayesian search."""
    warnings: tuple[str, ...] = ()
    """Remarks of the lint, a line each."""


def read(path: str, sampler_seed: int = 0) -> Sweep:
    """The sweep in `path`. Raises UserError, one line naming file and key, on whatever is wrong with it."""
    if sampler_seed < 0:
        raise UserError(f"--sampler_seed {sampler_seed}: must be 0 or more")
    try:
        text = Path(path).read_text(encoding="utf-8")
        definition = yaml.safe_load(text)
        lint.check_written(path, yaml.compose(text, Loader=yaml.SafeLoader))
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
    warnings = lint.check(path, definition)
    method, cap = definition["method"], definition.get("run_cap")
    # A larger run_cap or another description is the same sweep with more of it wanted: finished runs stay finished.
    identity = {key: value for key, value in json.loads(content).items() if key not in ("run_cap", "description")}
    if method != "grid":
        identity["sampler_seed"] = sampler_seed
    points, most = [], cap
    if method == "grid":
        size = math.prod(len(values) for _, values in leaves(definition["parameters"]))
        most = min(size, cap or size)
    if method in ("grid", "random") and most and most > space.MOST_POINTS:
        raise UserError(f"{path}: parameters: {most:,} points; set run_cap ({space.MOST_POINTS:,} at most)")
    if method == "grid":
        points = list(itertools.islice(grid(definition["parameters"]), cap))
    elif method == "random":
        from gacha import sampling

        points = [sampling.point(definition["parameters"], sampler_seed, index) for index in range(cap or 0)]
    if "early_terminate" in definition:
        warnings += lint.never_stops(definition["early_terminate"], most)
    sweep_id = short_id(json.dumps(identity, sort_keys=True))
    listed = method == "grid" or (method == "random" and cap is not None)
    return Sweep(path, definition, sweep_id, points, listed, sampler_seed, tuple(warnings))


def short_id(text: str) -> str:
    """8 characters [a-z0-9], the form of W&B's own ids, out of a hash of `text`."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    return "".join("0123456789abcdefghijklmnopqrstuvwxyz"[number // 36**i % 36] for i in range(8))


# ---- points


def leaves(parameters: dict[str, Any]) -> list[tuple[tuple[str, ...], list[Any]]]:
    """(path of names, distinct values) of every parameter, in the engine's order (see the head of this file)."""
    # A dict keeps the first place and the last spelling, as the engine's table of hashes does.
    found = space.leaves(parameters)
    return [(names, list({same(value): value for value in listed(spec)}.values())) for names, spec in found]


def listed(spec: dict[str, Any]) -> Sequence[Any]:
    """The values of a parameter that a grid can serve, those of a range as W&B's engine lists them."""
    kind = space.distribution(spec)
    if kind == "int_uniform":
        return range(spec["min"], spec["max"] + 1)
    if kind == "q_uniform":
        import numpy as np

        return np.arange(spec["min"], spec["max"], spec.get("q", 1.0)).tolist()  # without max
    return [spec["value"]] if kind == "constant" else spec["values"]


def same(value: Any) -> str:
    """Text that is equal for values that W&B's engine takes for the same: 3 and 3.0, but not 1, '1' and true."""
    whole = isinstance(value, float) and value.is_integer()
    return yaml.safe_dump(int(value) if whole else value, sort_keys=True)


def grid(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The points of the grid."""
    found = leaves(parameters)
    names = [path for path, _ in found]
    for values in itertools.product(*(values for _, values in found)):
        yield nest(zip(names, values, strict=True))


def nest(values: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """A point of (path of names, value); plain parameters come first and nested ones after, as the engine's do."""
    point: dict[str, Any] = {}
    for names, value in sorted(values, key=lambda leaf: len(leaf[0]) > 1):
        inner = point
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = value
    return point


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
