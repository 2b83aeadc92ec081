"""Means over seeds, and how sure they are. Pure functions of numbers."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95
ENOUGH = 3  # seeds below which nothing is said about a spread


@dataclass(frozen=True)
class Spread:
    """A mean over ``n`` values; ``std`` is the sample standard deviation, None for one value and where one is not finite."""

    mean: float
    std: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Half of the mean's 95% t-interval; None below ENOUGH values, and where there is no standard deviation."""
        return None if self.n < ENOUGH or self.std is None else t_quantile(self.n - 1) * self.std / math.sqrt(self.n)


@dataclass(frozen=True)
class Difference:
    """The mean paired difference over ``n`` shared seeds, and its 95% t-interval where there are enough seeds."""

    n: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def shown(self) -> bool:
        """True where the interval lies on one side of 0."""
        return self.low is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and spread; None of nothing."""
    if not values:
        return None
    if not all(map(math.isfinite, values)):  # a perplexity can be beyond all numbers
        return Spread(sum(values) / len(values), None, len(values))
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """First minus second over the seeds that both have."""
    found = spread([first[seed] - second[seed] for seed in sorted(set(first) & set(second))])
    if found is None:
        return Difference(0)
    if found.half_width is None:
        return Difference(found.n, found.mean)
    return Difference(found.n, found.mean, found.mean - found.half_width, found.mean + found.half_width)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = confidence, for Student's T."""
    return float(stdtrit(degrees, (1 + confidence) / 2))
