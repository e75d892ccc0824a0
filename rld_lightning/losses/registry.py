"""Every loss by name. A file of this package or of ``features/`` that registers a class is all that a new loss is."""

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
    """Decorator: makes the class a data class, which :func:`loss_class` finds under this name.

    Args:
        name: also the option of the command line, ``loss=<name>``.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: type[Loss]) -> type[Loss]:
        if name in _REGISTRY:
            raise ValueError(f"loss {name!r} is already registered, by {_REGISTRY[name].__module__}.")
        # Modules are compared by identity and print themselves.
        _REGISTRY[name] = dataclass(eq=False, repr=False)(cls)
        return cls

    return register


def list_losses() -> list[str]:
    """Names of all losses, in alphabetical order."""
    _import_all()
    return sorted(_REGISTRY)


def loss_class(name: str) -> type[DistillationLoss]:
    """The class that is registered under a name.

    Raises:
        ValueError: there is none.
    """
    if name not in _REGISTRY:
        _import_all()
    if name not in _REGISTRY:
        raise ValueError(f"unknown loss {name!r}; choose one of {', '.join(sorted(_REGISTRY))}.")
    return _REGISTRY[name]


def loss_options(name: str) -> dict[str, Any]:
    """A loss as Hydra instantiates it: ``_target_``, its import path, and every hyper-parameter with its default.

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
