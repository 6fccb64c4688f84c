"""Which pulls a command line asks for: lists of values, a number of seeds, or a file with one pull a line."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from console import UserError

# Pulls that are trained together may differ in these alone: all else is the shape of their common arithmetic.
OF_A_PULL = {"seed": int, "init_seed": int, "data_seed": int, "sample_seed": int, "lr": float, "weight_decay": float}
# What else a line of --each may say: the W&B run, its file of sweep parameters, a file for a copy of the log.
EXTRA = ("run_id", "sweep_params", "log")

C = TypeVar("C")


def lists(argv: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """`argv` with the first value of every list in it, and the lists: `--lr 1e-3,3e-3`, `--seed 0..15`.

    Raises UserError for an element that is no number and for one that comes twice.
    """
    plain, found = list(argv), dict[str, list[Any]]()
    for place, word in enumerate(argv):
        flag, equals, text = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in OF_A_PULL:
            continue
        if not equals:
            text = argv[place + 1] if place + 1 < len(argv) else ""
        if "," not in text and ".." not in text:
            continue
        values = [value for piece in text.split(",") for value in _values(name, piece.strip())]
        if len(set(values)) < len(values):
            raise UserError(f"--{name} {text}: a value comes twice, and the same pull twice is one")
        found[name] = values
        plain[place if equals else place + 1] = f"{flag}={values[0]}" if equals else str(values[0])
    return plain, found


def _values(name: str, piece: str) -> list[Any]:
    """`3` as [3]; for whole numbers `0..3` as [0, 1, 2, 3]."""
    kind = OF_A_PULL[name]
    first, dots, last = piece.partition("..")
    try:
        if not dots:
            return [kind(piece)]
        if kind is int and int(first) <= int(last):
            return list(range(int(first), int(last) + 1))
    except ValueError:
        pass
    form = "whole numbers as 0,1,2 or 0..15" if kind is int else "numbers as 1e-3,3e-3"
    raise UserError(f"--{name}: {piece!r} in the list: give {form}")


def asked(config: C, found: dict[str, list[Any]], pulls: int, each: str | None) -> list[tuple[C, dict[str, str]]]:
    """The configuration of every pull, with EXTRA where its line has it: the product of the lists, or `each`'s lines.

    `pulls` > 1 stands for that many seeds from the configuration's own. Raises UserError.
    """
    if pulls < 1:
        raise UserError(f"--pulls {pulls}: must be at least 1")
    if pulls > 1 and ("seed" in found or each):
        raise UserError(f"--pulls {pulls} beside {'--each' if each else 'a list of seeds'}: say it one way")
    if each and found:
        raise UserError(f"--each beside a list of --{next(iter(found))}: say it one way")
    if each:
        return [(dataclasses.replace(config, **fields), extra) for fields, extra in _lines(Path(each))]  # type: ignore[type-var]
    if pulls > 1:
        seed = config.seed  # type: ignore[attr-defined]
        found = {"seed": list(range(seed, seed + pulls)), **found}
    points = itertools.product(*found.values())
    return [(dataclasses.replace(config, **dict(zip(found, point, strict=True))), {}) for point in points]  # type: ignore[type-var]


def _lines(path: Path) -> list[tuple[dict[str, Any], dict[str, str]]]:
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--each {path}: cannot be read ({error})") from None
    found = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            fields = {name: kind(line[name]) for name, kind in OF_A_PULL.items() if line.get(name) is not None}
            extra = {name: str(line[name]) for name in EXTRA if line.get(name) is not None}
            unknown = line.keys() - OF_A_PULL.keys() - set(EXTRA)
        except (ValueError, TypeError, AttributeError):
            raise UserError(
                f"{path}, line {number}: must be a JSON object of numbers for {', '.join(OF_A_PULL)}"
            ) from None
        if unknown:
            raise UserError(f"{path}, line {number}: {min(unknown)}: pulls differ in {', '.join(OF_A_PULL)} only")
        found.append((fields, extra))
    if not found:
        raise UserError(f"--each {path}: has no line")
    return found
