"""What the intervals of gacha/odds.py and duel.py cover, for finals of known shapes: `python tests/gacha/coverage.py`.

A row is a shape and a number of pulls n, a column what is estimated; nominal is 95%. Two numbers for the best of k: the
interval that is told, and the percentile interval of a bootstrap over runs. A star marks more than 1.5 points off.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from gacha import duel, odds

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
SHAPES: dict[str, Draw] = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "lognormal .5": lambda rng, size: np.exp(0.5 * rng.standard_normal(size)),
    "gamma 2": lambda rng, size: rng.gamma(2, 1, size),
    "exponential": lambda rng, size: rng.exponential(1, size),
    "gumbel": lambda rng, size: rng.gumbel(size=size),
    "gumbel, left": lambda rng, size: -rng.gumbel(size=size),
    "t of 5 df": lambda rng, size: rng.standard_t(5, size),
    "uniform": lambda rng, size: rng.random(size),
}
SIZES = (5, 10, 20, 40, 75)
SETS, BOOTSTRAPS = 4000, 500


def starred(share: float) -> str:
    return f"{share:6.1%}" + ("*" if abs(share - 0.95) > 0.015 else " ")


def best_of(draw: Draw, n: int, k: int, rng: np.random.Generator) -> str:
    """Coverage of the told interval over SETS sets, and of the percentile bootstrap's over a tenth of them."""
    truth = np.mean([draw(rng, (20_000, k)).min(axis=1).mean() for _ in range(10)])
    sets = draw(rng, (SETS, n))
    told = [odds.best_of_curve(finals, [k])[0] for finals in sets]
    ours = float(np.mean([one.lo <= truth <= one.hi for one in told]))
    weights, inside = odds.best_of_weights(n, k), 0
    for finals in sets[: SETS // 10]:
        redrawn = np.sort(finals[rng.integers(n, size=(BOOTSTRAPS, n))], axis=1) @ weights
        lo, hi = np.quantile(redrawn, [0.025, 0.975])
        inside += bool(lo <= truth <= hi)
    return f"{starred(ours)} {inside / (SETS // 10):4.0%}"


def main() -> None:
    """Print the tables."""
    rng = np.random.default_rng(0)
    heads = ["k = 1", "k = 3", "k = n/2", "k = n"]
    print(f"expected best of k: told, percentile bootstrap\n{'':<17}" + "".join(f"{head:>15}" for head in heads))
    for name, draw in SHAPES.items():
        for n in SIZES:
            cells = [best_of(draw, n, k, rng) for k in (1, 3, n // 2, n)]
            print(f"{name:<13} {n:>3}" + "".join(f"{cell:>15}" for cell in cells), flush=True)
    print("\np that k pulls hit (k = 5), exact sums over outcomes; never below nominal by construction")
    for p in (0.05, 0.2, 0.5):
        cells = []
        for n in SIZES:
            weights = [math.comb(n, hits) * p**hits * (1 - p) ** (n - hits) for hits in range(n + 1)]
            told = [odds.p_hit(hits, n, 5) for hits in range(n + 1)]
            truth = 1 - (1 - p) ** 5
            inside = (w for w, one in zip(weights, told, strict=True) if one.lo <= truth <= one.hi)
            cells.append(f"n={n} {sum(inside):.1%}")
        print(f"p = {p:<5} " + "   ".join(cells))
    print("\nduels: probability of improvement, difference of means (normal arms, the second shifted by 0, 1, 2 sd)")
    for n in SIZES:
        cells = []
        for shift in (0.0, 1.0, 2.0):
            truth = 0.5 * (1 + math.erf(shift / 2))
            better = means = 0
            for _ in range(SETS // 2):
                a, b = rng.standard_normal(n), rng.normal(shift, 1, n)
                one, gap = duel.p_better(a, b, lower_is_better=True), duel.welch(a, b)[0]
                better += one.lo <= truth <= one.hi
                means += gap.lo <= -shift <= gap.hi
            cells.append(f"{starred(better / (SETS // 2))} {starred(means / (SETS // 2))}")
        print(f"n = {n:<3} " + "   ".join(cells), flush=True)
    print("\nreservation value (normal finals), cost of a pull in sd")
    for n in SIZES:
        cells = []
        for cost in (0.05, 0.2, 1.0):
            truth = odds.stopping_point(np.sort(rng.standard_normal((1, 1_000_000))), cost)[0][0]
            told_all = [odds.reservation(rng.standard_normal(n), cost, draws=1000) for _ in range(SETS // 8)]
            cells.append(f"{cost:g}: {starred(float(np.mean([one.lo <= truth <= one.hi for one in told_all])))}")
        print(f"n = {n:<3} " + "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
