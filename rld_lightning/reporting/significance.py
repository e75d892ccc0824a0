"""Tests whether two methods differ by more than the variation over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

MIN_PAIRS = 3
SAME = 1e-4  # percentage points: ten times float32's rounding, a twentieth of one image of ImageNet's 50,000


@dataclass(frozen=True)
class PairedDifference:
    """The gain of a first method over a second, over the seeds that both were run with."""

    n: int  # number of seeds in common
    mean: float | None  # mean difference, in percentage points; None without a seed in common
    low: float | None = None  # lower end of the 95 % confidence interval of the mean; None if not tested
    high: float | None = None  # its upper end
    p: float | None = None  # of the two-sided paired t test; None if not tested
    reason: str = ""  # why there is no test


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> PairedDifference:
    """Compares two methods seed by seed: Student's t test on the differences.

    Args:
        first: accuracy by seed, in percent; a mapping or a series.
        second: the same for the method to compare with.

    Returns:
        the mean difference and the test; no test with fewer than three seeds in common or equal differences.
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
        ps: the p values of one family; None for comparisons without a test, which do not count.

    Returns:
        the adjusted p values, in the same order.
    """
    known = pd.Series(ps, dtype=float).dropna().sort_values()
    adjusted = (known * np.arange(len(known), 0, -1)).cummax().clip(upper=1.0)
    return [float(adjusted[place]) if place in adjusted else None for place in range(len(ps))]
