"""`early_terminate: hyperband`, decided as W&B's engine does (package `sweeps` 0.3.0, hyperband_stopping.py).

Li et al. 2018 as W&B reads it: at each band, a number of logged values of the metric, a running pull must be among the
best 1/eta of all pulls that got as far. Values that are not finite are dropped before they are counted: a pull that
goes NaN stops getting further and is never stopped here. Finished pulls are compared with, never stopped.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from gacha.search import Seen

ETA = 3


def bands(early_terminate: dict[str, Any]) -> Iterator[int]:
    """Numbers of logged values after which pulls are judged, ascending; endless with `min_iter`.

    With `max_iter`: max_iter/eta, max_iter/eta^2, ... at most `s` of them, those below 1 left out.
    """
    eta = early_terminate.get("eta", ETA)
    if "max_iter" in early_terminate:
        band, below = early_terminate["max_iter"], []
        for _ in range(int(early_terminate["s"])):
            band /= eta
            if band < 1:
                break
            below.append(int(band))
        yield from sorted(below)
        return
    band = early_terminate["min_iter"]
    for _ in range(100):
        yield int(band)
        band *= eta


def place(count: int, eta: float) -> int:
    """Which of `count` values, from 0 for the best, is the last one to go on."""
    return int(1.0 / eta * count)


def to_stop(definition: dict[str, Any], seen: Sequence[Seen]) -> set[str]:
    """Run ids of the running pulls that `early_terminate` ends now; none where the definition has no such key."""
    rule = definition.get("early_terminate")
    if not rule:
        return set()
    sign = -1.0 if definition["metric"].get("goal") == "maximize" else 1.0
    told = {pull.run_id: [sign * value for value in pull.history if math.isfinite(value)] for pull in seen}
    running = {pull.run_id: told[pull.run_id] for pull in seen if pull.status == "running"}
    longest = max(map(len, running.values()), default=0)
    last_bands: dict[str, int] = {}
    for band in bands(rule):
        if band > longest:
            break
        last_bands |= {run_id: band for run_id, values in running.items() if len(values) >= band}
    thresholds = {}
    for band in set(last_bands.values()):
        reached = sorted(values[band - 1] for values in told.values() if len(values) >= band)
        thresholds[band] = reached[place(len(reached), rule.get("eta", ETA))]
    strict = rule.get("strict", True)
    return {
        run_id
        for run_id, band in last_bands.items()
        if (running[run_id][band - 1] if strict else min(running[run_id])) > thresholds[band]
    }
