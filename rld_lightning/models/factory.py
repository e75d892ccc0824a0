"""The one door to every network: by registered name, or ``torchvision/<name>`` and ``timm/<name>``."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, TypeVar

import torch
import torchvision
from torch import fx, nn
from torchvision.models.resnet import Bottleneck, ResNet

from rld_lightning.models.suggestions import did_you_mean
from rld_lightning.models.taps import unwrap

ModelBuilder = TypeVar("ModelBuilder", bound=Callable[..., nn.Module])

_REGISTRY: dict[str, Callable[..., nn.Module]] = {}

# With auxiliary classifiers these two return a tuple while they train. Their published weights were trained on images
# in [-1, 1], to which `transform_input` converts; always, because no file of weights would say whether to.
_INCEPTIONS = ("googlenet", "inception_v3")
_INCEPTION_OPTIONS = {"aux_logits": False, "transform_input": True, "init_weights": True}


@dataclass(frozen=True)
class Stages:
    """Where feature losses look, as tap paths (:class:`~rld_lightning.models.taps.FeatureTaps`), shallow to deep.

    Attributes:
        features: the stem's output, then each stage's; ``(B, channels, H, W)`` each, tokens where those are tokens.
        preactivations: the inputs of the ReLU that ends each stage or, in a pre-activation network, comes next; the
            stem's feature stands for itself. Empty when the family has none.
        pooled: the classifier's input, ``(B, D)``; ``(B, D, 1, 1)`` where a timm network classifies by convolution.
        last_map: what is averaged over all positions into the classifier's input, ``(B, D, H, W)``; empty where the
            classifier's input is made in another way.
        norms: the batch norm that ends each stage, without the stem: its output is the preactivation or its main
            summand. Paths of modules, for what is wanted is their scale and shift; empty when there is no single one.
    """

    features: tuple[str, ...]
    preactivations: tuple[str, ...]
    pooled: str
    last_map: str = ""
    norms: tuple[str, ...] = ()


def register_model(builder: ModelBuilder) -> ModelBuilder:
    """Decorator: :func:`create_model` finds the function or class under its own name.

    Args:
        builder: called as ``builder(num_classes=..., **kwargs)``; gives the network.

    Raises:
        ValueError: the name is taken.
    """
    name = builder.__name__
    if name in _REGISTRY:
        raise ValueError(f"model {name!r} is already registered, by {_REGISTRY[name].__module__}.")
    _REGISTRY[name] = builder
    return builder


def create_model(name: str, num_classes: int = 100, **kwargs: Any) -> nn.Module:
    """A network by name, freshly initialised.

    In-place activations of torchvision and timm networks are switched off, for they would overwrite tapped features,
    and the auxiliary classifiers of torchvision's ``googlenet`` and ``inception_v3`` are left out.

    Args:
        name: a registered name (``"wrn_40_2"``), ``"torchvision/resnet34"`` or ``"timm/vit_tiny_patch16_224"``; or two
            of them, ``"resnet8@resnet32x4"``: the first, to be ended in the classifier of a trained second, see
            :class:`~rld_lightning.models.graft.GraftedStudent`.
        num_classes: number of logits, at least 2.
        **kwargs: passed to the (first) builder. The two libraries take ``pretrained=True``: ImageNet weights, with a
            fresh classifier when ``num_classes`` is not theirs. For torchvision these are the original ones
            (``IMAGENET1K_V1``, the teachers of the literature) where a network has several.

    Returns:
        the network; maps ``(B, 3, H, W)`` to ``(B, num_classes)``.

    Raises:
        ValueError: an unknown name, fewer than two classes, or ``pretrained`` weights that timm does not have.
        ImportError: a ``timm/`` name without timm.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes!r} is not allowed; a classifier needs at least 2.")
    student, at, teacher = name.partition("@")
    if at:
        return _grafted_model(student, teacher, num_classes, **kwargs)
    library, slash, plain = name.partition("/")
    if slash and library == "torchvision":
        return _torchvision_model(plain, num_classes, **kwargs)
    if slash and library == "timm":
        return _timm_model(plain, num_classes, **kwargs)
    if name not in _REGISTRY:
        raise ValueError(_unknown(name, [*_REGISTRY, *list_models("torchvision/*")]))
    return _REGISTRY[name](num_classes=num_classes, **kwargs)


def list_models(pattern: str = "*") -> list[str]:
    """Names that :func:`create_model` knows, in natural order (``resnet8`` before ``resnet14``).

    Args:
        pattern: shell-style, upper and lower case differ. Registered names unless it begins with ``torchvision/`` or
            ``timm/``: ``"wrn_*"``, ``"torchvision/resnet*"``.
    """
    if pattern.startswith("torchvision/"):
        names = [f"torchvision/{name}" for name in _torchvision_names()]
    elif pattern.startswith("timm/"):
        names = [f"timm/{name}" for name in _import_timm().list_models()]
    else:
        names = list(_REGISTRY)
    return sorted((name for name in names if fnmatchcase(name, pattern)), key=_natural)


def stages_of(model: nn.Module) -> Stages:
    """Where feature losses look in this network.

    Args:
        model: a registered network, a torchvision ResNet or a timm network that declares ``feature_info``.

    Raises:
        ValueError: nothing is known about the network; tap paths must then be named explicitly.
    """
    model = unwrap(model)
    # timm networks have `stages` too, and mean their layers.
    if isinstance(declared := getattr(model, "stages", None), Stages):
        return declared
    if isinstance(model, ResNet):
        return _torchvision_resnet_stages(model)
    if (stages := _timm_stages(model)) is not None:
        return stages
    if isinstance(model, fx.GraphModule):
        raise ValueError("a fused network has lost its stages; use model.teacher.fuse=false (FrozenTeacher's fuse).")
    raise ValueError(
        f"{type(model).__name__} does not declare its stages; name the module paths explicitly (model.named_modules() "
        "lists them)."
    )


def classifier_of(model: nn.Module) -> nn.Linear:
    """The linear layer that turns the pooled features into logits.

    Args:
        model: a network whose stages are known, see :func:`stages_of`.

    Raises:
        ValueError: nothing is known about the network, or its classifier is not one linear layer.
    """
    path = stages_of(model).pooled.removesuffix(":in")
    linear = [module for module in unwrap(model).get_submodule(path).modules() if isinstance(module, nn.Linear)]
    if len(linear) != 1:
        raise ValueError(f"the classifier of {type(unwrap(model)).__name__} ({path}) is not one linear layer.")
    return linear[0]


def _unknown(name: str, choices: list[str]) -> str:
    return (
        f"unknown model {name!r}.{did_you_mean(name, choices)} list_models() lists all; "
        "list_models('torchvision/*') and list_models('timm/*') list those of the libraries."
    )


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.casefold())]


def _without_inplace(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return model


def _grafted_model(student: str, teacher: str, num_classes: int, **kwargs: Any) -> nn.Module:
    from rld_lightning.models.graft import GraftedStudent  # which itself needs this file

    # Only the shape of the teacher's classifier is wanted.
    with torch.device("meta"):
        classifier = classifier_of(create_model(teacher, num_classes))
    backbone = create_model(student, num_classes, **kwargs)
    return GraftedStudent(backbone, nn.Linear(classifier.in_features, num_classes, classifier.bias is not None))


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _torchvision_model(name: str, num_classes: int, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    if name not in _torchvision_names():
        raise ValueError(_unknown(f"torchvision/{name}", list_models("torchvision/*")))
    options = (_INCEPTION_OPTIONS if name in _INCEPTIONS else {}) | kwargs
    if not pretrained:
        return _without_inplace(torchvision.models.get_model(name, num_classes=num_classes, **options))
    published = torchvision.models.get_model_weights(name)
    weights = published.__members__.get("IMAGENET1K_V1", published.DEFAULT)
    model = torchvision.models.get_model(name, weights=weights, **kwargs)
    if num_classes != len(weights.meta["categories"]) or name in _INCEPTIONS:
        source, model = model.state_dict(), torchvision.models.get_model(name, num_classes=num_classes, **options)
        fitting = {key: source[key] for key, value in model.state_dict().items() if value.shape == source[key].shape}
        model.load_state_dict(fitting, strict=False)
    return _without_inplace(model)


def _torchvision_resnet_stages(model: ResNet) -> Stages:
    last = [f"layer{i}.{len(getattr(model, f'layer{i}')) - 1}" for i in range(1, 5)]
    norm = "bn3" if isinstance(model.layer1[0], Bottleneck) else "bn2"
    return Stages(
        features=("relu", "layer1", "layer2", "layer3", "layer4"),
        preactivations=("relu", *(f"{block}.relu:in" for block in last)),
        pooled="fc:in",
        last_map="layer4",
        norms=tuple(f"{block}.{norm}" for block in last),
    )


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ImportError('timm/ models need timm: pip install "rld-lightning[timm]"') from error
    return timm


def _timm_model(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    timm = _import_timm()
    if not timm.is_model(name):
        raise ValueError(_unknown(f"timm/{name}", list_models("timm/*")))
    if kwargs.get("pretrained") and not timm.is_model_pretrained(name):  # timm would go on with random ones
        raise ValueError(f"timm has no pretrained weights of {name}; timm.list_pretrained() lists the models that do.")
    return _without_inplace(timm.create_model(name, num_classes=num_classes, **kwargs))


def _timm_stages(model: nn.Module) -> Stages | None:
    info = getattr(model, "feature_info", None)
    if info is None or not hasattr(model, "get_classifier"):
        return None
    paths = {module: path for path, module in model.named_modules()}
    features = tuple(entry["module"] for entry in getattr(info, "info", info))
    # Distilled networks have a tuple of classifiers, and some entries name modules of timm's feature extractors only.
    classifier = paths.get(model.get_classifier())
    if classifier is None or not set(features) <= set(paths.values()):
        return None
    # Some make the average wider before they classify it.
    averages = getattr(getattr(model, "global_pool", None), "pool_type", None) == "avg"
    averages = averages and getattr(model, "head_hidden_size", None) == model.num_features
    return Stages(features, (), f"{classifier}:in", "global_pool:in" if averages else "")
