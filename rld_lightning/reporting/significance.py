"""Whether a difference between two methods is more than the luck of their seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

MIN_PAIRS = 3
SAME = 1e-4  # percent points: float32's rounding is a tenth of it, one image of ImageNet's 50,000 twenty times


@dataclass(frozen=True)
class PairedDifference:
    """How much the first method is ahead of the second, over the seeds that both were run with.

    Args:
        n: how many seeds.
        mean: mean difference, in percent points; None without a seed in common.
        low: lower end of the 95 % confidence interval of the mean; None where it cannot be told.
        high: its upper end.
        p: of the two-sided paired t test; None where it cannot be told.
        reason: why it cannot be told.
    """

    n: int
    mean: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    reason: str = ""


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> PairedDifference:
    """Compares two methods seed by seed: Student's t test on the differences.

    Args:
        first: accuracy by seed.
        second: the same of what it is compared to.

    Returns:
        the mean difference; with fewer than three seeds in common, or differences that are all the same, no more.
    """
    seeds = sorted(first.keys() & second.keys())
    differences = np.array([first[seed] - second[seed] for seed in seeds], dtype=float)
    n = len(seeds)
    if n == 0:
        return PairedDifference(0, None, reason="no seed in common")
    mean = float(differences.mean())
    if n < MIN_PAIRS:
        return PairedDifference(n, mean, reason=f"n = {n}: cannot be told from fewer than {MIN_PAIRS} seeds")
    if np.ptp(differences) < SAME:
        return PairedDifference(n, mean, reason="the same difference with every seed: no spread to judge it by")
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    low, high = (float(end) for end in stats.t.interval(0.95, n - 1, loc=mean, scale=error))
    return PairedDifference(n, mean, low, high, p=float(2 * stats.t.sf(abs(mean) / error, n - 1)))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Corrects for several comparisons: the family-wise error stays below the level (Holm, 1979).

    Args:
        ps: of one family; None where there is no test, which does not count.

    Returns:
        the adjusted p values, in the same order.
    """
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i])
    adjusted: list[float | None] = [None] * len(ps)
    highest = 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * ps[i]))
        adjusted[i] = highest
    return adjusted
