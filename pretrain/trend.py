"""Trends kept online: the last numbers of a series with their order statistics, and the signals that leave theirs."""

import math
from bisect import bisect_left, insort
from dataclasses import dataclass, field

IQR_OF_NORMAL = 1.349  # interquartile range of a normal distribution in standard deviations
LENGTH, LENGTH_MIN = 64, 16  # values that make a trend, and before which there is none
SIGNAL_Z = 8.0  # of the logarithm: gradient norms have heavy tails
SIGNAL_SCALE = 0.1  # floor of that scale; 8 of these are a factor of 2.2
SIGNALS = {"grad_norm": 3, "update_rms": 2, "max_logit": 2}  # values in a row out of their trend that are a warning

Facts = dict[str, float | str]


class Window:
    """The last `size` numbers in `values`, a list that the caller keeps, beside a sorted copy of them.

    A push moves at most `size` numbers in memory; quantiles are looked up.
    """

    def __init__(self, values: list[float], size: int = LENGTH) -> None:
        self.values, self.size, self.ranked = values, size, sorted(values)

    def push(self, number: float) -> None:
        self.values.append(number)
        insort(self.ranked, number)
        if len(self.values) > self.size:
            del self.ranked[bisect_left(self.ranked, self.values.pop(0))]

    def replace(self, numbers: list[float]) -> None:
        self.values[:] = numbers
        self.ranked = sorted(numbers)

    def quantile(self, share: float) -> float:
        """Linear between the two nearest ranks, as numpy's."""
        at = share * (len(self.ranked) - 1)
        low = int(at)
        high = min(low + 1, len(self.ranked) - 1)
        return self.ranked[low] + (at - low) * (self.ranked[high] - self.ranked[low])

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def scale(self) -> float:
        """The standard deviation of a normal distribution with the same quartiles."""
        return (self.quantile(0.75) - self.quantile(0.25)) / IQR_OF_NORMAL


@dataclass
class Signals:
    """Gradient norm, update RMS and largest attention logit, which may leave their trend before the loss does."""

    logs: dict[str, list[float]] = field(default_factory=dict)  # logarithms of what was in its trend
    out_run: dict[str, int] = field(default_factory=dict)  # of each: values in a row out of its trend
    since: int = -1  # first step that one of them was out of its trend; -1: none is
    last: int = -1  # last such step

    def __post_init__(self) -> None:
        self._windows = {name: Window(self.logs.setdefault(name, [])) for name in SIGNALS}

    def follow(self, step: int, values: dict[str, float | None], patience: int) -> Facts | None:
        """Hear this step's values, None where they are not known. The facts of a warning when it is due."""
        due: Facts | None = None
        for name, value in values.items():
            if value is None or not math.isfinite(value) or value <= 0:
                continue
            window, x = self._windows[name], math.log(value)
            z = 0.0
            if len(window.values) >= LENGTH_MIN:
                z = (x - window.median) / max(window.scale, SIGNAL_SCALE)
            run = self.out_run[name] = self.out_run.get(name, 0) + 1 if z > SIGNAL_Z else 0
            if not run or run > 2 * patience:  # what lasts is the new normal
                window.push(x)
                continue
            self.since, self.last = step if self.since < 0 else self.since, step
            if run == SIGNALS[name]:
                due = {"signal": name, "value": value, "z": z}
        return due

    def limit(self, name: str, sds: float, factor: float) -> float:
        """The value that is so many standard deviations of its logarithm above its trend, and so many times as large.

        Infinite while there is no trend.
        """
        window = self._windows[name]
        if len(window.values) < 2 * LENGTH_MIN:
            return math.inf
        return math.exp(window.median + max(sds * max(window.scale, SIGNAL_SCALE), math.log(factor)))
