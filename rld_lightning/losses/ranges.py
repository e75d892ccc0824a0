"""What a hyper-parameter may be, said where it is declared: ``temperature: Positive = 4.0``.

Type checkers see a plain number or word. Losses check their fields and functions their keywords, both through
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
    """A range, to stand in ``Annotated[float, Range(...)]``; made by :func:`must_be` and :func:`choose`.

    Attributes:
        allows: whether a value lies in it; a ``TypeError`` counts as no.
        fault: what is wrong with a value that does not.
        rule: what to do instead.
    """

    allows: Callable[[Any], bool]
    fault: str
    rule: str

    def check(self, name: str, value: Any) -> None:
        """Raises ``ValueError`` for a value outside the range."""
        try:
            allowed = self.allows(value)
        except TypeError:
            allowed = False
        if not allowed:
            raise ValueError(f"{name}={value!r} {self.fault}; {self.rule}.")

    def __repr__(self) -> str:
        return self.rule  # in the signatures that notebooks show


def must_be(what: str, allows: Callable[[Any], bool]) -> Range:
    """A range of numbers, in words and as a test."""
    return Range(allows, "is not allowed", f"it must be {what}")


def whole(least: int, why: str = "") -> Range:
    """Whole numbers, not 2.0 either, from the least one on."""
    return must_be(f"a whole number >= {least}{why}", lambda value: index(value) >= least)


def choose(which: str, *words: Any) -> Range:
    """Some words; ``which`` says what there is to choose."""
    return Range(words.__contains__, "is unknown", f"choose {which}")


POSITIVE = must_be("a finite number > 0", lambda value: math.isfinite(value) and value > 0)
WEIGHT = must_be("a finite number >= 0 (0 switches it off)", lambda value: math.isfinite(value) and value >= 0)

Weight = Annotated[float, WEIGHT]
Positive = Annotated[float, POSITIVE]
Count = Annotated[int, whole(1)]
Share = Annotated[float, must_be("> 0 and <= 1", lambda value: 0 < value <= 1)]


def ranges_of(annotations: Mapping[str, Any]) -> dict[str, Range]:
    """The ranges that annotations state, by name.

    Those of ``Annotated[..., Range(...)]``, and the words of a ``Literal``; either may be ``| None``.
    """
    found = {name: _range(annotation) for name, annotation in annotations.items()}
    return {name: range_ for name, range_ in found.items() if range_ is not None}


def check_ranges(ranges: Mapping[str, Range], values: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for the first of some named values that is outside its range.

    Not while a graph is traced, where earlier versions of PyTorch cannot follow; constructors have checked before.
    """
    if torch.compiler.is_compiling():
        return
    for name, value in values.items():
        if name in ranges:
            ranges[name].check(name, value)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the function refuses keywords outside the ranges that its annotations state."""
    ranges = ranges_of(inspect.get_annotations(function, eval_str=True))

    @wraps(function)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> R:
        check_ranges(ranges, kwargs)
        return function(*args, **kwargs)

    return with_checks


def _range(annotation: Any) -> Range | None:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        inner = [range_ for range_ in map(_range, args) if range_ is not None]
        return replace(inner[0], allows=lambda value: value is None or inner[0].allows(value)) if inner else None
    if origin is Annotated:
        return next((fact for fact in args[1:] if isinstance(fact, Range)), None)
    if origin is Literal:
        return choose(f"one of {', '.join(args)}", *args)
    return None
