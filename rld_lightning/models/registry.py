"""The registry of networks by name, for this package's and the user's own."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

ModelBuilder = TypeVar("ModelBuilder", bound=Callable[..., nn.Module])

REGISTRY: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: ModelBuilder) -> ModelBuilder:
    """Decorator that registers a builder under its lower-case name, for :func:`~rld_lightning.models.create_model`.

    The name is also an option of the command line: ``model=<name>``.

    Args:
        builder: called as ``builder(num_classes=..., **kwargs)``; returns the network.

    Raises:
        ValueError: the name is already registered, possibly in another spelling.
    """
    name = builder.__name__.lower()
    if (taken := canonical_name(name)) in REGISTRY:
        raise ValueError(f"model {taken!r} is already registered, by {REGISTRY[taken].__module__}.")
    REGISTRY[name] = builder
    return builder


def register_size(name: str, family: Callable[..., nn.Module], *size: Any) -> Callable[..., nn.Module]:
    """Registers ``family(*size, num_classes=...)`` under a name, like :func:`register_model`."""

    def build(num_classes: int = 100) -> nn.Module:
        return family(*size, num_classes=num_classes)

    build.__name__ = build.__qualname__ = name
    build.__module__ = family.__module__
    return register_model(build)


def canonical_name(name: str) -> str:
    """Returns a network's registered spelling: ``wrn40_2`` for ``wrn_40_2``, ``resnet50`` for ``ResNet50``.

    Case, ``-`` and ``_`` are ignored, because other code bases spell the names differently. Library names and unknown
    names are returned unchanged; in ``resnet8@wrn_16_2`` and ``resnet8+wrn_16_2`` both parts are converted.
    """
    spellings = {_plain(known): known for known in REGISTRY}
    return "".join(spellings.get(_plain(part), part) for part in re.split("([@+])", name))


def member_names(name: str, count: int) -> tuple[str, ...]:
    """Returns the network name of each of a teacher's weights files: one name for all, or ``resnet56+wrn40_2``.

    Raises:
        ValueError: the name lists several networks, but not one per file.
    """
    names = tuple(name.split("+"))
    if len(names) == 1 or (count == 1 and name.startswith("transformers/")):  # its path may contain "+"
        return (name,) * count
    if len(names) != count:
        raise ValueError(
            f"model.teacher.name={name} names {len(names)} networks, and model.teacher.weights {count} file(s): give "
            "as many files, in that order, such as model.teacher.name=resnet56+wrn40_2 model.teacher.weights=[a,b]."
        )
    return names


def _plain(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "")
