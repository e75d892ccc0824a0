"""Where networks of this package, and of a user's own, get their names."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

ModelBuilder = TypeVar("ModelBuilder", bound=Callable[..., nn.Module])

REGISTRY: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: ModelBuilder) -> ModelBuilder:
    """Decorator: :func:`~rld_lightning.models.create_model` finds the function or class under its own name.

    Args:
        builder: called as ``builder(num_classes=..., **kwargs)``; gives the network.

    Raises:
        ValueError: the name is taken.
    """
    name = builder.__name__
    if name in REGISTRY:
        raise ValueError(f"model {name!r} is already registered, by {REGISTRY[name].__module__}.")
    REGISTRY[name] = builder
    return builder
