"""Random search: point i of a space, as a function of the sampler's seed, i and each parameter's name alone.

So a resumed sweep and several agents agree on every point without telling each other, and a parameter that is added to
a definition leaves what the others draw as it was. W&B's engine draws from the same distributions without a seed.
"""

import math
import zlib
from typing import Any

import numpy as np

from gacha.definition import nest
from gacha.space import distribution, leaves


def point(parameters: dict[str, Any], seed: int, index: int) -> dict[str, Any]:
    """Parameters of random point `index`, nested as in the definition."""
    drawn = [(names, value(spec, stream(seed, index, names))) for names, spec in leaves(parameters)]
    return nest(drawn)


def stream(seed: int, index: int, names: tuple[str, ...]) -> np.random.Generator:
    """The random numbers of one parameter of one point."""
    return np.random.Generator(np.random.PCG64([seed, index, zlib.crc32("/".join(names).encode())]))


def value(spec: dict[str, Any], random: np.random.Generator) -> Any:
    """A draw as a plain Python value, distributed as W&B's engine has it (params.py, HyperParameter.ppf)."""
    kind = distribution(spec)
    if kind == "constant":
        return spec["value"]
    if kind == "categorical":
        return spec["values"][random.integers(len(spec["values"]))]
    if kind == "categorical_w_probabilities":
        edges = np.cumsum(spec["probabilities"])
        return spec["values"][int(np.searchsorted(edges[:-1] / edges[-1], random.random(), side="right"))]
    if kind == "int_uniform":
        return int(random.integers(spec["min"], spec["max"], endpoint=True))
    number = continuous(kind.removeprefix("q_"), spec, random)
    if not kind.startswith("q_"):
        return number
    step = spec.get("q", 1.0)
    quantized = float(np.round(number / step)) * step
    return int(quantized) if isinstance(step, int) else quantized


def continuous(kind: str, spec: dict[str, Any], random: np.random.Generator) -> float:
    """A draw from one of the continuous distributions, before it is quantized."""
    if kind in ("normal", "log_normal"):
        number = random.normal(spec.get("mu", 0.0), spec.get("sigma", 1.0))
        return math.exp(number) if kind == "log_normal" else float(number)
    if kind == "beta":
        return float(random.beta(spec.get("a", 1), spec.get("b", 1)))
    low, high = float(spec["min"]), float(spec["max"])
    if kind == "uniform":
        return float(random.uniform(low, high))
    # "values" says that the limits are those of the value; without it they are exponents of e.
    if kind.endswith("_values"):
        return min(max(math.exp(random.uniform(math.log(low), math.log(high))), low), high)
    return math.exp(random.uniform(-high, -low) if kind.startswith("inv_") else random.uniform(low, high))
