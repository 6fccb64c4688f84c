"""The stopping rules of gacha/stopping.py over many recipes of a table of curves, at equal regret.

`python tests/gacha/frontier.py CURVES.csv --group dir --run run --step step --value val_loss`: every recipe of 8 pulls
or more is split into halves 200 times, schedules learn from one and are judged on the other. At each mean regret (in sd
of the finals, the mean over recipes) the table has the most compute that a mixture of a family's schedules saves, and
what the learned rule saves beyond the best of halving and Hyperband, with a 95% bootstrap interval over recipes.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import console
from gacha import finals, stopping

REGRETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
PULLS = 8


def most_saved(regret: np.ndarray, saved: np.ndarray, at: float) -> float:
    """The concave envelope of (0, 0) and the schedules: what mixtures of them save at regret `at`."""
    x, y = np.append(0.0, regret), np.append(0.0, saved)
    left, right = np.flatnonzero(x <= at), np.flatnonzero(x > at)
    best = float(y[left].max())
    for i in left:
        rise = (y[right] - y[i]) / (x[right] - x[i])
        best = max(best, float((y[i] + rise * (at - x[i])).max(initial=-1)))
    return best


def main() -> None:
    """Print the table."""
    config = console.parse(finals.Config, sys.argv[1:], "python tests/gacha/frontier.py")
    lower = finals.check(config)
    judged: list[list[stopping.Outcome]] = []
    told: set[bytes] = set()
    for name, group in finals.read(config)[0.0].items():
        if len(group.curves) >= PULLS and len(group.values) >= PULLS:
            fractions, values = stopping.align(group.curves)
            # The same pulls under two names count once.
            if (key := np.sort(values[:, -1]).tobytes()) not in told:
                told.add(key)
                judged.append(stopping.frontier(fractions, values, lower))
                best = stopping.buys_most(judged[-1])
                print(f"{len(values):>4} pulls  {best.saved.value:4.0%} at .1 sd by {best.family:<9}  {name}")
    first = judged[0]
    is_of = {
        "halving": [one.family == "halving" for one in first],
        "hyperband": [one.family == "hyperband" for one in first],
        "learned, in parallel": [one.family == "learned" and one.setting == "parallel" for one in first],
        "learned, one by one": [one.setting == "sequential" for one in first],
    }
    saved = np.array([[one.saved.value for one in outcomes] for outcomes in judged])
    regret = np.array([[one.regret_sd.value for one in outcomes] for outcomes in judged])

    def line(picked: np.ndarray, of: list[bool]) -> np.ndarray:
        x, y = regret[picked].mean(axis=0)[of], saved[picked].mean(axis=0)[of]
        return np.array([most_saved(x, y, at) for at in REGRETS])

    everyone = np.arange(len(judged))
    print(f"\n{len(judged)} recipes; regret in sd" + "".join(f"{at:>15g}" for at in REGRETS))
    for name, of in is_of.items():
        print(f"{name:<22}" + "".join(f"{share:>15.1%}" for share in line(everyone, of)))
    others = [a or b for a, b in zip(is_of["halving"], is_of["hyperband"], strict=True)]
    rng = np.random.default_rng(0)
    resampled = [rng.integers(len(judged), size=len(judged)) for _ in range(300)]
    for name in ("learned, in parallel", "learned, one by one"):
        gains = np.array([line(picked, is_of[name]) - line(picked, others) for picked in resampled])
        lo, hi = np.quantile(gains, [0.025, 0.975], axis=0)
        cells = "".join(f"{f'{a:+.1%} to {b:+.1%}':>15}" for a, b in zip(lo, hi, strict=True))
        print(f"{'  beyond the others':<22}{cells}  {name}")


if __name__ == "__main__":
    main()
