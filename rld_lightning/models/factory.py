"""Creates any network by name: registered, ``torchvision/<name>``, ``timm/<name>`` or an external one."""

import re
from contextlib import suppress
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any, cast

import torch
from torch import nn

from rld_lightning.errors import did_you_mean
from rld_lightning.models import registry
from rld_lightning.models.graft import GraftedStudent
from rld_lightning.models.imported import build_imported, is_external
from rld_lightning.models.input_size import split_size, with_input_size
from rld_lightning.models.libraries import (
    timm_model,
    timm_names,
    torchvision_model,
    torchvision_names,
    transformers_model,
)
from rld_lightning.models.stages import classifier_of

_GRAFTED = re.compile(r"([^@]*(?:@\d+)?)@(.*)")  # "student@teacher"; each may have a size appended
_LIBRARIES = {"torchvision": (torchvision_names, torchvision_model), "timm": (timm_names, timm_model)}


def create_model(name: str, num_classes: int = 100, **kwargs: Any) -> nn.Module:
    """Creates a freshly initialised network by name.

    In-place activations of torchvision and timm networks are disabled, since they would overwrite tapped features;
    torchvision's ``googlenet`` and ``inception_v3`` are built without their auxiliary classifiers.

    Args:
        name: a registered name (``"wrn40_2"``, also as ``"wrn_40_2"``, see
            :func:`~rld_lightning.models.registry.canonical_name`), ``"torchvision/resnet34"`` or
            ``"timm/vit_tiny_patch16_224"``. Two names, ``"resnet8@resnet32x4"``, create the first network with room for
            the classifier of a trained second one, see :class:`~rld_lightning.models.graft.GraftedStudent`. With a size
            appended, ``"timm/resnet18@224"``, the network first resizes images to that height and width. Also
            ``"my_package.module:build"`` and ``"transformers/<model>"``, if the user has trusted the name, see
            :func:`~rld_lightning.models.imported.trust`.
        num_classes: number of logits, at least 2.
        **kwargs: passed to the (first) builder. Both libraries accept ``pretrained=True``: ImageNet weights, with a
            fresh classifier if ``num_classes`` differs from theirs. If torchvision has several weights for a network,
            the original ones are used (``IMAGENET1K_V1``, the teachers of the literature).

    Returns:
        the network; maps ``(B, 3, H, W)`` to ``(B, num_classes)``.

    Raises:
        ValueError: the name is unknown, there are fewer than two classes, or timm has no ``pretrained`` weights for it.
        ImportError: a ``timm/`` name, and timm is not installed.
    """
    if not isinstance(cast(object, num_classes), Integral) or num_classes < 2:
        raise ValueError(f"num_classes={num_classes!r} is not allowed; it must be a whole number >= 2.")
    plain, side = split_size(name)
    if side is not None:
        return with_input_size(create_model(plain, num_classes, **kwargs), side)
    if is_external(name):
        build = transformers_model if name.startswith("transformers/") else build_imported
        return build(name, num_classes, **kwargs)
    name = registry.canonical_name(name)
    if (grafted := _GRAFTED.fullmatch(name)) is not None:
        return _grafted_model(grafted[1], grafted[2], num_classes, **kwargs)
    check_name(name)
    library, _, plain = name.partition("/")
    if library in _LIBRARIES:
        return _LIBRARIES[library][1](plain, num_classes, **kwargs)
    return registry.REGISTRY[name](num_classes=num_classes, **kwargs)


def blueprint(name: str, num_classes: int = 100) -> nn.Module:
    """Creates a network only for its keys and shapes: on the meta device, without memory, if its builder supports that.

    A user's own builder may load files or compute with its tensors, so it builds on the CPU.

    Args:
        name: as for :func:`create_model`, which also lists the errors raised.
        num_classes: C.
    """
    with suppress(NotImplementedError), torch.device("cpu" if ":" in name else "meta"):
        return create_model(name, num_classes)
    # RegNets compute widths with tensors, which fails on the meta device.
    return create_model(name, num_classes)


def check_name(name: str) -> None:
    """Checks that :func:`create_model` knows a name; external networks are not checked, which would need building them.

    Raises:
        ValueError: the name is unknown.
        ImportError: a ``timm/`` name, and timm is not installed.
    """
    name, _ = split_size(name)
    if is_external(name):
        return
    name = registry.canonical_name(name)
    library, slash, plain = name.partition("/")
    if (grafted := _GRAFTED.fullmatch(name)) is not None:
        for part in grafted.groups():
            check_name(part)
    elif slash and library in _LIBRARIES:
        if plain not in _LIBRARIES[library][0]():
            raise ValueError(_unknown(name, list_models(f"{library}/*")))
    elif name not in registry.REGISTRY:
        raise ValueError(_unknown(name, [*registry.REGISTRY, *list_models("torchvision/*")]))


def list_models(pattern: str = "*") -> list[str]:
    """Lists the names that :func:`create_model` knows, in natural order (``resnet8`` before ``resnet14``).

    Args:
        pattern: shell-style and case-sensitive, such as ``"wrn*"`` or ``"torchvision/resnet*"``. Matches registered
            names, unless it begins with ``torchvision/`` or ``timm/``.
    """
    library, slash, _ = pattern.partition("/")
    if slash and library in _LIBRARIES:
        names = [f"{library}/{name}" for name in _LIBRARIES[library][0]()]
    else:
        names = list(registry.REGISTRY)
    return sorted((name for name in names if fnmatchcase(name, pattern)), key=_natural)


def _unknown(name: str, choices: list[str]) -> str:
    return (
        f"unknown model {name!r}.{did_you_mean(name, choices)} rld_lightning.list_models() lists all; "
        "list_models('torchvision/*') and list_models('timm/*') list those of the libraries."
    )


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.casefold())]


def _grafted_model(student: str, teacher: str, num_classes: int, **kwargs: Any) -> nn.Module:
    classifier = classifier_of(blueprint(teacher, num_classes))
    backbone = create_model(student, num_classes, **kwargs)
    return GraftedStudent(backbone, nn.Linear(classifier.in_features, num_classes, classifier.bias is not None))
