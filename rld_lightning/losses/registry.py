"""The losses by name. To add a loss, add a file that registers a class to this package or to ``features/``."""

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar, dataclass_transform

import rld_lightning.losses
from rld_lightning.losses.base import DistillationLoss

Loss = TypeVar("Loss", bound=DistillationLoss)

_REGISTRY: dict[str, type[DistillationLoss]] = {}


@dataclass_transform(eq_default=False, field_specifiers=(field,))
def register_loss(name: str) -> Callable[[type[Loss]], type[Loss]]:
    """Decorator: makes the class a dataclass and registers it under a name, for :func:`loss_class`.

    Args:
        name: also the value of the command-line option: ``loss=<name>``.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: type[Loss]) -> type[Loss]:
        if name in _REGISTRY:
            raise ValueError(f"loss {name!r} is already registered, by {_REGISTRY[name].__module__}.")
        # Keeps ``nn.Module``'s comparison by identity, hash and repr.
        _REGISTRY[name] = dataclass(eq=False, repr=False)(cls)
        return cls

    return register


def list_losses() -> list[str]:
    """Returns the names of all losses in alphabetical order."""
    _import_all()
    return sorted(_REGISTRY)


def loss_class(name: str) -> type[DistillationLoss]:
    """Returns the class that is registered under a name.

    Raises:
        ValueError: no loss has this name.
    """
    if name not in _REGISTRY:
        _import_all()
    if name not in _REGISTRY:
        raise ValueError(f"unknown loss {name!r}; choose one of {', '.join(sorted(_REGISTRY))}.")
    return _REGISTRY[name]


def loss_options(name: str) -> dict[str, Any]:
    """Returns a loss's Hydra config: ``_target_``, its import path, and every hyper-parameter with its default.

    Raises:
        ValueError: no loss has this name.
    """
    cls = loss_class(name)
    package, home = cls.__module__.rpartition(".")[0], cls.__module__
    if package and getattr(import_module(package), cls.__name__, None) is cls:
        home = package
    parameters = inspect.signature(cls).parameters.values()
    return {"_target_": f"{home}.{cls.__name__}", **{p.name: p.default for p in parameters}}


def _import_all() -> None:
    package = rld_lightning.losses
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        import_module(module.name)
