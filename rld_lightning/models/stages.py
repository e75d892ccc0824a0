"""Where the stages of a network are, for losses that look at features."""

from dataclasses import dataclass

from torch import fx, nn

from rld_lightning.models.taps import unwrap


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
        widening: modules between the deepest stage and the last map that only make it wider (a 1x1 convolution and what
            follows it), first to last; empty where the deepest stage is the last map, or nothing is known.
        norms: the batch norm that ends each stage, without the stem: its output is the preactivation or its main
            summand. Paths of modules, for what is wanted is their scale and shift; empty when there is no single one.
    """

    features: tuple[str, ...]
    preactivations: tuple[str, ...]
    pooled: str
    last_map: str = ""
    widening: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


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


def _torchvision_resnet_stages(model: nn.Module) -> Stages | None:
    from torchvision.models.resnet import Bottleneck, ResNet  # a second that networks of this package need not wait

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
    # Distilled networks have a tuple of classifiers, and some entries name modules of timm's feature extractors only.
    classifier = paths.get(get_classifier())
    if classifier is None or not set(features) <= set(paths.values()):
        return None
    # Some make the average wider before they classify it.
    averages = getattr(getattr(model, "global_pool", None), "pool_type", None) == "avg"
    averages = averages and getattr(model, "head_hidden_size", None) == model.num_features
    return Stages(features, (), f"{classifier}:in", "global_pool:in" if averages else "")
