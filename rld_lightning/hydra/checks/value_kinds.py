"""What a value of the configuration may be: a test, and the words for it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a value may be."""

    must_be: str  # in words, to follow "it must be"
    allows: Callable[[Any], bool]  # whether a value is of this kind

    def __or__(self, other: "Kind") -> "Kind":
        """Either of two kinds."""
        return Kind(f"{self.must_be}, or {other.must_be}", lambda value: self.allows(value) or other.allows(value))

    def such_as(self, example: str) -> "Kind":
        """The same kind, with an example that helps whoever missed it."""
        return Kind(f"{self.must_be}, such as {example}", self.allows)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(low: int, high: int | None = None) -> Kind:
    """Whole numbers from ``low`` on, or up to ``high``."""
    words = f"a whole number >= {low}" if high is None else f"a whole number from {low} to {high}"
    return Kind(words, lambda value: is_whole(value) and low <= value and (high is None or value <= high))


def number(words: str, allows: Callable[[float], bool]) -> Kind:
    """Finite numbers in a range."""
    return Kind(f"a number {words}", lambda value: is_number(value) and allows(value))


def words(*choices: Any) -> Kind:
    """One of some words, or numbers."""
    # True is 1 to Python, and not to a user.
    known = {(type(choice), choice) for choice in choices}
    *others, last = (shown(choice) for choice in choices)
    text = f"{', '.join(others)} or {last}" if others else last
    return Kind(text, lambda value: isinstance(value, str | int | float) and (type(value), value) in known)


def list_of(kind: Kind, plural: str, count: int | None = None) -> Kind:
    """Lists of values of a kind, ``count`` of them or any number."""

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
    """A value as a command line has it: ``null``, ``true``, ``[1,2]``; texts that look like another value in quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{shown(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(shown, value))}]"
    return f"'{value}'" if isinstance(value, str) and _looks_like_another(value) else str(value)


def _looks_like_another(text: str) -> bool:
    if not text.strip() or text in ("null", "true", "false"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
