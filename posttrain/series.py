"""A training signal kept online: where it started, where it is, how loud one row of it is."""

import math
from dataclasses import dataclass, field
from statistics import median

from pretrain.trend import Window

LEVEL = 3  # rows whose median is a level
NOISE = 64  # second differences that the noise is known by: a trend leaves it out
SD_OF_BEND = 1 / (0.6745 * math.sqrt(6))  # standard deviation of a row, of the median size of a second difference


@dataclass
class Series:
    """One training signal: where it started, where it is, how far its level has been, how loud a row is."""

    first: list[float] = field(default_factory=list)  # rows of the baseline
    last: list[float] = field(default_factory=list)
    bends: list[float] = field(default_factory=list)  # sizes of the last second differences
    low: float = math.inf  # lowest level
    high: float = -math.inf
    step: int = -1  # of the first row
    at: int = -1  # of the last row
    spacing: int = 1  # steps from a row to the next

    def __post_init__(self) -> None:
        self._bends = Window(self.bends, NOISE)

    def push(self, step: int, value: float, early: int) -> None:
        if self.last:
            self.spacing = max(1, step - self.at)
        else:
            self.step = step
        if not self.first or (step - self.step <= early and len(self.first) < 8):
            self.first.append(value)
        self.at, self.last = step, [*self.last, value][-LEVEL:]
        if len(self.last) == LEVEL:
            self._bends.push(abs(self.last[0] - 2 * self.last[1] + self.last[2]))
        level = self.level
        if len(self.bends) <= 1:  # the first level of enough rows
            self.low = self.high = level
        self.low, self.high = min(self.low, level), max(self.high, level)

    @property
    def level(self) -> float:
        return median(self.last)

    @property
    def start(self) -> float:
        return median(self.first)

    @property
    def sd(self) -> float:
        return self._bends.median * SD_OF_BEND if self.bends else 0.0
