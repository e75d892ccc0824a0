"""Paired differences and Holm's correction against hand-computed numbers."""

import math

import numpy as np
import pytest
from scipy import stats

from rld_lightning.reporting.significance import holm, paired_difference


def test_three_seeds_equal_hand_computed_values():
    # Differences 1, 2, 3: mean 2, sample standard deviation 1, standard error 1/sqrt(3), t = 2 sqrt(3).
    found = paired_difference({0: 61.0, 1: 63.0, 2: 65.0}, {0: 60.0, 1: 61.0, 2: 62.0})
    t = 2 * math.sqrt(3)
    assert (found.n, found.mean) == (3, 2.0)
    # Student's t with 2 degrees of freedom has a closed form: p = 1 - t / sqrt(t^2 + 2); its 97.5 % point is 4.3027.
    assert found.p == pytest.approx(1 - t / math.sqrt(t**2 + 2))
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_the_test_equals_scipys_paired_test():
    first = {0: 60.1, 1: 59.7, 2: 60.9, 3: 60.2, 4: 59.9}
    second = {0: 59.5, 1: 59.9, 2: 60.0, 3: 59.1, 4: 59.8}
    expected = stats.ttest_rel(list(first.values()), list(second.values()))
    found = paired_difference(first, second)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_only_seeds_in_common_count():
    found = paired_difference({0: 61.0, 1: 62.0, 7: 99.0}, {1: 60.0, 0: 60.0, 8: 1.0})
    assert (found.n, found.mean, found.p) == (2, 1.5, None)
    assert "fewer than 3 seeds" in found.reason


def test_untestable_differences_have_a_reason():
    assert paired_difference({0: 1.0}, {1: 2.0}).mean is None
    same = paired_difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.5, 1: 1.5, 2: 2.5})
    assert (same.mean, same.p) == (0.5, None)
    assert "same difference" in same.reason


def test_float32_rounding_is_not_variation():
    accuracy = np.float32([55.51, 61.27, 58.13])
    ahead = {seed: float(value + np.float32(0.2)) for seed, value in enumerate(accuracy)}
    same = paired_difference(ahead, {seed: float(value) for seed, value in enumerate(accuracy)})
    assert same.p is None
    one_image = paired_difference({0: 75.0, 1: 75.002, 2: 75.0}, {0: 74.0, 1: 74.0, 2: 74.0})  # of ImageNet's 50,000
    assert one_image.p is not None


def test_swapping_changes_only_the_sign():
    first, second = {0: 3.0, 1: 5.0, 2: 4.0}, {0: 1.0, 1: 4.5, 2: 3.0}
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert back.mean == pytest.approx(-there.mean)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert back.p == pytest.approx(there.p)


def test_holm_equals_hand_computed_values():
    # Sorted 0.01, 0.02, 0.04 times 3, 2, 1 is 0.03, 0.04, 0.04; a missing test does not count.
    assert holm([0.04, None, 0.01, 0.02]) == [pytest.approx(0.04), None, pytest.approx(0.03), pytest.approx(0.04)]
    assert holm([0.5, 0.9]) == [1.0, 1.0]  # at most 1, and monotonic
    assert holm([]) == []
