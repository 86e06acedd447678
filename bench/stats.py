"""Ratios with their spread, and their geometric mean.

Invariant: a ratio is taken within one repetition, never between medians of different ones.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Spread:
    """A ratio: its median over the repetitions, and the smallest and greatest seen."""

    median: float
    low: float
    high: float


def spread_of_ratios(pairs: list[tuple[float, float]]) -> Spread | None:
    """The ratio of each pair's first to its second; None if there is no pair."""
    ratios = [slow / fast for slow, fast in pairs if fast > 0]
    if not ratios:
        return None
    return Spread(median(ratios), min(ratios), max(ratios))


def geomean(values: Iterable[float]) -> float | None:
    """The geometric mean; None of nothing."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None
