"""The module paths of a network's stages, for feature losses."""

from dataclasses import dataclass

from torch import fx, nn

from rld_lightning.models.taps import unwrap


@dataclass(frozen=True)
class Stages:
    """Tap paths of the features (see :class:`~rld_lightning.models.taps.FeatureTaps`), from shallow to deep.

    Attributes:
        features: the output of the stem and of each stage, ``(B, channels, H, W)`` each, or tokens in a transformer.
        preactivations: the stem's feature, then for each stage the input of the ReLU that ends it (in a pre-activation
            network, of the ReLU that follows it). Empty if the family has none.
        pooled: the classifier's input, ``(B, D)``; ``(B, D, 1, 1)`` if a timm network classifies by convolution.
        last_map: the map ``(B, D, H, W)`` whose average over all positions is the classifier's input; empty if that
            input is computed in another way.
        widening: modules between the deepest stage and the last map that only widen it (a 1x1 convolution, its norm and
            activation), in order; empty if the deepest stage is the last map, or if unknown.
        norms: the batch norm that ends each stage, without the stem; its output is the preactivation or its main
            summand. Module paths rather than taps, since losses read their scale and shift; empty if there is no single
            one.
    """

    features: tuple[str, ...]
    preactivations: tuple[str, ...]
    pooled: str
    last_map: str = ""
    widening: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


def stages_of(model: nn.Module) -> Stages:
    """Returns a network's stages.

    Args:
        model: a registered network, a torchvision ResNet or a timm network that declares ``feature_info``.

    Raises:
        ValueError: the stages are unknown; tap paths must then be named explicitly.
    """
    model = unwrap(model)
    # Some timm networks have a `stages` attribute too: their layers.
    if isinstance(declared := getattr(model, "stages", None), Stages):
        return declared
    if (stages := _torchvision_resnet_stages(model)) is not None:
        return stages
    if (stages := _timm_stages(model)) is not None:
        return stages
    if isinstance(model, fx.GraphModule):
        raise ValueError("a fused network has lost its stages; use model.teacher.fuse=false (FrozenTeacher's fuse).")
    if isinstance(reason := getattr(model, "no_stages", None), str):
        raise ValueError(reason)
    raise ValueError(
        f"{type(model).__name__} does not declare its stages; name the module paths explicitly, which "
        "model.named_modules() lists: student_taps and teacher_taps of the loss (+loss.student_taps=[...] "
        "+loss.teacher_taps=[...])."
    )


def classifier_of(model: nn.Module) -> nn.Linear:
    """Returns the linear layer that maps the pooled features to logits.

    Args:
        model: a network with known stages, see :func:`stages_of`.

    Raises:
        ValueError: the stages are unknown, or the classifier is not one linear layer.
    """
    path = stages_of(model).pooled.removesuffix(":in")
    linear = [module for module in unwrap(model).get_submodule(path).modules() if isinstance(module, nn.Linear)]
    if len(linear) != 1:
        raise ValueError(f"the classifier of {type(unwrap(model)).__name__} ({path}) is not one linear layer.")
    return linear[0]


def _torchvision_resnet_stages(model: nn.Module) -> Stages | None:
    from torchvision.models.resnet import Bottleneck, ResNet  # here, as the import takes a second

    if not isinstance(model, ResNet):
        return None
    last = [f"layer{i}.{len(getattr(model, f'layer{i}')) - 1}" for i in range(1, 5)]
    norm = "bn3" if isinstance(model.layer1[0], Bottleneck) else "bn2"
    return Stages(
        features=("relu", "layer1", "layer2", "layer3", "layer4"),
        preactivations=("relu", *(f"{block}.relu:in" for block in last)),
        pooled="fc:in",
        last_map="layer4",
        norms=tuple(f"{block}.{norm}" for block in last),
    )


def _timm_stages(model: nn.Module) -> Stages | None:
    info, get_classifier = (getattr(model, name, None) for name in ("feature_info", "get_classifier"))
    if info is None or get_classifier is None:
        return None
    paths = {module: path for path, module in model.named_modules()}
    features = tuple(entry["module"] for entry in getattr(info, "info", info))
    # Distilled networks have a tuple of classifiers; some entries name modules of timm's feature extractors only.
    classifier = paths.get(get_classifier())
    if classifier is None or not set(features) <= set(paths.values()):
        return None
    # Some networks widen the average before the classifier.
    averages = getattr(getattr(model, "global_pool", None), "pool_type", None) == "avg"
    averages = averages and getattr(model, "head_hidden_size", None) == model.num_features
    return Stages(features, (), f"{classifier}:in", "global_pool:in" if averages else "")
