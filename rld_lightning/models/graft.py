"""A student that ends in its teacher's classifier (SimKD): Chen et al., CVPR 2022, arXiv 2203.14001."""

from copy import deepcopy

from torch import Tensor, nn

from rld_lightning.models.layers import conv
from rld_lightning.models.stages import Stages, classifier_of, stages_of
from rld_lightning.models.taps import forward_with_taps, unwrap


class GraftedStudent(nn.Module):
    """A network whose deepest map, projected to another one's width, is averaged and classified by that one's layer.

    ``logits = classifier(mean over positions of projector(map))``. The projector is a 1x1, a 3x3 and a 1x1
    convolution without biases, each followed by batch norm and ReLU, with half of the classifier's width in between.
    The classifier does not train, yet it is saved with the rest, as it is needed at test time.

    The map is the last one or, where a 1x1 convolution only makes it wider for the network's own classifier (ShuffleV2,
    MobileNetV2), the one before: that convolution is left out, as in the published code. Networks of the libraries keep
    theirs.

    In the published code a map larger than the teacher's is pooled to the teacher's size before the projector; here the
    projector sees the network's own resolution, so that the network can be built and used without its teacher.

    Args:
        backbone: a network whose stages name a last map; taken over, and left without its own classifier.
        classifier: the layer to end in; taken over, and frozen.

    Raises:
        ValueError: the backbone's classifier is not one linear layer whose input is the average of a map, or is
            another network's already.
    """

    def __init__(self, backbone: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        backbone = unwrap(backbone)
        if isinstance(backbone, GraftedStudent):
            raise ValueError("the student ends in another network's classifier already; graft a plain network.")
        own = stages_of(backbone)
        if not own.last_map:
            raise ValueError(
                f"{type(backbone).__name__} does not classify the average of a map, so no other classifier can be put "
                "behind its last map; choose another student."
            )
        channels, width = _channels_before(own, backbone), classifier.in_features
        for path in (*own.widening, own.pooled.removesuffix(":in")):
            backbone.set_submodule(path, nn.Identity())
        self._last_map = own.last_map
        self.stages = Stages(
            features=_inside(own.features),
            preactivations=_inside(own.preactivations),
            pooled="classifier:in",
            last_map="projector",
            norms=_inside(own.norms),
        )
        self.backbone = backbone
        self.projector = nn.Sequential(
            *_conv_norm_relu(channels, width // 2, 1),
            *_conv_norm_relu(width // 2, width // 2, 3),
            *_conv_norm_relu(width // 2, width, 1),
        )
        self.classifier = classifier.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, C)``."""
        _, features = forward_with_taps(self.backbone, images, [self._last_map])
        return self.classifier(self.projector(features[self._last_map]).mean((2, 3)))


def graft(student: nn.Module, teacher: nn.Module) -> GraftedStudent:
    """The student with a fresh projector and a frozen copy of the teacher's classifier.

    Args:
        student: taken over, not copied; loses its own classifier.
        teacher: left as it is.

    Raises:
        ValueError: see :class:`GraftedStudent`; the same of the teacher's classifier.
    """
    like = next(student.parameters())
    classifier = deepcopy(classifier_of(teacher)).train()
    classifier.__class__ = nn.Linear  # a frozen teacher's is not reached by autocast, the student's is
    return GraftedStudent(student, classifier).to(like)


def _channels_before(stages: Stages, network: nn.Module) -> int:
    """The width of the map that is grafted: what the first widening layer takes in, else the classifier."""
    if not stages.widening:
        return classifier_of(network).in_features
    first = network.get_submodule(stages.widening[0])
    return next(layer.in_channels for layer in first.modules() if isinstance(layer, nn.Conv2d))


def _conv_norm_relu(in_channels: int, out_channels: int, kernel: int) -> tuple[nn.Module, ...]:
    return conv(in_channels, out_channels, kernel), nn.BatchNorm2d(out_channels), nn.ReLU()


def _inside(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"backbone.{path}" for path in paths)
