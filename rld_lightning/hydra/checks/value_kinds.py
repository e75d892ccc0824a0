"""Kinds of configuration values: a predicate and its description in words."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """The values that an option allows."""

    must_be: str  # the description, which follows "it must be"
    allows: Callable[[Any], bool]  # whether a value is of this kind

    def __or__(self, other: "Kind") -> "Kind":
        """Returns the union of two kinds."""
        return Kind(f"{self.must_be}, or {other.must_be}", lambda value: self.allows(value) or other.allows(value))

    def such_as(self, example: str) -> "Kind":
        """Returns the same kind with an example in its description."""
        return Kind(f"{self.must_be}, such as {example}", self.allows)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, but not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, but not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(low: int, high: int | None = None) -> Kind:
    """Integers >= ``low``, or from ``low`` to ``high``."""
    words = f"a whole number >= {low}" if high is None else f"a whole number from {low} to {high}"
    return Kind(words, lambda value: is_whole(value) and low <= value and (high is None or value <= high))


def number(words: str, allows: Callable[[float], bool]) -> Kind:
    """Finite numbers that a predicate allows."""
    return Kind(f"a number {words}", lambda value: is_number(value) and allows(value))


def words(*choices: Any) -> Kind:
    """One of several strings, numbers or bools."""
    # True == 1 in Python, but not for users.
    known = {(type(choice), choice) for choice in choices}
    *others, last = (shown(choice) for choice in choices)
    text = f"{', '.join(others)} or {last}" if others else last
    return Kind(text, lambda value: isinstance(value, str | int | float) and (type(value), value) in known)


def list_of(kind: Kind, plural: str, count: int | None = None) -> Kind:
    """Lists of values of one kind, of length ``count`` if given."""

    def allows(value: Any) -> bool:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and (count is None or len(value) == count) and all(map(kind.allows, value))

    return Kind(f"a list of {plural}", allows)


NULL = Kind("null", lambda value: value is None)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str) and bool(value.strip()))
KEYS = Kind("keys with values", lambda value: isinstance(value, Mapping))
FINITE = number("that is finite", lambda value: True)
POSITIVE = number("> 0", lambda value: value > 0)
NOT_NEGATIVE = number(">= 0", lambda value: value >= 0)
BELOW_ONE = number(">= 0 and < 1", lambda value: 0 <= value < 1)
SHARE = number("> 0 and <= 1", lambda value: 0 < value <= 1)
COUNT = whole(1)


def shown(value: Any) -> str:
    """Formats a value as on the command line (``null``, ``[1,2]``); quotes strings of another type's form."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{shown(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(shown, value))}]"
    return f"'{value}'" if isinstance(value, str) and _needs_quotes(value) else str(value)


def _needs_quotes(text: str) -> bool:
    if not text.strip() or text in ("null", "true", "false"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
