"""Where networks of this package, and of a user's own, get their names."""

from collections.abc import Callable
from typing import TypeVar

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


def canonical_name(name: str) -> str:
    """A network's name as it is spelled here: ``wrn40_2`` of ``wrn_40_2``, ``resnet50`` of ``ResNet50``.

    In registered names upper and lower case, ``-`` and ``_`` make no difference, because files of other code and of
    earlier versions spell them otherwise. Names of the libraries' networks and unknown ones stay as they are; of
    ``resnet8@wrn_16_2`` each of both is looked at.
    """
    spellings = {_plain(known): known for known in REGISTRY}
    return "@".join(spellings.get(_plain(part), part) for part in name.split("@"))


def canonical_label(label: str) -> str:
    """A pair's label with both names as they are spelled here: ``wrn40_2_to_wrn16_2`` of ``wrn_40_2_to_wrn_16_2``."""
    return "_to_".join(map(canonical_name, label.split("_to_")))


def _plain(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "")
