"""The space that a sweep searches: its parameters, the distribution of each, and what is wrong with them."""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from console import UserError

FORMS = ("value", "values", "parameters", "min", "max", "distribution")
LIMITS, BELL, SHAPE = ("min", "max"), ("mu", "sigma"), ("a", "b")
ATTRIBUTES = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": LIMITS,
    "uniform": LIMITS,
    "q_uniform": (*LIMITS, "q"),
    "log_uniform": LIMITS,
    "log_uniform_values": LIMITS,
    "q_log_uniform": (*LIMITS, "q"),
    "q_log_uniform_values": (*LIMITS, "q"),
    "inv_log_uniform": LIMITS,
    "inv_log_uniform_values": LIMITS,
    "normal": BELL,
    "q_normal": (*BELL, "q"),
    "log_normal": BELL,
    "q_log_normal": (*BELL, "q"),
    "beta": SHAPE,
    "q_beta": (*SHAPE, "q"),
}
"""What W&B's schema lets each distribution have."""
NEEDED = ("value", "values", "probabilities", *LIMITS)
WORDS = sorted({*FORMS, *(word for words in ATTRIBUTES.values() for word in words)})
OF_A_GRID = ("constant", "categorical", "int_uniform", "q_uniform")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")  # the schema's pattern for parameter names
SEED = re.compile(r"(.*[_.-])?seed")
MOST_POINTS = 100_000  # nobody means a larger grid; far below what would fill the memory
LARGEST_EXPONENT = 709  # e to it is the last one that is a number


def meant(word: object, known: Sequence[str]) -> str:
    """The end of a message about the unknown `word`: the nearest known word, or all of them."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def distribution(spec: dict[str, Any]) -> str:
    """The distribution of a parameter, inferred from what it has where it names none, as W&B does; "" if it cannot."""
    if "distribution" in spec:
        return str(spec["distribution"])
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    if not set(LIMITS) <= set(spec):
        return ""
    return "uniform" if any(isinstance(spec[limit], float) for limit in LIMITS) else "int_uniform"


def of_exponents(kind: str) -> bool:
    """Whether min and max of a distribution are exponents of e; with _values they are those of the value."""
    return "log_uniform" in kind and not kind.endswith("_values")


def leaves(parameters: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(names, attributes) of every parameter: sorted by name, nested ones in the place of their parent."""
    for name, spec in sorted(parameters.items()):
        if "parameters" in spec:
            yield from leaves(spec["parameters"], (*above, name))
        else:
            yield (*above, name), spec


def check_parameters(path: str, where: str, parameters: object) -> None:
    """Raise UserError on the first parameter that means nothing; nested `parameters:` are looked into."""
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(f"{path}: {where}: must be a mapping of parameters, e.g. seed: {{values: [0, 1, 2]}}")
    for name, spec in parameters.items():
        key = f"{path}: {where}.{name}"
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(f"{key}: not a name that W&B takes (letters, digits, _ . -, not a digit first)")
        if not isinstance(spec, dict):
            kind = "values" if isinstance(spec, list) else "value"
            raise UserError(f"{key}: must be a mapping; write {name}: {{{kind}: {spec}}}")
        for word in spec:
            if word not in WORDS:
                raise UserError(f"{key}: unknown attribute {word}; {meant(word, WORDS)}")
        given = [form for form in ("value", "values", "parameters", *LIMITS) if form in spec]
        if len(given) > 1 and given != list(LIMITS):
            raise UserError(f"{key}: has both {given[0]} and {given[1]}; give it one of value, values, min with max")
        if given == ["parameters"]:
            if len(spec) > 1:
                raise UserError(f"{key}: {next(word for word in spec if word not in given)}: not beside parameters")
            check_parameters(path, f"{where}.{name}.parameters", spec["parameters"])
        else:
            check_attributes(key, spec)


def check_attributes(key: str, spec: dict[str, Any]) -> None:
    """Raise UserError, beginning with `key`, on attributes from which nothing can be drawn."""
    kind = distribution(spec)
    if not kind:
        for limit, other in (LIMITS, LIMITS[::-1]):
            if limit in spec:
                raise UserError(f"{key}: has {limit} and no {other}; give both")
        if not spec:
            raise UserError(f"{key}: has no value; give it one of value, values, min with max, parameters")
        raise UserError(f"{key}: has no value and no distribution; {next(iter(spec))} alone does not say which")
    if kind not in ATTRIBUTES:
        raise UserError(f"{key}: distribution: unknown distribution {kind}; {meant(kind, list(ATTRIBUTES))}")
    taken = ATTRIBUTES[kind]
    for word in spec:
        if word not in (*taken, "distribution"):
            raise UserError(f"{key}: {word}: does not go with distribution {kind}, which takes {', '.join(taken)}")
    for word in taken:
        if word not in spec and word in NEEDED:
            raise UserError(f"{key}: has no {word}, which distribution {kind} needs")
    if "values" in spec and (not isinstance(spec["values"], list) or not spec["values"]):
        raise UserError(f"{key}: values: must be a list of at least one value")
    if "probabilities" in spec:
        chances = spec["probabilities"]
        if not isinstance(chances, list) or not all(is_number(chance) and chance >= 0 for chance in chances):
            raise UserError(f"{key}: probabilities: must be a list of numbers from 0 to 1")
        if len(chances) != len(spec["values"]) or not math.isclose(sum(chances), 1, abs_tol=1e-5):
            raise UserError(
                f"{key}: probabilities: {len(chances)} that add up to {sum(chances):g}; "
                f"each of the {len(spec['values'])} values needs one, and together they make 1"
            )
    check_numbers(key, kind, {word: spec[word] for word in (*LIMITS, *BELL, *SHAPE, "q") if word in spec})


def check_numbers(key: str, kind: str, numbers: dict[str, Any]) -> None:
    for word, number in numbers.items():
        if not is_number(number):
            raise UserError(f"{key}: {word}: must be a number, not {number!r}")
        if word in ("sigma", "a", "b", "q") and number <= 0:
            raise UserError(f"{key}: {word}: must be above 0, not {number}")
        if kind == "int_uniform" and not isinstance(number, int):
            raise UserError(f"{key}: {word}: distribution int_uniform needs whole numbers, not {number}")
    if "min" not in numbers:
        return
    low, high = numbers["min"], numbers["max"]
    if low >= high:
        raise UserError(f"{key}: min {low} is not below max {high}")
    if kind.endswith("_values") and low <= 0:
        raise UserError(f"{key}: min: must be above 0 on a logarithmic scale, not {low}")
    if of_exponents(kind) and (max(abs(low), abs(high)) > LARGEST_EXPONENT or 0 < low < high <= 1):
        # Draws that are no numbers, or all between 1 and e: somebody wrote the limits themselves.
        raise UserError(f"{key}: min and max of {kind} are exponents of e; to give the limits, write {kind}_values")


def check_space(path: str, definition: dict[str, Any]) -> list[str]:
    """Remarks on the parameters. Raises UserError on what the method cannot search."""
    method, remarks = definition["method"], []
    found = [(".".join(names), spec, distribution(spec)) for names, spec in leaves(definition["parameters"])]
    for name, spec, kind in found:
        key = f"{path}: parameters: {name}"
        if method == "grid" and kind not in OF_A_GRID:
            raise UserError(f"{key}: {kind} has no list of values for a grid; give values, or write method: random")
        points = (spec["max"] - spec["min"]) / spec.get("q", 1) if method == "grid" and "min" in spec else 0
        if points > MOST_POINTS:
            raise UserError(f"{key}: a range of {points:,.0f} values in a grid; write method: random with a run_cap")
        if method in ("bayes", "custom") and kind == "categorical_w_probabilities":
            # The engine takes the values for places in their list, and fails where they are no numbers.
            raise UserError(f"{key}: probabilities are for method: random; {method} finds out by itself")
        if method != "grid" and kind != "constant" and SEED.fullmatch(name):
            remarks.append(f"{name} is part of what {method} searches, so luck looks like merit; better leave it out")
        if of_exponents(kind):
            sign = -1 if kind.startswith("inv_") else 1
            low, high = sorted(math.exp(sign * spec[limit]) for limit in LIMITS)
            remarks.append(f"{name} is drawn from {low:g} to {high:g}: min and max of {kind} are exponents of e")
    if method == "bayes" and all(kind == "constant" for *_, kind in found):
        raise UserError(f"{path}: parameters: nothing to search for method: bayes; every parameter is one value")
    return remarks
