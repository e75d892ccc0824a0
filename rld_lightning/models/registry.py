"""Where networks of this package, and of a user's own, get their names."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

ModelBuilder = TypeVar("ModelBuilder", bound=Callable[..., nn.Module])

REGISTRY: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: ModelBuilder) -> ModelBuilder:
    """Decorator: :func:`~rld_lightning.models.create_model` finds the function or class under its own name, lower case.

    The name is an option of the command line, too: ``model=<name>``.

    Args:
        builder: called as ``builder(num_classes=..., **kwargs)``; gives the network.

    Raises:
        ValueError: the name is taken, be it in another spelling.
    """
    name = builder.__name__.lower()
    if (taken := canonical_name(name)) in REGISTRY:
        raise ValueError(f"model {taken!r} is already registered, by {REGISTRY[taken].__module__}.")
    REGISTRY[name] = builder
    return builder


def register_size(name: str, family: Callable[..., nn.Module], *size: Any) -> Callable[..., nn.Module]:
    """Registers ``family(*size, num_classes=...)`` under a name, as :func:`register_model` does a function."""

    def build(num_classes: int = 100) -> nn.Module:
        return family(*size, num_classes=num_classes)

    build.__name__ = build.__qualname__ = name
    build.__module__ = family.__module__
    return register_model(build)


def canonical_name(name: str) -> str:
    """A network's name as it is spelled here: ``wrn40_2`` of ``wrn_40_2``, ``resnet50`` of ``ResNet50``.

    In registered names upper and lower case, ``-`` and ``_`` make no difference, because other code spells them
    otherwise. Names of the libraries' networks and unknown ones stay as they are; of ``resnet8@wrn_16_2`` and
    ``resnet8+wrn_16_2`` each of both is looked at.
    """
    spellings = {_plain(known): known for known in REGISTRY}
    return "".join(spellings.get(_plain(part), part) for part in re.split("([@+])", name))


def names_of_members(name: str, count: int) -> tuple[str, ...]:
    """The networks of a teacher's files: one for all, or one for each, as in ``resnet56+wrn40_2``.

    Raises:
        ValueError: it names more networks than one, and not as many as there are files.
    """
    names = tuple(name.split("+"))
    if len(names) == 1 or (count == 1 and name.startswith("transformers/")):  # a folder of any name
        return (name,) * count
    if len(names) != count:
        raise ValueError(
            f"model.teacher.name={name} names {len(names)} networks, and model.teacher.weights {count} file(s): give "
            "as many files, in that order, such as model.teacher.name=resnet56+wrn40_2 model.teacher.weights=[a,b]."
        )
    return names


def _plain(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "")
