"""Ranges of hyper-parameters, stated in their annotation: ``temperature: Positive = 4.0``.

Type checkers see a plain number or string. Losses check their fields, and functions their keywords, with
:func:`check_ranges`.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from operator import index
from types import UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import torch

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, repr=False)
class Range:
    """A range for ``Annotated[float, Range(...)]``; created by :func:`must_be` and :func:`choose`.

    Attributes:
        test: whether a value is in the range; a ``TypeError`` counts as no.
        fault: what is wrong with a value outside the range.
        rule: the allowed values.
    """

    test: Callable[[Any], bool]
    fault: str
    rule: str

    def allows(self, value: Any) -> bool:
        """Whether a value is in the range."""
        try:
            return self.test(value)
        except TypeError:
            return False

    def check(self, name: str, value: Any) -> None:
        """Raises ``ValueError`` if the value is outside the range."""
        if not self.allows(value):
            raise ValueError(f"{name}={value!r} {self.fault}; {self.rule}.")

    def __repr__(self) -> str:
        return self.rule  # shown in the signatures in notebooks


def must_be(what: str, allows: Callable[[Any], bool]) -> Range:
    """Returns a range of numbers, given in words and as a test."""
    return Range(allows, "is not allowed", f"it must be {what}")


def whole(least: int, why: str = "") -> Range:
    """Returns the range of integers (2.0 is not one) >= ``least``."""
    return must_be(f"a whole number >= {least}{why}", lambda value: index(value) >= least)


def choose(which: str, *words: Any) -> Range:
    """Returns the range of some words; ``which`` lists them for the message."""
    return Range(words.__contains__, "is unknown", f"choose {which}")


POSITIVE = must_be("a finite number > 0", lambda value: math.isfinite(value) and value > 0)
WEIGHT = must_be("a finite number >= 0 (0 switches it off)", lambda value: math.isfinite(value) and value >= 0)

Weight = Annotated[float, WEIGHT]
Positive = Annotated[float, POSITIVE]
Count = Annotated[int, whole(1)]
Share = Annotated[float, must_be("> 0 and <= 1", lambda value: 0 < value <= 1)]


def ranges_of(annotations: Mapping[str, Any]) -> dict[str, Range]:
    """Returns the ranges that annotations state, by name.

    These are ``Annotated[..., Range(...)]`` and the words of a ``Literal``; both may be ``| None``.
    """
    ranges = {name: _range_of(annotation) for name, annotation in annotations.items()}
    return {name: range_ for name, range_ in ranges.items() if range_ is not None}


def check_ranges(ranges: Mapping[str, Range], values: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for the first named value that is outside its range.

    Skipped under ``torch.compile``: earlier PyTorch versions cannot trace it, and constructors have checked already.
    """
    if torch.compiler.is_compiling():
        return
    for name, value in values.items():
        if name in ranges:
            ranges[name].check(name, value)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: makes a function check its keywords against the ranges that its annotations state."""
    ranges = ranges_of(inspect.get_annotations(function, eval_str=True))

    @wraps(function)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> R:
        check_ranges(ranges, kwargs)
        return function(*args, **kwargs)

    return with_checks


def _range_of(annotation: Any) -> Range | None:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        inner = [range_ for range_ in map(_range_of, args) if range_ is not None]
        return replace(inner[0], test=lambda value: value is None or inner[0].allows(value)) if inner else None
    if origin is Annotated:
        return next((metadata for metadata in args[1:] if isinstance(metadata, Range)), None)
    if origin is Literal:
        return choose(f"one of {', '.join(args)}", *args)
    return None
