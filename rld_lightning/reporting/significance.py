"""Whether a difference between two methods is more than the luck of their seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

MIN_PAIRS = 3
SAME = 1e-4  # percent points: float32's rounding is a tenth of it, one image of ImageNet's 50,000 twenty times


@dataclass(frozen=True)
class PairedDifference:
    """How much the first method is ahead of the second, over the seeds that both were run with."""

    n: int  # how many seeds
    mean: float | None  # mean difference, in percent points; None without a seed in common
    low: float | None = None  # lower end of the 95 % confidence interval of the mean; None where it cannot be told
    high: float | None = None  # its upper end
    p: float | None = None  # of the two-sided paired t test; None where it cannot be told
    reason: str = ""  # why it cannot be told


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> PairedDifference:
    """Compares two methods seed by seed: Student's t test on the differences.

    Args:
        first: accuracy by seed, in percent; a mapping or a series.
        second: the same of what it is compared to.

    Returns:
        the mean difference; with fewer than three seeds in common, or differences that are all the same, no more.
    """
    both = pd.DataFrame({"first": first, "second": second}, dtype=float).dropna()
    n, differences = len(both), both["first"] - both["second"]
    if n == 0:
        return PairedDifference(0, None, reason="no seed in common")
    mean = float(differences.mean())
    if n < MIN_PAIRS:
        return PairedDifference(n, mean, reason=f"n = {n}: cannot be told from fewer than {MIN_PAIRS} seeds")
    if np.ptp(differences) < SAME:
        return PairedDifference(n, mean, reason="the same difference with every seed: no spread to judge it by")
    test = stats.ttest_rel(both["first"], both["second"])
    low, high = test.confidence_interval(0.95)
    return PairedDifference(n, mean, float(low), float(high), float(test.pvalue))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Corrects for several comparisons: the family-wise error stays below the level (Holm, 1979).

    Args:
        ps: of one family; None where there is no test, which does not count.

    Returns:
        the adjusted p values, in the same order.
    """
    known = pd.Series(ps, dtype=float).dropna().sort_values()
    adjusted = (known * np.arange(len(known), 0, -1)).cummax().clip(upper=1.0)
    return [float(adjusted[place]) if place in adjusted else None for place in range(len(ps))]
