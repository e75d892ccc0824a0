"""Limits for requested values and values read from files, and checks of the latter. Needs no PyTorch."""

from collections.abc import Callable
from math import isfinite
from typing import Any, TypeGuard
from unicodedata import category

LARGEST_SIDE = 4096  # pixels of a network's input: a name in a file must not exhaust the memory
LARGEST_RESIZE = 2 * LARGEST_SIDE  # of an image before cropping
MOST_CLASSES = 1 << 24  # each has a name
SEEDS = 1 << 32  # exclusive upper bound, as NumPy and scikit-learn require
LARGEST_NUMBER = 1 << 32  # exclusive bound of a mean, a standard deviation and its reciprocal, and of counts of epochs
LONGEST_TEXT = 300  # characters of a name


def is_whole(low: int, high: int) -> Callable[[Any], bool]:
    """Returns a check for whole numbers in [low, high)."""
    return lambda value: type(value) is int and low <= value < high


def is_number(value: Any) -> bool:
    """Whether it is a finite number of a usual size, whose float32 is finite."""
    return type(value) in (int, float) and abs(value) < LARGEST_NUMBER and isfinite(value)


def is_spread(value: Any) -> bool:
    """Whether it is a standard deviation that values can be divided by in float32."""
    return is_number(value) and value > 1 / LARGEST_NUMBER


def is_three(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Returns a check for lists of three values."""
    return lambda value: isinstance(value, list) and len(value) == 3 and all(map(accepts, value))


def is_line(value: Any) -> bool:
    """Whether it is a line of text that is not too long for a name."""
    return is_encodable(value) and 0 < len(value) <= LONGEST_TEXT and "Cc" not in map(category, value)


def is_encodable(value: Any) -> TypeGuard[str]:
    """Whether it is text that can be written: JSON can contain halves of characters, and a folder any bytes."""
    try:
        return isinstance(value, str) and bool(value.encode(errors="surrogateescape") or True)
    except UnicodeEncodeError:
        return False
